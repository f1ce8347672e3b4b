"""What each rank of a stage program may have: patterns, of whole numbers of layers.

A pattern is what the stages of one rank have of each class of layers and what they recompute of
it, as far as that fits the rank's memory at each moment that can be its peak, and runs in the time
that is asked about. Of two with the same layers of which one recomputes no less in any of the
rank's stages, that one is left out. Which layers of a class a stage has is left open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.stage_problem import StageProblem, level_of, pairs_of
from planner.refuted import UNLIMITED
from planner.stage_arcs import Array
from planner.stage_planes import classes_of
from planner.stage_ranks import tables

MOST = 40_000  # patterns of a program
MOST_LOADS = 10_000  # of all ranks: what the stages of one have of each class
MANY = 4  # times so many, before it is known how many layers are on other ranks
MOST_WAYS = 200_000  # to recompute one of them
TOLERANCE = 1e-6  # of a time that is asked about

Load = tuple[int, ...]  # layers of a stage by class
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patterns:
    """Rank after rank. loads: layers by [pattern, stage of the rank, class]. times: what it adds
    to those stages, [pattern, kind * stage of the rank] in ps. own_ps: in which its rank runs all
    micro-batches and its tail. begins: of each rank its first pattern, and one beyond the last."""

    loads: Ints
    times: Array
    tail_ps: Array
    own_ps: Array
    begins: tuple[int, ...]

    def below(self, limit_ps: float) -> Patterns:
        """Those that alone take no longer."""
        some = self.own_ps <= limit_ps
        if some.all():
            return self
        ends = np.concatenate([[0], np.cumsum(some)])
        return Patterns(
            loads=self.loads[some], times=self.times[some], tail_ps=self.tail_ps[some],
            own_ps=self.own_ps[some], begins=tuple(ends[list(self.begins)].tolist()),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Ways:
    """To recompute a load, by way: bytes kept of a micro-batch, bytes moved to each room, working
    bytes, and recomputation in ps."""

    kept: Array
    aside: Array
    working: Array
    again_ps: Array


class _Ranks:
    """Patterns, rank by rank. of: [number, class], what the problem knows of each class of layers.
    """

    def __init__(self, p: StageProblem, below_ps: int) -> None:
        kinds, kind_of = classes_of(p)
        self.p, self.kind_of = p, kind_of
        self.of = np.array(kinds, dtype=float).T
        self.each_ps = self.of[:3].sum(axis=0)
        self.limit_ps = below_ps * (1 + TOLERANCE)
        self.rows_of: dict[Load, set[tuple[int, ...]]] = {}  # the classes of layers in a row
        self.ways: dict[Load, _Ways] = {}
        self.ends = [[e for k in p.stages_of(rank) for e in p.extras(k)] for rank in range(p.pp)]
        glue_ps = p.chunks * (p.rank_glue_forward_ps + p.rank_glue_backward_ps)
        self.glue_ps = [
            glue_ps + sum(e.forward_ps + e.input_grad_ps + e.weight_grad_ps for e in ends)
            for ends in self.ends
        ]
        self.held = [np.array(p.in_flight(rank), dtype=float) for rank in range(p.pp)]
        # (classes, layers of them, the most of each rank) of each kind of layers that is known
        self.windows = [
            (sorted({kind_of[i] for i in one.layers}), len(one.layers),
             one.most(math.ceil(self.limit_ps))) for one in tables(p)
        ]  # fmt: skip

    def loads(self, stage: int, most: int) -> list[Load]:
        """What a stage may have of each class: so many layers in a row at most, from any place."""
        p, last = self.p, self.p.layers - self.p.count
        found = set()
        for start in range(stage, last + stage + 1) if stage else (0,):
            count = [0] * self.of.shape[1]
            for at in range(start, min(start + most, last + stage + 1)):
                count[self.kind_of[at]] += 1
                if stage < p.count - 1 or at == p.layers - 1:
                    load = tuple(count)
                    found.add(load)
                    self.rows_of.setdefault(load, set()).add(tuple(self.kind_of[start : at + 1]))
        return sorted(found)

    def ways_of(self, load: Load) -> _Ways:
        """The ways to recompute a load of which no other is better in everything."""
        if load not in self.ways:
            self.ways[load] = self._ways_of(load)
        return self.ways[load]

    def _ways_of(self, load: Load) -> _Ways:
        rows, rooms = [], range(len(self.p.rooms))
        for layers in self.rows_of[load]:
            for pair in pairs_of(self.p.levels, len(layers)):
                at = [(level_of(pair, i), k) for i, k in enumerate(layers)]
                rows.append((
                    sum((0.0, self.of[9, k], self.of[8, k])[level] for level, k in at),
                    sum(self.of[10 + level, k] for level, k in at),
                    max(self.of[13 + level, k] for level, k in at),
                    *(sum(self.of[17 + 4 * i + level, k] for level, k in at) for i in rooms),
                ))  # fmt: skip
        found = _least(np.array(rows))
        return _Ways(found[:, 1], found[:, 3:], found[:, 2], found[:, 0])

    def loads_of(self, rank: int, most_loads: int) -> Ints | None:
        """[way, stage of the rank, class]: what the stages may have in time; None where there are
        more ways."""
        stages, room_ps = self.p.stages_of(rank), self.limit_ps / self.p.microbatches
        room_ps -= self.glue_ps[rank]
        most = int(room_ps / max(1.0, self.each_ps.min())) - (len(stages) - 1)
        found = np.zeros((1, 0, len(self.each_ps)), dtype=np.int64)
        for stage in stages:
            some = np.array(self.loads(stage, most), dtype=np.int64).reshape(-1, found.shape[2])
            takes = (found.sum(axis=1) @ self.each_ps)[:, None] + some @ self.each_ps
            before, at = np.nonzero(takes <= room_ps)
            if len(at) > MANY * most_loads:
                return None
            found = np.concatenate([found[before], some[at][:, None]], axis=1)
        layers = found.sum(axis=1)
        found = found[self._in_windows(rank, layers) & (self._left_ps(rank, layers) >= 0)]
        return found if len(found) <= most_loads else None

    def of_rank(self, rank: int, loads: Ints) -> Patterns | None:
        """What a rank with such loads recomputes; None where there are too many ways."""
        p, layers = self.p, loads.sum(axis=1)
        found: list[tuple[int, Array]] = []
        for at, left_ps in enumerate(self._left_ps(rank, layers).tolist()):
            again = self._again_ps(rank, loads[at], layers[at], left_ps)
            if again is None:
                return None
            found += [(at, more) for more in again]
            if len(found) > MOST:
                return None
        which = np.array([at for at, _ in found], dtype=np.int64)
        times = (loads[which] @ self.of[:3].T).transpose(0, 2, 1)
        times[:, 1] += np.array([more for _, more in found]).reshape(-1, p.chunks)
        tails_ps = self._tails_ps(rank, layers[which])
        return Patterns(
            loads=loads[which], times=times.reshape(len(which), 3 * p.chunks), tail_ps=tails_ps,
            own_ps=tails_ps + p.microbatches * (self.glue_ps[rank] + times.sum(axis=(1, 2))),
            begins=(0, len(which)),
        )  # fmt: skip

    def _left_ps(self, rank: int, layers: Ints) -> Array:
        """What is left of a micro-batch for recomputation."""
        over = (self.limit_ps - self._tails_ps(rank, layers)) / self.p.microbatches
        return over - self.glue_ps[rank] - layers @ self.each_ps

    def _in_windows(self, rank: int, layers: Ints) -> Mask:
        """Whether a rank has few enough of a kind of layers, and so many that all others that have
        the most that they can leave none."""
        within = np.ones(len(layers), dtype=bool)
        for classes, count, most in self.windows:
            mine = layers[:, classes].sum(axis=1)
            within &= (mine <= most[rank]) & (mine >= count - sum(most) + most[rank])
        return within

    def _tails_ps(self, rank: int, layers: Ints) -> Array:
        ends = self.ends[rank]
        over = sum(e.tail_comm_ps - e.tail_hide_ps for e in ends)
        own = layers @ self.of[7] + sum(e.tail_own_ps for e in ends)
        return np.maximum(over + layers @ (self.of[5] - self.of[6]), 0.0) + own

    def _again_ps(self, rank: int, loads: Ints, layers: Ints, most_ps: float) -> Array | None:
        """[way, stage of the rank]: the least recomputation with which so many layers fit, if it
        takes no more than that a micro-batch; None where there are too many ways."""
        p, stages, ends = self.p, self.p.stages_of(rank), self.ends[rank]
        if p.capacity_bytes >= UNLIMITED:
            return np.zeros((1, len(stages)))
        fixed = p.constant_bytes + float(self.of[3] @ layers) + sum(e.state_bytes for e in ends)
        fixed += 2 * max([self.of[4][layers > 0].max(), *(e.gathered_bytes for e in ends)])
        used = max([0.0, *(float(e.working_bytes) for e in ends)])
        held = self.held[rank]
        beside = held @ [float(sum(e.activation_bytes for e in p.extras(k))) for k in stages]
        room = p.capacity_bytes - fixed - beside
        ways = [self.ways_of(tuple(load)) for load in loads.tolist()]
        least = np.array([w.kept.min() for w in ways])
        if (held @ least + used > room).any():
            return np.zeros((0, len(stages)))
        if math.prod(len(w.kept) for w in ways) > MOST_WAYS:
            return None
        grid = np.indices([len(w.kept) for w in ways]).reshape(len(ways), -1)
        again = np.stack([w.again_ps[i] for w, i in zip(ways, grid)])
        short = again.sum(axis=0) <= most_ps
        grid, again = grid[:, short], again[:, short]
        working = np.maximum.reduce([w.working[i] for w, i in zip(ways, grid)])
        kept = np.stack([w.kept[i] for w, i in zip(ways, grid)])
        fits = (held @ kept <= room[:, None] - np.maximum(working, used)).all(axis=0)
        for place, tier in enumerate(p.rooms):
            laid = float(self.of[16 + 4 * place] @ layers)
            laid += sum(tier.beside_bytes(k, p.count) for k in stages)
            aside = np.stack([w.aside[i, place] for w, i in zip(ways, grid)])
            fits &= (held @ aside <= tier.of_rank(rank) - laid).all(axis=0)
        return _least(again.T[fits])


def _least(rows: Array) -> Array:
    """Those of which no other is less in everything."""
    left = rows[np.lexsort((*rows.T, rows.sum(axis=1)))]
    found = []
    while len(left):
        found.append(left[0])
        left = left[~(left >= left[0]).all(axis=1)]
    return np.array(found).reshape(-1, rows.shape[1])


def patterns_of(p: StageProblem, below_ps: int) -> Patterns | None:
    """The patterns of all ranks with which a step may be below that; None where they are many."""
    made = _Ranks(p, below_ps)
    left, loads = MOST_LOADS, list[Ints]()
    for rank in range(p.pp):
        some = made.loads_of(rank, left)
        if some is None:
            return None
        left -= len(some)
        loads.append(some)
    found: list[Patterns] = []
    begins = [0]
    for rank, some in enumerate(loads):
        one = made.of_rank(rank, some)
        if one is None or begins[-1] + len(one.tail_ps) > MOST:
            return None
        begins.append(begins[-1] + len(one.tail_ps))
        found.append(one)
    return Patterns(begins=tuple(begins), **{
        name: np.concatenate([getattr(x, name) for x in found])
        for name in ("loads", "times", "tail_ps", "own_ps")
    })
