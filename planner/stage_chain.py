"""Stages, one a rank: the least recompute time of every arc, bounds propagated over all arcs, and
the cuts that are left simulated, least bound first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cost_models.stage_problem import (
    Found,
    Nearest,
    Pair,
    StageProblem,
    allowed_pairs,
    neighbours,
    starts_of,
    step_ps,
)
from planner.stage_arcs import INF, Arcs, Windows, make_arcs
from planner.stage_bounds import Band, Chain, Grid, path_bound, propagate
from planner.stage_sides import share_of_layers

BANDS = 12  # intervals of the longest tail, each with a search of its own
NEAREST_ARCS = 2000  # so many arcs are weighed exactly to say what is nearest


def solve_chain(p: StageProblem, below: int, nodes: int, operations: int) -> Found:
    """One stage a rank: arcs long enough for any cut that can win, then the search."""
    windows = Windows(p)
    widest = p.layers - p.count + 1
    most = min(widest, -(-p.layers // p.count) + 2 if not p.ranks else share_of_layers(p) + 2)
    if p.fixed_stages is not None:
        most = widest = max(p.fixed_stages)
    while True:
        search = Search(p, make_arcs(p, windows, most), below, nodes, operations)
        if search.start():
            need = min(widest, longest(p, search.best, most))
            if need <= most:
                return search.finish()
        else:
            arcs, chain = search.arcs, search.chain
            if most < widest:
                arcs = make_arcs(p, windows, widest, priced=False)
                chain = Chain(p.count, p.layers, widest)
            if most == widest or chain.narrowest(arcs.least_bytes) > p.capacity_bytes:
                return Found(nearest=_nearest(p, windows, arcs, chain))
            need = min(widest, 2 * most)
        most = need


def longest(p: StageProblem, below: int, n: int = 1) -> int:
    """Layers of the longest stage that a cut with a step below `below` can have; n or more."""
    each = np.array(p.forward_ps) + np.array(p.input_grad_ps) + np.array(p.weight_grad_ps)
    sums = np.concatenate(([0], np.cumsum(each))) * p.microbatches
    while n < p.layers and int((sums[n + 1 :] - sums[: -n - 1]).min()) < below:
        n += 1
    return n


class Search:
    """The search for the best cut into stages, one a rank."""

    def __init__(
        self, p: StageProblem, arcs: Arcs, below: int, nodes: int, operations: int
    ) -> None:
        self.p, self.arcs = p, arcs
        self.below = self.best = below
        self.chain = Chain(p.count, p.layers, arcs.extra.shape[2])
        self.nodes, self.operations = nodes, operations
        self.found = Found()
        self.bound = 0

    def start(self) -> bool:
        """Bound all cuts and weigh the one of least bound. False where no cut fits."""
        grid = propagate(self.p, self.arcs, self.chain, INF)
        if not grid.alive:
            return False
        self.bound = int(grid.togo[0, 0])
        if self.bound < self.below:
            self.weigh(self.greedy(grid))
        return True

    def greedy(self, grid: Grid) -> list[tuple[int, int]]:
        """A path of arcs (first layer, layers), of the least bound at every step."""
        path, i = [], 0
        for s in range(self.p.count):
            n = min(self.after(grid, s, i))[2]
            path.append((i, n))
            i += n
        return path

    def after(self, grid: Grid, s: int, i: int) -> list[tuple[int, int, int]]:
        """Arcs of stage s from layer i: (the least bound through it, -layers, layers)."""
        rest = grid.togo[s + 1][self.chain.ends[i]]
        worst = np.maximum(grid.bound[s, i], rest).tolist()
        return [(b, -n, n) for n, b in enumerate(worst, 1) if b < INF]

    def weigh(self, path: Sequence[tuple[int, int]]) -> None:
        """Simulate a cut, unless its bound is no better than the best; keep it where it wins."""
        p = self.p
        stages = tuple(n for _, n in path)
        recompute = tuple(
            allowed_pairs(p, s, n)[int(self.arcs.pick[s, i, n - 1])]
            for s, (i, n) in enumerate(path)
        )
        if self.cut_bound(path) >= self.best:
            return
        self.operations -= 2 * p.microbatches * p.count
        found = self.costed(stages, recompute)
        if found.step_ps < self.best:
            self.best, self.found = found.step_ps, found

    def costed(self, stages: tuple[int, ...], recompute: tuple[Pair, ...]) -> Found:
        """A choice that fits, and its step."""
        step = step_ps(self.p, stages, recompute)
        return Found(stages=stages, recompute=recompute, step_ps=step)

    def cut_bound(self, path: Sequence[tuple[int, int]]) -> int:
        """The step of a cut is at least this."""
        a, s = self.arcs, np.arange(self.p.count)
        i = np.array([i for i, _ in path])
        n = np.array([n for _, n in path]) - 1
        times = (a.forward[s, i, n], a.backward[s, i, n] + a.extra[s, i, n], a.weight[s, i, n])
        ends = [np.cumsum(t) for t in times]
        before = tuple(e - t for e, t in zip(ends, times))
        behind = tuple(e[-1] - e for e in ends)
        peaks = int(times[0].max()), int((times[1] + times[2]).max())
        bound = path_bound(self.p, s, times, before, behind, peaks)
        return int(bound.max() + a.tail[s, i, n].max())

    def finish(self) -> Found:
        """Prove the best cut best, or find a better one; then the bound of what is left."""
        if self.bound >= self.best:
            return self.done(self.best)
        grid = propagate(self.p, self.arcs, self.chain, self.best)
        if grid.alive and self.improve():
            grid = propagate(self.p, self.arcs, self.chain, self.best)
        left = []
        for band in self.bands(grid):
            part = propagate(self.p, self.arcs, self.chain, self.best, band)
            if part.alive:
                self.weigh(self.greedy(part))
                if not self.explore(part, 0, 0, []):
                    left.append((band, int(part.togo[0, 0])))
        return self.done(min([self.best, *(self.least(band, low) for band, low in left)]))

    def bands(self, grid: Grid) -> list[Band]:
        """The longest tail that a cut left can have, in BANDS intervals at most."""
        tails = np.unique(self.arcs.tail[grid.bound < INF])
        least = self.chain.narrowest(np.where(grid.bound < INF, self.arcs.tail, INF))
        groups = np.array_split(tails[tails >= least], BANDS)
        return [(int(g[0]), int(g[-1])) for g in groups if len(g)]

    def least(self, band: Band, low: int) -> int:
        """No cut in the band has a step below this, by halving the interval a few times."""
        high = self.best
        for _ in range(6):
            middle = (low + high + 1) // 2
            if middle >= high:
                break
            if propagate(self.p, self.arcs, self.chain, middle, band).alive:
                high = middle
            else:
                low = middle
        return low

    def improve(self) -> bool:
        """Move one boundary by a layer while the step falls and effort lasts."""
        first, before = self.best, INF
        while self.best < before and self.found.stages:
            before, stages = self.best, self.found.stages
            for cut in neighbours(stages):
                path = list(zip(starts_of(cut), cut))
                if self.operations > 0 and all(
                    n <= self.chain.most and self.arcs.extra[s, i, n - 1] < INF
                    for s, (i, n) in enumerate(path)
                ):
                    self.weigh(path)
        return self.best < first

    def done(self, bound: int) -> Found:
        return replace(self.found, bound_ps=bound)

    def explore(self, grid: Grid, s: int, i: int, path: list[tuple[int, int]]) -> bool:
        """Weigh every cut through `path` that may win. False where the effort ran out."""
        if s == self.p.count:
            self.weigh(path)
            return True
        for bound, _, n in sorted(self.after(grid, s, i)):
            if bound >= self.best:
                break
            self.nodes -= 1
            if self.nodes < 0 or self.operations < 0:
                return False
            if not self.explore(grid, s + 1, i + n, [*path, (i, n)]):
                return False
        return True


def _nearest(p: StageProblem, windows: Windows, arcs: Arcs, chain: Chain) -> Nearest:
    """The choice whose fullest rank overflows the least; by a bound on bytes where arcs abound."""
    needs = arcs.least_bytes.copy()
    places = np.argwhere(needs < INF)
    if len(places) <= NEAREST_ARCS:
        for s, i, n in places.tolist():
            needs[s, i, n] = _least_pair(p, windows, s, i, n + 1)[0]
    togo = chain.behind(needs, np.maximum)
    stages, recompute, i = [], [], 0
    for s in range(p.count):
        worst = np.maximum(needs[s, i], togo[s + 1][chain.ends[i]])
        n = int(worst.argmin()) + 1
        stages.append(n)
        recompute.append(_least_pair(p, windows, s, i, n)[1])
        i += n
    return Nearest.of(p, tuple(stages), tuple(recompute))


def _least_pair(p: StageProblem, windows: Windows, s: int, i: int, n: int) -> tuple[int, Pair]:
    """The pair by which a stage alone on its rank needs the fewest bytes, and how many."""
    o, q = windows.options(s, i, n), p.at(s)
    more = q.extras(s)
    used = np.maximum(o.work_bytes, max((e.working_bytes for e in more), default=0))
    needs = p.in_flight(s)[0][0] * (o.act_bytes + sum(e.activation_bytes for e in more)) + used
    best = int(needs.argmin())
    fixed = q.constant_bytes + sum(q.state_bytes[i : i + n]) + sum(e.state_bytes for e in more)
    fixed += p.capacity_bytes - q.capacity_bytes
    gathered = max([*q.gathered_bytes[i : i + n], *(e.gathered_bytes for e in more)])
    return int(needs[best]) + fixed + 2 * gathered, o.pairs[best]

