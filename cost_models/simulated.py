"""A plan's step as it was simulated: every operation of the pipeline, and what follows the last.

The estimate sums the same numbers: makespan, tail, host and jitter are its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
from cost_models.shares import SharedCosts, joined_ps
from cost_models.stage_problem import sends_ps, timeline
from cost_models.step import PARTS, Costs, Step
from ir.graph import Graph

TAIL = ("dp_comm", "optimizer", "offload")  # what a rank does after its last backward, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """One step, picoseconds.

    line: with its events. forward_ps, backward_ps: per global stage and micro-batch, by name, what
    an operation is made of (backward: both gradients, and what is computed again). sends_ps: per
    boundary. tails_ps: per pp rank, of `TAIL`; the longest is waited for. host_ps, jitter_ps: once
    a step. parts: where parts of the hardware have replicas of their own, they stand for ranks and
    stages, one of each, with nothing sent between; the longest makespan is waited for too.
    """

    line: Timeline
    forward_ps: tuple[tuple[tuple[str, int], ...], ...]
    backward_ps: tuple[tuple[tuple[str, int], ...], ...]
    sends_ps: tuple[int, ...]
    tails_ps: tuple[tuple[int, int, int], ...]
    host_ps: int
    jitter_ps: int
    parts: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[str, ...]:
        """What each rank is called."""
        return self.parts or tuple(f"rank {rank}" for rank in range(len(self.tails_ps)))

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
    """Simulate a step of what `estimate` predicts. Raises as it does."""
    d = decisions
    costs, step = costed(graph, hardware, workload, d, shardings)
    if isinstance(costs, SharedCosts):
        return _side_by_side(costs, step)
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


def _side_by_side(costs: SharedCosts, step: Step) -> Simulated:
    """The step of replicas on parts: each part's micro-batches, side by side."""
    steps = (replace(step, beside=()), *step.beside)
    problems = [stage_problem(side, one) for side, one in zip(costs.sides, steps)]
    lines, tails, parts = [], [], []
    for side, one, problem in zip(costs.sides, steps, problems):
        d = one.decisions
        lines.append(timeline(problem, d.stages, d.pairs, events=True))
        tails.append(tail_parts(one, d, problem, 0))
        parts.append(_stage_parts(side, one, d, 0))
    objective, _ = joined_ps(problems, steps)
    host, _ = step_overhead(costs)
    line = Timeline(
        makespan_ps=max(line.makespan_ps for line in lines),
        busy_ps=tuple(busy for line in lines for busy in line.busy_ps),
        peak_in_flight=tuple(held for line in lines for held in line.peak_in_flight),
        events=tuple(replace(e, rank=i) for i, line in enumerate(lines) for e in line.events),
    )  # fmt: skip
    return Simulated(
        line=line, forward_ps=tuple(f for f, _ in parts), backward_ps=tuple(b for _, b in parts),
        sends_ps=(), tails_ps=tuple(tails), host_ps=host,
        jitter_ps=whole_step_ps(costs, objective) - objective - host,
        parts=tuple(side.cluster.name for side in costs.sides),
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
