"""`plan trace --objective`: what a plan is chosen for, beside its time.

At a given number of GPUs the fastest plan costs least and takes least energy a token: time, cost
and energy have one search. The others are made of that search under other limits.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from cost_models.hardware import Cluster, catalogue
from cost_models.units import format_bytes, format_seconds
from ir.errors import InfeasibleError, PlanError, UsageError
from ir.graph import Graph
from planner.options import Progress, TraceOptions, TraceResult
from planner.sizing import RETRY_EFFORT, counts
from planner.tracing import Clock, attempt, plan_graph
from planner.workload import resolve

RESOLVED = 100  # memory is minimised to 1/100 of a GPU's


def plan_within(
    graph: Graph,
    options: TraceOptions,
    cluster: Cluster,
    clock: Clock,
    progress: Progress | None = None,
) -> TraceResult:
    """The plan of most tokens a second, of the batches and lengths that the options leave open.

    A batch that no plan divides or fits is left out; the first fault is raised if all are.
    """
    if not options.batches and not options.seq_lens:
        return plan_for(graph, options, cluster, clock, progress)
    if options.objective in ("memory", "gpus"):
        raise UsageError(f"--objective {options.objective} is for one batch and one length",
                         hints=("a range is searched for time, cost or energy",))  # fmt: skip
    best: TraceResult | None = None
    fault: PlanError | None = None
    pairs = itertools.product(options.batches or (options.asked.global_batch,),
                              options.seq_lens or (options.asked.seq_len,))  # fmt: skip
    for batch, seq_len in pairs:
        asked = replace(options.asked, global_batch=batch, seq_len=seq_len)
        try:
            found = plan_for(graph, replace(options, asked=asked), cluster, clock, progress)
        except (UsageError, InfeasibleError) as raised:
            fault = fault or raised
            continue
        if best is None or _tokens_per_s(found) > _tokens_per_s(best):
            best = found
        if found.interrupted:
            break
    if best is None:
        assert fault is not None
        raise fault
    w = best.plan.workload
    line = f"--global-batch {w.global_batch} --seq-len {w.seq_len}: most tokens/s of the ranges"
    return replace(best, echo=(*best.echo, line), timing=clock.timing())


def _tokens_per_s(found: TraceResult) -> float:
    return found.estimate.tokens / found.estimate.step_time_s


def plan_for(
    graph: Graph,
    options: TraceOptions,
    cluster: Cluster,
    clock: Clock,
    progress: Progress | None = None,
) -> TraceResult:
    """Plan a graph for the objective of the options. Raises as `planner.tracing.run` does."""
    if options.objective == "memory":
        return _least_memory(graph, options, cluster, clock, progress)
    if options.objective == "gpus":
        return _fewest_gpus(graph, options, cluster, clock, progress)
    found = plan_graph(graph, options, cluster, clock, progress)
    if options.objective == "time":
        return found
    line = f"--objective {options.objective}: on {cluster.count} GPUs the fastest plan has least"
    return replace(found, echo=(*found.echo, line))


def _least_memory(
    graph: Graph,
    options: TraceOptions,
    cluster: Cluster,
    clock: Clock,
    progress: Progress | None,
) -> TraceResult:
    """The plan with the most memory free whose step is within the slack of the fastest.

    The fastest plan under a limit of memory is the slower the lower the limit, so limits are
    halved towards the least whose plan is fast enough.
    """
    best = fastest = plan_graph(graph, options, cluster, clock, progress)
    longest_ps = round(fastest.estimate.step_time_ps * (1 + options.slack))
    fine = max(1, cluster.device.memory_bytes // RESOLVED)
    least, most = 0, best.estimate.peak_memory_bytes
    while most - least > fine and not best.interrupted:
        limit = (least + most) // 2
        limits = replace(options.limits, memory_bytes=limit)
        found, _, _ = attempt(graph, replace(options, limits=limits), cluster, clock, progress)
        if found is None or found.estimate.step_time_ps > longest_ps:
            least = limit
        else:
            best, most = found, min(limit, found.estimate.peak_memory_bytes)
    peaks = [format_bytes(r.estimate.peak_memory_bytes) for r in (best, fastest)]
    line = (
        f"--objective memory: {peaks[0]}, where the fastest plan takes {peaks[1]} and"
        f" {format_seconds(fastest.estimate.step_time_s)} (--slack {options.slack:.0%})"
    )
    return replace(best, echo=(*fastest.echo, line), timing=clock.timing())


def _fewest_gpus(
    graph: Graph,
    options: TraceOptions,
    cluster: Cluster,
    clock: Clock,
    progress: Progress | None,
) -> TraceResult:
    """The fastest plan on the fewest GPUs that were found to hold one, the batch being the same.

    Raises InfeasibleError where the whole cluster holds none.
    """
    if cluster.name not in catalogue():
        raise UsageError("--objective gpus chooses a count, and a file says its own",
                         hints=("--hardware NAMExCOUNT: COUNT at most",))  # fmt: skip
    workload, _ = resolve(graph, cluster, options.asked, options.pins)
    asked = replace(options.asked, global_batch=workload.global_batch)
    for count in [n for n in counts(cluster, cluster.count) if n < cluster.count]:
        fewer = replace(cluster, count=count)
        tried = replace(options, asked=asked, hardware=fewer.spec, effort=RETRY_EFFORT)
        try:
            found, _, _ = attempt(graph, tried, fewer, clock, progress)
        except (UsageError, InfeasibleError):  # the pins or the batch do not suit that count
            continue
        if found is not None:
            tried = replace(tried, effort=options.effort)
            found = plan_graph(graph, tried, fewer, clock, progress)
            line = f"--objective gpus: {count} of {cluster.count} GPUs hold it"
            return replace(found, echo=(*found.echo, line))
    return plan_graph(graph, replace(options, asked=asked), cluster, clock, progress)
