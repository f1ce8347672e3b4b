"""Measured kernels, one a row, and what kind of kernel each is. `validation.op_table` reads them.

The form is that of `measured_ops.csv` of the data directory: one row a kernel and shape, sizes in
columns that do not apply left empty, latency_us measured.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cost_models.hardware import Device, aliases, catalogue, describe

SIZES = (
    "M", "N", "K", "batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim", "window",
    "num_gpus", "bytes", "tokens", "hidden", "inter", "topk", "experts", "moe_tp", "moe_ep",
)  # fmt: skip
_NEEDED = {
    "gemm": ("M", "N", "K"),
    "attn_prefill": ("batch", "q_len", "heads", "kv_heads"),
    "attn_decode": ("batch", "kv_len", "heads", "kv_heads"),
    "mla_prefill": ("batch", "q_len", "heads"),
    "mla_decode": ("batch", "kv_len", "heads"),
    "moe_fused_mlp": ("tokens", "hidden", "inter", "topk", "experts"),
    "nccl": ("num_gpus", "bytes"),
    "custom_all_reduce": ("num_gpus", "bytes"),
    "deepep": ("num_gpus", "tokens", "hidden", "topk"),
}
_ABOVE = ("head_dim", "moe_tp", "moe_ep")  # where a row has them: no kernel has none
# Kernel families, by what a kernel's name and dtype contain; the first that fits is taken.
GEMM_FAMILIES = (
    ("int4", "int4_weight"), ("w4a16", "int4_weight"), ("int8_wo", "int8_weight"),
    ("w8a16", "int8_weight"), ("fp8_block", "fp8_block"), ("fp8", "fp8_cutlass"),
    ("fp4", "fp4_flashinfer"), ("sq", "int8_smooth"), ("int8", "int8_smooth"),
)  # fmt: skip
_ATTENTION = (
    ("fa3", "fa3"), ("fa2", "fa2"), ("trtllm", "trtllm"), ("fiprefill", "flashinfer"),
    ("fidecode", "flashinfer"), ("vllm_flash_attn", "flash_attn"),
)  # fmt: skip
_BEST_ATTENTION = {"hopper": "fa3", "blackwell": "trtllm"}  # elsewhere FlashAttention-2
_MLA = (("flash_attention", "absorbed"), ("default", "separate"))
_MOE = (
    ("marlin", "marlin"), ("gptossmxfp4moe", "triton_oai"), ("min_latency", "min_latency"),
    ("deepgemm", "deepgemm"), ("cutlass", "cutlass"), ("sglang_fused_moe_triton", "triton"),
    ("vllm_unquantizedfusedmoe", "triton_vllm"),
)  # fmt: skip
_CUSTOM = (("TRTLLM", "trtllm"), ("vLLM", "vllm"), ("SGLang", "sglang"))
_KNOWN_GEMM = ("linear", "sglang", "Cutlass", "CuteDsl", "deepgemm", "SmoothQuant", "WeightOnly")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRow:
    """One measured kernel. numbers: the sizes that its columns give; absent where empty.

    version: of the engine that ran it, () where the source names none. seconds: measured.
    """

    line: int
    device: Device
    op: str
    kernel: str
    dtype: str
    distribution: str
    version: tuple[int, ...]
    numbers: Mapping[str, float]
    seconds: float

    def number(self, name: str, default: float = 0.0) -> float:
        return self.numbers.get(name, default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a row is costed as. model: the op class; family: of kernels. known: fitted as such."""

    model: str
    family: str
    known: bool


def constants_name(device: Device) -> str:
    """The shipped table of constants that a device's kernels are costed with."""
    return device.constants if isinstance(device.constants, str) else device.constants.base


@functools.lru_cache(maxsize=1024)
def device_of(text: str) -> Device | None:
    """The catalogue's device that a benchmark calls `text` (H100-SXM5-80GB), if there is one.

    The name whose words are all there, the longest where there are several.
    """
    words = re.findall("[a-z0-9]+", text.lower().replace("nvidia", "").replace("geforce", ""))
    runs = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    names = [(name, name) for name in catalogue()] + list(aliases())
    found = [
        (len(name), device)
        for name, device in names
        if name.replace("-", "") in runs or set(name.split("-")) <= runs
    ]
    return describe(max(found)[1]).device if found else None


def version_of(source: str) -> tuple[int, ...]:
    """(0, 5, 14) of "h100_sxm/moe/sglang/0.5.14/moe_perf.parquet"."""
    match = re.search(r"/(\d+(?:\.\d+)+)", source)
    return tuple(int(x) for x in match[1].split(".")) if match else ()


def family_of(table: Iterable[tuple[str, str]], text: str) -> str | None:
    return next((family for part, family in table if part in text), None)


def kind_of(row: OpRow) -> Kind:
    """The op class and kernel family of a row; the nearest family where the kernel is unknown."""
    found: str | None
    if row.op == "gemm":
        known = any(part in row.kernel for part in _KNOWN_GEMM)
        family = family_of(GEMM_FAMILIES, row.dtype) or "bf16"
        return Kind(model=f"gemm.{family}", family=family, known=known)
    if row.op in ("attn_prefill", "attn_decode"):
        found = family_of(_ATTENTION, row.kernel)
        family = found or _BEST_ATTENTION.get(row.device.family, "fa2")
        family += "_fp8" if "kv_fp8" in row.dtype else ""
        model = row.op.removeprefix("attn_")
        return Kind(model=model, family=family, known=found is not None)
    if row.op in ("mla_prefill", "mla_decode"):
        found = family_of(_MLA, row.kernel)
        return Kind(model=row.op, family=found or "separate", known=found is not None)
    if row.op == "moe_fused_mlp":
        found = family_of(_MOE, row.kernel)
        family = found or ("triton_vllm" if row.dtype == "bfloat16" else "cutlass")
        if family == "triton" and row.version and row.version < (0, 5, 14):
            family = "triton_old"
        return Kind(model="moe", family=f"{family}_{row.dtype}", known=found is not None)
    if row.op == "custom_all_reduce":
        found = family_of(_CUSTOM, row.kernel)
        return Kind(model=row.op, family=found or "trtllm", known=found is not None)
    if row.op.startswith("deepep"):
        way = "combine" if "combine" in row.op else "dispatch"
        return Kind(model="deepep", family=way, known="_ll_" in row.op)
    return Kind(model="nccl", family=row.op.removeprefix("nccl_"), known="NCCL" in row.kernel)


def lacks(row: OpRow) -> str:
    """Why a row cannot be costed; "" where it can."""
    name = row.op if row.op in _NEEDED else row.op.split("_")[0]
    if name not in _NEEDED:
        return f"unknown op {row.op!r}"
    missing = [key for key in _NEEDED[name] if key not in row.numbers]
    if missing:
        return f"no {', '.join(missing)}"
    above = (*_NEEDED[name], *(key for key in _ABOVE if key in row.numbers))
    none = [key for key in above if row.number(key) <= 0]
    if none:
        return f"{none[0]} is {row.number(none[0]):g}"
    if "num_gpus" in _NEEDED[name] and row.number("num_gpus") < 2:
        return "one GPU exchanges nothing"
    if name == "nccl" and row.op.removeprefix("nccl_") not in (
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all",
    ):  # fmt: skip
        return f"unknown collective {row.op!r}"
    return ""
