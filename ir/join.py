"""A pass: top-level operations that follow from a unit's output join that unit.

After it the root has calls, and the glue: what follows from the inputs alone (masks, rotary
tables), which every pipeline stage runs. The loss joins the head, so that a vocabulary split over
ranks stays split through it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ir.graph import AFTER, Attr, Graph, Node, Parameter, Tensor, Unit
from ir.text import format_unit


@dataclass(kw_only=True)
class _Body:
    """A unit's body while operations join it; `names` maps top-level values to its own."""

    names: dict[str, str]
    inputs: list[tuple[str, Tensor]]
    given: list[str]  # the top-level value of each input
    parameters: list[Parameter]
    diff: list[str]
    nodes: list[Node] = field(default_factory=list)


def join_tails(graph: Graph) -> Graph:
    """Join every top-level operation that follows from a unit to the last unit before it."""
    calls = [n for n in graph.root.nodes if n.op == "call"]
    owner: dict[str, int] = {}  # value -> the position of the call it follows from
    joined: list[list[Node]] = [[] for _ in calls]
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
    return _rebuilt(graph, calls, joined, glue, owner)


def _rebuilt(
    graph: Graph, calls: list[Node], joined: list[list[Node]], glue: list[Node],
    owner: dict[str, int],
) -> Graph:  # fmt: skip
    units: dict[str, Unit] = {}
    texts: dict[Unit, str] = {}  # of classes as they are: most calls have no tail
    renamed: dict[str, str] = {}  # top-level values that joined operations made
    nodes: list[Node] = list(glue)
    for call, tail in zip(calls, joined):
        unit = graph.unit_by_name[str(call.attr("unit"))]
        given, results = list(call.inputs), list(call.refs())
        if tail:
            unit, given, results = _join(graph, call, unit, tail, owner)
        if unit not in texts:
            texts[unit] = "\n".join(format_unit(replace(
                unit, name="_", saved=(), saved_fused=(), saved_selective=()
            )))  # fmt: skip
        text = texts[unit]
        if text not in units:
            units[text] = replace(unit, name=f"u{len(units)}")
        new = replace(
            call, inputs=tuple(renamed.get(r, r) for r in given),
            outputs=tuple(unit.values[o] for o in unit.outputs),
            attrs=(*_attrs(call, bool(tail)), ("unit", units[text].name)),
        )  # fmt: skip
        renamed.update(zip(results, new.refs()))
        nodes.append(new)
    root = replace(
        graph.root, nodes=tuple(nodes),
        outputs=tuple(renamed.get(r, r) for r in graph.root.outputs),
    )  # fmt: skip
    return replace(graph, units=tuple(units.values()), root=root)


def _attrs(call: Node, joined: bool) -> tuple[tuple[str, Attr], ...]:
    """Its path, and what its module returns where the unit's outputs do not say that, or not any
    more."""
    returns = call.attr("returns")
    if returns is None and joined and len(call.outputs) > 1:
        returns = f"({', '.join('*' for _ in call.outputs)})"
    return (("path", call.attr("path")), *((("returns", returns),) if returns else ()))


def _join(
    graph: Graph, call: Node, unit: Unit, tail: list[Node], owner: dict[str, int]
) -> tuple[Unit, list[str], list[str]]:
    """(the unit with its tail, top-level values it is given, top-level values it gives)."""
    root = graph.root
    body = _Body(
        names=dict(zip(call.refs(), unit.outputs)), inputs=list(unit.inputs),
        given=list(call.inputs), parameters=list(unit.parameters), diff=list(unit.diff_inputs),
    )  # fmt: skip
    body.names.update(
        (r, name) for r, (name, _) in reversed(list(zip(call.inputs, unit.inputs)))
        if r not in body.names
    )  # fmt: skip
    table = {p.name: p for p in root.parameters}
    for number, node in enumerate(tail):
        for ref in node.inputs:
            _receive(body, ref, table, root, owner)
        new = replace(
            node, name=f"{AFTER}/{node.op}_{number}",
            inputs=tuple(body.names[r] for r in node.inputs),
        )  # fmt: skip
        body.nodes.append(new)
        body.names.update(zip(node.refs(), new.refs()))
    own = {n.name for n in tail}
    read = {r for n in root.nodes if n.name not in own for r in n.inputs} | set(root.outputs)
    results = [r for n in (call, *tail) for r in n.refs() if r in read]
    whole = replace(
        unit, inputs=tuple(body.inputs), parameters=tuple(body.parameters),
        nodes=(*unit.nodes, *body.nodes), outputs=tuple(body.names[r] for r in results),
        diff_inputs=tuple(body.diff),
    )  # fmt: skip
    return whole, body.given, results


def _receive(
    body: _Body, ref: str, parameters: dict[str, Parameter], root: Unit, owner: dict[str, int]
) -> None:
    """Give the body a top-level value that it does not have yet."""
    if ref in body.names:
        return
    if ref in parameters:
        body.names[ref] = f"{AFTER}.{ref}"
        body.parameters.append(replace(parameters[ref], name=body.names[ref]))
        return
    body.names[ref] = f"{AFTER}.in{len(body.inputs)}"
    body.inputs.append((body.names[ref], root.values[ref]))
    body.given.append(ref)
    if ref in owner:
        body.diff.append(body.names[ref])
