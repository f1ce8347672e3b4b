"""How it was laid out: a run's degrees, batch, pipeline, sharding and recomputation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cost_models.decisions import Decisions
from cost_models.engines import Engine
from planner.validation.configure_model import Args
from planner.validation.rows import Run, Skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class _Degrees:
    tp: int
    pp: int
    cp: int
    ep: int
    dp: int


def decisions_of(
    run: Run, engine: Engine, args: Args, gpus: int, defaults: list[str]
) -> Decisions:
    """A run's layout, recomputation apart; what is assumed is added to `defaults`. args: of its
    model. Raises Skipped where degrees, batch and layers do not go together."""
    at = _degrees(run, args, gpus, defaults)
    micro, m = _batch(run, engine, at, defaults)
    layers, recipes = args["layers"], engine.name == "megatron"  # NVIDIA's
    v = _virtual(run, engine, layers, at.pp, m, defaults)
    if at.pp * v > layers:
        raise Skipped(f"{at.pp} x {v} stages for {layers} layers")
    zero, shard = _sharding(run, at.dp * at.cp, defaults)
    return Decisions(
        pp=at.pp, dp=at.dp, cp=at.cp, tp=at.tp, ep=at.ep, etp=1, zero=zero, shard=shard,
        reshard=run.config.get("fsdp_strategy") != "SHARD_GRAD_OP", micro_batch=micro,
        microbatches=m, schedule="interleaved" if v > 1 else "1f1b" if m >= at.pp else "gpipe",
        virtual_stages=v, sequence_parallel=_sequence_parallel(run, recipes, at.tp, defaults),
        compile=engine.fused, cp_kind="ring" if recipes else "allgather",
        grad_dtype="bf16" if recipes else engine.grad_dtype,
        stages=stages_of(layers, at.pp * v, filled=engine.fills_stages),
    )  # fmt: skip


def _degrees(run: Run, args: Args, gpus: int, defaults: list[str]) -> _Degrees:
    def degree(name: str) -> int:
        if run.config.get(name) is None:
            defaults.append(f"{name} = 1")
        return int(run.config.get(name) or 1)

    tp, pp, cp = degree("tp"), degree("pp"), degree("cp")
    ep = degree("ep") if run.is_moe else 1
    if gpus % (tp * pp * cp):
        raise Skipped(f"tp {tp} x pp {pp} x cp {cp} does not divide {gpus} GPUs")
    dp = gpus // (tp * pp * cp)
    if (dp * cp * tp) % ep:
        raise Skipped(f"ep {ep} does not divide the {dp * cp * tp} ranks of a stage")
    if args.get("experts", ep) % ep:
        raise Skipped(f"ep {ep} does not divide {args['experts']} experts")
    if run.config.get("dp") is not None and int(run.config["dp"]) != dp:
        raise Skipped(f"dp {run.config['dp']} is not {gpus} GPUs / (tp {tp} x pp {pp} x cp {cp})")
    return _Degrees(tp=tp, pp=pp, cp=cp, ep=ep, dp=dp)


def _batch(
    run: Run, engine: Engine, at: _Degrees, defaults: list[str]
) -> tuple[Any, int]:
    """(sequences of a micro-batch, micro-batches) of a data rank; a fraction of a sequence where
    the last micro-batch is smaller, so that all tokens are counted. Raises Skipped where data
    ranks would have different numbers of sequences."""
    batch, said = (int(run.config.get(k) or 0) for k in ("global_batch_sequences", "micro_batch"))
    if not batch:
        raise Skipped("config.global_batch_sequences is not stated")
    if batch % at.dp:
        raise Skipped(f"global_batch_sequences {batch} is no multiple of dp {at.dp}")
    if said > batch // at.dp:
        raise Skipped(f"micro_batch {said} is more than the {batch // at.dp} of a data rank")
    if not said:
        defaults.append("micro_batch = 1; torchtitan: a micro-batch for every stage")
    local = batch / at.dp
    micro = min(said or _micro(run, engine, at.pp, local), local)
    m = max(1, math.ceil(local / micro - 1e-9))
    micro = local / m
    if said and micro != said:
        defaults.append(f"micro_batch = {micro:.4g}, as {said} does not divide {local:g}")
    return (int(micro) if micro == int(micro) else micro), m


def _sequence_parallel(run: Run, recipes: bool, tp: int, defaults: list[str]) -> bool:
    """As printed; NVIDIA's recipes have it under tensor parallelism, whatever a table says."""
    said = run.config.get("sequence_parallel")
    if tp == 1 or (said is not None and not recipes):
        return bool(said) and tp > 1
    defaults.append("sequence_parallel = true under tp")
    return True


def _micro(run: Run, engine: Engine, pp: int, local: float) -> int:
    """Sequences of a micro-batch that is not printed: 1; torchtitan cuts the local batch into as
    many micro-batches as there are stages, two chunks a rank if it interleaves them."""
    if pp == 1 or not engine.name.startswith("torchtitan"):
        return 1
    chunks = 2 if "interleaved" in str(run.config.get("schedule")) else 1
    return max(1, int(local // (pp * chunks)))


def _virtual(
    run: Run, engine: Engine, layers: int, pp: int, m: int, defaults: list[str]
) -> int:
    """Chunks a rank: as printed; where NVIDIA's tables print none, the most that come out even at
    two layers or more (their recipes interleave), else the most of 2 to 5."""
    said, schedule = int(run.config.get("virtual_pp") or 0), str(run.config.get("schedule"))
    if pp == 1:
        if said > 1:
            defaults.append(f"virtual_pp = 1, not {said}: there is no pipeline")
        return 1
    if said:
        v = said
    elif engine.name != "megatron" or run.config.get("schedule"):
        v = 1
        if "interleaved" in schedule:
            defaults.append("virtual_pp = 1, though the schedule is interleaved")
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
    v = v if v == 1 or m % max(1, m // pp) == 0 else 1
    if said and v != said:
        defaults.append(f"virtual_pp = {v}, not {said}: {layers} layers, {m} micro-batches")
    if said and v > 1 and schedule == "1F1B":
        defaults.append("schedule = interleaved, as virtual_pp says")
    return v


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


def _sharding(run: Run, ranks: int, defaults: list[str]) -> tuple[int, int]:
    """(ZeRO stage, ranks that share a shard)."""
    c, stages = run.config, {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}
    said = c.get("zero_or_fsdp")
    if said not in stages:
        other = "" if said is None else f", as {said!r} is not known here"
        defaults.append(f"zero_or_fsdp = zero1{other}")
    zero = stages.get(str(said), 1)
    if c.get("fsdp_strategy") == "SHARD_GRAD_OP":
        zero = 2
    shard = ranks if zero else 1
    if c.get("fsdp_strategy") == "HYBRID_SHARD":
        shard = math.gcd(ranks, int(run.hardware.get("gpus_per_node") or 8))
    group = c.get("fsdp_shard_group")
    if group is not None and int(group) != shard:
        defaults.append(f"fsdp_shard_group = {shard}, not {group}")
    return zero, shard


def recompute_of(run: Run, defaults: list[str]) -> str:
    """What is computed again; where MFU and HFU are both printed, the share of layers."""
    said = run.config.get("recompute")
    if said is None:
        defaults.append("recompute = the least that fits")
    if run.config.get("recompute_modules") == "core_attn":
        return "none"  # flash attention computes it again in any case
    if said is None and "automodel" in run.framework.lower():
        return "full"  # its benchmark recipes: activation_checkpointing: true
    if said == "selective" and run.again is not None:
        return f"full:{run.again:.3f}"
    return "unstated" if said is None else str(said)
