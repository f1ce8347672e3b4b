"""A model on several kinds of GPUs, asked again: `Asking` of all that `fleet_search` searches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cost_models.decisions import Workload
from cost_models.fleet import Fleet
from ir.graph import Graph
from planner.asking import Answer, roomier
from planner.decisions import Pins
from planner.fleet_search import FleetSearch, Shelf, searchers
from planner.options import TraceOptions
from planner.refused import Refused


@dataclass(kw_only=True)
class FleetAsking:
    """A model on hardware of several kinds under a workload, to be asked what else there is."""

    graph: Graph
    fleet: Fleet
    workload: Workload
    _shelf: Shelf = field(default_factory=Shelf)

    def without(
        self, refused: Refused, pins: Pins, *, memory: float = 1.0, part: str = "", effort: int,
        known: Answer | None = None,
    ) -> Answer | None:  # fmt: skip
        """The best plan that has none of what is refused. memory: times that of each GPU, or of
        one part's. known: a plan of the space. None: nothing legal is left."""
        fleet = replace(self.fleet, parts=tuple(
            roomier(one, memory) if part in ("", one.name) else one for one in self.fleet.parts
        ))  # fmt: skip
        found = FleetSearch(fleet=fleet, workload=self.workload)
        if known is not None:
            found.best, found.costs = known.outcome.best, known.costs
        options = TraceOptions(model="", pins=pins, effort=effort)
        for searcher in searchers(
            self.graph, fleet, self.workload, options, refused=refused, shelf=self._shelf
        ):
            found.search(searcher)
            if found.rows and found.rows[-1].outcome.interrupted:
                break
        answer = found.answer()
        if answer is None or (answer.outcome.best is None and answer.outcome.misfit is None):
            return None
        return answer
