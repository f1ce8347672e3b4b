"""The model as a chain of units: what a pipeline divides, and what runs on every stage.

Top-level operations that follow from a unit's output join the last unit before them (the loss
joins the head, so that a split vocabulary stays split through it); those that follow from the
inputs alone (masks, rotary tables) are the glue, which every stage runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ir.backward import with_saved
from ir.graph import Graph, Node, Parameter, Tensor, Unit
from ir.text import format_unit

AFTER = "after"  # the module path of joined operations inside a unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One element of the chain: a module path, the body it runs, and what crosses after it.

    `cut_reason` is empty where a pipeline may cut after this element, else says why not.
    """

    path: str
    unit: Unit
    is_layer: bool
    cut_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Links in execution order, and the glue."""

    links: tuple[Link, ...]
    glue: Unit

    @property
    def layers(self) -> tuple[int, ...]:
        """Positions of the layers among the links."""
        return tuple(i for i, link in enumerate(self.links) if link.is_layer)

    @property
    def pipeline_reason(self) -> str:
        """Why no pipeline can cut between layers; empty where it can."""
        layers = self.layers
        if len(layers) < 2:
            return "the model has fewer than two layers in containers"
        between = range(layers[0], layers[-1])
        return next((self.links[i].cut_reason for i in between if self.links[i].cut_reason), "")


@functools.cache
def chain_of(graph: Graph) -> Chain:
    """Divide the root's operations among the units and the glue. Raises nothing: it is total."""
    calls = [n for n in graph.root.nodes if n.op == "call"]
    owner: dict[str, int] = {}  # value -> the position of the call it follows from
    joined: dict[int, list[Node]] = {i: [] for i in range(len(calls))}
    glue: list[Node] = []
    position = -1
    for node in graph.root.nodes:
        if node.op == "call":
            position += 1
            owner.update(dict.fromkeys(node.refs(), position))
            continue
        after = [owner[r] for r in node.inputs if r in owner]
        if not after:
            glue.append(node)
            continue
        joined[max(after)].append(node)
        owner.update(dict.fromkeys(node.refs(), max(after)))
    used = _last_use(graph, owner, joined, calls)
    layers, seen, links = set(graph.layers), set(), []
    bodies: dict[str, Unit] = {}
    for i, call in enumerate(calls):
        path = str(call.attr("path"))
        unit = graph.unit_by_name[str(call.attr("unit"))]
        reason = "" if path not in seen else f"{path} runs more than once"
        seen.add(path)
        body = _once(bodies, _join(graph, call, unit, joined[i], owner)) if joined[i] else unit
        links.append(
            Link(
                path=path, unit=body, is_layer=path in layers,
                cut_reason=reason or _crossing(graph, used, owner, calls, i),
            )
        )  # fmt: skip
    return Chain(links=tuple(links), glue=_glue(graph, glue))


def _once(bodies: dict[str, Unit], unit: Unit) -> Unit:
    """Joined bodies with the same text are one class."""
    text = "\n".join(format_unit(unit))
    if text not in bodies:
        alike = sum(u.name.startswith(unit.name) for u in bodies.values())
        name = unit.name + (str(alike + 1) if alike else "")
        bodies[text] = _saved(replace(unit, name=name))
    return bodies[text]


def _last_use(
    graph: Graph, owner: dict[str, int], joined: dict[int, list[Node]], calls: list[Node]
) -> dict[str, int]:
    """The last call, or joined group, that reads each value that follows from a unit."""
    last: dict[str, int] = {}
    for i, call in enumerate(calls):
        for ref in (*call.inputs, *(r for n in joined[i] for r in n.inputs)):
            if ref in owner:
                last[ref] = max(last.get(ref, 0), i)
    return last


def _crossing(
    graph: Graph, used: dict[str, int], owner: dict[str, int], calls: list[Node], at: int
) -> str:
    """Why a cut after call `at` would leave a value behind: made earlier, read later."""
    for ref, last in used.items():
        if owner[ref] < at < last:
            reader = str(calls[last].attr("path"))
            return f"{reader} reads the output of {str(calls[owner[ref]].attr('path'))} too"
    return ""


def _join(
    graph: Graph, call: Node, unit: Unit, nodes: list[Node], owner: dict[str, int]
) -> Unit:
    """A unit's body with the top-level operations that follow it."""
    names = dict(zip(call.refs(), unit.outputs))
    root = graph.root.values
    inputs, parameters = list(unit.inputs), list(unit.parameters)
    given = dict(zip(call.inputs, (n for n, _ in unit.inputs)))
    root_parameters = {p.name: p for p in graph.root.parameters}
    diff = list(unit.diff_inputs)
    made = []

    def local(ref: str) -> str:
        if ref in names:
            return names[ref]
        if ref in given:
            return given[ref]
        name = f"{AFTER}.in{len(inputs)}"
        if ref in root_parameters:
            name = f"{AFTER}.{ref}"
        names[ref] = name
        if ref in root_parameters:
            parameters.append(replace(root_parameters[ref], name=name))
        else:
            inputs.append((name, root[ref]))
            if ref in owner:
                diff.append(name)
        return name

    for number, node in enumerate(nodes):
        new = f"{AFTER}/{node.op}_{number}"
        made.append(replace(node, name=new, inputs=tuple(local(r) for r in node.inputs)))
        names.update(zip(node.refs(), replace(node, name=new).refs()))
    own = {n.name for n in nodes}
    read = {r for n in graph.root.nodes if n.name not in own for r in n.inputs}
    read |= set(graph.root.outputs)
    outs = [names[r] for n in (call, *nodes) for r in n.refs() if r in read]
    return Unit(
        name=f"{unit.name}+", inputs=tuple(inputs), parameters=tuple(parameters),
        nodes=(*unit.nodes, *made), outputs=tuple(outs), diff_inputs=tuple(diff),
    )  # fmt: skip


def _glue(graph: Graph, nodes: list[Node]) -> Unit:
    """Top-level operations that every stage runs, with their tables; no gradient."""
    root = graph.root
    read = {r for n in nodes for r in n.inputs}
    given: list[tuple[str, Tensor]] = [(n, t) for n, t in root.inputs if n in read]
    parameters: list[Parameter] = [p for p in root.parameters if p.name in read]
    made = {r for n in nodes for r in n.refs()}
    outs = dict.fromkeys(
        r for n in root.nodes if n.op == "call" for r in n.inputs if r in made
    )
    return _saved(
        Unit(
            name="glue", inputs=tuple(given), parameters=tuple(parameters), nodes=tuple(nodes),
            outputs=tuple(outs),
        )
    )  # fmt: skip


def _saved(unit: Unit) -> Unit:
    return with_saved(Graph(name="", units=(unit,), root=Unit(
        name="root", inputs=(), parameters=(), nodes=(), outputs=(),
    ))).units[0]  # fmt: skip
