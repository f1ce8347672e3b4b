"""Seconds of a kernel on one device, calibrated.

A matmul is laid out in tiles over the SMs, as `gemm.py` says, with constants fitted on measured
kernels; what it comes to for large sizes is a roofline, `((F / rate)^p + (bytes / bandwidth)^p) ^
(1/p) + L`, which costs convolutions and ops known by their counts. The rate is that of a clock
under a steady load at this board power. Inputs may be arrays; outputs are seconds as float64.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.constants_table import Constant, Constants, load_constants
from cost_models.gemm import Facts, gemm_seconds
from cost_models.hardware import Device

FloatArray: TypeAlias = NDArray[np.float64]

MEASURED_FAMILIES = ("ampere", "ada", "hopper", "blackwell")

# Bytes an element: weights (scales included) and activations. Block formats: group of 16 with a
# one-byte scale (nvfp4), group of 128 with a two-byte scale (int4).
_WEIGHT_BYTES = {
    "fp64": 8.0, "fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0,
    "nvfp4": 0.5625, "int4": 0.53,
}  # fmt: skip
_OUTPUT_BYTES = {"fp64": 8.0, "fp32": 4.0, "tf32": 4.0}  # the rest write 16 bits
# Which GEMM constants a dtype uses where it has none of its own.
_FITTED_AS = {"fp16": "bf16", "tf32": "bf16", "fp32": "bf16", "fp64": "bf16", "int8": "fp8",
              "nvfp4": "fp8", "int4": "fp8"}  # fmt: skip

# What a training step's matmul finds in the cache: other tensors passed through it since.
_COPIES = 6.0
_TILING = ("compute_efficiency", "memory_efficiency", "overhead_s", "smoothness", "wave", "feed",
           "fill_s", "split_s", "sweep", "streams", "l2_speed", "boost", "boost_s")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Rates that large kernels of one class and dtype reach, and the cost of small ones."""

    flop_per_s: float
    bytes_per_s: float
    overhead_s: float
    smoothness: float

    def at(self, flop: FloatArray, moved_bytes: FloatArray) -> FloatArray:
        """Seconds of one kernel."""
        p = self.smoothness
        compute_s, memory_s = flop / self.flop_per_s, moved_bytes / self.bytes_per_s
        return np.asarray((compute_s**p + memory_s**p) ** (1 / p)) + self.overhead_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the constants come to on one device: rates per second, seconds, and factors.

    attention_flop_per_s: forward at head size 128 and more. scan_flop_per_s: of Triton kernels.
    """

    bytes_per_s: float
    gap_s: float
    attention_flop_per_s: tuple[tuple[str, float], ...]
    attention_overhead_s: float
    backward_ratio: float
    small_head_ratio: float
    grouped_share: float
    row_tile: float
    conv_share: float
    scan_flop_per_s: float
    batched_ratio: float
    misaligned_ratio: float
    scan_traffic: float
    memory_traffic: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Costs the kernels of one device; made by `load_kernels`.

    tiling: constants and facts of `gemm.gemm_seconds` by dtype. steady: at the clock of a steady
    load, as in training; else one by one on an idle device, as benchmarks of kernels run.
    known: GEMMs costed before: a search asks for the same shapes under many of its decisions.

    fp32 is costed at the fp32 peak, torch's default (float32_matmul_precision "highest"); who
    allows tf32 asks for "tf32". A dtype the device lacks raises UsageError.
    """

    device: Device
    constants: Constants
    clock: float
    rates: Rates
    rooflines: tuple[tuple[str, Roofline], ...]
    tiling: tuple[tuple[str, Facts, Facts], ...] = field(hash=False)
    steady: bool = True
    known: dict[tuple[object, ...], FloatArray] = field(default_factory=dict, hash=False,
                                                        compare=False, repr=False)  # fmt: skip

    @property
    def bytes_per_s(self) -> float:
        """Device memory bandwidth that streaming kernels reach."""
        return self.rates.bytes_per_s

    @property
    def gap_s(self) -> float:
        """Idle time between two kernels of a stream."""
        return self.rates.gap_s

    def roofline(self, dtype: str) -> Roofline:
        """The GEMM roofline of a dtype. Raises UsageError where the device lacks it."""
        for name, line in self.rooflines:
            if name == dtype:
                return line
        self.device.peak(dtype)  # raises, naming the dtypes there are
        raise AssertionError(f"no roofline for {dtype}")

    def gemm_s(
        self, dtype: str, m: ArrayLike, n: ArrayLike, k: ArrayLike, batch: ArrayLike = 1
    ) -> FloatArray:
        """One (batched) matmul [m, k] x [k, n], the second operand stored as weights are."""
        self.roofline(dtype)  # refuses a dtype that the device lacks
        sizes = _floats(m, n, k, batch)
        key = (dtype, *((a.shape, a.tobytes()) for a in sizes))
        if key not in self.known:
            self.known[key] = self._gemm_s(dtype, *sizes)
        return self.known[key]

    def _gemm_s(
        self, dtype: str, m: FloatArray, n: FloatArray, k: FloatArray, batch: FloatArray
    ) -> FloatArray:
        constants, facts = next((c, d) for name, c, d in self.tiling if name == dtype)
        found = gemm_seconds(constants, facts, m, n, k, batch, copies=_COPIES, steady=self.steady)
        odd = (n % 64 != 0) | (k % 64 != 0)
        found = found / np.where(odd, self.rates.misaligned_ratio, 1.0)
        found = np.asarray(found / np.where(batch > 1, self.rates.batched_ratio, 1.0))
        found.setflags(write=False)
        return found

    def grouped_gemm_s(
        self, dtype: str, rows: ArrayLike, groups: ArrayLike, n: ArrayLike, k: ArrayLike
    ) -> FloatArray:
        """One grouped matmul: `rows` rows spread evenly over `groups` weights of [k, n].

        Rows are padded to tiles; weights that no row is expected to hit are not read:
        E (1 - (1 - 1/E)^rows) of E are, at uniform routing.
        """
        total, experts, columns, inner = _floats(rows, groups, n, k)
        tile = self.rates.row_tile
        hit = experts * (1 - (1 - 1 / experts) ** np.maximum(total, 1.0))
        each = np.maximum(total, 1.0) / hit
        filled = each / (tile * np.ceil(each / tile))
        share = self.rates.grouped_share * filled
        flop = 2 * total * columns * inner / share
        weights = hit * columns * inner * _WEIGHT_BYTES[dtype]
        moved = weights + _gemm_bytes(dtype, total, columns, inner, weights=False)
        return self.roofline(dtype).at(flop, moved)

    def attention_s(
        self, dtype: str, flop: ArrayLike, io_bytes: ArrayLike, backward: bool = False,
        head_dim: int = 128,
    ) -> FloatArray:  # fmt: skip
        """One fused attention of `flop` executed operations (backward: 2.5 times the forward's).

        Quantized training keeps attention in 16 bits, so 8-bit and 4-bit dtypes cost as bf16.
        """
        work, moved = _floats(flop, io_bytes)
        rates, wide = self.rates, self._wide(dtype)
        self.device.peak(wide)
        rate = dict(rates.attention_flop_per_s)[wide]
        rate *= rates.backward_ratio if backward else 1.0
        rate *= rates.small_head_ratio if head_dim < 128 else 1.0
        return work / rate + moved / rates.bytes_per_s + rates.attention_overhead_s

    def memory_bound_s(self, moved_bytes: ArrayLike, kernels: ArrayLike = 1) -> FloatArray:
        """Norms, activations, rope, casts, optimizers: bytes read and written in `kernels`."""
        moved, count = _floats(moved_bytes, kernels)
        rates = self.rates
        return moved * rates.memory_traffic / rates.bytes_per_s + count * rates.gap_s

    def conv_s(self, dtype: str, flop: ArrayLike, moved_bytes: ArrayLike) -> FloatArray:
        """One convolution, as an implicit GEMM."""
        work, moved = _floats(flop, moved_bytes)
        return self.roofline(dtype).at(work / self.rates.conv_share, moved)

    def scan_s(self, dtype: str, flop: ArrayLike, moved_bytes: ArrayLike) -> FloatArray:
        """One state-space scan or delta rule, chunked, in 16 bits; its kernels overlap little."""
        work, moved = _floats(flop, moved_bytes)
        rates = self.rates
        again = moved * rates.scan_traffic / rates.bytes_per_s
        return work / rates.scan_flop_per_s + again + rates.gap_s

    def generic_s(self, dtype: str, flop: ArrayLike, moved_bytes: ArrayLike) -> FloatArray:
        """An operation known by its counts alone: compute and traffic do not overlap."""
        work, moved = _floats(flop, moved_bytes)
        line = self.roofline(dtype)
        return work / line.flop_per_s + moved / line.bytes_per_s + line.overhead_s

    def error(self, moe: bool = False) -> float:
        """Expected relative error of a step: of runs whose source was left out of the fit; of a
        generation that was left out, where no run of the device was fitted, and with what kernels
        err on a device left out, where none were measured on it; twice that on a maker's parts of
        which nothing was measured."""
        number = self.constants.number
        error = number(f"step_error.{'moe' if moe else 'dense'}")
        if self.constants.runs:
            return error
        error = max(error, number("step_error.unmeasured"))
        if not self.constants.measured:
            error = math.hypot(error, number("step_error.kernels"))
        return error if self.device.family in MEASURED_FAMILIES else 2 * error

    def provenance(self) -> tuple[Constant, ...]:
        """Every constant in use, with its source, in order of name."""
        return self.constants.items

    def _wide(self, dtype: str) -> str:
        """`dtype`, or the device's 16-bit type for those of 8 bits and less."""
        return dtype if _WEIGHT_BYTES[dtype] >= 2 else _sixteen(self.device)


