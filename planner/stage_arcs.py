"""Stages, one a rank: all arcs (a stage with its first layer and its number of layers), priced.

Of each arc the times, and the least recompute time by which its rank fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cost_models.stage_problem import Pair, PairPin, StageProblem, allowed_pairs, pin_of

INF = 1 << 60
Array = Any  # of int64, or of bool
Rows = tuple[tuple[int, ...], ...]  # by level, of every layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run of layers may recompute, by pair: the time added, bytes kept and bytes used; and
    of every room below, [room, pair], bytes laid there."""

    pairs: tuple[Pair, ...]
    extra_ps: Array
    act_bytes: Array
    work_bytes: Array
    aside_bytes: Array


class Windows:
    """Options of runs of layers; runs that are alike share one entry."""

    def __init__(self, problem: StageProblem) -> None:
        p = self.problem = problem
        asides = [row for room in p.rooms for row in room.aside_bytes]
        rows = list(zip(*p.recompute_ps, *p.activation_bytes, *p.working_bytes, *asides))
        names: dict[tuple[int, ...], int] = {}
        self._class = tuple(names.setdefault(row, len(names)) for row in rows)
        self._rows = np.array(rows, dtype=np.int64).T
        self._found: dict[tuple[tuple[int, ...], PairPin], Options] = {}
        self._sides: tuple[Windows, ...] = ()  # of each rank, where they are not alike
        if p.ranks:
            self._sides = tuple(w for q, n in p.sides for w in (Windows(q),) * n)

    def options(self, stage: int, start: int, count: int) -> Options:
        if self._sides:
            return self._sides[stage].options(stage, start, count)
        key = self._class[start : start + count], pin_of(self.problem, stage)
        if key not in self._found:
            pairs = allowed_pairs(self.problem, stage, count)
            self._found[key] = options_of(self._rows[:, start : start + count], pairs)
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


