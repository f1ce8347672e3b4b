"""A report of runs as text, and as a JSON document: base units, the same bytes each time."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from cost_models.units import format_bytes, format_seconds
from cost_models.validation.metrics import Scores
from planner.validation.running import LeftOut, Row
from planner.validation.scoring import NEAR, SLACK, Ranking, Report, Scored, Verdicts
from planner.validation.shipped import CrossValidated

WIDTH = 80
MOST_WORST, MOST_IDS = 15, 4  # of a list; --json has all
DIGITS = 6  # of a relative error: beyond what a prediction knows, within what machines agree on

FITTED = (
    "Constants were fitted on published runs, those of the shipped table among them: errors of "
    "such runs are in-sample. A run that nobody fitted to is nearer to the cross-validated figures."
)


# --- text ---------------------------------------------------------------------------------------


def text(report: Report, name: str, left_out: CrossValidated | None) -> str:
    """The report in 80 columns. name: of the file; left_out: errors of runs left out of fits."""
    peaks = sum(1 for row in report.used if row.measured_bytes)
    ooms = len(report.verdicts.oom)
    head = (
        f"{report.rows} runs of {name}: {len(report.used)} predicted, {len(report.skipped)} "
        f"skipped; {len(report.timed)} have a step time, {peaks} a peak memory, {ooms} ran out of "
        "memory"
    )
    parts = [textwrap.wrap(head, WIDTH)]
    if report.timed:
        parts.append(_classes("step time", report.classes))
        parts.append(_cross_validated(left_out))
        parts.append(_ranking(report))
    if peaks or ooms:
        parts.append(_memory(report))
    parts.append(_worst(report.timed))
    parts.append(_skipped(report.skipped))
    parts.append(_defaults(report))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def class_lines(rows: Iterable[tuple[str, str, Scores]]) -> list[str]:
    """A table of (dimension, class, scores), a dimension named once."""
    lines, last = [], ""
    for dimension, name, s in rows:
        label = "" if dimension == last else dimension
        last = dimension
        lines.append(
            f"{label:10} {name[:28]:28} {s.n:6d} {s.mape:8.1%} {s.median:7.1%} {s.bias:+7.1%}"
            f" {s.p90:7.1%}"
        )
    return lines


def header(title: str) -> str:
    return f"{title:39} {'n':>6} {'MAPE':>8} {'median':>7} {'bias':>7} {'p90':>7}"


def wrapped(line: str, indent: int = 2) -> list[str]:
    """A line in 80 columns, the rest of it indented."""
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def _classes(title: str, classes: Sequence[Scored]) -> list[str]:
    rows = ((c.dimension, _label(c), c.scores) for c in classes)
    return [header(title), *class_lines(rows)]


def _label(c: Scored) -> str:
    return "moe, hybrid too" if c.name == "moe" else c.name.removeprefix(f"{c.dimension} ")


def _cross_validated(left_out: CrossValidated | None) -> list[str]:
    words = textwrap.wrap(FITTED, WIDTH)
    if left_out is None:
        return [*words, "cross-validated figures: none are shipped"]
    rows = (  # of whole sources and generations left out, the kinds of model; --json has all
        ("", name, s) for name, s in left_out.classes
        if " out, " not in name or name.rpartition(", ")[2] in ("all", "dense", "moe", "hybrid")
    )
    return [*words, header("cross-validated"), *class_lines(rows), *wrapped(left_out.note)]


def _ranking(report: Report) -> list[str]:
    rows = (
        ("any workload, seconds a token", report.ranking),
        ("the same batch and sequence", report.same_workload),
    )
    lines = ["ranking of configurations of one model on the same GPUs, ties within 3%"]
    for words, r in rows:
        tau = "no pair" if r.tau is None else f"Kendall tau {r.tau:.3f}"
        lines.append(f"  {words:31}{tau}, {r.pairs} pairs in {r.groups} groups")
    return lines


def _memory(report: Report) -> list[str]:
    v = report.verdicts
    lines = _classes("peak memory", report.memory) if report.memory else ["peak memory"]
    if v.oom:
        near = [i for i in v.near if i not in v.caught]
        missed = [i for i in v.oom if i not in v.near]
        words = f"out of memory: {len(v.caught)} of {len(v.oom)} predicted not to fit"
        words += f", {len(near)} more within {NEAR:.0%} of capacity" if near else ""
        lines += wrapped(words + _ids(missed, "; missed: "))
    lines += wrapped(
        f"ran: {len(v.refused)} of {v.ran} predicted beyond capacity, {len(v.wrong)} by more than"
        f" {SLACK:.0%}{_ids(v.wrong, ': ')}"
    )
    return lines


def _ids(ids: Sequence[str], before: str) -> str:
    if not ids:
        return ""
    more = f" and {len(ids) - MOST_IDS} more" if len(ids) > MOST_IDS else ""
    return before + ", ".join(ids[:MOST_IDS]) + more


def _worst(timed: Sequence[Row]) -> list[str]:
    if not timed:
        return []
    rows = sorted(timed, key=lambda row: -abs(row.error or 0))[:MOST_WORST]
    lines = [f"{'worst':14} {'predicted':>9} {'measured':>9} {'error':>7}"]
    for row in rows:
        lines.append(
            f"{row.id[:14]:14} {format_seconds(row.predicted_s):>9}"
            f" {format_seconds(row.measured_s or 0):>9} {row.error or 0:+7.1%}  {row.words}"[:WIDTH]
        )
    return lines


def _skipped(skipped: Sequence[LeftOut]) -> list[str]:
    if not skipped:
        return []
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in skipped:
        reasons[row.reason].append(row.id)
    ordered = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[1]))
    return ["skipped", *(
        line for reason, ids in ordered
        for line in wrapped(f"  {len(ids):5d}  {reason}{_ids(ids, ': ')}", 9)
    )]  # fmt: skip


def _defaults(report: Report) -> list[str]:
    if not report.defaults:
        return []
    return ["assumed where a source says nothing, or left aside", *(
        line for words, n in report.defaults for line in wrapped(f"  {n:5d}  {words}", 9)
    )]  # fmt: skip


def verbose_lines(rows: Sequence[Row]) -> list[str]:
    """Every run, a line each: times, error, peak memory."""
    lines = []
    for row in rows:
        error = "" if row.error is None else f"{row.error:+.1%}"
        time = format_seconds(row.measured_s) if row.measured_s else "-"
        peak = format_bytes(row.measured_bytes) if row.measured_bytes else "-"
        lines.append(
            f"{row.id:16} {format_seconds(row.predicted_s):>9} {time:>9} {error:>8}"
            f" {format_bytes(row.predicted_bytes):>9} {peak:>9}  {row.words}"
        )
    return lines


# --- JSON ---------------------------------------------------------------------------------------


def document(report: Report, left_out: CrossValidated | None) -> dict[str, Any]:
    """The report's values, seconds and bytes, under stable keys."""
    return {
        "schema": "validation/1", "rows": report.rows, "used": len(report.used),
        "skipped": [{"id": row.id, "reason": row.reason} for row in report.skipped],
        "classes": {c.name: scores_json(c.scores) for c in report.classes},
        "memory": {
            "classes": {c.name: scores_json(c.scores) for c in report.memory},
            "verdicts": _verdicts_json(report.verdicts),
        },
        "ranking": {
            "any_workload": _ranking_json(report.ranking),
            "same_workload": _ranking_json(report.same_workload),
        },
        "cross_validated": left_out and {
            "note": left_out.note,
            "classes": {name: scores_json(s) for name, s in left_out.classes},
        },
        "defaults": dict(report.defaults),
        "predictions": [_prediction(row) for row in report.used],
    }  # fmt: skip