def _floats(*values: ArrayLike) -> tuple[FloatArray, ...]:
    return tuple(np.asarray(value, dtype=np.float64) for value in values)


def _gemm_bytes(
    dtype: str, m: FloatArray, n: FloatArray, k: FloatArray, weights: bool = True
) -> FloatArray:
    """Bytes of a matmul's operands and result; fp8 and narrower inputs yield 16 bits."""
    width = _WEIGHT_BYTES[dtype]
    second = n * k * width if weights else 0.0
    return np.asarray(second + m * k * width + m * n * _OUTPUT_BYTES.get(dtype, 2.0))


def _sixteen(device: Device) -> str:
    return "bf16" if device.has("bf16") else "fp16"


def _gemm_number(table: Constants, dtype: str, key: str) -> float:
    """A GEMM's constant for a dtype: its own, or that of the dtype whose kernels are alike; the
    tiles' shape of every format is that of the 16-bit kernels."""
    name = dtype
    while not table.has(f"gemm.{name}.compute_efficiency"):
        name = _FITTED_AS[name]
    name = name if table.has(f"gemm.{name}.{key}") else "bf16"
    return table.number(f"gemm.{name}.{key}")


def _tiling(device: Device, table: Constants, dtype: str, clock: float) -> tuple[str, Facts, Facts]:
    """Constants and facts that `gemm_seconds` takes; the clock slows arithmetic alone."""
    width = _WEIGHT_BYTES[dtype]
    facts = {
        "flop_per_s": device.peak(dtype) * clock, "sm": device.sm_count,
        "bytes_per_s": device.memory_bandwidth_bytes_per_s,
        "l2_bytes": table.number("cache.l2_bytes"), "weight_bytes": width, "in_bytes": width,
        "out_bytes": _OUTPUT_BYTES.get(dtype, 2.0),
    }  # fmt: skip
    constants = {key: _gemm_number(table, dtype, key) for key in _TILING}
    return dtype, _arrays(constants), _arrays(facts)


