"""The error of training steps that ran on a machine, put into its hardware file.

The file is its owner's: two places of `[constants]` change, every other byte stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cost_models.calibrate import SOURCE
from cost_models.checked_toml import merged, parse_toml
from cost_models.compute import load_kernels
from cost_models.constants_table import load_constants
from cost_models.hardware import Cluster, Device
from ir.errors import GateError, PlanError

LEAST_STEPS = 3  # fewer say nothing of others
FAR = 2.0  # a factor: half of the steps off by more are another machine's, or a disturbed one's
_KEY = re.compile(r"\s*(runs|dense|moe|samples|median_error|p90_error|source)\s*=")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepError:
    """Expected relative error of a step on one machine. dense: of the steps that ran, the mean;
    moe: none ran, so what was expected before, or dense where that is more."""

    dense: float
    moe: float
    samples: int
    median: float
    p90: float
    source: str


def step_error(pairs: Sequence[tuple[float, float]], cluster: Cluster, date: str) -> StepError:
    """The error that (predicted, measured) seconds of steps on one device come to.

    The steps exchange nothing: of several devices no less is expected than of published runs that
    were left out of the fit. Raises GateError for steps that say nothing of this machine.
    """
    if len(pairs) < LEAST_STEPS:
        raise GateError(
            f"{len(pairs)} steps ran, too few to state an error: the file is left as it is",
            why=f"expected {LEAST_STEPS} or more",
        )
    ratio = np.asarray([predicted / measured for predicted, measured in pairs])
    off = np.abs(ratio - 1)
    far = float(np.exp(np.median(np.abs(np.log(ratio)))))
    if not far <= FAR:
        raise GateError(
            f"half of the steps are off by a factor of {far:.3g} or more: nothing is written",
            why=f"expected {FAR:g} at most: is this the machine that the file describes, and idle?",
            hints=("plan calibrate -o another.toml measures this one",),
        )
    device = _unstated(cluster.device)
    least = load_constants(device.constants).number("step_error.dense")
    dense = max(float(off.mean()), least if cluster.count > 1 else 0.0)
    held = float(off.mean()) < dense
    source = (
        f"{SOURCE}: {len(pairs)} training steps of one device, predicted and run, {date}"
        + ("; dense: of published runs, which is more, for transfers were not measured" * held)
        + "; moe: not measured, as expected before"
    )
    return StepError(
        dense=dense, moe=max(dense, load_kernels(device).error(moe=True)), samples=len(pairs),
        median=float(np.median(off)), p90=float(np.percentile(off, 90)), source=source,
    )  # fmt: skip


def _unstated(device: Device) -> Device:
    """The device without an error that was stated before."""
    own = device.constants
    if isinstance(own, str) or not any(item.name == "step_error.dense" for item in own.items):
        return device
    kept = tuple(
        item for item in own.items if item.name != "runs" and not item.name.startswith("step_error")
    )
    return replace(device, constants=replace(own, items=kept))


def with_error(text: str, error: StepError, where: str) -> str:
    """The file's text with the error in `[constants]`: `runs` and `[constants.step_error]`.

    Raises PlanError where that would change anything else.
    """
    numbers = {
        "dense": error.dense, "moe": error.moe, "samples": error.samples,
        "median_error": error.median, "p90_error": error.p90,
    }  # fmt: skip
    said = {key: _rounded(value) for key, value in numbers.items()}
    lines = [f"{key} = {value}" for key, value in said.items()] + [f'source = "{error.source}"']
    made = _put(text, "constants", ["runs = 1"])
    made = _put(made, "constants.step_error", lines)
    table: dict[str, Any] = {**said, "source": error.source}
    wanted = merged(parse_toml(text), {"constants": {"runs": 1, "step_error": table}})
    try:
        if parse_toml(made) == wanted:
            return made
    except ValueError:
        pass
    raise PlanError(
        "the error cannot be put into this file, which is left as it is", where=where,
        why="its constants are in a form that lines cannot be added to; expected [constants] and"
        " [constants.step_error], or neither",
        hints=("add yourself: [constants] runs = 1, [constants.step_error] " + ", ".join(lines),),
    )  # fmt: skip


def _rounded(value: float) -> float | int:
    """Three digits: more than any repeat agrees to."""
    return value if isinstance(value, int) or not math.isfinite(value) else float(f"{value:.3g}")


def _put(text: str, table: str, said: list[str]) -> str:
    """The text with those lines first in a table of it, in place of lines with the same keys; the
    table at the end where there is none."""
    end = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines(keepends=True)
    header = re.compile(rf"\s*\[\s*{re.escape(table)}\s*\]\s*(#.*)?$")
    new = [line + end for line in said]
    at = next((i for i, line in enumerate(lines) if header.match(line.rstrip("\r\n"))), None)
    if at is None:
        gap = [] if not text or text.endswith(("\n\n", "\r\n\r\n")) else [end]
        if text and not text.endswith("\n"):
            gap = [end, end]
        return "".join([text, *gap, f"[{table}]{end}", *new])
    if not lines[at].endswith("\n"):
        lines[at] += end
    keys = {line.partition(" =")[0] for line in said}
    stop = next(
        (i for i in range(at + 1, len(lines)) if lines[i].lstrip().startswith("[")), len(lines)
    )
    rest = [
        line for line in lines[at + 1 : stop]
        if not ((found := _KEY.match(line)) and found[1] in keys)
    ]  # fmt: skip
    return "".join([*lines[: at + 1], *new, *rest, *lines[stop:]])
