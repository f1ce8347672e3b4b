"""A bound of stage programs by columns: of each rank one of its patterns is chosen, in fractions.

Memory is in the patterns (`stage_patterns`), in whole numbers, which is why the bound of their
linear program (`stage_master`) is far sharper than one whose layers are fractions. At any prices
the program's least objective is at least their dual function (Lagrange): that is the bound, and by
it patterns go that no choice below the time has. What is left is parted by what a rank's stage
takes, below its mean or above, the largest variance first; the least bound is parted next.
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
WHOLE, PARTED = 60, 8  # linear programs before what is left is parted, at first and then
RANK = 8  # times that what a rank takes counts more than what one of its stages does
REFUTED = 1 + TOLERANCE  # times the time that is asked about


def refute_by_columns(
    p: StageProblem, below_ps: int, patterns: Patterns, known: Known, effort: Effort
) -> Answer:
    """As `stage_planes.refute`, of a kind of program that it bounds.

    patterns: those with which a step may be below that, at least. effort: linear programs and nodes
    of the tree.
    """
    patterns = patterns.below(below_ps * REFUTED)
    if not all(np.diff(patterns.begins)):  # a rank has none
        return Answer(refuted=True, least_ps=below_ps, cuts=[])
    tree = _Tree(Master(p, below_ps, known, patterns, effort), effort)
    refuted = tree.empty()
    known.used(set(tree.master.paths))
    least, whole = (min(below_ps, math.floor(x * below_ps)) for x in (tree.least, tree.whole))
    return Answer(
        refuted=refuted, least_ps=below_ps if refuted else least,
        cuts=tree.cuts or ([tree.guess] if tree.guess else []),
        held_ps=whole if tree.cuts else ENDLESS,
    )  # fmt: skip


class _Tree:
    """least: no choice takes less, as a share of the time that is asked about. cuts: of choices
    that no path takes beyond it; whole: the least that any of them takes. guess: whole layers near
    to what it came to last."""

    def __init__(self, master: Master, effort: Effort) -> None:
        self.master, self.effort = master, effort
        self.least, self.whole, self.cuts = 0.0, 1.0, list[tuple[int, ...]]()
        self.guess: tuple[int, ...] = ()
        times = master.times
        # what a rank's patterns are parted by: its times, and its compute, which counts more
        self.features = np.concatenate([times, RANK * times.sum(axis=1, keepdims=True)], axis=1)

    def empty(self) -> bool:
        """Whether no choice takes less than the time, as far as effort lasts."""
        left = [(0.0, self.master.allowed)]  # (bound, the patterns allowed)
        most, deeper = WHOLE, False
        while left and self.effort.nodes > 0 and self.effort.programs > 0:
            self.effort.nodes -= 1
            # on with what was parted last; else with the least bound, which is that of all
            at = len(left) - 1 if deeper else min(range(len(left)), key=lambda i: left[i][0])
            bound, allowed = left.pop(at)
            self.master.allow(allowed)
            deeper, sides = False, None
            for programs in (most, self.effort.programs):  # what cannot be parted is gone on with
                found, ended = self._bound(programs)
                bound = max(bound, found)
                if bound >= REFUTED or not ended:
                    break
                sides = self._parted()
                if sides is not None:
                    break
            most = PARTED
            if bound >= REFUTED:
                continue
            if not ended:  # effort is spent
                left.append((bound, allowed))
                break
            p = self.master.p
            self.guess = rounded(self.master.stages_of_shares().sum(axis=1).tolist(), p.layers)
            if sides is None:  # whole: mostly a choice, and none that is left here takes less
                self.cuts.append(self.guess)
                self.whole = min(self.whole, bound)
                continue
            deeper = True
            mine, high = sides
            for side in (high, ~high):  # first what is below the mean, which takes less
                allowed = self.master.allowed.copy()
                allowed[mine[~side]] = False
                left.append((bound, allowed))
        self.least = min([self.whole, *(bound for bound, _ in left)])
        return not left and not self.cuts

    def _bound(self, most: int) -> tuple[float, bool]:
        """(no choice of the patterns allowed takes less, whether the program ended below the time):
        with nothing that breaks it, or after so many linear programs, as parting raises more than
        to go on."""
        m, least, by = self.master, 0.0, "DUAL"
        while self.effort.programs > 0 and m.solved(by):
            most -= 1
            lowest = np.array([m.reduced[part].min() for part in m.ranks])
            if np.isinf(lowest).any():  # a rank has no pattern left
                return 2.0, False
            lower = np.minimum(lowest, 0.0)
            dual = m.objective + float(lower.sum())
            least = max(least, dual)
            if least >= REFUTED:
                return least, False
            # a choice that has this pattern takes at least so much
            gone = m.allowed & (dual + m.reduced - lower[m.rank] > REFUTED + TOLERANCE)
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
        for part in self.master.ranks:
            share = self.master.shares[part]
            if (share > TOLERANCE).sum() < 2:
                continue
            values: Array = self.features[part]
            mean = share @ values / share.sum()
            spread = share @ (values - mean) ** 2
            at = int(spread.argmax())
            if spread[at] > best:
                best = float(spread[at])
                found = np.arange(part.start, part.stop), values[:, at] > mean[at]
        return found
