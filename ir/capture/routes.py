"""Recognise expert routing written with plain indexing around grouped matmuls.

The row gather that feeds a grouped matmul is its dispatch; the scatter or gather that takes rows
back to tokens is its combine. Both get their own op, so that what crosses the expert axis is
named wherever the model's author wrote it.
"""

from __future__ import annotations

from dataclasses import replace

from ir.graph import Graph, Unit

_GATHERS = ("index", "gather")
_SCATTERS = ("index_add", "index_put", "scatter", "index")


def mark_routes(graph: Graph) -> Graph:
    """Rename the gathers into, and the scatters out of, grouped matmuls."""
    return replace(graph, units=tuple(_mark(u) for u in graph.units), root=_mark(graph.root))


def _mark(unit: Unit) -> Unit:
    grouped = [n for n in unit.nodes if n.op == "grouped_matmul"]
    if not grouped:
        return unit
    renamed: dict[str, str] = {}
    above = {r for n in grouped for r in _upstream(unit, n.inputs[0])}
    below = _downstream(unit, {n.name for n in grouped})
    for node in unit.nodes:
        floats = node.outputs[0].dtype in ("f32", "bf16", "f16", "f64")
        if not floats or len(node.outputs[0].shape) != 2:
            continue
        if node.name in above and node.op in _GATHERS and node.name not in below:
            renamed[node.name] = "dispatch"
        elif node.name in below and node.op in _SCATTERS:
            renamed[node.name] = "combine"
    nodes = tuple(
        replace(n, op=renamed[n.name], attrs=tuple(sorted((*n.attrs, ("via", n.op)))))
        if n.name in renamed
        else n
        for n in unit.nodes
    )
    return replace(unit, nodes=nodes)


def _upstream(unit: Unit, ref: str) -> list[str]:
    """Nodes that make a grouped matmul's rows, as far as the previous heavy op."""
    found, todo = [], [ref]
    while todo:
        node = unit.producers.get(todo.pop())
        if node is None or node.name in found or node.op in ("grouped_matmul", "linear"):
            continue
        found.append(node.name)
        if node.op not in _GATHERS:
            todo += node.inputs[:1]
    return found


def _downstream(unit: Unit, start: set[str]) -> set[str]:
    found = set(start)
    for node in unit.nodes:
        if any(r.partition(":")[0] in found for r in node.inputs):
            found.add(node.name)
    return found - start
