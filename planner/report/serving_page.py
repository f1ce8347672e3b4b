"""A plan of serving as a page: one, or two side by side."""

from __future__ import annotations

from collections.abc import Sequence

from planner.report import changes, serving, serving_asked
from planner.report.page import Row, document, pair
from planner.report.whynot import NOT_ASKED, left_out
from planner.serving.check import CheckedServing
from planner.serving.differ import diff_serving


def page(plans: Sequence[CheckedServing], *, ask: bool = True) -> str:
    """The report of a plan, or of an old and a new one side by side on scales that compare.

    ask: also predict what else there is (than the new one).
    """
    old, new = plans[0], plans[-1]
    rows: list[Row] = [(changes.section(diff_serving(old, new)),)] if len(plans) == 2 else []
    rows += [*_rows(plans), *_asked(new, ask), (serving.rests_on(new),)]
    return document(new.plan.graph.name, [serving.subtitle(c.plan) for c in plans],
                    pair([serving.verdict(c) for c in plans]), rows)  # fmt: skip


def _rows(plans: Sequence[CheckedServing]) -> list[Row]:
    """What is predicted of every plan, on one scale."""
    wide_bytes = max(serving.scale_of(c.found) for c in plans)
    wide_s = max(c.found.latency_s(serving.load_of(c.plan)) for c in plans)
    step_s = max(c.found.decode_s for c in plans)
    return [
        tuple(serving.memory(c, wide_bytes) for c in plans),
        tuple(serving.request(c, wide_s) for c in plans),
        tuple(serving.breakdown(c, step_s) for c in plans),
        tuple(serving.placement(c) for c in plans),
    ]


def _asked(checked: CheckedServing, ask: bool) -> list[Row]:
    if not ask:
        return [(left_out(NOT_ASKED),)]
    others = serving_asked.others_of(checked)
    rivals = () if isinstance(others, str) else others
    effects = serving_asked.effects(checked, rivals)
    return [
        (serving_asked.whynot(checked, others),),
        (serving_asked.sensitivity(checked, effects, len(rivals)),),
    ]
