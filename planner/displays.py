"""How plans, costs and differences look in a notebook and when printed.

HTML is a few tables with bars, no script and no style of the page's; every word of a plan is
escaped. Plans are costed anew with today's constants, as `plan show` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cost_models.units import format_bytes, format_count, format_rate, format_seconds
from ir.errors import PlanError
from planner.plain import plain
from planner.proved import status_words
from planner.report.markup import escape

if TYPE_CHECKING:
    from planner.check import Checked
    from planner.differ import Diff
    from planner.plan import Plan
    from planner.serving.check import CheckedServing
    from planner.serving.plan import ServingPlan

BAR_PX = 260
_SMALL = 0.005  # of the whole: shown together


def line(plan: Plan | ServingPlan) -> str:
    """A plan in one line, nothing computed."""
    from planner.plan import Plan

    count = format_count(plan.graph.parameter_count)
    if isinstance(plan, Plan):
        d = plan.decisions
        axes = ", ".join(f"{k} {getattr(d, k)}" for k in ("pp", "dp", "cp", "tp", "ep"))
        figures = f"{format_seconds(plan.step_time_us / 1e6)} a step"
    else:
        s = plan.serving
        axes = f"tp {s.tp}, pp {s.pp}, ep {s.ep}, replicas {s.replicas}"
        figures = f"a token every {format_seconds(plan.tpot_us / 1e6)}"
    return (
        f"<plan of {plan.graph.name} ({count} parameters) on {plan.hardware}: {axes}; "
        f"{figures}, {format_bytes(plan.peak_memory_bytes)} a GPU; {status_words(plan)}>"
    )


def costed(plan: Plan | ServingPlan) -> Checked | CheckedServing:
    """The plan with today's hardware files and constants; files are sought here."""
    from planner.check import examine
    from planner.plan import Plan
    from planner.serving.check import examine_serving

    if isinstance(plan, Plan):
        return examine(plan, Path())
    return examine_serving(plan, Path())


def text(found: Checked | CheckedServing) -> str:
    """What `plan show` prints."""
    from planner.check import Checked

    if isinstance(found, Checked):
        from planner.show import summary

        return summary(found.plan, found.estimate, notes=found.moved)
    from planner.serving.show import summary as served

    return served(found.plan, found.found, notes=found.moved)


def plan_text(plan: Plan | ServingPlan) -> str:
    """What `plan show` prints; one line and the reason where the plan cannot be costed here."""
    try:
        return plain(text(costed(plan)))
    except PlanError as fault:
        return plain("\n".join((line(plan), *fault.lines())))


def plan_html(plan: Plan | ServingPlan) -> str:
    """A plan as HTML; where it cannot be costed here, its line and the reason."""
    try:
        return checked_html(costed(plan))
    except PlanError as fault:
        return f"<p>{escape(line(plan))}</p><pre>{escape(chr(10).join(fault.lines()))}</pre>"


def checked_html(found: Checked | CheckedServing) -> str:
    """Figures, memory and time of a plan."""
    from planner.check import Checked

    plan = found.plan
    head = f"<b>{escape(plan.graph.name)}</b> on <b>{escape(plan.hardware)}</b>"
    if isinstance(found, Checked):
        e = found.estimate
        error = f" &plusmn;{e.error:.0%}"
        figures = f"{format_seconds(e.step_time_s)}{error} a step, MFU {e.mfu:.1%}"
        memory = [(name, float(size)) for name, size in e.fullest.memory_bytes]
        title = f"memory of pp rank {e.fullest.pp_rank}"
        spent = [(name, ps / 1e12) for name, ps in e.breakdown_ps]
        what, capacity, fits = "step", float(e.capacity_bytes), e.fits
    else:
        p = found.found
        figures = (
            f"first token {format_seconds(p.ttft_s)}, then one every {format_seconds(p.tpot_s)}; "
            f"{format_rate(p.tokens_per_s)} tokens/s"
        )
        memory = list(p.tiers)
        title = "memory of the fullest GPU, and below it; its error is not measured"
        spent, what = list(p.parts), "decode step"
        capacity, fits = float(p.memory.capacity_bytes), p.fits
    decided = "".join(f"<div>{escape(row)}</div>" for row in text(found).splitlines()[1:6])
    verdict = "" if fits else " <b>does not fit</b>"
    return (
        f"<div><p>{head}, {format_count(plan.graph.parameter_count)} parameters: "
        f"{figures}{verdict}; {escape(status_words(plan))}</p>"
        f"<details><summary>decisions</summary><pre>{decided}</pre></details>"
        f"{_bars(title, memory, capacity, _bytes, 'of the capacity')}"
        f"{_bars(what, spent, sum(v for _, v in spent), format_seconds, 'of it')}</div>"
    )


def diff_html(d: Diff) -> str:
    """A difference: the verdict, figures, decisions, what each change does alone."""
    from planner.differ_text import amount, effect_words, told_apart
    from planner.serving.effects import HEADS

    figures = [
        (n.name, amount(n, n.old), amount(n, n.new),
         (f"{n.change:+.1%}" + (" (within model error)" if n.within_error else ""))
         if n.moved else "=")
        for n in d.numbers
    ]  # fmt: skip
    changes = [(c.what, c.old, c.new) for rows in (d.decisions, d.blocks, d.inputs) for c in rows]
    tables = [_table(("", "before", "after", "change"), figures)]
    tables += [_table(("decided", "before", "after"), changes)] if changes else []
    if told_apart(d.effects, d):
        tables += [_table(("alone", "step time", "memory"), map(effect_words, d.effects))]
    if told_apart(d.serving_effects, d):
        served = [(e.what, *e.cells, e.note) for e in d.serving_effects]
        tables += [_table(("in this order", *HEADS, ""), served)]
    return f"<div><p><b>{escape(d.verdict)}</b></p>{''.join(tables)}</div>"


def _bars(
    title: str, rows: Sequence[tuple[str, float]], whole: float, say: Callable[[float], str],
    of: str,
) -> str:  # fmt: skip
    """A table with a bar a row, the largest first, small ones together."""
    large = sorted((r for r in rows if r[1] >= _SMALL * whole), key=lambda row: -row[1])
    rest = sum(v for _, v in rows) - sum(v for _, v in large)
    shown = [*large, ("others", rest)] if rest > 0 else large
    cells = "".join(
        f"<tr><td style='text-align:left'>{escape(name)}</td><td>{say(value)}</td>"
        f"<td style='text-align:left'><div style='width:{round(BAR_PX * min(1, value / whole))}px;"
        f"height:.8em;background:#4477aa'></div></td><td>{value / whole:.0%} {of}</td></tr>"
        for name, value in shown
    )
    return f"<table><caption style='text-align:left'>{escape(title)}</caption>{cells}</table>"


def _bytes(value: float) -> str:
    return format_bytes(round(value))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(word)}</th>" for word in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(word)}</td>" for word in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"
