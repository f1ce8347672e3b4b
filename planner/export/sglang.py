"""SGLang: the command that serves a plan."""

from __future__ import annotations

from planner.export.header import comment, header
from planner.export.pinned import checked
from planner.export.serving import (
    DTYPES,
    SERVING,
    WHOLE,
    Flags,
    alone,
    formats_note,
    has_experts,
    keeps_formats,
    node_gpus,
    offloaded_gib,
    online_fp8,
    script,
    serving,
    share,
    step_tokens,
    tiers_note,
    tokens,
)
from planner.export.target import APPROXIMATE, UNSUPPORTED, Exported, Lost, judge
from planner.serving.plan import ServingPlan

TAKES = ("pools=none",)
LAUNCH = "python -m sglang.launch_server"


def export(plan: object, source: str) -> Exported:
    """A script `sglang_serve.sh`."""
    p = serving(plan, "sglang")
    lost = losses(p, "sglang")
    said = (*header(p, "sglang", checked("sglang")), *(f"lost: {row}" for row in lost))
    words = [LAUNCH, '--model-path "${MODEL:?the checkpoint}"']
    each, node = p.serving.ranks * p.serving.pp, node_gpus(p, source)
    together = p.serving.replicas * each <= node  # one server makes whole copies inside a node
    made = flags(p, p.serving.replicas if together else 1)
    if each > node:
        made += [("--nnodes", str(-(-each // node))), ("--node-rank", '"${NODE_RANK:?}"'),
                 ("--dist-init-addr", '"${HEAD_NODE:?}:29500"')]  # fmt: skip
    return Exported(
        files=(("sglang_serve.sh", script(words, made, comment(said))),), lost=lost,
        notes=() if together or p.serving.replicas == 1 else (alone(p),),
    )  # fmt: skip


def losses(p: ServingPlan, target: str) -> tuple[Lost, ...]:
    """What SGLang does not do of the plan."""
    return judge(target, SERVING, _rows(p), TAKES)


def flags(p: ServingPlan, replicas: int) -> Flags:
    """Everything that the plan decides and SGLang has a flag for. replicas: of this server."""
    s = p.serving
    made: Flags = [("--tp-size", str(s.ranks)), ("--pp-size", str(s.pp))]
    if s.attention_dp > 1:
        made.append(("--attn-dp-size", str(s.attention_dp)))
    if has_experts(p):
        made.append(("--ep-size", str(s.ep)))
    if replicas > 1:
        made.append(("--dp-size", str(replicas)))
    made += [("--max-running-requests", str(share(p))), ("--context-length", str(tokens(p)))]
    if taken := step_tokens(p, "sglang"):
        made.append(("--chunked-prefill-size", str(taken)))
    if s.default in DTYPES:
        made.append(("--dtype", DTYPES[s.default]))
    if online_fp8(p):
        made.append(("--quantization", "fp8"))
    if s.kv == "fp8":
        made.append(("--kv-cache-dtype", "fp8_e4m3"))
    if s.tiers:
        made.append(("--cpu-offload-gb", f"{offloaded_gib(p):g}"))
    return made


def _rows(p: ServingPlan) -> tuple[tuple[str, bool, str, str], ...]:
    """Every decision: whether SGLang does it, else how far and why not."""
    s = p.serving
    plain = all(h.tier == "cpu" and h.place == "stream" for h in s.tiers)
    return (
        ("tp", True, "", ""), ("pp", True, "", ""), ("ep", True, "", ""), ("etp", True, "", ""),
        ("attention_dp", True, "", ""), ("replicas", True, "", ""), ("batch", True, "", ""),
        ("prefill_chunk", True, "", ""),
        ("default", s.default in WHOLE, UNSUPPORTED, formats_note(p)),
        ("weights", keeps_formats(p) or online_fp8(p), UNSUPPORTED, formats_note(p)),
        ("kv", s.kv in ("fp8", s.default, "bf16"), UNSUPPORTED, f"no cache in {s.kv}"),
        ("tiers", not s.tiers, APPROXIMATE if plain else UNSUPPORTED, tiers_note(p)),
        ("kv_tier", s.kv_tier == "gpu", UNSUPPORTED, "the cache is on the GPU"),
        ("kv_window", s.kv_window == 0, UNSUPPORTED, "the cache forgets nothing"),
        ("kv_policy", not s.kv_policy, UNSUPPORTED, "the cache keeps and reads every token"),
        ("prefill", s.prefill is None, UNSUPPORTED, "pools are servers of their own"),
    )  # fmt: skip
