"""How one op may be laid over the tp axis: options that follow from its factors.

A placement is an int: a tensor dimension the value is split on, WHOLE, or PARTIAL. Every legal
option of an op comes from its letters: split a factor wherever it stands; an operand without it
is whole, and its gradient a partial sum; a result without it is a partial sum.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ir.backward import differentiable, storage_roots
from ir.graph import Dim, Node, Tensor, Unit
from ir.ops import rule
from ir.ops.base import Letters

WHOLE, PARTIAL = -1, -2
ROUTING = (
    "index", "sort", "gather", "cumsum", "histogram", "scatter", "one_hot", "topk", "create",
    "compare", "remainder", "view", "cast", "index_put",
)  # fmt: skip
ON_EXPERTS = ("dispatch", "combine", "grouped_matmul", "expert_bias")


def word(placement: int) -> str:
    """DTensor's word for a placement."""
    return {WHOLE: "R", PARTIAL: "P"}.get(placement, f"S({placement})")


def placement(text: str) -> int:
    """The placement of a word; the inverse of `word`."""
    return {"R": WHOLE, "P": PARTIAL}.get(text) if text in "RP" else int(text[2:-1])  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Option:
    """Placements of a node's inputs, of its outputs, and of its inputs' gradients."""

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    grads: tuple[int, ...]


def _splits(size: Dim, ways: int) -> bool:
    """Whether `ways` ranks can share a dimension: constants must divide, sequences are checked
    where the mesh is chosen, a pure batch dimension is data parallelism's."""
    if size.seq:
        return True
    return not size.batch and size.at(1, 1) % ways == 0 and size.at(1, 1) > 1


def _place(letters: Letters, factor: str) -> int:
    return letters.index(factor) if factor in letters else WHOLE


def _by_factor(node: Node, ins: tuple[Tensor, ...], factor: str, ways: int) -> Option | None:
    spec = rule(node).spec(node, ins)
    places = [_place(x, factor) for x in spec.inputs]
    for i, (at, tensor) in enumerate(zip(places, ins)):
        if at >= 0 and not _splits(tensor.shape[at], ways):
            heads = tensor.shape[at].at(1, 1) if tensor.shape[at].is_constant else 0
            # fewer key heads than ranks: each rank reads its own of the whole
            if node.op == "attention" and i in (1, 2) and heads and ways % heads == 0:
                places[i] = WHOLE
            else:
                return None
    outs = []
    for letters, tensor in zip(spec.outputs, node.outputs):
        at = _place(letters, factor)
        if at >= 0 and not _splits(tensor.shape[at], ways):
            return None
        outs.append(at if at >= 0 else PARTIAL)
    if node.op == "cross_entropy" and factor == "v":
        outs[0] = WHOLE  # its own small all-reduces are in its cost
    grads = [at if at >= 0 else PARTIAL for at in places]
    if node.op == "linear" and outs == [PARTIAL]:
        grads[2:] = [WHOLE] * len(grads[2:])  # a bias is added once: to one rank's part of the sum
    return Option(tuple(places), tuple(outs), tuple(grads))


def _token_local(node: Node, ins: tuple[Tensor, ...]) -> Option:
    """Routing of a shard's own tokens: everything with a token dimension is split on it."""

    def place(t: Tensor) -> int:
        return next((i for i, d in enumerate(t.shape) if d.seq), WHOLE)

    given = tuple(place(t) for t in ins)
    return Option(given, tuple(place(t) for t in node.outputs), given)


@functools.cache
def expert_parameters(unit: Unit) -> frozenset[str]:
    """Parameters that lie over the expert axes: those that grouped matmuls read, views of them,
    and every one of a stack of experts."""
    ops = ("grouped_matmul", "expert_bias")
    roots = storage_roots(unit)
    stacks = {n.name: n.inputs for n in unit.nodes if n.op == "stack_view"}
    asked = [r for n in unit.nodes if n.op in ops for r in n.inputs]
    read = {roots[x] for r in asked for x in stacks.get(r, (r,))}
    return frozenset(read & unit.parameter_names)


