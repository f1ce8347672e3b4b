"""Which forward an engine runs of a model: the model's own, or one with layers of the engine's."""

from __future__ import annotations

from cost_models.engines import load_engine
from ir.graph import Graph
from ir.stacks import as_written, routed


def forward_of(graph: Graph, engine: str) -> Graph:
    """The graph of what the engine runs of a model, given that of any engine's forward of it."""
    written = as_written(graph)
    return routed(written) if load_engine(engine).routes_experts else written
