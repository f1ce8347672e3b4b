"""The space that is searched: of a mesh every way to hold its state, every schedule, and the
stage program of each; and how each unit lies on tp, which they share."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cost_models.decisions import Decisions, Keep
from cost_models.estimate import stage_problem
from cost_models.formats import Formats
from cost_models.hardware import Cluster
from cost_models.layout import expert_parameters, placement, produced
from cost_models.mixed import sides_of
from cost_models.rank_ledger import tier_uses
from cost_models.rooms import with_binding
from cost_models.schedule import SPLIT_BACKWARD, schedule_illegal
from cost_models.stage_problem import ALL_AGAIN, OPEN, PairPin, StageProblem
from cost_models.step import Assignments, Costs, Step, replicated
from cost_models.tiers import TierUse
from cost_models.work import Axes
from ir.errors import InfeasibleError, PlanError, UsageError
from ir.graph import Unit, full_name
from planner.classic import classic_places
from planner.decisions import Pins
from planner.formats import format_ways
from planner.keep_checks import pinned_keep
from planner.keeps import keep_sets
from planner.legality import Case, case_of, illegal, refusal
from planner.mesh import Mesh, meshes, outside, shard_sizes
from planner.names import matches, may_end
from planner.offloads import (
    HOST,
    beside_host,
    counts_layers,
    counts_state,
    grad_dtypes,
    off_host,
    offloads,
)
from planner.runnable import GraphRule, refusals, whole_recomputation_fault
from planner.sharding import best_assignment

MOST_VIRTUAL_STAGES = 8
SEARCHED_SCHEDULES = ("1f1b", "interleaved", "gpipe", "zbh1", "zbv", "dualpipev")


@dataclass(kw_only=True)
class Space:
    """The plans of one model on one cluster that keep the pins."""

    costs: Costs
    pins: Pins = field(default_factory=Pins)
    formats: Formats = ()  # of the plans looked at now: one of `format_ways`
    _laid: dict[tuple[int, bool, bool], Assignments] = field(default_factory=dict)
    _keeps: dict[tuple[int, bool, Formats], tuple[Keep, ...]] = field(default_factory=dict)

    def assign(self, tp: int, split: bool) -> Assignments:
        """How every unit lies on tp: solved once, at one sample of the whole sequence."""
        key = (tp, split, False)
        if key not in self._laid:
            self._laid[key] = self._lay(tp, split)
        return self._laid[key]

    def assign_classic(self, tp: int, split: bool) -> Assignments:
        """The same with the matrices of layers as engines have them, where no pin says otherwise;
        empty where the model is not read so, or does not divide so."""
        key = (tp, split, True)
        if key not in self._laid:
            self._laid[key] = self._lay_classic(tp, split)
        return self._laid[key]

    def _lay_classic(self, tp: int, split: bool) -> Assignments:
        place = (*self._classic_places, *self.pins.place)
        pinned = replace(self, pins=replace(self.pins, place=place), _laid={})
        if not self._classic_places:
            return {}
        try:
            own = self.assign(tp, split)
            return own if pinned.lies_so(own) else pinned.assign(tp, split)
        except InfeasibleError:
            return {}

    def lies_so(self, laid: Assignments) -> bool:
        """Whether units laid so keep the pins."""
        for (unit, _), a in laid.items():
            paths = [k.path for k in self.costs.chain.links if k.unit is unit]
            at = produced(unit, a)
            if any(at[name] != to for name, to in _pinned_places(self.pins, unit, paths).items()):
                return False
        return True

    @functools.cached_property
    def _classic_places(self) -> tuple[tuple[str, str], ...]:
        try:
            return classic_places(self.costs.graph)
        except PlanError:  # no transformer: engines have no layout of it
            return ()

    @functools.cached_property
    def kept(self) -> Keep:
        """What layers keep in part unless another set is tried: by default, or as pinned."""
        return pinned_keep(self.pins.keep or (), self.costs.graph)

    def keeps(self, tp: int, split: bool) -> tuple[Keep, ...]:
        """What layers may keep in part other than by default; none where that is pinned."""
        if self.pins.keep is not None:
            return ()
        key = (tp, split, self.formats)
        if key not in self._keeps:
            self._keeps[key] = keep_sets(self.costs, *key, self.assign(tp, split))
        return self._keeps[key]

    def kept_otherwise(
        self, step: Step, d: Decisions, problem: StageProblem
    ) -> Iterator[tuple[Decisions, StageProblem]]:
        """The stage program of a schedule once more for each other set that layers may keep: of
        those that keep it below by a pin, nothing but where they begin."""
        again = self.pins.recompute
        if "activations" in d.tiers:
            whole = again is None and self.repeats(d.tp) and d.schedule not in SPLIT_BACKWARD
            if whole and d.moved is None:
                yield d, self._problem(step, d, (ALL_AGAIN,) * problem.count, ("full",))
            return
        if "selective" not in problem.levels or (again and not any(again.selective)):
            return
        laid = self.assign(d.tp, d.sequence_parallel)
        for keep in self.keeps(d.tp, d.sequence_parallel):
            made = replace(d, keep=keep)
            if illegal(made, self.costs.workload) is None:
                yield made, self.problem(self.costs.kept_otherwise(step, made, laid), made)

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

    def format_ways(self) -> tuple[Formats, ...]:
        """Every choice of formats, of which each is searched by itself."""
        return format_ways(self.costs.graph, self.costs.workload, self.pins.formats)

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        """What the plans lie on."""
        return (self.costs.cluster,)

    @property
    def capacity_bytes(self) -> int:
        """The most memory that a GPU has."""
        return max(cluster.device.memory_bytes for cluster in self.clusters)

    def tier_uses(self, step: Step, d: Decisions, problem: StageProblem) -> tuple[TierUse, ...]:
        """What the plan lays below the device, by tier."""
        sides = [(side.cluster, one) for side, one in sides_of(self.costs, step)]
        return tier_uses(sides, d, problem) if d.offload else ()

    def meshes(self) -> Iterator[Mesh]:
        """Every candidate that the pins, the model and the hardware allow."""
        costs = self.costs
        return meshes(costs.chain, costs.cluster, costs.workload, self.pins)

    def variants(self, mesh: Mesh) -> Iterator[Decisions]:
        """Every way to hold a mesh's state that the table allows, simplest first."""
        pins, engine = self.pins, self.costs.engine
        base = Decisions(
            pp=mesh.pp, dp=mesh.dp, cp=mesh.cp, tp=mesh.tp, ep=mesh.ep, etp=mesh.etp,
            micro_batch=mesh.micro_batch, microbatches=mesh.microbatches,
            sequence_parallel=mesh.sequence_parallel, cp_kind=mesh.cp_kind,
            tp_by_part=mesh.tp_by_part, compile=engine.fused, formats=self.formats,
            keep=self.kept, stages=self._known_stages,
        )  # fmt: skip
        outers = outside(mesh, self.costs.cluster, pins.dp_outer)
        zeros = (0, 1, 2, 3) if pins.zero is None else (pins.zero,)
        held = [*itertools.product(
            offloads(pins, *self.clusters), grad_dtypes(pins, engine, *self.clusters)
        )]  # fmt: skip
        for zero, outer in itertools.product(zeros, outers):
            for shard in self.shards(mesh, zero, outer):
                for reshard in (False, True) if zero == 3 and mesh.pp == 1 else (False,):
                    if pins.reshard not in (None, reshard):
                        continue
                    for offload, grad in held:
                        d = replace(
                            base, zero=zero, shard=shard, reshard=reshard, offload=offload,
                            dp_outer=outer, grad_dtype=grad,
                        )  # fmt: skip
                        if not illegal(d, self.costs.workload, scheduled=False):
                            yield d

    @functools.cached_property
    def _known_stages(self) -> tuple[int, ...]:
        """The pinned stages, where it is pinned of how many layers the optimizer lies below."""
        counted = Decisions(offload=self.pins.offload or ()).below is not None
        return (self.pins.stages or ()) if counted else ()

    def runs(self, mesh: Mesh | Decisions) -> bool:
        """Whether the engine can run the model so, where the engine is our own runtime."""
        recompute = self.pins.recompute
        if recompute is not None and any(recompute.full) and not self.repeats(mesh.tp):
            return False
        return not any(rule.applies(mesh) for rule, _ in self._refused)

    @functools.cached_property
    def _refused(self) -> tuple[tuple[GraphRule, str], ...]:
        costs = self.costs
        return refusals(costs.graph, costs.workload, costs.engine.fused)

    def repeats(self, tp: int) -> bool:
        """Whether units may be computed again whole beside such a tp."""
        return tp == 1 or not self._never_whole

    @functools.cached_property
    def _never_whole(self) -> bool:
        """Whether no unit may be computed again whole under tp."""
        costs = self.costs
        fault = whole_recomputation_fault(costs.graph, costs.workload, costs.engine.fused)
        return fault is not None

    def shards(self, mesh: Mesh, zero: int, outer: int) -> tuple[int, ...]:
        """How many data ranks may share the state."""
        return shard_sizes(mesh, self.clusters, self.pins, zero, outer)

    def off_host(self, d: Decisions) -> Iterator[Decisions]:
        """The same with a part of its state on another tier than the host's memory."""
        return off_host(d, self.pins, self.costs.workload.engine, self.costs.cluster)

    def by_count(self, d: Decisions) -> Iterator[Decisions]:
        """The same with activations of so many layers a stage below, on the host first; none where
        that is not searched: what is pinned, and schedules and engines that it does not go with."""
        costs = self.costs
        free = counts_layers(self.pins, costs.cluster, costs.workload.engine)
        if len(self.clusters) > 1 or self.kept or not free:
            return
        for tier in (HOST, *beside_host(costs.cluster)):
            made = replace(d, offload=(*d.offload, ("activations", f"{tier}:")))
            if illegal(made, costs.workload) is None:
                yield made

    def by_layer(self, d: Decisions) -> bool:
        """Whether the optimizer of some layers alone is searched to lie below as here that of all
        does: on one kind of GPUs, by our own runtime, where no pin says otherwise."""
        free = counts_state(self.pins, self.costs.cluster, self.costs.workload.engine)
        return free and len(self.clusters) == 1 and "optimizer" in d.tiers

    @functools.cached_property
    def searched_schedules(self) -> tuple[str, ...]:
        """The schedules that are searched: of the engine's those that it runs compiled, if it
        compiles; and GPipe, which an engine's own 1F1B is with few micro-batches. None that splits
        backward where a pin has layers computed again, which each half would do."""
        if self.pins.schedule is not None:
            return (self.pins.schedule,)
        engine, again = self.costs.engine, self.pins.recompute
        runs = engine.compiled_schedules if engine.fused else engine.schedules
        whole = again is not None and any((*again.full, *again.selective))
        return tuple(
            name for name in SEARCHED_SCHEDULES
            if name in ("gpipe", *runs) and not (whole and name in SPLIT_BACKWARD)
        )  # fmt: skip

    def schedules(self, d: Decisions) -> Iterator[Decisions]:
        """The same state under every schedule and number of virtual stages."""
        layers = len(self.costs.chain.layers)
        names = self.searched_schedules if d.pp > 1 else (self.pins.schedule or "1f1b",)
        pairs: list[tuple[str, int]] = []
        for name in names:
            if name == "interleaved":
                most = min(MOST_VIRTUAL_STAGES, layers // d.pp)
                counts: tuple[int, ...] = tuple(range(2, most + 1))
            else:
                counts = (2,) if name in ("zbv", "dualpipev") else (1,)
            if self.pins.virtual_stages is not None:
                counts = (self.pins.virtual_stages,)
            pairs += [(name, v) for v in counts if d.pp * v <= layers]
        if self.pins.stages is not None:
            pairs = [row for row in pairs if d.pp * row[1] == len(self.pins.stages)]
        for name, v in _legal(case_of(d, self.costs.workload, False), tuple(pairs)):
            yield replace(d, schedule=name, virtual_stages=v)

    def problem(self, step: Step, d: Decisions) -> StageProblem:
        """The stage program of a mesh under one schedule, with the pins it has to keep; of layers
        with their optimizers below, with all rooms there: it is one of a pair."""
        return self._problem(step, d, *self.recomputed(d))

    def _problem(
        self, step: Step, d: Decisions, fixed: tuple[PairPin, ...] | None, levels: tuple[str, ...]
    ) -> StageProblem:
        problem = stage_problem(
            self.costs, self.costs.rescheduled(step, d), fixed_stages=self.pins.stages,
            fixed_recompute=fixed, levels=levels,
        )  # fmt: skip
        return problem if d.below is not None else with_binding(problem)

    def recomputed(self, d: Decisions) -> tuple[tuple[PairPin, ...] | None, tuple[str, ...]]:
        """What of a schedule's layers is computed again by pins, and the levels there are. Where
        activations lie below by count of layers, that is what the level between stands for."""
        again, pinned = self.pins.recompute, self.pins.offload
        full = OPEN[:1] if again is None else again.full
        if d.moved is None:
            some = OPEN[1:] if again is None else again.selective
        else:
            some = OPEN[1:] if pinned is None else Decisions(offload=pinned).moved or (0,)
        fixed = tuple(
            (full[k % len(full)], some[k % len(some)]) for k in range(d.pp * d.virtual_stages)
        )
        whole = any(count is None or count for count in full)
        levels: tuple[str, ...] = ("none", "selective", "full")
        if d.schedule in SPLIT_BACKWARD or ("activations" in d.tiers and d.moved is None):
            levels = ("none",)
        elif not (whole and self.repeats(d.tp)):
            levels = ("none", "selective")
        free = OPEN if whole else (0, None)  # nothing but what the levels say
        return None if set(fixed) == {free} else fixed, levels


@functools.lru_cache(maxsize=4096)
def _legal(case: Case, pairs: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    """Those of these (schedule, virtual stages) under which `illegal` has nothing to say."""
    assert case.pp is not None and case.microbatches is not None
    pp, m = case.pp, case.microbatches
    return tuple(
        (name, v) for name, v in pairs
        if not refusal(replace(case, schedule=name, virtual_stages=v))
        and not schedule_illegal(name, pp, m, v)
    )


def _pinned_places(pins: Pins, unit: Unit, paths: list[str]) -> dict[str, int]:
    """Pinned placements of a unit's parameters, by relative name."""
    placed: dict[str, int] = {}
    for p in unit.parameters:
        for pattern, words in pins.place:
            if not may_end(pattern, p.name):
                continue
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
