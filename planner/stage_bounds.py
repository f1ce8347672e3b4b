"""Bounds on the step: of one arc (a stage with its first layer and its number of layers), of the
whole problem, and by propagation over all arcs.

With one stage a rank, a cut of the chain is a path of arcs. A path down the pipeline that stays on
stage s runs m micro-batches of s, the way to s and back, and, where waiting for the stages behind
takes longer than what s has to do meanwhile, that difference: this bounds the makespan from below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cost_models.schedule import SPLIT_BACKWARD, V_SHAPED
from planner.stage_problem import Pair, StageProblem, allowed_pairs, pinned_pair

INF = 1 << 60
Array = Any  # of int64, or of bool


def sure_extra(p: StageProblem) -> tuple[int, ...]:
    """Recompute time of each layer that no choice avoids."""
    pin, (full, selective) = p.fixed_recompute, p.recompute_ps
    if pin == "none" or (pin is None and "none" in p.levels):
        return (0,) * p.layers
    if pin is None:
        kept = [t for t, level in ((full, "full"), (selective, "selective")) if level in p.levels]
        return tuple(map(min, zip(*kept)))
    level, count = (pin, -1) if isinstance(pin, str) else (pin[0], pin[1])
    if isinstance(level, str) and isinstance(count, int) and count < 0 and level != "none":
        return full if level == "full" else selective
    return (0,) * p.layers


def mean_tail_ps(p: StageProblem) -> int:
    """The longest tail of a rank is at least the mean one."""
    ends = (p.first, p.last)
    comm = sum(p.tail_comm_ps) - sum(p.tail_hide_ps)
    comm += sum(e.tail_comm_ps - e.tail_hide_ps for e in ends)
    own = sum(p.tail_own_ps) + sum(e.tail_own_ps for e in ends)
    return -(-(max(0, comm) + own) // p.pp)


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


def lower_bound_ps(problem: StageProblem) -> int:
    """The step is at least this, whatever is chosen. Cheap: for screening, without recompute.

    1F1B, m > p, busiest stage M, all stages T: the path through the busiest stage s takes
    (m - 1) M + T less what is behind s beyond the idle time it causes, and what is before s is
    s M at most, which leaves (m - 1 - p) M + 2 T. Where m = p that needs a stage other than the
    first, so it is 2 T - M for the first stage's M, which itself takes T + (m - 1) M / 2.
    """
    p = problem
    m, load, ends = p.microbatches, load_ps(p), (p.first, p.last)
    forward = sum(p.forward_ps) + p.count * p.rank_glue_forward_ps
    forward += sum(e.forward_ps for e in ends)
    back = sum(p.input_grad_ps) + sum(sure_extra(p)) + p.count * p.rank_glue_backward_ps
    back += sum(e.input_grad_ps for e in ends)
    weight = sum(p.weight_grad_ps) + sum(e.weight_grad_ps for e in ends)
    crossings = p.count - 1 - (p.schedule in V_SHAPED)
    once = forward + back + 2 * p.p2p_ps * crossings
    whole = forward + back + weight
    fused = p.schedule not in SPLIT_BACKWARD
    makespan = max(m * load, once + weight * fused)
    if p.schedule == "gpipe":
        makespan = once + weight + (m - 1) * load
    elif p.schedule == "1f1b" and m > p.pp:
        makespan = max(makespan, (m - 1 - p.pp) * load + 2 * whole)
    elif p.schedule == "1f1b":
        makespan = max(makespan, 2 * whole * m // (m + 1))
    return makespan + mean_tail_ps(p)


def surely_infeasible(problem: StageProblem) -> bool:
    """True where no choice can fit, by count: each rank takes so many of the least layer."""
    p = problem
    act, work = min(map(min, p.activation_bytes)), min(map(min, p.working_bytes))
    state, gathered = min(p.state_bytes), min(p.gathered_bytes)
    room = 0
    for rank in range(p.pp):
        ends = [e for k, e in ((0, p.first), (p.count - 1, p.last)) if p.rank_of(k) == rank]
        flight = p.in_flight(rank)[0][0] if p.chunks == 1 else 1
        left = p.capacity_bytes - p.constant_bytes
        left -= max([work, *(e.working_bytes for e in ends)])
        left -= 2 * max([gathered, *(e.gathered_bytes for e in ends)])
        left -= sum(e.state_bytes + flight * e.activation_bytes for e in ends)
        if left < p.chunks * (state + flight * act):
            return True
        room += left // (state + flight * act) if state + act else p.layers
    return room < p.layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run of layers may recompute, by pair: the time added, bytes kept and bytes used."""

    pairs: tuple[Pair, ...]
    extra_ps: Array
    act_bytes: Array
    work_bytes: Array


