"""What a search does last: raise the least bounds that are left, which are the gap.

A stage program is bounded by cutting planes (`stage_planes`), and by columns what they raise no
further (`stage_columns`); by CP-SAT one whose ranks are not alike or of which something is pinned,
and one with one stage a rank that is raised no further.
Either no choice of it is better than the best plan, or a better one is found near where the bound
says that it must lie, or its bound is raised as far as it goes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cost_models.decisions import Decisions
from cost_models.stage_problem import StageProblem, least_of
from planner.outcome import Unsettled
from planner.refuted import Refuted, unlimited
from planner.score import AXIS_GAIN_PPM, PPM, axes_used, objective_below
from planner.stage_columns import Tree
from planner.stage_memory import freely_lowered
from planner.stage_paths import Shape, Shapes, shape_of
from planner.stage_patterns import patterns_of
from planner.stage_planes import ENDLESS, Answer, Effort, applies, refute
from planner.stage_ranks import usable
from planner.stages import StageSolution, certify, near, solve

CERTIFIED = 3  # finalists that CP-SAT bounds at most, about a second each
PROGRAMS = 14_400  # linear programs at most, some ms each, or as much in whole numbers
BEYOND = 12_200  # of them, that are kept for bounds that are further from the best than the goal
PATIENT = 65_600  # beside, that are spent on those where the search is patient
STAGES = 20  # of such a program; one of more counts as often as it has so many
FIRST = 24  # linear programs of one stage program when it is asked
# seconds of CP-SAT and nodes of a tree in whole numbers: at first, then as less was no use
EFFORTS = (0.0, 0), (0.1, 1), (1.5, 100), (3.0, 200), (6.0, 400), (12.0, 1_600), (24.0, 6_400)
# linear programs over patterns of ranks, as often, of programs that have few of them
COLUMNS = 0, 300, 900, 1_800, 3_600, 7_200, 14_400
MANY = 10  # linear programs that take as long as to find that there are too many patterns
KEPT = 8  # programs whose trees are kept
NODES = 1_000_000  # of a tree of them: its linear programs are what counts
A_SECOND = 800  # linear programs that take as long as a second of CP-SAT
AHEAD = 4  # programs with the least bounds, of which those come first that took least until now
HARD = 2  # times that more effort was needed: from there on it takes seconds
CUTS = 2  # that whole numbers came to, from which a better plan is looked for, the last ones
GOAL = 100  # a bound is raised so near to the best, one part in so many, before that is asked about
NEAR = 6  # at once where it is no further than so many times that, else by three quarters
WIDE = 3  # times that, from which so much may be gained that choices are annealed
WITHIN = 500  # what is nearer is raised until it is so near to where it was not
# that a bound is raised at once, as less was no use
STEPS_PPM = (PPM, 20_000, 10_000, 5_000, 2_500)
FINE = 48  # stages of a program that is asked in whole numbers for less than the goal, at most


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """To raise the bound of a program as far as the next time that it is weighed against others.

    limit_ps: no choice is better than the best plan from there on. asked: how often more effort was
    needed. high_ps: the least step that whole numbers of layers were found to keep, which no effort
    refutes. programs: linear programs at most, some more; kept: of them, for what is far. others:
    what is refuted without a limit to memory helps other programs. look: the problem of which a
    better plan is looked for. looked: what `asked` was when one was looked for near its bound, as
    it is before more effort is spent. side: which of the two processes of a search is asked.
    """

    problem: StageProblem
    bound_ps: int
    limit_ps: int
    asked: int
    high_ps: int
    programs: int
    kept: int
    others: bool
    look: StageProblem
    looked: int
    side: int = 0

    @property
    def far(self) -> bool:
        """Whether the bound is further from the best than the goal."""
        return far_below(self.bound_ps, self.limit_ps)

    @property
    def top_ps(self) -> int:
        """As far as the bound is raised: the goal, or what is no better than the best."""
        return self.limit_ps - (self.limit_ps // GOAL if self.far else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """bound_ps: no choice has a step below it. stuck: it is raised no further. took: linear
    programs. better: of a better plan, if it was looked for. looked: as an ask has it."""

    bound_ps: int
    asked: int
    high_ps: int
    took: int
    stuck: bool
    better: StageSolution | None = None
    looked: int = 0


def far_below(bound_ps: int, limit_ps: int) -> bool:
    """Whether a bound is further from the best than the goal."""
    return bound_ps < limit_ps - limit_ps // GOAL


@dataclass(slots=True, kw_only=True)
class Prover:
    """Raises bounds, with what it learned of other programs."""

    shapes: Shapes = field(default_factory=Shapes)
    known: Refuted = field(default_factory=Refuted)
    annealed: set[Shape] = field(default_factory=set)  # once each: what differs little, does so
    # of the programs that were asked so last: (whether patterns might be of loads alone, the tree;
    # none where they are too many)
    trees: dict[StageProblem, tuple[bool, Tree | None]] = field(default_factory=dict)

    def told(self, ask: Ask) -> Told:
        """With more effort each time that it was no use."""
        asked, high, left = ask.asked, ask.high_ps, ask.programs
        limit, bound = ask.limit_ps, ask.bound_ps
        far, top = ask.far, ask.top_ps
        better = None
        stuck = asked >= len(EFFORTS) or left <= (0 if far else ask.kept)
        stuck |= high - bound <= limit // (GOAL if far else WITHIN)  # as near as that can be
        stuck |= not far and asked > 0 and ask.problem.count > FINE
        looked = ask.looked
        if not stuck and looked < asked <= HARD:
            target = min(top, bound + limit // GOAL)
            answer, took = self._tight(ask.problem, target)
            left -= took
            if answer.refuted:
                bound = target
            else:
                looked = asked
                anneal = asked >= HARD and self._anneals(ask, bound)
                better = near(ask.look, answer.cuts, incumbent_ps=limit, anneal=anneal)
        elif not stuck:
            target = top
            if high <= top:
                target = max(bound + 1, (bound + high) // 2)
            elif limit - bound > NEAR * limit // GOAL:
                target = (bound + 3 * limit) // 4
            step = limit * STEPS_PPM[min(asked, len(STEPS_PPM) - 1)] // PPM
            if target - bound > step + step // 2:
                target = bound + step
            answer, took = self._refuted(ask, target, asked, left)
            left -= took
            if answer.refuted:
                bound = target
            else:
                held = answer.held_ps < ENDLESS
                if asked or held:  # in whole numbers: a plan may be near
                    anneal = asked > 0 and self._anneals(ask, bound)
                    cuts = answer.cuts[-CUTS:]
                    better = near(ask.look, cuts, incumbent_ps=limit, anneal=anneal)
                bound = max(bound, answer.least_ps)
                asked += not held
            high = min(high, answer.held_ps)  # by any effort
        return Told(
            bound_ps=bound, asked=asked, high_ps=high, took=ask.programs - left, stuck=stuck,
            better=better, looked=looked,
        )  # fmt: skip

    def _anneals(self, ask: Ask, bound: int) -> bool:
        """Whether choices are annealed, as so much may be gained: of each shape once."""
        shape = shape_of(ask.look)
        if shape in self.annealed or ask.limit_ps - bound <= WIDE * ask.limit_ps // GOAL:
            return False
        self.annealed.add(shape)
        return True

    def _tight(self, p: StageProblem, target: int) -> tuple[Answer, int]:
        """As `refute`, in fractions: what is left little above a bound is near to whole numbers.
        And the linear programs that took."""
        effort = Effort(programs=FIRST)
        answer = refute(p, target, self.shapes.of(p), effort)
        if answer.refuted:
            self.known.add(p, target)
        return answer, _counts(p) * (FIRST - effort.programs)

    def _refuted(self, ask: Ask, target: int, asked: int, left: int) -> tuple[Answer, int]:
        """As `refute`, with more effort the more often that was no use, and the linear programs
        that took. Of what is refuted without a limit to memory other programs are too, so that is
        asked first, with few."""
        p, counts = ask.problem, _counts(ask.problem)
        answer, took = Answer(refuted=True, least_ps=target, cuts=[]), 0
        if self.known.covers(p, target):
            return answer, 0
        free = unlimited(p)
        first = ask.others and free != p and self.known.promising(free, target)
        for one in (free, p) if first else (p,):
            made, more = (
                self._by_columns(p, target, ask, left - took) if one is p else (None, 0)
            )
            took += more
            if made is None:
                effort = _effort(asked, p)
                given = effort.programs = max(0, min(effort.programs, -(-(left - took) // counts)))
                whole = effort.whole_s = max(0.0, min(effort.whole_s, (left - took) / A_SECOND))
                made = refute(one, target, self.shapes.of(p), effort)
                took += counts * (given - effort.programs)
                took += math.ceil(A_SECOND * (whole - effort.whole_s))
            answer = made
            if answer.least_ps:
                self.known.add(one, answer.least_ps)
            if answer.refuted:
                break
            if one is free:
                self.known.failed(free, target)
        return answer, took

    def _by_columns(
        self, p: StageProblem, target: int, ask: Ask, left: int
    ) -> tuple[Answer | None, int]:
        """As `_refuted`, by patterns of ranks; None where they are too many."""
        programs, took = min(COLUMNS[ask.asked], left), 0
        if programs <= 0:
            return None, 0
        alone = ask.asked > HARD  # before that they would mostly take longer than nodes of layers
        was, tree = self.trees.pop(p, (None, None))  # it is the latest then
        stale = was is not alone if tree is None else tree.top_ps < ask.top_ps
        if stale:
            patterns = patterns_of(p, ask.top_ps, alone)
            took = MANY if patterns is None else patterns.programs
            tree = None
            if patterns is not None:
                tree = Tree(p, ask.top_ps, patterns, self.shapes.of(p))
        self.trees[p] = alone, tree
        for old in list(self.trees)[:-KEPT]:
            del self.trees[old]
        if tree is None:
            return None, took
        effort = Effort(programs=programs, nodes=NODES)
        answer = tree.answer(target, ask.top_ps, effort)
        took += programs - effort.programs
        if tree.failed:  # what it is worth it has said
            self.trees[p] = alone, None
        return answer if answer.refuted or not tree.failed else None, took


def _effort(asked: int, p: StageProblem) -> Effort:
    """Of a program that was asked so often in vain: at last what raises its bound the quicker,
    CP-SAT where most stages have one layer, else the tree."""
    seconds, nodes = EFFORTS[asked]
    if asked >= HARD:
        seconds, nodes = (seconds, 0) if 2 * p.layers < 3 * p.count else (0.0, nodes)
    return Effort(programs=FIRST, whole_s=seconds, nodes=nodes)


def _counts(p: StageProblem) -> int:
    """What a linear program of it counts."""
    return -(-p.count // STAGES)


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
            if applies(weakest.problem) and not self._is_stuck(weakest):
                self._raise(self._next(in_order))
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
            if u.bound < limit and applies(u.problem) and self._far(u) == far
        ]  # fmt: skip
        least = min(hard for hard, _ in rows)
        some = [u for hard, u in rows if hard == least]
        if least < HARD:
            return some
        first, *others = some
        apart = [u for u in others if self.sides.get(u.order) != self.sides.get(first.order)]
        return [first, *(apart or others)[:1]]

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
