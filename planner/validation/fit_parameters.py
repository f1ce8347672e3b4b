"""The constants that published runs are fitted to: one row each, with its prior."""

from __future__ import annotations

import math
from dataclasses import dataclass

NVIDIA = "engine:megatron+automodel"
TORCH = "engine:torchtitan+torchtitan-eager+fsdp-compiled+native+native-compiled"
COMPILED = "engine:torchtitan+fsdp-compiled+native-compiled"
OLD = "engine:megatron-2022+megatron-deepspeed"
ALL = "engine:megatron+torchtitan+torchtitan-eager+fsdp-eager+fsdp-compiled+megatron-deepspeed" \
      "+megatron-2022+automodel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One constant: where it lives, its prior, and how far it may be from it (of the logarithm).

    place: "hopper/clock.derate" is a constant of a family of devices, or of a file of constants;
    "*/..." of all; "engine:a+b/tp_exposed" a field of those engines; "switch:graphs/..." a factor
    of an engine's option; "link/efficiency" the networks' between nodes. most: its largest value.
    what: what it physically is.
    """

    place: str
    prior: float
    sd: float
    what: str
    most: float = math.inf


def _row(place: str, prior: float, sd: float, what: str, most: float = math.inf) -> Parameter:
    return Parameter(place=place, prior=prior, sd=sd, what=what, most=most)


_CLOCK = "clock of a steady training load over that of locked-clock kernel tables (power)"
PARAMETERS = (
    _row("ampere/clock.derate", 0.95, 0.1, _CLOCK, 1.0),
    _row("hopper/clock.derate", 0.88, 0.1, _CLOCK, 1.0),
    _row("blackwell/clock.derate", 0.85, 0.1, _CLOCK, 1.0),
    _row("*/clock.power_exponent", 0.6, 0.3, "how the clock grows with the board's power", 1.0),
    _row("hopper/gemm.fp8.compute_efficiency", 0.72, 0.15, "fp8 training GEMMs, of peak", 1.0),
    _row("blackwell/gemm.fp8.compute_efficiency", 0.72, 0.15, "fp8 training GEMMs, of peak", 1.0),
    _row("b200/gemm.nvfp4.compute_efficiency", 0.60, 0.2, "nvfp4 training GEMMs, of peak", 1.0),
    _row("gb300/gemm.nvfp4.compute_efficiency", 0.52, 0.2, "nvfp4 GEMMs, of its higher peak", 1.0),
    _row("ampere/attention.backward_ratio", 0.657, 0.1, "flash backward over forward", 1.0),
    _row("hopper/attention.backward_ratio", 0.657, 0.1, "flash backward over forward", 1.0),
    _row("blackwell/attention.backward_ratio", 0.68, 0.2, "flash backward over forward", 1.0),
    _row("blackwell/attention.forward_efficiency", 0.58, 0.15, "cuDNN attention of TE, of peak", 1),
    _row("hopper/attention.flash2_ratio", 0.57, 0.1, "FlashAttention-2 over cuDNN on Hopper", 1),
    _row("*/attention.triton_ratio", 0.85, 0.15, "Triton attention over FlashAttention-2", 1),
    _row("*/attention.small_head_ratio", 0.8, 0.15, "heads below 128 elements", 1.2),
    _row("*/memory_bound.traffic", 1.0, 0.15, "bytes that chains really move over the least"),
    _row("*/scan.traffic", 10.0, 0.4, "bytes that Triton scans move over their operands"),
    _row("*/grouped_gemm.efficiency", 0.85, 0.15, "grouped over dense GEMM", 1.0),
    _row("*/gemm.batched_ratio", 0.6, 0.2, "products of heads over plain GEMMs, no flash", 1.0),
    _row("ampere/gemm.misaligned_ratio", 0.8, 0.15, "sizes that are no multiple of 64", 1.0),
    _row("switch:block_scaled/cast_traffic", 1.4, 0.3, "casts of block-scaled fp8, over one scale"),
    _row("link/efficiency", 0.87, 0.15, "networks between nodes, of line rate", 0.95),
    _row(f"{NVIDIA}/tp_exposed", 0.34, 0.4, "share of tensor-parallel traffic not hidden", 1.0),
    _row(f"{TORCH}/tp_exposed", 0.59, 0.4, "share of tensor-parallel traffic not hidden", 1.0),
    _row(f"{OLD}/tp_exposed", 0.86, 0.2, "share of tensor-parallel traffic not hidden", 1.0),
    _row("switch:async_tp/tp_exposed", 0.5, 0.3, "asynchronous tensor parallelism", 1.0),
    _row(f"{NVIDIA}/ep_exposed", 0.39, 0.4, "share of expert traffic not hidden", 1.0),
    _row("switch:ep_overlap/ep_exposed", 0.4, 0.4, "1F1B overlap of expert traffic", 1.0),
    _row("switch:graphs/ep_exposed", 0.8, 0.4, "recipes of 2026 hide more of it", 1.5),
    _row(f"{NVIDIA}/moe_layer_host_s", 7e-3, 0.4, "host time of a routed layer, both ways"),
    _row(f"{NVIDIA}/expert_host_s", 1e-4, 0.6, "launches of one local expert, both ways"),
    _row(f"{NVIDIA}/narrow_host_ratio", 1.4, 0.3, "more kernels in formats of 8 bits and less"),
    _row("switch:graphs/moe_layer_host_s", 0.2, 0.8, "what CUDA graphs leave of it", 1.0),
    _row("switch:scoped_graphs/moe_layer_host_s", 0.6, 0.4, "graphs of part of a layer", 1.0),
    _row("switch:padded/moe_layer_host_s", 0.6, 0.3, "no wait for the count of rows", 1.0),
    _row(f"{NVIDIA}/loss_traffic", 8.0, 0.4, "bytes a logit of fused cross-entropy"),
    _row(f"{NVIDIA}/dp_reduce_hidden", 0.6, 0.3, "stage time behind which gradients reduce", 1.0),
    _row(f"{NVIDIA}/dp_exposed_least", 0.1, 0.4, "of sharded optimizer traffic, in any case", 1.0),
    _row(f"{ALL}/jitter_per_doubling", 0.006, 0.4, "waiting for the slowest, a doubling of GPUs"),
    _row("engine:megatron-deepspeed/layer_host_s", 5e-3, 0.5, "launches that block, a layer"),
    _row("engine:fsdp-eager+native/unfused_factor", 1.83, 0.2, "bytes over fused chains"),
    _row("engine:megatron-deepspeed/unfused_factor", 1.36, 0.15, "bytes over fused chains"),
    _row("engine:megatron-2022/unfused_factor", 1.26, 0.15, "bytes over fused chains"),
    _row(f"{COMPILED}/unfused_factor", 0.97, 0.15, "bytes over fused chains"),
    _row("engine:torchtitan-eager/unfused_factor", 1.6, 0.15, "bytes over fused chains"),
)  # fmt: skip
