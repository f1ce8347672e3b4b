"""A call of a class that was traced before: its node, given to the tracer as it is.

To run an operator through all that `torch.export` has around one costs milliseconds, and of these
calls there is one a layer: of what the exporter would find out of each, all was found of the first.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import (
    PythonKeyTracer,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor,
)


def recorded(
    op: torch._ops.OpOverload, xs: list[Tensor], like: list[Tensor], path: str, key: str
) -> list[Tensor]:
    """Results like these, of a node of `op`(xs, like, path, key): what `op` itself gives. It is
    asked where that may not be so: of tensors from elsewhere, or a gradient not there at first."""
    tracer = getattr(get_proxy_mode(), "tracer", None)
    known: list[Any] = []
    if isinstance(tracer, PythonKeyTracer):
        known = [tracer.unwrap_proxy(x) for x in (*xs, *like)]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
    late = learns and not any(x.requires_grad for x in like)
    if late or not known or not all(isinstance(x, fx.Proxy) for x in known):
        found: list[Tensor] = op(xs, like, path, key)
        return found
    assert isinstance(tracer, PythonKeyTracer)
    nodes = [x.node for x in known]
    given, first = nodes[: len(xs)], nodes[len(xs) :]
    with disable_proxy_modes_tracing():
        made = [x.clone() for x in like]
    node = _node(tracer, op, (given, first, path, key), [n.meta["val"] for n in first])
    for i, (x, same) in enumerate(zip(made, first)):
        one = _node(tracer, operator.getitem, (node, i), same.meta["val"])
        track_tensor(x, fx.Proxy(one, tracer), constant=None, tracer=tracer)
    return made


def _node(tracer: fx.Tracer, target: Any, args: tuple[Any, ...], value: object) -> fx.Node:
    """One node, with what an exported program says of each."""
    was, tracer.record_stack_traces = tracer.record_stack_traces, False  # ours is shorter
    try:
        node = tracer.create_node("call_function", target, args, {})
    finally:
        tracer.record_stack_traces = was
    node.meta["val"] = value
    node.meta["stack_trace"] = _forwards()
    return node


def _forwards() -> str:
    """The frames that torch notes of a node: of calls of `forward`, the innermost last."""
    lines = []
    frame = sys._getframe(1).f_back
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and not code.co_filename.startswith("<"):  # in no file
            lines.append(f'File "{code.co_filename}", line {frame.f_lineno}, in forward')
        frame = frame.f_back
    return "\n".join(reversed(lines))
