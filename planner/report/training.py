"""A plan of training as a page: one, or two side by side."""

from __future__ import annotations

from cost_models.simulated import Simulated, simulated
from planner.check import Checked
from planner.report import assumptions, breakdown, memory, placement, timeline
from planner.report.charts import Section
from planner.report.page import Row, page
from planner.report.verdict import subtitle, verdict


def simulate(checked: Checked) -> Simulated:
    """The step of a plan, operation by operation."""
    p = checked.plan
    return simulated(p.graph, checked.hardware, p.workload, p.decisions, p.sharding_by_unit)


def one_page(checked: Checked) -> str:
    """The report of one plan."""
    rows: list[Row] = [(section,) for section in _sections(checked, "plan")]
    return page(checked.plan.graph.name, subtitle(checked.plan), verdict(checked), rows)


def _sections(checked: Checked, prefix: str) -> list[Section]:
    plan, e = checked.plan, checked.estimate
    return [
        memory.section(e, prefix),
        timeline.section(simulate(checked), plan.decisions),
        breakdown.section(e),
        placement.section(plan),
        assumptions.section(plan, checked.hardware, e.assumptions, e.error),
    ]
