"""Bounds on the step: of one arc (a stage with its first layer and its number of layers), of the
whole problem, and by propagation over all arcs.

With one stage a rank, a cut of the chain is a path of arcs. A path down the pipeline that stays on
stage s runs m micro-batches of s, the way to s and back, and, where waiting for the stages behind
takes longer than what s has to do meanwhile, that difference: this bounds the makespan from below.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cost_models.schedule import SPLIT_BACKWARD, V_SHAPED
from cost_models.stage_problem import StageProblem, slow_of
from planner.stage_arcs import INF, Arcs, Array
from planner.stage_memory import easiest, forced_ps, sure_extra
from planner.stage_sides import least_spread_ps


def least_tail_ps(p: StageProblem) -> int:
    """The longest tail of a rank is at least the mean one; and of so many layers that each add so
    much to a tail, some rank has one in pp, rounded up."""
    ends, low = (p.first, p.last), easiest(p).tail_own_ps
    over = tuple(map(operator.sub, p.tail_comm_ps, p.tail_hide_ps))
    more = [e.tail_comm_ps - e.tail_hide_ps for e in ends]
    own = sum(low) + sum(e.tail_own_ps for e in ends)
    mean: int = -(-(max(0, sum(over) + sum(more)) + own) // p.pp)
    adds = Counter(low if min(*over, *more) < 0 else map(operator.add, low, over))  # else: hidden
    found, count = mean, 0
    for each, n in sorted(adds.items(), reverse=True):
        count += n
        found = max(found, -(-count // p.pp) * each)
    return found


def load_ps(p: StageProblem) -> int:
    """Compute of the busiest rank per micro-batch, at least: by the mean, by count, by layer."""
    each = list(map(sum, zip(p.forward_ps, p.input_grad_ps, p.weight_grad_ps, sure_extra(p))))
    glue = p.chunks * (p.rank_glue_forward_ps + p.rank_glue_backward_ps)
    more = dict.fromkeys(range(p.pp), glue)
    for rank, e in ((p.rank_of(0), p.first), (p.rank_of(p.count - 1), p.last)):
        more[rank] += e.forward_ps + e.input_grad_ps + e.weight_grad_ps
    least = min(each)
    mean = -(-(sum(each) + sum(more.values())) // p.pp)
    load = max(mean, max(each) + glue, max(more.values()) + p.chunks * least)
    if not least:
        return load
    levels = sorted(set(more.values()))
    while sum((load - fixed) // least for fixed in more.values()) < p.layers:
        load = min(load + least - (load - fixed) % least for fixed in levels)
    return load


def filled_ps(p: StageProblem, whole: int) -> int:
    """The makespan of an interleaved schedule is at least this; whole: a micro-batch through all.

    In rounds of p micro-batches, rank r runs p micro-batches of each chunk before c before the
    first of chunk c, which comes through all stages before: it has idled X = (forwards of the
    stages before it) - p (forwards of its own chunks before c) by then, and as much of backward
    behind the last of chunk c. So T >= m t_r + X + Y for every r and c. In the mean over ranks and
    chunks the chunks before c cancel, which leaves, t_j being the time of rank j,
    T >= m whole / p + sum_j (p - 1 - j) t_j / (p v). No t_j is beyond T / m: that sum is least
    where the last ranks have T / m each. Sends from the first stage to stage k and back are waited
    for as well, in the mean of all stages.
    """
    slow = itertools.accumulate((more for more, _ in slow_of(p)), initial=0)
    sends = p.p2p_ps * (p.count - 1) + 2 * sum(slow) // p.count
    return _filled_ps(p.pp, p.microbatches, p.chunks, whole, sends)


@functools.lru_cache(maxsize=4096)
def _filled_ps(pp: int, m: int, v: int, whole: int, sends: int) -> int:
    low, high = m * whole // pp, 2 * m * whole + sends
    while low < high:
        middle = (low + high) // 2
        most = max(1, middle // m)
        full = min(pp - 1, whole // most)
        least = most * (full * (full - 1) // 2) + max(0, whole - full * most) * full
        if middle >= m * whole // pp + sends + least // (pp * v):
            high = middle
        else:
            low = middle + 1
    return max(0, low - 2 * m)


def last_ps(p: StageProblem, there: int, whole: int) -> int:
    """The makespan is at least this where backward is not split. there: a micro-batch on its way
    there and back, sends and all; whole: what stages run of it.

    All m micro-batches pass the last stage one behind the other, after the first came there and
    before the last goes home: T >= there + (m - 1) x for the time x of that stage, which has a
    layer at least. Interleaved in rounds of p, its rank runs p of each of its other chunks
    meanwhile, as `filled_ps` says, and m - p more of all: T >= there + (p - 1) x + (m - p) t, for
    the time t of that rank; and T >= m (whole - t) / (p - 1), as one has the mean of the others.
    """
    m, pp, e = p.microbatches, p.pp, p.last
    each = map(sum, zip(p.forward_ps, p.input_grad_ps, p.weight_grad_ps, sure_extra(p)))
    last = min(each) + e.forward_ps + e.input_grad_ps + e.weight_grad_ps
    least = there + (m - 1) * last
    if p.schedule != "interleaved" or m % pp:
        return least
    first = there + (pp - 1) * last
    of_last = max(0, m * whole - (pp - 1) * first) // ((m - pp) * (pp - 1) + m)
    return max(least, first + (m - pp) * of_last)


def lower_bound_ps(problem: StageProblem) -> int:
    """The step is at least this, whatever is chosen. Cheap: for screening.

    1F1B, m > p, busiest stage M, all stages T: the path through the busiest stage s takes
    (m - 1) M + T less what is behind s beyond the idle time it causes, and what is before s is
    s M at most, which leaves (m - 1 - p) M + 2 T. Where m = p that needs a stage other than the
    first, so it is 2 T - M for the first stage's M, which itself takes T + (m - 1) M / 2.
    Recomputation that memory forces is part of T, and its mean over ranks of M.
    """
    p = problem
    m, load, ends = p.microbatches, load_ps(p), (p.first, p.last)
    again = forced_ps(p) or 0  # where nothing fits, surely_infeasible says so
    forward = sum(p.forward_ps) + p.count * p.rank_glue_forward_ps
    forward += sum(e.forward_ps for e in ends)
    back = sum(p.input_grad_ps) + sum(sure_extra(p)) + p.count * p.rank_glue_backward_ps
    back += sum(e.input_grad_ps for e in ends) + again
    weight = sum(p.weight_grad_ps) + sum(e.weight_grad_ps for e in ends)
    crossings = p.count - 1 - (p.schedule in V_SHAPED)
    slow = slow_of(p)
    once = forward + back + 2 * (p.p2p_ps * crossings + sum(more for more, _ in slow))
    whole = forward + back + weight
    load = max(load, whole // p.pp)
    fused = p.schedule not in SPLIT_BACKWARD
    makespan = max([m * load, once + weight * fused, *(m * busy for _, busy in slow)])
    if fused:
        makespan = max(makespan, last_ps(p, once + weight, whole))
    if p.schedule == "gpipe":
        makespan = once + weight + (m - 1) * load
    elif p.schedule == "1f1b" and m > p.pp:
        makespan = max(makespan, (m - 1 - p.pp) * load + 2 * whole)
    elif p.schedule == "1f1b":
        makespan = max(makespan, 2 * whole * m // (m + 1))
    elif p.schedule == "interleaved" and m % p.pp == 0:
        makespan = max(makespan, filled_ps(p, whole))
    if p.ranks:
        makespan = max(makespan, least_spread_ps(p, again, sure_extra))
    return makespan + least_tail_ps(p)


def bound_lowered_ps(p: StageProblem) -> int:
    """As `lower_bound_ps`, of choices that lower a layer at least: the longest tail has it."""
    assert p.lowered is not None
    free = easiest(p)  # whose layers are lowered for nothing
    longer = min(p.lowered.tail_own_ps) - least_tail_ps(free)
    return max(lower_bound_ps(p), lower_bound_ps(free) + max(0, longer))


Times = tuple[Array, Array, Array]  # forward, backward, weight


def path_bound(
    p: StageProblem, stage: Array, times: Times, before: Times, behind: Times,
    peaks: tuple[int, int],
) -> Array:  # fmt: skip
    """Makespan at least: of stages with one stage a rank, elementwise.

    times, before, behind: (forward, backward, weight) of the stage, of all before and behind it,
    recomputation included. peaks: the most forward and backward + weight of any stage.
    """
    m, S = p.microbatches, p.count
    f, b, w = times
    t = f + b + w
    if p.schedule == "gpipe":
        whole = t + sum(before) + sum(behind) + 2 * p.p2p_ps * (S - 1)
        return whole + (m - 1) * (np.maximum(f, peaks[0]) + np.maximum(b + w, peaks[1]))
    split = p.schedule == "zbh1"
    ahead = S - 1 - stage
    round_trip = behind[0] + behind[1] + (0 if split else behind[2]) + 2 * p.p2p_ps * ahead
    back = b + w
    first = np.maximum(0, round_trip - ahead * f)
    last = np.maximum(0, round_trip - ahead * back)
    rounds = (m - 1) // (ahead + 1)
    idle = np.where(rounds > 0, first + last, np.maximum(first, 0 if split else last))
    idle = idle + np.maximum(0, rounds - 1) * np.maximum(0, round_trip - ahead * t)
    there = before[0] + p.p2p_ps * stage
    if not split:
        return there + before[1] + before[2] + p.p2p_ps * stage + m * t + idle
    lag = np.minimum(stage, m - 1) + 1
    home = before[1] + p.p2p_ps * stage - lag * w
    return there + m * t + idle + np.maximum(0, home)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Arcs that are left, [stage, first layer, layers - 1], each with a bound of any cut through
    it, and per stage and layer the least bound of what may follow."""

    bound: Array
    togo: Array
    alive: bool


