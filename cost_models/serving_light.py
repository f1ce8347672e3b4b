"""Values that elementwise nodes of a unit move: fused into chains, and each node by itself."""

from __future__ import annotations

from ir.graph import Node, Tensor, Unit
from ir.ops import rule


def has_tokens(tensor: Tensor) -> bool:
    """Whether a value has one row a token or more."""
    return any(d.batch for d in tensor.shape) and any(d.seq for d in tensor.shape)


def edges(unit: Unit, run: list[Node]) -> list[str]:
    """Values that a chain reads from outside, and those that leave it."""
    made = {r: None for n in run for r in n.refs()}
    names = {n.name for n in run}
    ins = dict.fromkeys(r for n in run for r in n.inputs if r not in made)
    outside = {r for n in unit.nodes if n.name not in names for r in n.inputs} | set(unit.outputs)
    return [*ins, *(r for r in made if r in outside and not rule(unit.producers[r]).view)]


def eager_elements(unit: Unit) -> float:
    """Elements a token that elementwise nodes read and write where each is a kernel of its own."""
    return float(sum(
        unit.values[r].numel(1, 1)
        for node in unit.nodes if rule(node).fusible and not rule(node).view
        for r in (*node.inputs, *node.refs()) if has_tokens(unit.values[r])
    ))  # fmt: skip
