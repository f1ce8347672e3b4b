"""Stage programs that were refuted, and what they say of others.

A makespan is the longest of sums of times, a tail the larger of two sums: both grow with every
time, and by a factor with all of them. So where no choice of one program has a step below T, none
of another of the same schedule has one below c T, if it takes c times as long at least in every
number and no choice fits it that does not fit the first. What was refuted without a limit to memory
says so of every program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.stage_problem import LEVELS, Extra, StageProblem
from planner.stage_bounds import lower_bound_ps
from planner.stage_paths import Shape, shape_of

Ints = NDArray[np.int64]
UNLIMITED = 1 << 62  # bytes of a GPU where memory is in nobody's way
NONE_SO_LARGE = 1 << 60  # picoseconds, bytes
ROUNDING = 1e-9  # of a quotient of times, relative


def unlimited(problem: StageProblem) -> StageProblem:
    """Without a limit to memory nothing is recomputed, but what is pinned."""
    levels = ("none",) if problem.fixed_recompute is None else problem.levels
    return replace(problem, capacity_bytes=UNLIMITED, levels=levels, rooms=())


def comparable(p: StageProblem) -> bool:
    """Whether a program is compared: nothing of it pinned, ranks and layers alike."""
    return p.fixed_stages is None and p.fixed_recompute is None and not (p.ranks or p.lowered)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A refuted program: its times in ps and bytes, the levels of recomputation that it allows,
    and the step that no choice is below; levels, sizes: None where memory has no limit."""

    times: Ints
    sizes: Ints | None
    levels: frozenset[str] | None
    below_ps: int


@dataclass(slots=True)
class Refuted:
    """What one search refuted, by shape: schedule, ranks, micro-batches, virtual stages."""

    rows: dict[Shape, list[_Row]] = field(default_factory=dict)
    stuck: dict[Shape, float] = field(default_factory=dict)

    def failed(self, p: StageProblem, below_ps: int) -> None:
        """A program without a limit to memory was not refuted at this step."""
        near = lower_bound_ps(p) / below_ps
        self.stuck[shape_of(p)] = max(near, self.stuck.get(shape_of(p), 0.0))

    def promising(self, p: StageProblem, below_ps: int) -> bool:
        """Whether to ask that of this program: its bound is nearer to the step than that of any
        that was asked in vain."""
        return lower_bound_ps(p) / below_ps > self.stuck.get(shape_of(p), 0.0)

    def add(self, p: StageProblem, below_ps: int) -> None:
        """No choice has a step below this: that says something of others, if it is not by a tier
        below that is too full."""
        if not comparable(p) or p.rooms:
            return
        free = p.capacity_bytes >= UNLIMITED
        self.rows.setdefault(shape_of(p), []).append(_Row(
            times=_times(p), sizes=None if free else _sizes(p),
            levels=None if free else frozenset(p.levels), below_ps=below_ps,
        ))  # fmt: skip

    def covers(self, p: StageProblem, below_ps: int) -> bool:
        """Whether what is known says that no choice has a step below this."""
        rows = self.rows.get(shape_of(p), []) if comparable(p) else []
        if not rows:
            return False
        times, levels, sizes = _times(p), frozenset(p.levels), None
        for row in reversed(rows):
            if len(row.times) != len(times) or not _slower(times, row, below_ps):
                continue
            if row.sizes is None or row.levels is None:
                return True
            sizes = _sizes(p) if sizes is None else sizes
            if levels <= row.levels and bool(np.all(sizes >= row.sizes)):
                return True
        return False


def _slower(times: Ints, row: _Row, below_ps: int) -> bool:
    """Whether these times, by the least of their quotients, take a step beyond `below_ps`."""
    if below_ps <= row.below_ps:
        return bool(np.all(times >= row.times))
    some = row.times > 0
    if not np.all(times[~some] >= row.times[~some]):
        return False
    least = float(np.min(times[some] / row.times[some], initial=np.inf))
    return least * (1 - ROUNDING) * row.below_ps >= below_ps


def _times(p: StageProblem) -> Ints:
    """Every number that a step grows with; of tails both sums."""
    comm = np.subtract(p.tail_comm_ps, p.tail_hide_ps)
    own = np.array(p.tail_own_ps, dtype=np.int64)
    ends = [(*_spent(e), e.tail_own_ps, e.tail_own_ps + e.tail_comm_ps - e.tail_hide_ps)
            for e in (p.first, p.last)]  # fmt: skip
    again = _allowed(p, p.recompute_ps, ("full", "selective"))
    if p.capacity_bytes >= UNLIMITED:
        again = [(0,) * p.layers] * 2
    return np.concatenate([
        p.forward_ps, p.input_grad_ps, p.weight_grad_ps, *again, own, own + comm, *ends,
        (p.rank_glue_forward_ps, p.rank_glue_backward_ps, p.p2p_ps),
        *(p.slow_sends or ((0, 0),) * p.pp),
    ]).astype(np.int64)  # fmt: skip


def _allowed(
    p: StageProblem, rows: Sequence[tuple[int, ...]], levels: Sequence[str]
) -> list[tuple[int, ...]]:
    """The rows of these levels, more than any where a level is not of the program."""
    return [row if level in p.levels else (NONE_SO_LARGE,) * p.layers
            for row, level in zip(rows, levels)]  # fmt: skip


def _spent(e: Extra) -> tuple[int, int, int]:
    return e.forward_ps, e.input_grad_ps, e.weight_grad_ps


def _sizes(p: StageProblem) -> Ints:
    """Every number that a rank's bytes at the peak grow with, and what it lacks."""
    ends = [(e.activation_bytes, e.working_bytes, e.state_bytes, e.gathered_bytes)
            for e in (p.first, p.last)]  # fmt: skip
    return np.concatenate([
        *_allowed(p, p.activation_bytes, LEVELS), *_allowed(p, p.working_bytes, LEVELS),
        p.state_bytes, p.gathered_bytes, *ends, (p.constant_bytes, -p.capacity_bytes),
    ]).astype(np.int64)  # fmt: skip
