"""`plan trace`, whole: what a plan is chosen for, beside its time, and what it may not exceed.

At a given number of GPUs of one kind the fastest plan costs least and takes least energy a token:
time, cost and energy have one search. The others are made of that search under other limits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from cost_models.fleet import Fleet, Hardware, load_any, parts_of
from cost_models.hardware import Cluster, catalogue
from cost_models.units import format_bytes, format_seconds
from ir.errors import InfeasibleError, PlanError, UsageError
from ir.graph import Graph
from planner.capturing import Begun, Clock, capture
from planner.charged import charged
from planner.fleet_planning import attempt_fleet, plan_fleet, worth_of
from planner.grouping import quicker_in_groups
from planner.limits import usd_at_least
from planner.names import gpus_hold
from planner.options import Progress, TraceOptions, TraceResult
from planner.plan import load
from planner.sizing import RETRY_EFFORT, counts
from planner.tracing import attempt, plan_graph
from planner.workload import inherit, precision_of, resolve
from planner.worth import Worth

CHARGED = ("cost", "energy")
RESOLVED = 100  # memory is minimised to 1/100 of a GPU's


def run(
    options: TraceOptions, progress: Progress | None = None, ahead: Begun | None = None
) -> TraceResult:
    """Plan a model. progress: takes a line now and then. ahead: its trace, if that was begun.

    Raises PlanError for a model that cannot be read or traced, UsageError for flags and pins that
    cannot be meant, InfeasibleError naming what binds where nothing fits or keeps the limits.
    """
    clock = ahead.clock if ahead is not None else Clock()
    echo: tuple[str, ...] = ()
    hardware = load_any(options.hardware)
    base = load(options.base) if options.base else None
    if base is not None:
        asked, echo = inherit(options.asked, base.workload, options.base)
        options = replace(options, asked=asked, old=base)
    if base is None or options.model:
        graph = capture(options, hardware, clock, progress, ahead)
    else:
        graph = base.graph
        if precision_of(options.asked, hardware)[0] != base.workload.precision:
            raise UsageError(f"{options.base} was traced in {base.workload.precision}",
                             hints=("name the model to trace it anew",))  # fmt: skip
    result = plan_within(graph, options, hardware, clock, progress)
    return replace(result, echo=(*echo, *result.echo))


def plan_within(
    graph: Graph,
    options: TraceOptions,
    hardware: Hardware,
    clock: Clock,
    progress: Progress | None = None,
) -> TraceResult:
    """The plan of most tokens a second, of the batches and lengths that the options leave open.

    A batch that no plan divides or fits is left out; the first fault is raised if all are.
    """
    if not options.batches and not options.seq_lens:
        return plan_for(graph, options, hardware, clock, progress)
    if options.objective in ("memory", "gpus"):
        raise UsageError(f"--objective {options.objective} is for one batch and one length",
                         hints=("a range is searched for time, cost or energy",))  # fmt: skip
    best: TraceResult | None = None
    fault: PlanError | None = None
    pairs = itertools.product(_batches(options, hardware) or (options.asked.global_batch,),
                              options.seq_lens or (options.asked.seq_len,))  # fmt: skip
    for batch, seq_len in pairs:
        asked = replace(options.asked, global_batch=batch, seq_len=seq_len)
        try:
            found = plan_for(graph, replace(options, asked=asked), hardware, clock, progress)
        except (UsageError, InfeasibleError) as raised:
            fault = fault or raised
            continue
        if best is None or _merit(found, options, hardware) > _merit(best, options, hardware):
            best = found
        if found.interrupted:
            break
    if best is None:
        assert fault is not None
        raise fault
    w = best.plan.workload
    most = "most tokens/s"
    if isinstance(hardware, Fleet) and options.objective in ("cost", "energy"):
        most = f"least {options.objective} a token"
    line = f"--global-batch {w.global_batch} --seq-len {w.seq_len}: {most} of the ranges"
    return replace(best, echo=(*best.echo, line), timing=clock.timing())


def _batches(options: TraceOptions, hardware: Hardware) -> tuple[int, ...]:
    """Those of the options and, of a range, the largest that all GPUs divide."""
    sizes = options.batches
    if len(sizes) < 2:
        return sizes
    even = sizes[-1] // hardware.count * hardware.count
    return tuple(sorted({*sizes, *([even] if even >= sizes[0] else [])}))


def _merit(found: TraceResult, options: TraceOptions, hardware: Hardware) -> float:
    """Tokens a second; of several kinds of GPUs, where plans may leave some idle, tokens for what
    the objective says."""
    e, plan = found.estimate, found.plan
    if not isinstance(hardware, Fleet) or options.objective not in ("cost", "energy"):
        return e.tokens / e.step_time_s
    return -worth_of(plan.graph, options, hardware, plan.workload).of(plan.decisions, e)[0]


def plan_for(
    graph: Graph,
    options: TraceOptions,
    hardware: Hardware,
    clock: Clock,
    progress: Progress | None = None,
) -> TraceResult:
    """Plan a graph for the objective of the options, within their limits. Raises as `run` does."""
    if isinstance(hardware, Fleet):
        if options.objective == "memory":
            return _least_memory(graph, options, hardware, clock, progress)
        return plan_fleet(graph, options, hardware, clock, progress)
    return _of_one_kind(graph, options, hardware, clock, progress)


def _of_one_kind(
    graph: Graph,
    options: TraceOptions,
    cluster: Cluster,
    clock: Clock,
    progress: Progress | None,
) -> TraceResult:
    """The plan of one cluster, or of fewer of its GPUs.

    Below --max-gpus the counts of `plan size` are tried, the most first, the batch being that of
    the whole cluster; all of them where it is cost or energy that is to be least. Raises as `run`
    does.
    """
    limits, most = options.limits, min(options.limits.gpus or cluster.count, cluster.count)
    smaller = most < cluster.count or cluster.name in catalogue()  # a file says its own count
    left_open = options.objective == "gpus" or bool(
        options.objective in CHARGED and limits.gpus and smaller
    )
    if not left_open and most == cluster.count:
        found = _planned(graph, options, cluster, clock, progress)
        if options.objective in CHARGED:
            line = f"--objective {options.objective}: on {cluster.count} GPUs the fastest plan has"
            found = replace(found, echo=(*found.echo, f"{line} least"))
        found = charged(found, options, cluster)
        if _usd(found) <= limits.usd:
            groups = () if options.objective == "memory" else quicker_in_groups(
                options, cluster, found
            )  # fmt: skip
            clock.mark("solve_s")
            return replace(found, echo=(*found.echo, *groups), timing=clock.timing())
        raise _unmet(graph, options, cluster, most, [(found, cluster)])
    asked, over = _same_batch(graph, options, cluster), []
    sizes = [*_fewer(cluster, most), *([cluster] if most == cluster.count else [])]
    if options.objective in CHARGED:
        return _least_of(graph, asked, cluster, sizes, clock, progress)
    for fewer in sizes if options.objective == "gpus" else reversed(sizes):
        tried = asked if fewer is cluster else _on(asked, fewer)
        fits = _try(graph, tried, fewer, clock, progress)
        if fits is None:
            continue
        if _usd(fits) <= limits.usd:
            of = gpus_hold(fewer.count, cluster.count)
            line = "--objective gpus" if options.objective == "gpus" else f"--max-gpus {most}"
            if fewer.count < cluster.count:
                fits = replace(fits, echo=(*fits.echo, f"{line}: {of}"))
            return fits
        over.append((fits, fewer))
    if not over and most == cluster.count:
        return plan_graph(graph, asked, cluster, clock, progress)  # says what binds
    raise _unmet(graph, asked, cluster, most, over)


def _least_of(
    graph: Graph,
    options: TraceOptions,
    cluster: Cluster,
    sizes: Sequence[Cluster],
    clock: Clock,
    progress: Progress | None,
) -> TraceResult:
    """Of the plans of all these sizes the one that costs least, or takes least energy, a token;
    without prices GPU hours are what costs. Of like ones that of the most GPUs is taken."""
    best: tuple[float, TraceResult, Cluster] | None = None
    over: list[tuple[TraceResult, Cluster]] = []
    for size in reversed(sizes):
        tried = options if size is cluster else _on(options, size)
        found = _try(graph, tried, size, clock, progress)
        if found is None:
            continue
        if _usd(found) > options.limits.usd:
            over.append((found, size))
            continue
        amount = _amount(found, tried, size)
        if best is None or amount < best[0]:
            best = amount, found, size
        if found.interrupted:
            break
    if best is None:
        if not over and sizes and sizes[-1] is cluster:
            return plan_graph(graph, options, cluster, clock, progress)  # says what binds
        raise _unmet(graph, options, cluster, sizes[-1].count if sizes else 0, over)
    _, found, size = best
    tried_counts = ", ".join(str(s.count) for s in sizes)
    line = f"--objective {options.objective}: {size.count} GPUs take least, of {tried_counts}"
    return replace(found, echo=(*found.echo, line), timing=clock.timing())


def _amount(found: TraceResult, options: TraceOptions, cluster: Cluster) -> float:
    """USD a million tokens, or joules a token; the latter where there are no prices, as both are
    hours of like GPUs then."""
    plan = found.plan
    worth = Worth(
        graph=plan.graph, hardware=cluster, workload=plan.workload, prices=options.prices,
        objective=options.objective if options.prices else "energy",
        operations=options.operations,
    )  # fmt: skip
    return worth.of(plan.decisions, found.estimate)[0]


def _planned(
    graph: Graph,
    options: TraceOptions,
    cluster: Cluster,
    clock: Clock,
    progress: Progress | None,
) -> TraceResult:
    """The plan of one cluster, for any objective but its size."""
    if options.objective == "memory":
        return _least_memory(graph, options, cluster, clock, progress)
    return plan_graph(graph, options, cluster, clock, progress)


# --- limits of GPUs and USD ----------------------------------------------------------------------


def _try(
    graph: Graph,
    options: TraceOptions,
    cluster: Cluster,
    clock: Clock,
    progress: Progress | None,
) -> TraceResult | None:
    """The plan of a smaller cluster, or None: a short search found none that fits, or the pins or
    the batch do not suit the count."""
    short = replace(options, effort=RETRY_EFFORT)
    try:
        found, _, _ = attempt(graph, short, cluster, clock, progress)
        if found is None:
            return None
        return charged(_planned(graph, options, cluster, clock, progress), options, cluster)
    except (UsageError, InfeasibleError):
        return None


def _on(options: TraceOptions, cluster: Cluster) -> TraceOptions:
    return replace(options, hardware=cluster.spec)


def _fewer(cluster: Cluster, most: int) -> list[Cluster]:
    """The sizes below the whole that are tried, ascending. Raises UsageError for a file."""
    if cluster.name not in catalogue():
        raise UsageError("a number of GPUs is chosen, and a hardware file says its own",
                         hints=("--hardware NAMExCOUNT: COUNT at most",))  # fmt: skip
    sizes = [n for n in counts(cluster, most) if n < cluster.count]
    return [replace(cluster, count=n) for n in sizes]


def _same_batch(graph: Graph, options: TraceOptions, cluster: Cluster) -> TraceOptions:
    """The options with the whole cluster's batch, for parts of it."""
    workload, _ = resolve(graph, cluster, options.asked, options.pins)
    return replace(options, asked=replace(options.asked, global_batch=workload.global_batch))


