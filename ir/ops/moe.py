"""Expert routing: rows to their experts and back. What crosses the expert axis starts here."""

from __future__ import annotations

from ir.graph import Node, Tensor
from ir.ops import index
from ir.ops.base import Op, Spec


def _dispatch_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """hidden: [T, H], order or indices: [T, k] or [T*k] -> rows [T*k, H], offsets [e]."""
    rest = tuple(tuple("t" if d.seq or d.batch else "!x" for d in t.shape) for t in ins[1:])
    outs = tuple(
        tuple("t" if d.seq or d.batch else "!x" for d in t.shape) for t in node.outputs[1:]
    )
    return Spec(inputs=(("t", "!h"), *rest), outputs=(("t", "!h"), *outs))


def _combine_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """rows: [T*k, H], weights and indices -> [T, H]."""
    letters = tuple(
        tuple("t" if d.seq or d.batch else ("!h" if i else "!x") for i, d in enumerate(t.shape))
        for t in ins
    )
    return Spec(inputs=letters, outputs=tuple(("t", "!h")[: len(t.shape)] for t in node.outputs))


_INDEXING = {op.name: op for op in index.OPS}


def _as_written(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...] | None:
    """Routing that the model writes with plain indexing (attr via) keeps what that keeps."""
    via = node.attr("via")
    return _INDEXING[str(via)].saved(node, needs) if via else None


def _dispatch_saved(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """A permutation's backward reads the permutation."""
    plain = _as_written(node, needs)
    return plain if plain is not None else (node.inputs[1:] if any(needs) else ())


def _combine_saved(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """Rows too where the routing weights are learnt and applied here."""
    plain = _as_written(node, needs)
    if plain is not None or not any(needs):
        return plain or ()
    return node.inputs if any(needs[1:]) else node.inputs[1:]


def _bias_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """rows: [r, f], bias: [e, f], offsets: [e] -> [r, f]."""
    return Spec(inputs=(("r", "f"), ("!e", "f"), ("!e",)), outputs=(("r", "f"),))


OPS = (
    Op(
        name="expert_bias",
        kind="memory",
        spec=_bias_spec,
        fusible=True,
        saved=lambda node, needs: node.inputs[2:3] if any(needs) else (),
    ),
    Op(name="dispatch", kind="dispatch", spec=_dispatch_spec, saved=_dispatch_saved),
    Op(name="combine", kind="combine", spec=_combine_spec, saved=_combine_saved),
)
