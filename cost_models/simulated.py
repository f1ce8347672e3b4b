"""A plan's step as it was simulated: every operation of the pipeline, and what follows the last.

The estimate sums the same numbers: makespan, tail, host and jitter are its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cost_models.decisions import Decisions, Workload
from cost_models.estimate import costed, stage_problem, step_overhead, whole_step_ps
from cost_models.fleet import Hardware
from cost_models.mixed import sides_of
from cost_models.rank_ledger import (
    exposed_send_ps,
    levels_of,
    moved_again_ps,
    moved_level,
    stage_links,
    tail_parts,
)
from cost_models.schedule import Timeline, rank_of
from cost_models.sharding import Sharding
from cost_models.stage_problem import sends_ps, timeline
from cost_models.step import PARTS, Costs, Step
from ir.errors import UsageError
from ir.graph import Graph

TAIL = ("dp_comm", "optimizer", "offload")  # what a rank does after its last backward, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """One step, picoseconds.

    line: with its events. forward_ps, backward_ps: per global stage and micro-batch, by name, what
    an operation is made of (backward: both gradients, and what is computed again). sends_ps: per
    boundary. tails_ps: per pp rank, of `TAIL`; the longest is waited for. host_ps, jitter_ps: once
    a step.
    """

    line: Timeline
    forward_ps: tuple[tuple[tuple[str, int], ...], ...]
    backward_ps: tuple[tuple[tuple[str, int], ...], ...]
    sends_ps: tuple[int, ...]
    tails_ps: tuple[tuple[int, int, int], ...]
    host_ps: int
    jitter_ps: int

    @property
    def tail_ps(self) -> int:
        """The longest tail."""
        return max(map(sum, self.tails_ps))

    @property
    def step_ps(self) -> int:
        return self.line.makespan_ps + self.tail_ps + self.host_ps + self.jitter_ps


def simulated(
    graph: Graph, hardware: Hardware, workload: Workload, decisions: Decisions,
    shardings: Mapping[str, Sharding],
) -> Simulated:  # fmt: skip
    """Simulate a step of what `estimate` predicts. Raises as it does, and UsageError where parts
    of the hardware have shares of their own: their replicas run apart."""
    d = decisions
    if d.shares:
        raise UsageError(
            "the step of a plan with shares is not drawn",
            why="parts run other numbers of micro-batches, and one timeline is of all",
            hints=("plan show tells what each part does",),
        )
    costs, step = costed(graph, hardware, workload, d, shardings)
    problem, sides = stage_problem(costs, step), sides_of(costs, step)
    line = timeline(problem, d.stages, d.pairs, events=True)
    tails = tuple(tail_parts(one, d, problem, rank) for rank, (_, one) in enumerate(sides))
    objective = line.makespan_ps + max(map(sum, tails))
    host, _ = step_overhead(costs)
    parts = [
        _stage_parts(*sides[rank_of(d.schedule, d.pp, stage)], d, stage)
        for stage in range(len(d.stages))
    ]
    return Simulated(
        line=line, forward_ps=tuple(f for f, _ in parts), backward_ps=tuple(b for _, b in parts),
        sends_ps=tuple(sends_ps(problem)), tails_ps=tails, host_ps=host,
        jitter_ps=whole_step_ps(costs, objective) - objective - host,
    )  # fmt: skip


def _stage_parts(
    costs: Costs, step: Step, d: Decisions, stage: int
) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]]:
    """What a forward and a backward of a stage are made of; sends' share of it is pp_comm."""
    links = stage_links(step, d.stages)[stage]
    levels, base = levels_of(step, d), moved_level(d)
    forward, backward = (dict.fromkeys((*PARTS, "recompute"), 0) for _ in range(2))
    forward["pp_comm"] = backward["pp_comm"] = exposed_send_ps(costs, step, d)
    for row in (*(step.row(i) for i in links), step.glue):
        for name, f, b in zip(PARTS, row.forward, row.backward):
            forward[name] += f
            backward[name] += b
    for i in links:
        row, level = step.row(i), levels.get(i, 0)
        forward["offload"] += row.moved[base][0]
        backward["offload"] += row.moved[base][1]
        if level:
            part = "offload" if level == 1 and d.moved is not None else "recompute"
            backward[part] += row.again_ps[level - 1]
        if level == 2:
            backward["offload"] += moved_again_ps(row, base)
    return tuple((k, v) for k, v in forward.items() if v), tuple(
        (k, v) for k, v in backward.items() if v
    )
