"""The hardware file that a calibration comes to, as `--hardware` takes it, and what it moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cost_models.calibrate import (
    MOST_ERROR,
    SOURCE,
    FittedTable,
    Measured,
    Probe,
    fit_tables,
)
from cost_models.calibrate_checks import LARGE_BYTES, Fault
from cost_models.calibrate_collectives import fit_collectives
from cost_models.calibrate_host import fit_host
from cost_models.constants_table import load_constants
from cost_models.hardware import Cluster, Device, describe, recognise

CPU = "cpu"
CPU_POWER_W = 200.0  # of a server socket, nominal: a CPU is not costed by its power
UNKNOWN_GPU_POWER_W = 400.0  # likewise: reference and board are the same, so nothing depends on it
_UNITS = {"row_bytes_per_s": "B/s", "read_bytes_per_s": "B/s", "cached_bytes_per_s": "B/s",
          "disk_bytes_per_s": "B/s", "flop_per_s": "FLOP/s", "column_s": "s"}  # fmt: skip
# Sources of tables that were not fitted.
_TOLD = {
    "cache": "as the driver or the system tells it",
    "collective": "the line rate that the rates below are relative to",
}
_HOST = "a small copy awaited; the tokens of small models by their layers and ops"
# Its name, bytes a second and latency: what stands for a network that nobody measured.
_NOT_MEASURED_NETWORK = ("not measured: 10 Gb/s Ethernet", 1.25e9, 3e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A number beside the one that held before. unit: of both, or empty for shares."""

    name: str
    before: float | None
    now: float
    unit: str
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A run with what it comes to. base: the catalogue's device; None where it has none."""

    run: Measured
    base: str | None
    device: Device
    tables: tuple[FittedTable, ...]
    moved: tuple[Moved, ...]

    @property
    def refused(self) -> tuple[FittedTable, ...]:
        """Fits that describe nothing: the base's constants stay."""
        return tuple(table for table in self.tables if table.refused)


def known_cluster(run: Measured) -> Cluster | None:
    """The catalogue's cluster of that device, if it has one."""
    name = recognise(run.machine.name, run.machine.memory_bytes)
    return describe(name) if name and run.machine.kind == "cuda" else None


def calibration(run: Measured) -> Calibration:
    """Fit everything that the run allows."""
    known = known_cluster(run)
    device = _device(run, known)
    base = device.constants
    assert isinstance(base, str)
    line = known.intra.bytes_per_s if known else _link_rate(run)
    tables = (
        *fit_tables(run, device, base), *fit_host(run), *fit_collectives(run, base, line),
    )  # fmt: skip
    return Calibration(
        run=run, base=known.name if known else None, device=device, tables=tables,
        moved=_moved(run, known, base, tables, device),
    )  # fmt: skip


def _device(run: Measured, known: Cluster | None) -> Device:
    """The catalogue's device with this one's memory; else one whose peaks are what it reached."""
    machine = run.machine
    link = _slower(run, "host_to_device", "device_to_host") or run.rate("host_copy")
    if known is not None:
        return replace(
            known.device,
            memory_bytes=machine.memory_bytes,
            host_link_bytes_per_s=link or known.device.host_link_bytes_per_s,
        )
    best: dict[str, float] = {}
    for p in _calm(run.of("gemm")):
        best[p.dtype] = max(best.get(p.dtype, 0.0), p.flop_per_s)
    streams = _calm(run.of("copy", "add", "norm"))
    large = [p for p in streams if p.moved_bytes >= _uncached(streams)]
    return Device(
        name="host", title=machine.name, family=CPU if machine.kind == CPU else "unknown",
        constants=CPU if machine.kind == CPU else "l40s", memory_bytes=machine.memory_bytes,
        memory_bandwidth_bytes_per_s=max(p.bytes_per_s for p in large),
        peak_flop_per_s=tuple(best.items()),
        power_w=CPU_POWER_W if machine.kind == CPU else UNKNOWN_GPU_POWER_W,
        sm_count=machine.sm_count, host_link_bytes_per_s=link or 1e10,
    )  # fmt: skip


def _calm(probes: tuple[Probe, ...]) -> tuple[Probe, ...]:
    """Those that are not noisy; for each format all of them where none is."""
    calm = tuple(p for p in probes if not p.noisy)
    missing = {p.dtype for p in probes} - {p.dtype for p in calm}
    return (*calm, *(p for p in probes if p.dtype in missing))


def _uncached(streams: Sequence[Probe]) -> float:
    """Bytes from which on a stream is the memory's: half the largest that was measured."""
    return min(LARGE_BYTES, max(p.moved_bytes for p in streams) / 2)


def _slower(run: Measured, *ops: str) -> float | None:
    rates = [rate for rate in (run.rate(op) for op in ops) if rate]
    return min(rates, default=None)


