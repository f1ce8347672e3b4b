"""Reductions, sorting and selection along dimensions."""

from __future__ import annotations

from ir.graph import Node, Tensor
from ir.ops.base import Op, Spec


def _dims(node: Node, rank: int) -> tuple[int, ...]:
    dims = node.attr("dims")
    given = dims if isinstance(dims, tuple) else ()
    return tuple(d % rank for d in given) if given else tuple(range(rank))


def _reduce_spec(partial: bool):  # type: ignore[no-untyped-def]
    """Sums over a split dimension leave a partial sum; other reductions need it whole."""

    def spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
        rank = len(ins[0].shape)
        held = _dims(node, rank) if rank else ()
        letters = tuple(
            (f"d{i}" if partial else f"!d{i}") if i in held else f"d{i}" for i in range(rank)
        )
        kept = tuple(
            "!1" if i in held else f"d{i}"
            for i in range(rank)
            if i not in held or len(node.outputs[0].shape) == rank
        )
        return Spec(inputs=(letters,), outputs=tuple(kept for _ in node.outputs))

    return spec


def _along_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """One dimension (attr dim) must be whole in the inputs and is another size in the outputs."""
    rank = len(ins[0].shape)
    held = node.number("dim") % rank if rank else 0
    letters = tuple(f"!d{i}" if i == held else f"d{i}" for i in range(rank))
    return Spec(inputs=tuple(letters for _ in ins), outputs=tuple(letters for _ in node.outputs))


def _with_indices(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """Backward scatters to the chosen places: the index output."""
    return (f"{node.name}:1",) if any(needs) and len(node.outputs) > 1 else ()


def _both(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    return (node.inputs[0], node.name) if any(needs) else ()


def _nothing(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    return ()


OPS = (
    Op(name="sum", kind="memory", spec=_reduce_spec(True), saved=_nothing, fusible=True),
    Op(name="mean", kind="memory", spec=_reduce_spec(False), saved=_nothing, fusible=True),
    Op(name="amax", kind="memory", spec=_reduce_spec(False), saved=_both, fusible=True),
    Op(name="logsumexp", kind="memory", spec=_reduce_spec(False), saved=_both, fusible=True),
    Op(name="var", kind="memory", spec=_reduce_spec(False), saved=_both, fusible=True),
    Op(name="vector_norm", kind="memory", spec=_reduce_spec(False), saved=_both, fusible=True),
    Op(name="prod", kind="memory", spec=_reduce_spec(False), saved=_both, fusible=True),
    Op(name="any", kind="memory", spec=_reduce_spec(False), saved=_nothing, fusible=True),
    Op(name="argmax", kind="memory", spec=_reduce_spec(False), saved=_nothing),
    Op(name="topk", kind="memory", spec=_along_spec, saved=_with_indices),
    Op(name="sort", kind="memory", spec=_along_spec, saved=_with_indices),
    Op(name="diff", kind="memory", spec=_along_spec, saved=_nothing, fusible=True),
    Op(name="histogram", kind="memory", spec=lambda node, ins: Spec(
        inputs=(tuple(f"d{i}" for i in range(len(ins[0].shape))),),
        outputs=(("!e",),)), saved=_nothing),
)  # fmt: skip
