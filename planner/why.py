"""Why a plan is as it is: the best plan without a decision of it, and what first stands in its way.

The space of the alternative is the whole search's, less what is refused. What binds: memory, where
the alternative would be better with more of it; a rule, where nothing legal is left; else nothing
binds and the alternative is slower by the parts that are told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cost_models.chain import chain_of
from cost_models.decisions import Decisions
from cost_models.engines import load_engine
from cost_models.fleet import Fleet, Hardware, parts_of
from cost_models.ledger import Estimate, RankLedger
from cost_models.schedule import rank_of
from cost_models.step import Assignments, Costs
from ir.errors import PlanError
from planner.asking import Answer, Asking, estimated
from planner.check import Checked
from planner.decisions import Pins
from planner.fleet_asking import FleetAsking
from planner.fleet_search import suited
from planner.mesh import divisors, facts_of
from planner.outcome import Outcome
from planner.pin_checks import check_pins
from planner.plan import Solver
from planner.refused import Refused, lacks, refused_words
from planner.search import DEFAULT_EFFORT, Searcher
from planner.tracing import check_model

MORE_MEMORY = (1.1, 1.25, 1.5)  # times a GPU's: the least of them that gains is told
MOST_MEMORY = 2.0  # where that gains nothing, memory does not bind
LEAST_GAIN = 1000  # memory binds where more of it gains a 1000th of the step
ASKED = ("pp", "tp", "cp", "ep", "zero", "micro_batch", "recompute", "keep", "offload", "formats",
         "schedule")  # fmt: skip
OF_PARTS = ("shares", "tp_by_part")  # decided where the hardware has parts
ROW_EFFORT = 100  # of each row, where all decisions are asked about


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What first stands in the way. kind: memory, rule or time.

    memory: `over_bytes` on a pp rank and its fullest global stage, most of it `component`, over
    `capacity_bytes`; step_s is what the alternative would take with more. part: of the hardware,
    that the rank lies on, where it has parts. rule: `reason`. time: `component` is the part of
    the step that grows most, by `more_s`.
    """

    kind: str
    component: str = ""
    pp_rank: int = 0
    stage: int = 0
    part: str = ""
    capacity_bytes: int = 0
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


