"""What stays in memory between forward and backward, from the op rules alone.

Eager autograd keeps what each op's backward reads (`Op.saved`), one storage once. A compiler may
keep less: what it can compute again by pointwise work need not be kept, and the cheapest set
that suffices is a minimum cut (as torch's min-cut partitioner; Chen et al. 2016 for the idea).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any

from ir.graph import FLOATS, Graph, Node, Unit
from ir.ops import rule

NOMINAL = (1, 2048)  # batch, sequence at which a cut weighs values: ratios hardly depend on it
HEAVY = ("gemm", "grouped_gemm", "attention", "conv", "scan", "leaf", "dispatch", "combine")


def differentiable(
    unit: Unit, classes: Mapping[str, Unit] = MappingProxyType({})
) -> dict[str, bool]:
    """Which values carry a gradient: parameters, differentiable inputs and what floats of them.

    classes: the units by name, where the body has calls (the root).
    """
    return dict(_alone(unit)) if not classes else _learns(unit, classes)


@cache
def _alone(unit: Unit) -> dict[str, bool]:
    return _learns(unit, MappingProxyType({}))  # once a class, however many calls there are


def _learns(unit: Unit, classes: Mapping[str, Unit]) -> dict[str, bool]:
    learns = {name: name in unit.diff_inputs for name, _ in unit.inputs}
    learns |= {p.name: p.kind == "parameter" for p in unit.parameters}
    for node in unit.nodes:
        through = (any(learns[r] for r in node.inputs),) * len(node.outputs)
        if node.op == "call":
            called = classes[str(node.attr("unit"))]
            inside = differentiable(called)
            through = tuple(inside[output] for output in called.outputs)
        for ref, tensor, grad in zip(node.refs(), node.outputs, through):
            learns[ref] = grad and tensor.dtype in FLOATS and not node.attr("stop")
    return learns


@cache
def storage_roots(unit: Unit) -> Mapping[str, str]:
    """The value whose storage each value shares: views lead to what they are views of."""
    roots = {name: name for name in unit.values}
    for node in unit.nodes:
        if node.op != "call" and rule(node).view:
            for ref in node.refs():
                roots[ref] = roots[node.inputs[0]]
    return MappingProxyType(roots)


def _read_by_backward(unit: Unit, learns: dict[str, bool]) -> dict[str, None]:
    """Every value some op's backward reads, in order."""
    wanted: dict[str, None] = {}
    for node in unit.nodes:
        needs = tuple(learns[r] for r in node.inputs)
        if node.op != "call" and any(needs) and learns[node.name]:
            wanted.update(dict.fromkeys(rule(node).saved(node, needs)))
    return wanted


@cache
def needed_again(unit: Unit) -> dict[str, bool]:
    """Which nodes a forward that is repeated for backward comes to: it stops at the last one that
    keeps something for it."""
    learns, found, reached = differentiable(unit), {}, False
    for node in reversed(unit.nodes):
        needs = tuple(learns[r] for r in node.inputs)
        reached |= any(needs) and learns[node.name] and bool(rule(node).saved(node, needs))
        found[node.name] = reached
    return found


def feeds_backward(unit: Unit) -> dict[str, bool]:
    """Which values backward reads, or light operations make what it reads from them: those that
    selective recomputation has a use for."""
    found = dict.fromkeys(unit.values, False) | dict.fromkeys(
        _read_by_backward(unit, differentiable(unit)), True
    )
    for node in reversed(unit.nodes):
        if rule(node).kind not in HEAVY and any(found[r] for r in node.refs()):
            found.update(dict.fromkeys(node.inputs, True))
    return found


def saved_by_autograd(
    unit: Unit, classes: Mapping[str, Unit] = MappingProxyType({})
) -> tuple[str, ...]:
    """What eager mode keeps: each storage once, parameters and buffers left out."""
    roots = storage_roots(unit)
    found = dict.fromkeys(roots[r] for r in _read_by_backward(unit, differentiable(unit, classes)))
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
    """Fill in what every unit keeps, for each way of running it, each storage once.

    What a unit is given is kept by the unit that made it, if that keeps it too; by the root, if
    it carries no gradient (rope, masks) or several units keep it; else by the unit itself. So
    the sum over calls, and the root's, is the model's.
    """
    own = saved_by_autograd(graph.root, graph.unit_by_name)
    ways: dict[str, Callable[[Unit], tuple[str, ...]]] = {
        "saved": saved_by_autograd,
        "saved_fused": partial(saved_by_cut, selective=False),
        "saved_selective": partial(saved_by_cut, selective=True),
    }
    for way, rule_of in ways.items():
        kept = {u.name: rule_of(u) for u in graph.units}
        owned, by_root = _owners(graph, kept, own)
        graph = replace(
            graph,
            units=tuple(_with(u, way, owned[u.name]) for u in graph.units),
            root=_with(graph.root, way, by_root),
        )
    return graph


def _with(unit: Unit, way: str, refs: tuple[str, ...]) -> Unit:
    changed: dict[str, Any] = {way: refs}
    return replace(unit, **changed)


def _root_storages(graph: Graph) -> dict[str, str]:
    """As `storage_roots` of the root, through the calls whose result is a view of an argument."""
    roots = {name: name for name in graph.root.values}
    for node in graph.root.nodes:
        if node.op != "call":
            for ref in node.refs() if rule(node).view else ():
                roots[ref] = roots[node.inputs[0]]
            continue
        unit = graph.unit_by_name[str(node.attr("unit"))]
        inside = storage_roots(unit)
        given = {name: ref for (name, _), ref in zip(unit.inputs, node.inputs)}
        for ref, output in zip(node.refs(), unit.outputs):
            roots[ref] = roots[given[inside[output]]] if inside[output] in given else ref
    return roots


def _owners(
    graph: Graph, kept: dict[str, tuple[str, ...]], own: tuple[str, ...]
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """(what each class keeps of its own, what the root keeps), given what each reads."""
    roots = _root_storages(graph)
    made: set[str] = set()
    readers: dict[str, list[tuple[str, str, bool]]] = {}
    for node, _, unit in graph.calls():
        inside = storage_roots(unit)
        made.update(
            roots[ref]
            for ref, output in zip(node.refs(), unit.outputs)
            if inside[output] in kept[unit.name]
        )
        for (name, _tensor), ref in zip(unit.inputs, node.inputs):
            if name in kept[unit.name]:
                diff = name in unit.diff_inputs
                readers.setdefault(roots[ref], []).append((unit.name, name, diff))
    foreign: dict[tuple[str, str], bool] = {}
    for store, found in readers.items():
        shared = store in made or store in own or store in graph.root.parameter_names
        for unit_name, name, diff in found:
            elsewhere = shared or len(found) > 1 or not diff
            foreign[unit_name, name] = foreign.get((unit_name, name), True) and elsewhere
    by_root = dict.fromkeys(own)
    for store, found in readers.items():
        if store in made or store in graph.root.parameter_names:
            continue
        if any(foreign[unit, name] for unit, name, _ in found):
            by_root[store] = None
    owned = {
        unit: tuple(r for r in refs if not foreign.get((unit, r), False))
        for unit, refs in kept.items()
    }
    return owned, tuple(by_root)
