"""Matrix products: dense, batched, grouped over experts."""

from __future__ import annotations

from math import prod
from typing import Any

from ir.graph import Node, Tensor
from ir.ops.base import Op, Sizes, Spec


def _keep_operands(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """d(xw) = dx w + x dw: each operand is kept for the other's gradient."""
    x, w = node.inputs[:2]
    return ((w,) if needs[0] else ()) + ((x,) if needs[1] else ())


def _linear_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """x: [..., k], weight: [n, k], bias: [n] -> [..., n]."""
    rows = tuple(f"t{i}" for i in range(len(ins[0].shape) - 1))
    return Spec(inputs=((*rows, "k"), ("n", "k"), ("n",))[: len(ins)], outputs=((*rows, "n"),))


def _linear_flop(node: Node, ins: tuple[Sizes, ...], outs: tuple[Sizes, ...]) -> Any:
    """2*m*n*k."""
    return 2 * prod(outs[0]) * ins[0][-1]


def _matmul_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """a: [..., m, k], b: [..., k, n] -> [..., m, n]; leading dimensions broadcast."""
    a, b = ins[0], ins[1]
    tail_a = ("k",) if len(a.shape) == 1 else ("m", "k")
    tail_b = ("k",) if len(b.shape) == 1 else ("k", "n")
    tail = (*tail_a[:-1], *tail_b[1:])
    lead = tuple(f"b{i}" for i in range(len(node.outputs[0].shape) - len(tail)))

    def letters(tensor: Tensor, own: tuple[str, ...]) -> tuple[str, ...]:
        count = len(tensor.shape) - len(own)
        head = zip(lead[len(lead) - count :], tensor.shape)
        return (*("!1" if str(size) == "1" else name for name, size in head), *own)

    return Spec(inputs=(letters(a, tail_a), letters(b, tail_b)), outputs=((*lead, *tail),))


def _grouped_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """rows: [r, k] sorted by expert, weight: [e, k, n], offsets: [e] -> [r, n].

    Rows of a shard hold their own share of every expert, so splitting them is data parallelism;
    splitting experts or n, k over the expert axes is the moe recipe's.
    """
    return Spec(inputs=(("r", "k"), ("!e", "k", "n"), ("!e",))[: len(ins)], outputs=(("r", "n"),))


def _einsum_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """The equation is the spec: "bhqk,bkhd->bqhd"."""
    left, _, right = str(node.attr("equation")).partition("->")
    return Spec(inputs=tuple(tuple(word) for word in left.split(",")), outputs=(tuple(right),))


def _einsum_flop(node: Node, ins: tuple[Sizes, ...], outs: tuple[Sizes, ...]) -> Any:
    """2 * the product of all factors; an equation that contracts nothing is a product."""
    words = str(node.attr("equation")).partition("->")[0].split(",")
    sizes = {letter: size for word, shape in zip(words, ins) for letter, size in zip(word, shape)}
    return 2 * prod(sizes.values())


OPS = (
    Op(name="einsum", kind="gemm", spec=_einsum_spec, flop=_einsum_flop, saved=_keep_operands),
    Op(name="linear", kind="gemm", spec=_linear_spec, flop=_linear_flop, saved=_keep_operands),
    Op(name="matmul", kind="gemm", spec=_matmul_spec, flop=_linear_flop, saved=_keep_operands),
    Op(
        name="grouped_matmul", kind="grouped_gemm", spec=_grouped_spec, flop=_linear_flop,
        saved=lambda node, needs: (*_keep_operands(node, needs), *node.inputs[2:3]),
    ),
)  # fmt: skip