class Why:
    """Questions about one plan on its hardware; searches share their costs."""

    def __init__(self, base: Checked) -> None:
        plan = base.plan
        self.base, self.d = base, plan.decisions
        self.asking = _asking(base)
        engine = load_engine(plan.workload.engine)
        self.pins = Pins(  # what is not searched stays as the plan has it
            compile=self.d.compile if self.d.compile != engine.fused else None,
            grad_dtype=self.d.grad_dtype if self.d.grad_dtype != engine.grad_dtype else None,
            formats=None if plan.workload.allowed_formats else self.d.formats or None,
        )  # fmt: skip

    def alternative(
        self, refused: Refused, effort: int = DEFAULT_EFFORT, *, dealt: bool = False
    ) -> Alternative:
        """The best plan without what is refused, and what stands in its way. dealt: as
        `FleetAsking.without` has it."""
        return self._told(refused, effort, self._search(refused, effort, dealt=dealt), dealt)

    def _told(
        self, refused: Refused, effort: int, found: Answer | None, dealt: bool
    ) -> Alternative:
        """What was found without what is refused, and what stands in its way."""
        if found is None:
            return Alternative(refused=refused, binding=self._rule(refused))
        out, hardware = found.outcome, self.base.hardware
        if out.best is None:
            m = out.misfit
            assert m is not None
            made = estimated(found.costs, m.decisions, m.assignments)
            return Alternative(refused=refused, binding=_over(m.decisions, made, hardware))
        made = found.estimate()
        solver = Solver(
            status="OPTIMAL" if out.proved else "FEASIBLE", gap_ppm=round(out.gap * 1e6),
            meshes=out.meshes, meshes_solved=out.expanded,
        )  # fmt: skip
        binding = self._memory(refused, effort, found, dealt)
        return Alternative(
            refused=refused, decisions=out.best.decisions, assignments=out.best.assignments,
            estimate=made, solver=solver, binding=binding or _slower(self.base.estimate, made),
        )  # fmt: skip

    def rows(
        self, effort: int = ROW_EFFORT, progress: Callable[[str], None] | None = None
    ) -> tuple[Alternative, ...]:
        """An alternative for every decision that has one, in the vocabulary's order. A row's plan
        is the best that any of the searches found without what the row refuses."""
        d = self.d
        found: list[tuple[Refused, Answer | None]] = []
        experts = facts_of(chain_of(self.base.plan.graph)).experts
        for key in _asked(d):
            value = getattr(d, key)
            if key == "recompute":
                pairs = [*(d.recompute or ((0, 0),)), *(p for s in d.shares for p in s.recompute)]
                value = tuple(k for k, n in zip(("full", "selective"), map(sum, zip(*pairs))) if n)
            elif key == "shares":
                value = tuple((share.part, share.microbatches) for share in d.shares)
            idle = (
                (key in ("recompute", "keep", "offload", "formats") and not value)
                or (key == "ep" and not experts) or (key == "schedule" and d.pp == 1)
            )  # fmt: skip
            if not idle:
                if progress:
                    progress(f"solving: without {refused_words(((key, value),))}")
                refused: Refused = ((key, value),)
                found.append((refused, self._search(refused, effort, dealt=True)))
        others = [row for _, row in found if row is not None and row.outcome.best is not None]
        rows = []
        for refused, own in found:
            if progress:
                progress(f"solving: what binds without {refused_words(refused)}")
            rows.append(self._told(refused, effort, self._best(refused, own, others), dealt=True))
        return tuple(rows)

    def _best(
        self, refused: Refused, own: Answer | None, others: Sequence[Answer]
    ) -> Answer | None:
        """The best of what a search of its own found and of others' plans without what it refuses:
        each effort ends somewhere else. Its own bound holds of any of them."""
        graph, workload = self.base.plan.graph, self.base.plan.workload
        kept = [
            row for row in others if lacks(row.decisions, refused, graph, workload)
            and self.pins.formats in (None, row.decisions.formats)
        ]  # fmt: skip
        best = min(kept, key=lambda row: row.score, default=None)
        found = own.outcome if own else Outcome()
        if best is None or (own and found.best and own.score <= best.score):
            return own
        bound: float = found.bound
        if own and found.best:  # of several kinds of GPUs scores are of what each plan uses
            bound = own.score * (1 - found.gap)
        tried = best.outcome.best
        assert tried is not None
        proved = min(1.0, bound / best.score)
        return replace(best, outcome=replace(
            found, best=tried, misfit=None, bound=round(proved * tried.score)
        ))  # fmt: skip

    def roomier(self, effort: int = ROW_EFFORT, part: str = "") -> Answer | None:
        """The best plan on the same GPUs with more memory: on all, or on those of one part."""
        if isinstance(self.asking, FleetAsking):
            return self.asking.without(
                (), self.pins, memory=MOST_MEMORY, part=part, effort=effort, dealt=True
            )
        return self._search((), effort, MOST_MEMORY)

    def _search(
        self, refused: Refused, effort: int, memory: float = 1.0, known: Answer | None = None,
        dealt: bool = False,
    ) -> Answer | None:  # fmt: skip
        """memory: times a GPU's. known: a plan of the space."""
        pins = self.pins
        for key, value in refused:
            if key == "compile":
                pins = replace(pins, compile=not value)
            elif key == "grad_dtype":
                pins = replace(pins, grad_dtype="fp32" if value == "bf16" else "bf16")
            elif key == "formats" and pins.formats:
                pins = replace(pins, formats=())
            elif key == "shares" and value:
                pins = replace(pins, shares=())
            elif key in OF_PARTS and not isinstance(self.asking, FleetAsking):
                return None  # with no parts, there is none
            elif key == "tp_by_part" and value:
                pins = replace(pins, tp_by_part=())
        if isinstance(self.asking, FleetAsking):
            return self.asking.without(
                refused, pins, memory=memory, effort=effort, known=known, dealt=dealt
            )
        return self.asking.without(refused, pins, memory=memory, effort=effort, known=known)

    def _memory(
        self, refused: Refused, effort: int, first: Answer, dealt: bool
    ) -> Binding | None:
        """The plan that would be better with the least more memory, and by how much it is over;
        None where much more gains nothing."""

        def better(memory: float) -> Binding | None:
            found = self._search(refused, effort, memory, first, dealt)
            if found is None or (first.score - found.score) * LEAST_GAIN < first.score:
                return None
            return _over(found.decisions, found.estimate(), self.base.hardware)

        most = better(MOST_MEMORY)
        return most and next(filter(None, map(better, MORE_MEMORY)), most)

    def _rule(self, refused: Refused) -> Binding:
        """Why nothing legal is left: what the other values of a refused axis are refused for."""
        away, hardware = dict(refused), self.base.hardware
        one_kind = not isinstance(hardware, Fleet)
        for key, holds, reason in (
            *((key, one_kind, "the hardware has one kind of GPUs") for key in OF_PARTS),
            ("formats", not self.base.plan.workload.allowed_formats,
             "--precision allows one format; bf16,fp8 allows two"),
            ("dp_outer", all(len(part.spans) <= 2 for part in parts_of(hardware)),
             "the hardware lists no levels of its network"),
        ):  # fmt: skip
            if key in away and holds:
                return Binding(kind="rule", reason=f"{key}: {reason}")
        for key in ("pp", "tp", "cp", "ep", "etp", "dp", "zero"):
            others = (0, 1, 2, 3) if key == "zero" else divisors(self.base.hardware.count)
            for value in others if key in away else ():
                if (key, value) in refused:
                    continue
                fault = self._fault(replace(self.pins, **{key: value}))  # type: ignore[arg-type]
                if fault is not None:
                    what = fault.what.replace("--fix ", "")
                    return Binding(kind="rule", reason=f"{what}; {fault.why}".rstrip("; "))
                said = f"{key}={value} is not searched for this model; --fix {key}={value} asks it"
                return Binding(kind="rule", reason=said)
        return Binding(kind="rule", reason="no mesh is left that suits the model and the batch")

    def _fault(self, pins: Pins) -> PlanError | None:
        """Why the model and the hardware cannot have these, or None."""
        plan, hardware = self.base.plan, self.base.hardware
        layers = facts_of(chain_of(plan.graph)).layers
        try:
            if isinstance(hardware, Fleet):
                suited(plan.graph, hardware, plan.workload, pins, hardware.parts)
            else:
                check_pins(pins, plan.workload, gpus=hardware.count, layers=layers)
            for part in parts_of(hardware):
                check_model(plan.graph, part, plan.workload, pins)
        except PlanError as fault:
            return fault
        return None


