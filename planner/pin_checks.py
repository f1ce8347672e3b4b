"""Whether pins agree with each other, the hardware, the workload and the model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from cost_models.decisions import Workload
from cost_models.formats import NARROW
from cost_models.schedule import schedule_illegal
from ir.errors import UsageError
from planner.decisions import ALL_LAYERS, Pins, parse_pins
from planner.legality import RULES, VIRTUAL_STAGES, Case, Rule
from planner.mesh import divisors


def check_pins(pins: Pins, workload: Workload, *, gpus: int, layers: int | None = None) -> None:
    """Raise UsageError where pins contradict each other, the hardware, workload or model."""
    rule = _refusal(pins, workload)
    if rule is not None:
        raise UsageError(
            _named(rule.keys, pins, workload), why=rule.reason,
            hints=_left_of(rule.fix, pins, workload),
        )  # fmt: skip
    _check_tp(pins)
    check_mesh(pins, gpus)
    _check_outer(pins)
    _check_experts(pins, gpus)
    _check_shard(pins, gpus)
    _check_batch(pins, workload)
    _check_schedule(pins, workload)
    _check_stages(pins, layers)
    _check_keep(pins)
    _check_below(pins, workload, gpus, layers)


def _refusal(pins: Pins, workload: Workload) -> Rule | None:
    """The first rule that refuses them together."""
    case = _case_of_pins(pins, workload)
    return next((rule for rule in RULES if rule.refused(case)), None)


def _left_of(fix: str, pins: Pins, workload: Workload) -> tuple[str, ...]:
    """Of what would mend a pin what no rule refuses beside the other pins; words that are no pins
    are left as they are."""
    found = []
    for words in fix.split(", or "):
        try:
            instead = dict(parse_pins(words.split(" and ")).items())
        except UsageError:
            instead = {}
        if not instead or _refusal(replace(pins, **instead), workload) is None:
            found.append(words)
    return (", or ".join(found),) if found else ()


def _check_below(pins: Pins, workload: Workload, gpus: int, layers: int | None) -> None:
    """No stage has more layers below than it has; the optimizer by count of layers is costed where
    it is known which they are."""
    counted = ":" in dict(pins.offload or ()).get("optimizer", "")
    stages = len(pins.stages) if pins.stages is not None else 1 if pins.pp == 1 else None
    for what, (tier, _, counts) in ((w, t.partition(":")) for w, t in pins.offload or ()):
        said = counts.split("/")
        if stages is not None and len(said) not in (1, stages):
            raise UsageError(
                f"{_joined(['offload'], pins)}: {what} of {len(said)} stages, and there are"
                f" {stages}",
                why="one count stands for every stage, or there is one for each",
                hints=(f"offload={what}:{tier}:{said[0]}",),
            )  # fmt: skip
        held = pins.stages or (() if layers is None else (layers,))
        if counts and held:
            _require_layers("offload", "lays", list(map(int, said)), held, pins,
                            f"{what}:{tier}: every layer")  # fmt: skip
    if counted and pins.pp != 1 and pins.stages is None:
        raise UsageError(
            f"{_joined(['offload'], pins)}: which layers these are depends on the stages",
            why="the optimizer of so many layers of each stage, its first, is not searched",
            hints=tuple(_known_stages(pins, workload, gpus, layers)),
        )


def _known_stages(
    pins: Pins, workload: Workload, gpus: int, layers: int | None
) -> Iterator[str]:
    """What says which layers a count is of, as far as it may be beside the other pins."""
    tiers = dict(pins.offload or ())
    tier, _, counts = tiers["optimizer"].partition(":")
    said = len(counts.split("/"))
    least = next((n for n in divisors(gpus) if n > 1), 0)
    pp = said if said > 1 else pins.pp or least
    ways: list[tuple[str, Pins]] = []
    if said == 1:
        ways.append(("pp=1", replace(pins, pp=1)))
    if layers is not None and 1 < pp <= layers:
        cut = tuple(layers // pp + (k < layers % pp) for k in range(pp))
        way = replace(pins, pp=pp, stages=cut)
        ways.append((f"{way.said('stages')} and pp={pp}, by the layers of each", way))
    whole = tuple((w, tier if w == "optimizer" else t) for w, t in pins.offload or ())
    way = replace(pins, offload=whole)
    ways.append((f"{way.said('offload')}: of every layer", way))
    for words, way in ways:
        try:
            check_pins(way, workload, gpus=gpus, layers=layers)
        except UsageError:
            continue
        yield words


def _check_tp(pins: Pins) -> None:
    tps = sorted(tp for _, tp in pins.tp_by_part or ())
    if tps and pins.tp is not None:
        raise UsageError(f"{_joined(['tp', 'tp_by_part'], pins)} contradict each other",
                         why="tp is of every stage, tp_by_part of each part's",
                         hints=("one of the two",))  # fmt: skip
    if tps and tps[0] == tps[-1]:
        raise UsageError(f"{_joined(['tp_by_part'], pins)} is one tp for every part",
                         hints=(f"--fix tp={tps[0]}",))  # fmt: skip
    if any(b % a for a, b in itertools.pairwise(tps)):
        raise UsageError(
            f"{_joined(['tp_by_part'], pins)}: one does not divide the next larger",
            why="a piece of a value goes from or to one rank",
        )


def check_mesh(pins: Pins, gpus: int) -> None:
    """Raise UsageError where pinned axes do not divide the GPUs."""
    keys = [key for key in ("tp", "pp", "cp", "dp") if getattr(pins, key) is not None]
    size = prod(getattr(pins, key) for key in keys)
    if gpus % size == 0 and (len(keys) < 4 or size == gpus):
        return
    last = keys[-1]
    rest = size // getattr(pins, last)
    fits = [f"{last}={n}" for n in divisors(gpus // rest)] if gpus % rest == 0 else []
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
            hints=(f"dp_outer may be {', '.join(map(str, divisors(dp)))}",),
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
        hints=(f"ep*etp may be {', '.join(map(str, divisors(ranks)))}",),
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
        hints=(f"shard may be {', '.join(map(str, divisors(ranks)))}",),
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
    _check_recompute(pins, layers)
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


def _check_recompute(pins: Pins, layers: int | None) -> None:
    """No stage computes more layers again than it has: one count for all, than the largest has."""
    stages = pins.stages or (() if layers is None else (layers,))
    if pins.recompute is None or not stages:
        return
    full, some = pins.recompute.full, pins.recompute.selective
    counts = [
        sum(n for n in (full[i % len(full)], some[i % len(some)]) if n != ALL_LAYERS)
        for i in range(max(len(full), len(some)))
    ]
    _require_layers("recompute", "computes", counts, stages, pins,
                    "a kind alone, as in recompute=full: every layer", " again")  # fmt: skip


def _require_layers(
    key: str, does: str, counts: Sequence[int], stages: Sequence[int], pins: Pins, every: str,
    how: str = "",
) -> None:  # fmt: skip
    """A pin counts no more layers of a stage than it has; one count of all than the largest has."""
    held = stages if len(stages) == len(counts) else (max(stages),) * len(counts)
    for count, most in zip(counts, held):
        if count > most:
            raise UsageError(
                f"{_joined([key], pins)} {does} {count} layers of a stage{how or ' below'},"
                f" {'which' if pins.stages else 'the model'} has {most}",
                hints=(f"up to {most}, or {every}",),
            )  # fmt: skip


def _check_keep(pins: Pins) -> None:
    if pins.keep and pins.recompute is not None and not any(pins.recompute.selective):
        raise UsageError(
            f"{_joined(['keep', 'recompute'], pins)}: no layer is computed again in part",
            why="keep says which operations such layers keep",
            hints=("recompute=selective", "keep=default"),
        )


def _case_of_pins(p: Pins, workload: Workload) -> Case:
    r = p.recompute
    return Case(
        engine=workload.engine, precision=workload.precision, seq_len=workload.seq_len,
        pp=p.pp, dp_outer=p.dp_outer, cp=p.cp, tp=p.tp, zero=p.zero, shard=p.shard,
        reshard=p.reshard, microbatches=p.microbatches, schedule=p.schedule,
        virtual_stages=p.virtual_stages,
        recomputes=None if r is None else any((*r.full, *r.selective)),
        selective=None if r is None else any(r.selective), keep=bool(p.keep), offload=p.offload,
        compile=p.compile, formats=any(word in NARROW for _, word in p.formats or ()),
        sequence_parallel=p.sequence_parallel, cp_kind=p.cp_kind, weights=p.weights,
        place=bool(p.place), shares=bool(p.shares),
        tp_by_part=bool(p.tp_by_part),
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
