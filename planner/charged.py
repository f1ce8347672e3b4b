"""A plan that was traced, with what it costs."""

from __future__ import annotations

from dataclasses import replace

from cost_models.fleet import Hardware, used_parts
from planner.charges import charges, charges_said
from planner.options import TraceOptions, TraceResult


def charged(found: TraceResult, options: TraceOptions, hardware: Hardware) -> TraceResult:
    """With what it costs, where the options have prices."""
    if not options.prices:
        return found
    plan = found.plan
    cost = charges(
        plan.graph, hardware, plan.workload, plan.decisions, found.estimate, options.operations,
        options.prices,
    )  # fmt: skip
    unit = "tokens" if plan.graph.seq_in_input else "samples"
    said = charges_said(cost, used_parts(hardware, plan.decisions), options.prices, unit)
    return replace(found, charges=cost, echo=(*found.echo, *said))
