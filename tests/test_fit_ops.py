"""Kernel models by first principles, the fit that finds their constants, the measured rows."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.attention import attended
from cost_models.fit.classes import CLASSES, group_of
from cost_models.fit.hierarchy import Sample, Spread, cross_validated_s, slots, solve
from cost_models.fit.least_squares import fit
from cost_models.fit.ops import by_class, fit_class, sample_of
from cost_models.fit.tables import replaced
from cost_models.gemm import boosted, missed, smooth_max
from cost_models.links import mixed
from cost_models.moe import rows_of_experts, tiles_of
from cost_models.op_models import constant, constants_of, prepare
from cost_models.op_rows import device_of, kind_of
from cost_models.validation.op_table import read_table
from cost_models.validation.ops import op_class, predict, validate_ops
from ir.errors import PlanError, UsageError

COLUMNS = (
    "source_file", "device", "op", "kernel", "dtype", "M", "N", "K", "batch", "q_len", "kv_len",
    "heads", "kv_heads", "head_dim", "window", "num_gpus", "bytes", "tokens", "hidden", "inter",
    "topk", "experts", "moe_tp", "moe_ep", "distribution", "latency_us",
)  # fmt: skip
H100 = "H100-SXM5-80GB"


def table(tmp_path: Path, *rows: dict[str, object]) -> Path:
    path = tmp_path / "ops.csv"
    lines = [",".join(COLUMNS)]
    for row in rows:
        full = {"device": H100, "kernel": "any", "dtype": "bfloat16", "latency_us": 1.0} | row
        lines.append(",".join(str(full.get(key, "")) for key in COLUMNS))
    path.write_text("\n".join(lines) + "\n")
    return path


def seconds(tmp_path: Path, *rows: dict[str, object]) -> np.ndarray:
    read = read_table(table(tmp_path, *rows))
    found, skipped = read.rows, read.skipped
    assert not skipped
    return np.array([one.predicted_s for one in predict(found)])


def gemm(m: int, n: int = 4096, k: int = 4096, **more: object) -> dict[str, object]:
    return {"op": "gemm", "M": m, "N": n, "K": k, **more}


# --- first principles ------------------------------------------------------------------------


@given(st.integers(1, 10**5), st.integers(1, 10**5))
def test_more_rows_never_take_less_in_any_format(one, other) -> None:
    rows = [gemm(m, dtype=d) for d in ("bfloat16", "fp8", "int4_wo") for m in sorted((one, other))]
    found = _predicted(rows)
    assert all(found[i] <= found[i + 1] * (1 + 1e-12) for i in (0, 2, 4))


def _predicted(rows: list[dict[str, object]]) -> list[float]:
    from cost_models.op_rows import OpRow

    made = [
        OpRow(
            line=i, device=device_of(H100), op=str(row["op"]), kernel="any",
            dtype=str(row.get("dtype", "bfloat16")), distribution="", version=(), seconds=1.0,
            numbers={k: float(v) for k, v in row.items() if k not in ("op", "dtype")},
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return [one.predicted_s for one in predict(made)]


def test_a_wave_more_costs_a_step(tmp_path) -> None:
    """132 SMs: 128 x 256 tiles of 11 x 12 fill one wave, and a twelfth row of tiles needs two."""
    n, k = 12 * 256, 16384
    inside, full, beyond = seconds(tmp_path, gemm(10 * 128, n, k), gemm(11 * 128, n, k),
                                   gemm(11 * 128 + 1, n, k))  # fmt: skip
    assert full / inside < 1.05 < 1.15 < beyond / full


def test_no_gemm_beats_its_bytes_or_its_arithmetic(tmp_path) -> None:
    shapes = [(1, 16384, 16384), (16384, 16384, 16384), (64, 51200, 5120), (4096, 1024, 8192)]
    found = seconds(tmp_path, *(gemm(*shape) for shape in shapes))
    for (m, n, k), value in zip(shapes, found, strict=True):
        assert value > 2 * m * n * k / 989.4e12
        assert value > 2 * (n * k + m * k + m * n) / 3.35e12


def test_small_weights_come_from_the_cache() -> None:
    """Six 2 MiB weights fit 50 MB and are missed by none; six of 32 MiB by all."""
    assert missed(np.array(6 * 2 * 2**20), np.array(50e6)) == 0
    assert missed(np.array(6 * 32 * 2**20), np.array(50e6)) == 1


def test_the_smooth_maximum_lies_above_both_and_below_their_sum() -> None:
    a, b = np.array([1e-6, 3e-6, 2e-6]), np.array([2e-6, 1e-9, 2e-6])
    found = smooth_max(a, b, np.array(3.0))
    assert np.all(found >= np.maximum(a, b)) and np.all(found <= a + b)
    assert found[2] == pytest.approx(2e-6 * 2 ** (1 / 3))


def test_a_short_kernel_outruns_the_power_limit_and_a_long_one_does_not() -> None:
    boost, after = np.array(0.25), np.array(1e-3)
    short, half, long = boosted(np.array([1e-9, 1e-3, 10.0]), boost, after)
    assert short == pytest.approx(1e-9 / 1.25, rel=1e-3)
    assert half == pytest.approx(1e-3 / 1.125)
    assert long == pytest.approx(10, rel=1e-3)


def test_attended_pairs_are_those_of_whole_tiles() -> None:
    s, none = np.array(4096.0), np.array(0.0)
    exact = sum(range(1, 4097))
    assert exact < attended(s, none) < exact * 1.04
    windowed = sum(min(i, 128) for i in range(1, 4097))
    assert windowed < attended(s, np.array(128.0)) < 2 * windowed


def test_windows_and_narrow_caches_read_less(tmp_path) -> None:
    row = {"op": "attn_decode", "batch": 64, "kv_len": 8192, "heads": 64, "kv_heads": 8,
           "head_dim": 128, "window": 0, "kernel": "vllm_flash_attn_fa3"}  # fmt: skip
    full, windowed, narrow = seconds(
        tmp_path, row | {"dtype": "bfloat16/kv_bfloat16"},
        row | {"dtype": "bfloat16/kv_bfloat16", "window": 128},
        row | {"dtype": "bfloat16/kv_fp8"},
    )  # fmt: skip
    assert windowed < narrow < full
    assert full > 2 * 64 * 8192 * 8 * 128 * 2 / 3.35e12  # keys and values, two bytes each


def test_experts_that_are_hit_are_read_and_their_last_tiles_padded() -> None:
    assert rows_of_experts(1, 128, 8, 1, None) == (1.0,) * 8
    assert rows_of_experts(64, 128, 8, 1, None) == (4.0,) * 128
    assert rows_of_experts(64, 128, 8, 8, None) == (4.0,) * 16
    assert tiles_of((65.0, 64.0, 1.0), 64) == 2 + 1 + 1
    skewed = rows_of_experts(4096, 128, 8, 1, 1.2)
    assert sum(skewed) == pytest.approx(4096 * 8, rel=1e-3) and max(skewed) <= 4096
    assert skewed == tuple(sorted(skewed, reverse=True)) and skewed[0] > 8 * skewed[-1]
    busiest = sum(rows_of_experts(4096, 128, 8, 8, 1.2))
    assert 4096 < busiest < 4096 * 8  # more than its share, less than all
    with pytest.raises(PlanError, match="picks 9 experts of 8"):
        rows_of_experts(4, 8, 9, 1, 1.2)
    with pytest.raises(PlanError, match="2,147,483,648 experts, of 1,000,000 at most"):
        rows_of_experts(4, 2**31, 8, 1, 1.2)


def test_skew_takes_longer_when_many_tokens_wait_for_the_fullest_rank(tmp_path) -> None:
    row = {"op": "moe_fused_mlp", "kernel": "sglang_fused_moe_triton", "tokens": 4096,
           "hidden": 4096, "inter": 1536, "topk": 8, "experts": 128, "moe_tp": 1}  # fmt: skip
    flat, skewed, alone = seconds(
        tmp_path, row | {"moe_ep": 8, "distribution": "balanced"},
        row | {"moe_ep": 8, "distribution": "power_law_1.2"},
        row | {"moe_ep": 1, "distribution": "balanced"},
    )  # fmt: skip
    assert flat < skewed < alone


@given(st.floats(1, 1e10), st.floats(1, 1e10))
def test_a_change_of_protocol_never_saves_time_by_more_bytes(one, other) -> None:
    sizes = np.array(sorted((one, other)))
    found = mixed(1e-5 + 1e-8 * np.sqrt(sizes), 1.5e-5 + sizes / 3e11, sizes, 1e6)
    assert found[0] <= found[1] * (1 + 1e-12)


# --- the fit ---------------------------------------------------------------------------------


def test_least_squares_finds_a_line_through_outliers_and_respects_priors() -> None:
    x = np.linspace(0, 1, 50)
    y = 2 * x + 1
    y[::10] += 3  # five rows far off
    found = fit(lambda p: p[0] * x + p[1] - y, np.array([0.0, 0.0]), np.array([np.inf, np.inf]))
    assert found.x == pytest.approx([2, 1], abs=0.02)
    held = fit(lambda p: p[0] * x + p[1] - y, np.array([1.0, 0.0]), np.array([0.0, np.inf]))
    assert held.x[0] == 1.0
    exact = fit(
        lambda p: p[0] * x + p[1] - y, np.array([0.0, 0.0]), np.array([np.inf, np.inf]),
        jacobian=lambda p: np.stack([x, np.ones_like(x)], axis=1),
    )  # fmt: skip
    assert exact.x == pytest.approx(found.x, abs=1e-3)


def _synthetic(noise: float) -> tuple[Sample, dict[tuple[str, str, str], float]]:
    """Kernels of bytes / rate + start on three devices, the third known by four rows alone."""
    rng = np.random.default_rng(3)
    size = np.exp(rng.uniform(np.log(1e4), np.log(1e9), 84))
    device = np.array(["a"] * 40 + ["b"] * 40 + ["c"] * 4)
    rate = np.array([{"a": 1e12, "b": 2e12, "c": 1.4e12}[d] for d in device])
    measured = (size / rate + 5e-6) * np.exp(rng.normal(0, noise, 84))

    def model_of(at):
        return lambda c: size[at] / (c["rate"] * 1e12) + c["start_s"]

    sample = Sample(
        spreads={"rate": Spread(start=1.0, prior=1.0, device=0.5),
                 "start_s": Spread(start=1e-5, prior=1.0)},
        model_of=model_of, measured_s=measured, devices=tuple(device), kernels=("k",) * 84,
        groups=tuple(range(84)), families={d: d for d in "abc"},
    )  # fmt: skip
    x = solve(sample, np.arange(84)).x
    return sample, dict(zip(slots(sample), x, strict=True))


def test_a_fit_recovers_the_constants_that_made_the_rows() -> None:
    _, x = _synthetic(0.02)
    rate = {d: np.exp(x["rate", "class", ""] + x["rate", "device", d]) for d in "abc"}
    assert rate["a"] == pytest.approx(1.0, rel=0.03)
    assert rate["b"] == pytest.approx(2.0, rel=0.03)
    assert rate["c"] == pytest.approx(1.4, rel=0.1)  # few rows: drawn to the others
    assert np.exp(x["start_s", "class", ""]) == pytest.approx(5e-6, rel=0.05)


def test_cross_validation_predicts_every_row_without_it() -> None:
    sample, _ = _synthetic(0.02)
    errors = np.abs(cross_validated_s(sample) / sample.measured_s - 1)
    assert errors.shape == (84,) and np.median(errors) < 0.03
    shifted = replace(sample, groups=("one",) * 84)
    assert np.all(cross_validated_s(shifted) == 0)  # a single group: nothing to fit on


def test_tables_are_replaced_in_place_and_nothing_else_is() -> None:
    text = '# kept\nmeasured = 1\n\n[a]\nx = 1\nsource = "old"\n\n[b.c]\ny = 2\n'
    found = replaced(text, {"a": {"x": 0.123456, "source": "new"}, "d": {"n": 3, "l": (1.0, 2e-6)}})
    assert found == (
        '# kept\nmeasured = 1\n\n[a]\nx = 0.1235\nsource = """\\\n  new"""\n\n[b.c]\ny = 2\n'
        "\n[d]\nn = 3\nl = [1, 2e-6]\n"
    )


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [("H100-SXM5-80GB", "h100"), ("A100-SXM4-80GB", "a100"), ("L40S-48GB", "l40s"),
     ("B200-SXM-180GB", "b200"), ("NVIDIA GB200", "gb200"), ("H200-SXM-141GB", "h200"),
     ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA L4", "l4"), ("h100", "h100"),
     ("A100-SXM4-40GB", "a100-40gb"), ("V100-SXM2-32GB", "v100-32gb"), ("RTX4090-24GB", "rtx-4090"),
     ("NVIDIA RTX PRO 6000 Blackwell", "rtx-pro-6000"), ("h200_sxm", "h200")],
)  # fmt: skip
def test_benchmarks_names_of_devices_are_known(text, name) -> None:
    assert device_of(text).name == name


def test_rows_that_cannot_be_costed_are_skipped_with_a_reason(tmp_path) -> None:
    path = table(
        tmp_path, gemm(1), gemm(1, device="Abacus 9"), {"op": "gemm", "M": 4}, {"op": "fft"},
        gemm(1, latency_us=0), gemm(1, latency_us="fast"), {"op": "nccl_gossip", "num_gpus": 8,
        "bytes": 8}, {"op": "nccl_all_reduce", "num_gpus": 1, "bytes": 8},
    )  # fmt: skip
    report = validate_ops(path)
    assert (report.rows, report.used) == (8, 1)
    reasons = dict(report.skipped)
    assert "Abacus 9" in reasons[3] and "no N, K" in reasons[4] and "fft" in reasons[5]
    assert len(reasons) == 7
    with pytest.raises(UsageError, match="no table of measured kernels"):
        (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
        validate_ops(tmp_path / "bad.csv")


def test_an_unknown_kernel_is_costed_as_the_nearest_and_listed(tmp_path) -> None:
    row = {"op": "attn_prefill", "batch": 1, "q_len": 4096, "heads": 32, "kv_heads": 8,
           "head_dim": 128, "dtype": "bfloat16/kv_bfloat16"}  # fmt: skip
    report = validate_ops(table(tmp_path, row | {"kernel": "mine"}, row | {"kernel": "x_fa3"}))
    assert report.nearest == (("mine", "fa3"),)
    assert report.predictions[0].predicted_s == report.predictions[1].predicted_s


def test_every_constant_of_every_class_is_shipped() -> None:
    for model, spreads in CLASSES.items():
        for device in ("h100", "mi300x"):
            assert all(constant(device, model, "none", name) > 0 for name in spreads)


# --- the data --------------------------------------------------------------------------------

needs_data = pytest.mark.skipif(
    "MESHWRIGHT_DATA" not in os.environ, reason="needs MESHWRIGHT_DATA"
)


def _data() -> Path:
    return Path(os.environ["MESHWRIGHT_DATA"]) / "measured_ops.csv"


@needs_data
@pytest.mark.parametrize("model", ["gemm.bf16", "gemm.fp8_cutlass", "prefill", "deepep"])
def test_the_files_hold_what_the_fit_gives(model) -> None:
    rows = read_table(_data()).rows
    mine, kinds = by_class(rows)[model]
    _, tables = fit_class(mine, kinds, cross=False)
    shipped = prepare(mine, kinds)(constants_of(mine, kinds))
    for name in CLASSES[model]:
        assert constant("common", model, "none", name) == pytest.approx(
            tables["common"][model][name], rel=0.01
        )
    sample = sample_of(mine, kinds)
    again = np.median(np.abs(shipped / sample.measured_s - 1))
    assert again == pytest.approx(tables["common"][model]["median_error"], abs=0.002)


@needs_data
@pytest.mark.parametrize(
    ("model", "most"), [("gemm.bf16", 0.055), ("prefill", 0.07), ("decode", 0.08)]
)
def test_rows_of_shapes_nobody_fitted_to_are_met(model, most) -> None:
    rows = read_table(_data()).rows
    mine, kinds = by_class(rows)[model]
    assert len({group_of(r, k) for r, k in zip(mine, kinds, strict=True)}) < len(mine) / 6
    sample = sample_of(mine, kinds)
    errors = np.abs(cross_validated_s(sample) / sample.measured_s - 1)
    assert np.median(errors) < most


@needs_data
def test_every_measured_row_is_predicted_as_well_as_stated() -> None:
    report = validate_ops(_data())
    assert report.used == report.rows == 4818 and not report.skipped and not report.nearest
    most = {"gemm bf16": 0.05, "gemm quantized": 0.1, "attention prefill": 0.08,
            "attention decode": 0.12, "mla prefill": 0.08, "mla decode": 0.12, "moe": 0.1,
            "collectives": 0.05}  # fmt: skip
    found = dict(report.by_class)
    assert set(found) == set(most) == {op_class(one.model) for one in report.predictions}
    for name, limit in most.items():
        assert found[name].median < limit, name
        assert abs(found[name].bias) < 0.03, name
    assert kind_of(read_table(_data()).rows[0]).known