def scores_json(s: Scores) -> dict[str, float]:
    return {
        "n": s.n, "mape": round(s.mape, DIGITS), "median": round(s.median, DIGITS),
        "bias": round(s.bias, DIGITS), "p90": round(s.p90, DIGITS),
    }  # fmt: skip


def _verdicts_json(v: Verdicts) -> dict[str, Any]:
    return {
        "oom": len(v.oom), "oom_predicted": len(v.caught), "oom_predicted_or_near": len(v.near),
        "oom_missed": [i for i in v.oom if i not in v.near], "ran": v.ran,
        "ran_predicted_beyond": len(v.refused), "ran_predicted_beyond_by_2pct": list(v.wrong),
    }  # fmt: skip


def _ranking_json(r: Ranking) -> dict[str, Any]:
    tau = None if r.tau is None else round(r.tau, DIGITS)
    return {"kendall_tau": tau, "pairs": r.pairs, "groups": r.groups}


def _prediction(row: Row) -> dict[str, Any]:
    return {
        "id": row.id, "predicted": row.predicted_s, "measured": row.measured_s,
        "breakdown_s": dict(row.breakdown_s), "predicted_bytes": row.predicted_bytes,
        "measured_bytes": row.measured_bytes, "capacity_bytes": row.capacity_bytes,
        "oom": row.oom, "classes": [name for _, name in row.classes],
        "defaults": list(row.defaults),
    }  # fmt: skip
