"""What stays in memory between forward and backward, from the op rules alone.

Eager autograd keeps what each op's backward reads (`Op.saved`), one storage once. A compiler may
keep less: what it can compute again by pointwise work need not be kept, and the cheapest set
that suffices is a minimum cut (as torch's min-cut partitioner; Chen et al. 2016 for the idea).
"""

from __future__ import annotations

from dataclasses import replace

from ir.graph import FLOATS, Graph, Node, Unit
from ir.ops import rule

NOMINAL = (1, 2048)  # batch, sequence at which a cut weighs values: ratios hardly depend on it
HEAVY = ("gemm", "grouped_gemm", "attention", "conv", "scan", "dispatch", "combine")


def differentiable(unit: Unit) -> dict[str, bool]:
    """Which values carry a gradient: parameters, differentiable inputs and what floats of them."""
    learns = {name: name in unit.diff_inputs for name, _ in unit.inputs}
    learns |= {p.name: p.kind == "parameter" for p in unit.parameters}
    for node in unit.nodes:
        through = any(learns[r] for r in node.inputs) and not node.attr("stop")
        for ref, tensor in zip(node.refs(), node.outputs):
            learns[ref] = through and tensor.dtype in FLOATS
    return learns


def storage_roots(unit: Unit) -> dict[str, str]:
    """The value whose storage each value shares: views lead to what they are views of."""
    roots = {name: name for name in unit.values}
    for node in unit.nodes:
        if node.op != "call" and rule(node).view:
            for ref in node.refs():
                roots[ref] = roots[node.inputs[0]]
    return roots


def _read_by_backward(unit: Unit, learns: dict[str, bool]) -> dict[str, None]:
    """Every value some op's backward reads, in order."""
    wanted: dict[str, None] = {}
    for node in unit.nodes:
        needs = tuple(learns[r] for r in node.inputs)
        if node.op != "call" and any(needs) and learns[node.name]:
            wanted.update(dict.fromkeys(rule(node).saved(node, needs)))
    return wanted


def saved_by_autograd(unit: Unit) -> tuple[str, ...]:
    """What eager mode keeps: each storage once, parameters and buffers left out."""
    roots = storage_roots(unit)
    found = dict.fromkeys(roots[r] for r in _read_by_backward(unit, differentiable(unit)))
    return tuple(r for r in found if r not in unit.parameter_names)


def saved_by_cut(unit: Unit, *, selective: bool) -> tuple[str, ...]:
    """The cheapest values from which backward's can be computed again without heavy ops.

    selective: every op but matmuls, attention, convolutions and scans may be repeated; otherwise
    only what a compiler fuses.
    """
    import networkx as nx

    learns, roots = differentiable(unit), storage_roots(unit)
    wanted = [r for r in _read_by_backward(unit, learns) if roots[r] not in unit.parameter_names]
    if not wanted:
        return ()
    flow = nx.DiGraph()
    flow.add_node("from")
    flow.add_node("to")
    for name, _ in unit.inputs:
        # what the unit is given and has no gradient (masks, rope) is kept once for all layers
        weight = unit.values[name].nbytes(*NOMINAL) if name in unit.diff_inputs else 1
        flow.add_edge("from", ("in", name))
        flow.add_edge(("in", name), ("out", name), capacity=weight)
    for node in unit.nodes:
        _add_node(flow, unit, node, selective)
    for ref in wanted:
        flow.add_edge(("out", ref), "to")
    _, (near, _) = nx.minimum_cut(flow, "from", "to")
    cut = [r for r in unit.values if ("in", r) in near and ("out", r) not in near]
    return tuple(dict.fromkeys(roots[r] for r in cut))


def _add_node(flow, unit: Unit, node: Node, selective: bool) -> None:  # type: ignore[no-untyped-def]
    """A value costs its bytes to keep; a view nothing of its own, so its root is kept."""
    op = rule(node)
    light = op.kind not in HEAVY if selective else op.fusible
    for ref in node.refs():
        if op.view:
            flow.add_edge(("in", ref), ("out", ref))
        else:
            flow.add_edge(("in", ref), ("out", ref), capacity=unit.values[ref].nbytes(*NOMINAL))
        if not light:
            flow.add_edge("from", ("in", ref))
            continue
        for given in node.inputs:
            if given not in unit.parameter_names:
                flow.add_edge(("out", given), ("in", ref))


def with_saved(graph: Graph) -> Graph:
    """Fill in what every unit keeps, for each way of running it."""

    def fill(unit: Unit) -> Unit:
        return replace(
            unit, saved=saved_by_autograd(unit), saved_fused=saved_by_cut(unit, selective=False),
            saved_selective=saved_by_cut(unit, selective=True),
        )  # fmt: skip

    root = replace(graph.root, saved=saved_by_autograd(graph.root))
    root = replace(root, saved_fused=root.saved, saved_selective=root.saved)
    return replace(graph, units=tuple(fill(u) for u in graph.units), root=root)
