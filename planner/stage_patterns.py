"""What each rank of a stage program may have: patterns, of whole numbers of layers.

A pattern is what the stages of one rank have of each class of layers and what they recompute of
it, as far as that fits the rank's memory at each moment that can be its peak, and runs in the time
that is asked about. Of two with the same layers of which one recomputes no less in any of the
rank's stages, that one is left out. Which layers of a class a stage has is left open. Where these
are too many, a pattern is the layers alone, and what they recompute is left open too
(`stage_spread`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.stage_problem import LEVELS, PairPin, StageProblem, allowed_pairs, level_of, pin_of
from planner.refuted import UNLIMITED
from planner.stage_arcs import Array
from planner.stage_planes import classes_of
from planner.stage_ranks import tables
from planner.stage_spread import Spread, spread_of

MOST = 40_000  # patterns of a program
LOADS = 10_000  # of all ranks, what the stages of one have of each class: of more it is too many
MOST_LOADS = 120_000  # of all ranks that are patterns alone
A_PROGRAM = 60, 1_500  # patterns that take as long to find as a linear program, and loads
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
    micro-batches and its tail. begins: of each rank its first pattern, and one beyond the last.
    spread: what they recompute, where that is not in their times."""

    loads: Ints
    times: Array
    tail_ps: Array
    own_ps: Array
    begins: tuple[int, ...]
    ranks: Ranks
    spread: Spread | None = None

    @property
    def programs(self) -> int:
        """Linear programs that take as long as to find them."""
        return len(self.own_ps) // A_PROGRAM[self.spread is not None]

    def apart(self, places: Sequence[Ints]) -> Patterns | None:
        """Of patterns of loads alone some of each rank, with all ways to recompute them; None where
        these are too many."""
        return self.ranks.patterns([self.loads[some] for some in places])


@dataclass(frozen=True, slots=True)
class _Ways:
    """To recompute a load, by way: bytes kept of a micro-batch, bytes moved to each room, working
    bytes, and recomputation in ps."""

    kept: Array
    aside: Array
    working: Array
    again_ps: Array


