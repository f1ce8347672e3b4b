"""Stages, one a rank, whose first layers may have their optimizer below the device: how many of
each, with the cut and what is computed again.

More layers below leave a rank more memory and a longer tail. Only the longest tail of all ranks
counts, so under a limit to it every rank may as well lay below what frees the most bytes within the
limit: then a cut's best recomputation is an arc's own affair, as it is without layers below. The
limits are the tails that there can be. All of an interval are bounded at once, by the makespan
under its end and the tail of its beginning; intervals that may hold a better choice are halved, the
least bound first, down to single limits, which are searched as any stage program.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cost_models.stage_problem import (
    Found,
    Pair,
    StageProblem,
    below_bytes,
    rank_bytes,
    starts_of,
    timeline,
)
from planner.stage_arcs import INF, Allowed, Arcs, Array, Options, Windows, make_arcs, upto
from planner.stage_bounds import Chain, propagate
from planner.stage_chain import Search, longest, solve_chain

SWEEP = 40  # nodes that bounding one interval counts for


class Below:
    """Of every arc and number of its first layers below: the rank's tail, and the bytes that it
    holds less than with none; [first layer, layers - 1, below], of the first stage, of those
    between and of the last."""

    def __init__(self, p: StageProblem, most: int) -> None:
        assert p.lowered is not None and p.chunks == 1 and not p.ranks
        L, low, self.p, self.most = p.layers, p.lowered, p, most
        start, layers, below = np.ogrid[:L, 1 : most + 1, : most + 1]
        end, split = np.minimum(start + layers, L), np.minimum(start + below, L)
        self.there = (start + layers <= L) & (below <= layers)

        def summed(here: tuple[int, ...], there: tuple[int, ...]) -> Array:
            """Of the layers below what they have there, of the others what they have here."""
            first, rest = upto(there), upto(here)
            return first[split] - first[start] + rest[end] - rest[split]

        gathered = np.maximum(
            _longest_run(low.gathered_bytes, most)[start, below],
            _longest_run(p.gathered_bytes, most)[split, np.maximum(layers - below, 0)],
        )
        state, own = summed(p.state_bytes, low.state_bytes), summed(p.tail_own_ps, low.tail_own_ps)
        comm = upto(p.tail_comm_ps) - upto(p.tail_hide_ps)
        self.laid = [summed(room.state_bytes, room.lowered_bytes) for room in p.rooms]
        self.flight = np.array([p.in_flight(r)[0][0] for r in range(p.count)])
        self.kinds = [1] * p.count
        self.kinds[0], self.kinds[-1] = 0, 2
        self.tails, self.saved, self.open = [], [], []
        for stage in (0, 1, p.count - 1):
            self.open.append(self.there & np.logical_and.reduce([
                laid <= left for laid, left in zip(self.laid, self._left(stage))
            ], axis=0, initial=True))
            ends = p.extras(stage) if stage != 1 or p.count == 2 else ()
            wide = np.maximum(gathered, max((e.gathered_bytes for e in ends), default=0))
            beside = sum(e.tail_comm_ps - e.tail_hide_ps for e in ends)
            tail = np.maximum(0, comm[end] - comm[start] + beside) + own
            held = state + 2 * wide
            self.tails.append(tail + sum(e.tail_own_ps for e in ends))
            self.saved.append(held[:, :, :1] - held)

    def shortest(self) -> Array:
        """[stage, first layer, layers - 1]: the shortest tail."""
        least = [np.where(o, tails, INF).min(axis=2) for o, tails in zip(self.open, self.tails)]
        return np.stack([least[kind] for kind in self.kinds])

    def limits(self, exists: Array) -> Array:
        """Every tail that an arc can have, in order. exists: [stage, first layer, layers - 1]."""
        found = [self.tails[kind][exists[s][:, :, None] & self.open[kind]]
                 for s, kind in enumerate(self.kinds)]  # fmt: skip
        return np.unique(np.concatenate(found))

    def spare(self, limit_ps: int) -> Array:
        """[stage, first layer, layers - 1]: the most bytes that tails up to this save."""
        most = [np.where(o & (tails <= limit_ps), saved, 0).max(axis=2)
                for o, tails, saved in zip(self.open, self.tails, self.saved)]  # fmt: skip
        return np.stack([most[kind] for kind in self.kinds])

    def arcs(self, windows: Windows, limit_ps: int) -> Arcs:
        """Arcs with the shortest of their tails, and the most memory that tails up to this leave.
        """
        spare = self.spare(limit_ps)
        allowed = self._allowed(spare, limit_ps) if self.p.rooms else None
        made = make_arcs(self.p, windows, self.most, spare=spare, allowed=allowed)
        return replace(made, tail=self.shortest())

    def _left(self, stage: int) -> list[int]:
        """Of each room, what the layers of a stage may lay there."""
        return [
            room.of_rank(stage) - room.beside_bytes(stage, self.p.count) for room in self.p.rooms
        ]

    def _allowed(self, spare: Array, limit_ps: int) -> Allowed:
        """Pairs beside which some number of layers below saves enough and leaves room, with a tail
        up to the limit."""
        def allowed(o: Options, s: Array, i: Array, n: Array, memory: Array) -> Array:
            over = memory + spare[s, i, n][:, None] - self.p.capacity_bytes
            fits = np.zeros(over.shape, dtype=bool)
            for stage in np.unique(s).tolist():
                mine = np.flatnonzero(s == stage)
                kind, at = self.kinds[stage], (i[mine], n[mine])
                can = self.open[kind][at] & (self.tails[kind][at] <= limit_ps)
                saved, laid = self.saved[kind][at], [one[at] for one in self.laid]
                left = [most - self.flight[stage] * aside
                        for most, aside in zip(self._left(stage), o.aside_bytes)]  # fmt: skip
                for below in np.flatnonzero(can.any(axis=0)).tolist():
                    here = can[:, below, None] & (saved[:, below, None] >= over[mine])
                    for one, most in zip(laid, left):
                        here &= one[:, below, None] <= most
                    fits[mine] |= here
            return fits

        return allowed

    def least(
        self, stage: int, start: int, layers: int, over_bytes: int, used_bytes: Sequence[int] = ()
    ) -> tuple[int, int]:
        """(tail, layers below) of the shortest tail that saves so many bytes, the fewest layers.
        used_bytes: of each room, what lies there besides. INF where there is none."""
        kind, at = self.kinds[stage], (start, layers - 1, slice(layers + 1))
        can = self.saved[kind][at] >= over_bytes
        for room, laid, used in zip(self.p.rooms, self.laid, used_bytes):
            can = can & (laid[at] + used <= room.of_rank(stage))
        tails = np.where(can, self.tails[kind][at], INF)
        best = int(np.argmin(tails))
        return int(tails[best]), best


def _longest_run(values: tuple[int, ...], most: int) -> Array:
    """[first, count]: the most of so many values from the first on; 0 of none."""
    found = np.zeros((len(values) + 1, most + 1), dtype=np.int64)
    padded = np.array((*values, *(0,) * (most + 1)), dtype=np.int64)
    for n in range(1, most + 1):
        found[:, n] = np.maximum(found[:, n - 1], padded[n - 1 : n + len(values)])
    return found


def arcs_of(p: StageProblem, windows: Windows, most: int) -> Arcs:
    """Arcs of which no choice, with layers below where it may have them, is better."""
    return Below(p, most).arcs(windows, INF) if p.lowered else make_arcs(p, windows, most)


class Limited(Search):
    """The search under a limit to the tail."""

    def __init__(
        self, p: StageProblem, windows: Windows, tables: Below, below: int, effort: tuple[int, int],
        limit_ps: int,
    ) -> None:  # fmt: skip
        super().__init__(p, tables.arcs(windows, limit_ps), below, *effort)
        self.tables = tables

    def costed(self, stages: tuple[int, ...], recompute: tuple[Pair, ...]) -> Found:
        p, starts = self.p, starts_of(stages)
        asides = [below_bytes(p, room, stages, recompute) for room in p.rooms]
        rows = [
            self.tables.least(s, starts[s], n, used - p.capacity_bytes, [a[s] for a in asides])
            for s, (n, used) in enumerate(zip(stages, rank_bytes(p, stages, recompute)))
        ]
        step = timeline(p, stages, recompute).makespan_ps + max(tail for tail, _ in rows)
        below = tuple(n for _, n in rows)
        return Found(stages=stages, recompute=recompute, below=below, step_ps=step)


def solve_lowered(p: StageProblem, below: int, nodes: int, operations: int) -> Found:
    """The best choice below a step, with a bound on all. Where nothing fits, what is nearest with
    no layers below."""
    windows, widest = Windows(p), p.layers - p.count + 1
    most = min(widest, -(-p.layers // p.count) + 2)
    if p.fixed_stages is not None:
        most = widest = max(p.fixed_stages)
    while True:
        found = _solve(p, windows, Below(p, most), below, (nodes, operations))
        if found is not None:
            need = min(widest, longest(p, found.step_ps or below, most))
            if need <= most:
                return found
            most = need
        elif most < widest:
            most = min(widest, 2 * most)
        else:
            return solve_chain(p, below, nodes, operations)


def _solve(
    p: StageProblem, windows: Windows, tables: Below, below: int, effort: tuple[int, int]
) -> Found | None:
    """With stages no longer than in the tables; None where none of them fits."""
    chain, best, found = Chain(p.count, p.layers, tables.most), below, Found()
    free = Limited(p, windows, tables, below, effort, INF)
    if not propagate(p, free.arcs, chain, INF).alive:
        return None
    limits = tables.limits(free.arcs.extra < INF)
    queue, left = [(0, 0, len(limits) - 1)], [below]
    while queue and queue[0][0] < best:
        bound, first, last = heapq.heappop(queue)
        one = Limited(p, windows, tables, best, effort, int(limits[last]))
        grid = propagate(p, one.arcs, chain, best, (int(limits[first]), int(limits[last])))
        bound = max(bound, int(grid.togo[0, 0]))
        if bound >= best:
            continue
        one.weigh(one.greedy(grid))
        whole = first < last or one.explore(grid, 0, 0, [])
        if one.found.stages:
            best, found = one.best, one.found
        effort = (one.nodes - SWEEP, one.operations)
        if min(effort) < 0 or not whole:
            left.append(bound)
            if min(effort) < 0:
                break
        elif first < last:
            middle = (first + last) // 2
            heapq.heappush(queue, (bound, first, middle))
            heapq.heappush(queue, (bound, middle + 1, last))
    left += [bound for bound, _, _ in queue]
    return replace(found, bound_ps=min([*left, best]))
