"""The Python interface: what the command line does, on objects."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.plan import Plan
from planner.plan import load_plan as _load

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

    from planner.check import Checked
    from planner.differ import Diff
    from planner.runtime.parallel import Parallel
    from planner.serving.check import CheckedServing
    from planner.serving.plan import ServingPlan


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
    tensors. fix: pins, "tp=8". workload: seq_len, global_batch, precision, optimizer, engine,
    expert_imbalance.
    Raises as `plan trace` fails: PlanError, UsageError, InfeasibleError.
    """
    from cost_models.fleet import load_any
    from ir.capture import capture_graph
    from ir.capture.module import source_of
    from planner.capturing import Clock
    from planner.decisions import parse_pins
    from planner.objectives import plan_for
    from planner.options import TraceOptions
    from planner.workload import Asked, precision_of

    found, asked = load_any(hardware), Asked(**workload)
    precision, _ = precision_of(asked, found)
    source = source_of(model, inputs, loss, max_seq_len)
    options = TraceOptions(
        model=source.name, hardware=hardware, pins=parse_pins(fix), asked=asked, cache=False
    )
    graph = capture_graph(source, precision=precision)
    return plan_for(graph, options, found, Clock()).plan


def trace_serving(
    model: nn.Module,
    inputs: Callable[[int, int], Any],
    *,
    hardware: str,
    fix: Sequence[str] = (),
    precision: str = "bf16",
    **load: Any,
) -> ServingPlan:
    """Plan how a module is served on hardware that may be elsewhere; the module is not changed.

    inputs: as `trace` takes it. load: prompt, output, batch, engine, objective, allow, allow_kv,
    keep, max_bits, kv_window, kv_policy, max_ttft_s, max_tpot_s. Raises as `plan trace --task
    serve` fails.
    """
    from cost_models.hardware import load_hardware
    from ir.capture import capture_graph
    from ir.capture.module import source_of
    from planner.serving.asked import ServeAsked, parse_serve_pins
    from planner.serving.tracing import plan_serving

    cluster = load_hardware(hardware)
    graph = capture_graph(source_of(model, inputs, None, None), precision=precision)
    asked = ServeAsked(precision=precision, **load)
    return plan_serving(graph, hardware, cluster, asked, parse_serve_pins(fix))[0]


def serve(
    model: nn.Module,
    plan: ServingPlan,
    *,
    weights: str | Path | None = None,
    folder: str | Path | None = None,
    device: str | None = None,
) -> nn.Module:
    """The model under a plan of serving, `generate` and all; see `planner.runtime.serve.apply`."""
    from planner.runtime.serve.apply import serve as apply

    return apply(model, plan, weights=weights, folder=folder, device=device)


def load(path: str | Path) -> Plan | ServingPlan:
    """Read a plan and the graph beside it. Raises PlanError for a file that is no plan."""
    return _load(str(path))


def cost(plan: Plan | ServingPlan) -> Checked | CheckedServing:
    """The plan costed with today's hardware files and constants: `.estimate` of training,
    `.found` of serving, and what moved since it was written."""
    from planner.displays import costed

    return costed(plan)


def diff(old: Plan | ServingPlan, new: Plan | ServingPlan) -> Diff:
    """What changed between two plans, both costed with today's constants.

    Raises UsageError where one is of training and the other of serving.
    """
    from planner.differ import diff as compare
    from planner.displays import costed
    from planner.plan import require_alike
    from planner.serving.check import CheckedServing
    from planner.serving.differ import diff_serving

    require_alike(old, new)
    a, b = costed(old), costed(new)
    if isinstance(a, CheckedServing):
        assert isinstance(b, CheckedServing)
        return diff_serving(a, b)
    assert not isinstance(b, CheckedServing)
    return compare(a, b)


def meta() -> AbstractContextManager[None]:
    """Build a model without its weights: parameters on the meta device, buffers real."""
    from planner.runtime.meta import meta as without_weights

    return without_weights()


def parallelize(
    model: nn.Module, plan: Plan, *, device: str | None = None, compile_backend: str = "inductor",
    folder: str | os.PathLike[str] | None = None,
) -> Parallel:  # fmt: skip
    """Turn a model into what this rank runs under the plan, inside a job that torchrun started.

    model: best built under `planner.meta()`; changed in place. device: "cuda" or "cpu", by default
    the process group's. compile_backend: for plans with compile on. folder: on the disk, or the
    pool, that the plan lays parameters, activations or the optimizer on.
    Raises PlanError (a world of another size), GateError (another model than the plan's).
    """
    from planner.runtime.parallelize import parallelize as apply

    return apply(model, plan, device=device, compile_backend=compile_backend, folder=folder)