def _link_rate(run: Measured) -> float:
    """Line rate to relate collectives to where the catalogue has none: the best that was seen."""
    rates = [p.bytes_per_s for p in run.probes if p.op in ("all_gather", "all_reduce")]
    return max(rates, default=0.0) or run.rate("host_copy") or 1e10


def _moved(
    run: Measured, known: Cluster | None, base: str, tables: Sequence[FittedTable], device: Device
) -> tuple[Moved, ...]:
    table = load_constants(base)
    rows = []
    if known is not None:
        memory = known.device.memory_bytes
        rows.append(_row("device.memory_bytes", memory, device.memory_bytes, "B", "driver"))
    else:
        for dtype, peak in device.peak_flop_per_s:
            rows.append(_row(f"peak {dtype}", None, peak, "FLOP/s", "best GEMM"))
        rate = device.memory_bandwidth_bytes_per_s
        rows.append(_row("memory bandwidth", None, rate, "B/s", "best stream"))
    before = known.device.host_link_bytes_per_s if known else None
    line = known.intra.bytes_per_s if known else _link_rate(run)
    base_link = table.number("collective.link_bytes_per_s")
    links = [v for t in tables if t.name == "collective" for _, v in t.values]
    rated = links[0] if links else base_link  # what the rates below are relative to
    assert not isinstance(rated, tuple)
    rows.append(_row("host link", before, device.host_link_bytes_per_s, "B/s", "copies"))
    for fitted in tables:
        for key, value in fitted.values:
            name = f"{fitted.name}.{key}"
            if isinstance(value, tuple) or name.startswith(("clock.ref", "collective")):
                continue
            old = table.number(name) if table.has(name) else None
            unit = "s" if key.endswith("_s") and not key.endswith("per_s") else ""
            basis = {"clock": "load", "cache": "told"}.get(fitted.name, _basis(fitted))
            unit = "B" if key.endswith("_bytes") else unit
            unit = _UNITS.get(key, unit)
            rows.append(_row(name, old, value, unit, basis))
    tiers = {tier.name: tier for tier in known.tiers} if known else {}
    for name, read, write in _tier_rates(run):
        tier = tiers.get(name)
        rows.append(
            _row(f"{name} read", tier.read_bytes_per_s if tier else None, read, "B/s", "a node")
        )
        rows.append(
            _row(f"{name} write", tier.write_bytes_per_s if tier else None, write, "B/s", "a node")
        )
    for fitted in tables:
        rates = dict(fitted.values).get("bytes_per_s")
        if isinstance(rates, tuple):
            old = table.numbers(f"{fitted.name}.bytes_per_s")[-1]
            if known is None:
                old_rate = None
            else:
                old_rate = old * line / base_link
            now = rates[-1] * line / rated
            rows.append(_row(f"{fitted.name} rate", old_rate, now, "B/s", _basis(fitted)))
    return tuple(rows)


def _basis(fitted: FittedTable) -> str:
    """Samples, and the error of those left out."""
    return f"{fitted.samples} samples, {fitted.median_error:.0%}"


def _row(name: str, before: float | None, now: float, unit: str, basis: str) -> Moved:
    return Moved(name=name, before=before, now=float(now), unit=unit, basis=basis)


def _tier_rates(run: Measured) -> list[tuple[str, float, float]]:
    found = []
    copy = run.rate("host_copy")
    if copy:
        found.append(("cpu", copy, copy))
    read, write = run.rate("disk_read"), run.rate("disk_write")
    if read and write:
        found.append(("nvme", read, write))
    return found


def to_toml(made: Calibration, name: str, date: str, warnings: Sequence[Fault] = ()) -> str:
    """The whole file. name: of the hardware; date: when it was measured; warnings: faults that it
    was written in spite of, which a reader must know."""
    run, known = made.run, describe(made.base) if made.base else None
    lines = [f"# {run.machine.name}, measured by `plan calibrate` on {date}."]
    lines += [f"# WARNING, saved with --force: {fault.line}" for fault in warnings]
    lines += [f"# Not measured: {reason}" for reason in run.left_out]
    lines += [f"# Refused: {table.line}" for table in made.refused]
    if made.base:
        lines += [f'base = "{made.base}"']
    else:
        lines += [f'name = "{name}"']
    lines += [f"count = {run.machine.count}", "", "[device]"]
    device = made.device
    if known is None:
        lines += [f'title = "{_plain(device.title)}"', f'family = "{device.family}"',
                  f'constants = "{device.constants}"',
                  f"memory_bandwidth_bytes_per_s = {_number(device.memory_bandwidth_bytes_per_s)}",
                  f"power_w = {_number(device.power_w)}",
                  f"sm_count = {device.sm_count}"]  # fmt: skip
    lines += [f"memory_bytes = {device.memory_bytes}",
              f"host_link_bytes_per_s = {_number(device.host_link_bytes_per_s)}"]  # fmt: skip
    if known is None:
        lines += ["", "[device.peak_flop_per_s]  # the best that was measured"]
        lines += [f"{dtype} = {_number(peak)}" for dtype, peak in device.peak_flop_per_s]
    lines += ["", *_cluster_lines(run, known), "", "[constants]"]
    # A class whose constants hold here, fitted or not, counts as measured.
    holds = all(table.base_error <= MOST_ERROR for table in made.refused)
    lines.append(f"measured = {1 if holds and not warnings else 0}")
    lines += _constant_lines(made.tables)
    lines += ["", "[sources]", *_source_lines(made, known, date)]
    return "\n".join(lines) + "\n"


