"""vLLM: the command that serves a plan."""

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
from planner.export.target import APPROXIMATE, UNSUPPORTED, Exported, judge
from planner.serving.plan import ServingPlan

TAKES = ("ep=1", "attention_dp=1", "pools=none")


def export(plan: object, source: str) -> Exported:
    """A script `vllm_serve.sh`."""
    p = serving(plan, "vllm")
    lost = judge("vllm", SERVING, _rows(p), TAKES)
    said = (*header(p, "vllm", checked("vllm")), *(f"lost: {row}" for row in lost))
    words = ["vllm serve", '"${MODEL:?the checkpoint}"']
    s, node = p.serving, node_gpus(p, source)
    # one server makes whole copies of a model without experts, inside a node
    together = not has_experts(p) and s.replicas * s.ranks * s.pp <= node
    made = _flags(p, s.replicas if together else s.attention_dp)
    if s.ranks * s.pp > node:
        made.append(("--distributed-executor-backend", "ray"))
    return Exported(
        files=(("vllm_serve.sh", script(words, made, comment(said))),), lost=lost,
        notes=() if together or s.replicas == 1 else (alone(p),),
    )  # fmt: skip


def _flags(p: ServingPlan, copies: int) -> Flags:
    """Everything that the plan decides and vLLM has a flag for. copies: its data ranks."""
    s = p.serving
    made: Flags = [("--tensor-parallel-size", str(s.tp)), ("--pipeline-parallel-size", str(s.pp))]
    if copies > 1:
        made.append(("--data-parallel-size", str(copies)))
    if has_experts(p) and s.ep > 1:
        made.append(("--enable-expert-parallel",))
    made += [("--max-num-seqs", str(share(p, s.attention_dp))),
             ("--max-model-len", str(tokens(p)))]  # fmt: skip
    if taken := step_tokens(p, "vllm"):
        made.append(("--max-num-batched-tokens", str(taken)))
    if s.default in DTYPES:
        made.append(("--dtype", DTYPES[s.default]))
    if online_fp8(p):
        made.append(("--quantization", "fp8"))
    if s.kv == "fp8":
        made.append(("--kv-cache-dtype", "fp8"))
    if s.tiers:
        made.append(("--cpu-offload-gb", f"{offloaded_gib(p):g}"))
    return made


def _rows(p: ServingPlan) -> tuple[tuple[str, bool, str, str], ...]:
    """Every decision: whether vLLM does it, else how far and why not."""
    s, experts = p.serving, has_experts(p)
    plain = all(h.tier == "cpu" and h.place == "stream" for h in s.tiers)
    return (
        ("tp", True, "", ""), ("pp", True, "", ""),
        ("ep", not experts or s.ep in (1, s.ranks), UNSUPPORTED,
         "expert parallelism is a switch: over all ranks of a stage, or none"),
        ("etp", True, "", ""),
        ("attention_dp", s.attention_dp == 1 or experts, UNSUPPORTED,
         "replicas of attention alone go with experts"),
        ("replicas", True, "", ""), ("batch", True, "", ""), ("prefill_chunk", True, "", ""),
        ("default", s.default in WHOLE, UNSUPPORTED, formats_note(p)),
        ("weights", keeps_formats(p) or online_fp8(p), UNSUPPORTED, formats_note(p)),
        ("kv", s.kv in ("fp8", s.default, "bf16"), UNSUPPORTED, f"no cache in {s.kv}"),
        ("tiers", not s.tiers, APPROXIMATE if plain else UNSUPPORTED, tiers_note(p)),
        ("kv_tier", s.kv_tier == "gpu", UNSUPPORTED, "the cache is on the GPU"),
        ("kv_window", s.kv_window == 0, UNSUPPORTED, "the cache forgets nothing"),
        ("kv_policy", not s.kv_policy, UNSUPPORTED, "the cache keeps and reads every token"),
        ("prefill", s.prefill is None, UNSUPPORTED, "pools are servers of their own"),
    )  # fmt: skip
