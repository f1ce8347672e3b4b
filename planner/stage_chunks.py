"""Stages where a rank runs several chunks (interleaved, ZB-V, DualPipeV): memory couples them.

Few cuts: all of them, least bound first. Many: near-even cuts with the ranks' loads balanced, then
single layers moved between neighbours, against a bound on every cut.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cost_models.schedule import SPLIT_BACKWARD, global_stage, order
from planner.stage_bounds import INF, Windows, mean_tail_ps, sure_extra
from planner.stage_problem import (
    Found,
    Nearest,
    Pair,
    StageProblem,
    neighbours,
    starts_of,
    stash_bytes,
    step_ps,
    tail_ps,
)  # fmt: skip

ALL_CUTS = 1000  # so many cuts are all looked at
ALL_PAIRS = 512  # so many combinations of a rank's pairs are all looked at
Array = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Recomputation of one rank's chunks: pairs, the time each adds, and bytes at the peak."""

    pairs: tuple[Pair, ...]
    extra_ps: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What each rank does before its first backward and up to its last forward.

    stage: [rank, chunk]. Of the first backward: its stage, and forwards done before, by chunk.
    Of the last forward: its stage; forwards, input and weight gradients up to it, by chunk.
    """

    stage: Array
    first_stage: Array
    first_done: Array
    last_stage: Array
    last_done: Array


@functools.lru_cache(maxsize=256)
def profile(schedule: str, pp: int, m: int, v: int) -> Profile:
    firsts, lasts, first_done, last_done = [], [], [], []
    for rank in range(pp):
        ops = order(schedule, pp, m, v, rank)
        first = next(i for i, (op, _, _) in enumerate(ops) if op in ("B", "BW"))
        last = max(i for i, (op, _, _) in enumerate(ops) if op == "F")
        firsts.append(global_stage(schedule, pp, rank, ops[first][2]))
        lasts.append(global_stage(schedule, pp, rank, ops[last][2]))
        first_done.append([sum(c == k for _, _, k in ops[:first]) for c in range(v)])
        done = np.zeros((3, v), dtype=np.int64)
        for op, _, chunk in ops[: last + 1]:
            for kind, words in enumerate((("F",), ("B", "BW"), ("W", "BW"))):
                done[kind, chunk] += op in words
        last_done.append(done)
    return Profile(
        stage=np.array([[global_stage(schedule, pp, r, c) for c in range(v)] for r in range(pp)]),
        first_stage=np.array(firsts), first_done=np.array(first_done),
        last_stage=np.array(lasts), last_done=np.array(last_done),
    )  # fmt: skip


class Chunks:
    """Costs of cuts: times by stage, the recomputation a rank needs, and a bound of each."""

    def __init__(self, p: StageProblem) -> None:
        self.p, self.windows = p, Windows(p)
        self.profile = profile(p.schedule, p.pp, p.microbatches, p.virtual_stages)
        kinds = (p.forward_ps, p.input_grad_ps, p.weight_grad_ps, p.state_bytes)
        self.sums = np.concatenate(
            (np.zeros((4, 1), dtype=np.int64), np.cumsum(np.array(kinds), axis=1)), axis=1
        )
        self.split = p.schedule in SPLIT_BACKWARD
        crossing = [p.rank_of(k) != p.rank_of(k + 1) for k in range(p.count - 1)]
        self.cross = np.concatenate(([0], np.cumsum(crossing))) * p.p2p_ps
        self._kept: dict[int, list[tuple[int, int, int, Pair]]] = {}
        self.exact = True  # whether every combination of pairs asked for was looked at
        self._pairs: dict[tuple[int, tuple[tuple[int, int], ...]], tuple[Pairs, ...]] = {}

    def times(self, stages: Sequence[int]) -> Array:
        """[forward, backward, weight; stage], without recomputation."""
        p, cuts = self.p, np.concatenate(([0], np.cumsum(stages)))
        t = self.sums[:3, cuts[1:]] - self.sums[:3, cuts[:-1]]
        t[0] += p.rank_glue_forward_ps
        t[1] += p.rank_glue_backward_ps
        for k, e in ((0, p.first), (p.count - 1, p.last)):
            t[:, k] += (e.forward_ps, e.input_grad_ps, e.weight_grad_ps)
        return t

    def bound(self, stages: Sequence[int], extra: Sequence[int]) -> int:
        """The step of a cut is at least this, `extra` being the time added to each stage."""
        f, b, w = self.times(stages)
        b = b + np.array(extra)
        q, m, cross = self.profile, self.p.microbatches, self.cross
        back = b if self.split else b + w  # before a gradient is passed on
        before = np.concatenate(([0], np.cumsum(f)))
        behind = np.concatenate(([0], np.cumsum(back)))
        load = m * (f + b + w)[q.stage].sum(axis=1)
        rank = np.arange(self.p.pp)
        head = before[rank] + cross[rank]
        home = np.zeros(self.p.pp, dtype=np.int64) if self.split else behind[rank] + cross[rank]
        returned = before[-1] + 2 * cross[-1] - cross[q.first_stage]
        returned = returned + behind[-1] - behind[q.first_stage + 1]
        after_first = returned + load - (q.first_done * f[q.stage]).sum(axis=1) + home
        done = sum((q.last_done[:, i] * t[q.stage]).sum(axis=1) for i, t in enumerate((f, b, w)))
        to_last = head + done + before[-1] - before[q.last_stage + 1]
        to_last = to_last + 2 * cross[-1] - cross[q.last_stage] + behind[-1]
        once = int(before[-1] + behind[-1] + 2 * cross[-1])
        found = max(once, int(np.maximum(np.maximum(head + load + home, after_first),
                                         to_last).max()))  # fmt: skip
        return found + tail_ps(self.p, stages)

    def pairs(self, rank: int, stages: Sequence[int]) -> tuple[Pairs, ...]:
        """Recomputations of a rank that fit and are not worse in every chunk; none if none fits."""
        starts = starts_of(stages)
        spans = tuple((starts[k], stages[k]) for k in self.p.stages_of(rank))
        key = rank, spans
        if key not in self._pairs:
            self._pairs[key] = self._fitting(rank, spans)
        return self._pairs[key]

    def _fitting(self, rank: int, spans: tuple[tuple[int, int], ...]) -> tuple[Pairs, ...]:
        lists = self._lists(rank, spans)
        if math.prod(map(len, lists)) > ALL_PAIRS:
            self.exact = False
            chosen = self._filled(rank, spans, lists)
            return (chosen,) if chosen.bytes <= self.p.capacity_bytes else ()
        kept: list[Pairs] = []
        for rows in sorted(itertools.product(*lists), key=lambda rows: sum(r[0] for r in rows)):
            one = self._weighed(rank, spans, rows)
            if one.bytes <= self.p.capacity_bytes and not any(
                all(a <= b for a, b in zip(k.extra_ps, one.extra_ps)) for k in kept
            ):
                kept.append(one)
        return tuple(kept)

    def _lists(
        self, rank: int, spans: tuple[tuple[int, int], ...]
    ) -> list[list[tuple[int, int, int, Pair]]]:
        """Per chunk: (time added, bytes kept, bytes used, pair), the dominated left out."""
        lists = []
        for k, (start, count) in zip(self.p.stages_of(rank), spans):
            o = self.windows.options(k, start, count)
            if id(o) not in self._kept:
                kept: list[tuple[int, int, int, Pair]] = []
                columns = (o.extra_ps.tolist(), o.act_bytes.tolist(), o.work_bytes.tolist())
                for row in sorted(zip(*columns, o.pairs)):
                    if not any(a[1] <= row[1] and a[2] <= row[2] for a in kept):
                        kept.append(row)
                self._kept[id(o)] = kept
            lists.append(self._kept[id(o)])
        return lists

    def _weighed(
        self, rank: int, spans: tuple[tuple[int, int], ...],
        rows: Sequence[tuple[int, int, int, Pair]],
    ) -> Pairs:  # fmt: skip
        p, state, held = self.p, self.p.constant_bytes, []
        working, gathered = max(row[2] for row in rows), 0
        for k, (start, count), row in zip(p.stages_of(rank), spans, rows):
            more = p.extras(k)
            held.append(row[1] + sum(e.activation_bytes for e in more))
            state += int(self.sums[3, start + count] - self.sums[3, start])
            state += sum(e.state_bytes for e in more)
            working = max([working, *(e.working_bytes for e in more)])
            gathered = max([gathered, *p.gathered_bytes[start : start + count],
                            *(e.gathered_bytes for e in more)])  # fmt: skip
        total = state + stash_bytes(p, rank, held) + working + 2 * gathered
        return Pairs(pairs=tuple(r[3] for r in rows), extra_ps=tuple(r[0] for r in rows),
                     bytes=total)  # fmt: skip

    def _filled(
        self, rank: int, spans: tuple[tuple[int, int], ...],
        lists: list[list[tuple[int, int, int, Pair]]],
    ) -> Pairs:  # fmt: skip
        """Recompute where a second saves the most bytes, until the rank fits or nothing is left.

        Along each chunk's lower hull of time added by bytes kept, all chunks' steps merged.
        """
        flight = [max(counts) for counts in zip(*self.p.in_flight(rank))]
        steps = []
        for chunk, options in enumerate(lists):
            hull = _hull(options)
            for place, (a, b) in enumerate(itertools.pairwise(hull)):
                slope = (b[0] - a[0]) / ((a[1] - b[1]) * flight[chunk])
                steps.append((slope, chunk, place, b))
        steps.sort(key=lambda step: step[:3])
        low, high = 0, len(steps)
        rows = [options[0] for options in lists]

        def after(count: int) -> Pairs:
            then = list(rows)
            for _, chunk, _, row in steps[:count]:
                then[chunk] = row
            return self._weighed(rank, spans, then)

        while low < high:
            middle = (low + high) // 2
            if after(middle).bytes <= self.p.capacity_bytes:
                high = middle
            else:
                low = middle + 1
        filled, chunk = after(low), steps[low - 1][1] if low else -1
        then = list(rows)
        for _, at, _, row in steps[:low]:
            then[at] = row
        for row in lists[chunk] if low else ():
            one = self._weighed(rank, spans, [*then[:chunk], row, *then[chunk + 1 :]])
            if row[0] < then[chunk][0] and one.bytes <= self.p.capacity_bytes:
                return one
        return filled

    def least(self, rank: int, stages: Sequence[int]) -> Pairs:
        """Where nothing fits: the pairs that need the fewest bytes, or of many keep the least."""
        starts = starts_of(stages)
        spans = tuple((starts[k], stages[k]) for k in self.p.stages_of(rank))
        lists = self._lists(rank, spans)
        if math.prod(map(len, lists)) > ALL_PAIRS:
            lists = [[min(rows, key=lambda row: (row[1], row[2]))] for rows in lists]
        every = (self._weighed(rank, spans, rows) for rows in itertools.product(*lists))
        return min(every, key=lambda one: one.bytes)

    def spread(self, chosen: Sequence[Pairs]) -> tuple[tuple[Pair, ...], tuple[int, ...]]:
        """Pairs and times added by global stage, from those by rank."""
        at = {k: (one.pairs[c], one.extra_ps[c]) for r, one in enumerate(chosen)
              for c, k in enumerate(self.p.stages_of(r))}  # fmt: skip
        stages = range(self.p.count)
        return tuple(at[k][0] for k in stages), tuple(at[k][1] for k in stages)


def _hull(options: list[tuple[int, int, int, Pair]]) -> list[tuple[int, int, int, Pair]]:
    """Options on the lower hull of time added by bytes kept, the least time first."""
    hull: list[tuple[int, int, int, Pair]] = []
    for row in options:
        if hull and row[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and (row[0] - hull[-2][0]) * (hull[-2][1] - hull[-1][1]) <= (
            hull[-1][0] - hull[-2][0]
        ) * (hull[-2][1] - row[1]):
            hull.pop()
        hull.append(row)
    return hull


def bound_all(p: StageProblem, chunks: Chunks) -> int:
    """No cut has a smaller step: a rank of N layers takes so long at least, and all N sum to L."""
    m, v, ranks = p.microbatches, p.chunks, range(p.pp)
    number = np.arange(v, p.layers + 1)
    each = np.array([p.forward_ps, p.input_grad_ps, p.weight_grad_ps]).sum(axis=0)
    each = each + np.array(sure_extra(p))
    glue = v * (p.rank_glue_forward_ps + p.rank_glue_backward_ps)
    before, costs = 0, []
    for r in ranks:
        more = [e for k in (0, p.count - 1) if p.rank_of(k) == r for e in p.extras(k)]
        fixed = glue + sum(e.forward_ps + e.input_grad_ps + e.weight_grad_ps for e in more)
        cost = m * (fixed + number * int(each.min()) + _sure_recompute(p, r, number, more))
        costs.append(np.maximum.accumulate(np.minimum(cost + before, INF)))
        if r == 0:
            before += p.first.forward_ps
            before += 0 if chunks.split else p.first.input_grad_ps + p.first.weight_grad_ps
        before += p.forward_ps[r] + p.rank_glue_forward_ps + p.p2p_ps
        if not chunks.split:
            before += p.input_grad_ps[r] + p.weight_grad_ps[r]
            before += p.rank_glue_backward_ps + p.p2p_ps
    base = max(int(cost[0]) for cost in costs)
    more_layers = p.layers - p.pp * v
    if more_layers:
        rest = np.sort(np.concatenate([cost[1:] for cost in costs]))
        base = max(base, int(rest[more_layers - 1]))
    return base + mean_tail_ps(p)


def saving_rate(p: StageProblem) -> float | None:
    """The most bytes that a picosecond of recomputation saves; None where that has no bound."""
    none, again = np.array(p.activation_bytes[0]), np.array(p.recompute_ps, dtype=float)
    saved = np.stack([none - np.array(p.activation_bytes[level]) for level in (2, 1)])
    if np.any((saved > 0) & (again <= 0)):
        return None
    return float(np.max(np.where(saved > 0, saved / np.maximum(again, 1.0), 0.0)))


def _sure_recompute(p: StageProblem, rank: int, number: Array, more: list[Any]) -> Array:
    """Recompute time that a rank of so many layers needs at least to fit; INF where none fits."""
    rate = saving_rate(p)
    if rate is None:
        return np.zeros(len(number), dtype=np.int64)
    none = np.array(p.activation_bytes[0])
    fixed = p.constant_bytes + sum(e.state_bytes for e in more) - p.capacity_bytes
    needed = np.zeros(len(number), dtype=np.int64)
    for counts in p.in_flight(rank):
        stash = (sum(counts) + (number - p.chunks) * min(counts)) * int(none.min())
        over = fixed + number * min(p.state_bytes) + stash
        time = np.floor(np.maximum(over, 0) / max(1e-30, rate * max(counts))).astype(np.int64) - 1
        needed = np.maximum(needed, time)
    return needed


def solve_chunks(p: StageProblem, below: int, nodes: int, operations: int) -> Found:
    """The best cut found with several chunks a rank, and a bound on all."""
    chunks = Chunks(p)
    few = math.comb(p.layers - 1, p.count - 1) <= ALL_CUTS
    if p.fixed_stages is not None or few:
        cuts = [p.fixed_stages] if p.fixed_stages is not None else list(_cuts(p.layers, p.count))
        return _every(p, chunks, cuts, below, nodes, operations)
    bound = bound_all(p, chunks)
    if bound >= below:
        return Found(bound_ps=bound)
    return _some(p, chunks, bound, below, operations)


def _cuts(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for places in itertools.combinations(range(1, layers), stages - 1):
        ends = (0, *places, layers)
        yield tuple(b - a for a, b in itertools.pairwise(ends))


def _every(
    p: StageProblem, chunks: Chunks, cuts: list[tuple[int, ...]], below: int, nodes: int,
    operations: int,
) -> Found:  # fmt: skip
    """Weigh all cuts with all their recomputations, least bound first, while effort lasts."""
    rows = []
    for stages in cuts:
        choices = [chunks.pairs(rank, stages) for rank in range(p.pp)]
        if all(choices):
            least = {k: min(one.extra_ps[c] for one in choices[r])
                     for r in range(p.pp) for c, k in enumerate(p.stages_of(r))}  # fmt: skip
            extra = [least[k] for k in range(p.count)]
            rows.append((chunks.bound(stages, extra), stages, choices))
    if not rows:
        return Found(nearest=_nearest(p, chunks, cuts))
    rows.sort(key=lambda row: row[:2])
    found, best, bound = Found(), below, INF
    for floor, stages, choices in rows:
        if floor >= best:
            break
        for chosen in itertools.product(*choices):
            nodes -= 1
            pairs, extra = chunks.spread(chosen)  # type: ignore[assignment]
            if chunks.bound(stages, extra) >= best:
                continue
            operations -= 2 * p.microbatches * p.count
            step = step_ps(p, stages, pairs)
            if step < best:
                best, found = step, Found(stages=stages, recompute=pairs, step_ps=step)
            if nodes < 0 or operations < 0:
                bound = min(bound, floor)
                break
        if bound < INF:
            break
    if not chunks.exact:
        bound = min(bound, bound_all(p, chunks))
    return _with_bound(found, min(bound, best))


def _with_bound(found: Found, bound: int) -> Found:
    return Found(stages=found.stages, recompute=found.recompute, step_ps=found.step_ps,
                 bound_ps=bound)  # fmt: skip


def _nearest(p: StageProblem, chunks: Chunks, cuts: Sequence[tuple[int, ...]]) -> Nearest:
    """Of these cuts, the one whose fullest rank overflows the least."""

    def fullest(stages: tuple[int, ...]) -> int:
        return max(chunks.least(rank, stages).bytes for rank in range(p.pp))

    stages = min(cuts, key=fullest)
    pairs, _ = chunks.spread([chunks.least(rank, stages) for rank in range(p.pp)])
    return Nearest.of(p, stages, pairs)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Candidate:
    """A cut that fits, by its bound."""

    bound_ps: int
    stages: tuple[int, ...]
    pairs: tuple[Pair, ...]


def _candidate(p: StageProblem, chunks: Chunks, stages: tuple[int, ...]) -> Candidate | None:
    choices = [chunks.pairs(rank, stages) for rank in range(p.pp)]
    if not all(choices):
        return None
    chosen = [min(some, key=lambda one: (sum(one.extra_ps), one.extra_ps)) for some in choices]
    pairs, extra = chunks.spread(chosen)
    return Candidate(bound_ps=chunks.bound(stages, extra), stages=stages, pairs=pairs)


def _some(p: StageProblem, chunks: Chunks, bound: int, below: int, operations: int) -> Found:
    """Near-even cuts, balanced; then single layers moved between neighbours while it pays."""
    starts = list(dict.fromkeys(_near_even(p, chunks)))
    pool = sorted(c for c in (_candidate(p, chunks, s) for s in starts) if c is not None)
    if not pool:
        relieved = [_relieved(p, chunks, stages) for stages in starts[:2]]
        pool = sorted(c for c in (_candidate(p, chunks, s) for s in relieved) if c is not None)
        if not pool:
            return Found(nearest=_nearest(p, chunks, [*starts, *relieved]))
    found, best, seen = Found(), below, set(starts)
    while pool and operations > 0:
        one = pool.pop(0)
        if one.bound_ps >= best:
            break
        operations -= 2 * p.microbatches * p.count
        step = step_ps(p, one.stages, one.pairs)
        if step >= best:
            continue
        best = step
        found = Found(stages=one.stages, recompute=one.pairs, step_ps=step)
        if best <= bound:
            break
        near = [s for s in neighbours(one.stages) if s not in seen][:64]
        seen.update(near)
        more = (_candidate(p, chunks, stages) for stages in near)
        pool = sorted([*pool, *(c for c in more if c is not None)])
    return _with_bound(found, min(bound, best))


def _near_even(p: StageProblem, chunks: Chunks) -> Iterator[tuple[int, ...]]:
    """Cuts with stages of nearly one time: rounded, the longer ones first, last, or spread."""
    S, L = p.count, p.layers
    even, more = divmod(L, S)
    times = chunks.times([1] * (S - 1) + [L - S + 1])
    each = np.diff(chunks.sums[:3]).sum(axis=0)
    whole, first = float(times.sum()), sum((p.first.forward_ps, p.first.input_grad_ps,
                                            p.first.weight_grad_ps))  # fmt: skip
    glue = p.rank_glue_forward_ps + p.rank_glue_backward_ps
    ends: list[int] = []
    at = np.cumsum(each) + first
    for k in range(1, S):
        wanted = int(np.searchsorted(at + k * glue - each / 2, whole * k / S))
        ends.append(min(max(wanted, (ends[-1] if ends else 0) + 1), L - S + k))
    rounded = tuple(b - a for a, b in itertools.pairwise((0, *ends, L)))
    spread = tuple((k + 1) * L // S - k * L // S for k in range(S))
    longer_first = tuple(even + (k < more) for k in range(S))
    longer_last = tuple(even + (k >= S - more) for k in range(S))
    inner = tuple(even + (0 < (k + 1) % S <= more) for k in range(S))
    for stages in (rounded, spread, longer_first, longer_last, inner):
        if sum(stages) == L and min(stages) >= 1:
            yield _balanced(p, chunks, stages)
            yield stages


def _balanced(p: StageProblem, chunks: Chunks, stages: tuple[int, ...]) -> tuple[int, ...]:
    """Move layers from the busiest rank to the idlest while the greatest load falls."""

    def loads(cut: Sequence[int]) -> list[int]:
        busy = chunks.times(cut).sum(axis=0)[chunks.profile.stage].sum(axis=1)
        return [int(t) for t in busy]

    def spread_of(cut: Sequence[int]) -> list[int]:
        return sorted(loads(cut), reverse=True)

    now, cut = spread_of(stages), list(stages)
    for _ in range(p.layers):
        at = loads(cut)
        busy, idle = at.index(max(at)), at.index(min(at))
        give = max(p.stages_of(busy), key=lambda k: (cut[k], k))
        take = min(p.stages_of(idle), key=lambda k: (cut[k], k))
        if cut[give] == 1:
            break
        then = list(cut)
        then[give] -= 1
        then[take] += 1
        if spread_of(then) >= now:
            break
        now, cut = spread_of(then), then
    return tuple(cut)


def _relieved(p: StageProblem, chunks: Chunks, stages: tuple[int, ...]) -> tuple[int, ...]:
    """Move layers from the fullest rank to the emptiest while the fullest rank shrinks."""

    least: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}

    def bytes_of(cut: Sequence[int]) -> list[int]:
        starts, found = starts_of(cut), []
        for rank in range(p.pp):
            key = rank, tuple((starts[k], cut[k]) for k in p.stages_of(rank))
            if key not in least:
                least[key] = chunks.least(rank, cut).bytes
            found.append(least[key])
        return found

    cut, now = tuple(stages), bytes_of(stages)
    for _ in range(p.layers):
        full, free = now.index(max(now)), now.index(min(now))
        trials = []
        for give in p.stages_of(full):
            for take in p.stages_of(free):
                if cut[give] > 1 and give != take:
                    then = list(cut)
                    then[give] -= 1
                    then[take] += 1
                    trials.append((bytes_of(then), tuple(then)))
        best = min(trials, key=lambda t: (max(t[0]), t[1]), default=None)
        if best is None or max(best[0]) >= max(now):
            break
        now, cut = best
        if max(now) <= p.capacity_bytes:
            break
    return cut