def _usd(found: TraceResult) -> float:
    return found.charges.least_usd if found.charges else 0.0


def _unmet(
    graph: Graph,
    options: TraceOptions,
    cluster: Cluster,
    most: int,
    over: list[tuple[TraceResult, Cluster]],
) -> InfeasibleError:
    """Why no plan keeps the limits of GPUs and USD: by how much, and the nearest that can."""
    clock, limit = Clock(), options.limits.usd
    if not over:  # none holds it on so few
        more = [*(c for c in _fewer(cluster, cluster.count) if c.count > most), cluster]
        asked = replace(options, effort=RETRY_EFFORT)
        holds = next((c for c in more if _try(graph, _on(asked, c), c, clock, None)), None)
        if holds is None:
            return InfeasibleError(f"no plan was found that fits {cluster.spec}, nor fewer GPUs",
                                   hints=("without --max-gpus it is said what binds",))  # fmt: skip
        return InfeasibleError(
            f"no plan was found that fits {most} GPUs or fewer (--max-gpus {most})",
            why=f"the fewest that hold it are {holds.count}: {holds.count - most} more",
            hints=(f"--max-gpus {holds.count}",),
        )
    hints, below = [], min(c.count for _, c in over)
    if options.limits.gpus is None and cluster.name in catalogue():
        asked = replace(_same_batch(graph, options, cluster), effort=RETRY_EFFORT)
        for fewer in reversed(_fewer(cluster, below)):
            found = _try(graph, _on(asked, fewer), fewer, clock, None)
            if found is not None:
                over.append((found, fewer))
                if _usd(found) <= limit:
                    hints.append(f"--max-gpus {fewer.count}: {_usd(found):.4g} USD on {fewer.spec}")
                    break
    nearest, where = min(over, key=lambda row: _usd(row[0]))
    usd = _usd(nearest)
    least = f"--max-cost {usd_at_least(usd)} on {where.spec}: the least that was found"
    hints = hints or [least]
    first, here = over[0]
    return InfeasibleError(
        f"no plan of {here.spec} costs {limit:g} USD a million tokens or less",
        why=f"the fastest costs {_usd(first):.4g}, {_usd(first) / limit - 1:.1%} over --max-cost"
        if limit else f"the fastest costs {_usd(first):.4g}",
        hints=tuple(hints),
    )


