"""Table look-ups, gathers and scatters."""

from __future__ import annotations

from ir.graph import Node, Tensor
from ir.ops.base import Op, Spec


def _embedding_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """table: [v, h], ids: [...] -> [..., h]; a shard of the vocabulary gives a masked partial."""
    ids = tuple(f"t{i}" for i in range(len(ins[1].shape)))
    return Spec(inputs=(("v", "h"), ids), outputs=((*ids, "h"),))


def _whole_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """Nothing is split: the indices may point anywhere."""
    return Spec(
        inputs=tuple(tuple("!x" for _ in t.shape) for t in ins),
        outputs=tuple(tuple("!x" for _ in t.shape) for t in node.outputs),
    )


def _gather_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """gather, scatter along attr dim: that dimension is whole, the others go through."""
    rank = len(ins[0].shape)
    if any(len(t.shape) != rank for t in (*ins, *node.outputs)):
        return _whole_spec(node, ins)
    held = node.number("dim") % rank if rank else 0
    letters = tuple(f"!d{i}" if i == held else f"d{i}" for i in range(rank))
    return Spec(inputs=tuple(letters for _ in ins), outputs=tuple(letters for _ in node.outputs))


def _indices(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """Backward scatters: it reads the integer inputs."""
    return node.inputs[1:] if any(needs) else ()


def _second(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    return node.inputs[1:2] if any(needs) else ()


def _index_and_source(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """self, index, source: the source too where it learns (torch reads its shape)."""
    return node.inputs[1 : 3 if needs[-1] else 2] if any(needs) else ()


def _between(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """self, indices or mask, values: what says where."""
    return node.inputs[1:-1] if any(needs) else ()


def _write_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """base: [...], part: a slice of its shape -> base with the part written; a dimension that is
    written in part must be whole."""
    base, part = ins[0].shape, ins[1].shape
    if len(base) != len(part):
        return _whole_spec(node, ins)
    letters = tuple(
        f"d{i}" if str(x) == str(y) else f"!d{i}" for i, (x, y) in enumerate(zip(base, part))
    )
    return Spec(inputs=(letters, letters), outputs=(letters,))


OPS = (
    Op(name="write", kind="memory", spec=_write_spec, fusible=True),
    Op(name="embedding", kind="memory", spec=_embedding_spec, saved=_second),
    Op(name="index", kind="memory", spec=_whole_spec, saved=_indices),
    Op(name="gather", kind="memory", spec=_gather_spec, saved=_second),
    Op(name="scatter", kind="memory", spec=_gather_spec, saved=_second),
    Op(name="index_add", kind="memory", spec=_whole_spec, saved=_index_and_source),
    Op(name="index_put", kind="memory", spec=_whole_spec, saved=_between),
    Op(name="one_hot", kind="memory", spec=lambda node, ins: Spec(
        inputs=(tuple(f"d{i}" for i in range(len(ins[0].shape))),),
        outputs=((*(f"d{i}" for i in range(len(ins[0].shape))), "!c"),))),
)  # fmt: skip
