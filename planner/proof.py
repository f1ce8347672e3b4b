"""What a search does last: raise the least bounds that are left, which are the gap.

Which stage programs are asked about next, and of which effort (`proving` answers); by CP-SAT one
whose ranks are not alike or of which something is pinned, and one with one stage a rank that is
raised no further.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cost_models.decisions import Decisions
from planner.outcome import Unsettled
from planner.proving import (
    EFFORTS,
    GOAL,
    HARD,
    WIDE,
    Ask,
    Prover,
    Told,
    bounded,
    easiest_of,
    far_below,
)
from planner.refuted import Refuted
from planner.score import AXIS_GAIN_PPM, axes_used, objective_below
from planner.stage_memory import freely_lowered
from planner.stage_planes import ENDLESS, applies
from planner.stage_ranks import usable
from planner.stages import StageSolution, certify, near, solve

CERTIFIED = 3  # finalists that CP-SAT bounds at most, about a second each
PROGRAMS = 14_400  # linear programs at most, some ms each, or as much in whole numbers
BEYOND = 12_200  # of them, that are kept for bounds that are further from the best than the goal
PATIENT = 65_600  # beside, that are spent on those where the search is patient
AHEAD = 4  # programs with the least bounds, of which those come first that took least until now


def joined(left: Sequence[Unsettled]) -> list[Unsettled]:
    """Programs that differ only in what layers keep in part as one of which each choice takes and
    holds no more than in any: what is refuted of that is refuted of all, and mostly what they keep
    is not what decides."""
    groups: dict[Decisions, list[Unsettled]] = {}
    for one in left:
        groups.setdefault(replace(one.decisions, keep=()), []).append(one)
    found: list[Unsettled] = []
    for group in groups.values():
        least = min(group, key=lambda u: (u.bound, u.order))
        rows = list(map(asked_as, group))
        problem = easiest_of([u.problem for u in rows])
        if len(group) == 1 or problem is None or not applies(problem):
            found += rows
        else:
            found.append(replace(least, problem=problem, members=tuple(group)))
    return found


def asked_as(one: Unsettled) -> Unsettled:
    """A program whose layers may be lowered is asked about as if they were for nothing."""
    p = one.problem
    return one if p.lowered is None else replace(one, problem=freely_lowered(p), members=(one,))


def alone() -> Callable[[Sequence[Ask]], Sequence[Told]]:
    """Answers here, one after the other."""
    prover = Prover()
    return lambda asks: list(map(prover.told, asks))


@dataclass(slots=True, kw_only=True)
class Proof:
    """best: the score of the best plan. untried: the least bound of what is not in `left`.
    found: is told of a better plan, and returns the score that is the best then. answers: to what
    is asked at once."""

    best: int
    untried: int
    left: list[Unsettled]
    found: Callable[[Unsettled, StageSolution], int]
    gain_ppm: int = AXIS_GAIN_PPM
    stopped: Callable[[], bool] = lambda: False  # Ctrl-C: the bounds so far are what is proved
    report: Callable[[int], None] = lambda bound: None  # is told of the least bound as it rises
    programs: int = PROGRAMS
    kept: int = BEYOND  # of them, for bounds that are further from the best than the goal
    certified: int = 0
    answers: Callable[[Sequence[Ask]], Sequence[Told]] = field(default_factory=alone)
    # by order: `asked`, `high_ps` and `looked`, as an ask has them
    asked: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    sides: dict[int, int] = field(default_factory=dict)  # by order: that was asked with more effort

    def run(self) -> list[Unsettled]:
        """Least bound first, some at once, while that raises the whole; returns what is left.
        Before that the best plan is made better, which all others are held against."""
        own = next((u for u in reversed(self.left) if u.stages), None)
        if own is not None and applies(own.problem):
            limit = self._limit(own)
            least = min((u.bound_ps for u in self.left), default=limit)
            anneal = limit - least > WIDE * limit // GOAL
            self._take(own, near(own.problem, [own.stages], incumbent_ps=limit, anneal=anneal))
        if self.stopped():
            return self.left
        self.left = joined(self._undominated())
        while self.left and not self.stopped():
            in_order = sorted(self.left, key=lambda u: (u.bound, u.order))
            weakest = in_order[0]
            self.report(min(weakest.bound, self.untried))
            if weakest.bound >= min(self.untried, self.best):
                break
            if bounded(weakest.problem) and not self._is_stuck(weakest):
                self._raise(self._next(in_order))
            elif easy := self._easy(in_order):
                self._raise(self._next(easy))
            elif weakest.problem.chunks > 1 or not self._by_solver(weakest):
                break
        return [one for u in self.left for one in self._apart(u)]

    def _undominated(self) -> list[Unsettled]:
        """Those of which not every choice that is better than the best is one of another's."""
        kept, met = [], defaultdict[int, Refuted](Refuted)
        left = [
            replace(u, problem=usable(u.problem, self._limit(u))) if applies(u.problem) else u
            for u in self.left
        ]
        for one in sorted(left, key=lambda u: (u.bound, -len(u.problem.levels), u.order)):
            others = met[axes_used(one.decisions)]
            if applies(one.problem) and others.covers(one.problem, 1):
                continue
            others.add(one.problem, 1)
            kept.append(one)
        return kept

    def _next(self, in_order: Sequence[Unsettled]) -> Sequence[Unsettled]:
        """Those that are asked about next: of the least bounds all that took the least until now,
        as most are easily raised; of the hardest two, each beside another that is."""
        limit, far = min(self.untried, self.best), self._far(in_order[0])
        rows = [
            (self._asked(u)[0], u) for u in in_order[:AHEAD]
            if u.bound < limit and bounded(u.problem) and self._far(u) == far
        ]  # fmt: skip
        least = min(hard for hard, _ in rows)
        some = [u for hard, u in rows if hard == least]
        if least < HARD:
            return some
        first, *others = some
        apart = [u for u in others if self.sides.get(u.order) != self.sides.get(first.order)]
        return [first, *(apart or others)[:1]]

    def _easy(self, in_order: Sequence[Unsettled]) -> Sequence[Unsettled]:
        """Behind one that has a pin and too many patterns, those that take little: the bound of all
        stays, but a better plan may be among them, for which a patient search looks."""
        if self.kept <= BEYOND or applies(in_order[0].problem):
            return []
        limit = min(self.untried, self.best)
        return [
            u for u in in_order
            if u.bound < limit and bounded(u.problem) and self._asked(u)[0] < HARD
        ]  # fmt: skip

    def _far(self, one: Unsettled) -> bool:
        """Whether its bound is further from the best than the goal."""
        return far_below(one.bound_ps, self._limit(one))

    def _apart(self, one: Unsettled) -> Sequence[Unsettled]:
        """The members of what was joined, each with the bound of all if that is more."""
        if not one.members:
            return [one]
        return [
            u if u.bound_ps >= one.bound_ps else u.raised(one.bound_ps, self.gain_ppm)
            for u in one.members
        ]

    def _by_solver(self, one: Unsettled) -> bool:
        """Raise a bound by CP-SAT; False where that cannot be."""
        if self.certified >= CERTIFIED:
            return False
        self.certified += 1
        known = solve(one.problem)
        if known.status not in ("OPTIMAL", "FEASIBLE"):
            return False
        proved = max(known.bound_ps, certify(one.problem, incumbent_ps=known.step_ps))
        self._put(one, [one.raised(max(one.bound_ps, proved), self.gain_ppm)])
        return True

    def _put(self, old: Unsettled, new: Sequence[Unsettled]) -> None:
        self.left = [u for u in self.left if u is not old] + [*new]

    def _limit(self, one: Unsettled) -> int:
        """The least objective of it that is no better than the best plan."""
        return objective_below(self.best, one.decisions, self.gain_ppm)

    def _raise(self, some: Sequence[Unsettled]) -> None:
        """Raise the bounds of these."""
        answers = self.answers(self._placed(some))
        for one, answer in zip(some, answers):
            asked = len(EFFORTS) if answer.stuck else answer.asked
            self.asked[one.order] = asked, answer.high_ps, answer.looked
            self.programs -= answer.took
            limit = self._limit(one)
            if answer.better is not None:
                self._take(_least(one), answer.better)
            if answer.bound_ps >= limit:
                self._put(one, [])
                continue
            least = max(one.bound_ps, answer.bound_ps)
            raised = one.raised(least, self.gain_ppm) if least > one.bound_ps else one
            if one.members and (answer.stuck or asked > HARD or answer.high_ps < ENDLESS):
                left = self._apart(raised)  # together they are harder than each is
                self._put(one, list(map(asked_as, left)) if len(left) > 1 else left)
                self.asked.pop(one.order)  # of what was joined, not of the member with its order
            elif raised is not one:
                self._put(one, [raised])

    def _placed(self, some: Sequence[Unsettled]) -> list[Ask]:
        """Asks of these, half of them to each side; what was harder goes where its tree is, as far
        as there is room."""
        room = [len(some) - len(some) // 2] * 2
        side_of: dict[int, int] = {}
        for one in some:
            side = self.sides.get(one.order, 0 if len(some) == 1 else None)
            if side is not None and room[side]:
                side_of[one.order] = side
                room[side] -= 1
        for one in some:
            if one.order not in side_of:
                side_of[one.order] = side = int(room[1] >= room[0])
                room[side] -= 1
            if self._asked(one)[0]:
                self.sides[one.order] = side_of[one.order]
        return [replace(self._ask(one), side=side_of[one.order]) for one in some]

    def _is_stuck(self, one: Unsettled) -> bool:
        """Whether its bound is raised no further, and so not that of all."""
        return self._asked(one)[0] >= len(EFFORTS)

    def _asked(self, one: Unsettled) -> tuple[int, int, int]:
        return self.asked.get(one.order, (0, ENDLESS, 0))

    def _ask(self, one: Unsettled) -> Ask:
        asked, high, looked = self._asked(one)
        return Ask(
            problem=one.problem, bound_ps=one.bound_ps, limit_ps=self._limit(one), asked=asked,
            high_ps=high, programs=self.programs, kept=self.kept, others=len(self.left) > 1,
            look=_least(one).problem, looked=looked,
        )  # fmt: skip

    def _take(self, one: Unsettled, better: StageSolution) -> None:
        """Tell of a better plan, unless one was found that is better still."""
        if better.stages and better.step_ps < self._limit(one):
            self.best = self.found(one, better)


def _least(one: Unsettled) -> Unsettled:
    """Of what was joined the member with the least bound."""
    return min(one.members or (one,), key=lambda u: (u.bound, u.order))
