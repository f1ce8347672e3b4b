"""Scaled dot-product attention as one op: grouping, window, softcap, sinks, unequal head sizes."""

from __future__ import annotations

from typing import Any

from ir.graph import Node, Tensor
from ir.ops.base import Op, Sizes, Spec

FLASH_BACKWARD = 2.5  # recomputed scores: five products against two (FlashAttention-2, section 3)


def _spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """q: [b, n_q, s, d], k: [b, n_kv, t, d], v: [b, n_kv, t, dv], mask, sinks: [n_q].

    -> out [b, n_q, s, dv] (or [b, s, n_q, dv], attr layout "bshd"), log-sum-exp [b, n_q, s].
    Grouped heads are one factor: a shard of query heads sees its own key heads.
    """
    letters: list[tuple[str, ...]] = [("b", "h", "!s", "!d")]
    letters += [("b", "h", "!t", "!d"), ("b", "h", "!t", "!v")]
    if node.attr("mask"):
        mask = ins[3].shape
        names = ("b", "h", "!s", "!t")[4 - len(mask) :]
        letters.append(tuple("!1" if str(d) == "1" else x for x, d in zip(names, mask)))
    if node.attr("sinks"):
        letters.append(("h",))
    out = ("b", "!s", "h", "!v") if node.attr("layout") == "bshd" else ("b", "h", "!s", "!v")
    return Spec(inputs=tuple(letters), outputs=(out, ("b", "h", "!s"))[: len(node.outputs)])


def pairs(node: Node, queries: Any, keys: Any) -> Any:
    """Query-key pairs a kernel visits, the last query aligned with the last key.

    Causal: half of the square; with a window w a band of w keys; with a chunk c, half of a square
    of c for each chunk. Not causal, a window is a band of w keys on either side.
    """
    window, chunk = node.number("window"), node.number("chunk")
    if chunk and node.attr("causal"):
        full, rest = keys // chunk, keys % chunk
        return full * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2
    if not node.attr("causal"):
        return 2 * _band(queries, window + 1) - queries if window else queries * keys
    if window:
        return _band(queries, window)
    return queries * (queries + 1) // 2 + queries * (keys - queries)


def _band(queries: Any, window: int) -> Any:
    """Pairs with 0 <= query - key < window: ints, or arrays."""
    width = (queries + window - abs(queries - window)) // 2  # min(queries, window)
    return queries * width - width * (width - 1) // 2


def _flop(node: Node, ins: tuple[Sizes, ...], outs: tuple[Sizes, ...]) -> Any:
    """2*b*n_q*s*t*(d + dv): model math, not halved for causality."""
    b, heads, s, d = ins[0]
    return 2 * b * heads * s * ins[1][2] * (d + ins[2][3])


def _executed(node: Node, ins: tuple[Sizes, ...], outs: tuple[Sizes, ...]) -> tuple[Any, Any]:
    b, heads, s, d = ins[0]
    forward = 2 * b * heads * pairs(node, s, ins[1][2]) * (d + ins[2][3])
    return forward, forward * 5 // 2


def _saved(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """q, k, v, output and log-sum-exp; the mask and sinks where there are any."""
    return (*node.inputs, *node.refs()) if any(needs) else ()


OPS = (
    Op(
        name="attention", kind="attention", spec=_spec, flop=_flop, executed=_executed,
        saved=_saved,
    ),
)  # fmt: skip