def _arrays(numbers: dict[str, float]) -> Facts:
    return {name: np.asarray(value, dtype=np.float64) for name, value in numbers.items()}


def _roofline(device: Device, table: Constants, dtype: str, clock: float) -> Roofline:
    bandwidth = device.memory_bandwidth_bytes_per_s
    return Roofline(
        flop_per_s=_gemm_number(table, dtype, "compute_efficiency") * device.peak(dtype) * clock,
        bytes_per_s=_gemm_number(table, dtype, "memory_efficiency") * bandwidth,
        overhead_s=_gemm_number(table, dtype, "overhead_s"),
        smoothness=_gemm_number(table, dtype, "smoothness"),
    )


def _rates(device: Device, table: Constants, attention: str, clock: float) -> Rates:
    number = table.number
    share = number("attention.forward_efficiency") * clock
    share *= number("attention.flash2_ratio") if attention != "best" else 1.0
    share *= number("attention.triton_ratio") if attention == "triton" else 1.0
    streamed = number("gemm.bf16.memory_efficiency") * device.memory_bandwidth_bytes_per_s
    return Rates(
        bytes_per_s=streamed,
        gap_s=number("memory_bound.gap_s"),
        attention_flop_per_s=tuple((d, peak * share) for d, peak in device.peak_flop_per_s),
        attention_overhead_s=number("attention.overhead_s"),
        backward_ratio=number("attention.backward_ratio"),
        small_head_ratio=number("attention.small_head_ratio"),
        grouped_share=number("grouped_gemm.efficiency"),
        row_tile=number("grouped_gemm.row_tile"),
        conv_share=number("conv.efficiency"),
        scan_flop_per_s=number("scan.flop_per_s_per_sm") * device.sm_count,
        batched_ratio=number("gemm.batched_ratio"),
        misaligned_ratio=number("gemm.misaligned_ratio"),
        scan_traffic=number("scan.traffic"),
        memory_traffic=number("memory_bound.traffic"),
    )


@functools.cache
def load_kernels(device: Device, *, attention: str = "best", steady: bool = True) -> Kernels:
    """The kernels of a device, with the constants that its hardware file names.

    attention: "best" (cuDNN or FlashAttention-3, what Transformer Engine picks) or "flash2"
    (FlashAttention-2, what torch's scaled_dot_product_attention picks up to Hopper) or "triton"
    (its kernels of 2023 in Triton).
    steady: at the clock that a steady load keeps, by the power of the board; else kernels run one
    by one on an idle device at its rated clock.
    """
    return kernels_of(device, load_constants(device.constants), attention, steady)


def kernels_of(device: Device, table: Constants, attention: str, steady: bool = True) -> Kernels:
    """The kernels of a device under any constants."""
    assert attention in ("best", "flash2", "triton")
    power = device.power_w / table.number("clock.reference_power_w")
    clock = table.number("clock.derate") * power ** table.number("clock.power_exponent")
    clock = clock if steady else 1.0
    return Kernels(
        device=device,
        constants=table,
        clock=clock,
        rates=_rates(device, table, attention, clock),
        rooflines=tuple(
            (dtype, _roofline(device, table, dtype, clock)) for dtype, _ in device.peak_flop_per_s
        ),
        tiling=tuple(_tiling(device, table, d, clock) for d, _ in device.peak_flop_per_s),
        steady=steady,
    )


def constants_digest(device: Device) -> str:
    """sha256 of the canonical constants that costs on `device` depend on."""
    return load_constants(device.constants).digest
