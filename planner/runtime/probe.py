"""Measure this machine: what `plan calibrate` times, in which order, and for how long.

Medians of repeats with their spread; the same GEMM first and last, and one under load in between,
so that a machine that heats up, or is shared, is noticed.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cost_models.calibrate import Machine, Measured, Probe
from planner.runtime.probe_collectives import collectives
from planner.runtime.probe_copies import copies, disk
from planner.runtime.probe_host import host_probes
from planner.runtime.probe_kernels import (
    attentions,
    gemm,
    gemm_call,
    gemms,
    launch,
    streams,
)
from planner.runtime.probe_timer import Timer

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long is measured. probe_s: of one probe; steady_s: of the load; large: a factor on the
    sizes of what is moved."""

    probe_s: float
    steady_s: float
    large: float


def effort_of(kind: str, quick: bool) -> Effort:
    """Under five minutes in full: some 60 probes, and a load that heats a GPU through."""
    if quick:
        if kind == "cpu":
            return Effort(probe_s=0.04, steady_s=0.5, large=0.25)
        return Effort(probe_s=0.06, steady_s=3.0, large=0.25)
    return Effort(probe_s=0.8, steady_s=10.0 if kind == "cpu" else 30.0, large=1.0)


def measure(folder: Path, *, quick: bool = False, report: Report | None = None) -> Measured | None:
    """Run every probe that this machine has. folder: where a file is written and read.

    Under torchrun all ranks run the collectives, and the first one all else; None on the others.
    """
    device = _device()
    effort = effort_of(device.type, quick)
    timer = Timer(device=device, budget_s=effort.probe_s)
    left_out: list[str] = []
    if int(os.environ.get("RANK", "0")) > 0:
        for _ in collectives(timer, quick, left_out):
            pass
        return None
    found: list[Probe] = []
    dtype = "bf16" if _has_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    shape = (4096,) * 3 if device.type == "cuda" else (768,) * 3

    def take(probes: Iterator[Probe]) -> None:
        for probe in probes:
            if report:
                report(f"measured {probe.name}: {probe.median_s * 1e3:.3g} ms")
            found.append(probe)

    with torch.no_grad():
        first = gemm(timer, dtype, shape)
        take(gemms(timer, _dtypes(device), left_out))
        take(streams(timer, _dtypes(device)[0], effort.large))
        take(launch(timer))
    take(attentions(timer, dtype))
    take(copies(timer, effort.large, left_out))
    take(disk(folder, effort.large, left_out))
    with torch.no_grad():
        take(host_probes(timer, effort.large, left_out))
    if report:
        report(f"steady load for {effort.steady_s:.0f} s")
    steady = _steady(timer, dtype, shape, effort.steady_s)
    take(collectives(timer, quick, left_out))
    with torch.no_grad():
        last = gemm(timer, dtype, shape)
    return Measured(
        machine=machine(device, folder), probes=tuple(found), steady_flop_per_s=steady,
        first=first, last=last, left_out=tuple(left_out),
    )  # fmt: skip


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)


def _dtypes(device: torch.device) -> tuple[str, ...]:
    """Formats that are timed, the usual one first: fp8 from compute capability 8.9 on."""
    if device.type == "cpu":
        return ("fp32", "bf16")
    usual = "bf16" if _has_bf16(device) else "fp16"
    eight = torch.cuda.get_device_capability(device) >= (8, 9) and torch.version.hip is None
    return (usual, "fp32", *(["fp8"] if eight else []))


def machine(device: torch.device, folder: Path) -> Machine:
    """What the system says it is."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disk_bytes = shutil.disk_usage(folder).total
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return Machine(
            name=found.name, kind="cuda", count=torch.cuda.device_count(),
            memory_bytes=found.total_memory, sm_count=found.multi_processor_count,
            host_ram_bytes=ram, disk_bytes=disk_bytes,
            cache_bytes=getattr(found, "L2_cache_size", 0),
        )  # fmt: skip
    return Machine(
        name=f"{_cpu_name()}, {torch.get_num_threads()} threads a process", kind="cpu",
        count=ranks, memory_bytes=ram // ranks, sm_count=torch.get_num_threads(),
        host_ram_bytes=ram, disk_bytes=disk_bytes, cache_bytes=_cpu_cache_bytes(),
    )  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _cpu_cache_bytes() -> int:
    """Of the last level, as Linux tells it; 0 elsewhere."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="utf-8")
        return int(text.strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 0


def _steady(timer: Timer, dtype: str, shape: tuple[int, ...], seconds: float) -> tuple[float, ...]:
    """FLOP/s of one GEMM over successive windows, without a pause."""
    windows = 20
    with torch.no_grad():
        probe = gemm(timer, dtype, shape)
        calls = max(1, math.ceil(seconds / windows / probe.median_s))
        call = gemm_call(timer.device, dtype, shape)
        rates: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(rates) < 4:
            rates.append(calls * probe.flop / timer.window_s(call, calls))
    return tuple(rates)
