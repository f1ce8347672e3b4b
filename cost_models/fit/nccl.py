"""Fits NCCL's collectives inside one domain: each kind and number of ranks, all devices at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cost_models.fit.classes import group_of
from cost_models.fit.hierarchy import (
    Sample,
    Spread,
    cross_validated_s,
    predicted_s,
    slots,
    solve,
    transferred_s,
)
from cost_models.fit.tables import Value
from cost_models.hardware import describe
from cost_models.links import PASSES, library_seconds
from cost_models.op_rows import Kind, OpRow, constants_name

if TYPE_CHECKING:
    from cost_models.fit.ops import ClassFit, Tables

# NVLink devices are alike; a PCIe host's figures are those of its switches, so its kinds differ
# freely and nothing is shared.
_NVLINK = {
    "overhead_s": Spread(start=1e-5, prior=0.5, device=0.3, kernel=0.4, pair=0.15),
    "low_sqrt_s": Spread(start=1e-8, prior=0.7, device=0.3, kernel=0.3, pair=0.2),
    "start_s": Spread(start=5e-6, prior=0.7, device=0.3, kernel=0.5, pair=0.3),
    "switch_bytes": Spread(start=1e6, prior=1.0, device=0.4, kernel=0.7, pair=0.4),
    "sqrt_s": Spread(start=4e-9, prior=0.7, device=0.3, kernel=0.3, pair=0.2),
    "efficiency": Spread(start=0.8, prior=0.2, device=0.1, kernel=0.3, pair=0.15),
}
_PCIE = {
    "overhead_s": Spread(start=1e-5, prior=0.5, kernel=0.5),
    "low_sqrt_s": Spread(start=3e-8, prior=1.0, kernel=1.0),
    "start_s": Spread(start=1e-5, prior=1.0, kernel=1.0),
    "switch_bytes": Spread(start=1e5, prior=1.0, kernel=1.0),
    "sqrt_s": Spread(start=2e-8, prior=1.0, kernel=1.0),
    "efficiency": Spread(start=0.3, prior=1.0, kernel=1.2),
}


def _sample(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> Sample:
    nodes = [describe(row.device.name) for row in rows]
    size = np.array([row.number("bytes") for row in rows])
    ranks = np.array([row.number("num_gpus") for row in rows])
    passes = np.array([PASSES[kind.family] for kind in kinds])
    line = np.array([node.intra.bytes_per_s for node in nodes])
    return Sample(
        spreads=_PCIE if nodes[0].intra.kind == "pcie" else _NVLINK,
        model_of=lambda at: lambda c: library_seconds(c, size[at], ranks[at], passes[at], line[at]),
        measured_s=np.array([row.seconds for row in rows]),
        devices=tuple(constants_name(row.device) for row in rows),
        kernels=tuple(
            f"{kind.family}_{int(n)}" for kind, n in zip(kinds, ranks, strict=True)
        ),
        groups=tuple(group_of(row, kind) for row, kind in zip(rows, kinds, strict=True)),
        families={constants_name(row.device): row.device.family for row in rows},
    )  # fmt: skip


def fit_nccl(
    rows: Sequence[OpRow], kinds: Sequence[Kind], *, cross: bool = True
) -> tuple[ClassFit, Tables]:
    """Fit all collectives; tables `collective.<kind>` of each measured device."""
    from cost_models.fit.ops import ClassFit, _errors

    found = {name: np.full(len(rows), np.nan) for name in ("inside", "held", "moved")}
    devices, kernels = np.empty(len(rows), object), np.empty(len(rows), object)
    values: dict[tuple[str, str], dict[str, float]] = {}
    lines: dict[str, float] = {}
    wires = np.array([describe(row.device.name).intra.kind for row in rows])
    for wire in sorted(set(wires)):
        at = [int(i) for i in np.flatnonzero(wires == wire)]
        sample = _sample([rows[i] for i in at], [kinds[i] for i in at])
        every = np.arange(len(at))
        x = solve(sample, every).x
        seconds = {"inside": predicted_s(sample, every, x)}
        seconds["held"] = cross_validated_s(sample) if cross else seconds["inside"]
        if cross:
            seconds["moved"] = transferred_s(sample)  # nan where one device has that wire
        for name, predicted in seconds.items():
            found[name][at] = np.abs(predicted / sample.measured_s - 1)
        devices[at], kernels[at] = sample.devices, sample.kernels
        for i in at:
            lines[constants_name(rows[i].device)] = describe(rows[i].device.name).intra.bytes_per_s
        for device, kernel in sorted(set(zip(sample.devices, sample.kernels, strict=True))):
            own = values.setdefault((device, kernel), {})
            for (name, _, whose), v in zip(slots(sample), x, strict=True):
                if whose in ("", device, kernel, f"{device}/{kernel}"):
                    own[name] = own.get(name, 0.0) + float(v)
    report = ClassFit(
        model="nccl", devices=tuple(devices), kernels=tuple(kernels), in_sample=found["inside"],
        held_out=found["held"], transferred=found["moved"],
    )  # fmt: skip
    tables: Tables = {}
    for device in sorted(set(report.devices)):
        for kind in PASSES:
            counts = sorted(
                int(k.rsplit("_", 1)[1]) for d, k in values if d == device and k.startswith(kind)
            )
            if not counts:
                continue
            each = [values[device, f"{kind}_{n}"] for n in counts]
            own_rows = np.array([
                d == device and k.startswith(kind)
                for d, k in zip(report.devices, report.kernels, strict=True)
            ])  # fmt: skip
            table: dict[str, Value] = {"ranks": tuple(float(n) for n in counts)}
            for name in _NVLINK:
                scale = lines[device] if name == "efficiency" else 1.0
                key = "bytes_per_s" if name == "efficiency" else name
                table[key] = tuple(float(np.exp(own[name])) * scale for own in each)
            table |= {"samples": int(own_rows.sum())} | _errors(report.in_sample[own_rows]) | {
                "held_out_median_error": round(float(np.median(report.held_out[own_rows])), 3),
                "source": (
                    "fitted: NVIDIA AIConfigurator silicon database (Apache-2.0), NCCL inside one "
                    "node; held_out: by size, cross-validated"
                ),
            }  # fmt: skip
            tables.setdefault(device, {})[f"collective.{kind}"] = table
    return report, tables
