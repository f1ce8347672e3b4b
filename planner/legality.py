"""What may be combined with what: one table, for pins and for whole plans alike.

A rule looks at a `Case`, in which None is undecided, so that the same rule refuses two pins that
contradict each other and a candidate of the search. What an engine can run is `engines.toml`'s.
Sources: formulas 5 (schedules in the pinned torch), torch_notes 2.1d (recomputation under a split
backward).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from cost_models.decisions import Decisions, Workload
from cost_models.engines import load_engine
from cost_models.schedule import SPLIT_BACKWARD, schedule_illegal
from cost_models.state import in_torch
from ir.errors import UsageError
from planner.decisions import Pins

VIRTUAL_STAGES = {
    "gpipe": (1, 1), "1f1b": (1, 1), "zbh1": (1, 1), "interleaved": (2, 1 << 30),
    "zbv": (2, 2), "dualpipev": (2, 2),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a rule looks at; None is not decided yet."""

    engine: str
    precision: str
    seq_len: int
    pp: int | None
    dp_outer: int | None
    cp: int | None
    tp: int | None
    zero: int | None
    shard: int | None
    reshard: bool | None
    schedule: str | None
    virtual_stages: int | None
    recomputes: bool | None
    selective: bool | None
    offload: tuple[tuple[str, str], ...] | None
    compile: bool | None
    sequence_parallel: bool | None
    cp_kind: str | None
    weights: str | None
    place: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A combination that is refused: the keys it is about, when, why, and what would fix it."""

    keys: tuple[str, ...]
    refused: Callable[[Case], bool]
    reason: str
    fix: str


def _virtual(c: Case) -> bool:
    if c.schedule is None or c.virtual_stages is None:
        return False
    least, most = VIRTUAL_STAGES[c.schedule]
    return not least <= c.virtual_stages <= most


def _below(c: Case, what: str) -> bool:
    return what in dict(c.offload or ())


def _ours(c: Case) -> bool:
    """Whether FSDP2 holds the state, as in our runtime."""
    return in_torch(load_engine(c.engine).zero_mode(3))


RULES = (
    Rule(
        keys=("zero", "offload"),
        refused=lambda c: _below(c, "params") and c.zero not in (None, 3),
        reason="parameters lie elsewhere where they are gathered for each use: under zero=3",
        fix="zero=3, or offload=optimizer:cpu",
    ),
    Rule(
        keys=("pp", "zero", "offload"),
        refused=lambda c: _ours(c) and c.pp == 1 and c.zero in (2, 3)
        and _below(c, "optimizer") and not _below(c, "params"),
        reason="FSDP2 keeps shards with their optimizer: each micro-batch's gradients go there",
        fix="zero=1, or zero=3 and offload=optimizer:cpu,params:cpu",
    ),
    Rule(
        keys=("recompute", "offload"),
        refused=lambda c: bool(c.selective) and _below(c, "activations"),
        reason="what selective recomputation keeps is torch's own cache, which stays on the GPU",
        fix="recompute=full or none",
    ),
    Rule(
        keys=("schedule", "recompute"),
        refused=lambda c: c.schedule in SPLIT_BACKWARD and bool(c.recomputes),
        reason="zbh1, zbv and dualpipev split backward in two, and each half would recompute",
        fix="recompute=none, or schedule=1f1b or interleaved",
    ),
    Rule(
        keys=("schedule",),
        refused=lambda c: c.pp != 1
        and c.schedule not in (None, *load_engine(c.engine).schedules),
        reason="the engine does not run that schedule",
        fix="schedule=1f1b, or another --engine",
    ),
    Rule(
        keys=("schedule", "compile"),
        refused=lambda c: c.pp != 1 and bool(c.compile)
        and c.schedule not in (None, *load_engine(c.engine).compiled_schedules),
        reason="the engine cannot run compiled stages where backward is split in two",
        fix="compile=off, or schedule=1f1b or interleaved",
    ),
    Rule(
        keys=("pp", "reshard"),
        refused=lambda c: (c.pp or 1) > 1 and bool(c.reshard),
        reason="a pipeline stage gathers its parameters once a step and keeps them",
        fix="reshard=off, or pp=1",
    ),
    Rule(
        keys=("zero", "reshard"),
        refused=lambda c: c.zero is not None and c.zero < 3 and bool(c.reshard),
        reason="parameters are gathered, and again in backward, under zero=3 alone",
        fix="zero=3, or reshard=off",
    ),
    Rule(
        keys=("zero", "shard"),
        refused=lambda c: c.zero == 0 and (c.shard or 1) > 1,
        reason="zero=0 shards nothing",
        fix="zero=1, 2 or 3, or shard=1",
    ),
    Rule(
        keys=("schedule", "virtual_stages"),
        refused=_virtual,
        reason="stages on a rank: gpipe, 1f1b, zbh1 one; zbv, dualpipev two; interleaved more",
        fix="schedule=interleaved takes any virtual_stages from 2",
    ),
    Rule(
        keys=("pp", "virtual_stages"),
        refused=lambda c: c.pp == 1 and (c.virtual_stages or 1) > 1,
        reason="one pipeline rank holds the whole model",
        fix="pp=2 or more, or virtual_stages=1",
    ),
    Rule(
        keys=("pp", "schedule"),
        refused=lambda c: c.pp == 1 and c.schedule not in (None, "1f1b", "gpipe"),
        reason="one pipeline rank has nothing to interleave",
        fix="pp=2 or more, or schedule=1f1b",
    ),
    Rule(
        keys=("tp", "sequence_parallel"),
        refused=lambda c: c.tp == 1 and bool(c.sequence_parallel),
        reason="sequence parallelism splits the residual stream over tp ranks",
        fix="tp=2 or more, or sequence_parallel=off",
    ),
    Rule(
        keys=("tp", "place"),
        refused=lambda c: c.tp == 1 and c.place,
        reason="a placement is on tp, and tp=1 splits nothing",
        fix="tp=2 or more",
    ),
    Rule(
        keys=("cp", "seq_len"),
        refused=lambda c: c.seq_len % (c.cp or 1) != 0,
        reason="cp ranks share a sequence evenly",
        fix="a --seq-len that cp divides",
    ),
    Rule(
        keys=("cp", "cp_kind", "seq_len"),
        refused=lambda c: (c.cp or 1) > 1 and c.cp_kind == "ring"
        and c.seq_len % (2 * (c.cp or 1)) != 0,
        reason="a balanced causal ring gives each cp rank two chunks of the sequence",
        fix="a --seq-len that 2*cp divides, or cp_kind=allgather",
    ),
    Rule(
        keys=("pp", "dp_outer"),
        refused=lambda c: c.pp == 1 and (c.dp_outer or 1) > 1,
        reason="without a pipeline no data rank is outside one",
        fix="pp=2 or more, or dp_outer=1",
    ),
    Rule(
        keys=("dp_outer",),
        refused=lambda c: c.pp != 1 and (c.dp_outer or 1) > 1
        and c.engine not in ("native", "native-compiled"),
        reason="the engine lays its pipeline ranks outermost",
        fix="dp_outer=1, or --engine native-compiled",
    ),
    Rule(
        keys=("pp", "zero"),
        refused=lambda c: (c.pp or 1) > 1
        and c.zero not in (None, *load_engine(c.engine).pp_zero),
        reason="the engine does not combine that ZeRO stage with a pipeline",
        fix="zero=1, or pp=1",
    ),
    Rule(
        keys=("cp", "cp_kind"),
        refused=lambda c: c.engine == "deepspeed" and (c.cp or 1) > 1
        and c.cp_kind not in (None, "ulysses"),
        reason="DeepSpeed shares a sequence the Ulysses way alone",
        fix="cp_kind=ulysses, or another --engine",
    ),
    Rule(
        keys=("weights",),
        refused=lambda c: c.weights not in (None, c.precision),
        reason="this version plans training with the weights in the workload's precision",
        fix="--precision says the format of weights and arithmetic",
    ),
)  # fmt: skip


def illegal(
    decisions: Decisions, workload: Workload, *, scheduled: bool = True
) -> str | None:
    """Why the table refuses these decisions, or None; cheap enough for the search.

    scheduled: False where the schedule is still to be decided.
    """
    case, d = _case_of(decisions, workload), decisions
    if not scheduled:
        case = replace(case, schedule=None, virtual_stages=None)
    reason = next((rule.reason for rule in RULES if rule.refused(case)), None)
    if reason or not scheduled:
        return reason
    return schedule_illegal(d.schedule, d.pp, d.microbatches, d.virtual_stages)


def inconsistent(
    decisions: Decisions, workload: Workload, *, gpus: int | None = None, layers: int | None = None
) -> str | None:
    """Why the numbers of these decisions do not agree with each other, or None.

    gpus: what the hardware has. layers: how many the model's pipeline divides.
    """
    d = decisions
    ranks, block = d.dp * d.cp * d.tp, d.ep * d.etp
    near = max(1, d.dp // d.dp_outer) * d.cp  # data ranks of a stage in a row
    samples = d.dp * d.micro_batch * d.microbatches
    count = d.pp * d.virtual_stages
    checks = (
        (gpus in (None, d.gpus), f"pp*dp*cp*tp is {d.gpus}, the hardware has {gpus} GPUs"),
        (ranks % block == 0, f"ep*etp = {block} does not divide dp*cp*tp = {ranks}"),
        (d.dp * d.cp % d.shard == 0, f"shard = {d.shard} does not divide dp*cp = {d.dp * d.cp}"),
        (d.dp % d.dp_outer == 0, f"dp_outer = {d.dp_outer} does not divide dp = {d.dp}"),
        (near * d.tp % block == 0,
         f"ep*etp = {block} does not divide the {near * d.tp} GPUs of a stage in a pipeline"),
        (near % d.shard == 0 or d.shard % near == 0,
         f"shard = {d.shard}, beside {near} data ranks in each of dp_outer = {d.dp_outer} parts"),
        (samples == workload.global_batch,
         f"dp*micro_batch*microbatches is {samples}, global_batch {workload.global_batch}"),
        (len(d.stages) == count, f"{len(d.stages)} stages, but pp*virtual_stages is {count}"),
        (layers in (None, sum(d.stages)),
         f"the stages hold {sum(d.stages)} layers, the model has {layers}"),
        (len(d.recompute) in (0, count), f"recompute of {len(d.recompute)} stages of {count}"),
    )  # fmt: skip
    return next((reason for holds, reason in checks if not holds), None)


def check_pins(pins: Pins, workload: Workload, *, gpus: int, layers: int | None = None) -> None:
    """Raise UsageError where pins contradict each other, the hardware, workload or model."""
    case = _case_of_pins(pins, workload)
    for rule in RULES:
        if rule.refused(case):
            raise UsageError(_named(rule.keys, pins, workload), why=rule.reason, hints=(rule.fix,))
    _check_mesh(pins, gpus)
    _check_outer(pins)
    _check_experts(pins, gpus)
    _check_shard(pins, gpus)
    _check_batch(pins, workload)
    _check_schedule(pins, workload)
    _check_stages(pins, layers)


def _check_mesh(pins: Pins, gpus: int) -> None:
    keys = [key for key in ("tp", "pp", "cp", "dp") if getattr(pins, key) is not None]
    size = prod(getattr(pins, key) for key in keys)
    if gpus % size == 0 and (len(keys) < 4 or size == gpus):
        return
    last = keys[-1]
    rest = size // getattr(pins, last)
    fits = [f"{last}={n}" for n in _divisors(gpus // rest)] if gpus % rest == 0 else []
    fits = fits[-1:] if len(keys) == 4 else fits[-6:]
    raise UsageError(
        f"{_joined(keys, pins)}: {'*'.join(keys)} = {size} "
        + ("is not the hardware's" if len(keys) == 4 else "does not divide the hardware's")
        + f" {gpus} GPUs",
        why="pp*dp*cp*tp = GPUs",
        hints=(f"--fix {' or '.join(fits)}",) if fits else ("leave one of them to the search",),
    )


def _check_outer(pins: Pins) -> None:
    outer, dp = pins.dp_outer or 1, pins.dp
    if dp is not None and dp % outer:
        raise UsageError(
            f"{_joined(['dp', 'dp_outer'], pins)}: dp_outer does not divide dp",
            why="so many of the dp lie outside the pipeline",
            hints=(f"dp_outer may be {', '.join(map(str, _divisors(dp)))}",),
        )
    near = dp // outer * pins.cp if outer > 1 and dp and pins.cp else 0
    if near and pins.shard and near % pins.shard and pins.shard % near:
        raise UsageError(
            f"{_joined(['dp', 'dp_outer', 'cp', 'shard'], pins)}: shards lie across pipelines",
            why=f"{near} data ranks of a stage are in a row: shard divides them, or has all of"
            " several rows",
            hints=(f"shard={near}",),
        )


def _check_experts(pins: Pins, gpus: int) -> None:
    block = (pins.ep or 1) * (pins.etp or 1)
    known = pins.dp is not None and pins.cp is not None and pins.tp is not None
    ranks = (pins.dp or 1) * (pins.cp or 1) * (pins.tp or 1) if known else gpus // (pins.pp or 1)
    if ranks % block == 0:
        return
    keys = [k for k in ("ep", "etp", *(("dp", "cp", "tp") if known else ("pp",)))
            if getattr(pins, k) is not None]  # fmt: skip
    raise UsageError(
        f"{_joined(keys, pins)}: ep*etp = {block} does not divide a stage's {ranks} GPUs",
        why="expert layers re-factor a stage's ranks: dp*cp*tp = edp*ep*etp",
        hints=(f"ep*etp may be {', '.join(map(str, _divisors(ranks)))}",),
    )


def _check_shard(pins: Pins, gpus: int) -> None:
    known = pins.dp is not None and pins.cp is not None
    if known:
        keys, ranks = ["shard", "dp", "cp"], (pins.dp or 1) * (pins.cp or 1)
    else:
        keys, ranks = ["shard", "pp", "tp"], gpus // ((pins.pp or 1) * (pins.tp or 1))
    if pins.shard is None or ranks % pins.shard == 0:
        return
    keys = [key for key in keys if getattr(pins, key) is not None]
    raise UsageError(
        f"{_joined(keys, pins)}: shard does not divide the {ranks} data ranks",
        why="shard divides dp*cp",
        hints=(f"shard may be {', '.join(map(str, _divisors(ranks)))}",),
    )


def _check_batch(pins: Pins, workload: Workload) -> None:
    keys = [k for k in ("dp", "micro_batch", "microbatches") if getattr(pins, k) is not None]
    size, batch = prod(getattr(pins, key) for key in keys), workload.global_batch
    if batch % size == 0 and (len(keys) < 3 or size == batch):
        return
    below, above = batch // size * size, -(-batch // size) * size
    near = [str(n) for n in dict.fromkeys((below, above)) if n] if len(keys) < 3 else [str(size)]
    raise UsageError(
        f"{_joined(keys, pins)}: a global batch of {batch} does not divide by {size}",
        why="dp*micro_batch*microbatches = global batch",
        hints=(f"--global-batch {' or '.join(near)}",),
    )


def _check_schedule(pins: Pins, workload: Workload) -> None:
    if pins.schedule is None or pins.pp is None:
        return
    keys, count = ["schedule", "pp", "microbatches"], pins.microbatches
    if count is None:
        if pins.dp is None or pins.micro_batch is None:
            return
        keys = ["schedule", "pp", "dp", "micro_batch"]
        count = workload.global_batch // (pins.dp * pins.micro_batch)
    stages = pins.virtual_stages or VIRTUAL_STAGES[pins.schedule][0]
    reason = schedule_illegal(pins.schedule, pins.pp, count, stages)
    if reason:
        raise UsageError(
            f"{_joined(keys, pins)} contradict each other",
            why=reason,
            hints=("fewer dp or a smaller micro_batch make more micro-batches",),
        )


def _check_stages(pins: Pins, layers: int | None) -> None:
    if pins.stages is not None and layers not in (None, sum(pins.stages)):
        raise UsageError(
            f"{_joined(['stages'], pins)} holds {sum(pins.stages)} layers, the model has {layers}",
            hints=(f"layers per stage that sum to {layers}",),
        )
    if pins.pp is None:
        return
    count = pins.pp * pins.virtual_stages if pins.virtual_stages else None
    found = None if pins.stages is None else len(pins.stages)
    if found and (found % pins.pp if count is None else found != count):
        keys = ["stages", "pp", *(["virtual_stages"] if count else [])]
        raise UsageError(
            f"{_joined(keys, pins)}: {found} stages",
            why="there are pp*virtual_stages stages" + (f" = {count}" if count else ""),
            hints=("one number a stage, in order",),
        )
    counts = pins.recompute and {len(pins.recompute.full), len(pins.recompute.selective)} - {1}
    if counts and count and counts != {count}:
        raise UsageError(
            f"{_joined(['recompute', 'pp'], pins)} does not say it for {count} stages",
            hints=("one number for all stages, or one a stage: full:4/4/3/2",),
        )


def _case_of(d: Decisions, workload: Workload) -> Case:
    return Case(
        engine=workload.engine, precision=workload.precision, seq_len=workload.seq_len,
        pp=d.pp, dp_outer=d.dp_outer, cp=d.cp, tp=d.tp, zero=d.zero, shard=d.shard,
        reshard=d.reshard, schedule=d.schedule, virtual_stages=d.virtual_stages,
        recomputes=any(full or selective for full, selective in d.recompute),
        selective=any(selective for _, selective in d.recompute), offload=d.offload,
        compile=d.compile, sequence_parallel=d.sequence_parallel, cp_kind=d.cp_kind,
        weights=None, place=False,
    )  # fmt: skip


def _case_of_pins(p: Pins, workload: Workload) -> Case:
    r = p.recompute
    return Case(
        engine=workload.engine, precision=workload.precision, seq_len=workload.seq_len,
        pp=p.pp, dp_outer=p.dp_outer, cp=p.cp, tp=p.tp, zero=p.zero, shard=p.shard,
        reshard=p.reshard, schedule=p.schedule, virtual_stages=p.virtual_stages,
        recomputes=None if r is None else any((*r.full, *r.selective)),
        selective=None if r is None else any(r.selective), offload=p.offload,
        compile=p.compile, sequence_parallel=p.sequence_parallel, cp_kind=p.cp_kind,
        weights=p.weights, place=bool(p.place),
    )  # fmt: skip


def _named(keys: tuple[str, ...], pins: Pins, workload: Workload) -> str:
    """The pins of a refused rule, and the flags beside them, as the user wrote them."""
    said = [f"--fix {pins.said(key)}" for key in keys
            if key not in ("seq_len", "place") and getattr(pins, key) is not None]  # fmt: skip
    said += [f"--fix place:{p}={s}" for p, s in pins.place[:1] if "place" in keys]
    said += [f"--seq-len {workload.seq_len}"] if "seq_len" in keys else []
    alone = f"cannot hold on --engine {workload.engine}"
    return " and ".join(said) + " " + ("contradict each other" if len(said) > 1 else alone)


def _joined(keys: list[str], pins: Pins) -> str:
    return " and ".join(f"--fix {pins.said(key)}" for key in keys)


def _divisors(n: int) -> list[int]:
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})