def _asking(base: Checked) -> Asking | FleetAsking:
    graph, workload = base.plan.graph, base.plan.workload
    gain = base.plan.solver.axis_gain_ppm
    if isinstance(base.hardware, Fleet):
        return FleetAsking(graph=graph, fleet=base.hardware, workload=workload, gain_ppm=gain)
    costs = Costs(graph=graph, cluster=base.hardware, workload=workload)
    return Asking(searcher=Searcher(costs=costs, gain_ppm=gain))


def _asked(d: Decisions) -> tuple[str, ...]:
    """The decisions that are refused in turn: of parts with another tp each, that they have; and
    of replicas on parts, that there are any."""
    keys = tuple("tp_by_part" if key == "tp" and d.tp_by_part else key for key in ASKED)
    return (*keys, *(["shares"] if d.shares else []))


def _over(d: Decisions, made: Estimate, hardware: Hardware) -> Binding:
    """By how much the fullest rank of a plan is over, and what most of it is."""
    room = {part.name: part.device.memory_bytes for part in parts_of(hardware)}

    def part_of(rank: RankLedger) -> str:
        lies_on = d.part_of_rank or (parts_of(hardware)[0].name,) * d.pp
        return rank.part or lies_on[rank.pp_rank]

    worst = min(made.ranks, key=lambda r: room[part_of(r)] - r.peak_bytes)
    name, most = max(worst.memory_bytes, key=lambda row: row[1])
    mine = [k for k in range(len(d.stages)) if rank_of(d.schedule, d.pp, k) == worst.pp_rank]
    capacity = room[part_of(worst)]
    return Binding(
        kind="memory", component=name, pp_rank=worst.pp_rank, component_bytes=most,
        stage=max(mine, key=lambda k: (d.stages[k], -k)), step_s=made.step_time_s,
        over_bytes=worst.peak_bytes - capacity, capacity_bytes=capacity,
        part=part_of(worst) if isinstance(hardware, Fleet) else "",
    )  # fmt: skip


def _slower(base: Estimate, made: Estimate) -> Binding:
    """The part of the step that grows most."""
    old = dict(base.breakdown_ps)
    name, more = max(((k, ps - old[k]) for k, ps in made.breakdown_ps), key=lambda row: row[1])
    return Binding(
        kind="time", component=name, more_s=more / 1e12, step_s=made.step_time_s
    )  # fmt: skip
