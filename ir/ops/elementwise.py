"""Pointwise ops, casts, softmax, dropout: bytes moved, no matmul FLOPs; a compiler fuses them."""

from __future__ import annotations

from ir.graph import Node, Tensor
from ir.ops.base import Op, Spec, blocked_dims_spec, pointwise_spec


def _inputs(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """Backward reads the input(s)."""
    return node.inputs if any(needs) else ()


def _output(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """Backward reads the result."""
    return (node.name,) if any(needs) else ()


def _mul(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """d(xy) = y dx + x dy; a scalar factor is not a tensor."""
    if len(node.inputs) == 1:
        return ()
    return tuple(node.inputs[1 - i] for i in range(2) if needs[i])


def _div(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """d(x/y) = dx/y - x/y^2 dy; a scalar divisor is not a tensor."""
    if len(node.inputs) == 1:
        return ()
    return node.inputs if needs[1] else ((node.inputs[1],) if needs[0] else ())


def _condition(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """Backward reads the mask alone: the first input of where, the second of masked_fill."""
    at = 0 if node.op == "where" else 1
    return (node.inputs[at],) if any(needs) else ()


def _lerp(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    return node.inputs if any(needs) else ()


def _dim_spec(node: Node, ins: tuple[Tensor, ...]) -> Spec:
    """The dimension named by attr dim must be whole."""
    return blocked_dims_spec(node, ins, (node.number("dim"),))


def _row(name: str, saved, **more) -> Op:  # type: ignore[no-untyped-def]
    return Op(name=name, kind="memory", spec=pointwise_spec, saved=saved, fusible=True, **more)


def _nothing(node: Node, needs: tuple[bool, ...]) -> tuple[str, ...]:
    return ()


KEEP_NOTHING = (
    "add", "sub", "neg", "cast", "copy", "fill", "compare", "logical", "round", "sign", "remainder",
    "isfinite", "bitwise",
)  # fmt: skip
KEEP_INPUT = (
    "silu", "gelu", "log", "log1p", "cos", "sin", "abs", "softplus", "erf", "pow", "clamp",
    "leaky_relu", "elu", "hardswish", "logsigmoid", "minimum", "maximum", "mish", "atan2", "relu6",
)  # fmt: skip
KEEP_OUTPUT = ("relu", "sigmoid", "tanh", "exp", "expm1", "sqrt", "rsqrt", "reciprocal")

OPS = (
    *(_row(name, _nothing) for name in KEEP_NOTHING),
    *(_row(name, _inputs) for name in KEEP_INPUT),
    *(_row(name, _output) for name in KEEP_OUTPUT),
    _row("mul", _mul),
    _row("div", _div),
    _row("where", _condition),
    _row("masked_fill", _condition),
    _row("lerp", _lerp),
    _row("dropout", lambda node, needs: (f"{node.name}:1",) if any(needs) else ()),
    Op(name="softmax", kind="memory", spec=_dim_spec, saved=_output, fusible=True),
    Op(name="log_softmax", kind="memory", spec=_dim_spec, saved=_output, fusible=True),
    Op(name="cumsum", kind="memory", spec=_dim_spec),
    Op(name="glu", kind="memory", spec=_dim_spec, saved=_inputs, fusible=True),
)
