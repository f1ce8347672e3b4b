"""Fits the kernel constants on a table of measured kernels, and says how well, cross-validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cost_models.fit import nccl
from cost_models.fit.classes import CLASSES, group_of
from cost_models.fit.hierarchy import (
    CLASS,
    DEVICE,
    KERNEL,
    PAIR,
    Sample,
    cross_validated_s,
    predicted_s,
    slots,
    solve,
    transferred_s,
)
from cost_models.fit.tables import Value, write_tables
from cost_models.op_models import prepare
from cost_models.op_rows import Kind, OpRow, constants_name, kind_of
from cost_models.validation.accuracy import Part, write_accuracy
from cost_models.validation.op_table import read_table

_FOLDER = Path(__file__).parent.parent / "constants"
_SOURCE = "NVIDIA AIConfigurator silicon database (Apache-2.0), kernels on idle nodes"
Tables = dict[str, dict[str, dict[str, Value]]]  # file, table, key
_KINDS = (  # of kernels, as documents speak of them -> how the names of their op classes begin
    ("gemm bf16", ("gemm.bf16",)),
    ("gemm quantized", ("gemm.fp", "gemm.int")),
    ("prefill", ("prefill",)),
    ("decode", ("decode",)),
    ("mla prefill", ("mla_prefill",)),
    ("mla decode", ("mla_decode",)),
    ("moe", ("moe",)),
    ("collectives", ("nccl", "custom_all_reduce", "deepep")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFit:
    """How well one op class fits: |predicted / measured - 1| of each row.

    in_sample, held_out (group-wise cross-validation), transferred (its device left out; nan where
    there is one only): [rows]. devices, kernels: of each row.
    """

    model: str
    devices: tuple[str, ...]
    kernels: tuple[str, ...]
    in_sample: NDArray[np.float64]
    held_out: NDArray[np.float64]
    transferred: NDArray[np.float64]

    def line(self, device: str = "", kernel: str = "") -> str:
        """One line of a report, for all rows or those of a device, a kernel family."""
        at = np.array([
            device in ("", d) and kernel in ("", k)
            for d, k in zip(self.devices, self.kernels, strict=True)
        ])  # fmt: skip
        text = " ".join(
            f"{np.median(e[at]):6.1%} {np.percentile(e[at], 90):6.1%}"
            if np.isfinite(e[at]).all()
            else f"{'-':>13}"
            for e in (self.in_sample, self.held_out, self.transferred)
        )
        return f"{self.model:22} {device:6} {kernel:22} {at.sum():5} {text}"


def sample_of(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> Sample:
    """Rows of one op class, ready to fit."""
    model = kinds[0].model
    return Sample(
        spreads=CLASSES[model],
        model_of=lambda at: prepare([rows[i] for i in at], [kinds[i] for i in at]),
        measured_s=np.array([row.seconds for row in rows]),
        devices=tuple(constants_name(row.device) for row in rows),
        kernels=tuple(kind.family for kind in kinds),
        groups=tuple(group_of(row, kind) for row, kind in zip(rows, kinds, strict=True)),
        families={constants_name(row.device): row.device.family for row in rows},
    )


def by_class(rows: Sequence[OpRow]) -> dict[str, tuple[list[OpRow], list[Kind]]]:
    """Rows and their kinds by op class, in order of the class's name."""
    found: dict[str, tuple[list[OpRow], list[Kind]]] = {}
    for row in rows:
        kind = kind_of(row)
        mine = found.setdefault(kind.model, ([], []))
        mine[0].append(row)
        mine[1].append(kind)
    return {model: found[model] for model in sorted(found)}


def _errors(found: NDArray[np.float64]) -> dict[str, Value]:
    return {
        "median_error": round(float(np.median(found)), 3),
        "p90_error": round(float(np.percentile(found, 90)), 3),
    }


