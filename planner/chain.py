"""Which units a pipeline stage runs, by module path."""

from __future__ import annotations

from collections.abc import Sequence

from cost_models.chain import chain_of, divide
from ir.graph import Graph, Unit


def layer_paths(graph: Graph) -> tuple[str, ...]:
    """Module paths of the layers that a pipeline divides, in order."""
    chain = chain_of(graph)
    return tuple(chain.links[position].path for position in chain.layers)


def layer_units(graph: Graph) -> tuple[Unit, ...]:
    """The classes of those layers, in order of first use."""
    chain = chain_of(graph)
    return tuple(dict.fromkeys(chain.links[position].unit for position in chain.layers))


def stage_units(graph: Graph, stages: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    """Module paths on each global stage, `stages` being its number of layers.

    Units before the first layer are on the first stage; any other unit follows the layer before
    it, so that what comes after the last layer is on the last stage.
    """
    chain = chain_of(graph)
    found = []
    for links in divide(chain, tuple(stages)):
        found.append(tuple(dict.fromkeys(chain.links[i].path for i in links)))
    return tuple(found)
