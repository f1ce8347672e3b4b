"""What is searched on several kinds of GPUs: each part alone, then replicas on several, then
pipelines over them in every order; the fastest is the best, so none is slower than the best alone.
With another objective the plan of least cost or energy is, as `Worth` has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from cost_models.chain import chain_of
from cost_models.decisions import Decisions, Workload
from cost_models.estimate import whole_step_ps
from cost_models.fleet import Fleet
from cost_models.hardware import Cluster
from cost_models.mixed import MixedCosts, together
from cost_models.shares import SharedCosts, kinds_of, side_by_side
from cost_models.step import Assignments, Costs
from ir.errors import UsageError
from ir.graph import Graph
from planner.asking import Answer, estimated
from planner.decisions import Pins
from planner.fleet_space import FleetSearcher
from planner.limits import capped
from planner.mesh import facts_of, parted
from planner.options import Baseline, TraceOptions
from planner.outcome import Outcome, Tried, less_over, nearer
from planner.pin_checks import check_pins
from planner.refused import FleetWithout, Refused, ShareWithout, Without
from planner.runnable import NATIVE, may_compile
from planner.search import Searcher
from planner.share_space import ShareSearcher
from planner.stability import objective_within
from planner.tracing import check_model
from planner.worth import ENDLESS_PS, Worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """Some of the parts, searched. kept: whether what was found there is not left for a plan that
    is as good with more axes; usd: what a million tokens cost by it, where that is over the limit.
    """

    searcher: Searcher
    outcome: Outcome
    kept: bool
    usd: float | None = None

    @property
    def words(self) -> str:
        """The parts by name."""
        own = ", a tp of each" if getattr(self.searcher, "apart", False) else ""
        return "+".join(side.cluster.spec for side in kinds_of(self.searcher.costs)) + own


@dataclass(kw_only=True)
class FleetSearch:
    """All that is searched of a fleet, and the best so far, which may be known beforehand. worth:
    what plans are compared by; None: their steps."""

    fleet: Fleet
    workload: Workload
    worth: Worth | None = None
    rows: list[Searched] = field(default_factory=list)
    best: Tried | None = None
    costs: Costs | None = None  # of the best
    value: float = 0  # of the best
    baselines: tuple[Baseline, ...] = ()  # the best part alone
    floor: float | None = None  # of the search, where another plan than its best is taken

    @property
    def step_ps(self) -> int:
        assert self.best is not None and self.costs is not None
        return whole_step_ps(self.costs, self.best.objective_ps)

    @property
    def stopped(self) -> bool:
        """Whether Ctrl-C ended the last search."""
        return bool(self.rows) and self.rows[-1].outcome.interrupted

    def know(self, best: Tried, costs: Costs) -> None:
        """A plan of the space, known beforehand, that others are to beat."""
        self.best, self.costs = best, costs
        self.value, _ = self.worth_of(best, costs)

    def put(self, chosen: Tried, costs: Costs, floor: float) -> None:
        """Take another plan than the best, which the search's bound does not rule out."""
        self.know(chosen, costs)
        self.floor = floor

    def search(self, searcher: Searcher) -> None:
        """Search some of the parts for a plan that beats the best."""
        known = None
        if self.best is not None:
            longest = self.longest_ps(searcher, self.value)
            objective = objective_within(searcher.costs, longest)
            if objective < 1:
                return
            known = replace(self.best, objective_ps=objective) if longest < ENDLESS_PS else None
        out = searcher.run(known)
        found = None if out.best is known else out.best
        kept, usd = found is None or self._take(found, searcher.costs), None
        if found is not None and self._usd_over(found, searcher.costs):
            # the quickest of these GPUs costs least, whatever axes it has
            quickest = replace(searcher, gain_ppm=0).run().best
            assert quickest is not None
            kept = self._take(replace(quickest, gain_ppm=found.gain_ppm), searcher.costs)
            usd = self._usd_over(quickest, searcher.costs)
        self.rows.append(Searched(searcher=searcher, outcome=out, kept=kept, usd=usd))

    def longest_ps(self, searcher: Searcher, value: float) -> int:
        """The longest step with which a plan there may come to no more than that."""
        if self.worth is None:
            return int(value)
        return self.worth.longest_ps(searcher.clusters, value)

    def _take(self, found: Tried, costs: Costs) -> bool:
        """Whether a plan is better than the best and within the limit; it is the best then."""
        value, usd = self.worth_of(found, costs)
        over = self.worth is not None and usd > self.worth.most_usd
        if over or (self.best is not None and value >= self.value):
            return False
        self.best, self.costs, self.value = found, costs, value
        return True

    def _usd_over(self, found: Tried, costs: Costs) -> float | None:
        """What a million tokens cost by a plan, where that is over the limit."""
        usd = self.worth_of(found, costs)[1]
        return usd if self.worth is not None and usd > self.worth.most_usd else None

    def worth_of(self, found: Tried, costs: Costs) -> tuple[float, float]:
        """(what a plan comes to, its USD a million tokens where they matter)."""
        if self.worth is None or self.worth.simple:
            return whole_step_ps(costs, found.objective_ps), 0.0
        d = named(found.decisions, costs)
        return self.worth.of(d, estimated(costs, d, found.assignments))

    def note_alone(self) -> None:
        """What the parts tried so far come to, each alone."""
        if self.best is not None and self.costs is not None:
            name = f"{self.costs.cluster.spec} alone"
            self.baselines = (Baseline(name=name, step_time_s=self.step_ps / 1e12, fits=True),)

    def bound(self) -> float:
        """No plan of the space comes to less, by what its axes must earn."""
        assert self.best is not None
        if self.floor is not None:
            return min(self.floor, self.value)
        lows = [self.value]
        for row in self.rows:
            if row.outcome.proved and (row.kept or row.usd is not None):
                continue
            parts, costs = row.searcher.clusters, row.searcher.costs
            step = whole_step_ps(costs, self.best.below(row.outcome.bound))
            if self.worth is None:
                lows.append(step)
            elif self.worth.least_usd(parts, step) <= self.worth.most_usd:
                lows.append(self.worth.least(parts, step))
        return min(lows)

    def bound_ps(self) -> int:
        """The bound as a step on the GPUs of the best."""
        bound = self.bound()
        if bound == self.value:
            return self.step_ps
        return int(self.step_ps * bound / self.value) if self.worth else int(bound)

    @property
    def decisions(self) -> Decisions:
        """Of the best; of one part alone, they name it."""
        assert self.best is not None and self.costs is not None
        return named(self.best.decisions, self.costs)

    def answer(self) -> Answer | None:
        """What was found, as of one search; the nearest misfit where nothing fits. None: there was
        nothing to search."""
        outs = [row.outcome for row in self.rows]
        if not outs and self.best is None:
            return None
        found = Outcome(
            meshes=sum(out.meshes for out in outs), expanded=sum(out.expanded for out in outs),
            interrupted=any(out.interrupted for out in outs),
            hopeless=sum(out.hopeless for out in outs),
        )  # fmt: skip
        if self.best is None:
            costs = self.rows[0].searcher.costs
            for row in self.rows:
                m, full = row.outcome.misfit, row.outcome.full
                if full is not None:
                    found.full = less_over(found.full, full)
                if m is not None and nearer(found.misfit, m) is m:
                    found.misfit, costs = m, row.searcher.costs
            if found.misfit is not None:
                d = named(found.misfit.decisions, costs)
                found.misfit = replace(found.misfit, decisions=d)
            return Answer(costs=costs, outcome=found)
        assert self.costs is not None
        found.best = replace(self.best, decisions=self.decisions)
        gap = (self.step_ps - self.bound_ps()) / self.step_ps
        found.bound = found.best.score - round(gap * found.best.score)
        return Answer(costs=self.costs, outcome=found)


