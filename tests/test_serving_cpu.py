"""A CPU that stands for a device: a row of a product costs a row, and launches are not hidden."""

from dataclasses import replace

import numpy as np
import pytest

from cost_models.hardware import load_hardware
from cost_models.serving_decisions import WEIGHT_BYTES, Serving
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_ops import Costs
from cost_models.serving_shapes import Matrix

FLOP_PER_S, BYTES_PER_S = 1e11, 2e10


def costs(**decisions):
    cluster = load_hardware("t4x1")
    device = replace(
        cluster.device, family="cpu", constants="cpu", sm_count=1, power_w=200,
        peak_flop_per_s=(("fp32", FLOP_PER_S), ("bf16", 4 * FLOP_PER_S)),
        memory_bandwidth_bytes_per_s=BYTES_PER_S,
    )  # fmt: skip
    return Costs(cluster=replace(cluster, device=device), engine=load_serving_engine("native"),
                 serving=Serving(**decisions))  # fmt: skip


@pytest.mark.parametrize("word", ["fp32", "bf16", "int8"])
def test_a_product_takes_its_bytes_then_its_arithmetic(word):
    wide = "fp32" if word == "fp32" else "bf16"
    found = costs(default=wide, weights=(("mlp", word),))
    one = Matrix(block="mlp", k=4096, parts=((4096, 0),), split="column")
    few, many = (float(found.matrix_s(one, np.asarray(x))) for x in (1.0, 4096.0))
    weights = 4096 * 4096
    rate = FLOP_PER_S * (1 if wide == "fp32" else 4)
    read_s = weights * WEIGHT_BYTES[word] / BYTES_PER_S
    multiply_s = 2 * 4096 * weights / rate
    assert read_s < few < 2.5 * read_s  # no tile of 64 rows to fill
    assert multiply_s < many < 2 * multiply_s


def test_weights_without_a_kernel_are_written_out():
    one = Matrix(block="mlp", k=4096, parts=((4096, 0),), split="column")
    int8, int4 = (
        float(costs(weights=(("mlp", word),)).matrix_s(one, np.asarray(1.0)))
        for word in ("int8", "int4")
    )
    assert int4 > 3 * int8
