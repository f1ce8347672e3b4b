"""Why not: the best plan without each decision, and what first stands in its way."""

from __future__ import annotations

from collections.abc import Sequence

from cost_models.units import format_seconds
from planner.check import Checked
from planner.refused import refused_words
from planner.report.charts import Mark, Section, bar, breakable, figure, row, sentences, table
from planner.report.markup import Children, el
from planner.why import Alternative
from planner.why_text import decided, told

NOT_ASKED = "Not asked (--no-why): alternatives and sensitivity take a search each."
LEAST_SCALE = 0.02  # of the step: bars of smaller differences are not blown up beyond it


def section(checked: Checked, rows: Sequence[Alternative], effort: int) -> Section:
    """rows: `Why.rows`, of that effort each."""
    base = checked.estimate
    made = [r for r in rows if r.estimate is not None]
    worse = [r for r in made if _change(checked, r) > base.error]
    quicker = [r for r in made if _change(checked, r) < 0]
    lede = sentences(
        f"Each decision is refused in turn and the search asked again: {len(rows)}"
        f" alternative{'s' * (len(rows) != 1)}.",
        f"{len(worse)} of them cost more than the model's error of {base.error:.0%}."
        if worse else f"None costs more than the model's error of {base.error:.0%}"
        + ("." if quicker else ": they are as good as anyone can tell beforehand.")
        if made else None,
        f"{len(quicker)} would be quicker, by less than the axes that they add must earn, or"
        " because the plan was pinned." if quicker else None,
    )
    scale = max([LEAST_SCALE, *(abs(_change(checked, r)) for r in made)])
    drawn = [_row(checked, r, scale) for r in rows]
    behind = table(
        "The best plan without a decision",
        ["without", "step", "change", "instead", "first binding constraint"],
        [[breakable(refused_words(r.refused)), *_numbers(checked, r), decided(r.decisions)
          if r.decisions else "nothing", told(r, checked)] for r in rows],
        last_words=2,
    )  # fmt: skip
    return Section(
        key="why-not", title="Why not otherwise", lede=lede,
        body=figure(
            "The step of the best plan without each decision, against this one.",
            el("div", drawn, class_="rows"), behind,
            note=f"Each row is a search of effort {effort}; plan why --not asks one in full.",
        ),
    )  # fmt: skip


def left_out(reason: str) -> Section:
    """The section where nothing was asked. reason: why, as a sentence."""
    return Section(key="why-not", title="Why not otherwise", lede=reason, body=el("div"))


def _row(checked: Checked, r: Alternative, scale: float) -> Children:
    """The change as a bar from the middle, what binds below it."""
    step, change = _numbers(checked, r)
    name, marks, half = refused_words(r.refused), [], 0.5
    if r.estimate is not None:
        share = half * _change(checked, r) / scale
        kind = "worse" if share > 0 else "better"
        marks = [Mark(start=min(half, half + share), end=max(half, half + share), kind=kind,
                      tip=f"without {name}: {step}, {change}")]
    drawn = bar(marks, lines=[(half, "this plan")])
    return el(
        "div", row(["without ", el("b", breakable(name))], drawn, f"{step} {change:>7}"),
        el("p", told(r, checked), class_="because"),
        class_="reasoned",
    )  # fmt: skip


def _numbers(checked: Checked, r: Alternative) -> tuple[str, str]:
    if r.estimate is None:
        return "none", ""
    return format_seconds(r.estimate.step_time_s), f"{_change(checked, r):+.1%}"


def _change(checked: Checked, r: Alternative) -> float:
    assert r.estimate is not None
    return r.estimate.step_time_s / checked.estimate.step_time_s - 1
