"""What crosses a pipeline cut: values made before it that are read behind it.

A stage runs the model's own forward, with the units of other stages stubbed. It is left where the
next stage's first unit is called, with what that unit is given; the next stage goes on there. So
whatever crosses must be given to that unit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.chain import Link, chain_of
from ir.graph import AFTER, Graph, Node, Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """One value. place: among the tensors that the unit behind the cut is called with.

    result: among what the unit before the cut returns; None where top-level operations made it.
    """

    place: int
    result: int | None
    tensor: Tensor
    learns: bool


def first_links(graph: Graph, stages: Sequence[int]) -> tuple[int, ...]:
    """The position among the links of each stage's first unit; stages: layers of each."""
    layers, at, found = chain_of(graph).layers, 0, [0]
    for count in stages[:-1]:
        at += count
        found.append(layers[at])
    return tuple(found)


def given_places(call: Node, link: Link) -> dict[str, int]:
    """Top-level values that a unit's module is called with, by place among its tensors."""
    return {
        ref: int(name[2:])
        for ref, (name, _) in zip(call.inputs, link.unit.inputs)
        if name.startswith("in") and name[2:].isdigit()
    }


def has_tail(link: Link) -> bool:
    """Whether top-level operations joined the unit."""
    return any(n.module == AFTER for n in link.unit.nodes)


@functools.cache
def crossings(graph: Graph, position: int) -> tuple[Crossing, ...]:
    """What crosses the cut before the link at that position, by place."""
    calls, chain = _calls(graph), chain_of(graph)
    link, before = chain.links[position], chain.links[position - 1]
    made = calls[position - 1].refs() if not has_tail(before) else ()
    places, names = given_places(calls[position], link), _names(calls[position], link)
    return tuple(
        Crossing(
            place=places[ref], result=made.index(ref) if ref in made else None,
            tensor=link.unit.values[names[ref]], learns=names[ref] in link.unit.diff_inputs,
        )
        for ref in sorted(_crossing(graph, position), key=lambda r: places[r])
    )  # fmt: skip


@functools.cache
def stub_fault(graph: Graph) -> str | None:
    """Why a pipeline cannot run this model by stubs; None where it can, at any of its cuts."""
    calls, chain = _calls(graph), chain_of(graph)
    if not chain.links:
        return "the model has no units"
    paths = [link.path for link in chain.links]
    for position in chain.layers[1:]:
        path = paths[position]
        places = given_places(calls[position], chain.links[position])
        for ref, maker in _crossing(graph, position).items():
            if ref not in places:
                return f"what {paths[maker]} makes is read behind {path}, which is not given it"
        twice = set(paths[:position]) & set(paths[position:])
        if twice:
            return f"{min(twice)} runs before and behind {path}"
    for call, link in zip(calls, chain.links[: chain.layers[-1]]):
        shape = str(call.attr("returns") or "")
        if shape.startswith("?"):
            return f"{link.path} returns a {shape[1:]}, which a stub cannot make"
        if shape and has_tail(link):
            return f"{link.path} returns several values, some read between the units"
    return None


def _calls(graph: Graph) -> list[Node]:
    return [n for n in graph.root.nodes if n.op == "call"]


def _names(call: Node, link: Link) -> dict[str, str]:
    """The unit's own names of the top-level values that it is given."""
    return {ref: name for ref, (name, _) in reversed(list(zip(call.inputs, link.unit.inputs)))}


def _crossing(graph: Graph, position: int) -> dict[str, int]:
    """Values made before a link and read there, behind it, or by the caller: who makes each."""
    spans = _spans(graph)
    return {ref: made for ref, (made, last) in spans.items() if made < position <= last}


@functools.cache
def _spans(graph: Graph) -> dict[str, tuple[int, int]]:
    """Of each value that a call makes, which one, and the last that reads it; the caller is behind
    all. What nothing reads has 0."""
    calls = _calls(graph)
    last = {ref: i for i, call in enumerate(calls) for ref in call.inputs}
    last |= dict.fromkeys(graph.root.outputs, len(calls))
    return {ref: (i, last.get(ref, 0)) for i, call in enumerate(calls) for ref in call.refs()}
