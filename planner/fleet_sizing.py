"""A candidate of `plan size` that is a sum of several kinds of GPUs, with its own counts."""

from __future__ import annotations

from dataclasses import replace

from cost_models.decisions import Decisions, Workload
from cost_models.estimate import estimate
from cost_models.fleet import Fleet
from cost_models.ledger import Estimate
from cost_models.words import sharding_of
from ir.graph import Graph
from planner.decisions import Pins
from planner.fleet_asking import FleetAsking
from planner.limits import capped


def fastest_on(
    graph: Graph, fleet: Fleet, workload: Workload, memory_bytes: int | None, effort: int
) -> tuple[Decisions, Estimate, float] | None:
    """(decisions, estimate, gap) of the quickest plan of any of its parts; None where nothing was
    found that fits. Each of what `plan trace` searches there has so much effort."""
    usable = replace(fleet, parts=tuple(capped(part, memory_bytes) for part in fleet.parts))
    asking = FleetAsking(graph=graph, fleet=usable, workload=workload)
    found = asking.without((), Pins(), effort=effort)
    if found is None or found.outcome.best is None:
        return None
    d, laid = found.decisions, found.outcome.best.assignments
    shardings = {u.name: sharding_of(u, a) for (u, _), a in laid.items()} if d.tp > 1 else {}
    return d, estimate(graph, fleet, workload, d, shardings), found.outcome.gap
