"""Recomputation in part, operation by operation: what keeping only some of them costs, and which
sets are worth keeping.

A checkpointed unit is run again from its inputs and skips what was kept, so every operation that
is not kept is repeated once: the seconds are a sum, and so are the bytes. The best sets for any
price of a byte are then the whole set with the operations left out that free a byte the cheapest
(the vertices of a knapsack's relaxation; Dantzig 1957).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cost_models.decisions import Keep
from cost_models.engines import Engine
from cost_models.kernels import heavy_s
from cost_models.layout import PARTIAL, Assignment, collective, moves, produced
from cost_models.unit_costs import UnitCost, learns_of
from cost_models.work import Floats, Work
from ir.graph import Node, Unit
from ir.keep import dear, idle, keepable, repeated, word, words

MOST_KEEPS = 4  # sets that a search tries beside the whole one: each is a stage program more


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A class of layers at one point: alone is its cost where all is kept, count its layers."""

    unit: Unit
    assignment: Assignment
    work: Work
    alone: UnitCost
    count: int

    def seconds(self, node: Node) -> float:
        return float(_forward_s(node, self.unit, self.assignment, self.work)[0])

    def nbytes(self, node: Node) -> float:
        return float(_bytes(node, self.unit, self.assignment, self.work)[0])

    @property
    def freed(self) -> float:
        """Bytes less than without recomputation, where all of its operations are kept."""
        whole = kept_in_part(
            self.unit, self.assignment, self.work, self.alone, words(self.unit)
        )
        return float((whole.kept_bytes[0] - whole.kept_bytes[1])[0])


def offers_ops(engine: Engine) -> bool:
    """Whether the engine can keep some operations and repeat others."""
    return engine.recompute_grain == "op"


def kept_in_part(
    unit: Unit, assignment: Assignment, work: Work, alone: UnitCost, kept: tuple[str, ...]
) -> UnitCost:
    """A unit of which recomputation in part keeps these operations; alone: keeping all of them.

    Beside them are kept the unit's inputs and the results of its collectives on tp.
    """
    again = repeated(unit, kept)
    seconds = sum((_forward_s(n, unit, assignment, work) for n in again), work.zeros)
    gone = {n.name for n in again}
    some = _inputs(unit, assignment, work) + _gathered(unit, assignment, work)
    some = some + sum(
        (_bytes(n, unit, assignment, work) for n in keepable(unit) if n.name not in gone),
        work.zeros,
    )  # fmt: skip
    none, transient = alone.kept_bytes[0], alone.working_bytes[0]
    return replace(
        alone, light_s=alone.light_s + seconds,
        kept_bytes=(none, some, alone.kept_bytes[2]),
        working_bytes=(
            transient, transient + np.maximum(none - some, 0), alone.working_bytes[2]
        ),
    )  # fmt: skip


def _options(unit: Unit, assignment: Assignment) -> dict[str, tuple[int, ...]]:
    return {n.name: option.outs for n, option in zip(unit.nodes, assignment.chosen)}


def _forward_s(node: Node, unit: Unit, assignment: Assignment, work: Work) -> Floats:
    option = assignment.chosen[unit.nodes.index(node)]
    return heavy_s(node, unit, option, work, learns_of(unit)).forward_s


def _bytes(node: Node, unit: Unit, assignment: Assignment, work: Work) -> Floats:
    """What a checkpoint keeps of an operation. A compiler keeps no partial sum, only what became
    of it."""
    outs = _options(unit, assignment)[node.name]
    if work.engine.fused and PARTIAL in outs:
        return work.zeros
    return sum((work.nbytes(t, at) for t, at in zip(node.outputs, outs)), work.zeros)


def _inputs(unit: Unit, assignment: Assignment, work: Work) -> Floats:
    at = produced(unit, assignment)
    return sum(
        (work.nbytes(t, at[n]) for n, t in unit.inputs if n in unit.diff_inputs), work.zeros
    )


def _gathered(unit: Unit, assignment: Assignment, work: Work) -> Floats:
    """Results of the collectives on tp, which are not repeated: all but those behind the last
    operation that backward needs."""
    if work.axes.tp == 1:
        return work.zeros
    last = {n.name for n in dear(unit)[len(dear(unit)) - idle(unit) :]}
    first = next((i for i, n in enumerate(unit.nodes) if n.name in last), len(unit.nodes))
    ahead = {name for name, _ in unit.inputs} | {r for n in unit.nodes[:first] for r in n.refs()}
    return sum(
        (work.nbytes(unit.values[m.ref], m.target)
         for m in moves(unit, assignment)[0]
         if collective(m.source, m.target) and m.ref in ahead), work.zeros,
    )  # fmt: skip


def ladder(ways: Sequence[Way]) -> tuple[Keep, ...]:
    """The sets worth trying in place of the whole one, the largest first; at each way's one point.

    All layers repeat what frees a byte for less than some price. Of these sets those are left that
    layers of any two others, some recomputed and some not, do not match; then, while they are
    more than MOST_KEEPS, the one that the others come nearest to goes.
    """
    items = [
        (way.seconds(n), way.nbytes(n), way.count, way.unit.name, word(n, way.unit))
        for way in ways for n in keepable(way.unit)
    ]  # fmt: skip
    items = sorted((row for row in items if row[1] > 0), key=lambda r: (r[0] / r[1], r[3]))
    ways = [way for way in ways if keepable(way.unit)]
    kept = {way.unit.name: list(words(way.unit)) for way in ways}
    freed = sum(way.count * way.freed for way in ways)
    spent = sum(way.count * float(way.alone.light_s[0]) for way in ways)
    points = [(freed, spent, freeze(kept))]
    for seconds, size, count, unit, name in items:
        kept[unit].remove(name)
        freed, spent = freed + count * size, spent + count * seconds
        points.append((freed, spent, freeze(kept)))
    found = [i for i in vertices([(0.0, 0.0), *(p[:2] for p in points)]) if i > 1]
    while len(found) > MOST_KEEPS:
        found.remove(min(found[:-1], key=lambda i: _missed(points, found, i)))
    return tuple(points[i - 1][2] for i in found)


def freeze(kept: Mapping[str, Sequence[str]]) -> Keep:
    """As a plan holds it."""
    return tuple((name, tuple(words)) for name, words in kept.items())


def vertices(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of the points (freed, spent) no mix of others matches, from the first on: the lower
    convex hull, its slopes rising."""
    hull = [0]
    while True:
        at = points[hull[-1]]
        steps = [
            ((p[1] - at[1]) / (p[0] - at[0]), -p[0], i)
            for i, p in enumerate(points) if p[0] > at[0] * (1 + 1e-12) and p[0] > at[0]
        ]  # fmt: skip
        if not steps:
            return hull[1:]
        hull.append(min(steps)[2])


def _missed(points: Sequence[tuple[float, float, Keep]], found: list[int], i: int) -> float:
    """Seconds more, as a share, that its neighbours take to free what point i - 1 does."""
    place = found.index(i)
    ends = [(0.0, 0.0), *(p[:2] for p in points)]
    a, b, c = ends[found[place - 1] if place else 0], ends[i], ends[found[place + 1]]
    return (a[1] + (c[1] - a[1]) * (b[0] - a[0]) / (c[0] - a[0])) / b[1] - 1
