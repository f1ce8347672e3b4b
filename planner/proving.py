"""What a search does last: raise the least bounds that are left, which are the gap.

A stage program with one stage a rank is bounded by CP-SAT, one with several by cutting planes
(`stage_planes`): either no choice of it is better than the best plan, or a better one is found
near where the bound says that it must lie, or its bound is raised as far as it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cost_models.decisions import Decisions
from cost_models.stage_problem import StageProblem, least_of
from cost_models.step import Assignments
from planner.refuted import Refuted, unlimited
from planner.score import AXIS_GAIN_PPM, objective_below, score_of
from planner.stage_paths import Shapes
from planner.stage_planes import Answer, Effort, applies, refute
from planner.stages import StageSolution, certify, near, solve

CERTIFIED = 3  # finalists that CP-SAT bounds at most, about a second each
PROGRAMS = 4_800  # linear programs at most, some ms each, or as much of trees
BEYOND = 1_600  # of them, that are kept for bounds that are further from the best than the goal
STAGES = 20  # of such a program; one of more counts as often as it has so many
FIRST = 24  # of one stage program when it is asked; then these and the first node of a tree; then
MORE = 100  # so many, and a tree of so many nodes, twice as many each time that it was no use
NODES = 100
MOST = 6  # times that it is asked with more
MOST_LINES = 1  # where its stages are too many for a tree
TREES = 48  # stages of a program that is asked in whole numbers, at most
GOAL = 100  # a bound is raised so near to the best, one part in so many, before that is asked about
NEAR = 6  # at once where it is no further than so many times that, else by three quarters
WITHIN = 2_000  # what is nearer is raised until it is so near to where it was not
ENDLESS = 1 << 62  # picoseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsettled:
    """A stage program that was not proved: its bound as a score and as an objective."""

    bound: int
    bound_ps: int
    order: int
    decisions: Decisions
    assignments: Assignments
    problem: StageProblem
    stages: tuple[int, ...] = ()  # of a choice found that beats the best, if tiers have room
    members: tuple[Unsettled, ...] = ()  # of a program that is no harder than any of these

    def raised(self, bound_ps: int, gain_ppm: int) -> Unsettled:
        score = score_of(bound_ps, self.decisions, gain_ppm)
        return replace(self, bound=score, bound_ps=bound_ps)


def joined(left: Sequence[Unsettled]) -> list[Unsettled]:
    """Programs that differ only in what layers keep in part as one that is no harder than any: what
    is refuted of that is refuted of all, and mostly what they keep is not what decides."""
    groups: dict[Decisions, list[Unsettled]] = {}
    for one in left:
        groups.setdefault(replace(one.decisions, keep=()), []).append(one)
    found: list[Unsettled] = []
    for group in groups.values():
        least = min(group, key=lambda u: (u.bound, u.order))
        problem = easiest_of([u.problem for u in group])
        if len(group) == 1 or problem is None or not _by_planes(least):
            found += group
        else:
            found.append(replace(least, problem=problem, members=tuple(group)))
    return found


def easiest_of(problems: Sequence[StageProblem]) -> StageProblem | None:
    """Of problems that differ in nothing but what recomputation takes, keeps and uses: the least of
    all; None where they differ in more."""
    names = ("recompute_ps", "activation_bytes", "working_bytes")
    if len(problems) == 1:
        return problems[0]
    same = {name: getattr(problems[0], name) for name in names}
    if any(replace(p, **same) != problems[0] for p in problems):
        return None
    return replace(problems[0], **least_of(problems, names))


def _by_planes(one: Unsettled) -> bool:
    """Whether cutting planes bound it."""
    return one.problem.chunks > 1 and applies(one.problem)


def _in_trees(one: Unsettled) -> bool:
    """Whether that is in whole numbers too."""
    return _by_planes(one) and one.problem.count <= TREES


@dataclass(slots=True, kw_only=True)
class Proof:
    """best: the score of the best plan. untried: the least bound of what is not in `left`.
    found: is told of a better plan, and returns the score that is the best then."""

    best: int
    untried: int
    left: list[Unsettled]
    found: Callable[[Unsettled, StageSolution], int]
    gain_ppm: int = AXIS_GAIN_PPM
    stopped: Callable[[], bool] = lambda: False  # Ctrl-C: the bounds so far are what is proved
    programs: int = PROGRAMS
    certified: int = 0
    shapes: Shapes = field(default_factory=Shapes)
    known: Refuted = field(default_factory=Refuted)
    asked: dict[int, tuple[int, int]] = field(default_factory=dict)  # by order: how often more
    # effort was needed, and the least step that this much did not refute
    looked: set[int] = field(default_factory=set)  # orders: a better plan was looked for

    def run(self) -> list[Unsettled]:
        """Least bound first, while that raises the whole; returns what is left. Before that the
        best plan is made better, which all others are held against."""
        own = next((u for u in reversed(self.left) if u.stages), None)
        if own is not None and _in_trees(own):
            self._look(own, [own.stages])
        self.left = joined(self.left)
        while self.left and not self.stopped():
            weakest = min(self.left, key=lambda u: (u.bound, u.order))
            if weakest.bound >= min(self.untried, self.best):
                break
            raised = self._raised(weakest) if _by_planes(weakest) else self._by_solver(weakest)
            if raised is weakest and not weakest.members:
                break
            self.left.remove(weakest)
            if raised is weakest:  # that is as far as all of them come together
                self.left += self._apart(weakest)
            elif raised is not None:
                self.left.append(raised)
        return [one for u in self.left for one in self._apart(u)]

    def _apart(self, one: Unsettled) -> Sequence[Unsettled]:
        """The members of what was joined, each with the bound of all if that is more."""
        if not one.members:
            return [one]
        return [
            u if u.bound_ps >= one.bound_ps else u.raised(one.bound_ps, self.gain_ppm)
            for u in one.members
        ]

    def _by_solver(self, one: Unsettled) -> Unsettled | None:
        if self.certified >= CERTIFIED:
            return one
        self.certified += 1
        known = solve(one.problem)
        if known.status not in ("OPTIMAL", "FEASIBLE"):
            return one
        proved = max(known.bound_ps, certify(one.problem, incumbent_ps=known.step_ps))
        return one.raised(max(one.bound_ps, proved), self.gain_ppm)

    def _limit(self, one: Unsettled) -> int:
        """The least objective of it that is no better than the best plan."""
        return objective_below(self.best, one.decisions, self.gain_ppm)

    def _raised(self, one: Unsettled) -> Unsettled | None:
        """None where no choice of it is better than the best plan; itself where it is stuck."""
        limit = self._limit(one)
        if one.bound_ps >= limit:
            return None
        asked, high = self.asked.get(one.order, (0, ENDLESS))
        far = one.bound_ps < limit - limit // GOAL
        top = limit - limit // GOAL if far else limit
        if high - one.bound_ps <= limit // (GOAL if far else WITHIN):
            asked, high = asked + 1, ENDLESS  # as near as so much effort comes
        most = MOST if _in_trees(one) else MOST_LINES
        if asked > most or self.programs <= (0 if far else BEYOND):
            return one
        target = top
        if high <= top or limit - one.bound_ps > NEAR * limit // GOAL:
            target = max(one.bound_ps + 1, (one.bound_ps + 3 * min(high, limit)) // 4)
        answer = self._refuted(one.problem, target, asked)
        if answer.refuted:
            self.asked[one.order] = asked, high
            return None if target == limit else one.raised(target, self.gain_ppm)
        told = answer.least_ps > one.bound_ps  # by a tree: another time would tell no more
        again = asked and not told
        self.asked[one.order] = (asked, target) if again else (asked + 1, ENDLESS)
        worth = far or _in_trees(one)  # else looking takes longer than it gains
        if asked and worth and one.order not in self.looked:
            self.looked.add(one.order)
            real = min(one.members or (one,), key=lambda u: (u.bound, u.order))
            self._look(real, [*answer.cuts, *self._tight(one.problem, answer.least_ps)])
        return one.raised(answer.least_ps, self.gain_ppm) if told else replace(one)

    def _tight(self, p: StageProblem, least_ps: int) -> list[tuple[int, ...]]:
        """Cuts that may have a step little above this: the tighter, the more they are alike."""
        if not least_ps:
            return []
        effort = Effort(programs=FIRST)
        found = refute(p, least_ps + least_ps // GOAL, self.shapes.of(p), effort)
        self.programs -= -(-p.count // STAGES) * (FIRST - effort.programs)
        return found.cuts

    def _look(self, one: Unsettled, cuts: Sequence[tuple[int, ...]]) -> None:
        """A better plan, near these cuts."""
        better = near(one.problem, cuts, incumbent_ps=self._limit(one))
        if better.stages:
            self.best = self.found(one, better)

    def _refuted(self, p: StageProblem, target: int, asked: int) -> Answer:
        """As `refute`, with more effort the more often that was no use. Of what is refuted without
        a limit to memory other programs are too, so that is asked first, with few."""
        if self.known.covers(p, target):
            return Answer(refuted=True, least_ps=target, cuts=[])
        paths, free = self.shapes.of(p), unlimited(p)
        others = len(self.left) > 1 and free != p
        first = [free] if others and self.known.promising(free, target) else []
        answer = Answer(refuted=False, least_ps=0, cuts=[])
        counts = -(-p.count // STAGES)
        for one in (*first, p):
            effort = self._effort(asked, p.count) if one is p else Effort(programs=FIRST)
            given = effort.programs = max(0, min(effort.programs, -(-self.programs // counts)))
            answer = refute(one, target, paths, effort)
            self.programs -= counts * (given - effort.programs)
            if answer.least_ps:
                self.known.add(one, answer.least_ps)
            if answer.refuted:
                return answer
            if one is free:
                self.known.failed(free, target)
        return answer

    @staticmethod
    def _effort(asked: int, stages: int) -> Effort:
        """Of a program that was asked so often in vain."""
        if stages > TREES:
            return Effort(programs=FIRST << asked)
        if asked < 2:
            return Effort(programs=FIRST, nodes=asked)
        return Effort(programs=MORE, nodes=NODES << asked - 2)
