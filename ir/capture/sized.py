"""What lowering reads of the second of two programs: its operators and their sizes, as data, so
that another process may have traced it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ir.capture.arguments import attribute


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a tensor. A size that depends on data is a text."""

    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """A node of a program. value: the shape, or those in a list. operands: the shapes in its first
    argument, where that is a list. inner: the nodes of a program that it runs in place."""

    op: str
    target: str
    value: Any
    operands: tuple[Any, ...] = ()
    inner: tuple[Sized, ...] = ()


def sized(program: fx.GraphModule) -> tuple[Sized, ...]:
    """Every node of it, in order."""
    return tuple(_node(program, node) for node in program.graph.nodes)


def _node(program: fx.GraphModule, node: fx.Node) -> Sized:
    called = node.op == "call_function"
    first = node.args[0] if called and node.args else None
    some = first if isinstance(first, (list, tuple)) else ()
    operands = tuple(_shapes(x.meta.get("val")) for x in some if isinstance(x, fx.Node))
    runs = (
        attribute(program, x) for x in node.args if isinstance(x, fx.Node) and x.op == "get_attr"
    )
    inner = next((x for x in runs if isinstance(x, fx.GraphModule)), None) if called else None
    return Sized(
        op=node.op, target=str(node.target), value=_shapes(node.meta.get("val")),
        operands=operands, inner=sized(inner) if inner is not None else (),
    )  # fmt: skip


def _shapes(value: Any) -> Any:
    """A value with shapes in place of its tensors; None for what is neither."""
    if isinstance(value, torch.Tensor):
        return Shape(shape=tuple(d if type(d) is int else str(d) for d in value.shape))
    if isinstance(value, (list, tuple)):
        return [_shapes(x) for x in value]
    return None
