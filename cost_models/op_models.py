"""What a measured kernel should take: rows of one op class -> seconds, given its constants.

`prepare` turns rows into arrays once; the function it returns is evaluated by the fit with trial
constants, and by the validation with those of the files.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.attention import decode_seconds, prefill_seconds
from cost_models.collectives import collective_s
from cost_models.constants_table import load_constants
from cost_models.gemm import gemm_seconds
from cost_models.hardware import Device, describe, load_hardware
from cost_models.links import custom_all_reduce_seconds, exchange_seconds
from cost_models.moe import moe_seconds, rows_of_experts
from cost_models.op_rows import Kind, OpRow, constants_name

FloatArray: TypeAlias = NDArray[np.float64]
Facts: TypeAlias = Mapping[str, FloatArray]
Model: TypeAlias = Callable[[Facts], FloatArray]

_TUNED_FILE = Path(__file__).with_name("moe_tuned.toml")
# Bytes a weight (scales included) and an activation, and the type that the tensor cores multiply.
# Weight-only formats unpack to 16 bits; groups of 128 share a scale (int4), of 16 (nvfp4), 32 (mx).
_GEMM_TYPES = {
    "bf16": (2.0, 2.0, "bf16"), "fp8_cutlass": (1.0, 1.0, "fp8"), "fp8_block": (1.0, 1.0, "fp8"),
    "int8_smooth": (1.0, 1.0, "int8"), "int8_weight": (1.0, 2.0, "bf16"),
    "int4_weight": (0.53, 2.0, "bf16"), "fp4_flashinfer": (0.5625, 0.5625, "nvfp4"),
}  # fmt: skip
_MOE_TYPES = {
    "bfloat16": (2.0, "bf16"), "fp8_block": (1.0, "fp8"), "fp8": (1.0, "fp8"),
    "int4_wo": (0.53, "bf16"), "w4a16_mxfp4": (0.53, "bf16"), "nvfp4": (0.5625, "nvfp4"),
    "w4a8_mxfp4_mxfp8": (0.53, "fp8"),
}  # fmt: skip
_COPIES = 6.0  # operand sets that the measured tables rotate, so that small ones stay in cache
_SKEW = 1.2
_MLA_LATENT, _MLA_ROPE, _MLA_HEAD = 512.0, 64.0, 128.0  # DeepSeek V2, V3: all MLA rows there are


def peak_of(device: Device, dtype: str) -> float:
    """FLOP/s in `dtype`; where the device lacks it, in the nearest wider type it unpacks to."""
    for name in (dtype, {"nvfp4": "fp8", "int8": "fp8"}.get(dtype, dtype), "bf16", "fp16"):
        if device.has(name):
            return device.peak(name)
    return device.peak(dtype)


@functools.cache
def cache_bytes(device: Device) -> float:
    """Last-level cache of a device, from its constants."""
    return load_constants(constants_name(device)).number("cache.l2_bytes")


def _column(rows: Sequence[OpRow], name: str, default: float = 0.0) -> FloatArray:
    return np.array([row.number(name, default) for row in rows])


def _device_facts(rows: Sequence[OpRow], peaks: Sequence[str]) -> dict[str, FloatArray]:
    devices = [row.device for row in rows]
    return {
        "flop_per_s": np.array([peak_of(d, peak) for d, peak in zip(devices, peaks, strict=True)]),
        "bytes_per_s": np.array([d.memory_bandwidth_bytes_per_s for d in devices]),
        "sm": np.array([float(d.sm_count) for d in devices]),
        "l2_bytes": np.array([cache_bytes(d) for d in devices]),
    }


def _gemm(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> Model:
    types = [_GEMM_TYPES[kind.family] for kind in kinds]
    facts = _device_facts(rows, [peak for _, _, peak in types])
    facts["weight_bytes"] = np.array([weight for weight, _, _ in types])
    facts["in_bytes"] = np.array([entry for _, entry, _ in types])
    facts["out_bytes"] = np.full(len(rows), 2.0)
    m, n, k = (_column(rows, name) for name in "MNK")
    one, narrow = np.ones(len(rows)), kinds[0].family != "bf16"
    return lambda c: gemm_seconds(
        c, facts, m, n, k, one, copies=_COPIES, steady=False, narrow=narrow
    )


def _kv_facts(rows: Sequence[OpRow]) -> dict[str, FloatArray]:
    facts = _device_facts(rows, ["bf16"] * len(rows))
    facts["kv_bytes"] = np.array([1.0 if "kv_fp8" in row.dtype else 2.0 for row in rows])
    return facts


def _prefill(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> Model:
    facts = _kv_facts(rows)
    batch, queries, heads, kv_heads = (
        _column(rows, name) for name in ("batch", "q_len", "heads", "kv_heads")
    )
    dim, window = _column(rows, "head_dim", 128.0), _column(rows, "window")
    return lambda c: prefill_seconds(
        c, facts, batch, queries, heads, kv_heads, dim, dim, window, steady=False
    )


def _decode(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> Model:
    facts = _kv_facts(rows)
    batch, held, heads, kv_heads = (
        _column(rows, name) for name in ("batch", "kv_len", "heads", "kv_heads")
    )
    dim, window = _column(rows, "head_dim", 128.0), _column(rows, "window")
    none = np.zeros(len(rows))
    return lambda c: decode_seconds(
        c, facts, batch, held, heads, kv_heads, dim, dim, window, none
    )


def _mla_prefill(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> Model:
    """Absorbed kernels attend to the latent itself, one key for all heads; the others expand it."""
    facts = _kv_facts(rows)
    absorbed = np.array([kind.family == "absorbed" for kind in kinds])
    batch, queries, heads = (_column(rows, name) for name in ("batch", "q_len", "heads"))
    qk = np.where(absorbed, _MLA_LATENT, _MLA_HEAD) + _MLA_ROPE
    v = np.where(absorbed, _MLA_LATENT, _MLA_HEAD)
    kv_heads, none = np.where(absorbed, 1.0, heads), np.zeros(len(rows))
    return lambda c: prefill_seconds(
        c, facts, batch, queries, heads, kv_heads, qk, v, none, steady=False
    )


def _mla_decode(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> Model:
    facts = _kv_facts(rows)
    batch, held, heads = (_column(rows, name) for name in ("batch", "kv_len", "heads"))
    one, none = np.ones(len(rows)), np.zeros(len(rows))
    latent = one * _MLA_LATENT
    return lambda c: decode_seconds(
        c, facts, batch, held, heads, one, latent + _MLA_ROPE, latent, none, latent
    )


@functools.cache
def _tuned_shapes() -> dict[tuple[str, str], frozenset[tuple[int, int]]]:
    table = tomllib.loads(_TUNED_FILE.read_text(encoding="utf-8"))
    return {
        (device, dtype): frozenset((int(e), int(n)) for e, n in shapes)
        for device, dtypes in table.items()
        for dtype, shapes in dtypes.items()
    }


def _is_tuned(row: OpRow, kind: Kind) -> bool:
    """Whether a kernel was tuned for the row's experts; all but SGLang's Triton kernel adapt."""
    if kind.family.split("_")[0] != "triton" or "vllm" in kind.family or "oai" in kind.family:
        return True
    dtype = "fp8_block" if "fp8" in row.dtype else "bf16"
    shape = (
        int(row.number("experts")) // int(row.number("moe_ep", 1)),
        int(row.number("inter")) // int(row.number("moe_tp", 1)),
    )
    return shape in _tuned_shapes().get((row.device.name, dtype), frozenset())


def _loads(row: OpRow) -> tuple[float, ...]:
    tokens, experts, topk, ranks = (
        int(row.number(name, 1)) for name in ("tokens", "experts", "topk", "moe_ep")
    )
    skew = _SKEW if "power_law" in row.distribution else None
    if skew is not None and row.distribution.rsplit("_", 1)[-1].replace(".", "").isdigit():
        skew = float(row.distribution.rsplit("_", 1)[-1])
    return rows_of_experts(tokens, experts, topk, ranks, skew)


def _moe(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> Model:
    """The untuned kernel's tiles are SGLang's defaults: 16 x 32 where tokens are no more than the
    rank's experts, else 64 x 64; 64 x 128 with block scales. It unpacks mxfp4 to 16 bits first, and
    before 0.5.14 it and Marlin multiplied rows of other ranks' experts too."""
    types = [_MOE_TYPES.get(row.dtype, (2.0, "bf16")) for row in rows]
    upcast = [kind.family == "triton_w4a16_mxfp4" for kind in kinds]
    facts = _device_facts(rows, [peak for _, peak in types])
    facts["weight_bytes"] = np.array(
        [2.0 if up else weight for (weight, _), up in zip(types, upcast, strict=True)]
    )
    tokens, topk, hidden, inter, experts = (
        _column(rows, name) for name in ("tokens", "topk", "hidden", "inter", "experts")
    )
    ranks = _column(rows, "moe_ep", 1.0)
    loads = [_loads(row) for row in rows]
    tuned = np.array([_is_tuned(row, kind) for row, kind in zip(rows, kinds, strict=True)])
    few = tokens <= experts / ranks
    tile = np.where(few, np.array([[16], [32]]), np.array([[64], [64]]))
    block = np.array([row.dtype == "fp8_block" for row in rows])
    tile = np.where(block, np.array([[64], [128]]), tile).astype(np.int64)
    old = np.array([() < row.version < (0, 5, 14) for row in rows])
    whole = np.array([kind.family.split("_")[0] in ("triton", "marlin") for kind in kinds])
    whole &= np.array(["vllm" not in k.family and "oai" not in k.family for k in kinds])
    mixed = old & whole & (experts > ranks)  # a rank's only expert met its own rows alone
    width = inter / _column(rows, "moe_tp", 1.0)

    def model(c: Facts) -> FloatArray:
        known = {**c, "elsewhere": 1.0 * mixed, "masked": np.where(whole, 1.0, c["masked"])}
        return moe_seconds(
            known, facts, loads, tokens, topk, hidden, width, tuned, tile, steady=False
        )

    return model


