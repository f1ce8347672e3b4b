"""A published run as a case: a model file's arguments, a cluster, a workload, decisions.

What a source leaves unsaid gets a named default, listed with the case. A run that cannot be laid
out (degrees that do not multiply to its GPUs) is skipped with the reason.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from cost_models.decisions import Decisions, Workload
from cost_models.engines import Engine, load_engine
from cost_models.hardware import Cluster, load_hardware
from planner.validation.rows import Run


class Skipped(Exception):
    """A run that cannot be predicted; its message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a run is predicted from. args: of validation/models.py; defaults: what was assumed.

    stages and recompute of `decisions` are set once the graph is there: `recompute` says how.
    """

    run: Run
    args: tuple[tuple[str, str], ...]
    cluster: Cluster
    workload: Workload
    engine: Engine
    switches: tuple[str, ...]
    decisions: Decisions
    recompute: str  # none, selective, full, unstated, or a share of the layers
    defaults: tuple[str, ...]


# --- models ---------------------------------------------------------------------------------------

# What tables leave out of a kind of model: (the kind, words of its name, arguments).
_GPT = {"family": "gpt", "activation": "gelu", "tied": 1}
_KINDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("GPT", r"BLOOM|GPT-\d|GPT3|OPT|NeoX|MPT", _GPT),
    ("Nemotron dense", r"Nemotron-(3-8B|22B|15B|340B|4)", {"activation": "relu2"}),
    ("GPT-OSS", r"GPT-OSS", {"window": 128}),
    ("Qwen3", r"Qwen3", {"qk_norm": 1}),
    ("DeepSeek-V3", r"DeepSeek-V3|DeepSeek-R1|Kimi", {"q_rank": 1536}),
    ("GLM-5", r"GLM-5", {"q_rank": 2048}),
    ("DeepSeek-V4-Flash", r"DeepSeek-V4-Flash", {"attention": "shared"}),
    ("Nemotron-3 Nano", r"Nemotron-3.*Nano|Nemotron-3.5.*30B",
     {"activation": "relu2", "mamba_heads": 64, "shared_ffn": 3712}),
    ("Nemotron-3 Super", r"Nemotron-3.*Super",
     {"activation": "relu2", "mamba_heads": 128, "latent": 1024, "shared_ffn": 5376}),
)  # fmt: skip


def _model_args(run: Run, defaults: list[str]) -> dict[str, Any]:
    m = run.model
    name = str(m.get("name", ""))
    found: dict[str, Any] = {}
    for kind, pattern, args in _KINDS:
        if re.search(pattern, name, re.I):
            found |= args
            defaults.append(f"what the table leaves out: as the public models of {kind}")
    for key in ("layers", "hidden", "vocab", "seq_len"):
        if not m.get(key):
            raise Skipped(f"model.{key} is not stated")
        found[key] = int(m[key])
    if not m.get("heads"):
        defaults.append("heads = the most, a multiple of 8, of 128 elements or more")
    found["heads"] = int(m.get("heads") or _heads(found["hidden"]))
    heads = found["heads"]
    if not m.get("kv_heads"):
        defaults.append("kv_heads = heads")
    found["kv_heads"] = int(m.get("kv_heads") or heads)
    found["head_dim"] = int(m.get("head_dim") or found["hidden"] // heads)
    if m.get("attention"):
        found["attention"] = "mla"
    if not m.get("ffn_hidden") and not m.get("moe"):
        raise Skipped("model.ffn_hidden is not stated")
    found["ffn"] = int(m.get("ffn_hidden") or 4 * found["hidden"])
    moe = m.get("moe")
    if moe:
        found |= {"experts": int(moe["experts"]), "top_k": int(moe["top_k"]),
                  "expert_ffn": int(moe["expert_ffn"])}  # fmt: skip
        shared = int(moe.get("shared") or 0) * int(moe["expert_ffn"])
        found.setdefault("shared_ffn", shared)
        dense = m.get("dense_layers")
        if dense is None and m.get("attention"):
            dense = 1
            defaults.append("dense_layers = 1 under MLA")
        found["dense_layers"] = int(dense or 0)
        found["further"] = int(bool(m.get("mtp_layers")) and "w/o mtp" not in run.notes.lower())
    if "activation" not in found and not moe and m.get("params_b"):
        found["activation"] = _activation(found, float(m["params_b"]) * 1e9)
        defaults.append("gated feed-forward or not: what the printed parameters come to")
    if m.get("hybrid"):
        found["pattern"] = _pattern(found["layers"])
        found.setdefault("mamba_heads", max(1, found["hidden"] // 32))
        defaults.append("hybrid: 8 in 88 layers attention, Mamba-2 and experts in turn")
    return found


def _activation(found: dict[str, Any], parameters: float) -> str:
    """"swiglu", three matmuls, or "gelu", two: whichever is nearer to the parameters."""
    h, f, d = found["hidden"], found["ffn"], found["head_dim"]
    layer = 2 * h * d * (found["heads"] + found["kv_heads"])

    def far(matmuls: int) -> float:
        total = found["layers"] * (layer + matmuls * h * f) + 2 * found["vocab"] * h
        return float(abs(total / parameters - 1))

    return "swiglu" if far(3) <= far(2) else "gelu"


def _heads(hidden: int) -> int:
    return next((k for k in range(hidden // 128 // 8 * 8, 0, -8) if hidden % k == 0), 8)


def _pattern(layers: int) -> str:
    """Mamba-2 and experts in turn, attention instead of the mixer about every sixth time."""
    attention = max(1, round(layers / 11) if layers > 60 else round(layers / 9))
    mixers = (layers + attention) // 2 - attention
    letters = []
    every = mixers / (attention + 1)
    placed = 0
    for i in range(mixers):
        letters += ["M", "E"]
        if placed < attention and i + 1 >= every * (placed + 1):
            letters[-1:] = ["E", "*"]
            placed += 1
    while len(letters) < layers:
        letters.append("E")
    return "".join(letters[:layers])


# --- engines ------------------------------------------------------------------------------------

_ENGINES = (  # words of the framework -> the engine class
    (r"megatron-deepspeed", "megatron-deepspeed"),
    (r"megatron-lm", "megatron-2022"),
    (r"megatron|nemo / |nemo/|mlperf|nemo framework", "megatron"),
    (r"composer|llm-foundry|mosaic", "fsdp-eager"),
    (r"torchtitan", "torchtitan"),
    (r"automodel", "automodel"),
    (r"deepspeed", "deepspeed"),
    (r"jax|pax|maxtext", "automodel"),
    (r"thunder", "torch-bf16"),
    (r"", "fsdp-compiled"),
)


def _engine(run: Run, defaults: list[str]) -> Engine:
    name = next(e for pattern, e in _ENGINES if re.search(pattern, run.framework.lower()))
    if name == "fsdp-compiled" and "fsdp" not in run.framework.lower():
        defaults.append("framework not known here: as compiled FSDP")
    if name == "torchtitan" and run.config.get("torch_compile") is not True:
        name = "torchtitan-eager"
        if run.config.get("torch_compile") is None:
            defaults.append("torch_compile = false")
    if name == "megatron-2022" and not run.hardware["gpu"].startswith(("a100", "v100")):
        name = "megatron"
    if name == "megatron-2022" and run.config.get("zero_or_fsdp") == "zero3":
        name = "deepspeed-2021"  # Megatron-LM had no ZeRO-3: the paper compares with DeepSpeed's
    engine = load_engine(name)
    model = str(run.model.get("name"))
    if name == "megatron" and re.search("DeepSeek|Kimi|Moonlight", model):
        engine = engine.switched("precision_aware")
        defaults.append("moments in bf16, as NVIDIA's recipes of the model have them")
    return engine


# What notes say of a run's software -> the engine's switch of that name.
_SWITCHES = (
    (r"cuda graph|, graphs|with graphs", "graphs"),
    (r"token-?drop", "padded"),
    (r"overlap on|1f1b all-to-all overlap|tuned \(hybridep", "ep_overlap"),
    (r"all-to-all dispatcher", "plain_dispatch"),
    (r"\basync ?tp", "async_tp"),
    (r"mxfp8|fp8-mx|sub-channel|block scaling", "block_scaled"),
)


def _release(notes: str) -> float:
    """The container's release, year and month as 26.06; 0 where none is named."""
    found = re.search(r"(\d\d\.\d\d)(\.\d+)? container", notes)
    return float(found[1]) if found else 0.0


