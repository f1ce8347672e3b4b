"""The same model asked again: under other pins, another count of GPUs, another batch or length.

Answers share what does not change: costs of one cluster and workload, and how units lie on tp.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cost_models.chain import Chain
from cost_models.decisions import Decisions, Workload
from cost_models.estimate import estimate_step, whole_step_ps
from cost_models.fleet import Fleet, Hardware
from cost_models.hardware import Cluster
from cost_models.ledger import Estimate
from cost_models.step import Assignments, Costs
from planner.bounds import NEVER_PS
from planner.decisions import Pins
from planner.mesh import meshes
from planner.refused import Refused, Without
from planner.runnable import may_compile
from planner.score import score_of
from planner.search import Outcome, Searcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a search found, and with which costs."""

    costs: Costs
    outcome: Outcome

    @property
    def decisions(self) -> Decisions:
        """Of the best plan."""
        assert self.outcome.best is not None
        return self.outcome.best.decisions

    @property
    def score(self) -> int:
        """Of the best plan. Of several kinds of GPUs by its whole step: what is beside the
        objective differs with the GPUs that are used."""
        best = self.outcome.best
        assert best is not None
        if not (best.decisions.parts or best.decisions.shares):
            return best.score
        step_ps = whole_step_ps(self.costs, best.objective_ps)
        return score_of(step_ps, best.decisions, best.gain_ppm)

    def estimate(self) -> Estimate:
        """Of the best plan."""
        assert self.outcome.best is not None
        return estimated(self.costs, self.decisions, self.outcome.best.assignments)


def estimated(costs: Costs, d: Decisions, assignments: Assignments) -> Estimate:
    """The estimate of decisions whose point the costs may not have yet."""
    if (d.micro_batch, d.cp) not in costs.points:
        costs = replace(costs, points=((d.micro_batch, d.cp),), _units={}, _points={})
    return estimate_step(costs, costs.step(d, assignments), d)


@dataclass(kw_only=True)
class Asking:
    """A model on hardware under a workload, to be asked what else there is."""

    searcher: Searcher
    _known: dict[tuple[object, ...], Searcher] = field(default_factory=dict)

    @property
    def hardware(self) -> Cluster:
        return self.searcher.costs.cluster

    @property
    def workload(self) -> Workload:
        return self.searcher.costs.workload

    @property
    def chain(self) -> Chain:
        return self.searcher.costs.chain

    def under(
        self, pins: Pins, *, cluster: Cluster | None = None, workload: Workload | None = None
    ) -> Searcher:
        """A search under these pins. cluster: with other GPUs of the same kind. How units lie
        is taken over where tp is inside a domain of both; beyond it is decided anew."""
        costs = self.searcher.costs
        cluster, workload = cluster or costs.cluster, workload or costs.workload
        compiled = may_compile(workload, pins)
        memory = cluster.device.memory_bytes, cluster.tiers
        key = (cluster.count, memory, workload, compiled, pins.place)
        wanted = dict.fromkeys(
            [(1, 1)] + [
                (m.micro_batch, m.cp) for p in (Pins(), pins)
                for m in meshes(costs.chain, cluster, workload, p)
            ]
        )  # fmt: skip
        known = self._known.get(key)
        if known is None or not wanted.keys() <= {*known.costs.points}:
            made = Costs(
                graph=costs.graph, cluster=cluster, workload=workload, points=tuple(wanted),
                compiled=compiled,
            )  # fmt: skip
            known = self._known[key] = Searcher(
                costs=made, pins=Pins(place=pins.place), _laid=self._shared(made, pins),
                gain_ppm=self.searcher.gain_ppm,
            )
        return known.under(pins)

    def _shared(self, made: Costs, pins: Pins) -> dict[tuple[int, bool, bool], Assignments]:
        """What is laid already and lies the same there."""
        own = self.searcher
        if pins.place != own.pins.place or made.workload != own.costs.workload:
            return {}
        alike = made.cluster.count == own.costs.cluster.count
        inside = min(made.cluster.domain_ranks, own.costs.cluster.domain_ranks)
        return {key: laid for key, laid in own._laid.items() if alike or key[0] <= inside}

    def can_fit(
        self, pins: Pins, *, hardware: Hardware | None = None, workload: Workload | None = None
    ) -> bool:
        """False where bounds alone say that no mesh fits: there is nothing to search."""
        found = self.under(pins, cluster=_alike(hardware), workload=workload)
        runs = [m for m in found.meshes() if found.runs(m)]
        spaces = [replace(found, formats=way) for way in found.format_ways()]
        return any((s.bounds(runs).lower_ps < NEVER_PS).any() for s in spaces) if runs else False

    def suits(self, pins: Pins, workload: Workload) -> bool:
        """Whether any mesh has these pins and divides the batch."""
        return next(meshes(self.chain, self.hardware, workload, pins), None) is not None

    def ask(
        self, pins: Pins, *, hardware: Hardware | None = None, workload: Workload | None = None,
        effort: int,
    ) -> Answer:  # fmt: skip
        """The best plan that so much effort finds."""
        found = self.under(pins, cluster=_alike(hardware), workload=workload)
        found.effort = effort
        return Answer(costs=found.costs, outcome=found.run())

    def without(
        self, refused: Refused, pins: Pins, *, memory: float = 1.0, effort: int,
        known: Answer | None = None,
    ) -> Answer | None:  # fmt: skip
        """The best plan that has none of what is refused. memory: times a GPU's. known: a plan of
        the space. None: nothing legal is left."""
        s = self.under(pins, cluster=roomier(self.searcher.costs.cluster, memory))
        search = Without(
            costs=s.costs, pins=pins, effort=effort, refused=refused, _laid=s._laid, _over=s._over,
            gain_ppm=s.gain_ppm,
        )
        out = search.run(known.outcome.best if known else None)
        if out.best is None and out.misfit is None:
            return None
        return Answer(costs=s.costs, outcome=out)


def _alike(hardware: Hardware | None) -> Cluster | None:
    assert not isinstance(hardware, Fleet)  # its parts are asked about by `FleetAsking`
    return hardware


def roomier(cluster: Cluster, memory: float) -> Cluster:
    """The same with so many times the memory of each GPU."""
    device = cluster.device
    if memory == 1.0:
        return cluster
    more = replace(device, memory_bytes=int(memory * device.memory_bytes))
    return replace(cluster, device=more)
