"""What a run's numbers must be before it is laid out: one that cannot be is a reason to skip it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from planner.options import Progress
from planner.validation.rows import Run
from planner.validation.running import LeftOut, Outcome, predict_runs

PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "nvfp4")
OUTCOMES = ("", "ok", "oom")
_COUNTS = {
    "model": ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn_hidden", "vocab",
              "seq_len"),
    "hardware": ("num_gpus", "gpus_per_node"),
    "config": ("tp", "pp", "cp", "ep", "virtual_pp", "global_batch_sequences"),
}  # fmt: skip
_MOST = 1e9  # of a count: beyond it a row is a slip of the pen


def outcomes_of(runs: Sequence[Run], report: Progress | None = None) -> list[Outcome]:
    """What each run comes to, in order; those whose numbers cannot be are left out."""
    reasons = [reason_of(run) for run in runs]
    good = [run for run, reason in zip(runs, reasons, strict=True) if not reason]
    found = iter(predict_runs(good, report))
    return [
        LeftOut(id=run.id, reason=reason) if reason else next(found)
        for run, reason in zip(runs, reasons, strict=True)
    ]


def reason_of(run: Run) -> str:
    """Why a run cannot be predicted, or ""."""
    return next(_reasons(run), "")


def _reasons(run: Run) -> Iterator[str]:
    for table, names in _COUNTS.items():
        values = getattr(run, table)
        for name in names:
            if not _is_count(values.get(name)):
                yield f"{table}.{name} is {values[name]!r}, expected a whole number, 1 to 1e9"
    moe = run.model.get("moe")
    if isinstance(moe, dict):
        for name in ("experts", "top_k", "expert_ffn"):
            if not _is_count(moe.get(name)):
                yield f"model.moe.{name} is {moe[name]!r}, expected a whole number, 1 to 1e9"
    micro = run.config.get("micro_batch")
    if micro is not None and not _positive(micro):
        yield f"config.micro_batch is {micro!r}, expected a number above 0"
    precision = run.config.get("precision")
    if precision is not None and precision not in PRECISIONS:
        yield f"config.precision {precision!r} is not known: {' '.join(PRECISIONS)}"
    if run.outcome not in OUTCOMES:
        yield f"outcome {run.outcome!r} is not known: oom, or nothing of a run that fitted"
    for words, value in (
        ("peak memory", run.peak_bytes), ("FLOP/s", run.flop_per_s), ("MFU", run.mfu),
        ("time", run.step_time_s),
    ):  # fmt: skip
        if value is not None and not _positive(value):
            yield f"its measured {words}, {value:g}, is none"


def _is_count(value: Any) -> bool:
    """A whole number above 0, as digits or not; nothing at all is a default's, or 0 where the
    source means none."""
    if value is None or (value == 0 and not isinstance(value, bool)):
        return True
    return _positive(value) and float(value) == int(float(value)) and float(value) <= _MOST


def _positive(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and 0 < float(value) < math.inf
    except (TypeError, ValueError):
        return False
