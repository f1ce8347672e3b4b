"""Measured kernels against what the cost model says they take: `plan validate --ops FILE`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cost_models.op_models import constants_of, prepare
from cost_models.op_rows import Kind, OpRow, kind_of
from cost_models.validation.metrics import Scores, scores
from cost_models.validation.op_table import read_table


@dataclass(frozen=True, slots=True, kw_only=True)
class OpPrediction:
    """One row: its line in the file, what it is costed as, and seconds.

    nearest: the kernel is none that was fitted, and is costed as the nearest family of its class.
    """

    line: int
    device: str
    model: str
    family: str
    predicted_s: float
    measured_s: float
    nearest: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsReport:
    """Predictions of a table of measured kernels, and their errors by class.

    rows: read; used: predicted; skipped: (line, reason). nearest: kernels costed as others, with
    the family that was taken. mapped: (what rows say, what they are costed as). Scores are absent
    where nothing was used.
    """

    rows: int
    used: int
    skipped: tuple[tuple[int, str], ...]
    nearest: tuple[tuple[str, str], ...]
    mapped: tuple[tuple[str, str], ...]
    overall: Scores | None
    by_device: tuple[tuple[str, Scores], ...]
    by_class: tuple[tuple[str, Scores], ...]
    by_family: tuple[tuple[str, Scores], ...]
    predictions: tuple[OpPrediction, ...]


def op_class(model: str) -> str:
    """The class that errors are reported by: bf16 and quantized GEMMs apart, MLA with attention."""
    named = {
        "gemm.bf16": "gemm bf16", "prefill": "attention prefill", "mla_prefill": "mla prefill",
        "decode": "attention decode", "mla_decode": "mla decode", "moe": "moe",
        "nccl": "collectives", "custom_all_reduce": "collectives", "deepep": "collectives",
    }  # fmt: skip
    return named.get(model, "gemm quantized")


def predict(rows: Sequence[OpRow]) -> tuple[OpPrediction, ...]:
    """Predict every row with the shipped constants, all rows of an op class at once."""
    groups: dict[str, list[tuple[OpRow, Kind]]] = {}
    for row in rows:
        kind = kind_of(row)
        groups.setdefault(kind.model, []).append((row, kind))
    found = []
    for model in sorted(groups):
        mine, kinds = [row for row, _ in groups[model]], [kind for _, kind in groups[model]]
        seconds = prepare(mine, kinds)(constants_of(mine, kinds))
        found += [
            OpPrediction(
                line=row.line, device=row.device.name, model=model, family=kind.family,
                predicted_s=float(value), measured_s=row.seconds, nearest=not kind.known,
            )
            for row, kind, value in zip(mine, kinds, seconds, strict=True)
        ]  # fmt: skip
    return tuple(sorted(found, key=lambda one: one.line))


def _guarded(
    rows: Sequence[OpRow],
) -> tuple[tuple[OpPrediction, ...], list[tuple[int, str]]]:
    """Predictions, and (line, reason) of rows that have none; one fault ends its own row only."""
    failed: list[tuple[int, str]] = []
    try:
        found = predict(rows)
    except Exception:  # said with the row that it is of
        found = ()
        for row in rows:
            try:
                found += predict([row])
            except Exception as fault:
                failed.append((row.line, f"cannot be costed: {fault}"))
    finite = [0 < one.predicted_s < math.inf for one in found]
    failed += [
        (one.line, f"is predicted to take {one.predicted_s} s")
        for one, good in zip(found, finite, strict=True) if not good
    ]  # fmt: skip
    return tuple(one for one, good in zip(found, finite, strict=True) if good), failed


def _scored(
    found: Sequence[OpPrediction], name_of: Callable[[OpPrediction], str]
) -> tuple[tuple[str, Scores], ...]:
    groups: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        groups.setdefault(name_of(one), []).append((one.predicted_s, one.measured_s))
    return tuple((name, scores(groups[name])) for name in sorted(groups))


def validate_ops(path: Path) -> OpsReport:
    """Predict every row of the table at `path`, which has the form that `op_rows` describes.

    Raises UsageError for a file that is no such table.
    """
    table = read_table(path)
    rows = table.rows
    found, failed = _guarded(rows)
    skipped = tuple(sorted((*table.skipped, *failed)))
    kernels = {one.line: one for one in found if one.nearest}
    nearest = {(row.kernel, kernels[row.line].family) for row in rows if row.line in kernels}
    pairs = [(one.predicted_s, one.measured_s) for one in found]
    return OpsReport(
        rows=len(rows) + len(table.skipped), used=len(found), skipped=skipped,
        nearest=tuple(sorted(nearest)), mapped=table.mapped,
        overall=scores(pairs) if pairs else None,
        by_device=_scored(found, lambda one: one.device),
        by_class=_scored(found, lambda one: op_class(one.model)),
        by_family=_scored(found, lambda one: f"{one.model}/{one.family}"),
        predictions=found,
    )  # fmt: skip
