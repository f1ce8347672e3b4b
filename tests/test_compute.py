"""Kernels: limits of the roofline, what derates it, and the measured rows where at hand."""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.compute import constants_digest, load_kernels
from cost_models.hardware import catalogue, describe
from ir.errors import UsageError

H100 = describe("h100").device
KERNELS = load_kernels(H100)


def wide(device) -> str:
    return "bf16" if device.has("bf16") else "fp16"


def of(name: str, constants=KERNELS.constants) -> float:
    return constants.number(name)


def test_large_matmuls_are_bound_by_compute_and_thin_ones_by_memory() -> None:
    m = n = k = 65536
    rate = 989.4e12 * of("gemm.bf16.compute_efficiency") * KERNELS.clock
    assert float(KERNELS.gemm_s("bf16", m, n, k)) == pytest.approx(2 * m * n * k / rate, rel=0.01)
    moved = 2 * (n * k + k + n)
    thin = float(KERNELS.gemm_s("bf16", 1, n, k))
    bandwidth = 3350e9 * of("gemm.bf16.memory_efficiency")
    stream = moved / bandwidth + of("gemm.bf16.overhead_s")
    assert stream < thin < 1.01 * stream  # a tile's 64 rows are multiplied behind it
    least = of("gemm.bf16.overhead_s") + of("gemm.bf16.fill_s")
    assert float(KERNELS.gemm_s("bf16", 1, 1, 1)) == pytest.approx(least, rel=0.02)


def test_a_batch_fills_the_sms_that_one_small_matmul_leaves_idle() -> None:
    start = of("gemm.bf16.overhead_s")
    one, many = (float(KERNELS.gemm_s("bf16", 512, 512, 512, b)) - start for b in (1, 16))
    assert one < many < 16 * one / of("gemm.batched_ratio")
    full = [float(KERNELS.gemm_s("bf16", 8192, 8192, 512, b)) - start for b in (1, 16)]
    alone = 16 * full[0] / of("gemm.batched_ratio")  # waves and tiles are full as they are
    assert full[1] == pytest.approx(alone, rel=0.06)


def test_arrays_cost_as_their_elements() -> None:
    m = np.array([1, 64, 4096])
    times = KERNELS.gemm_s("bf16", m, 4096, 1024)
    assert times.shape == (3,) and times.dtype == np.float64
    assert [float(t) for t in times] == [float(KERNELS.gemm_s("bf16", x, 4096, 1024)) for x in m]


def test_fp8_is_nearly_twice_bf16_where_compute_binds() -> None:
    """By the peaks and the share of each that the kernels reach; before casts."""
    for name in ("h100", "b200"):
        device = describe(name).device
        kernels = load_kernels(device)
        times = [float(kernels.gemm_s(d, 65536, 65536, 65536)) for d in ("bf16", "fp8")]
        rates = [
            device.peak(d) * kernels.constants.number(f"gemm.{d}.compute_efficiency")
            for d in ("bf16", "fp8")
        ]
        assert times[0] / times[1] == pytest.approx(rates[1] / rates[0], rel=0.02)
        assert 1.8 < times[0] / times[1] < 2.4


def test_fp32_is_costed_without_tf32() -> None:
    times = [float(KERNELS.gemm_s(d, 8192, 8192, 8192)) for d in ("fp32", "tf32", "bf16")]
    assert times[0] > 6 * times[1] > 6 * times[2]


def test_power_sets_the_clock() -> None:
    """500 W of 700 W: what is kept at 700 W, times (500 / 700) to the exponent."""
    kept = of("clock.derate")
    assert KERNELS.clock == pytest.approx(kept)
    assert load_kernels(describe("h100-96gb").device).clock == pytest.approx(
        kept * (500 / 700) ** of("clock.power_exponent")
    )


def test_grouped_matmuls_pay_for_padding_and_read_only_weights_that_are_hit() -> None:
    full = float(KERNELS.grouped_gemm_s("bf16", 8 * 6400, 8, 7168, 2048))
    dense = KERNELS.roofline("bf16").at(
        np.float64(2 * 8 * 6400 * 7168 * 2048), np.float64(2 * 8 * 6400 * (7168 + 2048))
    )
    assert float(dense) / full == pytest.approx(of("grouped_gemm.efficiency"), rel=0.02)
    ragged = float(KERNELS.grouped_gemm_s("bf16", 8 * 6401, 8, 7168, 2048))
    assert ragged > full
    few = float(KERNELS.grouped_gemm_s("bf16", 8, 256, 7168, 2048))
    every = float(KERNELS.grouped_gemm_s("bf16", 8192, 256, 7168, 2048))
    hit = 256 * (1 - (1 - 1 / 256) ** 8)
    moved = hit * 7168 * 2048 * 2 + 8 * (7168 + 2048) * 2
    bandwidth = 3350e9 * of("gemm.bf16.memory_efficiency")
    start = of("gemm.bf16.overhead_s")
    assert few == pytest.approx(moved / bandwidth + start, rel=0.05)  # a tile each hides
    assert few < every / 8
    assert np.isfinite(KERNELS.grouped_gemm_s("bf16", 0, 8, 64, 64))