def options_of(rows: Array, pairs: tuple[Pair, ...]) -> Options:
    """rows: [recompute full, selective, activation none, selective, full, working likewise, and
    so what lies in each room below]."""
    n = rows.shape[1]
    full = np.array([f for f, _ in pairs])
    end = full + np.array([s for _, s in pairs])
    total = np.zeros((5, n + 1), dtype=np.int64)
    np.cumsum(rows[:5], axis=1, out=total[:, 1:])
    head, middle, tail = _most(rows[5:8], bool(np.any(end > full)))
    aside = np.zeros((len(rows) - 8, n + 1), dtype=np.int64)
    np.cumsum(rows[8:], axis=1, out=aside[:, 1:])
    none, some, whole = aside[0::3], aside[1::3], aside[2::3]
    return Options(
        pairs=pairs,
        extra_ps=total[0, full] + total[1, end] - total[1, full],
        act_bytes=total[4, full] + total[3, end] - total[3, full] + total[2, n] - total[2, end],
        work_bytes=np.maximum(np.maximum(head[full], tail[end]), middle[full, end]),
        aside_bytes=whole[:, full] + some[:, end] - some[:, full] + none[:, n:] - none[:, end],
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

    least_bytes: the rank needs so many at least, with what its capacity is below the most of any;
    INF where the arc cannot be.
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


def upto(values: tuple[int, ...]) -> Array:
    return np.concatenate(([0], np.cumsum(np.array(values, dtype=np.int64))))


# whether pairs of some arcs leave room below: (options, stage, first layer, layers - 1, bytes at
# the peak as [arc, pair]) to [arc, pair]
Allowed = Callable[[Options, Array, Array, Array, Array], Array]


def make_arcs(
    problem: StageProblem, windows: Windows, most: int, priced: bool = True,
    spare: Array | int = 0, allowed: Allowed | None = None,
) -> Arcs:  # fmt: skip
    """Arcs of at most so many layers, for one stage a rank. Memory decides the recomputation.

    priced: False leaves out what recomputation takes, where only least_bytes is of interest.
    spare: bytes of each arc's state that lie elsewhere. allowed: of a problem with rooms below and
    layers lowered.
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

    def summed(name: str, glue: str = "") -> Array:
        """Of each arc the sum of its layers', by what its rank has of them, and its extras'."""
        table, at = np.empty((S, L, most), dtype=np.int64), 0
        for q, count in p.sides:
            sums = upto(getattr(q, name))
            beside = getattr(q, glue) if glue else 0
            table[at : at + count] = sums[inside] - sums[start] + beside
            at += count
        table[0] += getattr(p.at(0).first, name)
        table[-1] += getattr(p.at(S - 1).last, name)
        return table

    forward = summed("forward_ps", "rank_glue_forward_ps")
    backward = summed("input_grad_ps", "rank_glue_backward_ps")
    weight = summed("weight_grad_ps")
    comm = summed("tail_comm_ps") - summed("tail_hide_ps")
    tail = np.maximum(comm, 0) + summed("tail_own_ps")
    fixed = summed("state_bytes", "constant_bytes") - spare
    if p.rooms and p.lowered is None:
        allowed = _leaves_room(p)
    extra, least, pick = _recompute(problem, windows if priced else None, exists, fixed, allowed)
    prefix, suffix = _around(problem)
    return Arcs(
        forward=forward, backward=backward, weight=weight, extra=extra, tail=tail,
        least_bytes=least, pick=pick, prefix=prefix, suffix=suffix,
    )  # fmt: skip


def _around(p: StageProblem) -> tuple[Array, Array]:
    """Times of what lies before and behind a stage, [kind, stage, layer], without recompute: the
    least that they can be, where ranks are not alike."""
    kinds = (
        ("forward_ps", "rank_glue_forward_ps"), ("input_grad_ps", "rank_glue_backward_ps"),
        ("weight_grad_ps", ""),
    )  # fmt: skip
    turned = [(_turned(q), n) for q, n in p.sides[::-1]]
    before = np.array([_before(p.sides, name, glue) for name, glue in kinds])
    behind = np.array([_before(turned, name, glue) for name, glue in kinds])[:, ::-1, ::-1]
    for kind, (name, _) in enumerate(kinds):
        before[kind, 1:] += getattr(p.at(0).first, name)
        behind[kind, :-1] += getattr(p.at(p.count - 1).last, name)
    return before, behind


def _turned(q: StageProblem) -> StageProblem:
    """The problem from its last layer to its first, as far as times go."""
    return replace(
        q, forward_ps=q.forward_ps[::-1], input_grad_ps=q.input_grad_ps[::-1],
        weight_grad_ps=q.weight_grad_ps[::-1],
    )  # fmt: skip


def _before(sides: Sequence[tuple[StageProblem, int]], name: str, glue: str) -> Array:
    """[stage, layers before it]: their least time; 0 where there is no way to have so many."""
    L = sides[0][0].layers
    ends = np.where(np.arange(L + 1) == 0, 0, INF)  # by layers on the sides before
    rows = []
    for q, count in sides:
        sums, each = upto(getattr(q, name)), getattr(q, glue) if glue else 0
        least = np.minimum.accumulate(ends - sums)
        for k in range(count + 1):
            row = ends
            if k:
                row = np.full(L + 1, INF)
                row[k:] = np.minimum(least[: L + 1 - k] + sums[k:] + k * each, INF)
            if k < count:
                rows.append(np.where(row < INF // 2, row, 0))
        ends = np.where(row < INF // 2, row, INF)
    return np.array(rows)


def _leaves_room(p: StageProblem) -> Allowed:
    """Of layers that lay what they lay, whatever is recomputed."""
    flight = np.array([p.in_flight(r)[0][0] for r in range(p.count)])

    def allowed(o: Options, s: Array, i: Array, n: Array, _: Array) -> Array:
        fits = np.ones((len(s), len(o.pairs)), dtype=bool)
        for room, aside in zip(p.rooms, o.aside_bytes):
            sums = upto(room.state_bytes)
            laid = sums[i + n + 1] - sums[i]
            laid += room.beside_bytes(s, p.count)
            most = np.array([room.of_rank(r) for r in range(p.count)])[s]
            fits &= laid[:, None] + flight[s][:, None] * aside <= most[:, None]
        return fits

    return allowed


def _recompute(
    p: StageProblem, windows: Windows | None, exists: Array, fixed: Array, allowed: Allowed | None
) -> tuple[Array, Array, Array]:
    """Per arc: the least time added that fits, the least bytes it can need, and the pair.

    An arc that fits without recomputation, or never, is told by sums; the others by their options.
    """
    extra = np.full(exists.shape, INF, dtype=np.int64)
    pick = np.zeros(exists.shape, dtype=np.int64)
    column = np.arange(p.count)[:, None, None]
    beyond = np.array([p.capacity_bytes - p.at(s).capacity_bytes for s in range(p.count)])
    flight = np.array([p.in_flight(r)[0][0] for r in range(p.count)])
    more = [p.at(s).extras(s) for s in range(p.count)]
    act0 = np.array([sum(e.activation_bytes for e in es) for es in more])
    work0 = np.array([max((e.working_bytes for e in es), default=0) for es in more])
    gather0 = np.array([max((e.gathered_bytes for e in es), default=0) for es in more])
    most = exists.shape[2]
    wide = [(_running_most(q.gathered_bytes, most), n) for q, n in p.sides]
    fixed = fixed + 2 * np.maximum(_by_stage(wide), gather0[column])
    fixed += (flight * act0 + beyond)[:, None, None]

    def needed(of: Callable[[Rows], tuple[int, ...]]) -> Array:
        end = np.minimum(np.arange(p.layers)[:, None] + np.arange(1, most + 1), p.layers)
        sums = [(upto(of(q.activation_bytes)), n) for q, n in p.sides]
        used = [(_running_most(of(q.working_bytes), most), n) for q, n in p.sides]
        held = flight[column] * _by_stage([(s[end] - s[:-1, None], n) for s, n in sums])
        return fixed + held + np.maximum(_by_stage(used), work0[column])

    least = needed(lambda rows: tuple(map(min, zip(*rows))))
    rest = exists & (least <= p.capacity_bytes)
    if p.fixed_recompute is None and "none" in p.levels and allowed is None:
        free = exists & (needed(lambda rows: rows[0]) <= p.capacity_bytes)
        extra[free] = 0
        rest &= ~free
    for o, s, i, n in windows.grouped(rest) if windows is not None else ():
        memory = flight[s][:, None] * o.act_bytes + fixed[s, i, n][:, None]
        memory += np.maximum(o.work_bytes, work0[s][:, None])
        fits = memory <= p.capacity_bytes
        if allowed is not None:
            fits &= allowed(o, s, i, n, memory)
        time = np.where(fits, o.extra_ps, INF)
        best = time.argmin(axis=1)
        pick[s, i, n] = best
        extra[s, i, n] = time[np.arange(len(s)), best]
    return extra, np.where(exists, least, INF), pick


def _running_most(values: tuple[int, ...], most: int) -> Array:
    """[first layer, layers - 1]: the most of a run of layers; past the end, of the last layers."""
    at = np.minimum(np.arange(len(values))[:, None] + np.arange(most), len(values) - 1)
    return np.maximum.accumulate(np.array(values, dtype=np.int64)[at], axis=1)


def _by_stage(tables: Sequence[tuple[Array, int]]) -> Array:
    """[stage, ...] of the tables of the kinds of ranks, in a row; one for all where it is one."""
    if len(tables) == 1:
        return tables[0][0]
    return np.concatenate([np.broadcast_to(t, (n, *t.shape)) for t, n in tables])