@functools.cache
def options(unit: Unit, ways: int) -> dict[str, tuple[Option, ...]]:
    """Every node's options on a tp axis of that many ranks; the whole one first.

    Expert ops take their tokens split: tp ranks hold distinct tokens there, and experts lie over
    the ep and etp axes, which cover tp.
    """
    routed = {n.module for n in unit.nodes if n.op in ("dispatch", "combine", "grouped_matmul")}
    experts, roots = expert_parameters(unit), storage_roots(unit)
    table: dict[str, tuple[Option, ...]] = {}
    for node in unit.nodes:
        ins = tuple(unit.values[r] for r in node.inputs)
        if node.op in ON_EXPERTS and ways > 1:
            table[node.name] = (_token_local(node, ins),)
            continue
        whole = Option((WHOLE,) * len(ins), (WHOLE,) * len(node.outputs), (WHOLE,) * len(ins))
        found = [whole]
        on_experts = any(roots[r] in experts for r in node.inputs)
        # what is made from nothing is made whole: a slice of it is free
        if ways > 1 and ins and not on_experts:
            spec = rule(node).spec(node, ins)
            letters = dict.fromkeys(x for word in (*spec.inputs, *spec.outputs) for x in word)
            for factor in letters:
                if factor.startswith("!"):
                    continue
                option = _by_factor(node, ins, factor, ways)
                if option is not None and option.ins not in [o.ins for o in found]:
                    found.append(option)
            if node.module in routed and node.op in ROUTING:
                local = _token_local(node, ins)
                found += [local] if local.ins not in [o.ins for o in found] else []
        table[node.name] = tuple(found)
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One option for each node of a unit, on `ways` tp ranks, its boundary split on the sequence
    (sequence parallelism) or whole."""

    ways: int
    sequence_parallel: bool
    chosen: tuple[Option, ...]  # in the order of the unit's nodes
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # assignments are keys of every cost cache: hash their options once
        value = hash((self.ways, self.sequence_parallel, self.chosen))
        object.__setattr__(self, "_hash", value)

    def __hash__(self) -> int:
        return self._hash

    def of(self, unit: Unit) -> dict[str, Option]:
        return {n.name: o for n, o in zip(unit.nodes, self.chosen)}


def boundary(tensor: Tensor, sequence_parallel: bool) -> int:
    """How a value lies between units: split on the sequence, or whole."""
    if sequence_parallel and len(tensor.shape) >= 2:
        return next((i for i, d in enumerate(tensor.shape) if d.seq), WHOLE)
    return WHOLE


def given_placements(unit: Unit, sequence_parallel: bool) -> dict[str, int]:
    """Placements of a unit's inputs: what carries a gradient follows the boundary."""
    return {
        name: boundary(t, sequence_parallel) if name in unit.diff_inputs else WHOLE
        for name, t in unit.inputs
    }


@functools.lru_cache(maxsize=1024)
def produced(unit: Unit, assignment: Assignment) -> Mapping[str, int]:
    """The placement of every value where it is made; parameters where they are read first."""
    table = given_placements(unit, assignment.sequence_parallel)
    for node, option in zip(unit.nodes, assignment.chosen):
        for ref, at in zip(node.inputs, option.ins):
            if ref in unit.parameter_names and table.get(ref, WHOLE) == WHOLE:
                table[ref] = at
        table.update(zip(node.refs(), option.outs))
    for p in unit.parameters:
        table.setdefault(p.name, WHOLE)
    return MappingProxyType(table)


@dataclass(frozen=True, slots=True)
class Move:
    """A value changes placement between where it is made and where it is read."""

    ref: str
    source: int
    target: int
    readers: tuple[str, ...]  # nodes; "" is the unit's result


def dual(at: int) -> int:
    """How the gradient of a value must arrive: whole for a partial sum, else as the value."""
    return WHOLE if at == PARTIAL else at


def collective(source: int, target: int) -> str:
    """The collective that takes one placement to another; empty where a slice will do."""
    if source in (target, WHOLE):
        return ""
    if source == PARTIAL:
        return "all_reduce" if target == WHOLE else "reduce_scatter"
    return "all_gather" if target == WHOLE else "all_to_all"


def moves(unit: Unit, assignment: Assignment) -> tuple[tuple[Move, ...], tuple[Move, ...]]:
    """(forward, backward) changes of placement, each target of a value once.

    Gradients that arrive at a value in one placement from several readers are added before they
    move, as their forward was shared.
    """
    made = produced(unit, assignment)
    learns = differentiable(unit)
    forward: dict[tuple[str, int], list[str]] = {}
    backward: dict[tuple[str, int], list[str]] = {}

    def note(ref: str, target: int, grad: int, reader: str) -> None:
        if target != made[ref]:
            forward.setdefault((ref, target), []).append(reader)
        if learns[ref] and grad != dual(made[ref]):
            backward.setdefault((ref, grad), []).append(reader)

    for node, option in zip(unit.nodes, assignment.chosen):
        for ref, target, grad in zip(node.inputs, option.ins, option.grads):
            if ref not in unit.parameter_names:
                note(ref, target, grad, node.name)
    for ref in unit.outputs:
        if ref not in unit.parameter_names:
            target = boundary(unit.values[ref], assignment.sequence_parallel and learns[ref])
            note(ref, target, target, "")
    return (
        tuple(Move(r, made[r], t, tuple(who)) for (r, t), who in forward.items()),
        tuple(Move(r, g, dual(made[r]), tuple(who)) for (r, g), who in backward.items()),
    )