def _natural(run: Run) -> bool:
    return bool(run.is_moe and re.search("natural routing|real data", run.notes.lower()))


# --- clusters -----------------------------------------------------------------------------------

def _cluster(run: Run, defaults: list[str]) -> Cluster:
    hw = run.hardware
    count, per_node = int(hw["num_gpus"]), int(hw.get("gpus_per_node") or 8)
    if not hw.get("gpus_per_node"):
        defaults.append("gpus_per_node = 8")
    name = hw["gpu"]
    cluster = load_hardware(f"{name}x{count}")
    if cluster.domain_size <= 8:
        size = min(per_node, count)
        while count % size:
            size -= 1
        cluster = replace(cluster, node_size=size, domain_size=size)
    rate = _network(str(hw.get("interconnect") or ""), per_node)
    if rate:
        staged = "omni-path" in str(hw).lower()  # no GPUDirect: copies through the host's memory
        share = cluster.inter.efficiency * (0.5 if staged else 1)
        if staged:
            defaults.append("Omni-Path without GPUDirect: half of what the network reaches")
        cluster = replace(cluster, inter=replace(cluster.inter, bytes_per_s=rate, efficiency=share))
    elif cluster.nodes > 1:
        defaults.append("network: the device's standard node")
    return cluster


def _network(text: str, per_node: int) -> float | None:
    """Bytes/s a GPU that a printed network comes to; None where it prints none."""
    times = re.search(r"(\d+)x(\d+) ?Gb?", text) or re.search(r"(\d+)x HDR (\d+)", text)
    if times:
        return int(times[1]) * int(times[2]) * 1e9 / 8 / per_node
    rate = re.search(r"(\d+) ?Gb(?:ps|/s)(.*)", text)
    if not rate:
        return None
    each = 1 if "per gpu" in rate[2].lower() or int(rate[1]) <= 400 else per_node
    return int(rate[1]) * 1e9 / 8 / each


