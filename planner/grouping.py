"""One kind of GPUs whose data ranks cannot all have as many samples: whether two groups of them,
each with a number of micro-batches of its own, do the batch quicker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cost_models.fleet import Fleet, load_any
from cost_models.hardware import Cluster, catalogue, load_hardware
from cost_models.units import format_seconds
from planner.decisions import Pins
from planner.fleet_asking import FleetAsking
from planner.interrupts import interruptible
from planner.limits import capped
from planner.options import TraceOptions, TraceResult
from planner.runnable import NATIVE
from planner.score import score_of
from planner.search import DEFAULT_EFFORT

GPUS_EACH = (1, 2, 4, 8)  # of a data rank: it may be split by cp or tp
LEAST_GAIN = 0.001  # of the step: less is not worth another command


def quicker_in_groups(
    options: TraceOptions, cluster: Cluster, found: TraceResult
) -> tuple[str, ...]:
    """A line with the `--hardware` to ask for and what it takes, where two groups of whole nodes
    are ordered before the plan of one; nothing where none are, or where the user's pins, file or
    engine leave them out."""
    w, solver = found.plan.workload, found.plan.solver
    if found.interrupted or options.pins != Pins() or w.engine not in NATIVE:
        return ()
    if cluster.name not in catalogue() or load_hardware(cluster.spec) != cluster:
        return ()  # a file has one count
    best = found.estimate.step_time_ps / (1 + LEAST_GAIN)
    least, line = score_of(int(best), found.plan.decisions, solver.axis_gain_ppm), ""
    with interruptible() as stopped:
        for first in divisions(cluster, w.global_batch):
            spec = "+".join(replace(cluster, count=n).spec for n in (first, cluster.count - first))
            parts = load_any(spec)
            assert isinstance(parts, Fleet)
            usable = tuple(capped(part, options.limits.memory_bytes) for part in parts.parts)
            asking = FleetAsking(
                graph=found.plan.graph, fleet=replace(parts, parts=usable), workload=w,
                gain_ppm=solver.axis_gain_ppm,
            )  # fmt: skip
            answer = asking.without(
                (("shares", ()),), Pins(), effort=options.effort or DEFAULT_EFFORT
            )
            if stopped():
                return ()
            if answer is None or answer.outcome.best is None or answer.score >= least:
                continue
            step_s = answer.estimate().step_time_s
            least, gain = answer.score, 1 - step_s / found.estimate.step_time_s
            line = (f"--hardware {spec}: {format_seconds(step_s)}, {gain:.1%} quicker than one"
                    " group, as each has as many samples as suit")  # fmt: skip
    return (line,) if line else ()


def divisions(cluster: Cluster, batch: int) -> Iterator[int]:
    """GPUs of a first group of whole nodes whose data ranks have one sample more than others."""
    known: set[int] = set()
    for each in GPUS_EACH:
        ranks, odd = divmod(cluster.count, each)
        first = batch % ranks * each if ranks and not odd else 0
        if not first or first % cluster.node_size or batch < ranks:
            continue
        if not {first, cluster.count - first} & known:  # the order of groups gains nothing
            known.add(first)
            yield first
