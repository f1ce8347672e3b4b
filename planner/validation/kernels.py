"""A report of measured kernels as text, and as a JSON document."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cost_models.units import format_seconds
from cost_models.validation.metrics import Scores
from cost_models.validation.ops import OpPrediction, OpsReport, op_class
from planner.validation.report import (
    MOST_WORST,
    WIDTH,
    class_lines,
    header,
    scores_json,
    wrapped,
)

FITTED = (
    "Constants were fitted on a table of measured kernels, and these may be among them: held-out "
    "errors are beside each constant (plan hardware show, cost_models/constants)."
)


def text(report: OpsReport, name: str) -> str:
    """The report in 80 columns. name: of the file."""
    head = (
        f"{report.rows} kernels of {name}: {report.used} predicted, {len(report.skipped)} skipped"
    )
    parts = [textwrap.wrap(head, WIDTH)]
    if report.overall:
        rows = ((dimension, _label(name), found) for dimension, name, found in _classes(report))
        parts.append([header("kernel time"), *class_lines(rows)])
        parts.append(textwrap.wrap(FITTED, WIDTH))
        parts.append(_worst(report))
    if report.nearest:
        parts.append(["kernels that nobody fitted, and what they are costed as", *(
            line for kernel, family in report.nearest
            for line in wrapped(f"  {kernel or 'unnamed'}: {family}", 4)
        )])  # fmt: skip
    if report.mapped:
        parts.append(["costed as something near", *(
            line for said, costed in report.mapped for line in wrapped(f"  {said}: {costed}", 4)
        )])  # fmt: skip
    if report.skipped:
        reasons = Counter(reason for _, reason in report.skipped)
        lines = (line for reason, n in reasons.most_common()
                 for line in wrapped(f"  {n:5d}  {reason}", 9))  # fmt: skip
        parts.append(["skipped", *lines])
    return "\n\n".join("\n".join(lines) for lines in parts)


def _classes(report: OpsReport) -> Iterator[tuple[str, str, Scores]]:
    """(dimension, class, scores), all first."""
    if report.overall:
        yield "", "all", report.overall
    for dimension, rows in (
        ("op", report.by_class), ("device", report.by_device), ("kernel", report.by_family),
    ):  # fmt: skip
        for name, found in rows:
            yield dimension, name, found


def _label(name: str) -> str:
    """gemm.fp8_block, where a family is its whole model."""
    model, _, family = name.partition("/")
    return model if model.endswith(f".{family}") else name


def _off(one: OpPrediction) -> float:
    return one.predicted_s / one.measured_s - 1


def _worst(report: OpsReport) -> list[str]:
    rows = sorted(report.predictions, key=lambda one: -abs(_off(one)))[:MOST_WORST]
    return [f"{'worst, line':14} {'predicted':>9} {'measured':>9} {'error':>7}", *(
        f"{one.line:<14d} {format_seconds(one.predicted_s):>9} {format_seconds(one.measured_s):>9}"
        f" {_off(one):+7.0%}  {one.device} {_label(f'{one.model}/{one.family}')}"[:WIDTH]
        for one in rows
    )]  # fmt: skip


def verbose_lines(report: OpsReport) -> list[str]:
    """Every kernel, a line each."""
    return [
        f"line {one.line:<8d} {format_seconds(one.predicted_s):>9}"
        f" {format_seconds(one.measured_s):>9} {_off(one):+8.1%}  {one.device}"
        f" {_label(f'{one.model}/{one.family}')}"
        for one in report.predictions
    ]


def document(report: OpsReport) -> dict[str, Any]:
    """The report's values in seconds, under the keys that a report of runs has."""
    return {
        "schema": "validation-ops/1", "rows": report.rows, "used": report.used,
        "skipped": [{"id": f"line {line}", "reason": reason} for line, reason in report.skipped],
        "classes": {name: scores_json(found) for _, name, found in _classes(report)},
        "memory": {},  # kernels have none; reports of runs have
        "mapped": [{"said": said, "costed_as": costed} for said, costed in report.mapped],
        "nearest": [{"kernel": kernel, "costed_as": family} for kernel, family in report.nearest],
        "predictions": [
            {
                "id": f"line {one.line}", "predicted": one.predicted_s,
                "measured": one.measured_s, "classes": [one.device, op_class(one.model),
                                                         f"{one.model}/{one.family}"],
            }
            for one in report.predictions
        ],
    }  # fmt: skip