def _tables(sample: Sample, x: NDArray[np.float64], report: ClassFit) -> Tables:
    """The constants as the files hold them: the class's in common.toml with its families' ratios,
    each device's ratios in its own; a GEMM's device has its constants themselves."""
    model = report.model
    at = dict(zip(slots(sample), x, strict=True))
    devices = np.array(sample.devices)
    tables: Tables = {"common": {}}
    base: dict[str, Value] = {
        name: float(np.exp(v)) for (name, level, _), v in at.items() if level == CLASS
    }
    error = _errors(report.in_sample)
    held = float(np.median(report.held_out))
    tables["common"][model] = base | {"samples": len(devices)} | error | {
        "held_out_median_error": round(held, 3),
        "source": f"fitted: {_SOURCE}; typical of the measured devices, taken by others",
    }  # fmt: skip
    for kernel in sorted(set(sample.kernels)):
        ratios: dict[str, Value] = {
            name: float(np.exp(v))
            for (name, level, whose), v in at.items()
            if level == KERNEL and whose == kernel
        }
        if ratios:
            source = f"fitted: ratios to {model}, with it"
            tables["common"][f"{model}.kernel.{kernel}"] = ratios | {"source": source}
    for device in sorted(set(sample.devices)):
        mine = devices == device
        own: dict[str, Value] = {
            name: float(np.exp(v + (at[name, CLASS, ""] if model.startswith("gemm") else 0.0)))
            for (name, level, whose), v in at.items()
            if level == DEVICE and whose == device
        }
        header = model if model.startswith("gemm") else f"{model}.device"
        what = "" if model.startswith("gemm") else f"ratios to {model}; "
        tables.setdefault(device, {})[header] = own | {"samples": int(mine.sum())} | _errors(
            report.in_sample[mine]
        ) | {
            "held_out_median_error": round(float(np.median(report.held_out[mine])), 3),
            "source": f"fitted: {what}{_SOURCE}",
        }  # fmt: skip
        for kernel in sorted(set(sample.kernels)):
            pairs: dict[str, Value] = {
                name: float(np.exp(v + at.get((name, KERNEL, kernel), 0.0)))
                for (name, level, whose), v in at.items()
                if level == PAIR and whose == f"{device}/{kernel}"
            }
            if pairs:
                source = f"fitted on this device: ratios to {model}, with it"
                tables[device][f"{model}.kernel.{kernel}"] = pairs | {"source": source}
    return tables


def fit_class(
    rows: Sequence[OpRow], kinds: Sequence[Kind], *, cross: bool = True
) -> tuple[ClassFit, Tables]:
    """Fit one op class; without `cross` its held-out errors are those of the fit itself."""
    sample = sample_of(rows, kinds)
    every = np.arange(len(rows))
    x = solve(sample, every).x
    inside = np.abs(predicted_s(sample, every, x) / sample.measured_s - 1)
    held = np.abs(cross_validated_s(sample) / sample.measured_s - 1) if cross else inside
    moved = transferred_s(sample) if cross else np.full(len(rows), np.nan)
    report = ClassFit(
        model=kinds[0].model, devices=sample.devices, kernels=sample.kernels, in_sample=inside,
        held_out=held, transferred=np.abs(moved / sample.measured_s - 1),
    )  # fmt: skip
    return report, _tables(sample, x, report)


def fit_ops(
    path: Path, *, only: str = "", cross: bool = True, write: bool = False
) -> tuple[ClassFit, ...]:
    """Fit every op class of the table at `path` (or those whose name begins with `only`).

    write: into `constants/*.toml`, in place, and the errors of all classes into the file of
    accuracy. Collectives first: others rest on them.
    """
    rows = read_table(path).rows
    classes = by_class(rows)
    reports = []
    for model in ("nccl", *(m for m in CLASSES if m in classes)):
        if model not in classes or not model.startswith(only):
            continue
        mine, kinds = classes[model]
        run = nccl.fit_nccl if model == "nccl" else fit_class
        report, tables = run(mine, kinds, cross=cross)
        reports.append(report)
        for name, changed in tables.items() if write else ():
            write_tables(_FOLDER / f"{name}.toml", changed)
    if write and not only:
        write_accuracy({"kernels": by_kind(reports)})
    return tuple(reports)


def by_kind(reports: Sequence[ClassFit]) -> Part:
    """Errors of kernels left out of the fit, all op classes of a kind together. device_out: of a
    fit without any kernel of their device, where another device has such a link."""
    found: dict[str, dict[str, int | float]] = {}
    for kind, starts in _KINDS:
        mine = [r for r in reports if r.model.startswith(starts)]
        if not mine:
            continue
        held = np.concatenate([r.held_out for r in mine])
        moved = np.concatenate([r.transferred for r in mine])
        found[kind] = {
            "n": len(held), "median": float(np.median(held)),
            "p90": float(np.percentile(held, 90)), "device_out_n": int(np.isfinite(moved).sum()),
            "device_out_median": float(np.nanmedian(moved)),
        }  # fmt: skip
    return found


def report_text(reports: Sequence[ClassFit]) -> str:
    """A table: medians and p90 in sample, cross-validated by group, and device left out."""
    head = f"{'class':22} {'device':6} {'kernels':22} {'rows':>5}"
    lines = [f"{head} {'in sample':>13} {'held out':>13} {'other device':>13}"]
    for report in reports:
        lines.append(report.line())
        pairs = sorted(set(zip(report.devices, report.kernels, strict=True)))
        lines += [report.line(device, kernel) for device, kernel in pairs]
    return "\n".join(lines)