def _cluster_lines(run: Measured, known: Cluster | None) -> list[str]:
    machine = run.machine
    lines = ["[cluster]", f"node_size = {machine.count}"]
    if known is None or known.domain_size == known.node_size:
        lines.append(f"domain_size = {machine.count}")
    lines.append(f"host_ram_bytes = {machine.host_ram_bytes}")
    if known is None:
        name, rate, hop = _NOT_MEASURED_NETWORK
        for where, words, kind, bytes_per_s, latency in (
            ("intra", "memory of the host", "pcie", _link_rate(run), 1e-5),
            ("inter", name, "network", rate, hop),
        ):
            lines += ["", f"[cluster.{where}]", f'name = "{words}"', f'kind = "{kind}"',
                      f"bytes_per_s = {_number(bytes_per_s)}", f"latency_s = {latency}",
                      "efficiency = 0.8"]  # fmt: skip
    old = {tier.name: tier for tier in known.tiers} if known else {}
    sizes = {"cpu": machine.host_ram_bytes, "nvme": machine.disk_bytes}
    rates = {name: (read, write) for name, read, write in _tier_rates(run)}
    for name, size in sizes.items():
        if name in rates:
            read, write = rates[name]
        elif name in old:
            tier = old[name]
            size, read, write = tier.bytes, tier.read_bytes_per_s, tier.write_bytes_per_s
        else:
            continue
        lines += ["", "[[cluster.tiers]]", f'name = "{name}"', f"bytes = {size}",
                  f"read_bytes_per_s = {_number(read)}",
                  f"write_bytes_per_s = {_number(write)}"]  # fmt: skip
    return lines


def _constant_lines(tables: Sequence[FittedTable]) -> list[str]:
    """One TOML table each; fits of the same table (attention's) are put together."""
    merged: dict[str, list[FittedTable]] = {}
    for fitted in tables:
        if fitted.refused:
            continue
        merged.setdefault(fitted.name, []).append(fitted)
    lines: list[str] = []
    for name, parts in merged.items():
        lines += ["", f"[constants.{name}]"]
        for part in parts:
            lines += [f"{key} = {_value(v)}" for key, v in (*part.values, *part.held)]
        samples = sum(part.samples for part in parts)
        off = max(part.median_error for part in parts)
        left = sum(part.left_out for part in parts)
        said = f"; {left} noisy ones left out" if left else ""
        if name in _TOLD:
            lines.append(f'source = "{_TOLD[name]}"')
            continue
        if name == "host":
            lines += [f"samples = {samples}", f"median_error = {off:.3g}"]
            lines.append(f'source = "{SOURCE}: {_HOST}; error: spread of the repeats"')
            continue
        if name == "clock":
            lines.append(f'source = "{SOURCE}: a GEMM under load against short bursts{said}"')
            continue
        lines += [f"samples = {samples}", f"median_error = {off:.3g}"]
        how = "of the fit, its samples are few"
        if all(part.samples >= 4 for part in parts):
            how = "of samples left out one by one"
        lines.append(f'source = "{SOURCE}; error {how}{said}"')
    return lines


def _source_lines(made: Calibration, known: Cluster | None, date: str) -> list[str]:
    run = made.run
    said: Mapping[str, str] = {
        "device": f"{SOURCE}, {date}" + (f", else the catalogue's {made.base}" if known else ""),
        "device.memory_bytes": "what the driver reports" if known else "what the system reports",
        "device.host_link_bytes_per_s": "pinned copies, the slower direction, measured"
        if run.rate("host_to_device")
        else "copies between two places of the host's memory, measured",
        "cluster.tiers": f"{SOURCE}: memory copies; a file read and written past the page cache"
        if run.rate("disk_read")
        else f"{SOURCE}: memory copies; no disk was measured",
    }
    if known is None:
        said = {
            **said,
            "cluster": "this machine alone; the network between machines was not measured",
            "device.power_w": "nominal: nothing depends on it",
        }
    return [f'"{key}" = "{_plain(text)}"' for key, text in said.items()]


def _plain(text: str) -> str:
    """Safe inside a TOML string of one line."""
    kept = text.encode("ascii", "replace").decode()
    return kept.replace("\\", "/").replace('"', "'").replace("\n", " ")


def _value(value: float | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_number, value)) + "]"
    return _number(value)


def _number(value: float) -> str:
    """Four digits, as TOML takes them: more than any repeat agrees to."""
    return f"{value:.4g}"
