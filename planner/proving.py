"""Answers to what a proof asks: the bound of a stage program, raised as far as effort lasts.

A stage program is bounded by cutting planes (`stage_planes`), and by columns what they raise no
further (`stage_columns`).
Either no choice of it is better than the best plan, or a better one is found near where the bound
says that it must lie, or its bound is raised as far as it goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cost_models.stage_problem import StageProblem, least_of
from planner.refuted import Refuted, unlimited
from planner.score import PPM
from planner.stage_columns import Tree
from planner.stage_paths import Shape, Shapes, shape_of
from planner.stage_patterns import applies as has_patterns
from planner.stage_patterns import patterns_of
from planner.stage_planes import ENDLESS, Answer, Effort, applies, classes_of, refute
from planner.stages import StageSolution, near

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
HARD = 2  # times that more effort was needed: from there on it takes seconds
WAYS = 6  # classes of a layer and levels of each: of more, nodes of layers take longer than columns
CUTS = 2  # that whole numbers came to, from which a better plan is looked for, the last ones
GOAL = 100  # a bound is raised so near to the best, one part in so many, before that is asked about
NEAR = 6  # at once where it is no further than so many times that, else by three quarters
WIDE = 3  # times that, from which so much may be gained that choices are annealed
WITHIN = 500  # what is nearer is raised until it is so near to where it was not
# that a bound is raised at once, as less was no use
STEPS_PPM = (PPM, 20_000, 10_000, 5_000, 2_500)
FINE = 48  # stages of a program that is asked in whole numbers for less than the goal, at most


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
        if not stuck and looked < asked <= HARD and applies(ask.problem):
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
        if not applies(p):
            found, took = self._by_columns(p, target, ask, left)
            return found or Answer(refuted=False, least_ps=0, cuts=[]), took
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
        # before that they would mostly take longer than nodes of layers
        alone = ask.asked > HARD or (ask.asked == HARD and _ways(p) > WAYS)
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


def bounded(p: StageProblem) -> bool:
    """Whether bounds of such a program are raised here: by planes, or by columns alone where it is
    interleaved and has a pin of what is computed again."""
    return applies(p) or (p.chunks > 1 and has_patterns(p))


def _effort(asked: int, p: StageProblem) -> Effort:
    """Of a program that was asked so often in vain: at last what raises its bound the quicker,
    CP-SAT where most stages have one layer, else the tree."""
    seconds, nodes = EFFORTS[asked]
    if asked >= HARD:
        seconds, nodes = (seconds, 0) if 2 * p.layers < 3 * p.count else (0.0, nodes)
    return Effort(programs=FIRST, whole_s=seconds, nodes=nodes)


def _ways(p: StageProblem) -> int:
    """Whole numbers of a stage in a program of nodes."""
    return len(classes_of(p)[0]) * len(p.levels)


def _counts(p: StageProblem) -> int:
    """What a linear program of it counts."""
    return -(-p.count // STAGES)
