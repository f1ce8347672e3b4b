"""Tiers below the device: the room that a mesh's GPUs have there, and what its layers would lay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cost_models.hardware import Cluster
from cost_models.stage_problem import Room, StageProblem
from cost_models.step_rows import Row, Step
from cost_models.tiers import together

MOST_LAYERS = 2  # times the mean of ranks: one of more takes twice the time of an even cut
Each = Callable[[Callable[[list[Row]], int]], tuple[int, ...]]


def rooms_of(cluster: Cluster, step: Step, each: Each) -> tuple[Room, ...]:
    """A room for each tier that something may lie on; none where GPUs are of several kinds.

    each: a number of the rows of every layer, from that of a layer's rows.
    """
    d, chain = step.decisions, step.chain
    if not d.tiers or d.parts or d.tp_by_part or d.shares or step.beside:
        return ()
    names = dict.fromkeys(name for row in step.rows for name, _ in row.below)
    moved = d.tiers.get("activations")
    ends = range(chain.layers[0]), range(chain.layers[-1] + 1, len(chain.links))
    found = []
    for name in dict.fromkeys((*names, *([moved] if moved else ()))):

        def state(rows: Sequence[Row], name: str = name) -> int:
            return sum(size for row in rows for tier, size in row.below if tier == name)

        def aside(level: int, here: bool = name == moved) -> tuple[int, ...]:
            return each(lambda rows: here * (rows[0].aside[level]
                                             + sum(row.aside[0] for row in rows[1:])))  # fmt: skip

        tier = cluster.tier(name)
        gpus = cluster.sharers(tier)
        first, last = (state([step.row(i) for i in end]) for end in ends)
        found.append(Room(
            tier=name, sure_bytes=tier.bytes // gpus,
            most_bytes=tier.bytes // together(d.pipeline // d.pp, d.pipeline, gpus),
            mean_bytes=tier.bytes * -(-d.gpus // gpus) // d.gpus,
            state_bytes=each(state), aside_bytes=(aside(0), aside(1), aside(2)),
            ends_bytes=(first, last),
        ))  # fmt: skip
    return tuple(found)


def with_binding(problem: StageProblem) -> StageProblem:
    """The problem without the rooms that no cut fills which is nearly even."""
    if not problem.rooms:
        return problem
    layers = min(problem.layers, MOST_LAYERS * -(-problem.layers // problem.pp))
    flight = max(sum(counts) for r in range(problem.pp) for counts in problem.in_flight(r))
    flight = -(-flight // problem.chunks)  # of all layers of a rank, at most by about so much
    rooms = tuple(room for room in problem.rooms if sum(room.ends_bytes) + layers * (
        max((*room.state_bytes, *room.lowered_bytes)) + flight * max(map(max, room.aside_bytes))
    ) > room.sure_bytes)  # fmt: skip
    return problem if rooms == problem.rooms else replace(problem, rooms=rooms)


def with_sure_rooms(problem: StageProblem) -> StageProblem:
    """The problem with no more room for a GPU than it has whatever others lay there."""
    return replace(problem, rooms=tuple(
        replace(room, most_bytes=room.sure_bytes) for room in problem.rooms
    ))  # fmt: skip
