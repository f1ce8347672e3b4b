"""The op set: one table, filled here and frozen. A miss is an error that says how to add a row."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ir.errors import PlanError
from ir.graph import Node
from ir.ops import (
    attention,
    conv,
    elementwise,
    index,
    leaf,
    loss,
    matmul,
    moe,
    norm,
    reduce,
    scan,
    view,
)
from ir.ops.base import KINDS, Op, Spec

__all__ = ["OPS", "Op", "Spec", "rule"]

_MODULES = (
    matmul, attention, norm, elementwise, reduce, view, conv, moe, index, scan, loss, leaf,
)  # fmt: skip


def _table() -> Mapping[str, Op]:
    rows: dict[str, Op] = {}
    for module in _MODULES:
        for op in module.OPS:
            if op.name in rows or op.kind not in KINDS:
                raise ValueError(f"op row {op.name!r}: a duplicate, or of no known kind")
            rows[op.name] = op
    return MappingProxyType(rows)


OPS: Mapping[str, Op] = _table()


def rule(node: Node) -> Op:
    """The row of a node's op. Raises PlanError naming the op, the layer and how to add one."""
    if node.op not in OPS:
        raise PlanError(
            f"op {node.op!r} has no rule", where=f"{node.name} {node.source}".strip(),
            why="an op without a rule has no cost, and is never taken to be free",
            hints=(f"add a row for {node.op!r} to a file of ir/ops (see docs/add-an-op.md)",),
        )  # fmt: skip
    return OPS[node.op]
