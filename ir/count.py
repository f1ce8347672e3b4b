"""Counts over a whole graph: what every calibrated number must agree with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ir.graph import ITEM_BYTES, Graph, Node, Unit
from ir.ops import rule


def nodes(graph: Graph) -> Iterator[tuple[Unit, Node]]:
    """Every operation of one forward with the unit it is in, calls expanded, in order."""
    for node in graph.root.nodes:
        if node.op == "call":
            unit = graph.unit_by_name[str(node.attr("unit"))]
            yield from ((unit, inner) for inner in unit.nodes)
        else:
            yield graph.root, node


def node_flop(unit: Unit, node: Node, batch: Any, seq: Any) -> Any:
    """Model FLOPs of one operation, forward."""
    ins = tuple(unit.values[ref].sizes(batch, seq) for ref in node.inputs)
    return rule(node).flop(node, ins, tuple(t.sizes(batch, seq) for t in node.outputs))


def executed_flop(unit: Unit, node: Node, batch: Any, seq: Any) -> tuple[Any, Any]:
    """What kernels run of one operation: (forward, backward).

    Backward is twice the forward, a product for each operand, unless the op says otherwise.
    """
    op = rule(node)
    ins = tuple(unit.values[ref].sizes(batch, seq) for ref in node.inputs)
    outs = tuple(t.sizes(batch, seq) for t in node.outputs)
    if op.executed is not None:
        return op.executed(node, ins, outs)
    forward = op.flop(node, ins, outs)
    return forward, 2 * forward


def model_flop(graph: Graph, batch: Any, seq: Any) -> Any:
    """Model FLOPs of one forward at batch and sequence; the backward's are twice as many."""
    return sum(node_flop(unit, node, batch, seq) for unit, node in nodes(graph))


def unit_model_flop(unit: Unit, batch: Any, seq: Any) -> Any:
    """Model FLOPs of one instance of a unit, forward."""
    return sum(node_flop(unit, node, batch, seq) for node in unit.nodes)


def parameter_bytes(graph: Graph) -> int:
    """Bytes of all parameters, each tensor once, in the types that the graph has."""
    return sum(p.tensor.nbytes() for p in graph.parameters.values())


def buffer_bytes(graph: Graph) -> int:
    """Bytes of all buffers and constants."""
    bodies = [graph.root] + [unit for _, _, unit in graph.calls()]
    return sum(
        p.tensor.numel() * ITEM_BYTES[p.tensor.dtype]
        for body in bodies
        for p in body.parameters
        if p.kind == "buffer"
    )


def saved_bytes(unit: Unit, batch: Any, seq: Any, *, way: str = "saved") -> Any:
    """Bytes that one instance keeps for its backward. way: saved, saved_fused, saved_selective."""
    return sum(unit.values[ref].nbytes(batch, seq) for ref in getattr(unit, way))
