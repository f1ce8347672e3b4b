"""Stages, several chunks a rank: the search over cuts.

Few cuts: all of them, least bound first. Many: near-even cuts with the ranks' loads balanced, then
single layers moved between neighbours, against a bound on every cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cost_models.schedule import SPLIT_BACKWARD
from cost_models.stage_problem import (
    Found,
    Nearest,
    Pair,
    StageProblem,
    Steps,
    moved,
    neighbours,
    shifted,
)
from planner.stage_arcs import INF, Array
from planner.stage_bounds import least_tail_ps
from planner.stage_chunks import Chunks, Pairs
from planner.stage_memory import sure_extra

ALL_CUTS = 1000  # so many cuts are all looked at
PROMISING = 8  # a cut is bettered if its step is within one part in so many of the best


def bound_all(p: StageProblem) -> int:
    """No cut has a smaller step: a rank of N layers takes so long at least, and all N sum to L."""
    m, v, ranks = p.microbatches, p.chunks, range(p.pp)
    split = p.schedule in SPLIT_BACKWARD
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
            before += 0 if split else p.first.input_grad_ps + p.first.weight_grad_ps
        before += p.forward_ps[r] + p.rank_glue_forward_ps + p.p2p_ps
        if not split:
            before += p.input_grad_ps[r] + p.weight_grad_ps[r]
            before += p.rank_glue_backward_ps + p.p2p_ps
    base = max(int(cost[0]) for cost in costs)
    more_layers = p.layers - p.pp * v
    if more_layers:
        rest = np.sort(np.concatenate([cost[1:] for cost in costs]))
        base = max(base, int(rest[more_layers - 1]))
    return base + least_tail_ps(p)


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
    if not rate:  # nothing is known of it, or no recomputation saves a byte
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
    bound = bound_all(p)
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
        choices = chunks.choices(stages)
        if all(choices):
            least = {k: min(one.extra_ps[c] for one in choices[r])
                     for r in range(p.pp) for c, k in enumerate(p.stages_of(r))}  # fmt: skip
            extra = [least[k] for k in range(p.count)]
            rows.append((chunks.bound(stages, extra), stages, choices))
    if not rows:
        return Found(nearest=_nearest(p, chunks, cuts))
    rows.sort(key=lambda row: row[:2])
    found, best, bound, steps = Found(), below, INF, Steps(p)
    for floor, stages, choices in rows:
        if floor >= best:
            break
        for chosen in itertools.product(*choices):
            nodes -= 1
            pairs, extra = chunks.spread(chosen)  # type: ignore[assignment]
            if chunks.bound(stages, extra) >= best:
                continue
            operations -= 2 * p.microbatches * p.count
            step = steps.step_ps(stages, pairs)
            if step < best:
                best, found = step, Found(stages=stages, recompute=pairs, step_ps=step)
            if nodes < 0 or operations < 0:
                bound = min(bound, floor)
                break
        if bound < INF:
            break
    if not chunks.exact:
        bound = min(bound, bound_all(p))
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


def _candidates(
    p: StageProblem, chunks: Chunks, cuts: Sequence[tuple[int, ...]], below: int = INF
) -> list[Candidate]:
    """Of these cuts those that fit and whose bounds are below that, the least bound first. Most are
    ruled out by what they are bounded by without recomputation, all at once."""
    if not cuts:
        return []
    rows = np.array(cuts)
    able = np.flatnonzero(chunks.bounds(rows, np.zeros(1, dtype=np.int64)) < below).tolist()
    places, spread = [], []
    for i in able:
        choices = chunks.choices(cuts[i])
        if all(choices):
            places.append(i)
            spread.append(chunks.spread([_quickest(some) for some in choices]))
    if not places:
        return []
    bounds = chunks.bounds(rows[places], np.array([extra for _, extra in spread])).tolist()
    return sorted(
        Candidate(bound_ps=bound, stages=cuts[i], pairs=pairs)
        for i, bound, (pairs, _) in zip(places, bounds, spread) if bound < below
    )  # fmt: skip


def _quickest(some: Sequence[Pairs]) -> Pairs:
    if len(some) == 1:
        return some[0]
    return min(some, key=lambda one: (sum(one.extra_ps), one.extra_ps))


def search_near(
    p: StageProblem, cuts: Sequence[tuple[int, ...]], below: int, operations: int
) -> Found:
    """The best step found from these cuts on and from near-even ones, a layer moved from any stage
    to any other while it pays, if it is not far from `below`; it proves nothing of the others."""
    chunks, found, steps = Chunks(p), Found(step_ps=INF), Steps(p)
    given = dict.fromkeys([*cuts, *_near_even(p, chunks)])
    seen, simulated = set(given), 2 * p.microbatches * p.count
    for here in _candidates(p, chunks, [*given]):
        least = steps.step_ps(here.stages, here.pairs)
        while least < below + below // PROMISING:
            below = min(below, least)
            if least < found.step_ps:
                found = Found(stages=here.stages, recompute=here.pairs, step_ps=least)
            more = [cut for cut in moved(here.stages) if cut not in seen]
            operations -= simulated + len(more) * p.count
            if operations <= 0:
                return found
            seen.update(more)
            after = here
            for one in _candidates(p, chunks, more, least):
                if one.bound_ps >= least or operations <= 0:
                    break
                operations -= simulated
                step = steps.step_ps(one.stages, one.pairs)
                if step < least:
                    least, after = step, one
            if after is here:
                break
            here = after
    return found


def _some(p: StageProblem, chunks: Chunks, bound: int, below: int, operations: int) -> Found:
    """Near-even cuts, balanced; then single layers moved between neighbours while it pays.

    That nothing fits is found by moving layers off the fullest rank; it is not proved.
    """
    starts = list(dict.fromkeys(_near_even(p, chunks)))
    pool = _candidates(p, chunks, starts)
    if not pool:
        relieved = [_relieved(p, chunks, stages) for stages in starts[:2]]
        pool = _candidates(p, chunks, relieved)
        if not pool:
            return Found(nearest=_nearest(p, chunks, [*starts, *relieved]))
    found, best, seen, steps = Found(), below, set(starts), Steps(p)
    while pool and operations > 0:
        one = pool.pop(0)
        if one.bound_ps >= best:
            break
        operations -= 2 * p.microbatches * p.count
        step = steps.step_ps(one.stages, one.pairs)
        if step >= best:
            continue
        best = step
        found = Found(stages=one.stages, recompute=one.pairs, step_ps=step)
        if best <= bound:
            break
        near = [s for s in neighbours(one.stages) if s not in seen][:64]
        seen.update(near)
        pool = sorted([*pool, *_candidates(p, chunks, near, best)])
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

    now, cut = spread_of(stages), stages
    for _ in range(p.layers):
        at = loads(cut)
        busy, idle = at.index(max(at)), at.index(min(at))
        give = max(p.stages_of(busy), key=lambda k: (cut[k], k))
        take = min(p.stages_of(idle), key=lambda k: (cut[k], k))
        if cut[give] == 1:
            break
        then = shifted(cut, give, take)
        if spread_of(then) >= now:
            break
        now, cut = spread_of(then), then
    return cut


def _relieved(p: StageProblem, chunks: Chunks, stages: tuple[int, ...]) -> tuple[int, ...]:
    """Move layers from the fullest rank to the emptiest while the fullest rank shrinks."""
    cut, now = tuple(stages), chunks.least_bytes(stages)
    for _ in range(p.layers):
        full, free = now.index(max(now)), now.index(min(now))
        trials = []
        for give in p.stages_of(full):
            for take in p.stages_of(free):
                if cut[give] > 1 and give != take:
                    then = shifted(cut, give, take)
                    trials.append((chunks.least_bytes(then), then))
        best = min(trials, key=lambda t: (max(t[0]), t[1]), default=None)
        if best is None or max(best[0]) >= max(now):
            break
        now, cut = best
        if max(now) <= p.capacity_bytes:
            break
    return cut
