"""A model on several kinds of GPUs, asked again: `Asking` of all that `fleet_search` searches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from cost_models.chain import Chain, chain_of
from cost_models.decisions import Workload
from cost_models.fleet import Fleet, Hardware
from ir.errors import PlanError
from ir.graph import Graph
from planner.asking import Answer, roomier
from planner.decisions import Pins
from planner.fleet_search import FleetSearch, Shelf, searchers
from planner.options import TraceOptions
from planner.refused import Refused
from planner.score import AXIS_GAIN_PPM
from planner.search import Searcher


@dataclass(kw_only=True)
class FleetAsking:
    """A model on hardware of several kinds under a workload, to be asked what else there is."""

    graph: Graph
    fleet: Fleet
    workload: Workload
    gain_ppm: int = AXIS_GAIN_PPM  # of the step that an axis must earn
    _shelf: Shelf = field(default_factory=Shelf)

    @property
    def hardware(self) -> Fleet:
        return self.fleet

    @property
    def chain(self) -> Chain:
        return chain_of(self.graph)

    def can_fit(
        self, pins: Pins, *, hardware: Hardware | None = None, workload: Workload | None = None
    ) -> bool:
        """Whether there is something to search: bounds of several parts say nothing of memory."""
        return self.suits(pins, workload or self.workload, hardware)

    def suits(self, pins: Pins, workload: Workload, hardware: Hardware | None = None) -> bool:
        """Whether any mesh of any parts has these pins and divides the batch."""
        return any(next(s.meshes(), None) for s in self._searchers(pins, hardware, workload))

    def ask(
        self, pins: Pins, *, hardware: Hardware | None = None, workload: Workload | None = None,
        effort: int, refused: Refused = (),
    ) -> Answer | None:  # fmt: skip
        """A plan that fits, of the first parts that have one, with none of what is refused. Parts
        alone share so much effort, and so do several together. None: nothing legal is left."""
        workload = workload or self.workload
        found = FleetSearch(fleet=self.fleet, workload=workload)
        for searcher in _dealt(self._searchers(pins, hardware, workload, refused), effort):
            found.search(searcher)
            if found.best is not None:
                break
        return found.answer()

    def _searchers(
        self, pins: Pins, hardware: Hardware | None, workload: Workload, refused: Refused = ()
    ) -> Iterator[Searcher]:
        fleet = hardware or self.fleet
        assert isinstance(fleet, Fleet)
        options = TraceOptions(model="", pins=pins, gain_ppm=self.gain_ppm)
        try:
            yield from searchers(
                self.graph, fleet, workload, options, refused=refused, shelf=self._shelf
            )
        except PlanError:  # the pins suit no parts
            return

    def without(
        self, refused: Refused, pins: Pins, *, memory: float = 1.0, part: str = "", effort: int,
        known: Answer | None = None, dealt: bool = False,
    ) -> Answer | None:  # fmt: skip
        """The best plan that has none of what is refused. memory: times that of each GPU, or of
        one part's. known: a plan of the space. dealt: whether parts alone share the effort, and so
        do several together; else each has it. None: nothing legal is left."""
        fleet = replace(self.fleet, parts=tuple(
            roomier(one, memory) if part in ("", one.name) else one for one in self.fleet.parts
        ))  # fmt: skip
        found = FleetSearch(fleet=fleet, workload=self.workload)
        if known is not None:
            assert known.outcome.best is not None
            found.know(known.outcome.best, known.costs)
        options = TraceOptions(
            model="", pins=pins, effort=effort, gain_ppm=self.gain_ppm
        )
        every = searchers(
            self.graph, fleet, self.workload, options, refused=refused, shelf=self._shelf
        )
        for searcher in _dealt(every, effort) if dealt else every:
            found.search(searcher)
            if found.stopped:
                break
        answer = found.answer()
        if answer is None or (answer.outcome.best is None and answer.outcome.misfit is None):
            return None
        return answer


def _dealt(searchers: Iterable[Searcher], effort: int) -> Iterator[Searcher]:
    """The searches, the effort shared by those of parts alone, and again by those of several."""
    every = [*searchers]
    alone = [len(searcher.clusters) == 1 for searcher in every]
    for searcher, single in zip(every, alone):
        searcher.effort = max(1, effort // alone.count(single))
        yield searcher
