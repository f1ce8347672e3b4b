"""A table of measured kernels, read with a reason for every row that cannot be costed.

`op_rows` says what the columns are. A row of a user's table is costed as what it says, as something
near it, which is listed, or not at all.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cost_models.hardware import load_hardware
from cost_models.op_rows import (
    GEMM_FAMILIES,
    SIZES,
    OpRow,
    device_of,
    family_of,
    lacks,
    version_of,
)
from ir.errors import UsageError

_COLUMNS = ("device", "op", "kernel", "dtype", "latency_us")
# Dtypes that constants were fitted on, by the op; half of what others are called.
_FITTED = {
    "gemm": ("bfloat16", "fp8", "fp8_block", "int8_wo", "int4_wo", "nvfp4", "sq"),
    "moe_fused_mlp": ("bfloat16", "fp8_block", "int4_wo", "w4a16_mxfp4", "nvfp4"),
}
_MOE_ALSO = ("fp8", "w4a8_mxfp4_mxfp8")  # costed by their bytes, no kernel of theirs was fitted
_BF16, _FP16 = ("bfloat16", "bf16"), ("float16", "fp16", "half")
_BYTES = ("", *_BF16, *_FP16, "float32", "float", "fp32", "float64", "double", "fp64", "fp8",
          "int8", "uint8", "int32", "int64", "fp8->bf16")  # fmt: skip
_MOST = 1e15  # of any size: beyond it a row is a slip of the pen
_MOST_OF = {"experts": 65536.0, "topk": 65536.0, "num_gpus": 65536.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTable:
    """Rows that can be costed; (line, reason) of those that cannot; (what a row says, what it is
    costed as) where the two differ."""

    rows: tuple[OpRow, ...]
    skipped: tuple[tuple[int, str], ...]
    mapped: tuple[tuple[str, str], ...]


class _Skip(Exception):
    """A row that cannot be costed; its message is the reason."""


def read_table(path: Path) -> OpTable:
    """Read a table. Raises UsageError for a file that is none."""
    rows: list[OpRow] = []
    skipped: list[tuple[int, str]] = []
    mapped: set[tuple[str, str]] = set()
    for line, raw in _lines(path):
        try:
            row, said = _costable(_row(line, raw))
        except _Skip as reason:
            skipped.append((line, str(reason)))
            continue
        rows.append(row)
        mapped.update(said)
    if not rows and not skipped:
        raise UsageError(f"{path} has no kernels", why="expected a row for each below its header")
    return OpTable(rows=tuple(rows), skipped=tuple(skipped), mapped=tuple(sorted(mapped)))


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str | None, object]]]:
    """(line of the file, fields) of each row; comments begin with #."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            text = file.read().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {path}", why=error.strerror or str(error)) from None
    numbered = [(i, t) for i, t in enumerate(text, 1) if t.strip() and not t.startswith("#")]
    if not numbered:
        raise UsageError(f"{path} is empty", why=f"expected a header with {', '.join(_COLUMNS)}")
    header = [name.strip() for name in next(csv.reader([numbered[0][1]]))]
    lost = [key for key in _COLUMNS if key not in header]
    twice = [key for key in dict.fromkeys(header) if key and header.count(key) > 1]
    if lost or twice:
        why = f"no {', '.join(lost)}" if lost else f"{', '.join(twice)} twice"
        raise UsageError(
            f"{path} is no table of measured kernels", why=f"its header has {why}",
            hints=(f"expected {', '.join(_COLUMNS)}, and the sizes: M, N, K, batch ..",),
        )  # fmt: skip
    for line, content in numbered[1:]:
        yield line, next(csv.DictReader([content], header))


def _row(line: int, raw: Mapping[str | None, object]) -> OpRow:
    """A row as it is written. Raises _Skip where it says nothing that could be costed."""
    if None in raw or None in raw.values():
        raise _Skip("its fields are more or fewer than the header's")
    text = {str(key): str(value).strip() for key, value in raw.items()}
    device = device_of(text["device"])
    if device is None:
        raise _Skip(f"device {text['device']!r} is not in the catalogue")
    seconds = _number("latency_us", text["latency_us"]) * 1e-6
    if not seconds > 0:
        raise _Skip(f"latency_us is {text['latency_us'] or 'empty'}")
    numbers = {key: _number(key, text[key]) for key in SIZES if text.get(key)}
    for key, value in numbers.items():
        if value < 0 or value != int(value) or value > _MOST_OF.get(key, _MOST):
            raise _Skip(f"{key} is {text[key]}")
    return OpRow(
        line=line, device=device, op=text["op"], kernel=text["kernel"], dtype=text["dtype"],
        distribution=text.get("distribution", ""), numbers=numbers, seconds=seconds,
        version=version_of(text.get("source_file", "")),
    )  # fmt: skip


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _Skip(f"{key} is {text!r}, no number" if text else f"no {key}") from None
    if not math.isfinite(value):
        raise _Skip(f"{key} is {text}, no number")
    return value


