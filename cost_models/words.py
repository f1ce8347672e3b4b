"""An assignment in a plan's words, and back: parameter placements, and edges named by modules.

"self_attn:in" is every operand inside the module that reads, with gradient, from outside it;
"o_proj:out" every reader of the module's last result; "add[1]" one operand of one operation;
"return[0]" a result of the unit.
"""

from __future__ import annotations

from cost_models.layout import (
    WHOLE,
    Assignment,
    Option,
    boundary,
    dual,
    given_placements,
    options,
    placement,
    produced,
    word,
)
from cost_models.sharding import Edge, Sharding
from ir.backward import differentiable
from ir.errors import PlanError
from ir.graph import Node, Unit

Operand = tuple[str, int]  # node and input number; ("", k) is the unit's k-th result


def _inside(node: Node, module: str) -> bool:
    return node.module == module or node.module.startswith(module + ".")


def _places(unit: Unit) -> dict[str, tuple[Operand, ...]]:
    """What each named place covers."""
    learns = differentiable(unit)
    table: dict[str, list[Operand]] = {}
    modules = dict.fromkeys(
        ".".join(n.module.split(".")[: i + 1])
        for n in unit.nodes if n.module for i in range(n.module.count(".") + 1)
    )  # fmt: skip
    for module in modules:
        mine = [n for n in unit.nodes if _inside(n, module)]
        made = {r for n in mine for r in n.refs()}
        table[f"{module}:in"] = [
            (n.name, i) for n in mine for i, r in enumerate(n.inputs)
            if r not in made and r not in unit.parameter_names and learns[r]
        ]  # fmt: skip
        table[f"{module}:out"] = _readers(unit, mine[-1].name)
    for node in unit.nodes:
        for i, r in enumerate(node.inputs):
            if r not in unit.parameter_names:
                table[f"{node.name}[{i}]"] = [(node.name, i)]
    for i in range(len(unit.outputs)):
        table[f"return[{i}]"] = [("", i)]
    return {place: tuple(found) for place, found in table.items() if found}


def _readers(unit: Unit, ref: str) -> list[Operand]:
    found = [(n.name, i) for n in unit.nodes for i, r in enumerate(n.inputs) if r == ref]
    return found + [("", i) for i, r in enumerate(unit.outputs) if r == ref]


def _wants(unit: Unit, assignment: Assignment) -> dict[Operand, tuple[str, int, int]]:
    """(value, forward target, gradient placement) of every operand that is not a parameter."""
    learns = differentiable(unit)
    wants: dict[Operand, tuple[str, int, int]] = {}
    for node, option in zip(unit.nodes, assignment.chosen):
        for i, (r, at, grad) in enumerate(zip(node.inputs, option.ins, option.grads)):
            if r not in unit.parameter_names:
                wants[node.name, i] = (r, at, grad if learns[r] else at)
    for i, r in enumerate(unit.outputs):
        if r not in unit.parameter_names:
            at = boundary(unit.values[r], assignment.sequence_parallel and learns[r])
            wants["", i] = (r, at, at)
    return wants


def sharding_of(unit: Unit, assignment: Assignment) -> Sharding:
    """Say an assignment in words; `assignment_of` reads it back."""
    made, learns = produced(unit, assignment), differentiable(unit)
    moved: dict[Operand, tuple[tuple[str, str], tuple[str, str]]] = {}
    for operand, (ref, target, grad) in _wants(unit, assignment).items():
        back = dual(made[ref])
        if target != made[ref] or (learns[ref] and grad != back):
            there = (word(made[ref]), word(target))
            moved[operand] = (there, (word(grad), word(back)) if learns[ref] else there[::-1])
    edges, left = [], dict(moved)
    for place, operands in _places(unit).items():
        words = {left.get(o) for o in operands}
        if len(words) == 1 and (only := words.pop()) is not None:
            edges.append(Edge(at=place, forward=only[0], backward=only[1]))
            for o in operands:
                del left[o]
    assert not left
    parameters = tuple((p.name, word(made[p.name])) for p in unit.parameters if p.kind != "buffer")
    return Sharding(parameters=parameters, edges=tuple(edges))


def assignment_of(unit: Unit, sharding: Sharding, tp: int, sequence_parallel: bool) -> Assignment:
    """The assignment that the words say. Raises PlanError where they contradict the unit."""
    table, places = options(unit, tp), _places(unit)
    given = dict(sharding.parameters)
    moved: dict[Operand, Edge] = {}
    for edge in sharding.edges:
        if edge.at not in places:
            raise PlanError(f"edge at {edge.at!r}: {unit.name} has no such place")
        moved.update(dict.fromkeys(places[edge.at], edge))
    made = given_placements(unit, sequence_parallel)
    made |= {p.name: placement(given.get(p.name, "R")) for p in unit.parameters}
    chosen = []
    for node in unit.nodes:
        ins = []
        for i, r in enumerate(node.inputs):
            change = moved.get((node.name, i))
            ins.append(made[r] if change is None else placement(change.forward[1]))
        option = _matching(table[node.name], tuple(ins), node, unit)
        if option is None:
            raise PlanError(
                "the plan's placements fit no way to run an operation",
                where=f"{node.name} {node.source}".strip(),
                why=f"its operands are {', '.join(map(word, ins))}",
                hints=("plan again, or restore the placements and edges of this layer",),
            )
        chosen.append(option)
        made.update(zip(node.refs(), option.outs))
    return Assignment(ways=tp, sequence_parallel=sequence_parallel, chosen=tuple(chosen))


def _matching(
    found: tuple[Option, ...], ins: tuple[int, ...], node: Node, unit: Unit
) -> Option | None:
    """The option with those operands; buffers and other tables may be sliced for free."""
    for option in found:
        if option.ins == ins:
            return option
    buffers = {p.name for p in unit.parameters if p.kind == "buffer"}
    for option in found:
        if all(
            a == b or (b == WHOLE and r in buffers)
            for a, b, r in zip(option.ins, ins, node.inputs)
        ):
            return option
    return None
