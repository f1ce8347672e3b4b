"""What a search does last: raise the least bounds that are left, which are the gap.

A stage program with one stage a rank is bounded by CP-SAT, one with several by cutting planes
(`stage_planes`): either no choice of it is better than the best plan, or a better one is found
near where the bound says that it must lie, or its bound is raised as far as it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cost_models.decisions import Decisions
from cost_models.stage_problem import StageProblem
from cost_models.step import Assignments
from planner.refuted import Refuted, unlimited
from planner.score import AXIS_GAIN_PPM, objective_below, score_of
from planner.stage_paths import Shapes
from planner.stage_planes import Effort, applies, refute
from planner.stages import StageSolution, certify, near, solve

CERTIFIED = 3  # finalists that CP-SAT bounds at most, about a second each
PROGRAMS = 3_200  # linear programs at most, some ms each
STAGES = 20  # of such a program; one of more counts as often as it has so many
FIRST = 24  # of one stage program when it is asked
CHEAP = 2  # times that this was no use; from then on twice as many each time
NEAR = 100  # a bound is that near to the best, one part in so many, before that is asked about
WITHIN = 2_000  # a bound is raised until it is so near to where it was not: one part in so many


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsettled:
    """A stage program that was not proved: its bound as a score and as an objective."""

    bound: int
    bound_ps: int
    order: int
    decisions: Decisions
    assignments: Assignments
    problem: StageProblem

    def raised(self, bound_ps: int, gain_ppm: int) -> Unsettled:
        score = score_of(bound_ps, self.decisions, gain_ppm)
        return replace(self, bound=score, bound_ps=bound_ps)


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
    asked: dict[int, tuple[int, int]] = field(default_factory=dict)  # by order: how often it was
    # no use, and the least step that was not refuted

    def run(self) -> list[Unsettled]:
        """Least bound first, while that raises the whole; returns what is left."""
        while self.left and not self.stopped():
            weakest = min(self.left, key=lambda u: (u.bound, u.order))
            if weakest.bound >= min(self.untried, self.best):
                break
            planes = weakest.problem.chunks > 1 and applies(weakest.problem)
            raised = self._by_planes(weakest) if planes else self._by_solver(weakest)
            if raised is weakest:
                break
            self.left.remove(weakest)
            if raised is not None:
                self.left.append(raised)
        return self.left

    def _by_solver(self, one: Unsettled) -> Unsettled | None:
        if self.certified >= CERTIFIED:
            return one
        self.certified += 1
        known = solve(one.problem)
        if known.status not in ("OPTIMAL", "FEASIBLE"):
            return one
        proved = max(known.bound_ps, certify(one.problem, incumbent_ps=known.step_ps))
        return one.raised(max(one.bound_ps, proved), self.gain_ppm)

    def _by_planes(self, one: Unsettled) -> Unsettled | None:
        """None where no choice of it is better than the best plan; itself where it is stuck."""
        limit = objective_below(self.best, one.decisions, self.gain_ppm)
        if one.bound_ps >= limit:
            return None
        asked, high = self.asked.get(one.order, (0, limit + 1))
        near_by = limit - one.bound_ps <= limit // NEAR
        target = limit if high > limit and near_by else (one.bound_ps + 3 * min(high, limit)) // 4
        if high - one.bound_ps <= limit // WITHIN or self.programs <= 0:
            return one
        most = FIRST << max(0, asked - CHEAP)
        refuted, cuts = self._refuted(one.problem, target, most)
        if refuted:  # what more programs would raise it to is asked anew
            self.asked[one.order] = asked, limit + 1
            return None if target == limit else one.raised(target, self.gain_ppm)
        self.asked[one.order] = asked + 1, target
        better = near(one.problem, cuts, incumbent_ps=limit)
        if better.stages:
            self.best = self.found(one, better)
        return replace(one)

    def _refuted(
        self, p: StageProblem, target: int, each: int
    ) -> tuple[bool, list[tuple[int, ...]]]:
        """As `refute`, with so many programs at most. Of what is refuted without a limit to memory
        other programs are too, so that is asked first, with few."""
        if self.known.covers(p, target):
            return True, []
        paths, free = self.shapes.of(p), unlimited(p)
        others = len(self.left) > 1 and free != p
        asked = [free] if others and self.known.promising(free, target) else []
        cuts: list[tuple[int, ...]] = []
        counts = -(-p.count // STAGES)
        for one in (*asked, p):
            most = each if one is p else FIRST
            given = max(0, min(most, -(-self.programs // counts)))
            effort = Effort(programs=given)
            refuted, cuts = refute(one, target, paths, effort)
            self.programs -= counts * (given - effort.programs)
            if refuted:
                self.known.add(one, target)
                return True, []
            if one is free:
                self.known.failed(free, target)
        return False, cuts