def _least_memory(
    graph: Graph,
    options: TraceOptions,
    hardware: Hardware,
    clock: Clock,
    progress: Progress | None,
) -> TraceResult:
    """The plan with the most memory free whose step is within the slack of the fastest.

    The fastest plan under a limit of memory is the slower the lower the limit, so limits are
    halved towards the least whose plan is fast enough.
    """

    def within(limit: int) -> TraceResult | None:
        limits = replace(options.limits, memory_bytes=limit)
        tried = replace(options, limits=limits)
        if isinstance(hardware, Fleet):
            return attempt_fleet(graph, tried, hardware, clock, progress)[0]
        return attempt(graph, tried, hardware, clock, progress)[0]

    if isinstance(hardware, Fleet):
        best = fastest = plan_fleet(graph, options, hardware, clock, progress)
    else:
        best = fastest = plan_graph(graph, options, hardware, clock, progress)
    longest_ps = round(fastest.estimate.step_time_ps * (1 + options.slack))
    fine = max(1, max(p.device.memory_bytes for p in parts_of(hardware)) // RESOLVED)
    least, most = 0, _most_bytes(best)
    while most - least > fine and not best.interrupted:
        limit = (least + most) // 2
        found = within(limit)
        if found is None or found.estimate.step_time_ps > longest_ps:
            least = limit
        else:
            best, most = found, min(limit, _most_bytes(found))
    peaks = [format_bytes(_most_bytes(r)) for r in (best, fastest)]
    line = (
        f"--objective memory: {peaks[0]}, to {format_bytes(fine)}, where the fastest plan takes"
        f" {peaks[1]} and {format_seconds(fastest.estimate.step_time_s)}"
        f" (--slack {options.slack:.0%})"
    )
    return replace(best, echo=(*best.echo, line), timing=clock.timing())


def _most_bytes(found: TraceResult) -> int:
    """Of the rank that holds most, whatever its GPU has."""
    return max(rank.peak_bytes for rank in found.estimate.ranks)
