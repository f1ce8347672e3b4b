"""A report of serving runs as text, and as a JSON document: seconds, the same bytes each time."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Any

from cost_models.units import format_seconds
from planner.validation.report import DIGITS, MOST_WORST, WIDTH, scores_json, wrapped
from planner.validation.serving import (
    ServedPrediction,
    ServingClass,
    ServingReport,
)

FITTED = (
    "The engines' constants were fitted on such runs, a few numbers an engine; cross-validated"
    " errors by model and device are in docs/serving.md."
)


def text(report: ServingReport, name: str) -> str:
    """The report in 80 columns. name: of the file."""
    head = (
        f"{report.rows} serving runs of {name}: {len(report.fit)} predicted and scored,"
        f" {len(report.unfit)} unfit"
    )
    parts = [textwrap.wrap(head, WIDTH)]
    if report.classes:
        title = f"{'':39} {'':>6} {'TPOT':>8} {'':>7} {'TTFT':>8} {'':>7}"
        second = f"{'':39} {'n':>6} {'MAPE':>8} {'median':>7} {'MAPE':>8} {'median':>7}"
        parts.append([title, second, *_class_lines(report.classes)])
        parts.append(textwrap.wrap(FITTED, WIDTH))
        parts.append(_ranking(report))
        parts.append(_worst(report))
    if report.unfit:
        reasons = Counter(reason for _, reason in report.unfit)
        parts.append(["unfit", *(
            line for reason, n in reasons.most_common()
            for line in wrapped(f"  {n:5d}  {reason}", 9)
        )])  # fmt: skip
    notes = Counter(note for one in report.fit for note in one.row.notes)
    if notes:
        parts.append(["read otherwise than said", *(
            line for note, n in notes.most_common() for line in wrapped(f"  {n:5d}  {note}", 9)
        )])  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in parts)


def _class_lines(classes: tuple[ServingClass, ...]) -> list[str]:
    lines, last = [], ""
    for c in classes:
        label = "" if c.dimension == last else c.dimension
        last = c.dimension
        lines.append(
            f"{label:10} {c.name[:28]:28} {c.tpot.n:6d} {c.tpot.mape:8.1%} {c.tpot.median:7.1%}"
            f" {c.ttft.mape:8.1%} {c.ttft.median:7.1%}"
        )
    return lines


def _tau(value: tuple[float | None, int]) -> str:
    return f"{'no pair' if value[0] is None else f'{value[0]:.3f}':>8} {value[1]:6d}"


def _ranking(report: ServingReport) -> list[str]:
    lines = [f"{'ranking by TPOT, ties within 3%':34} {'any load':>8} {'pairs':>6}"
             f" {'same':>9} {'pairs':>6}"]  # fmt: skip
    return lines + [f"  {r.group[:32]:32} {_tau(r.any_load)}  {_tau(r.same_load)}"
                    for r in report.ranking]  # fmt: skip


def _off(one: ServedPrediction) -> float:
    return one.tpot_s / one.row.tpot_s - 1


def _worst(report: ServingReport) -> list[str]:
    rows = sorted(report.fit, key=lambda one: (-abs(_off(one)), one.row.id))[:MOST_WORST]
    return [f"{'worst TPOT':10} {'measured':>9} {'error':>7}", *(
        f"{format_seconds(one.tpot_s):>10} {format_seconds(one.row.tpot_s):>9} {_off(one):+7.0%}"
        f"  {one.row.id}"[:WIDTH]
        for one in rows
    )]  # fmt: skip


def verbose_lines(report: ServingReport) -> list[str]:
    """Every run, a line each: TPOT and TTFT, predicted and measured."""
    return [
        f"{format_seconds(one.tpot_s):>9} {format_seconds(one.row.tpot_s):>9} {_off(one):+8.1%}"
        f" {format_seconds(one.ttft_s):>9} {format_seconds(one.row.ttft_s):>9}"
        f" {one.ttft_s / one.row.ttft_s - 1:+8.1%}  {one.row.id}"
        for one in (*report.fit, *report.set_aside)
    ]


def _class_json(c: ServingClass) -> dict[str, Any]:
    return {"tpot": scores_json(c.tpot), "ttft": scores_json(c.ttft)}


def _tau_json(value: tuple[float | None, int]) -> dict[str, Any]:
    tau = None if value[0] is None else round(value[0], DIGITS)
    return {"kendall_tau": tau, "pairs": value[1]}


def document(report: ServingReport) -> dict[str, Any]:
    """The report's values in seconds, under stable keys."""
    return {
        "schema": "validation-serving/1", "rows": report.rows, "used": len(report.fit),
        "unfit": [{"id": name, "reason": reason} for name, reason in report.unfit],
        "classes": {
            f"{c.dimension} {c.name}".strip(): _class_json(c) for c in report.classes
        },
        "set_aside_too": report.everything and _class_json(report.everything),
        "ranking": {
            r.group: {"any_load": _tau_json(r.any_load), "same_load": _tau_json(r.same_load)}
            for r in report.ranking
        },
        "predictions": [_prediction(one, True) for one in report.fit]
        + [_prediction(one, False) for one in report.set_aside],
    }  # fmt: skip


def _prediction(one: ServedPrediction, scored: bool) -> dict[str, Any]:
    row = one.row
    return {
        "id": row.id, "line": row.line, "scored": scored, "ttft_s": one.ttft_s,
        "measured_ttft_s": row.ttft_s, "tpot_s": one.tpot_s, "measured_tpot_s": row.tpot_s,
        "breakdown_s": dict(one.breakdown_s), "notes": list(row.notes),
    }  # fmt: skip
