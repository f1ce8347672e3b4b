"""How many layers each rank of a stage program can take in a given time and memory, in whole
numbers: a bound of the step that needs no solver.

Rank r with n layers of one kind runs m micro-batches of them, of what it recomputes and of what
its end of the chain adds; before its first forward a micro-batch comes through the r stages before
it, behind its last backward one goes home through them, and then it spends its own tail. Memory
says how many of the n are recomputed at least: of n layers in c chunks that hold k_1 <= .. <= k_c
micro-batches at one moment, k recomputed ones leave a layer at least in each of the c - k chunks
that hold the fewest, and each layer beside those holds k_1 micro-batches at least. The ranks take
all N layers of the kind together, so the step is at least the least time in which the most layers
of all ranks are N.

The kind is the commonest one, other layers being left out; where they are not few, also one that
is in every number the least of all layers. The greater bound counts.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cost_models.schedule import SPLIT_BACKWARD
from cost_models.stage_problem import StageProblem, pairs_of
from planner.stage_bounds import least_tail_ps, lower_bound_ps

Array = Any
NEVER_PS = 1 << 60  # of a rank that so many layers do not fit
FEW = 10  # one in so many layers, or fewer: other kinds say little of the ranks
WIDE = (4, 6)  # numbers of layers that are weighed below the mean of all ranks, and beyond it
NARROW = (1, 1)  # what rules out most programs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """Numbers of one layer, as StageProblem has them, by level of recomputation where they
    differ; how many there are, and which of the chain's layers may take a stage instead."""

    count: int
    step_ps: int
    state_bytes: int
    gathered_bytes: int
    tails_ps: tuple[int, int]  # comm - hide, own
    again_ps: tuple[int, int]  # full, selective
    held: tuple[int, int, int]
    used: tuple[int, int, int]
    others: tuple[int, ...]
    relief_ps: int  # of the tail, that layers left out may hide


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Of one kind of layers, which `layers` are: least_ps[rank, n] is the least step in which a
    rank has low + 1 + n of them or more; beyond_ps: more than that table has. again_ps: what they
    recompute a micro-batch at least, NEVER_PS where so many do not fit."""

    layers: tuple[int, ...]
    low: int
    least_ps: Array
    again_ps: Array
    beyond_ps: int

    @property
    def bound_ps(self) -> int:
        """The least step in which the ranks take all layers of the kind."""
        least = np.sort(self.least_ps.reshape(-1))
        taken = len(self.layers) - len(self.least_ps) * self.low  # beside what is not weighed
        found = int(least[taken - 1]) if taken <= len(least) else NEVER_PS
        return min(found, self.beyond_ps)

    def most(self, step_ps: int) -> list[int]:
        """The most layers of the kind that each rank has where the step is no longer."""
        if self.beyond_ps <= step_ps:
            return [len(self.layers)] * len(self.least_ps)
        found: list[int] = (self.low + (self.least_ps <= step_ps).sum(axis=1)).tolist()
        return found

    def recomputed(self, rank: int, most: int) -> list[tuple[float, float]]:
        """(a, b): a rank with n layers of the kind, `most` at most, recomputes a + b n picoseconds
        a micro-batch at least, for each: the lower hull of what whole numbers recompute."""
        points = [(self.low, 0)]
        for n, again in enumerate(self.again_ps[rank, : most - self.low].tolist(), self.low + 1):
            if again >= NEVER_PS:
                break
            while len(points) > 1 and _above(points[-2], points[-1], (n, again)):
                points.pop()
            points.append((n, again))
        rates = [(a, (d - b) / (c - a), b) for (a, b), (c, d) in itertools.pairwise(points)]
        return [(b - rate * a, rate) for a, rate, b in rates if rate > 0]


def applies(p: StageProblem) -> bool:
    """Whether a program is bounded so: nothing of it pinned, ranks and layers alike."""
    free = p.fixed_stages is None and p.fixed_recompute is None and "none" in p.levels
    return free and not p.ranks and p.lowered is None and p.layers >= p.count


def bound_ps(p: StageProblem, below_ps: int = NEVER_PS) -> int:
    """The step is at least this; not sharpened beyond `below_ps`, nor below `lower_bound_ps`."""
    least = lower_bound_ps(p)
    for window in (NARROW, WIDE):
        if least < below_ps:
            least = max([least, *(one.bound_ps for one in tables(p, window))])
    return least


def usable(p: StageProblem, below_ps: int) -> StageProblem:
    """The program without the levels of recomputation that no choice with a step below has: a
    rank with one layer of them takes too few for the others to take the rest."""
    again = {"full": min(p.recompute_ps[0]), "selective": min(p.recompute_ps[1])}
    each = max(1, min(map(sum, zip(p.forward_ps, p.input_grad_ps, p.weight_grad_ps))))
    useless = set()
    for table in tables(p):
        most = table.most(below_ps)
        spare = sum(most) - len(table.layers)
        for level, more_ps in again.items():
            left = (below_ps // p.microbatches - more_ps) // each
            if all(number - left > spare for number in most):
                useless.add(level)
    levels = tuple(level for level in p.levels if level not in useless)
    return p if levels == p.levels else replace(p, levels=levels)


@functools.lru_cache(maxsize=16)
def tables(p: StageProblem, window: tuple[int, int] = WIDE) -> tuple[Table, ...]:
    """What is known of each kind; none where a program is not of those that are bounded so."""
    if not applies(p):
        return ()
    rows = list(zip(
        p.forward_ps, p.input_grad_ps, p.weight_grad_ps, p.state_bytes, p.gathered_bytes,
        p.tail_comm_ps, p.tail_hide_ps, p.tail_own_ps, *p.recompute_ps, *p.activation_bytes,
        *p.working_bytes,
    ))  # fmt: skip
    common, count = Counter(rows).most_common(1)[0]
    mine = tuple(i for i, row in enumerate(rows) if row == common)
    others = tuple(i for i, row in enumerate(rows) if row != common)
    relief = sum(max(0, rows[i][6] - rows[i][5]) for i in others)
    found = [_table(p, _kind(common, count, others, relief), mine, window)]
    if len(others) * FEW > p.layers:
        least = [min(column) for column in zip(*rows)]
        least[5:7] = min(row[5] - row[6] for row in rows), 0
        every = _kind(tuple(least), p.layers, (), 0)
        found.append(_table(p, every, tuple(range(p.layers)), window))
    return tuple(found)


def _kind(row: tuple[int, ...], count: int, others: tuple[int, ...], relief_ps: int) -> _Kind:
    return _Kind(
        count=count, step_ps=sum(row[:3]), state_bytes=row[3], gathered_bytes=row[4],
        tails_ps=(row[5] - row[6], row[7]), again_ps=(row[8], row[9]),
        held=(row[10], row[11], row[12]), used=(row[13], row[14], row[15]),
        others=others, relief_ps=relief_ps,
    )  # fmt: skip


def _above(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    """Whether b is on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _table(
    p: StageProblem, kind: _Kind, layers: tuple[int, ...], window: tuple[int, int]
) -> Table:
    mean = -(-kind.count // p.pp)
    low = max(0, mean - window[0])
    number = np.arange(low + 1, min(kind.count, mean + window[1]) + 1)
    least, again = _ranks_ps(p, kind, number)
    so_many = np.minimum.accumulate(least[:, ::-1], axis=1)[:, ::-1]
    beyond = NEVER_PS
    if number[-1] < kind.count:
        beyond = p.microbatches * (int(number[-1]) + 1) * kind.step_ps + least_tail_ps(p)
    return Table(
        layers=layers, low=low, least_ps=so_many, again_ps=again, beyond_ps=beyond
    )  # fmt: skip


def _ranks_ps(p: StageProblem, kind: _Kind, number: Array) -> tuple[Array, Array]:
    """[rank, number of layers]: what a rank with so many takes at least, its tail included; and
    what they recompute a micro-batch."""
    glue, m = p.rank_glue_forward_ps + p.rank_glue_backward_ps, p.microbatches
    way = _way_ps(p)
    fixed = np.zeros((3, p.pp), dtype=np.int64)  # busy, before and behind that; comm, own
    apart = np.zeros(p.pp, dtype=np.int64)
    for rank in range(p.pp):
        stages = p.stages_of(rank)
        ends = [e for k in stages for e in p.extras(k)]
        once = p.chunks * glue + sum(e.forward_ps + e.input_grad_ps + e.weight_grad_ps
                                     for e in ends)  # fmt: skip
        fixed[0, rank] = m * once + way[rank]
        fixed[1, rank] = sum(e.tail_comm_ps - e.tail_hide_ps for e in ends)
        fixed[2, rank] = sum(e.tail_own_ps for e in ends)
        apart[rank] = sum(_may_be(p, k, kind.others) for k in stages)
    comm = number * kind.tails_ps[0] + (fixed[1] - kind.relief_ps * (apart > 0))[:, None]
    own = number * kind.tails_ps[1] + fixed[2][:, None]
    tail = np.maximum(np.maximum(comm, 0) + own, least_tail_ps(p))
    again = _again_ps(p, kind, number, apart)
    busy = m * (number * kind.step_ps + np.where(again < NEVER_PS, again, 0))
    return np.where(again < NEVER_PS, busy + fixed[0][:, None] + tail, NEVER_PS), again


def _way_ps(p: StageProblem) -> list[int]:
    """[rank]: through the stages before it and home at least: so many of the chain's first layers
    lie there, or more."""
    rows, ends = [p.forward_ps], [p.first.forward_ps]
    glue = p.rank_glue_forward_ps + p.p2p_ps
    if p.schedule not in SPLIT_BACKWARD:
        rows += [p.input_grad_ps, p.weight_grad_ps]
        ends += [p.first.input_grad_ps, p.first.weight_grad_ps]
        glue += p.rank_glue_backward_ps + p.p2p_ps
    ahead = itertools.accumulate(map(sum, zip(*rows)), initial=0)
    return [(rank > 0) * sum(ends) + rank * glue + ps for rank, ps in zip(range(p.pp), ahead)]


def _may_be(p: StageProblem, stage: int, layers: tuple[int, ...]) -> bool:
    """Whether one of these layers can lie on this stage: each stage has a layer at least."""
    last = p.layers - p.count + stage
    return any(stage <= i <= last for i in layers)


def _again_ps(p: StageProblem, kind: _Kind, number: Array, apart: Array) -> Array:
    """[rank, number of layers]: what these recompute a micro-batch at least so that the rank fits;
    NEVER_PS where it does not. apart: of each rank the chunks that may have none of the kind."""
    counts = np.zeros((p.pp, p.chunks), dtype=np.int64)
    here, used = np.zeros((2, p.pp), dtype=np.int64)
    least_used = min(map(min, p.working_bytes))
    for rank in range(p.pp):
        stages = p.stages_of(rank)
        held = max(p.in_flight(rank), key=lambda moment: (min(moment), sum(moment)))
        counts[rank] = sorted(held)
        ends = [(e, c) for c, k in zip(held, stages) for e in p.extras(k)]
        here[rank] = p.constant_bytes + 2 * max(
            [kind.gathered_bytes, *(e.gathered_bytes for e, _ in ends)]
        ) + sum(e.state_bytes + c * e.activation_bytes for e, c in ends)
        used[rank] = max([least_used, *(e.working_bytes for e, _ in ends)])
    fewest = np.concatenate((np.zeros((p.pp, 1), dtype=np.int64), counts.cumsum(axis=1)), axis=1)

    def column(of_ranks: Array) -> Array:
        return of_ranks[:, None, None]

    few, rank, filled = column(counts[:, 0]), column(np.arange(p.pp)), column(p.chunks - apart)
    n = number[:, None]
    full, some = _pairs(p.levels, int(number[-1]))
    kept = n - full - some  # [number, pair]

    def units(layers: Array, chunks: Array) -> Array:
        """Micro-batches that so many layers hold, at least one in each of so many chunks."""
        return fewest[rank, chunks] + (layers - chunks) * few

    # what each layer holds of a micro-batch whatever its level, and what those kept hold beside
    least = np.where(full > 0, kind.held[2], np.where(some > 0, kind.held[1], kind.held[0]))
    least = np.minimum(least, kind.held[0])
    needs = least * units(n, filled) + (column(here) + n * kind.state_bytes)
    needs += few * (some * np.maximum(0, kind.held[1] - least))
    needs += (kind.held[0] - least) * units(kept, np.maximum(0, filled - full - some))
    working = np.zeros_like(kept)
    for layers, size in zip((kept, some, full), kind.used):
        working = np.maximum(working, np.where(layers > 0, size, 0))
    fits = needs + np.maximum(working, column(used)) <= p.capacity_bytes
    spent = full * kind.again_ps[0] + some * kind.again_ps[1]
    found: Array = np.where(fits & (kept >= 0), spent, NEVER_PS).min(axis=2)
    return found


@functools.lru_cache(maxsize=256)
def _pairs(levels: tuple[str, ...], most: int) -> Array:
    """[full or selective, pair]: the choices of so many layers or fewer."""
    return np.array(pairs_of(levels, most), dtype=np.int64).T
