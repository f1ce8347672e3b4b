"""A mesh expanded: the ways to hold its state and its schedules are tried, dominated ones left
out, and the stage program of each solved, the least bound first."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cost_models.decisions import Decisions
from cost_models.rank_ledger import laid_by_rank
from cost_models.rooms import with_sure_rooms
from cost_models.stage_problem import Nearest, StageProblem
from cost_models.step import Assignments, Step
from cost_models.tiers import TierUse
from planner.bounds import Bounds, mesh_bounds_ps
from planner.dominance import undominated
from planner.mesh import Mesh
from planner.offloads import HOST, fills_host
from planner.outcome import (
    CLOSEST,
    Misfit,
    Outcome,
    Program,
    Tried,
    Unsettled,
    decided,
    less_over,
    nearer,
)
from planner.proving import FIRST, Prover, easiest_of
from planner.refuted import UNLIMITED, Refuted, unlimited
from planner.room import least_bytes, over_below, state_bytes
from planner.score import AXIS_GAIN_PPM, objective_below, score_of
from planner.shared_rooms import parts_of
from planner.some_below import named, programs_below, whole_below
from planner.space import MOST_VIRTUAL_STAGES, Space
from planner.stage_memory import forced_ps, freely_lowered, surely_fits
from planner.stage_paths import Shapes
from planner.stage_planes import ENDLESS, Effort, applies, refute
from planner.stage_ranks import bound_ps
from planner.stages import StageSolution, lower_bound_ps, refutes, solve, surely_infeasible

PROBE = 6  # linear programs without a limit to memory, where paths that matter are known
MOST_PARTS = 12  # times that a program is parted whose stages share a tier
MISFITS = 40  # programs that are weighed for the nearest misfit, where nothing fits


@dataclass(kw_only=True)
class Expander(Space):
    """The space of one model on one cluster, with what was learned of its stage programs."""

    gain_ppm: int = AXIS_GAIN_PPM  # of the step that an axis must earn
    _over: dict[tuple[object, ...], bool] = field(default_factory=dict)  # state alone is too much
    _shapes: Shapes = field(default_factory=Shapes)
    _known: Refuted = field(default_factory=Refuted)

    @property
    def prover(self) -> Prover:
        """It knows what was learned of stage programs."""
        return Prover(shapes=self._shapes, known=self._known)

    def _score(self, objective_ps: int, mesh: Mesh | Decisions) -> int:
        return score_of(objective_ps, mesh, self.gain_ppm)

    def _below(self, best: Tried, mesh: Mesh | Decisions) -> int:
        """The least objective of a mesh that is no better than the best."""
        return objective_below(best.score, mesh, self.gain_ppm)

    def bounds(
        self, candidates: Sequence[Mesh], below: Sequence[int] | None = None
    ) -> Bounds:
        """Of every mesh a lower bound of its objective, and a guess at it. below: bounds are not
        sharpened beyond these."""
        return self._bounds(candidates, below, apart=False)

    def _bounds(
        self, candidates: Sequence[Mesh], below: Sequence[int] | None, apart: bool
    ) -> Bounds:
        return mesh_bounds_ps(
            self.costs, candidates, self.assign, most_virtual=MOST_VIRTUAL_STAGES,
            schedules=self.searched_schedules, pins=self.pins, below=below, formats=self.formats,
            keeps=self.keeps, repeats=self.repeats, apart=apart,
        )  # fmt: skip

    def expand(self, mesh: Mesh, out: Outcome, unsettled: list[Unsettled]) -> None:
        """Solve a mesh's variants; note those whose bound is below what was found. Where the host's
        memory may be full, again on other tiers; where the device's may be in the way, with
        activations below."""
        laid = self.assign(mesh.tp, mesh.sequence_parallel)
        ways = [d for d in self.variants(mesh) if not self._over.get(_state_key(d))]
        out.spent += bool(ways) + len(ways) // 12
        known: dict[Decisions, Step] = {}
        while ways:
            full: list[Decisions] = []
            held: list[tuple[Decisions, Step]] = []
            for d in ways:
                step = known[d] = self.costs.step(d, laid)
                use = None if d.parts else over_below(self.costs.cluster, step)
                if use is not None:
                    out.full = less_over(out.full, use)
                    full.append(d)
                else:
                    held.append((d, step))
            steps = undominated([row for row in held if self._may_fit(*row, out)])
            todo: list[Program] = []
            least: dict[Decisions, int] = {}
            for d, step in steps:
                for made in self.schedules(d):
                    problem = self.problem(step, made)
                    bound = lower_bound_ps(unlimited(problem))
                    least[made] = ENDLESS if surely_fits(problem) else bound
                    if not out.best or bound < self._below(out.best, mesh):
                        todo += self._programs(step, made, problem, out)
                        if fills_host(problem):
                            full.append(d)
            held = [row for row in held if not self._over[_state_key(row[0])]]
            todo += self._by_count(undominated(held), mesh, laid, least, full, out)
            full += self._solve_all(todo, mesh, laid, out, unsettled)
            target = self._below(out.best, mesh) if out.best else ENDLESS
            some = [*programs_below(self, ways, laid, known, least, target, full)]
            full += self._solve_all(some, mesh, laid, out, unsettled)
            moved = itertools.chain.from_iterable(map(self.off_host, full))
            ways = [d for d in dict.fromkeys(moved) if d not in known]

    def _state(self, d: Decisions) -> Decisions:
        """How decisions hold state, as `variants` has it."""
        return replace(whole_below(d), schedule="1f1b", virtual_stages=1, keep=self.kept)

    def _by_count(
        self, held: Sequence[tuple[Decisions, Step]], mesh: Mesh, laid: Assignments,
        least: Mapping[Decisions, int], full: list[Decisions], out: Outcome,
    ) -> Iterator[Program]:  # fmt: skip
        """The programs of states with activations below by count of layers, that could be better
        than the best if memory were in nobody's way: in the host's memory, and where that may be
        too full on other tiers. least: bounds of that, where known; of what fits without, it is
        endless. full: is told of states beside which it may be."""
        target = self._below(out.best, mesh) if out.best else ENDLESS
        for d, step in held:
            for made in self.by_count(d):
                below, fills = self.costs.counted(step, made, laid), False
                if not self._may_fit(made, below, out):
                    break  # it is the same on the device wherever they lie
                for one in self.schedules(made):
                    if least.get(replace(one, offload=d.offload), 0) >= target:
                        continue
                    problem = self.problem(below, one)
                    pays = lower_bound_ps(unlimited(problem)) < target
                    fills |= pays and fills_host(problem)
                    if pays and not self._is_hopeless(problem, out):
                        yield Program(
                            bound_ps=bound_ps(problem, target), decisions=one, problem=problem,
                            step=None,
                        )
                if fills:
                    full.append(d)
                elif made.tiers["activations"] == HOST:
                    break

    def _is_hopeless(self, problem: StageProblem, out: Outcome) -> bool:
        """Whether no choice fits; not asked while programs are weighed for the nearest misfit."""
        weighed = out.best is not None or out.misfits >= MISFITS
        return weighed and surely_infeasible(problem)

    def _solve_all(
        self, todo: Sequence[Program], mesh: Mesh, laid: Assignments, out: Outcome,
        unsettled: list[Unsettled],
    ) -> list[Decisions]:  # fmt: skip
        """Solve programs, the least bound first; the states that were too much for a tier."""
        full: list[Decisions] = []
        out.spent += len(todo) // 4
        rows = [(row.bound_ps, i) for i, row in enumerate(todo)]
        for bound, i in sorted(rows):
            if out.best and bound >= self._below(out.best, mesh):
                break
            for row in self._worth(todo[i], out):
                if not self._solve(row, laid, out, unsettled):
                    full.append(self._state(row.decisions))
        return full

    def _programs(
        self, step: Step, d: Decisions, problem: StageProblem, out: Outcome
    ) -> Iterator[Program]:
        """The stage programs of a schedule that may have a solution: as layers are recomputed in
        part by default, and where memory surely binds as they may be otherwise."""
        below = self._below(out.best, d) if out.best else ENDLESS
        fits = not self._is_hopeless(problem, out)
        eased = fits and forced_ps(problem) == 0
        below_too = "activations" in d.tiers
        others = eased and not below_too and bool(self.keeps(d.tp, d.sequence_parallel))
        if fits:  # a bound that memory forces would leave out the others, of which it says nothing
            least = lower_bound_ps(problem) if others else bound_ps(problem, below)
            yield Program(
                bound_ps=least, decisions=d, problem=problem, step=step if others else None
            )
        if not eased or below_too:
            yield from self._kept_otherwise(step, d, problem, below)

    def _kept_otherwise(
        self, step: Step, d: Decisions, problem: StageProblem, below: int
    ) -> Iterator[Program]:
        found = self.kept_otherwise(step, d, problem)
        rows = [(made, other) for made, other in found if not surely_infeasible(other)]
        easiest = easiest_of([other for _, other in rows]) if len(rows) > 1 else None
        if easiest is not None and bound_ps(easiest, below) >= below:  # mostly all at once
            return
        for made, other in rows:
            yield Program(bound_ps=bound_ps(other, below), decisions=made, problem=other)

    def _eased(self, row: Program, out: Outcome) -> Iterator[Program]:
        """Of a solved program whose bound has no recomputation in it: the same with other sets
        that layers may keep, if without a limit to memory it were better than the best."""
        best = out.best
        below = self._below(best, row.decisions) if best else ENDLESS
        if row.step is None or row.bound_ps >= below:
            return
        others = self._kept_otherwise(row.step, row.decisions, row.problem, below)
        first = next(others, None)  # more are bounded if there is a use for them
        if first is None:
            return
        if best is not None and row.problem.chunks == 1:
            out.solved += 1
            out.spent += 1
            if solve(unlimited(row.problem), incumbent_ps=below).status == "CUTOFF":
                return
        for other in itertools.chain((first,), others):
            if out.best is None or other.bound_ps < self._below(out.best, row.decisions):
                yield other

    def _worth(self, row: Program, out: Outcome) -> Iterator[Program]:
        """A program and what it stands for with other sets that layers may keep, as far as they
        are worth solving."""
        d, best = row.decisions, out.best
        if row.step is None or best is None or not self.keeps(d.tp, d.sequence_parallel):
            yield row
            yield from self._eased(row, out)
            return
        below, free = self._below(best, d), unlimited(row.problem)
        if self._barred(free, below):  # nothing is better without a limit to memory: with no set
            return
        if row.problem.chunks > 1 and self._barred(row.problem, below):
            others = list(self._eased(row, out))  # mostly none: what is refuted so takes longer
            if others and not self._refuted(free, below, out):
                yield from others
        elif not self._refuted(free, below, out):
            yield row
            yield from self._eased(row, out)

    def _solve(
        self, row: Program, laid: Assignments, out: Outcome, unsettled: list[Unsettled]
    ) -> bool:
        """Solve a stage program; note it if its bound stays below what was found. False where what
        was found is too much for a tier."""
        d, problem = row.decisions, row.problem
        best = self._below(out.best, d) if out.best else None
        if best is not None and self._refuted(problem, best, out):
            return True
        found, over = solve(problem, incumbent_ps=best), None
        out.solved += 1
        out.spent += 1 if d.keep != self.kept else 1 + d.pp * d.virtual_stages // 8
        if found.status == "INFEASIBLE":
            assert found.nearest is not None
            if problem.chunks > 1:  # layers were moved about before that was said
                out.spent += d.pp * d.virtual_stages // 2
            self._note_misfit(row, found.nearest, laid, out)
        elif found.status != "CUTOFF":
            over = self._keep(row, found, laid, out)
        open_parts = [(problem, found)]
        if over is not None and problem.rooms:  # it fits alone, not with those beside it
            out.solved += 1
            out.spent += 1
            less = solve(with_sure_rooms(problem), incumbent_ps=best)
            if less.stages:
                self._keep(row, less, laid, out)
            open_parts = self._by_parts(row, found, laid, out)
        elif found.status == "OPTIMAL" or (found.status == "INFEASIBLE" and refutes(problem)):
            open_parts = []
        best = self._below(out.best, d) if over is not None and out.best else best
        for n, (part, left) in enumerate(open_parts):  # each was solved: no two have one order
            proved = max(row.bound_ps, _proved(part, left))
            if best is None or proved < best:
                unsettled.append(Unsettled(
                    bound=self._score(proved, d), bound_ps=proved, order=out.solved - n,
                    decisions=d, assignments=laid, problem=part, stages=left.stages,
                ))  # fmt: skip
        return over is None

    def _by_parts(
        self, row: Program, found: StageSolution, laid: Assignments, out: Outcome
    ) -> list[tuple[StageProblem, StageSolution]]:
        """Solve a program in parts whose best choice is too much for a tier that stages share, the
        least bound first; what is not settled of it."""
        left, done = [(found.bound_ps, 0, row.problem, found)], []
        for _ in range(MOST_PARTS):
            if not left or (out.best and left[0][0] >= self._below(out.best, row.decisions)):
                break
            _, _, problem, whole = heapq.heappop(left)
            parts = self._parts(row.decisions, problem, whole, laid)
            if not parts:
                done.append((problem, whole))
            for part in parts:
                best = self._below(out.best, row.decisions) if out.best else None
                out.solved += 1
                out.spent += 1
                one = solve(part, incumbent_ps=best)
                over = bool(one.stages) and self._keep(
                    replace(row, problem=part), one, laid, out
                ) is not None  # fmt: skip
                if over:
                    heapq.heappush(left, (one.bound_ps, out.solved, part, one))
                elif one.status == "FEASIBLE" or (
                    one.status == "INFEASIBLE" and not refutes(part)
                ):
                    done.append((part, one))
        return [*done, *((problem, whole) for _, _, problem, whole in left)]

    def _parts(
        self, d: Decisions, problem: StageProblem, found: StageSolution, laid: Assignments
    ) -> list[StageProblem]:
        """Of a program whose choice is too much for a tier: parts without it."""
        cut = decided(named(d, problem, found.below), found.stages, found.recompute)
        step = self.costs.step(d if problem.lowered is None else cut, laid)
        by_rank = laid_by_rank([step] * d.pp, cut, problem)
        return parts_of(problem, d, self.costs.cluster, by_rank)

    def _keep(
        self, row: Program, found: StageSolution, laid: Assignments, out: Outcome
    ) -> TierUse | None:
        """Take a solution for the best, unless a tier is too full for it, which is returned."""
        d, problem = row.decisions, row.problem
        cut = decided(named(d, problem, found.below), found.stages, found.recompute)
        over = self._overfull(cut, d, problem, laid)
        if over is None:
            out.best = Tried(
                decisions=cut, assignments=laid, objective_ps=found.step_ps, gain_ppm=self.gain_ppm
            )
        else:
            out.full = less_over(out.full, over)
        return over

    def _overfull(
        self, cut: Decisions, d: Decisions, problem: StageProblem, laid: Assignments
    ) -> TierUse | None:
        """A tier below that is too full for a plan, if one is."""
        if not cut.offload:
            return None
        step = self.costs.step(d if problem.lowered is None else cut, laid)
        return next((use for use in self.tier_uses(step, cut, problem) if not use.fits), None)

    def _note_misfit(
        self, row: Program, nearest: Nearest, laid: Assignments, out: Outcome
    ) -> None:
        """A program has no solution: what is nearest to one, or the tier that is too full."""
        d, problem = row.decisions, row.problem
        cut = decided(named(d, problem), nearest.stages, nearest.recompute)
        out.misfits += 1
        if nearest.overflow_bytes > 0 or not problem.rooms:
            out.misfit = nearer(
                out.misfit, Misfit(decisions=cut, assignments=laid, nearest=nearest)
            )
            return
        over = self._overfull(cut, d, problem, laid)
        if over is not None:
            out.full = less_over(out.full, over)

    def _refuted(self, problem: StageProblem, best: int, out: Outcome) -> bool:
        """Whether a few linear programs show that a program with several stages a rank has nothing
        better, or what they showed of others does: cheaper than to solve it. At first without a
        limit to memory: that says something of others. One whose layers may be lowered has nothing
        better where they are for nothing."""
        if self._barred(problem, best):
            return True
        if problem.lowered is not None:
            out.solved += 1
            out.spent += 1
            easier = freely_lowered(problem)
            found = solve(easier, incumbent_ps=best)
            return found.bound_ps >= best and (found.nearest is None or refutes(easier))
        if problem.chunks == 1 or not applies(problem):
            return False
        free = unlimited(problem)
        if self._known.promising(free, best) and self._planes(free, best, out):
            return True
        return free != problem and self._planes(problem, best, out)

    def _barred(self, problem: StageProblem, best: int) -> bool:
        """As `_refuted`, by what takes no program."""
        return self._known.covers(problem, best) or bound_ps(problem, best) >= best

    def _planes(self, problem: StageProblem, best: int, out: Outcome) -> bool:
        paths, free = self._shapes.of(problem), problem.capacity_bytes == UNLIMITED
        most = PROBE if free and paths.useful else FIRST
        effort = Effort(programs=most)
        refuted = refute(problem, best, paths, effort).refuted
        out.spent += 1 + (most - effort.programs) * problem.count // 256
        if refuted:
            self._known.add(problem, best)
        elif free:
            self._known.failed(problem, best)
        return refuted

    def _may_fit(self, d: Decisions, step: Step, out: Outcome) -> bool:
        """Whether a state may fit; where none was found that does, the closest are kept."""
        again, capacity = self.pins.recompute, self.capacity_bytes
        recomputes = again is None or any((*again.full, *again.selective))
        recomputes |= d.moved is not None  # half is on the host
        steps = (step, *step.beside)
        self._over[_state_key(d)] = min(map(state_bytes, steps)) > capacity
        least = min(least_bytes(one, recomputes=recomputes) for one in steps)
        if d.tp_by_part:  # what is apart from layers differs as well: a rank has the least
            apart = [sum(size for _, size in one.reserved) for one in steps]
            least -= max(apart) - min(apart)
        if least > capacity and out.best is None:
            out.note_closest(least, out.expanded, d)
        return least <= capacity

    def seen_over(self, meshes: Sequence[Mesh], out: Outcome) -> None:
        """Weigh states of which an earlier search, of a recipe, has seen that they are too much:
        this one left them out, and had no other."""
        seen = (
            d for mesh in meshes for d in self.variants(mesh) if self._over.get(_state_key(d))
        )
        for d in itertools.islice(seen, CLOSEST):
            self._may_fit(d, self.costs.step(d, self.assign(d.tp, d.sequence_parallel)), out)

    def weigh_closest(self, out: Outcome) -> None:
        """The nearest misfit among the states that hold least beside those whose programs were
        solved: none of these need be near."""
        for least, _, d in out.closest:
            if out.misfit and least - self.capacity_bytes >= out.misfit.nearest.overflow_bytes:
                continue
            laid = self.assign(d.tp, d.sequence_parallel)
            made = next(self.schedules(d), None)
            if made is None:
                continue
            near = solve(self.problem(self.costs.step(d, laid), made)).nearest
            if near is not None:
                nearest = decided(made, near.stages, near.recompute)
                out.misfit = nearer(
                    out.misfit, Misfit(decisions=nearest, assignments=laid, nearest=near)
                )


def _proved(problem: StageProblem, found: StageSolution) -> int:
    """What a solved program has no choice below, picoseconds."""
    least = bound_ps(problem)
    return least if found.status == "INFEASIBLE" else max(least, found.bound_ps)


def _state_key(d: Decisions) -> tuple[object, ...]:
    """What the bytes of a mesh's state depend on: not its schedule nor the size of its batches."""
    axes = (d.pp, d.dp, d.cp, d.tp, d.ep, d.etp, d.dp_outer, d.sequence_parallel, d.tp_by_part)
    return (*axes, d.zero, d.shard, d.reshard, d.offload, d.microbatches == 1)
