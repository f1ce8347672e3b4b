"""Fitting one op class over kernels and devices at once: what is shared, and what differs.

The logarithm of a constant is a sum: the class's, plus what a kernel family adds, plus what a
device adds. Each addition has a prior around nothing, so a device or family with few rows stays
near the others and one without any takes theirs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.fit.least_squares import Fitted, fit

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
Model: TypeAlias = Callable[[Mapping[str, FloatArray]], FloatArray]
Slot: TypeAlias = tuple[str, str, str]  # constant, level, whose: ("feed", "device", "h100")

CLASS, KERNEL, DEVICE, PAIR = "class", "kernel", "device", "pair"
_SCALE = 0.05  # a row further off than this counts as an outlier


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A constant: its guess, and how far it may lie from it, as standard deviations of its
    logarithm: guess (of the class), and of a device, kernel family or pair around the class."""

    start: float
    prior: float
    device: float = 0.0
    kernel: float = 0.0
    pair: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Rows of one op class. model_of: indices of rows -> their seconds as a function of constants.

    groups: rows of one group are held out together. families: kin of each device, by its name.
    """

    spreads: Mapping[str, Spread]
    model_of: Callable[[NDArray[np.intp]], Model]
    measured_s: FloatArray
    devices: tuple[str, ...]
    kernels: tuple[str, ...]
    groups: tuple[Hashable, ...]
    families: Mapping[str, str]


def slots(sample: Sample) -> tuple[Slot, ...]:
    """Every parameter of the fit, in order."""
    found: list[Slot] = []
    devices, kernels = sorted(set(sample.devices)), sorted(set(sample.kernels))
    pairs = sorted({f"{d}/{k}" for d, k in zip(sample.devices, sample.kernels, strict=True)})
    for name, spread in sample.spreads.items():
        found.append((name, CLASS, ""))
        for level, sd, whose in (
            (DEVICE, spread.device, devices), (KERNEL, spread.kernel, kernels),
            (PAIR, spread.pair, pairs),
        ):  # fmt: skip
            found += [(name, level, one) for one in whose if sd > 0]
    return tuple(found)


def _matrix(sample: Sample, rows: NDArray[np.intp]) -> FloatArray:
    """1 where a parameter counts for a row, [rows, slots]."""
    devices = np.array(sample.devices)[rows]
    kernels = np.array(sample.kernels)[rows]
    pairs = np.array([f"{d}/{k}" for d, k in zip(devices, kernels, strict=True)])
    of = {DEVICE: devices, KERNEL: kernels, PAIR: pairs}
    columns = [
        np.ones(len(rows)) if level == CLASS else (of[level] == whose).astype(np.float64)
        for _, level, whose in slots(sample)
    ]
    return np.stack(columns, axis=1)


def _constants(sample: Sample, design: FloatArray, x: FloatArray) -> dict[str, FloatArray]:
    names = [name for name, _, _ in slots(sample)]
    return {
        name: np.exp(design[:, at] @ x[at])
        for name in sample.spreads
        for at in [[i for i, other in enumerate(names) if other == name]]
    }


def solve(sample: Sample, rows: NDArray[np.intp]) -> Fitted:
    """Fit on `rows`. The derivative by a class's constant serves its devices and kernels too."""
    design, model = _matrix(sample, rows), sample.model_of(rows)
    names = [name for name, _, _ in slots(sample)]
    target = np.log(sample.measured_s[rows])
    start, sd = [], []
    for name, level, _ in slots(sample):
        spread = sample.spreads[name]
        start.append(np.log(spread.start) if level == CLASS else 0.0)
        sd.append(spread.prior if level == CLASS else getattr(spread, level))

    def residuals(x: FloatArray) -> FloatArray:
        return np.asarray(np.log(model(_constants(sample, design, x))) - target)

    def jacobian(x: FloatArray) -> FloatArray:
        at, step = _constants(sample, design, x), 1e-4
        here = np.log(model(at))
        slope = {
            name: (np.log(model({**at, name: at[name] * np.exp(step)})) - here) / step
            for name in sample.spreads
        }
        return np.stack([slope[name] for name in names], axis=1) * design

    return fit(
        residuals, np.array(start), np.array(sd), jacobian=jacobian, scale=_SCALE, tolerance=1e-4
    )


def predicted_s(sample: Sample, rows: NDArray[np.intp], x: FloatArray) -> FloatArray:
    """Seconds of `rows` with the parameters `x`."""
    return sample.model_of(rows)(_constants(sample, _matrix(sample, rows), x))


def cross_validated_s(sample: Sample, folds: int = 6) -> FloatArray:
    """Seconds of every row, by a fit that saw no row of its group."""
    fold = np.array([zlib.crc32(repr(group).encode()) % folds for group in sample.groups])
    found = np.zeros(len(fold))
    for one in range(folds):
        out = np.flatnonzero(fold == one)
        if len(out) and len(out) < len(fold):
            found[out] = predicted_s(sample, out, solve(sample, np.flatnonzero(fold != one)).x)
    return found


def transferred_s(sample: Sample) -> FloatArray:
    """Seconds of every row, by a fit that saw no row of its device: it takes what a device of its
    family adds to the class where one is measured, else nothing."""
    devices = np.array(sample.devices)
    found = np.full(len(devices), np.nan)
    names = sorted(set(sample.devices))
    for one in names if len(names) > 1 else []:
        out = np.flatnonzero(devices == one)
        x = solve(sample, np.flatnonzero(devices != one)).x.copy()
        kin = [d for d in names if d != one and sample.families[d] == sample.families[one]]
        at = {slot: i for i, slot in enumerate(slots(sample))}
        for (name, level, whose), i in at.items():
            if level == DEVICE and whose == one and kin:
                x[i] = np.mean([x[at[name, DEVICE, other]] for other in kin])
        found[out] = predicted_s(sample, out, x)
    return found
