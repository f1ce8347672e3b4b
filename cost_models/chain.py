"""The model as a chain of units: what a pipeline divides, and what runs on every stage."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ir.graph import Graph, Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One element of the chain: a module path and the body it runs.

    `cut_reason` is empty where a pipeline may cut after this element, else says why not.
    """

    path: str
    unit: Unit
    is_layer: bool
    cut_reason: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """Links in execution order, and the glue."""

    links: tuple[Link, ...]
    glue: Unit

    @functools.cached_property
    def layers(self) -> tuple[int, ...]:
        """Positions among the links of what a pipeline divides: the layers; every link where
        the model has none in containers."""
        found = tuple(i for i, link in enumerate(self.links) if link.is_layer)
        return found or tuple(range(len(self.links)))

    @functools.cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Each layer's links: itself, and what stands between it and the next layer."""
        ends = (*self.layers[1:], self.layers[-1] + 1)
        return tuple(tuple(range(a, b)) for a, b in zip(self.layers, ends))

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
    """The calls of the root in order; what follows from inputs alone is the glue.

    A cut is legal behind a unit that dominates all behind it: nothing made before it, and made by
    a unit, is read after it.
    """
    calls = [n for n in graph.root.nodes if n.op == "call"]
    made = {r: i for i, call in enumerate(calls) for r in call.refs()}
    last: dict[str, int] = {}
    for i, call in enumerate(calls):
        last.update(dict.fromkeys((r for r in call.inputs if r in made), i))
    paths = [str(call.attr("path")) for call in calls]
    crossing = [
        next(
            (f"{paths[end]} reads the output of {paths[made[r]]} too"
             for r, end in last.items() if made[r] < i < end),
            "",
        )
        for i in range(len(calls))
    ]  # fmt: skip
    repeated = {p for p in paths if paths.count(p) > 1}
    layers = set(graph.layers)
    links = tuple(
        Link(
            path=path, unit=graph.unit_by_name[str(call.attr("unit"))],
            is_layer=path in layers and path not in paths[:i],
            cut_reason=f"{path} runs more than once" if path in repeated else reason,
        )
        for i, (call, path, reason) in enumerate(zip(calls, paths, crossing))
    )  # fmt: skip
    glue = tuple(n for n in graph.root.nodes if n.op != "call")
    read = {r for n in glue for r in n.inputs}
    results = tuple(r for n in glue for r in n.refs() if any(r in c.inputs for c in calls))
    return Chain(
        links=links,
        glue=replace(
            graph.root, name="glue", nodes=glue,
            inputs=tuple((n, t) for n, t in graph.root.inputs if n in read),
            parameters=tuple(p for p in graph.root.parameters if p.name in read),
            outputs=results, saved=results, saved_fused=results, saved_selective=results,
        ),
    )  # fmt: skip


def divide(chain: Chain, stages: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Positions of the links that each global stage runs, `stages` being its layers; what stands
    before the first layer and behind the last goes with the ends."""
    layers, total = chain.layers, len(chain.links)
    firsts, at = [0], 0
    for count in stages[:-1]:
        at += count
        firsts.append(layers[at])
    return tuple(tuple(range(a, b)) for a, b in zip(firsts, [*firsts[1:], total]))