def library_all_reduce_s(rows: Sequence[OpRow]) -> FloatArray:
    """Seconds of NCCL's all-reduce for the rows' sizes, on one node of each row's device."""
    return library_s(rows, ["all_reduce"] * len(rows))


def library_s(rows: Sequence[OpRow], kinds: Sequence[str]) -> FloatArray:
    """Seconds of NCCL's collectives of those kinds, for the rows' sizes and ranks."""
    found = np.zeros(len(rows))
    keys = [(row.device, kind, int(row.number("num_gpus"))) for row, kind in zip(rows, kinds)]
    size = _column(rows, "bytes")
    for key in dict.fromkeys(keys):
        device, kind, ranks = key
        at = np.array([other == key for other in keys])
        node = describe(device.name)
        cluster = node if ranks <= node.count else load_hardware(f"{device.name}x{ranks}")
        found[at] = collective_s(cluster, kind, size[at], ranks)
    return found


def _nccl(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> Model:
    seconds = library_s(rows, [kind.family for kind in kinds])
    return lambda c: seconds


def _custom_all_reduce(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> Model:
    size, ranks = _column(rows, "bytes"), _column(rows, "num_gpus")
    line = np.array([describe(row.device.name).intra.bytes_per_s for row in rows])
    library = library_all_reduce_s(rows)
    return lambda c: custom_all_reduce_seconds(c, size, ranks, line, library)


def _deepep(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> Model:
    nodes = [describe(row.device.name) for row in rows]
    width = np.array([2.0 if kind.family == "combine" else 1.0 + 4 / 128 for kind in kinds])
    tokens, topk, hidden, ranks = (
        _column(rows, name) for name in ("tokens", "topk", "hidden", "num_gpus")
    )
    domain = np.array([float(node.domain_size) for node in nodes])
    line = np.array([node.intra.bytes_per_s for node in nodes])
    port = np.array([node.inter.bytes_per_s for node in nodes])
    return lambda c: exchange_seconds(
        c, tokens, topk, hidden, width, ranks, domain, line, port
    )


_MODELS: dict[str, Callable[[Sequence[OpRow], Sequence[Kind]], Model]] = {
    "gemm": _gemm, "prefill": _prefill, "decode": _decode, "mla_prefill": _mla_prefill,
    "mla_decode": _mla_decode, "moe": _moe, "nccl": _nccl,
    "custom_all_reduce": _custom_all_reduce, "deepep": _deepep,
}  # fmt: skip


def prepare(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> Model:
    """The seconds of rows of one op class as a function of its constants, [rows] each."""
    return _MODELS[kinds[0].model.split(".")[0]](rows, kinds)


@functools.lru_cache(maxsize=4096)
def constant(constants: str, model: str, family: str, name: str) -> float:
    """One constant of an op class: the class's, times the kernel family's ratio to it, times the
    device's. `constants` names the device's table; a ratio that it lacks is 1."""
    table = load_constants(constants)
    value = table.number(f"{model}.{name}")
    alike = (family, family.removesuffix("_fp8"), f"{family}_fp8")  # of another cache's format
    kernel = next((k for k in alike if table.has(f"{model}.kernel.{k}.{name}")), family)
    for key in (f"{model}.kernel.{kernel}.{name}", f"{model}.device.{name}"):
        value *= table.number(key) if table.has(key) else 1.0
    return value


def constants_of(rows: Sequence[OpRow], kinds: Sequence[Kind]) -> dict[str, FloatArray]:
    """The constants of the files for rows of one op class, by name."""
    model = kinds[0].model
    known = load_constants("common").items
    prefix = model + "."
    meta = ("samples", "median_error", "p90_error", "held_out_median_error", "held_out_p90_error")
    names = [item.name.removeprefix(prefix) for item in known if item.name.startswith(prefix)]
    return {
        name: np.array([
            constant(constants_name(row.device), model, kind.family, name)
            for row, kind in zip(rows, kinds, strict=True)
        ])
        for name in names if "." not in name and name not in meta
    }  # fmt: skip
