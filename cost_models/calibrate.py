"""What a machine was measured to do, and the constants that this comes to.

Fitted through the cost model itself: the constants of a class of kernels are those at which
`compute.Kernels` predicts what was measured. Few samples, so each fit starts from, and is held
near, the constants of the nearest device; its error is of samples left out one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.compute import Kernels, load_kernels
from cost_models.constants_table import Constant, OwnConstants, load_constants
from cost_models.fit.least_squares import fit
from cost_models.hardware import Device

FloatArray: TypeAlias = NDArray[np.float64]

SOURCE = "measured on this machine"
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
_STREAMS = ("copy", "add", "norm")
_GEMM = ("compute_efficiency", "memory_efficiency", "overhead_s", "smoothness")
# Spread (natural logarithm) within which the constants of a like device are believed: efficiencies
# of one architecture differ by tens of percent, overheads by the host and driver as well.
_PRIOR_SD = {"overhead_s": 1.0, "smoothness": 0.2}
_OTHER_SD = 0.5
_LEAST_SAMPLES = 3  # of a fit of several constants; fewer leave the base's as they are
_NOISY = 0.25  # quartiles this far apart, of the median: the sample says little
# Median error of a fit beyond which it is no description of the machine: what one noisy sample is
# left out for. The base's constants stay.
MOST_ERROR = _NOISY


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One thing that was timed, several times over.

    op: gemm [m, n, k]; attention and attention_backward [batch, heads, seq, head_dim], causal;
    copy, add, norm [elements]; launch; host_to_device, device_to_host (pinned), unpinned,
    host_copy, disk_read, disk_fetch, disk_write; a collective [ranks]; of the host product and
    cached [rows, columns, inner], fetch, piece, token [layers, ops, columns of its products] and
    request [layers, ops]. flop: executed. moved_bytes: read and written, or sent (collectives: the
    full tensor). seconds: one value a repeat.
    """

    op: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    flop: float = 0.0
    moved_bytes: float = 0.0
    seconds: tuple[float, ...]

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        size = f"{self.moved_bytes / 1e6:.3g} MB" if self.op not in _SHAPED else ""
        return " ".join(word for word in (self.op, self.dtype, shape, size) if word)

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Distance of the quartiles, relative to the median."""
        low, high = np.quantile(self.seconds, (0.25, 0.75))
        return float((high - low) / self.median_s) if self.median_s > 0 else float("inf")

    @property
    def noisy(self) -> bool:
        return not self.spread <= _NOISY

    @property
    def flop_per_s(self) -> float:
        return self.flop / self.median_s

    @property
    def bytes_per_s(self) -> float:
        return self.moved_bytes / self.median_s


_SHAPED = ("gemm", "attention", "attention_backward", "launch", "product", "piece", "token",
           "request")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the probes ran on, as the system and the driver say it. kind: cuda or cpu.

    cache_bytes: of the last level, 0 where it is not told.
    """

    name: str
    kind: str
    count: int
    memory_bytes: int
    sm_count: int
    host_ram_bytes: int
    disk_bytes: int
    cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run of the probes.

    steady_flop_per_s: of one GEMM over successive windows of constant load. first, last: the same
    GEMM before and after all else. left_out: what could not be measured, and why.
    """

    machine: Machine
    probes: tuple[Probe, ...]
    steady_flop_per_s: tuple[float, ...]
    first: Probe
    last: Probe
    left_out: tuple[str, ...] = ()

    def of(self, *ops: str) -> tuple[Probe, ...]:
        return tuple(probe for probe in self.probes if probe.op in ops)

    def rate(self, op: str) -> float | None:
        """Bytes a second of the largest transfer of that kind; None where there is none."""
        found = sorted(self.of(op), key=lambda probe: probe.moved_bytes)
        return found[-1].bytes_per_s if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTable:
    """Constants of one table, with the samples they rest on.

    median_error: relative, each sample predicted by a fit to the others (of all where there are
    fewer than four). left_out: noisy samples that were not used. held: the rest of a table that
    the base lacks, as its like has it. refused: the constants that stay the base's, for the fit
    misses its samples by more than MOST_ERROR; then there are no values, and base_error is the
    median error at which the base's own predict the same samples.
    """

    name: str
    values: tuple[tuple[str, float | tuple[float, ...]], ...]
    samples: int = 0
    median_error: float = 0.0
    left_out: int = 0
    held: tuple[tuple[str, float], ...] = ()
    refused: tuple[str, ...] = ()
    base_error: float = 0.0

    @property
    def line(self) -> str:
        """Why a fit was refused, in words."""
        return (
            f"{self.name} ({', '.join(self.refused)}): the fit misses its {self.samples} "
            f"samples by {self.median_error:.0%} (median), more than {MOST_ERROR:.0%}; kept as it "
            f"was, which misses them by {self.base_error:.0%}"
        )


def fit_tables(run: Measured, device: Device, base: str) -> tuple[FittedTable, ...]:
    """Every table that the probes allow, in the order in which one rests on the other.

    device: with its peaks and bandwidth; base: the constants that are started from.
    """
    found = list(_cache(run, base))
    tasks: list[tuple[str, tuple[str, ...], tuple[Probe, ...]]] = []
    families = dict.fromkeys(_family(p.dtype) for p in run.of("gemm"))
    for family in sorted(families, key=lambda name: name != "bf16"):  # bandwidth is bf16's
        probes = tuple(p for p in run.of("gemm") if _family(p.dtype) == family)
        tasks.append((f"gemm.{family}", _GEMM, probes))
    streams = ("traffic", "gap_s") if device.family == "cpu" else ("traffic",)
    tasks.append(("memory_bound", streams, run.of(*_STREAMS, *(["launch"] * (len(streams) > 1)))))
    forward = _attention_share(base)
    tasks.append(("attention", (forward, "overhead_s"), _heads(run.of("attention"), 128)))
    tasks.append(("attention", ("backward_ratio",), _heads(run.of("attention_backward"), 128)))
    tasks.append(("attention", ("small_head_ratio",), _heads(run.of("attention"), 0)))
    for table, wanted, probes in tasks:
        steady = tuple(p for p in probes if not p.noisy)
        if len(steady) >= min(len(wanted), _LEAST_SAMPLES):
            found.append(_fit_table(device, base, found, table, wanted, steady))
            found[-1] = replace(found[-1], left_out=len(probes) - len(steady))
    found.append(_clock(run, device))
    return tuple(found)


def own_items(tables: Sequence[FittedTable]) -> tuple[Constant, ...]:
    """The fitted numbers as constants of a hardware file."""
    items = {
        f"{table.name}.{key}": Constant(name=f"{table.name}.{key}", value=value, source=SOURCE)
        for table in tables
        for key, value in (*table.values, *table.held)
    }
    return tuple(items[name] for name in sorted(items))


def calibrated(device: Device, base: str, tables: Sequence[FittedTable]) -> Device:
    """The device costed with what was fitted so far; clock: as fitted, 1 where it is not yet."""
    names = {f"{table.name}.{key}" for table in tables for key, _ in table.values}
    rated = (
        ()
        if "clock.derate" in names
        else (
            Constant(name="clock.derate", value=1.0, source=SOURCE),
            Constant(name="clock.reference_power_w", value=device.power_w, source=SOURCE),
        )
    )
    return replace(device, constants=OwnConstants(base=base, items=(*own_items(tables), *rated)))


def _family(dtype: str) -> str:
    """The table whose constants a dtype is costed with: 16-bit formats share one."""
    return "bf16" if dtype in ("bf16", "fp16") else dtype


def _heads(probes: tuple[Probe, ...], least: int) -> tuple[Probe, ...]:
    """Those with heads of 128 and more, or (least 0) those with smaller ones."""
    return tuple(p for p in probes if (p.shape[3] >= 128) == (least >= 128))


def _attention_share(base: str) -> str:
    """What torch's attention is measured to be: of the best kernels' rate where those are other
    ones (Hopper), else the rate itself."""
    return (
        "flash2_ratio"
        if load_constants(base).number("attention.flash2_ratio") < 1
        else "forward_efficiency"
    )


def _fit_table(
    device: Device,
    base: str,
    before: Sequence[FittedTable],
    table: str,
    wanted: tuple[str, ...],
    probes: tuple[Probe, ...],
) -> FittedTable:
    start = _start(base, table)
    names = tuple(name for name in wanted if name in start)
    held = tuple((name, value) for name, value in start.items() if name not in names)

    def table_of(x: FloatArray) -> FittedTable:
        fitted = tuple((name, _bounded(name, float(np.exp(v)))) for name, v in zip(names, x))
        extra = held if table not in _shipped(base) else ()
        return FittedTable(name=table, values=fitted, held=extra)

    def solve(samples: tuple[Probe, ...]) -> FloatArray:
        measured = np.log([p.median_s for p in samples])

        def residuals(x: FloatArray) -> FloatArray:
            tables = [*before, table_of(x)]
            kernels = load_kernels(calibrated(device, base, tables), attention="flash2")
            return np.asarray(np.log(predictions(kernels, samples)) - measured)

        at = np.log([max(start[name], 1e-9) for name in names])
        sd = np.array([_PRIOR_SD.get(name, _OTHER_SD) for name in names])
        return fit(residuals, at, sd, scale=0.1).x

    def errors(x: FloatArray, samples: tuple[Probe, ...]) -> list[float]:
        kernels = load_kernels(calibrated(device, base, [*before, table_of(x)]), attention="flash2")
        made = predictions(kernels, samples)
        return [abs(one / p.median_s - 1) for one, p in zip(made.tolist(), samples)]

    best = solve(probes)
    if len(probes) >= 4:
        off = [
            errors(solve(probes[:i] + probes[i + 1 :]), probes[i : i + 1])[0]
            for i in range(len(probes))
        ]
    else:
        off = errors(best, probes)
    made = replace(table_of(best), samples=len(probes), median_error=float(np.median(off)))
    if made.median_error <= MOST_ERROR:
        return made
    kernels = load_kernels(calibrated(device, base, before), attention="flash2")
    apart = predictions(kernels, probes) / [p.median_s for p in probes] - 1
    return replace(
        made, values=(), held=(), refused=names, base_error=float(np.median(np.abs(apart)))
    )


def _shipped(base: str) -> frozenset[str]:
    """Names of the tables that the base has."""
    return frozenset(item.name.rpartition(".")[0] for item in load_constants(base).items)


def _start(base: str, table: str) -> dict[str, float]:
    """The base's numbers of a table; a GEMM family it lacks starts as bf16's."""
    items = load_constants(base).items
    source = table if table in _shipped(base) or not table.startswith("gemm.") else "gemm.bf16"
    words = ("samples", "median_error", "p90_error", "held_out_median_error")
    return {
        item.name.rpartition(".")[2]: item.value
        for item in items
        if item.name.rpartition(".")[0] == source
        and not isinstance(item.value, tuple)
        and item.name.rpartition(".")[2] not in words
    }


def _bounded(name: str, value: float) -> float:
    """An efficiency is a share of 1 at most."""
    return min(value, 1.0) if name.endswith("efficiency") else value


def predictions(kernels: Kernels, probes: Sequence[Probe]) -> FloatArray:
    """Seconds of each probe by the cost model."""
    return np.array([_PREDICT[p.op](kernels, p) for p in probes], dtype=np.float64)


def _gemm_s(kernels: Kernels, p: Probe) -> float:
    m, n, k = p.shape
    return float(kernels.gemm_s(p.dtype, m, n, k))


def _attention_s(kernels: Kernels, p: Probe) -> float:
    backward = p.op == "attention_backward"
    return float(
        kernels.attention_s(p.dtype, p.flop, p.moved_bytes, backward=backward, head_dim=p.shape[3])
    )


def _stream_s(kernels: Kernels, p: Probe) -> float:
    return float(kernels.memory_bound_s(p.moved_bytes))


_PREDICT: dict[str, Callable[[Kernels, Probe], float]] = {
    "gemm": _gemm_s, "attention": _attention_s, "attention_backward": _attention_s,
    "copy": _stream_s, "add": _stream_s, "norm": _stream_s, "launch": _stream_s,
}  # fmt: skip


def _cache(run: Measured, base: str) -> tuple[FittedTable, ...]:
    """The last-level cache as the driver or system tells it, where the model asks for it."""
    size = run.machine.cache_bytes
    if not size or not load_constants(base).has("cache.l2_bytes"):
        return ()
    return (FittedTable(name="cache", values=(("l2_bytes", float(size)),)),)


def _clock(run: Measured, device: Device) -> FittedTable:
    """What a steady load keeps of the rate of short bursts: the last quarter of it over them."""
    rates = run.steady_flop_per_s
    late = float(np.median(rates[-max(1, len(rates) // 4) :]))
    share = min(1.0, late / run.first.flop_per_s)
    return FittedTable(
        name="clock", samples=len(rates),
        values=(("derate", share), ("reference_power_w", device.power_w)),
    )  # fmt: skip
