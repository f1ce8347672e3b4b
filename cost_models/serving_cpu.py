"""Kernels of a CPU that stands for a device: no tiles to fill, one call after the other.

A product takes its bytes and its arithmetic at the rates that were measured for products
(`serving_host.py`), else at the roofline of training's matmuls; an op that is run eagerly is a
pass over its values.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.compute import load_kernels
from cost_models.hardware import Device
from cost_models.serving_decisions import KV_BYTES, WEIGHT_BYTES, Serving
from cost_models.serving_host import host_of
from cost_models.serving_shapes import Attend, Experts, Light

FloatArray: TypeAlias = NDArray[np.float64]

CPU = "cpu"  # the family of a machine that stands for a device (plan calibrate without a GPU)
# Calls that a grouped product of torch makes for each of its experts on a CPU, hit or not: two
# slices, a transposed view and a product, for each of two products (up and down).
_CALLS_AN_EXPERT = 8


def _wide(serving: Serving) -> str:
    """The format that values are in, and unpacked weights."""
    return "fp32" if serving.default == "fp32" else "bf16"


def _seconds(
    device: Device, serving: Serving, moved: FloatArray, flop: FloatArray, rows: FloatArray,
    columns: float = 0.0,
) -> FloatArray:  # fmt: skip
    measured = host_of(device).measured(_wide(serving))
    if measured is not None:
        return measured.seconds(moved, flop, rows, columns)
    return np.asarray(load_kernels(device).roofline(_wide(serving)).at(flop, moved))


def product_s(
    device: Device, serving: Serving, name: str, rows: FloatArray, columns: float, inner: float
) -> FloatArray:
    """(rows, inner) x (inner, columns) in a format. A row costs a row. Only int8 has a kernel;
    other packed weights are written out first."""
    wide = WEIGHT_BYTES[_wide(serving)]
    weights = columns * inner
    moved = weights * WEIGHT_BYTES[name] + rows * (columns + inner) * wide
    if WEIGHT_BYTES[name] < 2 and name != "int8":
        moved = moved + 2 * weights * wide
    return _seconds(device, serving, moved, 2 * rows * weights, rows, columns)


def experts_s(
    device: Device, serving: Serving, name: str, experts: Experts, tokens: FloatArray
) -> FloatArray:
    """A loop over the experts: those that are hit multiply, the others are calls alone."""
    missed = (1 - experts.topk / experts.experts) ** np.asarray(tokens)
    hit = np.maximum(experts.experts * (1 - missed) / serving.ep, 1.0)
    rows = np.asarray(tokens) * experts.topk / serving.ep / hit
    each = experts.elements / experts.experts / serving.expert_tp
    found = hit * product_s(device, serving, name, rows, each / experts.hidden, experts.hidden)
    if host_of(device).measured(_wide(serving)) is None:
        return found
    calls = experts.experts / serving.ep * _CALLS_AN_EXPERT
    return found + calls * load_kernels(device).gap_s


def decode_s(
    device: Device, serving: Serving, attend: Attend, sequences: FloatArray, context: FloatArray
) -> FloatArray:
    """Attention of tokens that are decoded: the cache is read once, and each head multiplies."""
    seen = np.minimum(context, attend.window) if attend.window else context
    moved = sequences * seen * attend.cached(serving.tp) * KV_BYTES[serving.kv]
    heads = max(attend.heads / serving.tp, 1.0)
    flop = 2 * sequences * heads * seen * (attend.dim_qk + attend.dim_v)
    return np.where(sequences > 0, _seconds(device, serving, moved, flop, np.ones(1)), 0.0)


def prefill_s(
    device: Device, serving: Serving, attend: Attend, prompts: FloatArray, new: FloatArray,
    past: FloatArray,
) -> FloatArray:  # fmt: skip
    """Attention of prompts' tokens, causal, with the rate of torch's attention there."""
    seen = past + (new + 1) / 2
    seen = np.minimum(seen, attend.read_window) if attend.read_window else seen
    heads = max(attend.heads / serving.tp, 1.0)
    width = attend.dim_qk + attend.dim_v
    flop = 2 * prompts * heads * new * seen * width
    moved = prompts * heads * (2 * new + past) * width * WEIGHT_BYTES[_wide(serving)]
    measured, kernels = host_of(device).measured(_wide(serving)), load_kernels(device)
    if measured is None:
        one = kernels.attention_s(_wide(serving), flop, moved, head_dim=attend.dim_qk)
    else:  # what softmax leaves of the rate of products
        share = kernels.constants.number("attention.forward_efficiency")
        one = measured.seconds(moved, flop / share)
    return np.where(prompts * new > 0, one, 0.0)


def copied_s(
    device: Device, serving: Serving, experts: Experts, size_bytes: float
) -> float:
    """What an expert's products are spared that are copied just before them, into a cache."""
    measured, kernels = host_of(device).measured(_wide(serving)), load_kernels(device)
    if measured is None or size_bytes > kernels.constants.number("cache.l2_bytes"):
        return 0.0
    each = experts.elements / experts.experts / serving.expert_tp
    return measured.saved_s(size_bytes, each / experts.hidden)


def shared_s(device: Device, streamed_bytes: FloatArray) -> FloatArray:
    """What copies beside the kernels take from them: they read and write the memory that kernels
    read, which a GPU's link is too slow to be felt in."""
    return np.asarray(2 * streamed_bytes / device.memory_bandwidth_bytes_per_s)


def light_s(device: Device, serving: Serving, light: Light, tokens: FloatArray) -> FloatArray:
    """Elementwise ops, each a pass over its values; the calls are the host's."""
    moved = tokens * light.eager_elements / serving.tp * WEIGHT_BYTES[_wide(serving)]
    return np.asarray(load_kernels(device).memory_bound_s(moved, 0))
