"""A torch call's arguments by schema name, and which calls change nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir.capture.table import TABLE
from ir.errors import PlanError

Value = Any  # a value's name, a list of them, or None for what is not a tensor


def attribute(program: fx.GraphModule, node: Any) -> Any:
    found: Any = program
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def arguments(node: fx.Node) -> dict[str, Any]:
    schema = node.target._schema  # type: ignore[union-attr]
    names = [arg.name for arg in schema.arguments]
    given = dict.fromkeys(names)
    given |= {arg.name: arg.default_value for arg in schema.arguments if arg.has_default_value()}
    return {**given, **dict(zip(names, node.args)), **node.kwargs}


def tensor_arguments(node: fx.Node, args: dict[str, Any]) -> list[fx.Node]:
    found: list[fx.Node] = []
    for value in args.values():
        items = value if isinstance(value, (list, tuple)) else (value,)
        for x in items:
            if isinstance(x, fx.Node) and x.meta.get("val") is not None:
                found.append(x)
    return found


def first_tensor(node: fx.Node) -> fx.Node:
    return tensor_arguments(node, arguments(node))[0]


def flat(value: Value) -> list[str]:
    return [value] if isinstance(value, str) else [v for v in (value or []) if v]


def is_identity(node: fx.Node, base: str, tensors: list[fx.Node]) -> bool:
    """Casts to the same type, contiguous of contiguous, dropout that drops nothing."""
    if not tensors:
        return False
    x, y = tensors[0].meta["val"], node.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    if base == "contiguous":
        return x.is_contiguous()
    if base in ("dropout", "feature_dropout", "alpha_dropout"):
        args = arguments(node)
        return not args.get("p") or args.get("train") is False
    if TABLE.get(base, ("",))[0] == "cast":
        return x.dtype == y.dtype
    return base in ("expand", "reshape", "view", "squeeze", "repeat") and x.shape == y.shape


def no_row(name: str, layer: str, source: str) -> PlanError:
    return PlanError(
        f"torch operator {name!r} has no rule", where=f"{layer or 'top level'} at {source}",
        why="an operator without a rule has no cost, and is never taken to be free",
        hints=(
            f"add a row for {name!r} to ir/capture/table.py and its op to ir/ops"
            " (docs/add-an-op.md)",
            f"or declare the module it is in{f' ({layer})' if layer else ''} one operation with"
            " costs that you give: ir.leaf(Class, flop=...)",
        ),
    )  # fmt: skip
