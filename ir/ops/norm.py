"""Normalisations: the normalised dimensions must be whole; statistics are outputs of their own."""

from __future__ import annotations

from ir.graph import Node, Tensor
from ir.ops.base import Op, Spec


def _last_dims_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """x: [..., h] with attr dims trailing dimensions normalised; weight, bias: [h]."""
    rank, held = len(ins[0].shape), node.number("dims", 1)
    x = tuple(f"!d{i}" if i >= rank - held else f"d{i}" for i in range(rank))
    stats = tuple("!1" if i >= rank - held else f"d{i}" for i in range(rank))
    affine = tuple(x[rank - held :] for _ in ins[1:])
    return Spec(inputs=(x, *affine), outputs=(x, *(stats for _ in node.outputs[1:])))


def _channel_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """x: [n, c, ...]; statistics over the batch and space (batch norm) or groups of channels.

    Nothing is split on tp: the runtime does not shard convolution channels.
    """
    x = tuple(f"!d{i}" for i in range(len(ins[0].shape)))
    rest = tuple(tuple("!c" for _ in t.shape) for t in ins[1:])
    outs = tuple(tuple("!c" for _ in t.shape) for t in node.outputs[1:])
    return Spec(inputs=(x, *rest), outputs=(x, *outs))


def _saved(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """The input, the affine weight and the statistics."""
    if not any(needs):
        return ()
    return (*node.inputs[:2], *node.refs()[1:])


OPS = (
    Op(name="layer_norm", kind="memory", spec=_last_dims_spec, saved=_saved, fusible=True),
    Op(name="rms_norm", kind="memory", spec=_last_dims_spec, saved=_saved, fusible=True),
    Op(name="batch_norm", kind="memory", spec=_channel_spec, saved=_saved),
    Op(name="group_norm", kind="memory", spec=_channel_spec, saved=_saved),
)