def test_attention_slows_down_backward_with_small_heads_and_with_flash2_on_hopper() -> None:
    flop, moved = 1e13, 1e9
    forward = float(KERNELS.attention_s("bf16", flop, moved))
    assert forward > flop / (989.4e12 * of("attention.forward_efficiency") * KERNELS.clock)
    slower = [
        float(KERNELS.attention_s("bf16", flop, moved, backward=True)),
        float(KERNELS.attention_s("bf16", flop, moved, head_dim=64)),
        float(load_kernels(H100, attention="flash2").attention_s("bf16", flop, moved)),
    ]
    names = ("backward_ratio", "small_head_ratio", "flash2_ratio")
    ratios = [of(f"attention.{name}") for name in names]
    assert [forward / t for t in slower] == pytest.approx(ratios, rel=0.01)
    assert float(KERNELS.attention_s("fp8", flop, moved)) == forward
    a100 = describe("a100").device
    times = [
        float(load_kernels(a100, attention=kind).attention_s("bf16", flop, moved))
        for kind in ("best", "flash2")
    ]
    assert times[0] == times[1]


def test_streaming_kernels_move_bytes_and_wait_between() -> None:
    one, four = (float(KERNELS.memory_bound_s(1e9, n)) for n in (1, 4))
    rate = 3350e9 * of("gemm.bf16.memory_efficiency")
    gap = of("memory_bound.gap_s")
    assert one == pytest.approx(1e9 * of("memory_bound.traffic") / rate + gap)
    assert four - one == pytest.approx(3 * gap)


@pytest.mark.parametrize("name", catalogue())
def test_every_device_costs_every_kernel(name) -> None:
    device = describe(name).device
    kernels = load_kernels(device)
    dtype = wide(device)
    times = [
        kernels.gemm_s(dtype, 4096, 4096, 4096),
        kernels.grouped_gemm_s(dtype, 4096, 8, 4096, 4096),
        kernels.attention_s(dtype, 1e12, 1e8),
        kernels.memory_bound_s(1e9),
        kernels.conv_s(dtype, 1e12, 1e8),
        kernels.scan_s(dtype, 1e11, 1e8),
        kernels.generic_s(dtype, 1e12, 1e8),
    ]
    assert all(0 < float(t) < 10 for t in times)
    for dtype, peak in device.peak_flop_per_s:
        rate = 2 * 8192**3 / float(kernels.gemm_s(dtype, 8192, 8192, 8192))
        assert 0.2 * peak < rate < peak
    with pytest.raises(UsageError, match="does not compute"):
        load_kernels(describe("t4").device).gemm_s("bf16", 1, 1, 1)


@given(st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 10**5))
def test_more_rows_never_take_less(m, n, k) -> None:
    times = KERNELS.gemm_s("bf16", np.array([m, 2 * m]), n, k)
    assert times[0] <= times[1]


def test_an_unmeasured_device_admits_a_larger_error() -> None:
    assert KERNELS.error() == of("step_error.dense") < KERNELS.error(moe=True)
    other = load_kernels(describe("mi300x").device)
    alone = math.hypot(of("step_error.unmeasured"), of("step_error.kernels"))
    assert other.error() == pytest.approx(2 * alone)  # no part of its maker was measured
    relative = load_kernels(describe("rtx-4090").device)
    assert KERNELS.error() < relative.error() == pytest.approx(alone)


def test_constants_have_a_digest_and_a_provenance() -> None:
    digests = {constants_digest(describe(name).device) for name in ("h100", "a100", "b200")}
    assert len(digests) == 3
    assert constants_digest(H100) == constants_digest(describe("h100-96gb").device)
    names = [item.name for item in KERNELS.provenance()]
    assert names == sorted(names) and "gemm.bf16.compute_efficiency" in names


ROWS = {
    "A100-SXM4-80GB": "a100", "H100-SXM5-80GB": "h100", "H200-SXM-141GB": "h200",
    "B200-SXM-180GB": "b200", "L40S-48GB": "l40s",
}  # fmt: skip


@pytest.mark.skipif("MESHWRIGHT_DATA" not in os.environ, reason="needs MESHWRIGHT_DATA")
def test_measured_matmuls_are_met_on_an_idle_device() -> None:
    errors: dict[str, list[float]] = {}
    with (Path(os.environ["MESHWRIGHT_DATA"]) / "measured_ops.csv").open() as file:
        for row in csv.DictReader(file):
            if row["op"] == "gemm" and row["dtype"] == "bfloat16":
                kernels = load_kernels(describe(ROWS[row["device"]]).device, steady=False)
                found = float(kernels.gemm_s("bf16", *(float(row[key]) for key in "MNK")))
                measured = float(row["latency_us"]) * 1e-6
                errors.setdefault(row["device"], []).append(abs(found / measured - 1))
    assert set(errors) == set(ROWS)
    for name, found in errors.items():
        assert np.median(found) < 0.07, name
