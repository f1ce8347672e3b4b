"""Stages, one a rank: all arcs (a stage with its first layer and its number of layers), priced.

Of each arc the times, and the least recompute time by which its rank fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cost_models.stage_problem import Pair, StageProblem, allowed_pairs, pinned_pair

INF = 1 << 60
Array = Any  # of int64, or of bool


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