# --- decisions ----------------------------------------------------------------------------------


def configure(run: Run) -> Case:
    """The case of a run. Raises Skipped with the reason."""
    defaults: list[str] = []
    for name in ("model", "hardware", "config"):
        if not getattr(run, name):
            raise Skipped(f"{name} is not stated")
    for name in ("gpu", "num_gpus"):
        if not run.hardware.get(name):
            raise Skipped(f"hardware.{name} is not stated")
    args = _model_args(run, defaults)
    engine = _engine(run, defaults)
    if engine.name in ("megatron-2022", "megatron-deepspeed", "deepspeed-2021"):
        args["flash"] = 0
    cluster = _cluster(run, defaults)
    c = run.config
    gpus = cluster.count

    def degree(name: str) -> int:
        if c.get(name) is None and name != "ep":
            defaults.append(f"{name} = 1")
        return int(c.get(name) or 1)

    tp, pp, cp = degree("tp"), degree("pp"), degree("cp")
    ep = degree("ep") if run.is_moe else 1
    if gpus % (tp * pp * cp):
        raise Skipped(f"tp {tp} x pp {pp} x cp {cp} does not divide {gpus} GPUs")
    dp = gpus // (tp * pp * cp)
    if (dp * cp * tp) % ep:
        raise Skipped(f"ep {ep} does not divide the {dp * cp * tp} ranks of a stage")
    if args.get("experts", ep) % ep:
        raise Skipped(f"ep {ep} does not divide {args['experts']} experts")
    batch = c.get("global_batch_sequences")
    if not batch:
        raise Skipped("config.global_batch_sequences is not stated")
    if not c.get("micro_batch"):
        defaults.append("micro_batch = 1; torchtitan: a micro-batch for every stage")
    micro = min(c.get("micro_batch") or _micro(run, engine, pp, batch / dp), batch / dp)
    m = max(1, math.ceil(batch / dp / micro - 1e-9))
    micro = batch / dp / m
    if micro == int(micro):
        micro = int(micro)
    layers = args["layers"]
    v = _virtual(run, engine, layers, pp, m, defaults)
    if pp * v > layers:
        raise Skipped(f"{pp} x {v} stages for {layers} layers")
    if c.get("zero_or_fsdp") not in ("none", "zero1", "zero2", "zero3", "fsdp"):
        defaults.append("zero_or_fsdp = zero1")
    if not c.get("precision"):
        defaults.append("precision = bf16")
    if _natural(run):
        defaults.append("natural routing: the busiest expert rank has 1.3 x the mean")
    zero, shard = _sharding(run, engine, dp * cp, pp)
    split = c.get("sequence_parallel")
    if split is None or (engine.name == "megatron" and tp > 1):
        split = tp > 1
        if tp > 1:
            defaults.append("sequence_parallel = true under tp")
    precision = c.get("precision") or "bf16"
    notes = run.notes.lower()
    switches = tuple(name for pattern, name in _SWITCHES if re.search(pattern, notes))
    older = 0 < _release(notes) < 26.06 or run.model.get("hybrid")
    static = engine.name == "megatron" and cluster.device.family == "blackwell" and run.is_moe
    recent = static and not older and not _natural(run)
    if recent and "graphs" not in switches:
        switches = ("graphs", *switches)
        defaults.append("CUDA graphs: NVIDIA's recipes of 2026 on Blackwell, not for hybrids")
    if precision == "fp8" and "rowwise" in notes:
        precision = "bf16"
        defaults.append("rowwise fp8 gains nothing over bf16")
    if engine.network_share < 1:
        defaults.append("ZeRO-3 of 2021: one network port of a node's eight")
        inter = cluster.inter
        inter = replace(inter, efficiency=inter.efficiency * engine.network_share)
        cluster = replace(cluster, inter=inter)
    d = Decisions(
        pp=pp, dp=dp, cp=cp, tp=tp, ep=ep, etp=1, zero=zero, shard=shard,
        reshard=c.get("fsdp_strategy") != "SHARD_GRAD_OP", micro_batch=micro, microbatches=m,
        schedule="interleaved" if v > 1 else "1f1b" if m >= pp else "gpipe", virtual_stages=v,
        sequence_parallel=bool(split) and tp > 1, compile=engine.fused,
        cp_kind="ring" if engine.name == "megatron" else "allgather",
        grad_dtype="bf16" if engine.name == "megatron" else engine.grad_dtype,  # NVIDIA's recipes
        stages=stages_of(layers, pp * v, filled=engine.name == "megatron-deepspeed"),
    )  # fmt: skip
    if c.get("recompute") is None:
        defaults.append("recompute = the least that fits")
    workload = Workload(
        engine=engine.name, global_batch=int(batch), seq_len=args["seq_len"],
        precision=precision, expert_imbalance=1.3 if _natural(run) else 1.0,
    )
    return Case(
        run=run, args=tuple((k, str(x)) for k, x in args.items() if x != ""), cluster=cluster,
        workload=workload, engine=engine,
        switches=switches, decisions=d, recompute=_recompute(run),
        defaults=tuple(dict.fromkeys(defaults)),
    )  # fmt: skip