Said = list[tuple[str, str]]


def _costable(row: OpRow) -> tuple[OpRow, Said]:
    """The row as it is costed, and what that differs in. Raises _Skip."""
    reason = lacks(row)
    if reason:
        raise _Skip(reason)
    for few, many in (("kv_heads", "heads"), ("topk", "experts"), ("moe_ep", "experts")):
        if many in row.numbers and row.number(few) > row.number(many):
            raise _Skip(f"{few} {row.number(few):g} is more than {many} {row.number(many):g}")
    for many, few in (("heads", "kv_heads"), ("experts", "moe_ep"), ("inter", "moe_tp")):
        if {few, many} <= set(row.numbers) and row.number(many) % row.number(few):
            raise _Skip(
                f"{many} {row.number(many):g} is no multiple of {few} {row.number(few):g}"
            )
    if "num_gpus" in row.numbers and row.op.split("_")[0] in ("nccl", "custom", "deepep"):
        _require_nodes(row)
    if row.op == "gemm":
        return _gemm(row)
    if row.op == "moe_fused_mlp":
        return _moe(row)
    if row.op.startswith(("attn", "mla")):
        return row, _attention(row) + _head_dim(row)
    if row.dtype not in _BYTES:
        raise _unknown(row)
    if row.op.startswith("deepep") and row.dtype != "fp8->bf16":
        return row, [(f"dtype {row.dtype or 'unsaid'} of {row.op}", "fp8->bf16")]
    return row, []


def _require_nodes(row: OpRow) -> None:
    try:
        load_hardware(f"{row.device.name}x{row.number('num_gpus'):.0f}")
    except UsageError as fault:
        raise _Skip(f"num_gpus: {fault.what}") from None


def _unknown(row: OpRow) -> _Skip:
    return _Skip(f"dtype {row.dtype!r} of {row.op} is not known")


def _gemm(row: OpRow) -> tuple[OpRow, Said]:
    family = family_of(GEMM_FAMILIES, row.dtype)
    if family is None and row.dtype not in (*_BF16, *_FP16):
        raise _unknown(row)
    said = [] if row.dtype in (*_FITTED["gemm"], "bf16") else [_as(row, family or "bfloat16")]
    return row, said + _unpacked(row)


def _moe(row: OpRow) -> tuple[OpRow, Said]:
    said: Said = []
    if row.dtype in (*_BF16, *_FP16):
        said += [_as(row, "bfloat16")] if row.dtype in _FP16 else []
        row = replace(row, dtype="bfloat16")
    elif row.dtype in _MOE_ALSO:
        said.append(_as(row, "its bytes; no kernel of it was fitted"))
    elif row.dtype not in _FITTED["moe_fused_mlp"]:
        raise _unknown(row)
    way = row.distribution
    if way == "uniform":
        said.append((f"distribution {way}", "balanced"))
    elif way not in ("", "balanced") and not _power_law(way):
        raise _Skip(f"distribution {way!r} is not known")
    return row, said + _unpacked(row)


def _power_law(text: str) -> bool:
    name, _, skew = text.rpartition("_")
    return text == "power_law" or (name == "power_law" and skew.replace(".", "", 1).isdigit())


def _attention(row: OpRow) -> Said:
    """Queries and cache: bfloat16/kv_fp8. Arithmetic is costed in 16 bits."""
    entry, _, cache = row.dtype.partition("/kv_")
    sixteen = (*_BF16, *_FP16)
    if entry not in (*sixteen, "fp8") or cache not in ("", *sixteen, "fp8"):
        raise _unknown(row)
    if entry in _BF16 and cache in ("", *_BF16, "fp8"):
        return []
    kept = "fp8" if cache == "fp8" else "bfloat16"
    return [_as(row, f"bfloat16/kv_{kept}")]


def _head_dim(row: OpRow) -> Said:
    """MLA's is DeepSeek-V3's; elsewhere a table has it, or the usual one is meant."""
    if row.op.startswith("mla") or "head_dim" in row.numbers:
        return []
    return [(f"head_dim unsaid of {row.op}", "128")]


def _as(row: OpRow, costed: str) -> tuple[str, str]:
    return f"dtype {row.dtype} of {row.op}", costed


def _unpacked(row: OpRow) -> Said:
    """Where the device does not multiply in the dtype."""
    words = (("w4a16", ""), ("w8a16", ""), ("_wo", ""), ("fp4", "nvfp4"), ("fp8", "fp8"),
             ("sq", "int8"), ("int8", "int8"))  # fmt: skip
    needs = family_of(words, row.dtype)
    if not needs or row.device.has(needs):
        return []
    return [(f"dtype {row.dtype} on {row.device.name}", "unpacked to a wider one that it has")]
