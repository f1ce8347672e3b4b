"""A file of measured training runs, one JSON object a line: read, checked, typed.

The form is that of a YAML list whose items are JSON (`- {"id": ...}`), comments in lines of `#`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ir.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measured run. The three tables are as printed, None where the source says nothing.

    step_time_s: measured, or what tokens/s come to; None where the row has neither.
    again: share of the forward that is computed again, of MFU and HFU where both are printed.
    flop_per_s: of all GPUs, in the source's convention: `flop_factor` times the model's FLOPs (4/3
    where full recomputation is counted); for rows without a time. peak_bytes: of the fullest GPU,
    as tools print it (GiB).
    """

    id: str
    group: str
    source: str
    framework: str
    model: dict[str, Any]
    hardware: dict[str, Any]
    config: dict[str, Any]
    notes: str
    oom: bool
    step_time_s: float | None
    mfu: float | None
    again: float | None
    flop_per_s: float | None
    flop_factor: float
    peak_bytes: float | None

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
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            raw = json.loads(text.removeprefix("- "))
            found.append(_run(raw))
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise PlanError(
                f"{path}, line {number} is no run: {fault!r}",
                why="expected one JSON object a line, as `- {\"id\": ..., \"model\": {...}}`",
            ) from None
    if not found:
        raise PlanError(f"{path} has no runs")
    return found


def _run(raw: dict[str, Any]) -> Run:
    model, hardware, config = raw["model"], raw["hardware"], raw["config"]
    measured = raw.get("measured") or {}
    peak = measured.get("peak_memory_gb")
    rate = measured.get("tflops_per_gpu")
    source = raw.get("source") or {}
    return Run(
        id=str(raw["id"]), group=str(raw.get("group") or raw["id"]),
        source=str(source.get("title", "") if isinstance(source, dict) else source),
        framework=str(raw.get("framework") or ""), model=model, hardware=hardware, config=config,
        notes=f"{raw.get('notes') or ''}; {source.get('table', '') if source else ''}",
        oom=raw.get("outcome") == "oom",
        step_time_s=_seconds(raw, measured),
        mfu=measured["mfu_pct"] / 100 if measured.get("mfu_pct") else None,
        again=_again(measured),
        flop_per_s=rate * 1e12 * hardware["num_gpus"] if rate else None,
        flop_factor=4 / 3 if "hardware" in str(raw.get("flops_convention")) else 1.0,
        peak_bytes=peak * 2**30 if peak else None,
    )  # fmt: skip


def _seconds(raw: dict[str, Any], measured: dict[str, Any]) -> float | None:
    """The step's seconds, or what tokens/s a GPU come to."""
    if measured.get("step_time_s"):
        return float(measured["step_time_s"])
    rate = measured.get("tokens_per_s_per_gpu")
    batch = raw["config"].get("global_batch_sequences")
    if rate and batch:
        return float(batch * raw["model"]["seq_len"] / (rate * raw["hardware"]["num_gpus"]))
    return None


def _again(measured: dict[str, Any]) -> float | None:
    """HFU / MFU - 1 is a third of the share of the forward that runs again."""
    model, hardware = measured.get("mfu_pct"), measured.get("hfu_pct")
    if not model or not hardware:
        return None
    return min(1.0, max(0.0, 3 * (float(hardware) / float(model) - 1)))