def _micro(run: Run, engine: Engine, pp: int, local: float) -> int:
    """Sequences of a micro-batch that is not printed: 1; torchtitan cuts the local batch into as
    many micro-batches as there are stages, two chunks a rank if it interleaves them."""
    if pp == 1 or not engine.name.startswith("torchtitan"):
        return 1
    chunks = 2 if "interleaved" in str(run.config.get("schedule")) else 1
    return max(1, int(local // (pp * chunks)))


def _recompute(run: Run) -> str:
    """What is computed again; where MFU and HFU are both printed, the share of layers."""
    said = run.config.get("recompute")
    if run.config.get("recompute_modules") == "core_attn":
        return "none"  # flash attention computes it again in any case
    if said is None and "automodel" in run.framework.lower():
        return "full"  # its benchmark recipes: activation_checkpointing: true
    if said == "selective" and run.again is not None:
        return f"full:{run.again:.3f}"
    return "unstated" if said is None else str(said)


def _virtual(
    run: Run, engine: Engine, layers: int, pp: int, m: int, defaults: list[str]
) -> int:
    """Chunks a rank: as printed; where NVIDIA's tables print none, the most that come out even at
    two layers or more (their recipes interleave), else the most of 2 to 5."""
    said = run.config.get("virtual_pp")
    if pp == 1:
        return 1
    if said:
        v = int(said)
    elif engine.name != "megatron" or run.config.get("schedule"):
        v = 1
    else:
        fits = [k for k in range(5, 1, -1) if pp * k <= layers + 2]
        even = [
            k for k in range(8, 1, -1)
            if pp * k * 2 <= layers + 2 and 0 in (layers % (pp * k), (layers + 2) % (pp * k))
        ]
        fits = even or fits
        v = fits[0] if fits else 1
        defaults.append(f"virtual_pp = {v}")
    while v > 1 and pp * v > layers:
        v -= 1
    return v if v == 1 or m % max(1, m // pp) == 0 else 1


def stages_of(
    layers: int, chunks: int, filled: bool = False, tail: int = 1
) -> tuple[int, ...]:
    """Layers a stage: even; filled: the first ones to the most that any has (DeepSpeed's
    partition_balanced); where it does not divide, the embedding counts as a layer and what follows
    the last one as `tail` (Megatron's account_for_embedding/loss_in_pipeline_split, and layouts
    by hand), the rest to the first ones."""
    if chunks == 1:
        return (layers,)
    if layers % chunks == 0:
        return (layers // chunks,) * chunks
    if filled:
        most, found = -(-layers // chunks), list[int]()
        for later in range(chunks - 1, -1, -1):
            found.append(min(most, layers - sum(found) - later))
        return tuple(found)
    base, more = divmod(layers + 1 + tail, chunks)
    found = [base + (i < more) for i in range(chunks)]
    found[0] -= 1
    found[-1] -= tail
    if min(found) < 1 and tail > 1:
        return stages_of(layers, chunks, tail=tail - 1)
    if min(found) < 1:
        base, more = divmod(layers, chunks)
        found = [base + (i < more) for i in range(chunks)]
    return tuple(found)


def _sharding(run: Run, engine: Engine, ranks: int, pp: int) -> tuple[int, int]:
    """(ZeRO stage, ranks that share a shard)."""
    c = run.config
    said = str(c.get("zero_or_fsdp") or "zero1")
    zero = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}.get(said, 1)
    if c.get("fsdp_strategy") == "SHARD_GRAD_OP":
        zero = 2
    shard = ranks if zero else 1
    if c.get("fsdp_strategy") == "HYBRID_SHARD":
        shard = math.gcd(ranks, int(run.hardware.get("gpus_per_node") or 8))
    return zero, shard
