"""Recomputation: a unit's forward, run again in backward instead of keeping what it made.

full keeps a unit's inputs. selective keeps what the plan's graph keeps beside them: the results of
matmuls, attention and convolutions, and of collectives, so that nothing dear is done twice; or
of the matmuls, attention and convolutions those that the plan names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ir import keep
from ir.errors import PlanError
from ir.graph import Unit
from ir.ops import rule
from planner.runtime import gathered, ring  # noqa: F401  their operators
from planner.runtime.context import Context
from planner.runtime.site import Site

Forward = Callable[..., Any]

_ATEN = {
    "gemm": ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_scaled_mm"),
    "grouped_gemm": ("_grouped_mm", "_scaled_grouped_mm"),
    "conv": ("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution"),
    "attention": (
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward",
        "_efficient_attention_forward",
    ),
}  # fmt: skip
_COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "all_gather_into_tensor",
    "all_gather_into_tensor_coalesced", "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced",
    "all_to_all_single", "broadcast", "wait_tensor",
)  # fmt: skip


@functools.cache
def heavy_operations() -> Mapping[Any, str]:
    """What selective recomputation does not repeat, of the operations that compute, and the kind
    of the graph's operation that each is."""
    found = {
        packet.default: kind
        for kind, names in _ATEN.items()
        for packet in (getattr(torch.ops.aten, name, None) for name in names)
        if packet is not None
    }
    for packet in (torch.ops.meshwright_cp.ring, torch.ops.meshwright_cp.gathered):
        found[packet.default] = "attention"
    return found | {getattr(torch.ops.higher_order, "flex_attention", None): "attention"}


@functools.cache
def collective_operations() -> frozenset[Any]:
    """What selective recomputation does not repeat, of the operations that communicate."""
    found = [getattr(torch.ops._c10d_functional, name, None) for name in _COLLECTIVES]
    return frozenset(packet.default for packet in found if packet is not None)


def apply_in_part(sites: Sequence[Site], stage: nn.Module, context: Context) -> None:
    """Patch the forward of every unit that the plan computes again in part: inside what is
    compiled, as a compiler heeds what is kept. Names do not change."""
    classes = {site.unit: None for site in sites if site.recompute == "selective"}
    named = dict(context.plan.decisions.keep)
    # a partial of a function is what torch.compile takes, one for all layers that share a graph
    contexts = {
        unit: functools.partial(Keeps.contexts, Keeps(unit, named.get(unit.name)))
        for unit in classes
    }
    for site in sites:
        if site.recompute == "selective":
            site.module.forward = again(site.module.forward, contexts[site.unit])


def apply_in_full(sites: Sequence[Site], stage: nn.Module, context: Context) -> None:
    """Patch the forward of every unit that the plan computes again whole: around what is compiled,
    as torch 2.13 compiles no checkpoint whose collectives are repeated."""
    for site in sites:
        if site.recompute == "full":
            site.module.forward = again(site.module.forward)


def again(forward: Forward, keeps: Callable[[], Any] | None = None) -> Forward:
    """`forward` under a checkpoint: everything is repeated, or all but what `keeps` says, which
    makes the contexts that torch's checkpoint takes. Random numbers are drawn again as they were.
    """
    full = functools.partial(checkpoint, use_reentrant=False)
    run = functools.partial(full, context_fn=keeps) if keeps else full

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return run(forward, *args, **kwargs)

    return recomputed


class Keeps:
    """What selective recomputation keeps of a unit.

    A checkpoint keeps every result that it does not repeat, also of the last matmuls, which no
    backward reads (a layer's last projection is only added to its input). The graph says how many
    of the last heavy operations these are; how many there are in all is counted as they run, so
    it is right from the second forward on. A wrong count costs memory or a repeated matmul, never
    a wrong result.

    kept: the words of the operations that the plan keeps, None for all of them. They are counted
    as they run: the module must run what its graph has, in that order.
    """

    def __init__(self, unit: Unit, kept: tuple[str, ...] | None = None) -> None:
        self._idle, self._count = keep.idle(unit), len(keep.dear(unit))
        self._unit = unit.name
        self._kinds: tuple[str, ...] = ()  # of the operations that are kept one by one
        self._repeated: frozenset[int] = frozenset()
        if kept is not None:
            ones = keep.keepable(unit)
            again = {n.name for n in keep.repeated(unit, kept)}
            self._kinds = tuple(rule(n).kind for n in ones)
            self._repeated = frozenset(i for i, n in enumerate(ones) if n.name in again)

    def contexts(self) -> Any:
        """The pair that torch's checkpoint takes: what runs around forward, and around its
        repetition."""
        heavy, collectives = heavy_operations(), collective_operations()
        wanted, seen = self._count - self._idle, 0

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            nonlocal seen
            repeated = False
            if op in heavy:
                self._check(seen, heavy[op], op)
                repeated = seen in self._repeated
                seen += 1
                self._count = max(self._count, seen)
            keep = seen <= wanted and not repeated and (op in heavy or op in collectives)
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    def _check(self, place: int, kind: str, op: Any) -> None:
        """Refuse a module that runs another operation than its graph has at this place."""
        planned = self._kinds[place] if place < len(self._kinds) else kind
        if planned != kind:
            raise PlanError(
                f"unit {self._unit} runs {op} where the plan's graph has its {planned}",
                why="what is kept is counted in the order that operations run in",
                hints=("--fix keep=default keeps all of them",),
            )
