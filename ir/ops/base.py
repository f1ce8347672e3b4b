"""What an op is: one row of pure functions of shapes.

A `Spec` names the factors of every operand's dimensions: equal letters are the same factor, and
a mesh axis may split any factor that is not blocked. Splitting a factor that an input has and no
output has leaves a partial sum; an input that lacks a split factor is whole, and its gradient is
a partial sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ir.graph import Node, Tensor

Sizes = tuple[Any, ...]  # one operand's sizes: ints, or numpy arrays over work points
Letters = tuple[str, ...]

REDUCED = "!"  # a letter that starts so is blocked: the op must see the whole dimension


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Letters of each input's and output's dimensions; letters that start with "!" are blocked."""

    inputs: tuple[Letters, ...]
    outputs: tuple[Letters, ...]


def no_flop(node: Node, ins: tuple[Sizes, ...], outs: tuple[Sizes, ...]) -> Any:
    """Ops that torch's counter leaves out: their cost is bytes."""
    return 0


def saves_nothing(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """Ops whose backward needs no tensor."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation's rules.

    kind: the cost class, one of KINDS. spec: factors. flop: forward FLOPs of model math, from
    sizes. executed: what a kernel really runs, forward and backward, as multiples of `flop`
    (None: the op has its own function `executed_flop`). saved: values that backward reads, given
    which inputs need a gradient. fusible: a compiler merges it into neighbours and may recompute
    it. view: the output shares its input's storage. linear: sums may pass it (P in, P out).
    """

    name: str
    kind: str
    spec: Callable[[Node, tuple[Tensor, ...]], Spec]
    flop: Callable[[Node, tuple[Sizes, ...], tuple[Sizes, ...]], Any] = no_flop
    executed: Callable[[Node, tuple[Sizes, ...], tuple[Sizes, ...]], tuple[Any, Any]] | None = None
    saved: Callable[[Node, tuple[bool, ...]], tuple[str, ...]] = saves_nothing
    fusible: bool = False
    view: bool = False


KINDS = (
    "gemm", "grouped_gemm", "attention", "conv", "scan", "leaf", "memory", "free", "dispatch",
    "combine",
)  # fmt: skip


def aligned(shape_a: int, shape_b: int) -> tuple[str, ...]:
    """Letters of a trailing-aligned operand of rank `shape_a` in a result of rank `shape_b`."""
    return tuple(f"d{i}" for i in range(shape_b - shape_a, shape_b))


def pointwise_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """Broadcasting: dimensions align from the right; a size of one is no factor."""
    rank = len(node.outputs[0].shape)
    out = node.outputs[0].shape

    def letters(tensor: Tensor) -> Letters:
        names = aligned(len(tensor.shape), rank)
        offset = rank - len(tensor.shape)
        return tuple(
            name if str(size) == str(out[offset + i]) and str(size) != "1" else "!1"
            for i, (name, size) in enumerate(zip(names, tensor.shape))
        )

    return Spec(
        inputs=tuple(letters(t) for t in ins), outputs=tuple(letters(t) for t in node.outputs)
    )


def blocked_dims_spec(node: Node, ins: tuple[Tensor, ...], dims: tuple[int, ...]) -> Spec:
    """Like pointwise, but the first input's `dims` must be whole (softmax, sort, cumsum)."""
    spec = pointwise_spec(node, ins)
    rank = len(node.outputs[0].shape)
    held = {f"d{d % rank}" for d in dims} if rank else set()

    def hold(letters: Letters) -> Letters:
        return tuple("!" + x if x in held else x for x in letters)

    return Spec(inputs=tuple(map(hold, spec.inputs)), outputs=tuple(map(hold, spec.outputs)))
