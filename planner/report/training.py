"""A plan of training as a page: one, or two side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cost_models.fleet import Fleet
from cost_models.simulated import Simulated, simulated
from planner.check import Checked
from planner.differ import diff
from planner.report import (
    assumptions,
    breakdown,
    changes,
    flips,
    memory,
    placement,
    timeline,
    whynot,
)
from planner.report.charts import Section
from planner.report.page import Row, document, pair
from planner.report.sensitivity import sensitivity
from planner.report.verdict import subtitle, verdict
from planner.why import ROW_EFFORT, Why

Progress = Callable[[str], None]
PREFIXES = ("old", "new")


def simulate(checked: Checked) -> Simulated:
    """The step of a plan, operation by operation."""
    p = checked.plan
    return simulated(p.graph, checked.hardware, p.workload, p.decisions, p.sharding_by_unit)


def page(
    plans: Sequence[Checked], *, ask: bool = True, effort: int = ROW_EFFORT,
    progress: Progress | None = None,
) -> str:  # fmt: skip
    """The report of a plan, or of an old and a new one side by side on scales that compare.

    ask: also search for what else there is (than the new one), which takes seconds.
    effort: of each search.
    """
    old, new, both = plans[0], plans[-1], len(plans) == 2
    rows: list[Row] = [(changes.section(diff(old, new)),)] if both else []
    rows += _rows(plans, PREFIXES if both else ("plan",))
    rows += [*_asked(new, effort if ask else None, progress), _rests_on(new)]
    return document(new.plan.graph.name, [subtitle(c.plan) for c in plans],
                    pair([verdict(c) for c in plans]), rows)  # fmt: skip


def _rows(plans: Sequence[Checked], prefixes: Sequence[str]) -> list[Row]:
    """What needs no search: the same section of every plan, on one scale."""
    steps = [simulate(c) for c in plans]
    wide_bytes = max(memory.scale_of(c.estimate) for c in plans)
    wide_ps = max(c.estimate.step_time_ps for c in plans)
    return [
        tuple(memory.section(c.estimate, p, wide_bytes) for c, p in zip(plans, prefixes)),
        tuple(timeline.section(s, c.plan.decisions, wide_ps) for s, c in zip(steps, plans)),
        tuple(breakdown.section(c.estimate, wide_ps) for c in plans),
        tuple(placement.section(c.plan) for c in plans),
    ]


def _rests_on(c: Checked) -> Row:
    e = c.estimate
    return (assumptions.section(c.plan, c.hardware, e.assumptions, e.error),)


def _asked(checked: Checked, effort: int | None, progress: Progress | None) -> list[Row]:
    """What else there is, and what would change the decision; None: not asked."""
    if effort is None:
        return [(whynot.left_out(whynot.NOT_ASKED),)]
    why = Why(checked)
    found: list[Section] = [whynot.section(checked, rows := why.rows(effort, progress), effort)]
    price = (
        f"No price flips it: every plan here uses the same {checked.plan.decisions.gpus:,} GPUs, so"
        " that cost goes with time."
        if not isinstance(checked.hardware, Fleet) else
        "Prices are not weighed here: plans that leave a part idle cost less an hour, and"
        " plan trace --objective cost plans for that."
    )
    d = checked.plan.decisions
    found.append(flips.section(sensitivity(checked, why, rows, effort), d, price))
    return [(section,) for section in found]
