"""Why a plan is as it is: the best plan without a decision of it, and what first stands in its way.

The space of the alternative is the whole search's, less what is refused. What binds: memory, where
the alternative would be better with more of it; a rule, where nothing legal is left; else nothing
binds and the alternative is slower by the parts that are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cost_models.decisions import Decisions, Keep
from cost_models.formats import Formats
from cost_models.ledger import Estimate
from cost_models.schedule import SPLIT_BACKWARD, rank_of
from cost_models.stage_problem import StageProblem
from cost_models.step import Assignments, Costs, Step
from ir.errors import PlanError, UsageError
from planner.asking import Answer, Asking, estimated
from planner.check import Checked
from planner.decisions import ALL_LAYERS, Pins, Recompute, parse_pins
from planner.formats import settled
from planner.keep_checks import pinned_keep
from planner.mesh import Mesh, divisors, facts_of
from planner.pin_checks import check_pins
from planner.plan import Solver
from planner.search import DEFAULT_EFFORT, Searcher, Tried
from planner.tracing import check_model

Refused = tuple[tuple[str, Any], ...]  # (key, value): what the alternative may not have
MORE_MEMORY = (1.1, 1.25, 1.5)  # times a GPU's: the least of them that gains is told
MOST_MEMORY = 2.0  # where that gains nothing, memory does not bind
LEAST_GAIN = 1000  # memory binds where more of it gains a 1000th of the step
NOT_REFUSED = ("stages", "weights", "place", "kv")
PIPELINED = ("schedule", "virtual_stages")
ASKED = ("pp", "tp", "cp", "ep", "zero", "micro_batch", "recompute", "keep", "offload", "formats",
         "schedule")  # fmt: skip
ROW_EFFORT = 100  # of each row, where all decisions are asked about


@dataclass(kw_only=True)
class Without(Searcher):
    """A search of what has none of the refused values."""

    refused: Refused = ()

    def runs(self, mesh: Mesh | Decisions) -> bool:
        """Also whether the mesh has no refused axis; how cp is shared matters under cp alone."""
        for key, value in self.refused:
            said = mesh.cp > 1 if key == "cp_kind" else hasattr(mesh, key)
            if said and getattr(mesh, key) == value:
                return False
        return super().runs(mesh)

    def format_ways(self) -> tuple[Formats, ...]:
        """Also without the refused formats."""
        costs = self.costs
        away = [
            settled(value, costs.graph, costs.workload)
            for key, value in self.refused if key == "formats"
        ]  # fmt: skip
        return tuple(way for way in super().format_ways() if way not in away)

    def variants(self, mesh: Mesh) -> Iterator[Decisions]:
        """Also without the refused ways to hold state."""
        keys = ("zero", "shard", "reshard", "offload", "dp_outer")
        away = [(key, _tiers(value) if key == "offload" else value)
                for key, value in self.refused if key in keys]  # fmt: skip
        for d in super().variants(mesh):
            if not any(_held(d, key) == value for key, value in away):
                yield d

    def by_count(self, d: Decisions) -> Decisions | None:
        """Also not where activations are refused a place below, or a kind of recomputation is:
        the program by count has another kind in its place."""
        away = {what for key, value in self.refused if key == "offload" for what, _ in value}
        asked = "activations" in away or bool(self._levels)
        return None if asked else super().by_count(d)

    def schedules(self, d: Decisions) -> Iterator[Decisions]:
        """Also without the refused schedules, which are a formality without a pipeline; one that
        cannot recompute goes where a layer that does not is refused."""
        away = [(key, value) for key, value in self.refused if key in PIPELINED and d.pp > 1]
        for made in super().schedules(d):
            still = made.schedule in SPLIT_BACKWARD or "activations" in dict(made.offload)
            if still and "none" in self._levels:
                continue
            if not any(getattr(made, key) == value for key, value in away):
                yield made

    def problem(self, step: Step, d: Decisions) -> StageProblem:
        """Also without the refused levels of recomputation."""
        made = super().problem(step, d)
        left = tuple(level for level in made.levels if level not in self._levels)
        if d.keep in self._not_kept:
            left = tuple(level for level in left if level != "selective")
        return replace(made, levels=left)

    def keeps(self, tp: int, split: bool) -> tuple[Keep, ...]:
        """Also without what may not be kept."""
        return tuple(k for k in super().keeps(tp, split) if k not in self._not_kept)

    @property
    def _not_kept(self) -> tuple[Keep, ...]:
        return tuple(
            pinned_keep(value, self.costs.graph) for key, value in self.refused if key == "keep"
        )

    @property
    def _levels(self) -> tuple[str, ...]:
        return tuple(name for key, value in self.refused if key == "recompute" for name in value)


def _held(d: Decisions, key: str) -> object:
    """A decision as `Refused` has it: offload without counts of layers."""
    return _tiers(d.offload) if key == "offload" else getattr(d, key)


def _tiers(offload: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple(Decisions(offload=offload).tiers.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What first stands in the way. kind: memory, rule or time.

    memory: `over_bytes` on a pp rank and its fullest global stage, most of it `component`; step_s
    is what the alternative would take with more. rule: `reason`. time: `component` is the part of
    the step that grows most, by `more_s`.
    """

    kind: str
    component: str = ""
    pp_rank: int = 0
    stage: int = 0
    over_bytes: int = 0
    component_bytes: int = 0
    step_s: float = 0.0
    more_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """The best plan without what is refused; none where nothing legal is left that fits."""

    refused: Refused
    binding: Binding
    decisions: Decisions | None = None
    assignments: Assignments = field(default_factory=dict, repr=False)
    estimate: Estimate | None = None
    solver: Solver = field(default_factory=Solver)


