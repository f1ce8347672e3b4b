"""What a search tries and finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from cost_models.decisions import Decisions
from cost_models.stage_problem import Nearest, Pair, StageProblem
from cost_models.step import Assignments, Step
from cost_models.tiers import TierUse
from planner.score import AXIS_GAIN_PPM, objective_below, score_of

CLOSEST = 3  # states that hold the least over, where nothing fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """The best found. objective_ps: without host overhead and jitter, which every mesh shares."""

    decisions: Decisions
    assignments: Assignments
    objective_ps: int
    gain_ppm: int = AXIS_GAIN_PPM

    @property
    def score(self) -> int:
        return score_of(self.objective_ps, self.decisions, self.gain_ppm)

    def below(self, score: int) -> int:
        """The least objective of a plan of as many axes whose score is not below that."""
        return objective_below(score, self.decisions, self.gain_ppm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """The mesh that overflows the least, where none fits."""

    decisions: Decisions
    assignments: Assignments
    nearest: Nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A stage program to solve. step: where it is to be tried with other sets of what layers keep
    once it is solved."""

    bound_ps: int
    decisions: Decisions
    problem: StageProblem
    step: Step | None = None


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


@dataclass(kw_only=True)
class Outcome:
    """What a search found. bound: no plan of the space has a score below it. searched: the best as
    the placement program lays it over tp; `best` may be laid as engines have it (`relaid`)."""

    best: Tried | None = None
    searched: Tried | None = None
    misfit: Misfit | None = None
    closest: list[tuple[int, int, Decisions]] = field(default_factory=list)  # bytes, order, state
    bound: int = 0
    meshes: int = 0
    expanded: int = 0  # meshes tried; solved: stage programs
    solved: int = 0
    spent: int = 0
    misfits: int = 0
    hopeless: int = 0  # meshes not tried as nothing fitted and their bounds say that none does
    full: TierUse | None = None  # the tier below that was the least over, where one was
    interrupted: bool = False

    def part(self, place: int) -> Outcome:
        """What a mesh is expanded with and adds to, the one at that place of those expanded at
        once: what it spends and solves is counted from zero."""
        return Outcome(
            best=self.best and bare(self.best), misfit=self.misfit and bare(self.misfit),
            closest=[*self.closest], full=self.full, expanded=self.expanded + place,
            misfits=self.misfits,
        )  # fmt: skip

    def take(self, parts: Sequence[Outcome], lay: Callable[[Decisions], Assignments]) -> None:
        """Add what these parts found, of equals the first. lay: how units lie on a mesh."""
        misfits = self.misfits
        for part in parts:
            best, misfit, full = part.best, part.misfit, part.full
            if best and (self.best is None or best.score < self.best.score):
                self.best = replace(best, assignments=lay(best.decisions))
            if misfit and nearer(self.misfit, misfit) is misfit:
                self.misfit = replace(misfit, assignments=lay(misfit.decisions))
            if full:
                self.full = less_over(self.full, full)
            for row in part.closest:
                if row not in self.closest:
                    self.note_closest(*row)
            self.expanded += 1
            self.solved += part.solved
            self.spent += part.spent
            self.misfits += part.misfits - misfits

    def note_closest(self, least_bytes: int, order: int, d: Decisions) -> None:
        """Keep a state that is too much if few hold less: of other pp each, as what else ranks hold
        differs by stages."""
        rows = sorted([*self.closest, (least_bytes, order, d)], key=lambda r: r[:2])
        of_pp = {row[2].pp: row for row in rows[::-1]}
        self.closest = sorted(of_pp.values(), key=lambda r: r[:2])[:CLOSEST]

    @property
    def seen(self) -> bool:
        """Whether every mesh was tried, or is known to fit nowhere."""
        return self.expanded + self.hopeless == self.meshes

    @property
    def proved(self) -> bool:
        return self.best is not None and self.bound >= self.best.score

    @property
    def gap(self) -> float:
        if self.best is None or self.proved:
            return 0.0
        return (self.best.score - self.bound) / self.best.score

    @property
    def bound_ps(self) -> int:
        """The bound as a step objective of the best plan's kind."""
        if self.best is None:
            return 0
        return min(self.best.objective_ps, self.best.below(self.bound))


Bare = TypeVar("Bare", Tried, Misfit, Unsettled)


def bare(one: Bare) -> Bare:
    """Without how units lie, which the mesh says: as it goes from one process to another."""
    return replace(one, assignments={})


def less_over(old: TierUse | None, new: TierUse) -> TierUse:
    """The tier that is less too small, the first of equals."""
    if old and old.used_bytes / old.bytes <= new.used_bytes / new.bytes:
        return old
    return new


def nearer(old: Misfit | None, new: Misfit) -> Misfit:
    """The misfit that overflows less, the first of equals."""
    if old and old.nearest.overflow_bytes <= new.nearest.overflow_bytes:
        return old
    return new


def decided(d: Decisions, stages: tuple[int, ...], recompute: tuple[Pair, ...]) -> Decisions:
    """The decisions with their stages; what is kept in part matters where something is."""
    made = d.cut(stages, recompute)
    keep = d.keep if any(some for _, some in made.recompute) else ()
    return replace(made, keep=keep)
