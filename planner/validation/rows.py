"""A file of measured training runs, one JSON object a line: read, checked, typed.

The form is that of a YAML list whose items are JSON (`- {"id": ...}`), comments in lines of `#`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ir.errors import PlanError
from planner.validation.row_form import faults_of, unread_in


class Skipped(Exception):
    """A run that cannot be predicted; its message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measured run. The three tables are as printed, None where the source says nothing.

    step_time_s: measured, or what tokens/s come to; None where the row has neither.
    again: share of the forward that is computed again, of MFU and HFU where both are printed.
    flop_per_s: of all GPUs, in the source's convention: `flop_factor` times the model's FLOPs (4/3
    where full recomputation is counted); for rows without a time. peak_bytes: of the fullest GPU,
    as tools print it (GiB). faults: what is written in another form than the file's; unread:
    fields that no rule reads.
    """

    id: str
    group: str
    source: str
    framework: str
    model: dict[str, Any]
    hardware: dict[str, Any]
    config: dict[str, Any]
    notes: str
    outcome: str  # "", "ok" or "oom"
    step_time_s: float | None
    mfu: float | None
    again: float | None
    flop_per_s: float | None
    flop_factor: float
    peak_bytes: float | None
    faults: tuple[str, ...]
    unread: tuple[str, ...]

    @property
    def oom(self) -> bool:
        return self.outcome == "oom"

    @property
    def is_moe(self) -> bool:
        return bool(self.model.get("moe"))


def read_runs(path: Path) -> list[Run]:
    """The runs of a file, in order. Raises PlanError naming the line that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as fault:
        raise PlanError(f"cannot read {path}: {fault.strerror}") from None
    found = []
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("- ")
        if not text or text.startswith("#"):
            continue
        raw, wrong = _json(text, before=line.index(text))
        if isinstance(raw, dict):
            found.append(_run(raw, f"line {number}"))
        else:
            raise PlanError(
                f"{path}, line {number} is no run: {wrong}",
                why="expected one JSON object a line, as `- {\"id\": ..., \"model\": {...}}`",
            )
    if not found:
        raise PlanError(f"{path} has no runs")
    return found


def _json(text: str, before: int) -> tuple[Any, str]:
    """A line's value, and what is wrong with it if it is no object. before: characters before."""
    try:
        return json.loads(text), "it is no JSON object"
    except json.JSONDecodeError as fault:
        return None, f"no JSON from column {before + fault.colno} on: {fault.msg}"
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return None, "no JSON that can be read"


def _run(raw: dict[str, Any], name: str) -> Run:
    """A run as it is written; what is missing is found, and said, when it is laid out."""
    model, hardware, config = (_table(raw, key) for key in ("model", "hardware", "config"))
    measured, source = _table(raw, "measured"), raw.get("source") or {}
    table = source.get("table", "") if isinstance(source, dict) else ""
    numbers = {key: _number(value) for key, value in measured.items()}
    peak, rate = numbers.get("peak_memory_gb"), numbers.get("tflops_per_gpu")
    mfu = numbers.get("mfu_pct")
    gpus = _number(hardware.get("num_gpus"))
    return Run(
        id=str(raw.get("id") or name), group=str(raw.get("group") or raw.get("id") or name),
        source=str(source.get("title", "") if isinstance(source, dict) else source),
        framework=str(raw.get("framework") or ""), model=model, hardware=hardware, config=config,
        notes=f"{raw.get('notes') or ''}; {table}",
        outcome=str(raw.get("outcome") or ""),
        step_time_s=_seconds(numbers, config, model, gpus),
        mfu=mfu / 100 if mfu else None,
        again=_again(numbers),
        flop_per_s=rate * 1e12 * gpus if rate and gpus else None,
        flop_factor=4 / 3 if "hardware" in str(raw.get("flops_convention")) else 1.0,
        peak_bytes=peak * 2**30 if peak else None,
        faults=tuple(faults_of(raw)), unread=tuple(unread_in(raw)),
    )  # fmt: skip


def _table(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A number; nan for what is none, so that it is refused where it is used."""
    if value is None:
        return None
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


Numbers = dict[str, float | None]


def _seconds(
    measured: Numbers, config: dict[str, Any], model: dict[str, Any], gpus: float | None
) -> float | None:
    """The step's seconds, or what tokens/s a GPU come to."""
    if measured.get("step_time_s") is not None:
        return measured["step_time_s"]
    rate, batch = measured.get("tokens_per_s_per_gpu"), config.get("global_batch_sequences")
    length = _number(model.get("seq_len"))
    count = _number(batch)
    return count * length / (rate * gpus) if rate and count and length and gpus else None


def _again(measured: Numbers) -> float | None:
    """HFU / MFU - 1 is a third of the share of the forward that runs again."""
    model, hardware = measured.get("mfu_pct"), measured.get("hfu_pct")
    if not model or not hardware:
        return None
    return min(1.0, max(0.0, 3 * (hardware / model - 1)))
