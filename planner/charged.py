"""A plan that was traced, with what it costs."""

from __future__ import annotations

import math
from dataclasses import replace

from cost_models.fleet import Hardware, parts_of, used_parts
from planner.charges import charges, charges_said, decided_by
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
    by, limit = decided_by(cost, parts_of(hardware), options.prices), options.limits.usd
    if by and options.objective == "cost":
        said = (*said, f"--objective cost: counted {by}")
    if by and math.isfinite(limit):
        said = (*said, f"--max-cost {limit:g}: counted {by}")
    return replace(found, charges=cost, echo=(*found.echo, *said))
