"""`plan trace` on several kinds of GPUs: each part alone, then pipelines over the parts in every
order; the fastest is the plan, so none is slower than the best part alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from cost_models.chain import chain_of
from cost_models.decisions import Workload
from cost_models.estimate import estimate, whole_step_ps
from cost_models.fleet import Fleet, used_parts
from cost_models.hardware import Cluster
from cost_models.ledger import Estimate
from cost_models.mixed import MixedCosts, together
from cost_models.shares import kinds_of, side_by_side
from cost_models.step import Assignments, Costs
from cost_models.words import sharding_of
from ir.errors import InfeasibleError, UsageError
from ir.graph import Graph
from planner.decisions import Pins
from planner.fleet_space import FleetSearcher
from planner.infeasible import needs
from planner.limits import capped
from planner.mesh import facts_of, parted
from planner.options import Baseline, Progress, TraceOptions, TraceResult
from planner.pin_checks import check_pins
from planner.plan import Plan, Solver, make_plan
from planner.runnable import NATIVE, may_compile
from planner.search import Outcome, Searcher, Tried
from planner.share_space import ShareSearcher
from planner.tracing import Clock, check_model
from planner.workload import resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """Some of the parts, searched. kept: whether what was found there is not left for a plan that
    is as fast with more axes."""

    searcher: Searcher
    outcome: Outcome
    kept: bool

    @property
    def words(self) -> str:
        """The parts by name."""
        own = ", a tp of each" if getattr(self.searcher, "apart", False) else ""
        return "+".join(side.cluster.spec for side in kinds_of(self.searcher.costs)) + own


@dataclass(kw_only=True)
class FleetSearch:
    """All that is searched of a fleet, and the best so far."""

    fleet: Fleet
    workload: Workload
    rows: list[Searched] = field(default_factory=list)
    best: Tried | None = None
    costs: Costs | None = None  # of the best
    baselines: tuple[Baseline, ...] = ()  # the best part alone

    @property
    def step_ps(self) -> int:
        assert self.best is not None and self.costs is not None
        return whole_step_ps(self.costs, self.best.objective_ps)

    def search(self, searcher: Searcher) -> None:
        """Search some of the parts for a plan that beats the best."""
        known = None
        if self.best is not None:
            objective = _objective_within(searcher.costs, self.step_ps)
            if objective < 1:
                return
            known = replace(self.best, objective_ps=objective)
        out = searcher.run(known)
        kept = True
        if out.best is not None and out.best is not known:
            step = whole_step_ps(searcher.costs, out.best.objective_ps)
            kept = self.best is None or step < self.step_ps
            if kept:
                self.best, self.costs = out.best, searcher.costs
        self.rows.append(Searched(searcher=searcher, outcome=out, kept=kept))

    def note_alone(self) -> None:
        """What the parts tried so far come to, each alone."""
        if self.best is not None and self.costs is not None:
            name = f"{self.costs.cluster.spec} alone"
            self.baselines = (Baseline(name=name, step_time_s=self.step_ps / 1e12, fits=True),)

    def bound_ps(self) -> int:
        """No plan of the space has a shorter step, by what its axes must earn."""
        assert self.best is not None
        lows = [
            whole_step_ps(row.searcher.costs, self.best.below(row.outcome.bound))
            for row in self.rows if not (row.kept and row.outcome.proved)
        ]  # fmt: skip
        return min([self.step_ps, *lows])


def _objective_within(costs: Costs, step_ps: int) -> int:
    """The largest objective whose whole step is not beyond step_ps."""
    low, high = 0, step_ps
    while low < high:
        middle = (low + high + 1) // 2
        if whole_step_ps(costs, middle) <= step_ps:
            low = middle
        else:
            high = middle - 1
    return low


def plan_fleet(
    graph: Graph, options: TraceOptions, fleet: Fleet, clock: Clock,
    progress: Progress | None = None,
) -> TraceResult:  # fmt: skip
    """Plan a graph for time; raises as `planner.tracing.run` does."""
    if options.objective != "time":
        raise UsageError(f"--objective {options.objective} is for hardware of one kind",
                         hints=tuple(f"--hardware {p.spec}" for p in fleet.parts))  # fmt: skip
    if options.limits.gpus or options.limits.usd_per_million_tokens:
        raise UsageError("--max-gpus and --max-cost are for hardware of one kind",
                         why=f"{fleet.spec} has several")  # fmt: skip
    if options.stability is not None:
        raise UsageError("--stability is for hardware of one kind", why=f"{fleet.spec} has several")
    workload, echo = resolve(graph, fleet, options.asked, options.pins)
    found = FleetSearch(fleet=fleet, workload=workload)
    for searcher in _searchers(graph, fleet, workload, options):
        searcher.progress = progress
        clock.mark("cost_s")
        found.search(searcher)
        if len(searcher.clusters) == 1:
            found.note_alone()
        clock.mark("solve_s")
        if found.rows[-1].outcome.interrupted:
            break
    stopped = found.rows[-1].outcome.interrupted
    if found.best is None:
        if stopped:
            raise KeyboardInterrupt
        raise _infeasible(found)
    plan, made = _planned(graph, options.hardware, found)
    return TraceResult(
        plan=plan, estimate=made, echo=(*echo, *_used(plan, fleet)), interrupted=stopped,
        baselines=found.baselines, timing=clock.timing(),
    )  # fmt: skip


def _searchers(
    graph: Graph, fleet: Fleet, workload: Workload, options: TraceOptions
) -> Iterator[Searcher]:
    """Each part alone, the quickest first; then replicas on several, side by side; then pipelines
    over several in every order, and again with a tp of each part. Raises UsageError where the pins
    suit none of them."""
    pins = options.pins
    for part in fleet.parts:
        check_model(graph, part, workload, pins)
    usable = [capped(part, options.limits.memory_bytes) for part in fleet.parts]
    usable.sort(key=lambda part: -part.count * part.device.peak(workload.precision))
    blank = {part.name: Costs(graph=graph, cluster=part, workload=workload,
                              compiled=may_compile(workload, pins)) for part in usable}  # fmt: skip
    searchers: list[Searcher] = []
    last: list[Searcher] = []
    for parts, replicas in _suited(graph, fleet, workload, pins, usable):
        made = [blank[part.name] for part in parts]
        if replicas:
            searchers.append(ShareSearcher(costs=side_by_side(fleet, made), pins=pins))
            continue
        costs = together(fleet, made)
        if not isinstance(costs, MixedCosts):
            searchers.append(Searcher(costs=costs, pins=pins))
            continue
        if not pins.tp_by_part:
            searchers.append(FleetSearcher(costs=costs, pins=pins))
        if pins.tp_by_part != () and workload.engine in NATIVE:
            last.append(FleetSearcher(costs=costs, pins=pins, apart=True))
    searchers += last
    every = ((s.candidates() if isinstance(s, FleetSearcher) else s.meshes()) for s in searchers)
    points = dict.fromkeys((m.micro_batch, m.cp) for some in every for m in some)
    shared: dict[frozenset[str], FleetSearcher] = {}  # by parts, whatever their order
    laid: dict[str, dict[tuple[int, bool], Assignments]] = {}  # by part alone
    for searcher in searchers:
        sides = kinds_of(searcher.costs)
        name = sides[0].cluster.name
        for side in sides:
            side.points = tuple(points) or ((1, 1),)
        if isinstance(searcher, FleetSearcher):
            names = frozenset(side.cluster.name for side in sides)
            first = shared.setdefault(names, searcher)
            if first is searcher:
                searcher._laid = laid.get(name, searcher._laid)
            searcher.share(first)
        else:
            searcher._laid = laid.setdefault(name, searcher._laid)
        searcher.effort, searcher.gain_ppm = options.effort or searcher.effort, options.gain_ppm
        if isinstance(searcher, FleetSearcher) and searcher.apart:
            searcher.effort = max(1, searcher.effort // 2)
        yield searcher


def _suited(
    graph: Graph, fleet: Fleet, workload: Workload, pins: Pins, usable: Sequence[Cluster]
) -> list[tuple[tuple[Cluster, ...], bool]]:
    """(parts in the order of ranks, whether they have replicas each) of all that the pins suit.
    Raises UsageError where that is nothing."""
    if pins.shares and len({fleet.part(name).name for name, _ in pins.shares}) < 2:
        raise UsageError(f"--fix {pins.said('shares')} is of one part",
                         hints=(f"--hardware {fleet.part(pins.shares[0][0]).spec}",))  # fmt: skip
    named = {fleet.part(name).name for name, _ in pins.tp_by_part or ()}
    if pins.tp_by_part and (len(named) < 2 or pins.shares):
        what = f"and --fix {pins.said('shares')} contradict each other" if pins.shares else (
            "is of one part"
        )  # fmt: skip
        raise UsageError(f"--fix {pins.said('tp_by_part')} {what}",
                         why="it is of the stages of a pipeline over several parts")  # fmt: skip
    chain = chain_of(graph)
    facts, native = facts_of(chain), workload.engine in NATIVE
    several = range(2, len(usable) + 1)
    alone = [((part,), False) for part in usable]
    replicas = [(some, True) for n in several for some in itertools.combinations(usable, n)]
    orders = [(some, False) for n in several for some in itertools.permutations(usable, n)]
    ways = [
        *(alone if not (pins.shares or named) else ()),
        *(replicas if pins.shares or (native and pins.shares is None and not named) else ()),
        *(orders if not pins.shares and not facts.pipeline_reason else ()),
    ]
    if named:
        ways = [(some, split) for some, split in ways if {part.name for part in some} == named]
    if not ways:
        raise UsageError(f"--fix {pins.said('tp_by_part')}: this model has no pipeline",
                         why=facts.pipeline_reason)  # fmt: skip
    suited, fault = [], None
    for parts, split in ways:
        # with replicas of their own parts have other numbers of micro-batches
        checked = replace(pins, dp=None, microbatches=None) if split else pins
        if len(parts) > 1 and not split and next(parted(chain, parts, workload, pins), None):
            checked = replace(pins, pp=None)  # of stages that have not as many GPUs each
        try:
            check_pins(checked, workload, gpus=sum(p.count for p in parts), layers=facts.layers)
        except UsageError as raised:
            fault = raised if fault is None or not split else fault
        else:
            suited.append((parts, split))
    if not suited:
        assert fault is not None
        raise fault
    return suited


def _planned(graph: Graph, spec: str, found: FleetSearch) -> tuple[Plan, Estimate]:
    assert found.best is not None and found.costs is not None
    d, workload = found.best.decisions, found.workload
    if not d.parts and not d.shares:
        d = replace(d, parts=((found.costs.cluster.name, d.pp),))
    shardings = {u.name: sharding_of(u, a) for (u, _), a in found.best.assignments.items()}
    if d.tp == 1:
        shardings = {}
    made = estimate(graph, found.fleet, workload, d, shardings)
    bound, step = found.bound_ps(), found.step_ps
    outs = [row.outcome for row in found.rows]
    solver = Solver(
        status="OPTIMAL" if bound >= step else "FEASIBLE",
        gap_ppm=round((step - bound) / step * 1e6), bound_us=bound // 1_000_000,
        meshes=sum(out.meshes for out in outs), meshes_solved=sum(out.expanded for out in outs),
    )  # fmt: skip
    return make_plan(graph, spec, found.fleet, workload, d, shardings, made, solver), made


def _used(plan: Plan, fleet: Fleet) -> tuple[str, ...]:
    """Which GPUs the plan uses, and which are idle."""
    used = [part.name for part in used_parts(fleet, plan.decisions)]
    idle = [part.spec for part in fleet.parts if part.name not in used]
    joint = " beside " if plan.decisions.shares else " then "
    words = joint.join(fleet.part(name).spec for name in used)
    return (
        f"--hardware {fleet.spec}: the plan uses {words}",
        *(f"{spec} is idle: no shorter step was found with it" for spec in idle),
    )


def _infeasible(found: FleetSearch) -> InfeasibleError:
    """Why nothing fits: the nearest of each part alone and of all together."""
    lines = [
        f"{row.words}: nearest needs {needs(row.searcher, row.outcome.misfit)}"
        for row in found.rows if row.outcome.misfit is not None
    ]  # fmt: skip
    if not lines:
        return InfeasibleError(
            f"no mesh of {found.fleet.spec} suits the model, the batch and the pins",
            why="every part has whole stages of as many GPUs, and dp divides the global batch of"
            f" {found.workload.global_batch}",
            hints=("another --global-batch, or fewer pins",),
        )
    return InfeasibleError(
        f"no plan fits {found.fleet.spec}", why="\n".join(lines),
        hints=tuple(f"plan trace MODEL --hardware {part.spec}: what binds there"
                    for part in found.fleet.parts),
    )  # fmt: skip
