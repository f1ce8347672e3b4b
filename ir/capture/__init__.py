"""From a model to its graph: the only part of the IR that knows torch.

Importing this package imports no torch: `load.source_key` answers the cache first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ir.errors import PlanError
from ir.graph import Graph

if TYPE_CHECKING:
    from ir.capture.export import Beside
    from ir.capture.load import Source


def capture_graph(
    source: Source, *, precision: str = "bf16", fold: bool = True, beside: Beside | None = None
) -> Graph:
    """Trace, fold and lower a loaded model's training step.

    precision: the floating point type of parameters and inputs while tracing (fp8 traces as
    bf16). fold=False traces every layer: slower, and the proof that folding changed nothing.
    beside: as `trace` takes it.
    """
    from ir.backward import with_saved
    from ir.capture.export import nowhere, sizes_for, trace
    from ir.capture.lower import lower
    from ir.capture.routes import mark_routes
    from ir.join import join_tails

    for name, _ in source.model.named_modules():
        if not name.isprintable() or any(c.isspace() or c in "()" for c in name):
            raise PlanError(
                f"a module is named {name!r}",
                why="a plan names modules by their paths, without white space or parentheses",
                hints=("give it another name in the model",),
            )
    sizes = sizes_for(source.max_seq_len, source.seq_in_input)
    with source.tracing():
        found = trace(
            source.model, source.inputs, source.targets, source.loss, sizes,
            precision=precision, fold=fold, where=source.name,
            beside=beside or nowhere,
        )  # fmt: skip
    graph = lower(found, source.model, source.name)
    for step in (mark_routes, join_tails, with_saved):
        graph = step(graph)
    called = {path for _, path, _ in graph.calls()}
    return replace(
        graph, notes=source.notes, max_seq_len=source.max_seq_len,
        seq_in_input=source.seq_in_input,
        layers=tuple(path for path in found.folding.layers if path in called),
    )  # fmt: skip
