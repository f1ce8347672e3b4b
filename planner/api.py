"""The Python interface: what the command line does, on objects."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.plan import Plan
from planner.plan import load as _load

if TYPE_CHECKING:
    from torch import nn

    from planner.differ import Diff


def trace(
    model: nn.Module,
    inputs: Callable[[int, int], Any],
    *,
    hardware: str,
    fix: Sequence[str] = (),
    loss: Callable[[Any, Any], Any] | None = None,
    max_seq_len: int | None = None,
    **workload: Any,
) -> Plan:
    """Plan a module on hardware that may be elsewhere; the module is not changed.

    inputs(batch, seq_len) gives keyword arguments (a dict) or positional ones (a tuple) of
    tensors. fix: pins, "tp=8". workload: seq_len, global_batch, precision, optimizer, engine.
    Raises as `plan trace` fails: PlanError, UsageError, InfeasibleError.
    """
    from cost_models.hardware import load_hardware
    from ir.capture import capture_graph
    from planner.decisions import parse_pins
    from planner.options import TraceOptions
    from planner.tracing import Clock, plan_graph
    from planner.workload import Asked, precision_of

    cluster, asked = load_hardware(hardware), Asked(**workload)
    precision, _ = precision_of(asked, cluster)
    source = _source(model, inputs, loss, max_seq_len)
    options = TraceOptions(
        model=source.name, hardware=hardware, pins=parse_pins(fix), asked=asked, cache=False
    )
    graph = capture_graph(source, precision=precision)
    return plan_graph(graph, options, cluster, Clock()).plan


def _source(
    model: nn.Module,
    inputs: Callable[[int, int], Any],
    loss: Callable[[Any, Any], Any] | None,
    max_seq_len: int | None,
) -> Any:
    """The module as the capture takes it: a copy whose parameters and buffers are on meta."""
    import torch

    from ir.capture.load import Source
    from ir.capture.meta import move_to_meta, tracing

    memo: dict[int, Any] = {}
    for p in model.parameters():
        empty = torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        memo[id(p)] = empty
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    twin = copy.deepcopy(model, memo)
    move_to_meta(twin)
    config = getattr(model, "config", None)
    longest = max_seq_len or getattr(config, "max_position_embeddings", None)
    context: Callable[[], Any] = tracing
    notes: tuple[str, ...] = ()
    if config is not None and hasattr(config, "model_type"):
        from ir.capture import hf

        context, notes = hf.adapt(twin)
    return Source(
        model=twin, name=type(model).__name__, key="", kind="file", task="other", inputs=inputs,
        targets=None, loss=loss, max_seq_len=longest, seq_in_input=_has_sequence(inputs),
        notes=notes, tracing=context,
    )  # fmt: skip


def _has_sequence(inputs: Callable[[int, int], Any]) -> bool:
    """Whether inputs(batch, seq_len) depends on seq_len."""
    import torch.utils._pytree as pytree

    def shapes(seq_len: int) -> list[Any]:
        return [tuple(getattr(x, "shape", ())) for x in pytree.tree_leaves(inputs(2, seq_len))]

    return shapes(16) != shapes(32)


def load(path: str | Path) -> Plan:
    """Read a plan and the graph beside it. Raises PlanError for a file that is no plan."""
    return _load(str(path))


def diff(old: Plan, new: Plan) -> Diff:
    """What changed between two plans, both costed with today's constants."""
    from planner.check import examine
    from planner.differ import diff as compare

    return compare(examine(old, Path()), examine(new, Path()))