def named(d: Decisions, costs: Costs) -> Decisions:
    """The decisions; of one part alone, they name it."""
    return d if d.parts or d.shares else replace(d, parts=((costs.cluster.name, d.pp),))


@dataclass(kw_only=True)
class Shelf:
    """What searches of a model share, whatever their pins and the memory of a GPU: what a part's
    GPUs take, how units lie on them, and what meshes of several parts cost, whatever their order.
    """

    costs: dict[tuple[object, ...], Costs] = field(default_factory=dict)
    laid: dict[tuple[object, ...], dict[tuple[int, bool, bool], Assignments]] = field(
        default_factory=dict
    )
    piped: dict[tuple[object, ...], FleetSearcher] = field(default_factory=dict)

    def known(self, made: Costs, points: Sequence[tuple[int, int]]) -> Costs:
        """The costs of the same GPUs at these points, and at others."""
        key = made.cluster.name, made.cluster.count, made.workload, made.compiled
        found = self.costs.get(key)
        if found is None or not {*points} <= {*found.points}:
            every = dict.fromkeys((*(found.points if found else ()), *points))
            found = self.costs[key] = Costs(
                graph=made.graph, cluster=made.cluster, workload=made.workload,
                points=tuple(every), compiled=made.compiled,
            )  # fmt: skip
        return found

    def laid_on(self, costs: Costs, pins: Pins) -> dict[tuple[int, bool, bool], Assignments]:
        """How units lie on the GPUs of a part."""
        key = costs.cluster.name, costs.cluster.count, costs.workload, costs.compiled, pins.place
        return self.laid.setdefault(key, {})


