"""Compilation, a unit at a time: layers of a class share one graph.

What cannot be compiled runs as it is, and says so: in the report, and as a warning.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import InvalidBackend, TorchDynamoException
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ir.errors import PlanError
from planner.routed import routed_modules
from planner.runtime.context import Context
from planner.runtime.site import Site

Forward = Callable[..., Any]
Backend = str | Callable[..., Any]
MOST_WORDS = 120  # characters of a compiler's reason: some print all that they know
SETTINGS = {
    "recompile_limit": 64,  # torch stops at 8, counting all classes and sizes that share a wrapper
    # a mode that a unit's forward enters, under a checkpoint, is a side effect to the compiler;
    # what a unit notes in the report is another, and need not be noted again in backward
    "skip_fwd_side_effects_in_bwd_under_checkpoint": True,
}


# torch 2.13 runs a routed unit's second graph again on all tokens, not on a tp rank's own
# (CheckpointError: 32 rows saved, 64 recomputed; pytorch issue 166926)
AGAIN = "a routed unit that is computed again, under tensor parallelism"


def apply(sites: Sequence[Site], stage: nn.Module, context: Context, *, backend: Backend) -> None:
    """Patch every unit's forward to run compiled, where the plan says so."""
    d = context.plan.decisions
    if not d.compile:
        return
    again = d.tp > 1 and any(full for full, _ in d.recompute)
    for site in sites:
        if again and routed_modules(site.unit):
            _uncompiled(site, context, AGAIN)
            continue
        site.module.forward = compiled(site.module.forward, site, context, backend)


def _uncompiled(site: Site, context: Context, reason: str) -> None:
    context.report.uncompiled[site.unit.name] = reason
    warnings.warn(
        f"{site.path or 'the model'} runs uncompiled, against the plan: {reason}", stacklevel=2
    )


def compiled(forward: Forward, site: Site, context: Context, backend: Backend) -> Forward:
    """`forward` as one graph, two around a routed module; as it is, and reported, from the first
    time that it fails to be."""
    try:
        # shapes are the plan's: another one is another graph, never a symbolic one
        fast = torch.compile(
            forward, backend=backend, dynamic=False, fullgraph=not routed_modules(site.unit)
        )
    except InvalidBackend as fault:
        known = ", ".join(torch._dynamo.list_backends())
        raise PlanError(f"unknown compile_backend {backend!r}", why=f"known: {known}") from fault
    report, ran = context.report, set[str]()
    refused = report.uncompiled

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        # who watches operations (a counter, fake tensors) is to see them, and torch compiles none
        if site.unit.name in refused or is_in_torch_dispatch_mode():
            return forward(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, arrived, (args, kwargs))
        outer, report.running = report.running, True
        try:
            with torch._dynamo.config.patch(SETTINGS):
                result = fast(*args, **kwargs)
            ran.add(site.unit.name)
            return result
        except Exception as fault:
            if site.unit.name in ran and not isinstance(fault, TorchDynamoException):
                raise
            try:
                result = forward(*args, **kwargs)
            except Exception:
                raise fault from None  # not the compiler's
            _uncompiled(site, context, _reason(fault))
            return result
        finally:
            report.running = outer

    return run


def _reason(fault: Exception) -> str:
    lines = [line for line in str(fault).splitlines() if line.strip()]
    name = type(fault).__name__
    return f"{name}: {lines[0].strip()[:MOST_WORDS]}" if lines else name


def arrived(value: Tensor) -> Tensor:
    """The value itself, its collective finished: a graph that is given an unfinished one sends
    gradients the wrong way (torch 2.13)."""
    if isinstance(value, DTensor) and isinstance(value._local_tensor, AsyncCollectiveTensor):
        value._local_tensor = value._local_tensor.trigger_wait()
    return value.wait() if isinstance(value, AsyncCollectiveTensor) else value
