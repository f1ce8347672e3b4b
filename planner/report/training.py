"""A plan of training as a page: one, or two side by side."""

from __future__ import annotations

from cost_models.fleet import Fleet
from cost_models.simulated import Simulated, simulated
from planner.check import Checked
from planner.report import assumptions, breakdown, flips, memory, placement, timeline, whynot
from planner.report.charts import Section
from planner.report.page import Row, page
from planner.report.sensitivity import sensitivity
from planner.report.verdict import subtitle, verdict
from planner.why import Why


def simulate(checked: Checked) -> Simulated:
    """The step of a plan, operation by operation."""
    p = checked.plan
    return simulated(p.graph, checked.hardware, p.workload, p.decisions, p.sharding_by_unit)


def one_page(checked: Checked, *, ask: bool = True) -> str:
    """The report of one plan. ask: also search for what else there is, which takes seconds."""
    rows: list[Row] = [(section,) for section in _sections(checked, "plan")]
    rows[-1:-1] = [(section,) for section in _asked(checked, ask)]
    return page(checked.plan.graph.name, subtitle(checked.plan), verdict(checked), rows)


def _sections(checked: Checked, prefix: str) -> list[Section]:
    """What needs no search."""
    plan, e = checked.plan, checked.estimate
    return [
        memory.section(e, prefix),
        timeline.section(simulate(checked), plan.decisions),
        breakdown.section(e),
        placement.section(plan),
        assumptions.section(plan, checked.hardware, e.assumptions, e.error),
    ]


def _asked(checked: Checked, ask: bool) -> list[Section]:
    """What else there is, and what would change the decision."""
    if not ask:
        return [whynot.left_out("Not asked (--no-why): alternatives and sensitivity take a search"
                                " each.")]  # fmt: skip
    if isinstance(checked.hardware, Fleet):
        return [whynot.left_out("Not asked: alternatives are of hardware of one kind, and this is"
                                f" {checked.plan.hardware}.")]  # fmt: skip
    why = Why(checked)
    rows = why.rows()
    price = (
        f"No price flips it: every plan here uses the same {checked.plan.decisions.gpus:,} GPUs, so"
        " that cost goes with time."
    )
    return [
        whynot.section(checked, rows),
        flips.section(sensitivity(checked, why, rows), checked.plan.decisions, price),
    ]
