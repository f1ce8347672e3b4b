"""Convolution and pooling. Channels are not split on tp: the runtime does not run that."""

from __future__ import annotations

from math import prod
from typing import Any

from ir.graph import Node, Tensor
from ir.ops.base import Op, Sizes, Spec


def _spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """x: [n, c, ...], weight: [o, c/groups, ...] -> [n, o, ...]."""

    def held(t: Tensor, first: str) -> tuple[str, ...]:
        return tuple(first if i == 0 else f"!d{i}" for i in range(len(t.shape)))

    return Spec(
        inputs=(held(ins[0], "n"), *(held(t, "!d0") for t in ins[1:])),
        outputs=tuple(held(t, "n") for t in node.outputs),
    )


def _conv_flop(node: Node, ins: tuple[Sizes, ...], outs: tuple[Sizes, ...]) -> Any:
    """2 * output elements * kernel elements * input channels a group."""
    if node.attr("transposed"):
        return 2 * prod(ins[0]) * prod(ins[1][1:])
    return 2 * prod(outs[0]) * prod(ins[1][1:])


def _keep_operands(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    return node.inputs[:2] if any(needs) else ()


OPS = (
    Op(name="conv", kind="conv", spec=_spec, flop=_conv_flop, saved=_keep_operands),
    Op(
        name="max_pool", kind="memory", spec=_spec,
        saved=lambda node, needs: (node.inputs[0], f"{node.name}:1") if any(needs) else (),
    ),
    Op(
        name="avg_pool", kind="memory", spec=_spec,
        saved=lambda node, needs: node.inputs[:1] if any(needs) else (),
    ),
    Op(
        name="resize", kind="memory", spec=_spec,
    ),
)  # fmt: skip
