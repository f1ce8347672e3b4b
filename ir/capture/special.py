"""Rows of the lowering that need operands' sizes: attributes and outputs a table cannot give.

A function takes (lowering, torch node, input names, attributes, outputs) and returns the op, its
inputs, its attributes, and outputs that torch keeps to itself: what backward reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from ir.capture.arguments import arguments, first_tensor
from ir.graph import Attr, Tensor, dim

Made = tuple[str, tuple[str, ...], dict[str, Attr], tuple[Tensor, ...]]
Special = Callable[[Any, Any, tuple[str, ...], dict[str, Attr], list[Tensor]], Made]


def _view(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """A reshape that strides forbid is a copy. Flash kernels write heads beside each other, so
    attention's result, heads moved back, is contiguous."""
    x, y = first_tensor(a).meta["val"], a.meta["val"]
    moved = low.body.made.get(refs[0])
    source = low.body.made.get(moved.inputs[0]) if moved and moved.op == "permute" else None
    flash = source is not None and source.op == "attention"
    if "view" not in str(a.target) and "unsqueeze" not in str(a.target) and not flash:
        try:
            torch.empty_strided(x.shape, x.stride(), device="meta").view(y.shape)
        except RuntimeError:
            return "reshape_copy", refs[:1], attrs, ()
    return "view", refs[:1], attrs, ()


def _permute(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """transpose, t, movedim: the same op with every dimension written out."""
    if "dims" not in attrs:
        rank = len(outs[0].shape)
        order = torch.empty(tuple(range(2, 2 + rank)), device="meta")
        moved = a.target(order, *a.args[1:], **a.kwargs)
        attrs = {"dims": tuple(int(d) - 2 for d in moved.shape)}
    rank = len(outs[0].shape)
    attrs = {"dims": tuple(int(d) % rank for d in attrs["dims"])}
    return "permute", refs, attrs, ()


def _attention(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """The log-sum-exp of each query is an output too: backward reads it."""
    q = low.body.values[refs[0]]
    lse = Tensor(shape=q.shape[:3], dtype="f32")
    return "attention", refs, {k: v for k, v in attrs.items() if v}, (lse,)


def _statistics(count: int) -> Special:
    def make(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
        x = low.body.values[refs[0]]
        op = "layer_norm" if count == 2 else "rms_norm"
        held = int(attrs["dims"])
        lead = x.shape[: len(x.shape) - held]
        stats = Tensor(shape=(*lead, *(dim(1),) * held), dtype="f32")
        return op, refs, attrs, (stats,) * (count if len(outs) == 1 else 0)

    return make


def _channel_statistics(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    x = low.body.values[refs[0]]
    if "batch_norm" in str(a.target):
        op, stats = "batch_norm", Tensor(shape=(x.shape[1],), dtype="f32")
    else:
        groups = int(arguments(a).get("num_groups", arguments(a).get("group", 1)))
        op, stats = "group_norm", Tensor(shape=(x.shape[0], dim(groups)), dtype="f32")
    return op, refs, attrs, (stats, stats) if len(outs) == 1 else ()


def _dropout(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    mask = Tensor(shape=outs[0].shape, dtype="bool")
    return "dropout", refs, attrs, (mask,) if len(outs) == 1 else ()


def _max_pool(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    indices = Tensor(shape=outs[0].shape, dtype="i64")
    return "max_pool", refs, attrs, (indices,) if len(outs) == 1 else ()


def _cross_entropy(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """Log-probabilities are kept, and the number (or weight) of the rows that count."""
    return "cross_entropy", refs, attrs, (low.body.values[refs[0]], Tensor(shape=(), dtype="f32"))


def _addmm(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """bias + x w: the product is a node of its own."""
    return "add", (low.put(a, "matmul", refs[1:3], (outs[0],), {}), refs[0]), {}, ()


def _alone(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """expand_as, type_as: the other tensor lends its shape or type, it is not read."""
    return "expand" if "expand" in str(a.target) else "cast", refs[:1], attrs, ()


def _cumulative(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """max and min of two tensors are elementwise; of one, reductions."""
    if len(refs) == 2:
        return "maximum", refs, {}, ()
    return "amax", refs, attrs, ()


def _sort(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    return "sort", refs, {"dim": attrs.get("dim") if attrs.get("dim") is not None else -1}, ()


def _heads(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """Scans: state and head sizes from the operands; which dimension are the heads."""
    kind = a.target._schema.name.partition("::")[2]
    tensors = [low.body.values[r] for r in refs]
    op = {"delta_rule": "delta_rule", "linear_attention": "linear_attention"}.get(kind, "scan")
    head = {"selective_scan": 1, "wkv": 1, "linear_scan": 1}.get(kind)
    state = 1
    if kind == "selective_scan":
        state = int(str(tensors[2].shape[1]))
    elif kind == "ssd_scan":
        state, head = int(str(tensors[3].shape[3])), int(str(outs[0].shape[3]))
    elif head is None:
        state, head = int(str(tensors[1].shape[3])), int(str(outs[0].shape[3]))
    factors = [*map(_scan_letters(kind), tensors), *map(_scan_letters(kind), outs)]
    chunk = attrs.get("chunk", 64) if head != 1 else 1
    found = {"chunk": chunk, "state": state, "head_dim": head, "factors": ";".join(factors)}
    return op, refs, found, ()


def _scan_letters(kind: str) -> Callable[[Tensor], str]:
    """Heads (or channels) are the one factor a scan can be split on."""
    head_at = {"selective_scan": 1, "ssd_scan": 2, "delta_rule": 2, "linear_attention": 1,
               "wkv": 2, "linear_scan": 2}[kind]  # fmt: skip

    def letters(t: Tensor) -> str:
        rank = len(t.shape)
        if rank == 1:
            return "h"
        if not any(d.batch or d.seq for d in t.shape):  # A: [d, n]
            return " ".join(["h", *("!x",) * (rank - 1)])
        return " ".join("h" if i == head_at else f"!x{i}" for i in range(rank))

    return letters


SPECIAL: Mapping[str, Special] = MappingProxyType({
    "expand": _alone, "cast": _alone, "view": _view, "permute": _permute, "attention": _attention,
    "meshwright.attention": _attention, "layer_norm": _statistics(2), "rms_norm": _statistics(1),
    "batch_norm": _channel_statistics, "group_norm": _channel_statistics, "dropout": _dropout,
    "max_pool": _max_pool, "cross_entropy": _cross_entropy, "addmm": _addmm, "amax": _cumulative,
    "sort": _sort, "scan": _heads, "delta_rule": _heads, "linear_attention": _heads,
})  # fmt: skip