def parse_refused(texts: Sequence[str]) -> Refused:
    """Read `--not k=v`. Recomputation is refused by its kinds: full:12 refuses full.

    Raises UsageError for a decision that cannot be refused, or refused in every way.
    """
    found: list[tuple[str, Any]] = []
    for text in texts:
        key = text.partition("=")[0]
        if key in NOT_REFUSED or text.startswith("place:"):
            raise UsageError(f"--not {text}: {key.partition(':')[0]} cannot be refused",
                             why="its alternatives are too many to name one by one",
                             hints=("--not tp=8, --not recompute=full",))  # fmt: skip
        try:
            pins = parse_pins([text])
        except UsageError as fault:
            what, why = (t.replace("--fix", "--not") for t in (fault.what, fault.why))
            hints = tuple(h.replace("--fix", "--not") for h in fault.hints)
            raise UsageError(what, why=why, hints=hints) from None
        found += [(k, _kinds(v) if k == "recompute" else v) for k, v in pins.items()]
    levels = {name for key, value in found if key == "recompute" for name in value}
    if len(levels) == 3:
        raise UsageError("--not recompute: every kind is refused")
    return tuple(dict.fromkeys(found))


def _kinds(value: Recompute) -> tuple[str, ...]:
    kinds = [k for k, n in (("full", value.full), ("selective", value.selective)) if any(n)]
    return tuple(kinds) or ("none",)


def refused_words(refused: Refused) -> str:
    """As the user wrote them."""
    words = []
    for key, value in refused:
        if key == "recompute":
            kinds = {k: (ALL_LAYERS,) for k in value if k != "none"}
            value = Recompute(**kinds)
        words.append(replace(Pins(), **{key: value}).said(key))
    return ", ".join(words)


