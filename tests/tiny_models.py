"""The examples at their tiny sizes, captured once a session."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from cost_models.decisions import Workload
from cost_models.hardware import Cluster, load_hardware
from cost_models.step import Costs
from ir.graph import Graph
from planner.capturing import capture
from planner.options import TraceOptions
from planner.workload import Asked

EXAMPLES = Path(__file__).parents[1] / "examples"
PRECISION = {"t4": "fp16"}


@functools.cache
def graph_of(name: str, precision: str = "bf16", **args: object) -> Graph:
    """An example's graph, traced or from the session's cache; args go to its factory."""
    words = {"size": "tiny", **{k: str(v) for k, v in args.items()}}
    return capture(
        TraceOptions(
            model=str(EXAMPLES / f"{name}.py"), args=tuple(words.items()), hardware="h100x1",
            asked=Asked(precision=precision),
        )
    )


def with_memory(cluster: Cluster, memory_bytes: int) -> Cluster:
    """The same cluster with another amount of memory on each device."""
    return replace(cluster, device=replace(cluster.device, memory_bytes=memory_bytes))


def costs_of(graph: Graph, hardware: str | Cluster, points=((1, 1),), **workload) -> Costs:
    """Costs of one graph at some (micro-batch, cp) points."""
    cluster = load_hardware(hardware) if isinstance(hardware, str) else hardware
    return Costs(graph=graph, cluster=cluster, workload=Workload(**workload), points=points)
