"""Whether a calibration may be believed: what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cost_models.calibrate import COLLECTIVES, Measured, Probe
from cost_models.hardware import Cluster, Device
from cost_models.units import format_bytes_per_s, format_flop_per_s

# Shares and ratios beyond which a run is not one of an idle machine at steady temperature.
NOISY_SHARE = 0.2  # of all probes
SLOWER = {"cuda": 0.10, "cpu": 0.20}  # the first GEMM against the same one at the end
STILL_FALLING = {"cuda": 0.07, "cpu": 0.15}  # second against last quarter of the steady load
ABOVE = 1.03  # of a datasheet's peak or line rate: the timers are good to a few percent
BELOW = 0.25  # of a datasheet's peak: the best GEMM of a device that is not shared reaches more
# A copy this large is served by no cache: several times the largest L2 (126 MB, B200).
LARGE_BYTES = 500e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A reason not to save. probe: which; found, expected: in words; hint: what to do."""

    probe: str
    found: str
    expected: str
    hint: str

    @property
    def line(self) -> str:
        return f"{self.probe}: {self.found}; expected {self.expected}"


_IDLE = "end other programs on this machine, then run it again"
_COOL = "let it cool, check fans and power limits, then run it again"


def faults(run: Measured, known: Cluster | None) -> tuple[Fault, ...]:
    """Everything about the run that says it is nonsense; known: the catalogue's device, if any."""
    found = [*_timing(run), *_noise(run), *_throttling(run), *_tiers(run)]
    if known is not None:
        found += [*_peaks(run, known.device), *_links(run, known)]
    return tuple(found)


def _timing(run: Measured) -> Iterator[Fault]:
    for p in (*run.probes, run.first, run.last):
        if not all(0 < s < float("inf") for s in p.seconds):
            yield Fault(
                probe=p.name, found="a time of nothing", expected="seconds above 0",
                hint="the clock of this machine cannot be trusted",
            )  # fmt: skip


def _noise(run: Measured) -> Iterator[Fault]:
    noisy = [p for p in run.probes if p.noisy]
    if len(noisy) > NOISY_SHARE * len(run.probes):
        worst = max(noisy, key=lambda p: p.spread)
        yield Fault(
            probe=worst.name,
            found=f"repeats differ by {worst.spread:.0%} (quartiles), and {len(noisy)} of "
            f"{len(run.probes)} probes by more than 25%",
            expected=f"at most {NOISY_SHARE:.0%} of the probes noisy",
            hint=_IDLE,
        )


def _throttling(run: Measured) -> Iterator[Fault]:
    kind = run.machine.kind
    lost = 1 - run.first.median_s / run.last.median_s
    if lost > SLOWER[kind]:
        yield Fault(
            probe=run.first.name,
            found=f"{lost:.0%} slower at the end of the run than at its start",
            expected=f"at most {SLOWER[kind]:.0%}: throttled, or disturbed",
            hint=_COOL,
        )
    rates = run.steady_flop_per_s
    quarter = len(rates) // 4
    if quarter:
        parts = (rates[quarter : 2 * quarter], rates[-quarter:])
        early, late = (sorted(part)[quarter // 2] for part in parts)
        if late < early * (1 - STILL_FALLING[kind]):
            yield Fault(
                probe="steady load",
                found=f"the rate still fell, by {1 - late / early:.0%}, when it ended",
                expected="a rate that has settled: this one is throttling",
                hint=_COOL,
            )


def _tiers(run: Measured) -> Iterator[Fault]:
    memory, disk = run.rate("host_copy"), run.rate("disk_read")
    if memory and disk and disk > memory:
        yield Fault(
            probe="disk_read",
            found=f"{format_bytes_per_s(disk)}",
            expected=f"less than memory copies, {format_bytes_per_s(memory)}: this is a cache",
            hint="--disk DIR on the disk that plans should use",
        )
    pinned, unpinned = run.rate("host_to_device"), run.rate("unpinned")
    if pinned and unpinned and unpinned > 1.2 * pinned:
        yield Fault(
            probe="host_to_device",
            found=f"{format_bytes_per_s(pinned)} pinned, {format_bytes_per_s(unpinned)} not",
            expected="pinned copies to be the quicker ones",
            hint=_IDLE,
        )


def _peaks(run: Measured, device: Device) -> Iterator[Fault]:
    for p in run.of("gemm"):
        peak = device.peak(p.dtype) if device.has(p.dtype) else 0.0
        if peak and p.flop_per_s > ABOVE * peak:
            yield Fault(
                probe=p.name,
                found=format_flop_per_s(p.flop_per_s),
                expected=f"at most {format_flop_per_s(peak)}, the peak of {device.name}",
                hint=f"is this a {device.title}? a file without base describes another device",
            )
    for dtype in dict.fromkeys(p.dtype for p in run.of("gemm")):
        best = max(p.flop_per_s for p in run.of("gemm") if p.dtype == dtype)
        if device.has(dtype) and best < BELOW * device.peak(dtype):
            yield Fault(
                probe=f"gemm {dtype}",
                found=f"{format_flop_per_s(best)} at best",
                expected=f"a quarter of {format_flop_per_s(device.peak(dtype))} at the least",
                hint=_IDLE,
            )
    for p in run.of("copy", "add", "norm"):
        if p.moved_bytes < LARGE_BYTES:
            continue
        if p.bytes_per_s > ABOVE * device.memory_bandwidth_bytes_per_s:
            rate = format_bytes_per_s(device.memory_bandwidth_bytes_per_s)
            yield Fault(
                probe=p.name,
                found=format_bytes_per_s(p.bytes_per_s),
                expected=f"at most {rate}, the bandwidth of {device.name}",
                hint=f"is this a {device.title}? a file without base describes another device",
            )


def _links(run: Measured, known: Cluster) -> Iterator[Fault]:
    for p in run.of(*COLLECTIVES):
        rate = _wire_bytes_per_s(p)
        if rate > ABOVE * known.intra.bytes_per_s and p.shape[0] <= known.domain_size:
            yield Fault(
                probe=p.name,
                found=f"{format_bytes_per_s(rate)} a GPU",
                expected=f"at most the line rate, {format_bytes_per_s(known.intra.bytes_per_s)}",
                hint="are all ranks on one device? start as many as there are GPUs",
            )


def _wire_bytes_per_s(p: Probe) -> float:
    """What one rank sends in a ring. NVSwitch reduces in the network: half of it for all_reduce."""
    ranks = p.shape[0]
    return p.bytes_per_s * (ranks - 1) / ranks
