"""The op classes that are fitted on measured kernels: their constants, priors and groups.

A constant's start and prior are what hardware and kernels of its kind are known for; the spreads
say what may differ between devices (rates, launch) and between kernel families (how they are
written), and what is one number for all (tile shapes, waves).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from cost_models.fit.hierarchy import Spread
from cost_models.op_rows import Kind, OpRow

_GEMM = {
    "compute_efficiency": Spread(start=0.77, prior=0.15, device=0.1),
    "memory_efficiency": Spread(start=0.85, prior=0.1, device=0.1),
    "overhead_s": Spread(start=4e-6, prior=0.5, device=0.5),
    "smoothness": Spread(start=3.0, prior=0.5),
    "wave": Spread(start=0.75, prior=0.2),
    "feed": Spread(start=0.12, prior=0.5, device=0.3),
    "fill_s": Spread(start=1e-6, prior=0.7),
    "split_s": Spread(start=1.5e-6, prior=0.5),
    "sweep": Spread(start=0.5, prior=0.7),
    "streams": Spread(start=1.9, prior=0.4),
    "l2_speed": Spread(start=2.5, prior=0.4),
    "boost": Spread(start=0.12, prior=0.5, device=0.6),
    "boost_s": Spread(start=4e-4, prior=0.5, device=0.5),
}
_CAST = {"cast": Spread(start=2.0, prior=0.7, device=0.3)}
# Their smoothness is low, so that bandwidth would trade with it beyond what memory can do.
_UNPACK = {
    "decode_per_s": Spread(start=2.8e10, prior=0.5, device=0.2),
    "memory_efficiency": Spread(start=0.87, prior=0.03, device=0.05),
}
_PREFILL = {
    "compute_efficiency": Spread(start=0.65, prior=0.2, device=0.1, kernel=0.2),
    "overhead_s": Spread(start=1e-5, prior=0.5, device=0.3, kernel=0.3),
    "traffic": Spread(start=1.3, prior=0.5, device=0.2, kernel=0.5),
    "l2_speed": Spread(start=3.0, prior=0.3, device=0.2),
    "smoothness": Spread(start=3.0, prior=0.2),
    "tail": Spread(start=0.6, prior=0.3),
    "boost": Spread(start=0.12, prior=0.5, device=0.5),
    "boost_s": Spread(start=5e-4, prior=0.5),
}
_DECODE = {
    "memory_efficiency": Spread(start=0.9, prior=0.1, device=0.1, kernel=0.1),
    "compute_efficiency": Spread(start=0.6, prior=0.3, device=0.1, kernel=0.2),
    "smoothness": Spread(start=4.0, prior=0.5),
    "overhead_s": Spread(start=1e-5, prior=0.5, device=0.3, kernel=0.3),
    "stage_s": Spread(start=1e-6, prior=0.7, device=0.3, kernel=0.3),
    "fill_s": Spread(start=1e-6, prior=0.7, device=0.2),
    "l2_speed": Spread(start=2.5, prior=0.3, device=0.3, kernel=0.1),
}
_MOE = {
    "compute_efficiency": Spread(start=0.8, prior=0.3, device=0.15, kernel=0.3),
    "memory_efficiency": Spread(start=0.93, prior=0.03, device=0.03, kernel=0.03),
    "overhead_s": Spread(start=2.5e-5, prior=0.5, device=0.2, kernel=0.4),
    "smoothness": Spread(start=2.5, prior=0.4),
    "wave": Spread(start=0.85, prior=0.15),
    "feed": Spread(start=0.1, prior=0.5),
    "fill_s": Spread(start=7e-7, prior=0.7),
    "streams": Spread(start=1.9, prior=0.4),
    "boost": Spread(start=0.15, prior=0.5, device=0.4),
    "boost_s": Spread(start=5e-4, prior=0.4),
    "traffic": Spread(start=1.1, prior=0.4, device=0.1, kernel=0.3),
    "masked": Spread(start=0.3, prior=0.5, kernel=0.5),
    "untuned_compute": Spread(start=0.5, prior=0.4, device=0.2),
    "untuned_stream": Spread(start=0.8, prior=0.3, device=0.15),
}
_CUSTOM = {
    "one_shot_s": Spread(start=3e-6, prior=0.5, device=0.3, kernel=0.4),
    "two_shot_s": Spread(start=8e-6, prior=0.5, device=0.3, kernel=0.4),
    "flag": Spread(start=0.05, prior=0.7, device=0.7),
    "one_shot": Spread(start=0.6, prior=0.3, device=0.2, kernel=0.2),
    "two_shot": Spread(start=0.6, prior=0.3, device=0.2, kernel=0.2),
    "library": Spread(start=0.97, prior=0.1, device=0.1, kernel=0.1, pair=0.2),
}
_DEEPEP = {
    "overhead_s": Spread(start=1.5e-5, prior=0.4, device=0.1, kernel=0.2),
    "hop_s": Spread(start=6e-6, prior=0.5, kernel=0.3),
    "link": Spread(start=0.5, prior=0.3, device=0.1, kernel=0.2),
    "network": Spread(start=0.9, prior=0.1, kernel=0.1),
}
# Small classes whose constants start where the larger class of their kind ended.
CLASSES: dict[str, dict[str, Spread]] = {
    "gemm.bf16": _GEMM,
    "gemm.fp8_cutlass": _GEMM | _CAST,
    "gemm.fp8_block": _GEMM | _CAST,
    "gemm.fp4_flashinfer": _GEMM | _CAST,
    "gemm.int8_smooth": _GEMM,
    "gemm.int8_weight": _GEMM | _UNPACK,
    "gemm.int4_weight": _GEMM | _UNPACK,
    "prefill": _PREFILL,
    "decode": _DECODE,
    "mla_prefill": {name: replace(s, pair=0.0) for name, s in _PREFILL.items()},
    "mla_decode": _DECODE,
    "moe": _MOE,
    "custom_all_reduce": _CUSTOM,
    "deepep": _DEEPEP,
}


def group_of(row: OpRow, kind: Kind) -> Hashable:
    """Rows alike but for their size, on one device by one family of kernels."""
    columns = {
        "gemm": ("N", "K"),
        "moe": ("hidden", "inter", "topk", "experts", "moe_tp", "moe_ep"),
        "custom_all_reduce": ("num_gpus", "bytes"),
        "nccl": ("num_gpus", "bytes"),
        "deepep": ("num_gpus", "tokens"),
    }.get(kind.model.split(".")[0], ("heads", "kv_heads", "head_dim", "window"))
    shape = tuple(int(row.number(name)) for name in columns)
    return (row.device.name, kind.family, *shape)
