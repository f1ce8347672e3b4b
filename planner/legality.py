"""What may be combined with what: one table, for pins and for whole plans alike.

A rule looks at a `Case`, in which None is undecided, so that the same rule refuses two pins that
contradict each other and a candidate of the search. What an engine can run is `engines.toml`'s.
Sources: formulas 5 (schedules in the pinned torch), torch_notes 2.1d (recomputation under a split
backward).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from cost_models.decisions import Decisions, Workload
from cost_models.engines import load_engine
from cost_models.schedule import SPLIT_BACKWARD, schedule_illegal
from cost_models.share_rules import share_fault
from cost_models.state import in_torch
from planner.runnable import NATIVE

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
    microbatches: int | None
    schedule: str | None
    virtual_stages: int | None
    recomputes: bool | None
    selective: bool | None
    keep: bool
    offload: tuple[tuple[str, str], ...] | None
    compile: bool | None
    formats: bool
    sequence_parallel: bool | None
    cp_kind: str | None
    weights: str | None
    place: bool
    shares: bool
    tp_by_part: bool


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


def _runs(c: Case, schedules: tuple[str, ...]) -> bool:
    """Whether a schedule is among an engine's. An engine's own 1F1B may have fewer micro-batches
    than stages, which torch's takes not: then the first rank runs GPipe's order, and the step is as
    long and the first rank's memory as large as GPipe's."""
    few = c.pp is not None and c.microbatches is not None and c.microbatches < c.pp
    filled = c.schedule == "gpipe" and "1f1b" in schedules and few
    return c.schedule in (None, *schedules) or filled


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
        keys=("offload",),
        refused=lambda c: ":" in dict(c.offload or ()).get("optimizer", "")
        and c.engine not in NATIVE,
        reason="the optimizer of some layers: our own runtime alone holds units' state apart",
        fix="offload=optimizer:cpu, or --engine native-compiled",
    ),
    Rule(
        keys=("recompute", "offload"),
        refused=lambda c: bool(c.selective) and _below(c, "activations"),
        reason="what selective recomputation keeps is torch's own cache, which stays on the GPU",
        fix="recompute=full or none",
    ),
    Rule(
        keys=("keep",),
        refused=lambda c: c.keep and load_engine(c.engine).recompute_grain != "op",
        reason="the engine keeps a set of its own of a layer that is computed again in part",
        fix="keep=default, or --engine native-compiled",
    ),
    Rule(
        keys=("formats", "keep"),
        refused=lambda c: c.keep and c.formats,
        reason="a matmul in fewer bits keeps its casts as the compiler chooses",
        fix="keep=default, or formats=none",
    ),
    Rule(
        keys=("cp", "cp_kind", "keep"),
        refused=lambda c: c.keep and (c.cp or 1) > 1 and c.cp_kind == "ulysses",
        reason="what ulysses exchanges is kept as well, whichever operations are",
        fix="keep=default, or cp_kind=allgather",
    ),
    Rule(
        keys=("schedule", "offload"),
        refused=lambda c: c.schedule in SPLIT_BACKWARD
        and ":" in dict(c.offload or ()).get("activations", ""),
        reason="zbh1, zbv and dualpipev split backward in two: layers are not offloaded by count",
        fix="offload=activations:cpu, or schedule=1f1b or interleaved",
    ),
    Rule(
        keys=("schedule", "recompute"),
        refused=lambda c: c.schedule in SPLIT_BACKWARD and bool(c.recomputes),
        reason="zbh1, zbv and dualpipev split backward in two, and each half would recompute",
        fix="recompute=none, or schedule=1f1b or interleaved",
    ),
    Rule(
        keys=("schedule",),
        refused=lambda c: c.pp != 1 and not _runs(c, load_engine(c.engine).schedules),
        reason="the engine does not run that schedule",
        fix="schedule=1f1b, or another --engine",
    ),
    Rule(
        keys=("schedule", "compile"),
        refused=lambda c: c.pp != 1 and bool(c.compile)
        and not _runs(c, load_engine(c.engine).compiled_schedules),
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
        and c.engine not in NATIVE,
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
        keys=("formats", "compile"),
        refused=lambda c: c.formats and c.compile is False and c.engine in NATIVE,
        reason="uncompiled, the casts of an 8-bit matmul are ten kernels, and take what it saves",
        fix="compile=on, or formats=none",
    ),
    Rule(
        keys=("shares",),
        refused=lambda c: c.shares and c.engine not in NATIVE,
        reason="the engine gives every data rank as many micro-batches",
        fix="shares=none, or --engine native-compiled",
    ),
    Rule(
        keys=("tp_by_part",),
        refused=lambda c: c.tp_by_part and c.engine not in NATIVE,
        reason="the engine gives every stage as many ranks",
        fix="tp_by_part=none, or --engine native-compiled",
    ),
    Rule(
        keys=("tp_by_part", "cp"),
        refused=lambda c: c.tp_by_part and (c.cp or 1) > 1,
        reason="where parts have another tp, no ranks share a sequence",
        fix="cp=1, or tp_by_part=none",
    ),
    Rule(
        keys=("tp_by_part", "shares"),
        refused=lambda c: c.tp_by_part and c.shares,
        reason="replicas on parts have one tp, so that gradients are reduced rank by rank",
        fix="shares=none, or tp_by_part=none",
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
    d = decisions
    reason = refusal(case_of(d, workload, scheduled))
    if reason or not scheduled:
        return reason
    return schedule_illegal(d.schedule, d.pp, d.microbatches, d.virtual_stages)


@functools.lru_cache(maxsize=4096)
def refusal(case: Case) -> str | None:
    """What the first rule says that refuses a case. Of many meshes the cases are few."""
    return next((rule.reason for rule in RULES if rule.refused(case)), None)


def inconsistent(
    decisions: Decisions, workload: Workload, *, gpus: int | None = None, layers: int | None = None
) -> str | None:
    """Why the numbers of these decisions do not agree with each other, or None.

    gpus: what the hardware has. layers: how many the model's pipeline divides.
    """
    d = decisions
    ranks, block = d.dp * d.cp * d.tp, d.ep * d.etp
    near = max(1, d.dp // d.dp_outer) * d.cp  # data ranks of a stage in a row
    each = sum(s.dp * s.microbatches for s in d.shares) or d.dp * d.microbatches
    samples = d.micro_batch * each
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
         f"{'samples of all shares are' if d.shares else 'dp*micro_batch*microbatches is'}"
         f" {samples}, global_batch {workload.global_batch}"),
        (len(d.stages) == count, f"{len(d.stages)} stages, but pp*virtual_stages is {count}"),
        (layers in (None, sum(d.stages)),
         f"the stages hold {sum(d.stages)} layers, the model has {layers}"),
        (not d.parts or sum(n for _, n in d.parts) == d.pp,
         f"parts have {sum(n for _, n in d.parts)} pipeline ranks, pp is {d.pp}"),
        (len(d.parts) < 2 or d.virtual_stages == d.dp_outer == 1,
         "over several kinds of GPUs a rank has one stage, and dp lies inside the pipeline"),
        (len(d.recompute) in (0, count), f"recompute of {len(d.recompute)} stages of {count}"),
        (not d.keep or any(some for _, some in d.recompute),
         "keep says what is kept in part, and no layer is computed again in part"),
        (not d.moved or len(d.moved) == count,
         f"activations offloaded of {len(d.moved or ())} stages of {count}"),
        (d.below is None or len(d.below) == count,
         f"the optimizer offloaded of {len(d.below or ())} stages of {count}"),
        (d.below is None or (d.below == d.below_of(d.stages) and any(d.below)),
         "a stage offloads the optimizer of more layers than it has, or none does"),
        (d.below is None or len(d.parts) < 2,
         "over several kinds of GPUs the optimizer is offloaded whole"),
        (all(full + n <= layers for layers, (full, n) in zip(d.stages, d.pairs)),
         "a stage offloads or recomputes more layers than it has"),
    )  # fmt: skip
    fault = share_fault(d) if d.shares else tp_fault(d)
    return fault or next((reason for holds, reason in checks if not holds), None)


def tp_fault(d: Decisions) -> str | None:
    """Why parts cannot have the tp of their own that the decisions say, or None."""
    if not d.tp_by_part:
        return None
    names, tps = zip(*d.tp_by_part)
    rising = sorted(tps)
    checks = (
        (names == tuple(name for name, _ in d.parts),
         "tp_by_part does not name the parts that stages lie on, in their order"),
        (rising[0] < rising[-1], "tp_by_part is the same for every part: that is tp alone"),
        (all(b % a == 0 for a, b in itertools.pairwise(rising)),
         "of tp_by_part one does not divide the next larger"),
        (d.tp == rising[-1], f"tp is {d.tp}, the largest of tp_by_part {rising[-1]}"),
        (d.ep * d.etp == 1, "experts lie over all ranks of a stage, and tp_by_part has others"),
    )  # fmt: skip
    return next((reason for holds, reason in checks if not holds), None)


def case_of(d: Decisions, workload: Workload, scheduled: bool) -> Case:
    """What the rules look at; scheduled: as `illegal` has it. Degrees of which they ask only
    whether they are more than 1 are cut to 2: of many decisions the cases are few."""
    return Case(
        engine=workload.engine, precision=workload.precision, seq_len=workload.seq_len,
        pp=d.pp, dp_outer=min(2, d.dp_outer), cp=d.cp, tp=d.tp, zero=d.zero, shard=min(2, d.shard),
        reshard=d.reshard, microbatches=d.microbatches,
        schedule=d.schedule if scheduled else None,
        virtual_stages=d.virtual_stages if scheduled else None,
        recomputes=any(full or selective for full, selective in d.recompute),
        selective=any(selective for _, selective in d.recompute), keep=bool(d.keep),
        offload=d.offload, compile=d.compile, formats=bool(d.formats),
        sequence_parallel=d.sequence_parallel, cp_kind=d.cp_kind, weights=None, place=False,
        shares=bool(d.shares), tp_by_part=bool(d.tp_by_part),
    )  # fmt: skip