class Chain:
    """Least sums and least maxima along paths of arcs."""

    def __init__(self, stages: int, layers: int, most: int) -> None:
        self.stages, self.layers, self.most = stages, layers, most
        number = np.arange(most)
        self.rows = np.arange(layers + 1)[:, None] - number[None, :] - 1
        self.outside = self.rows < 0
        self.rows = np.maximum(self.rows, 0)
        self.columns = np.broadcast_to(number, self.rows.shape)
        self.ends = np.minimum(np.arange(layers)[:, None] + number[None, :] + 1, layers)

    def before(self, values: Array, join: Callable[[Array, Array], Array]) -> Array:
        """[stage, layer]: the least way to begin this stage at this layer; INF if none."""
        by_end = values[:, self.rows, self.columns]
        by_end[:, self.outside] = INF
        least = np.full((self.stages + 1, self.layers + 1), INF, dtype=np.int64)
        least[0, 0] = 0
        for s in range(self.stages):
            found = join(least[s][self.rows], by_end[s]).min(axis=1)
            least[s + 1] = np.minimum(found, INF)
        return least

    def behind(self, values: Array, join: Callable[[Array, Array], Array]) -> Array:
        """[stage, layer]: the least way to end the chain where this stage begins here."""
        least = np.full((self.stages + 1, self.layers + 1), INF, dtype=np.int64)
        least[self.stages, self.layers] = 0
        for s in range(self.stages - 1, -1, -1):
            found = join(least[s + 1][self.ends], values[s]).min(axis=1)
            least[s, : self.layers] = np.minimum(found, INF)
        return least

    def at_end(self, table: Array) -> Array:
        """[stage, layer] -> [stage, first layer, layers - 1]: the table at each arc's end."""
        return table[:, self.ends]

    def narrowest(self, values: Array) -> int:
        """The least possible maximum along a path."""
        return int(self.behind(values, np.maximum)[0, 0])


