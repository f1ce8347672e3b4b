"""The search: most promising mesh first, until no bound beats the incumbent.

For each mesh, the ways to hold its state (ZeRO stage, shard size, offload) and its schedules are
tried, dominated ones left out, and the stage program solved. A mesh whose lower bound does not
beat the incumbent is not tried; the least bound of what is left is the proof, or the gap.
"""

from __future__ import annotations

import functools
import itertools
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from cost_models.decisions import Decisions
from cost_models.estimate import stage_problem
from cost_models.layout import Assignment, expert_parameters
from cost_models.schedule import SPLIT_BACKWARD
from cost_models.stage_problem import Nearest, StageProblem
from cost_models.step import Assignments, Costs, Step, replicated
from cost_models.work import Axes
from ir.errors import UsageError
from ir.graph import full_name
from planner.bounds import Bounds, mesh_bounds_ps
from planner.decisions import Pins
from planner.legality import illegal
from planner.mesh import Mesh, divisors, meshes, outside
from planner.names import matches
from planner.room import least_bytes, state_bytes
from planner.runnable import GraphRule, refusals, whole_recomputation_fault
from planner.sharding import best_assignment
from planner.stages import certify, lower_bound_ps, refutes, solve, surely_infeasible

MOST_VIRTUAL_STAGES = 8
DEFAULT_EFFORT = 2_500  # a stage program counts one, and one for every 8 stages; a mesh one, if
# its state may fit, and one for every 4 programs it has: some 6 s
AXIS_MUST_EARN = 50  # each axis beside data parallelism must earn 1/50 of the step: the model's
# error is several times that, and a plan with fewer axes is simpler to run and to trust
MISFITS = 40  # programs that are weighed for the nearest misfit, where nothing fits
CLOSEST = 3  # and so many where none comes near: the least over by what they hold at least
CERTIFIED = 3  # finalists that CP-SAT bounds at most, about a second each
SHARD_SPREADS = (1, 2, 4, 8)  # HSDP: shard groups of so many whole domains, beside all ranks
SEARCHED_SCHEDULES = ("1f1b", "interleaved", "gpipe", "zbh1", "zbv", "dualpipev")


def axes_used(mesh: Mesh | Decisions) -> int:
    """How many axes there are beside data parallelism: pp, tp, cp, experts."""
    return sum((mesh.pp > 1, mesh.tp > 1, mesh.cp > 1, max(mesh.ep, mesh.etp) > 1))


def score_of(objective_ps: int, mesh: Mesh | Decisions) -> int:
    """What plans are ordered by: the step, with what its axes must earn."""
    return objective_ps * (AXIS_MUST_EARN + axes_used(mesh)) // AXIS_MUST_EARN


