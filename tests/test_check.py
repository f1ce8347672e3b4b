"""The checker: a captured graph is legal, and each way of breaking one is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ir.capture import capture_graph
from ir.capture.load import load
from ir.check import check_graph
from ir.errors import PlanError
from ir.graph import Graph, Node, Tensor, Unit, dim

EXAMPLES = Path(__file__).parents[1] / "examples"


@cache
def llama() -> Graph:
    return capture_graph(load(str(EXAMPLES / "llama.py"), {"size": "tiny"}))


def layer(change: Callable[[Unit], dict[str, Any]]) -> Graph:
    """The graph with its layer class changed."""
    graph = llama()
    units = tuple(replace(u, **change(u)) if u.name == "u1" else u for u in graph.units)
    return replace(graph, units=units)


def root(change: Callable[[Node], Node]) -> Graph:
    graph = llama()
    nodes = tuple(change(n) if n.op == "call" else n for n in graph.root.nodes)
    return replace(graph, root=replace(graph.root, nodes=nodes))


def node_with(unit: Unit, name: str, **changes: Any) -> tuple[Node, ...]:
    """The unit's nodes, the first of an op changed."""
    at = next(i for i, n in enumerate(unit.nodes) if n.op == name)
    return (*unit.nodes[:at], replace(unit.nodes[at], **changes), *unit.nodes[at + 1 :])


WIDE = (Tensor(shape=(dim(2), dim(3), dim(65)), dtype="bf16"),)
FLOAT5 = Tensor(shape=(dim(2),), dtype="f5")
BROKEN: dict[str, tuple[Callable[[], Graph], str]] = {
    "order": (lambda: layer(lambda u: {"nodes": u.nodes[::-1]}), "before it is made"),
    "type": (
        lambda: layer(lambda u: {"inputs": tuple((n, FLOAT5) for n, _ in u.inputs)}),
        "unknown type f5",
    ),
    "twice": (lambda: layer(lambda u: {"nodes": (*u.nodes, u.nodes[-1])}), "is made twice"),
    "result": (lambda: layer(lambda u: {"outputs": ("nowhere",)}), "returns nowhere"),
    "saved": (lambda: layer(lambda u: {"saved": ("ghost",)}), "saved ghost, which is not made"),
    "gradient": (lambda: layer(lambda u: {"diff_inputs": ("in9",)}), "in9 carries a gradient"),
    "rule": (lambda: layer(lambda u: {"nodes": node_with(u, "silu", op="fft")}), "has no rule"),
    "sizes": (
        lambda: layer(lambda u: {"nodes": node_with(u, "silu", outputs=WIDE)}),
        "silu cannot spread a dimension of",
    ),
    "letters": (
        lambda: layer(lambda u: {"nodes": node_with(u, "linear", outputs=WIDE)}),
        "factor n is 64 and 65",
    ),
    "ranks": (
        lambda: layer(lambda u: {
            "nodes": node_with(u, "attention", inputs=(u.inputs[0][0],) * 3)}),
        "attention has letters",
    ),
    "unit": (
        lambda: root(lambda n: replace(n, attrs=(("path", n.attr("path")), ("unit", "u77")))),
        "u77, which is no unit",
    ),
    "call": (lambda: root(lambda n: replace(n, inputs=n.inputs[:0])), "gives nothing to"),
    "layer": (lambda: replace(llama(), layers=("layers.9",)), "layers.9 is never called"),
    "names": (lambda: replace(llama(), units=llama().units * 2), "two units have one name"),
    "tie": (lambda: replace(llama(), tied=(("a", "b"),)), "tied to b, which is no parameter"),
}  # fmt: skip


def test_a_captured_graph_is_legal() -> None:
    check_graph(llama())


@pytest.mark.parametrize("case", list(BROKEN))
def test_what_is_broken_is_named(case: str) -> None:
    make, words = BROKEN[case]
    with pytest.raises(PlanError) as caught:
        check_graph(make())
    assert any(word in caught.value.why for word in words.split("|")), caught.value.why
    assert "is not legal" in caught.value.what