Band = tuple[int, int]  # the longest tail of a cut is in here, ends included
ANY_TAIL = (0, INF)


def propagate(
    p: StageProblem, arcs: Arcs, chain: Chain, below: int, band: Band = ANY_TAIL
) -> Grid:
    """Drop every arc that no cut with a step below `below` can use, until nothing more drops.

    band: of cuts whose longest tail lies in it.
    """
    alive = (arcs.extra < INF) & (arcs.tail <= band[1])
    extra = np.where(alive, arcs.extra, INF)
    again = bool(np.any(alive & (extra > 0)))
    left = int(alive.sum())
    while True:
        bound, reach = _arc_bounds(p, arcs, chain, extra, band[0])
        alive &= reach & (bound < below)
        bound = np.where(alive, bound, INF)
        before, togo = chain.before(bound, np.maximum), chain.behind(bound, np.maximum)
        through = np.maximum(before[:-1, : p.layers, None], chain.at_end(togo[1:]))
        alive &= through < INF
        now = int(alive.sum())
        if now in (0, left) or not again:
            return Grid(bound=np.where(alive, bound, INF), togo=togo, alive=now > 0)
        extra = np.where(alive, arcs.extra, INF)
        left = now


def _arc_bounds(
    p: StageProblem, arcs: Arcs, chain: Chain, extra: Array, tail_ps: int
) -> tuple[Array, Array]:
    """Of each arc: the step is at least this, and whether a cut through it is left at all.

    extra: INF where the arc is dropped; what is added before and behind an arc is the least left.
    tail_ps: the longest tail is known to be so long.
    """
    L, alive = p.layers, extra < INF
    added = np.where(alive, extra, 0)
    pre = chain.before(extra, np.add)[:-1, :L, None]
    suf = chain.at_end(chain.behind(extra, np.add)[1:])
    reach = alive & (pre < INF) & (suf < INF)
    backward = arcs.backward + added
    slowest = [chain.narrowest(np.where(reach, a, INF))
               for a in (arcs.forward, backward + arcs.weight, arcs.tail)]  # fmt: skip
    if max(slowest) >= INF:
        return extra, reach
    base = [a[:, :L, None] for a in arcs.prefix]
    rest = [chain.at_end(a) for a in arcs.suffix]
    makespan = path_bound(
        p, np.arange(p.count)[:, None, None], (arcs.forward, backward, arcs.weight),
        (base[0], base[1] + np.where(pre < INF, pre, 0), base[2]),
        (rest[0], rest[1] + np.where(suf < INF, suf, 0), rest[2]),
        (slowest[0], slowest[1]),
    )  # fmt: skip
    return makespan + np.maximum(arcs.tail, max(slowest[2], tail_ps)), reach