def objective_below(score: int, mesh: Mesh | Decisions) -> int:
    """The least objective whose score is not below `score`."""
    weight = AXIS_MUST_EARN + axes_used(mesh)
    return -(-AXIS_MUST_EARN * score // weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """The best found. objective_ps: without host overhead and jitter, which every mesh shares."""

    decisions: Decisions
    assignments: Assignments
    objective_ps: int

    @property
    def score(self) -> int:
        return score_of(self.objective_ps, self.decisions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """The mesh that overflows the least, where none fits."""

    decisions: Decisions
    assignments: Assignments
    nearest: Nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsettled:
    """A stage program that was not proved: its bound as a score and as an objective."""

    bound: int
    bound_ps: int
    order: int
    decisions: Decisions
    problem: StageProblem


@dataclass(kw_only=True)
class Outcome:
    """What a search found. bound: no plan of the space has a score below it."""

    best: Tried | None = None
    misfit: Misfit | None = None
    closest: list[tuple[int, int, Decisions]] = field(default_factory=list)  # bytes, order, state
    bound: int = 0
    meshes: int = 0
    expanded: int = 0  # meshes tried; solved: stage programs
    solved: int = 0
    spent: int = 0
    misfits: int = 0
    interrupted: bool = False

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
        return min(self.best.objective_ps, objective_below(self.bound, self.best.decisions))


@dataclass(kw_only=True)
class Searcher:
    """One model on one cluster under pins; keeps what searches share (costs, assignments)."""

    costs: Costs
    pins: Pins = field(default_factory=Pins)
    progress: Callable[[str], None] | None = None
    effort: int = DEFAULT_EFFORT
    _laid: dict[tuple[int, bool], Assignments] = field(default_factory=dict)
    _over: dict[tuple[object, ...], bool] = field(default_factory=dict)  # state alone is too much

    def assign(self, tp: int, split: bool) -> Assignments:
        """How every unit lies on tp: solved once, at one sample of the whole sequence."""
        if (tp, split) not in self._laid:
            self._laid[tp, split] = self._lay(tp, split)
        return self._laid[tp, split]

    def _lay(self, tp: int, split: bool) -> Assignments:
        costs, found = self.costs, {}
        axes = Axes(tp=tp, sequence_parallel=split)
        owners = dict(costs.graph.tied)
        tied: dict[str, int] = {}  # full name of a shared parameter -> its placement
        shared = {*owners.values(), *self._read_twice()}
        for unit, is_layer, _ in costs.kinds:
            if tp == 1:
                found[unit, is_layer] = replicated(unit, 1)
                continue
            paths = [k.path for k in costs.chain.links if k.unit is unit]
            placed = _pinned_places(self.pins, unit, paths)
            for p in unit.parameters:
                full = full_name(paths[0], p.name)
                if owners.get(full, full) in tied:
                    placed[p.name] = tied[owners.get(full, full)]
            laid = best_assignment(costs, unit, is_layer, axes, 1, 1, placed=placed)
            found[unit, is_layer] = laid
            for node, option in zip(unit.nodes, laid.chosen):
                for ref, at in zip(node.inputs, option.ins):
                    if full_name(paths[0], ref) in shared:
                        tied.setdefault(full_name(paths[0], ref), at)
        return found

    def _read_twice(self) -> set[str]:
        """Full names of parameters that several units hold: their placements must agree."""
        counts = Counter(
            full_name(link.path, p.name)
            for link in {k.path: k for k in self.costs.chain.links}.values()
            for p in link.unit.parameters
        )
        return {name for name, count in counts.items() if count > 1}

    def under(self, pins: Pins) -> Searcher:
        """The same model and costs under other pins."""
        laid = self._laid if pins.place == self.pins.place else {}
        over = self._over if pins.place == self.pins.place else {}
        return Searcher(
            costs=self.costs, pins=pins, effort=self.effort, _laid=laid, _over=over
        )

    # --- the space ---------------------------------------------------------------------------

    def variants(self, mesh: Mesh) -> Iterator[Decisions]:
        """Every way to hold a mesh's state that the table allows, simplest first."""
        pins, engine = self.pins, self.costs.engine
        base = Decisions(
            pp=mesh.pp, dp=mesh.dp, cp=mesh.cp, tp=mesh.tp, ep=mesh.ep, etp=mesh.etp,
            micro_batch=mesh.micro_batch, microbatches=mesh.microbatches,
            sequence_parallel=mesh.sequence_parallel, cp_kind=mesh.cp_kind,
            compile=engine.fused,
            grad_dtype=pins.grad_dtype or engine.grad_dtype,
        )  # fmt: skip
        ranks = mesh.dp * mesh.cp
        outers = outside(mesh, self.costs.cluster, pins.dp_outer)
        zeros = (0, 1, 2, 3) if pins.zero is None else (pins.zero,)
        for zero, outer in itertools.product(zeros, outers):
            for shard in self._shards(mesh, zero, outer):
                for reshard in (False, True) if zero == 3 and mesh.pp == 1 else (False,):
                    if pins.reshard not in (None, reshard):
                        continue
                    for offload in self._offloads():
                        d = replace(
                            base, zero=zero, shard=shard, reshard=reshard, offload=offload,
                            dp_outer=outer,
                        )  # fmt: skip
                        alone = zero > 0 and shard == 1 < ranks and pins.zero is None
                        if not alone and not illegal(
                            d, self.costs.workload, scheduled=False
                        ):
                            yield d

    def runs(self, mesh: Mesh | Decisions) -> bool:
        """Whether the engine can run the model so, where the engine is our own runtime."""
        recompute = self.pins.recompute
        if recompute is not None and any(recompute.full) and mesh.tp > 1 and self._never_whole:
            return False
        return not any(rule.applies(mesh) for rule, _ in self._refused)

    @functools.cached_property
    def _refused(self) -> tuple[tuple[GraphRule, str], ...]:
        costs = self.costs
        return refusals(costs.graph, costs.workload, costs.engine.fused)

    @functools.cached_property
    def _never_whole(self) -> bool:
        """Whether no unit may be computed again whole under tp."""
        costs = self.costs
        fault = whole_recomputation_fault(costs.graph, costs.workload, costs.engine.fused)
        return fault is not None

    def _shards(self, mesh: Mesh, zero: int, outer: int) -> tuple[int, ...]:
        ranks, near = mesh.dp * mesh.cp, mesh.dp * mesh.cp // outer
        nested = [s for s in divisors(ranks)[::-1] if near % s == 0 or s % near == 0]
        if self.pins.shard is not None:
            return (self.pins.shard,) if self.pins.shard in nested else ()
        if zero == 0:
            return (1,)
        cluster = self.costs.cluster
        inside = max(1, cluster.domain_ranks // mesh.tp)
        spreads = {inside * k for k in SHARD_SPREADS}
        spreads |= {cluster.spans[-2] // mesh.tp}
        if outer > 1:  # laid apart to keep shards together, or where no shards are apart
            spreads = {near}
        return tuple(s for s in nested if s == ranks or s in spreads)

    def _offloads(self) -> tuple[tuple[tuple[str, str], ...], ...]:
        if self.pins.offload is not None:
            return (self.pins.offload,)
        tiers = [t.name for t in self.costs.cluster.tiers]
        return ((), (("optimizer", "cpu"),)) if "cpu" in tiers else ((),)

    @functools.cached_property
    def _schedules(self) -> tuple[str, ...]:
        """The schedules that are searched: of the engine's those that it runs compiled, if it
        compiles."""
        if self.pins.schedule is not None:
            return (self.pins.schedule,)
        engine = self.costs.engine
        runs = engine.compiled_schedules if engine.fused else engine.schedules
        return tuple(name for name in SEARCHED_SCHEDULES if name in runs)

    def schedules(self, d: Decisions) -> Iterator[Decisions]:
        """The same state under every schedule and number of virtual stages."""
        layers = len(self.costs.chain.layers)
        names = self._schedules if d.pp > 1 else (self.pins.schedule or "1f1b",)
        for name in names:
            if name == "interleaved":
                most = min(MOST_VIRTUAL_STAGES, layers // d.pp)
                counts: tuple[int, ...] = tuple(range(2, most + 1))
            else:
                counts = (2,) if name in ("zbv", "dualpipev") else (1,)
            if self.pins.virtual_stages is not None:
                counts = (self.pins.virtual_stages,)
            for v in counts:
                made = replace(d, schedule=name, virtual_stages=v)
                pinned = self.pins.stages
                if pinned is not None and len(pinned) != d.pp * v:
                    continue
                if d.pp * v <= layers and illegal(made, self.costs.workload) is None:
                    yield made

    def problem(self, step: Step, d: Decisions) -> StageProblem:
        """The stage program of a mesh under one schedule, with the pins it has to keep."""
        pins = self.pins
        fixed = None
        if pins.recompute is not None:
            r, count = pins.recompute, d.pp * d.virtual_stages
            fixed = tuple(
                (r.full[k % len(r.full)], r.selective[k % len(r.selective)])
                for k in range(count)
            )
        levels: tuple[str, ...] = ("none", "selective", "full")
        if d.schedule in SPLIT_BACKWARD or "activations" in dict(d.offload):
            levels = ("none",)
        elif d.tp > 1 and self._never_whole:
            levels = ("none", "selective")
        return stage_problem(
            self.costs, self.costs.rescheduled(step, d), fixed_stages=pins.stages,
            fixed_recompute=fixed, levels=levels,
        )  # fmt: skip

    def bounds(
        self, candidates: Sequence[Mesh], below: Sequence[int] | None = None
    ) -> Bounds:
        """Of every mesh a lower bound of its objective, and a guess at it. below: bounds are not
        sharpened beyond these."""
        return mesh_bounds_ps(
            self.costs, candidates, self.assign, most_virtual=MOST_VIRTUAL_STAGES,
            schedules=self._schedules, pins=self.pins, below=below,
        )  # fmt: skip

    # --- the search --------------------------------------------------------------------------

    def run(self, incumbent: Tried | None = None) -> Outcome:
        """Most promising first, by guess; bounds prune. incumbent: a plan of the space."""
        costs = self.costs
        found = meshes(costs.chain, costs.cluster, costs.workload, self.pins)
        candidates = [m for m in found if self.runs(m)]
        out = Outcome(best=incumbent, meshes=len(candidates))
        if not candidates:
            return out
        below = [objective_below(out.best.score, c) for c in candidates] if out.best else None
        bounds = self.bounds(candidates, below)
        lower = [score_of(int(b), m) for b, m in zip(bounds.lower_ps, candidates)]
        guess = [score_of(int(g), m) for g, m in zip(bounds.guess_ps, candidates)]
        order = sorted(range(len(candidates)), key=lambda i: (guess[i], lower[i], i))
        left = sorted(lower)[::-1]  # of meshes not tried; those tried are crossed out
        tried: Counter[int] = Counter()
        unsettled: list[Unsettled] = []  # tried, with a bound below what was found
        with _interruptible() as stopped:
            for i in order:
                if out.best and lower[i] >= out.best.score:
                    continue
                if stopped() or out.spent >= self.effort:
                    out.interrupted = stopped()
                    break
                self._expand(candidates[i], out, unsettled)
                out.expanded += 1
                tried[lower[i]] += 1
                while left and tried[left[-1]]:
                    tried[left.pop()] -= 1
                self._report(out, min([*left[-1:], *(u.bound for u in unsettled)], default=0))
        if out.best is None and out.misfit is None:
            self._weigh_closest(out)
        if not out.interrupted:
            self._certify(out, unsettled, left[-1] if left else 1 << 62)
        rest = [*left[-1:], *(u.bound for u in unsettled)]
        out.bound = min([*rest, out.best.score if out.best else 1 << 62])
        return out

    def _certify(self, out: Outcome, unsettled: list[Unsettled], untried: int) -> None:
        """Raise the bounds of finalists by CP-SAT, least first, while that raises the whole."""
        for _ in range(CERTIFIED):
            weakest = min(unsettled, key=lambda u: (u.bound, u.order), default=None)
            if not out.best or not weakest or weakest.bound >= min(untried, out.best.score):
                return
            unsettled.remove(weakest)
            known = solve(weakest.problem)
            if known.status not in ("OPTIMAL", "FEASIBLE"):
                continue
            proved = max(known.bound_ps, certify(weakest.problem, incumbent_ps=known.step_ps))
            if proved > weakest.bound_ps:
                score = score_of(proved, weakest.decisions)
                unsettled.append(replace(weakest, bound=score, bound_ps=proved))
            else:
                unsettled.append(weakest)
                return

    def _report(self, out: Outcome, bound: int) -> None:
        if self.progress and out.best:
            best = out.best.score
            step = out.best.objective_ps / 1e12
            gap = max(0.0, (best - bound) / best)
            self.progress(
                f"solving: best {step:.3f} s, bound {step * (1 - gap):.3f} s, gap {gap:.1%}"
            )

    def _expand(self, mesh: Mesh, out: Outcome, unsettled: list[Unsettled]) -> None:
        """Solve a mesh's variants; note those whose bound is below what was found."""
        laid = self.assign(mesh.tp, mesh.sequence_parallel)
        ways = [d for d in self.variants(mesh) if not self._over.get(_state_key(d))]
        made_steps = [(d, self.costs.step(d, laid)) for d in ways]
        steps = _undominated([row for row in made_steps if self._may_fit(*row, out)])
        todo: list[tuple[int, int, Decisions, StageProblem]] = []
        for d, step in steps:
            for made in self.schedules(d):
                problem = self.problem(step, made)
                if (out.best or out.misfits >= MISFITS) and surely_infeasible(problem):
                    continue
                todo.append((lower_bound_ps(problem), len(todo), made, problem))
        out.spent += bool(ways) + len(todo) // 4
        for bound, _, d, problem in sorted(todo, key=lambda row: row[:2]):
            best = objective_below(out.best.score, mesh) if out.best else None
            if best is not None and bound >= best:
                break
            found = solve(problem, incumbent_ps=best)
            out.solved += 1
            out.spent += 1 + d.pp * d.virtual_stages // 8
            if found.status == "INFEASIBLE":
                assert found.nearest is not None
                if problem.chunks > 1:  # layers were moved about before that was said
                    out.spent += d.pp * d.virtual_stages // 2
                out.misfits += 1
                out.misfit = _nearer(out.misfit, Misfit(
                    decisions=replace(d, stages=found.nearest.stages,
                                      recompute=found.nearest.recompute),
                    assignments=laid, nearest=found.nearest,
                ))  # fmt: skip
            elif found.status != "CUTOFF":
                out.best = Tried(
                    decisions=replace(d, stages=found.stages, recompute=found.recompute),
                    assignments=laid, objective_ps=found.step_ps,
                )  # fmt: skip
            settled = found.status == "OPTIMAL" or (
                found.status == "INFEASIBLE" and refutes(problem)
            )
            proved = bound if found.status == "INFEASIBLE" else found.bound_ps
            if not settled and (best is None or proved < best):
                unsettled.append(Unsettled(
                    bound=score_of(proved, mesh), bound_ps=proved,
                    order=out.solved, decisions=d, problem=problem,
                ))  # fmt: skip


    def _may_fit(self, d: Decisions, step: Step, out: Outcome) -> bool:
        """Whether a state may fit; where none was found that does, the closest are kept."""
        again, capacity = self.pins.recompute, self.costs.cluster.device.memory_bytes
        recomputes = again is None or any((*again.full, *again.selective))
        self._over[_state_key(d)] = state_bytes(step) > capacity
        least = least_bytes(step, recomputes=recomputes)
        if least > capacity and out.best is None:
            out.closest = sorted([*out.closest, (least, out.expanded, d)], key=lambda r: r[:2])
            del out.closest[CLOSEST:]
        return least <= capacity

    def _weigh_closest(self, out: Outcome) -> None:
        """The nearest misfit, where no program was worth solving."""
        for _, _, d in out.closest:
            laid = self.assign(d.tp, d.sequence_parallel)
            made = next(self.schedules(d), None)
            if made is None:
                continue
            near = solve(self.problem(self.costs.step(d, laid), made)).nearest
            if near is not None:
                decided = replace(made, stages=near.stages, recompute=near.recompute)
                out.misfit = _nearer(
                    out.misfit, Misfit(decisions=decided, assignments=laid, nearest=near)
                )


def _state_key(d: Decisions) -> tuple[object, ...]:
    """What the bytes of a mesh's state depend on: not its schedule nor the size of its batches."""
    axes = (d.pp, d.dp, d.cp, d.tp, d.ep, d.etp, d.dp_outer, d.sequence_parallel)
    return (*axes, d.zero, d.shard, d.reshard, d.offload, d.microbatches == 1)


def _nearer(old: Misfit | None, new: Misfit) -> Misfit:
    if old and old.nearest.overflow_bytes <= new.nearest.overflow_bytes:
        return old
    return new


def _pinned_places(pins: Pins, unit, paths: list[str]) -> dict[str, int]:  # type: ignore[no-untyped-def]
    """Pinned placements of a unit's parameters, by relative name."""
    from cost_models.layout import placement

    placed: dict[str, int] = {}
    for p in unit.parameters:
        for pattern, words in pins.place:
            hits = [matches(pattern, full_name(path, p.name)) for path in paths]
            if any(hits) and not all(hits):
                raise UsageError(
                    f"--fix place:{pattern}={words}: layers of one class lie alike",
                    why=f"it names {sum(hits)} of {len(hits)} alike",
                    hints=(f"place:{full_name(paths[0], p.name)} and all like it",),
                )
            if any(hits):
                if p.name in expert_parameters(unit):
                    raise UsageError(
                        f"--fix place:{pattern}={words}: expert weights lie over ep and etp",
                        hints=("--fix ep=... etp=...",),
                    )
                placed[p.name] = placement(words)
    return placed


def _profile(step: Step) -> tuple[int, ...]:
    """What a variant costs and holds, each number better when smaller."""
    numbers: list[int] = [sum(size for _, size in step.reserved), step.p2p_ps]
    slow = step.slow_sends or ((0, 0),) * step.decisions.pp
    numbers += [number for boundary in slow for number in boundary]
    for r in step.rows:
        s = r.state
        numbers += [
            r.forward_ps, r.backward_ps, r.tail_comm_ps, -r.tail_hide_ps,
            r.floor_ps + r.optimizer_ps + r.offload_ps,
            s.parameter_bytes + s.gradient_bytes + s.optimizer_bytes, s.gathered_bytes,
        ]  # fmt: skip
    return tuple(numbers)


def _undominated(found: list[tuple[Decisions, Step]]) -> list[tuple[Decisions, Step]]:
    """Variants that no other is at least as good as in every number, the first of equals."""
    kept: list[tuple[tuple[int, ...], tuple[Decisions, Step]]] = []
    for d, step in found:
        mine = _profile(step)
        if any(all(a <= b for a, b in zip(theirs, mine)) for theirs, _ in kept):
            continue
        kept = [row for row in kept if not all(a <= b for a, b in zip(mine, row[0]))]
        kept.append((mine, (d, step)))
    return [row for _, row in kept]


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the search to stop; a second one stops the program."""
    asked: list[bool] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: nothing to catch there
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


__all__ = ["Assignment", "Outcome", "Searcher", "Tried"]