class Windows:
    """Options of runs of layers; runs that are alike share one entry."""

    def __init__(self, problem: StageProblem) -> None:
        p = self.problem = problem
        rows = list(zip(*p.recompute_ps, *p.activation_bytes, *p.working_bytes))
        names: dict[tuple[int, ...], int] = {}
        self._class = tuple(names.setdefault(row, len(names)) for row in rows)
        self._rows = np.array(rows, dtype=np.int64).T
        self._found: dict[tuple[tuple[int, ...], Pair | None], Options] = {}

    def options(self, stage: int, start: int, count: int) -> Options:
        pin = pinned_pair(self.problem, stage, count)
        key = self._class[start : start + count], pin
        if key not in self._found:
            pairs = allowed_pairs(self.problem, stage, count)
            self._found[key] = _options(self._rows[:, start : start + count], pairs)
        return self._found[key]


    def grouped(self, arcs: Array) -> Iterator[tuple[Options, Array, Array, Array]]:
        """The arcs marked, [stage, first layer, layers - 1], as indices by what their options are.
        """
        groups: dict[int, tuple[Options, list[tuple[int, int, int]]]] = {}
        for s, i, n in np.argwhere(arcs).tolist():
            o = self.options(s, i, n + 1)
            groups.setdefault(id(o), (o, []))[1].append((s, i, n))
        for o, places in groups.values():
            step = max(1, 1_000_000 // len(o.pairs))  # cells at once, to bound memory
            for at in range(0, len(places), step):
                s, i, n = np.array(places[at : at + step]).T
                yield o, s, i, n


def _options(rows: Array, pairs: tuple[Pair, ...]) -> Options:
    """rows: [recompute full, selective, activation none, selective, full, working likewise]."""
    n = rows.shape[1]
    full = np.array([f for f, _ in pairs])
    end = full + np.array([s for _, s in pairs])
    total = np.zeros((5, n + 1), dtype=np.int64)
    np.cumsum(rows[:5], axis=1, out=total[:, 1:])
    head, middle, tail = _most(rows[5:], bool(np.any(end > full)))
    return Options(
        pairs=pairs,
        extra_ps=total[0, full] + total[1, end] - total[1, full],
        act_bytes=total[4, full] + total[3, end] - total[3, full] + total[2, n] - total[2, end],
        work_bytes=np.maximum(np.maximum(head[full], tail[end]), middle[full, end]),
    )


def _most(rows: Array, selective: bool) -> tuple[Array, Array, Array]:
    """The most of a run's first layers at full, of a range at selective, of its last at none."""
    n = rows.shape[1]
    head = np.concatenate(([0], np.maximum.accumulate(rows[2])))
    tail = np.concatenate((np.maximum.accumulate(rows[0][::-1])[::-1], [0]))
    middle = np.zeros((n + 1, n + 1), dtype=np.int64)
    if selective:
        wide = np.triu(np.broadcast_to(rows[1], (n, n)))
        middle[:n, 1:] = np.maximum.accumulate(wide, axis=1)
    return head, middle, tail


@dataclass(frozen=True, slots=True, kw_only=True)
class Arcs:
    """All arcs, [stage, first layer, layers - 1]: times per micro-batch, INF where none fits.

    least_bytes: the rank needs so many at least; INF where the arc cannot be.
    pick: index into the allowed pairs, the least extra time that fits.
    """

    forward: Array
    backward: Array
    weight: Array
    extra: Array
    tail: Array
    least_bytes: Array
    pick: Array
    prefix: Array  # [3, stage, first layer] forward, backward, weight of all before, no extra
    suffix: Array  # the same of all behind, by the layer behind


def _prefix(values: tuple[int, ...]) -> Array:
    return np.concatenate(([0], np.cumsum(np.array(values, dtype=np.int64))))


def make_arcs(problem: StageProblem, windows: Windows, most: int, priced: bool = True) -> Arcs:
    """Arcs of at most so many layers, for one stage a rank. Memory decides the recomputation.

    priced: False leaves out what recomputation takes, where only least_bytes is of interest.
    """
    p, S, L = problem, problem.count, problem.layers
    start = np.arange(L)[:, None]
    end = start + np.arange(1, most + 1)[None, :]
    inside = np.minimum(end, L)
    stage = np.arange(S)[:, None, None]
    exists = (end <= L) & (start >= stage) & (end <= L - (S - 1 - stage))
    exists &= (start <= stage * most) & (L - end <= (S - 1 - stage) * most)
    exists &= ((start == 0) | (stage > 0)) & ((end == L) | (stage < S - 1))
    if p.fixed_stages is not None:
        cuts = np.concatenate(([0], np.cumsum(p.fixed_stages)))
        exists &= (start == cuts[:-1, None, None]) & (end == cuts[1:, None, None])

    def summed(values: tuple[int, ...], name: str, glue: int = 0) -> Array:
        sums = _prefix(values)
        table = np.broadcast_to(sums[inside] - sums[start] + glue, (S, L, most)).copy()
        table[0] += getattr(p.first, name)
        table[-1] += getattr(p.last, name)
        return table

    forward = summed(p.forward_ps, "forward_ps", p.rank_glue_forward_ps)
    backward = summed(p.input_grad_ps, "input_grad_ps", p.rank_glue_backward_ps)
    weight = summed(p.weight_grad_ps, "weight_grad_ps")
    comm = summed(p.tail_comm_ps, "tail_comm_ps") - summed(p.tail_hide_ps, "tail_hide_ps")
    tail = np.maximum(comm, 0) + summed(p.tail_own_ps, "tail_own_ps")
    fixed = summed(p.state_bytes, "state_bytes", p.constant_bytes)
    extra, least, pick = _recompute(problem, windows if priced else None, exists, fixed)
    prefix, suffix = _around(problem)
    return Arcs(
        forward=forward, backward=backward, weight=weight, extra=extra, tail=tail,
        least_bytes=least, pick=pick, prefix=prefix, suffix=suffix,
    )  # fmt: skip


def _around(p: StageProblem) -> tuple[Array, Array]:
    """Times of what lies before and behind a stage, [kind, stage, layer], without recompute."""
    S, L = p.count, p.layers
    stage = np.arange(S)[:, None]
    before, behind = np.zeros((2, 3, S, L + 1), dtype=np.int64)
    kinds = (
        (p.forward_ps, "forward_ps", p.rank_glue_forward_ps),
        (p.input_grad_ps, "input_grad_ps", p.rank_glue_backward_ps),
        (p.weight_grad_ps, "weight_grad_ps", 0),
    )
    for kind, (values, name, glue) in enumerate(kinds):
        sums = _prefix(values)
        before[kind] = sums + stage * glue + (stage > 0) * getattr(p.first, name)
        behind[kind] = sums[-1] - sums + (S - 1 - stage) * glue
        behind[kind] += (stage < S - 1) * getattr(p.last, name)
    return before, behind


def _recompute(
    p: StageProblem, windows: Windows | None, exists: Array, fixed: Array
) -> tuple[Array, Array, Array]:
    """Per arc: the least time added that fits, the least bytes it can need, and the pair.

    An arc that fits without recomputation, or never, is told by sums; the others by their options.
    """
    extra = np.full(exists.shape, INF, dtype=np.int64)
    pick = np.zeros(exists.shape, dtype=np.int64)
    column = np.arange(p.count)[:, None, None]
    flight = np.array([p.in_flight(r)[0][0] for r in range(p.count)])
    more = [p.extras(s) for s in range(p.count)]
    act0 = np.array([sum(e.activation_bytes for e in es) for es in more])
    work0 = np.array([max((e.working_bytes for e in es), default=0) for es in more])
    gather0 = np.array([max((e.gathered_bytes for e in es), default=0) for es in more])
    most = exists.shape[2]
    gathered = np.maximum(_running_most(p.gathered_bytes, most), gather0[column])
    fixed = fixed + 2 * gathered + (flight * act0)[:, None, None]

    def needed(act: tuple[int, ...], work: tuple[int, ...]) -> Array:
        sums = _prefix(act)
        end = np.minimum(np.arange(p.layers)[:, None] + np.arange(1, most + 1), p.layers)
        held = flight[column] * (sums[end] - sums[:-1, None])
        return fixed + held + np.maximum(_running_most(work, most), work0[column])

    least = needed(tuple(map(min, zip(*p.activation_bytes))),
                   tuple(map(min, zip(*p.working_bytes))))  # fmt: skip
    rest = exists & (least <= p.capacity_bytes)
    if p.fixed_recompute is None and "none" in p.levels:
        free = exists & (needed(p.activation_bytes[0], p.working_bytes[0]) <= p.capacity_bytes)
        extra[free] = 0
        rest &= ~free
    for o, s, i, n in windows.grouped(rest) if windows is not None else ():
        memory = flight[s][:, None] * o.act_bytes + fixed[s, i, n][:, None]
        memory += np.maximum(o.work_bytes, work0[s][:, None])
        time = np.where(memory <= p.capacity_bytes, o.extra_ps, INF)
        best = time.argmin(axis=1)
        pick[s, i, n] = best
        extra[s, i, n] = time[np.arange(len(s)), best]
    return extra, np.where(exists, least, INF), pick


def _running_most(values: tuple[int, ...], most: int) -> Array:
    """[first layer, layers - 1]: the most of a run of layers; past the end, of the last layers."""
    at = np.minimum(np.arange(len(values))[:, None] + np.arange(most), len(values) - 1)
    return np.maximum.accumulate(np.array(values, dtype=np.int64)[at], axis=1)


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
