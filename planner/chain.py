"""Which units a pipeline stage runs, by module path."""

from __future__ import annotations

from collections.abc import Sequence

from cost_models.chain import chain_of
from ir.graph import Graph


def layer_paths(graph: Graph) -> tuple[str, ...]:
    """Module paths of the layers that a pipeline divides, in order."""
    chain = chain_of(graph)
    return tuple(chain.links[position].path for position in chain.layers)


def stage_units(graph: Graph, stages: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    """Module paths on each global stage, `stages` being its number of layers.

    Units before the first layer are on the first stage; any other unit follows the layer before
    it, so that what comes after the last layer is on the last stage.
    """
    owner = [stage for stage, count in enumerate(stages) for _ in range(count)]
    units: list[dict[str, None]] = [{} for _ in stages]
    layers = 0
    for link in chain_of(graph).links:
        layers += link.is_layer
        last = len(stages) - 1 if layers == len(owner) else owner[max(layers - 1, 0)]
        stage = owner[layers - 1] if link.is_layer else (last if layers else 0)
        units[stage].setdefault(link.path)
    return tuple(tuple(paths) for paths in units)
