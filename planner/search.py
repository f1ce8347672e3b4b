"""The search: most promising mesh first, until no bound beats the incumbent.

For each mesh, the ways to hold its state (ZeRO stage, shard size, offload) and its schedules are
tried, dominated ones left out, and the stage program solved. A mesh whose lower bound does not
beat the incumbent is not tried; the least bound of what is left is the proof, or the gap.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cost_models.decisions import Decisions
from cost_models.estimate import whole_step_ps
from cost_models.step import Assignments
from cost_models.units import format_seconds
from planner.bounds import NEVER_PS
from planner.decisions import Pins
from planner.expanding import Expander
from planner.interrupts import interruptible
from planner.mesh import Mesh
from planner.outcome import Outcome, Tried, Unsettled, decided
from planner.proof import BEYOND, PATIENT, PROGRAMS, Proof
from planner.proving import far_below
from planner.refuted import Refuted
from planner.relaid import relaid
from planner.sides import APART, Side, answers, bounds
from planner.stage_paths import Shapes
from planner.stages import StageSolution
from planner.turns import by_space, in_turn
from planner.twin import Pair, forks

DEFAULT_EFFORT = 1_600  # a stage program counts one, and one for every 8 stages, if it is not a
# known one with other operations kept, which the best cuts off early; a mesh one, if
# its state may fit, one for every 12 ways to hold it and one for every 4 programs: some 10 s
GUESSES = 600  # of it, half at most, go to the best guesses; what is beyond that to the proof
PATIENCE = 4  # times the default's, where what is untried holds the gap above the proof's goal
MOST_PROVING = 8  # times the effort of the default's proof, whatever the effort is
NEAREST = 60  # meshes that cannot fit that are tried at most, where only such are left
SHARPENED = 8  # meshes whose bounds are sharpened count one


@dataclass(kw_only=True)
class Searcher(Expander):
    """One model on one cluster under pins; keeps what searches share (costs, assignments).

    patience: times the effort that may be spent, where what is untried holds the gap above the
    proof's goal.
    """

    progress: Callable[[str], None] | None = None
    effort: int = DEFAULT_EFFORT
    patience: int = 1

    def under(self, pins: Pins) -> Searcher:
        """The same model and costs under other pins."""
        laid = self._laid if pins.place == self.pins.place else {}
        over = self._over if pins.place == self.pins.place else {}
        keeps = self._keeps if pins.place == self.pins.place else {}
        return Searcher(
            costs=self.costs, pins=pins, effort=self.effort, gain_ppm=self.gain_ppm,
            _laid=laid, _keeps=keeps, _over=over,
        )

    # --- the search --------------------------------------------------------------------------

    def run(self, incumbent: Tried | None = None) -> Outcome:
        """Most promising first, by guess; bounds prune. Every mesh is tried under every choice of
        formats. incumbent: a plan of the space."""
        self._shapes, self._known = Shapes(), Refuted()  # the same whatever was searched before
        runs = [m for m in self.meshes() if self.runs(m)]
        beside = replace(self, _shapes=Shapes(), _known=Refuted(), _over=dict(self._over))
        spaces = [
            [replace(one, formats=way) for way in self.format_ways()] for one in (self, beside)
        ]
        out = Outcome(best=incumbent, meshes=len(spaces[0]) * len(runs))
        if not out.meshes:  # nothing is better there
            out.bound = out.best.score if out.best else 1 << 62
            return out
        own, other = (
            Side(prover=row[0].prover, candidates=[(space, m) for space in row for m in runs])
            for row in spaces
        )
        for space, (tp, split) in itertools.product(
            spaces[0], sorted({(m.tp, m.sequence_parallel) for m in runs})
        ):
            space.assign(tp, split)  # that is known before there are two sides
            space.keeps(tp, split)
        with Pair(own, other, apart=out.meshes >= APART and forks()) as pair:
            return self._run(pair, out)

    def _run(self, pair: Pair[Side], out: Outcome) -> Outcome:
        """Bound the candidates, try them, and prove what is left."""
        candidates, incumbent = pair.own.candidates, out.best
        below = [self._below(out.best, m) for _, m in candidates] if out.best else None
        lower, guess = (
            [self._score(ps, m) for ps, (_, m) in zip(some, candidates)]
            for some in bounds(pair, below)
        )
        left = sorted(lower)[::-1]  # of meshes not tried; those tried are crossed out
        tried: Counter[int] = Counter()
        unsettled: list[Unsettled] = []  # tried, with a bound below what was found
        most = out.meshes  # to try
        with interruptible() as stopped:
            kinds = [m.pp for _, m in candidates]

            def sharpen(rest: Sequence[int]) -> None:
                self._sharpen(rest, candidates, lower, out)
                left[:] = sorted(lower[i] for i in rest)[::-1]
                tried.clear()

            for some in in_turn(guess, lower, kinds, out, min(GUESSES, self.effort // 2), sharpen):
                if stopped() or self._is_spent(out, left[-1]):
                    break
                if out.best is None and left[-1] >= NEVER_PS:  # nothing fits: what is nearest?
                    most = min(most, out.expanded + NEAREST)
                    if out.expanded >= most:
                        break
                unsettled += self._expanded(some, pair, out)
                tried.update(lower[i] for i in some)
                while left and tried[left[-1]]:
                    tried[left.pop()] -= 1
                self._report(out, min([*left[-1:], *(u.bound for u in unsettled)], default=0))
            if out.best is None:
                if out.misfit is None and not out.closest:
                    in_order = sorted(range(len(candidates)), key=lambda i: (guess[i], i))
                    self.seen_over([candidates[i][1] for i in in_order], out)
                self.weigh_closest(out)
            untried = left[-1] if left else 1 << 62
            unsettled = self._prove(out, pair, unsettled, untried, stopped)
            out.interrupted = stopped()
            if out.best is None and left and left[-1] >= NEVER_PS:
                out.hopeless = out.meshes - out.expanded
        rest = [*left[-1:], *(u.bound for u in unsettled)]
        out.searched = out.best
        if out.best and out.best is not incumbent and not out.interrupted:  # that is its search's
            out.best = relaid(self, out.best)
        out.bound = min([*rest, out.best.score if out.best else 1 << 62])
        return out

    def _is_spent(self, out: Outcome, untried: int) -> bool:
        """Whether the search ends here: its effort is spent, and what is untried is near the best,
        or its patience is spent as well. untried: the least bound."""
        if out.spent < self.effort:
            return False
        near = out.best is None or not far_below(untried, out.best.score)
        return near or out.spent >= self.patience * self.effort

    def _expanded(self, some: Sequence[int], pair: Pair[Side], out: Outcome) -> list[Unsettled]:
        """Expand these candidates at once; what is unsettled of them."""
        found = pair.both("expand", [(i, out.part(place)) for place, i in enumerate(some)])
        solved = itertools.accumulate((part.solved for part, _ in found), initial=out.solved)
        unsettled = [
            replace(u, order=before + u.order, assignments=self._laid_as(u.decisions))
            for before, (_, left) in zip(solved, found) for u in left
        ]
        out.take([part for part, _ in found], self._laid_as)
        return unsettled

    def _laid_as(self, d: Decisions) -> Assignments:
        return self.assign(d.tp, d.sequence_parallel)

    def _sharpen(
        self, rest: Sequence[int], candidates: Sequence[tuple[Expander, Mesh]], lower: list[int],
        out: Outcome,
    ) -> None:  # fmt: skip
        """Raise the bounds of those of these candidates that may be better than the best: on one
        kind of GPUs, as others are bounded otherwise."""
        if out.best is None or len(self.clusters) > 1:
            return
        open_ones = [i for i in rest if lower[i] < out.best.score]
        for space, some in by_space(open_ones, candidates):
            meshes = [candidates[i][1] for i in some]
            below = [self._below(out.best, m) for m in meshes]
            found = space._bounds(meshes, below, apart=True)
            for i, mesh, bound in zip(some, meshes, found.lower_ps.tolist()):
                lower[i] = max(lower[i], self._score(bound, mesh))
            out.spent += len(some) // SHARPENED

    def _prove(
        self, out: Outcome, pair: Pair[Side], unsettled: list[Unsettled], untried: int,
        stopped: Callable[[], bool],
    ) -> list[Unsettled]:  # fmt: skip
        """Raise the bounds of what is unsettled, least first; returns what is left."""
        if out.best is None:
            return unsettled

        def found(one: Unsettled, better: StageSolution) -> int:
            assert out.best is not None
            d = decided(one.decisions, better.stages, better.recompute)
            step = self.costs.step(one.decisions, one.assignments)
            if not all(use.fits for use in self.tier_uses(step, d, one.problem)):
                return out.best.score
            out.best = Tried(
                decisions=d, assignments=one.assignments, objective_ps=better.step_ps,
                gain_ppm=self.gain_ppm,
            )  # fmt: skip
            return out.best.score

        effort = max(self.effort, min(out.spent, self.patience * self.effort))
        patient = PATIENT if self.patience > 1 else 0
        return Proof(
            best=out.best.score, untried=untried, left=list(unsettled), found=found,
            answers=partial(answers, pair), report=partial(self._report, out, doing="proving"),
            gain_ppm=self.gain_ppm, stopped=stopped,
            programs=patient + PROGRAMS * min(max(1, effort // DEFAULT_EFFORT), MOST_PROVING),
            kept=patient + BEYOND,
        ).run()  # fmt: skip

    def _report(self, out: Outcome, bound: int, doing: str = "solving") -> None:
        if self.progress and not out.best:
            self.progress(f"{doing}: {out.expanded} of {out.meshes} meshes, none fits yet")
        if self.progress and out.best:
            best = out.best.score
            step = whole_step_ps(self.costs, out.best.objective_ps) / 1e12
            gap = max(0.0, (best - bound) / best)
            said = [format_seconds(seconds) for seconds in (step, step * (1 - gap))]
            self.progress(f"{doing}: best {said[0]}, bound {said[1]}, gap {gap:.1%}")


__all__ = ["Outcome", "Searcher", "Tried"]
