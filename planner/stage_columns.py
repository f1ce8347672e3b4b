"""A bound of stage programs by columns: of each rank one of its patterns is chosen, in fractions.

Memory is in the patterns (`stage_patterns`), in whole numbers, which is why the bound of their
linear program (`stage_master`) is far sharper than one whose layers are fractions. At any prices
the program's least objective is at least their dual function (Lagrange): that is the bound, and by
it patterns go that no choice below the time has. What is left is parted by what a rank's stage
takes, below its mean or above, the largest variance first; the least bound is parted next.
A tree is kept, and goes on where it was left.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cost_models.stage_problem import StageProblem
from planner.stage_arcs import Array
from planner.stage_master import Mask, Master
from planner.stage_paths import Known
from planner.stage_patterns import Patterns
from planner.stage_planes import ENDLESS, Answer, Effort, rounded

TOLERANCE = 1e-6  # of the linear solver, relative to the step
BEYOND = 2.0  # times the time asked about: of what no choice has
WHOLE, PARTED = 60, 12  # linear programs before what is left is parted, at first and then
RANK = 8  # times that what a rank takes counts more than what one of its stages does
REFUTED = 1 + TOLERANCE  # times the time that is asked about


class Tree:
    """What is left of a program below a time, parted as far as effort lasted; asked again, it goes
    on from there.

    below_ps: patterns are all that a step below it may have. least: no choice takes less, as a
    share of that. cuts: of choices that no path takes beyond it; whole: the least that any of them
    takes. guess: whole layers near to what it came to last. failed: its prices are not exact
    enough to go on."""

    def __init__(self, p: StageProblem, below_ps: int, patterns: Patterns, known: Known) -> None:
        self.p, self.below_ps, self.patterns, self.known = p, below_ps, patterns, known
        self.whole, self.cuts = BEYOND, list[tuple[int, ...]]()
        self.guess: tuple[int, ...] = ()
        self.failed = False
        # (bound, the patterns allowed); none where a rank has none
        self.left: list[tuple[float, Mask]] = []
        self.most, self.deeper, self.top_ps = WHOLE, False, below_ps
        if all(np.diff(patterns.begins)):
            self.master = Master(p, below_ps, known, patterns)
            self.left.append((0.0, self.master.allowed))

    @property
    def top(self) -> float:
        """What takes such a share is refuted."""
        return self.top_ps / self.below_ps * REFUTED

    @property
    def least(self) -> float:
        return min([BEYOND, self.whole, *(bound for bound, _ in self.left)])

    def answer(self, below_ps: int, top_ps: int, effort: Effort) -> Answer:
        """As `stage_planes.refute`. top_ps: what takes so long is not asked about from now on; no
        more than it was. effort: linear programs and nodes of the tree."""
        self.top_ps = top_ps
        target = below_ps / self.below_ps * REFUTED
        self._part(target, effort)
        least = min(top_ps, math.floor(self.least * self.below_ps))
        refuted = self.least >= target
        return Answer(
            refuted=refuted, least_ps=max(least, below_ps if refuted else 0),
            cuts=self.cuts or ([self.guess] if self.guess else []),
            held_ps=math.floor(self.whole * self.below_ps) if self.cuts else ENDLESS,
        )  # fmt: skip

    def _part(self, target: float, effort: Effort) -> None:
        """Until no choice takes less than that, as far as effort lasts."""
        if not self.left:
            return
        while self.left and effort.nodes > 0 and effort.programs > 0:
            # on with what was parted last; else with the least bound, which is that of all
            least = min(range(len(self.left)), key=lambda i: self.left[i][0])
            if not self.deeper and self.left[least][0] >= min(target, self.whole):
                break
            effort.nodes -= 1
            bound, allowed = self.left.pop(-1 if self.deeper else least)
            m = self.master
            m.effort = effort
            m.allow(allowed)
            self.deeper, sides = False, None
            for programs in (self.most, effort.programs):  # what cannot be parted is gone on with
                found, ended = self._bound(programs)
                bound = max(bound, found)
                if bound >= self.top or not ended:
                    break
                sides = self._parted()
                if sides is not None:
                    break
            if bound >= self.top:
                self.most = PARTED
                continue
            if not ended:
                self.failed = effort.programs > 0  # else it is spent
                self.left.append((bound, m.allowed.copy()))
                break
            self.most = PARTED
            self.guess = rounded(m.stages_of_shares().sum(axis=1).tolist(), self.p.layers)
            if sides is None:
                self._is_whole(bound, effort)
                continue
            self.deeper = True
            mine, high = sides
            for side in (high, ~high):  # first what is below the mean, which takes less
                allowed = m.allowed.copy()
                allowed[mine[~side]] = False
                self.left.append((bound, allowed))
        self.known.used(set(self.master.paths))

    def _is_whole(self, bound: float, effort: Effort) -> None:
        """Mostly a choice, and none that is left here takes less. Patterns of loads alone are asked
        about again with all ways to recompute them; all others are left."""
        m, rest = self.master, self.master.allowed.copy()
        here = [part.start + np.flatnonzero(m.shares[part] > TOLERANCE) for part in m.ranks]
        patterns = None if self.patterns.spread is None else self.patterns.apart(here)
        if patterns is None:
            self.cuts.append(self.guess)
            self.whole = min(self.whole, bound)
            return
        for part, mine in zip(m.ranks, here):
            others = rest.copy()
            others[mine] = False
            if others[part].any():
                self.left.append((bound, others))
            rest[part] = False
            rest[mine] = m.allowed[mine]
        inner = Tree(self.p, self.below_ps, patterns, self.known)
        inner.top_ps = self.top_ps
        inner._part(self.top, effort)
        self.cuts += inner.cuts
        self.whole = min(self.whole, inner.whole)
        bound = max(bound, inner.least)
        if bound < inner.whole and inner.failed:
            self.whole = min(self.whole, bound)
        elif bound < inner.whole:
            self.left.append((bound, rest))

    def _bound(self, most: int) -> tuple[float, bool]:
        """(no choice of the patterns allowed takes less, whether the program ended below the time):
        with nothing that breaks it, or after so many linear programs, as parting raises more than
        to go on."""
        m, least, by = self.master, 0.0, "DUAL"
        while m.effort.programs > 0 and m.solved(by):
            most -= 1
            lowest = np.array([m.reduced[part].min() for part in m.ranks])
            if np.isinf(lowest).any():  # a rank has no pattern left
                return BEYOND, False
            lower = np.minimum(lowest, 0.0)
            dual = m.objective + float(lower.sum())
            least = max(least, dual)
            if least >= self.top:
                return least, False
            # a choice that has this pattern takes at least so much
            gone = m.allowed & (dual + m.reduced - lower[m.rank] > self.top + TOLERANCE)
            m.forbid(gone)
            by = "DUAL"
            if m.priced_in():
                by = "PRIMAL"
            elif m.missing:  # not all layers are on what is allowed: prices say so, if exact
                if not gone.any():
                    break
            elif not m.broken() or most <= 0:
                return least, True
        return least, False

    def _parted(self) -> tuple[NDArray[np.int64], Mask] | None:
        """A rank's patterns, and which of them are above the mean of what they are parted by; None
        where each rank has one."""
        best, found = TOLERANCE**2, None
        m = self.master
        for part in m.ranks:
            share = m.shares[part]
            if (share > TOLERANCE).sum() < 2:
                continue
            # its times, its compute, which counts more, and what it recomputes beside
            times: Array = m.times[part]
            compute = times.sum(axis=1, keepdims=True)
            values = np.concatenate([times, RANK * compute, m.needs[part, :1]], axis=1)
            mean = share @ values / share.sum()
            spread = share @ (values - mean) ** 2
            at = int(spread.argmax())
            if spread[at] > best:
                best = float(spread[at])
                found = np.arange(part.start, part.stop), values[:, at] > mean[at]
        return found