class Why:
    """Questions about one plan on its hardware; searches share their costs."""

    def __init__(self, base: Checked) -> None:
        plan = base.plan
        self.base, self.d = base, plan.decisions
        costs = Costs(graph=plan.graph, cluster=base.cluster, workload=plan.workload)
        self.asking = Asking(searcher=Searcher(costs=costs))
        engine = costs.engine
        self.pins = Pins(  # what is not searched stays as the plan has it
            compile=self.d.compile if self.d.compile != engine.fused else None,
            grad_dtype=self.d.grad_dtype if self.d.grad_dtype != engine.grad_dtype else None,
            formats=None if plan.workload.allowed_formats else self.d.formats or None,
        )  # fmt: skip

    def alternative(self, refused: Refused, effort: int = DEFAULT_EFFORT) -> Alternative:
        """The best plan without what is refused, and what stands in its way."""
        found = self._search(refused, effort)
        out = found.outcome
        if out.best is None and out.misfit is None:
            return Alternative(refused=refused, binding=self._rule(refused))
        if out.best is None:
            m = out.misfit
            assert m is not None
            binding = _over(m.decisions, estimated(found.costs, m.decisions, m.assignments))
            return Alternative(refused=refused, binding=binding)
        made = found.estimate()
        solver = Solver(
            status="OPTIMAL" if out.proved else "FEASIBLE", gap_ppm=round(out.gap * 1e6),
            meshes=out.meshes, meshes_solved=out.expanded,
        )  # fmt: skip
        return Alternative(
            refused=refused, decisions=out.best.decisions, assignments=out.best.assignments,
            estimate=made, solver=solver,
            binding=self._memory(refused, effort, out.best) or _slower(self.base.estimate, made),
        )  # fmt: skip

    def rows(
        self, effort: int = ROW_EFFORT, progress: Callable[[str], None] | None = None
    ) -> tuple[Alternative, ...]:
        """An alternative for every decision that has one, in the vocabulary's order."""
        d, found = self.d, []
        experts = facts_of(self.asking.searcher.costs.chain).experts
        for key in ASKED:
            value = getattr(d, key)
            if key == "recompute":
                pairs = d.recompute or ((0, 0),)
                value = tuple(k for k, n in zip(("full", "selective"), map(sum, zip(*pairs))) if n)
            idle = (
                (key in ("recompute", "keep", "offload", "formats") and not value)
                or (key == "ep" and not experts) or (key == "schedule" and d.pp == 1)
            )  # fmt: skip
            if not idle:
                if progress:
                    progress(f"solving: without {refused_words(((key, value),))}")
                found.append(self.alternative(((key, value),), effort))
        return tuple(found)

    def roomier(self, effort: int = ROW_EFFORT) -> Answer:
        """The best plan on the same GPUs with more memory."""
        return self._search((), effort, MOST_MEMORY)

    def _search(
        self, refused: Refused, effort: int, memory: float = 1.0, known: Tried | None = None
    ) -> Answer:
        """memory: times a GPU's. known: a plan of the space."""
        cluster, pins = self.base.cluster, self.pins
        for key, value in refused:
            if key == "compile":
                pins = replace(pins, compile=not value)
            elif key == "grad_dtype":
                pins = replace(pins, grad_dtype="fp32" if value == "bf16" else "bf16")
            elif key == "formats" and pins.formats:
                pins = replace(pins, formats=())
        if memory != 1.0:
            device = cluster.device
            more = replace(device, memory_bytes=int(memory * device.memory_bytes))
            cluster = replace(cluster, device=more)
        s = self.asking.under(pins, cluster=cluster)
        search = Without(
            costs=s.costs, pins=pins, effort=effort, refused=refused, _laid=s._laid, _over=s._over
        )
        return Answer(costs=s.costs, outcome=search.run(known))

    def _memory(self, refused: Refused, effort: int, best: Tried) -> Binding | None:
        """The plan that would be better with the least more memory, and by how much it is over;
        None where much more gains nothing."""
        capacity = self.base.cluster.device.memory_bytes

        def better(memory: float) -> Binding | None:
            found = self._search(refused, effort, memory, best)
            tried = found.outcome.best
            if tried is None or (best.score - tried.score) * LEAST_GAIN < best.score:
                return None
            return _over(tried.decisions, replace(found.estimate(), capacity_bytes=capacity))

        most = better(MOST_MEMORY)
        return most and next(filter(None, map(better, MORE_MEMORY)), most)

    def _rule(self, refused: Refused) -> Binding:
        """Why nothing legal is left: what the other values of a refused axis are refused for."""
        plan, costs = self.base.plan, self.asking.searcher.costs
        facts = facts_of(costs.chain)
        away = dict(refused)
        for key in ("pp", "tp", "cp", "ep", "etp", "dp", "zero"):
            others = (0, 1, 2, 3) if key == "zero" else divisors(costs.cluster.count)
            for value in others if key in away else ():
                if (key, value) in refused:
                    continue
                pins = replace(self.pins, **{key: value})  # type: ignore[arg-type]
                try:
                    check_pins(
                        pins, plan.workload, gpus=costs.cluster.count, layers=facts.layers
                    )
                    check_model(plan.graph, costs.cluster, plan.workload, pins)
                except PlanError as fault:
                    what = fault.what.replace("--fix ", "")
                    return Binding(kind="rule", reason=f"{what}; {fault.why}".rstrip("; "))
                said = f"{key}={value} is not searched for this model; --fix {key}={value} asks it"
                return Binding(kind="rule", reason=said)
        return Binding(kind="rule", reason="no mesh is left that suits the model and the batch")


def _over(d: Decisions, made: Estimate) -> Binding:
    """By how much the fullest rank of a plan is over, and what most of it is."""
    worst = max(made.ranks, key=lambda r: sum(size for _, size in r.memory_bytes))
    name, most = max(worst.memory_bytes, key=lambda row: row[1])
    total = sum(size for _, size in worst.memory_bytes)
    mine = [k for k in range(len(d.stages)) if rank_of(d.schedule, d.pp, k) == worst.pp_rank]
    return Binding(
        kind="memory", component=name, pp_rank=worst.pp_rank, component_bytes=most,
        stage=max(mine, key=lambda k: (d.stages[k], -k)), step_s=made.step_time_s,
        over_bytes=total - made.capacity_bytes,
    )  # fmt: skip


def _slower(base: Estimate, made: Estimate) -> Binding:
    """The part of the step that grows most."""
    old = dict(base.breakdown_ps)
    name, more = max(((k, ps - old[k]) for k, ps in made.breakdown_ps), key=lambda row: row[1])
    return Binding(
        kind="time", component=name, more_s=more / 1e12, step_s=made.step_time_s
    )  # fmt: skip
