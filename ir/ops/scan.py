"""State-space scans, gated delta rules and linear attention: linear in the sequence.

FLOPs are of the chunked algorithm that trains (chunk c): inside a chunk the square of scores,
across chunks the state. The kernels' own constants are calibrated, not these counts.
"""

from __future__ import annotations

from math import prod
from typing import Any

from ir.graph import Node, Tensor
from ir.ops.base import Op, Sizes, Spec


def _spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """Heads or channels may be split where every operand has them; the sequence must be whole.

    The letters come with the node: attr `factors` has one word an operand, "b s h d" say.
    """
    words = str(node.attr("factors") or "").split(";")
    if len(words) != len(ins) + len(node.outputs):
        return Spec(
            inputs=tuple(tuple("!x" for _ in t.shape) for t in ins),
            outputs=tuple(tuple("!x" for _ in t.shape) for t in node.outputs),
        )
    letters = tuple(tuple(word.split()) for word in words)
    return Spec(inputs=letters[: len(ins)], outputs=letters[len(ins) :])


def _scan_flop(node: Node, ins: tuple[Sizes, ...], outs: tuple[Sizes, ...]) -> Any:
    """Per token and head: chunk c of scores with keys d_k and values d_v, and the d_k*d_v state.

    2*T*heads*(c*(d_k + d_v)/2 + 2*d_k*d_v); attrs state (d_k) and chunk; the result has the rest.
    """
    state, chunk = node.number("state", 1), node.number("chunk", 1)
    values = prod(outs[0])  # tokens * heads * d_v
    head = node.number("head_dim", 1)
    tokens_heads = values // head
    return 2 * tokens_heads * (chunk * (state + head) // 2 + 2 * state * head)


def _saved(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    return node.inputs if any(needs) else ()


OPS = (
    Op(name="scan", kind="scan", spec=_spec, flop=_scan_flop, saved=_saved),
    Op(name="delta_rule", kind="scan", spec=_spec, flop=_scan_flop, saved=_saved),
    Op(name="linear_attention", kind="scan", spec=_spec, flop=_scan_flop, saved=_saved),
    Op(name="causal_conv1d", kind="scan", spec=_spec, saved=_saved,
       flop=lambda node, ins, outs: 2 * prod(outs[0]) * node.number("width", 4)),
)  # fmt: skip
