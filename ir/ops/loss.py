"""Losses: fp32 logits are often the peak of the last stage."""

from __future__ import annotations

from ir.graph import Node, Tensor
from ir.ops.base import Op, Spec


def _cross_entropy_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """logits: [..., v], targets: [...] -> scalar, log-probabilities [..., v], weight.

    A split vocabulary is allowed: the maximum and the sum of exponentials are reduced (two small
    all-reduces, in the cost); rows may be split too, the mean is then a partial sum.
    """
    rows = tuple(f"t{i}" for i in range(len(ins[0].shape) - 1))
    names = ((*rows, "v"), rows, *(("!x",) * len(t.shape) for t in ins[2:]))
    outs = ((), (*rows, "v"), ())[: len(node.outputs)]
    return Spec(inputs=names, outputs=outs)


def _rows_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """Losses of equal shapes, or of log-probabilities and classes: rows may be split."""
    letters = tuple(f"t{i}" for i in range(len(ins[0].shape)))
    out = letters if node.outputs[0].shape else ()
    return Spec(
        inputs=tuple(letters if len(t.shape) == len(letters) else letters[: len(t.shape)]
                     for t in ins),
        outputs=(out,),
    )  # fmt: skip


OPS = (
    Op(
        name="nll_loss", kind="memory", spec=_rows_spec,
        saved=lambda node, needs: node.inputs[:2] if any(needs) else (),
    ),
    Op(
        name="mse", kind="memory", spec=_rows_spec,
        saved=lambda node, needs: node.inputs[:2] if any(needs) else (),
    ),
    Op(
        name="cross_entropy", kind="memory", spec=_cross_entropy_spec,
        saved=lambda node, needs: (*node.refs()[1:], node.inputs[1]) if any(needs) else (),
    ),
)  # fmt: skip