class Ranks:
    """Patterns, rank by rank. of: [number, class], what the problem knows of each class of layers.
    """

    def __init__(self, p: StageProblem, below_ps: int) -> None:
        kinds, kind_of = classes_of(p)
        self.p, self.kind_of = p, kind_of
        self.of = np.array(kinds, dtype=float).T
        self.each_ps = self.of[:3].sum(axis=0)
        self.limit_ps = below_ps * (1 + TOLERANCE)
        # by their number: of each load the classes of layers in a row that it may be
        self.rows: dict[int, dict[Load, set[tuple[int, ...]]]] = {}
        self.ways: dict[tuple[Load, PairPin], _Ways] = {}
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
             one.most(math.ceil(self.limit_ps))) for one in tables(_open(p))
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
                    found.add(tuple(count))
        return sorted(found)

    def rows_of(self, load: Load) -> set[tuple[int, ...]]:
        """The classes of layers in a row that are such a load, from any place of the chain."""
        count = sum(load)
        if count not in self.rows:
            found = self.rows[count] = {}
            for start in range(self.p.layers - count + 1):
                row = tuple(self.kind_of[start : start + count])
                key = tuple(row.count(k) for k in range(len(load)))
                found.setdefault(key, set()).add(row)
        return self.rows[count][load]

    def ways_of(self, load: Load, stage: int) -> _Ways:
        """The ways to recompute a load of which no other is better in everything."""
        key = load, pin_of(self.p, stage)
        if key not in self.ways:
            self.ways[key] = self._ways_of(load, stage)
        return self.ways[key]

    def _ways_of(self, load: Load, stage: int) -> _Ways:
        rows, rooms = [], range(len(self.p.rooms))
        for layers in self.rows_of(load):
            for pair in allowed_pairs(self.p, stage, len(layers)):
                at = [(level_of(pair, i), k) for i, k in enumerate(layers)]
                rows.append((
                    sum((0.0, self.of[9, k], self.of[8, k])[level] for level, k in at),
                    sum(self.of[10 + level, k] for level, k in at),
                    max(self.of[13 + level, k] for level, k in at),
                    *(sum(self.of[17 + 4 * i + level, k] for level, k in at) for i in rooms),
                ))  # fmt: skip
        found = _least(np.array(rows))
        return _Ways(found[:, 1], found[:, 3:], found[:, 2], found[:, 0])

    def loads_of_all(self, most_loads: int) -> list[Ints] | None:
        """Of each rank what its stages may have; None where that is more in all."""
        found = []
        for rank in range(self.p.pp):
            some = self.loads_of(rank, most_loads)
            if some is None:
                return None
            most_loads -= len(some)
            found.append(some)
        return found

    def loads_of(self, rank: int, most_loads: int) -> Ints | None:
        """[way, stage of the rank, class]: what the stages may have in time; None where there are
        more ways."""
        stages, room_ps = self.p.stages_of(rank), self.limit_ps / self.p.microbatches
        room_ps -= self.glue_ps[rank]
        most = int(room_ps / max(1.0, self.each_ps.min())) - (len(stages) - 1)
        found, took = np.zeros((1, 0, len(self.each_ps)), dtype=np.int64), np.zeros(1)
        for stage in stages:
            some = np.array(self.loads(stage, most), dtype=np.int64).reshape(-1, found.shape[2])
            takes = took[:, None] + some @ self.each_ps + self._pinned_ps(some, stage)
            before, at = np.nonzero(takes <= room_ps)
            if len(at) > MANY * most_loads:
                return None
            found = np.concatenate([found[before], some[at][:, None]], axis=1)
            took = takes[before, at]
        layers = found.sum(axis=1)
        found = found[self._in_windows(rank, layers) & (self._left_ps(rank, layers) >= 0)]
        return found if len(found) <= most_loads else None

    def _pinned_ps(self, loads: Ints, stage: int) -> Array:
        """What a stage with such loads recomputes at least, by a pin; else that may be nothing."""
        if self.p.fixed_recompute is None:
            return np.zeros(len(loads))
        ways = [self.ways_of(tuple(load), stage) for load in loads.tolist()]
        return np.array([way.again_ps.min() for way in ways])

    def patterns(self, loads: Sequence[Ints]) -> Patterns | None:
        """Of such loads of each rank with all ways to recompute them; None where they are many."""
        left, found = MOST, []
        for rank, mine in enumerate(loads):
            some = self._of_rank(rank, mine, left)
            if some is None:
                return None
            left -= len(some.own_ps)
            found.append(some)
        return self._joined(found)

    def of_loads(self, loads: Sequence[Ints]) -> Patterns:
        """Of such loads of each rank alone."""
        moments = max(map(len, self.held))
        found = []
        for rank, mine in enumerate(loads):
            spread = spread_of(self.p, rank, self.of, mine, moments)
            fits = spread.least_ps <= self._left_ps(rank, mine.sum(axis=1))
            again = np.zeros((int(fits.sum()), self.p.chunks))
            spread = replace(
                spread, least_ps=spread.least_ps[fits], needs_ps=spread.needs_ps[fits]
            )
            found.append(self._recomputing(rank, mine[fits], again, spread))
        return self._joined(found)

    def _of_rank(self, rank: int, loads: Ints, most: int) -> Patterns | None:
        """What a rank with such loads recomputes; None where there are more ways."""
        found: list[tuple[int, Array]] = []
        layers = loads.sum(axis=1)
        for at, left_ps in enumerate(self._left_ps(rank, layers).tolist()):
            again = self._again_ps(rank, loads[at], layers[at], left_ps)
            if again is None:
                return None
            found += [(at, more) for more in again]
            if len(found) > most:
                return None
        which = np.array([at for at, _ in found], dtype=np.int64)
        again = np.array([more for _, more in found]).reshape(-1, self.p.chunks)
        return self._recomputing(rank, loads[which], again)

    def _recomputing(
        self, rank: int, loads: Ints, again: Array, spread: Spread | None = None
    ) -> Patterns:
        """Patterns of these loads, each with what its stages recompute."""
        times = (loads @ self.of[:3].T).transpose(0, 2, 1)
        times[:, 1] += again
        micro_ps = self.glue_ps[rank] + times.sum(axis=(1, 2))
        if spread is not None:
            micro_ps += spread.least_ps
        tails_ps = self._tails_ps(rank, loads.sum(axis=1))
        return Patterns(
            loads=loads, times=times.reshape(len(loads), 3 * self.p.chunks), tail_ps=tails_ps,
            own_ps=tails_ps + self.p.microbatches * micro_ps, begins=(0, len(loads)), ranks=self,
            spread=spread,
        )  # fmt: skip

    def _joined(self, found: Sequence[Patterns]) -> Patterns:
        """Rank after rank."""
        begins = np.cumsum([0, *(len(one.own_ps) for one in found)]).tolist()
        spreads = [one.spread for one in found if one.spread is not None]
        return Patterns(
            begins=tuple(begins), ranks=self, **_concatenated(found, _OF_PATTERNS),
            spread=Spread(**_concatenated(spreads, _OF_SPREAD)) if spreads else None,
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
        if p.capacity_bytes >= UNLIMITED and p.fixed_recompute is None:
            return np.zeros((1, len(stages)))
        fixed = p.constant_bytes + float(self.of[3] @ layers) + sum(e.state_bytes for e in ends)
        fixed += 2 * max([self.of[4][layers > 0].max(), *(e.gathered_bytes for e in ends)])
        used = max([0.0, *(float(e.working_bytes) for e in ends)])
        held = self.held[rank]
        beside = held @ [float(sum(e.activation_bytes for e in p.extras(k))) for k in stages]
        room = p.capacity_bytes - fixed - beside
        ways = [self.ways_of(tuple(load), stage) for load, stage in zip(loads.tolist(), stages)]
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


_OF_PATTERNS = ("loads", "times", "tail_ps", "own_ps")
_OF_SPREAD = ("least_ps", "needs_ps", "counts")


def _concatenated(some: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: np.concatenate([getattr(one, name) for one in some]) for name in names}


def applies(p: StageProblem) -> bool:
    """Whether patterns are all that ranks may have: they are alike, and no stages are given."""
    return p.fixed_stages is None and not p.ranks and p.lowered is None


def _open(p: StageProblem) -> StageProblem:
    """Without its pins of recomputation: no choice of it takes longer than one of these."""
    return p if p.fixed_recompute is None else replace(p, fixed_recompute=None, levels=LEVELS)


def patterns_of(p: StageProblem, below_ps: int, alone: bool = True) -> Patterns | None:
    """The patterns of all ranks with which a step may be below that; None where they are many.
    alone: unless of loads alone they are not."""
    made = Ranks(p, below_ps)
    loads = made.loads_of_all(MOST_LOADS if alone else LOADS)
    if loads is None:
        return None
    found = made.patterns(loads) if sum(map(len, loads)) <= LOADS else None
    if found is None and alone and p.fixed_recompute is None and "none" in p.levels:
        return made.of_loads(loads)
    return found
