"""An operation that the user declares: its costs are given, as monomials in batch and sequence."""

from __future__ import annotations

from typing import Any

from ir.graph import Node, Tensor
from ir.ops.base import Op, Sizes, Spec


def _spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """Letters as declared, one word an input and result; parameters and the rest are whole."""
    words = [tuple(w.split()) for w in str(node.attr("factors") or "").split(";") if w.strip()]
    count, results = node.number("inputs"), len(node.outputs) - bool(node.attr("kept"))

    def whole(tensors: tuple[Tensor, ...]) -> tuple[tuple[str, ...], ...]:
        return tuple(("!x",) * len(t.shape) for t in tensors)

    if len(words) != count + results:
        return Spec(inputs=whole(ins), outputs=whole(node.outputs))
    return Spec(
        inputs=(*words[:count], *whole(ins[count:])),
        outputs=(*words[count:], *whole(node.outputs[results:])),
    )


def work_point(tensors: tuple[Tensor, ...], sizes: tuple[Sizes, ...]) -> tuple[Any, Any]:
    """(batch, sequence) at which the tensors have these sizes; where only their product shows,
    (1, product)."""
    found: dict[tuple[int, int], Any] = {}
    for tensor, shape in zip(tensors, sizes):
        for dim, size in zip(tensor.shape, shape):
            value = (size - dim.offset) * dim.denominator // max(dim.numerator, 1)
            found.setdefault((dim.batch, dim.seq), value)
    batch, seq, both = (found.get(key) for key in ((1, 0), (0, 1), (1, 1)))
    if both is not None and batch is None:
        batch = both // seq if seq is not None else 1
    if both is not None and seq is None:
        seq = both // batch
    return (1 if batch is None else batch), (1 if seq is None else seq)


def _flop(node: Node, ins: tuple[Sizes, ...], outs: tuple[Sizes, ...]) -> Any:
    """As declared."""
    from ir.text import parse_dim

    return parse_dim(str(node.attr("flop") or 0)).at(*work_point(node.outputs, outs))


def declared_bytes(node: Node, outs: tuple[Sizes, ...]) -> Any:
    """Memory traffic beyond operands and results, as declared; none where it is not."""
    from ir.text import parse_dim

    return parse_dim(str(node.attr("bytes") or 0)).at(*work_point(node.outputs, outs))


def _saved(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """The declared bytes, an output of their own; else the inputs and parameters."""
    if not any(needs):
        return ()
    return node.refs()[-1:] if node.attr("kept") else node.inputs


# Costed by its counts alone, twice the forward in backward.
OPS = (Op(name="leaf", kind="leaf", spec=_spec, flop=_flop, saved=_saved),)