def searchers(
    graph: Graph, fleet: Fleet, workload: Workload, options: TraceOptions, *,
    refused: Refused = (), shelf: Shelf | None = None, sizes: Sequence[int] | None = None,
) -> Iterator[Searcher]:  # fmt: skip
    """Each part alone, the quickest first; then replicas on several, side by side; then pipelines
    over several in every order, and again with a tp of each part. refused: what none may have.
    sizes: how many GPUs their parts may have together. Raises UsageError where the pins suit none.
    """
    pins = options.pins
    for part in fleet.parts:
        check_model(graph, part, workload, pins)
    usable = [capped(part, options.limits.memory_bytes) for part in fleet.parts]
    usable.sort(key=lambda part: -part.count * part.device.peak(workload.precision))
    blank = {part.name: Costs(graph=graph, cluster=part, workload=workload,
                              compiled=may_compile(workload, pins)) for part in usable}  # fmt: skip
    made: list[Searcher] = []
    last: list[Searcher] = []
    must = {key for key, value in refused if key in ("shares", "tp_by_part") and not value}
    for parts, replicas in suited(graph, fleet, workload, pins, usable):
        known = [blank[part.name] for part in parts]
        if replicas:
            made.append(_sharing(side_by_side(fleet, known), pins, refused))
            continue
        costs = together(fleet, known)
        if not isinstance(costs, MixedCosts):
            made.append(_alone(costs, pins, refused))
            continue
        if not pins.tp_by_part:
            made.append(_piped(costs, pins, refused, False))
        if pins.tp_by_part != () and workload.engine in NATIVE:
            last.append(_piped(costs, pins, refused, True))
    made = [
        s for s in (*made, *last) if must <= _kind(s)
        and (sizes is None or sum(part.count for part in s.clusters) in sizes)
    ]  # fmt: skip
    every = ((s.candidates() if isinstance(s, FleetSearcher) else s.meshes()) for s in made)
    points = dict.fromkeys((m.micro_batch, m.cp) for some in every for m in some)
    shelf = shelf or Shelf()
    for searcher in made:
        sides = kinds_of(searcher.costs)
        for side in sides:
            _share(side, shelf.known(side, tuple(points) or ((1, 1),)))
        laid = shelf.laid_on(sides[0], pins)
        if isinstance(searcher, FleetSearcher):
            names = frozenset(side.cluster.name for side in sides)
            key = names, workload, searcher.costs.compiled, pins.place
            first = shelf.piped.setdefault(key, searcher)
            if first is searcher:
                searcher._laid = laid
            searcher.share(first)
        else:
            searcher._laid = laid
        searcher.effort, searcher.gain_ppm = options.effort or searcher.effort, options.gain_ppm
        if isinstance(searcher, FleetSearcher) and searcher.apart:
            searcher.effort = max(1, searcher.effort // 2)
        yield searcher


def _alone(costs: Costs, pins: Pins, refused: Refused) -> Searcher:
    if refused:
        return Without(costs=costs, pins=pins, refused=refused)
    return Searcher(costs=costs, pins=pins)


def _sharing(costs: SharedCosts, pins: Pins, refused: Refused) -> ShareSearcher:
    if refused:
        return ShareWithout(costs=costs, pins=pins, refused=refused)
    return ShareSearcher(costs=costs, pins=pins)


def _piped(costs: MixedCosts, pins: Pins, refused: Refused, apart: bool) -> FleetSearcher:
    if refused:
        return FleetWithout(costs=costs, pins=pins, refused=refused, apart=apart)
    return FleetSearcher(costs=costs, pins=pins, apart=apart)


def _kind(searcher: Searcher) -> set[str]:
    """What of parts all plans of a search have."""
    if isinstance(searcher, ShareSearcher):
        return {"shares"}
    return {"tp_by_part"} if isinstance(searcher, FleetSearcher) and searcher.apart else set()


def _share(side: Costs, known: Costs) -> None:
    """Cost at the points of the same GPUs, and remember what is known of them."""
    side.points, side.layered = known.points, known.layered
    side._units, side._points = known._units, known._points
    side._fsdp, side._sums = known._fsdp, known._sums


def suited(
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
