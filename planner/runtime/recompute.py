"""Recomputation: a unit's forward, run again in backward instead of keeping what it made.

full keeps a unit's inputs. selective keeps what the plan's graph keeps beside them: the results of
matmuls, attention and convolutions, and of collectives, so that nothing dear is done twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ir.backward import feeds_backward
from ir.graph import AFTER, Unit
from ir.ops import rule
from planner.runtime import gathered, ring  # noqa: F401  their operators
from planner.runtime.context import Context
from planner.runtime.site import Site

Forward = Callable[..., Any]
_HEAVY_KINDS = ("gemm", "grouped_gemm", "attention", "conv")  # one operation of torch each

_ATEN = (
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_scaled_mm", "_grouped_mm",
    "_scaled_grouped_mm", "convolution", "_convolution", "cudnn_convolution",
    "mkldnn_convolution", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward", "_efficient_attention_forward",
)  # fmt: skip
_COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "all_gather_into_tensor",
    "all_gather_into_tensor_coalesced", "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced",
    "all_to_all_single", "broadcast", "wait_tensor",
)  # fmt: skip


@functools.cache
def heavy_operations() -> frozenset[Any]:
    """What selective recomputation does not repeat, of the operations that compute."""
    found = [getattr(torch.ops.aten, name, None) for name in _ATEN]
    flex = getattr(torch.ops.higher_order, "flex_attention", None)
    found += [torch.ops.meshwright_cp.ring, torch.ops.meshwright_cp.gathered]
    return frozenset({packet.default for packet in found if packet is not None} | {flex})


@functools.cache
def collective_operations() -> frozenset[Any]:
    """What selective recomputation does not repeat, of the operations that communicate."""
    found = [getattr(torch.ops._c10d_functional, name, None) for name in _COLLECTIVES]
    return frozenset(packet.default for packet in found if packet is not None)


def apply_in_part(sites: Sequence[Site], stage: nn.Module, context: Context) -> None:
    """Patch the forward of every unit that the plan computes again in part: inside what is
    compiled, as a compiler heeds what is kept. Names do not change."""
    classes = {site.unit: None for site in sites if site.recompute == "selective"}
    # a partial of a function is what torch.compile takes, one for all layers that share a graph
    contexts = {unit: functools.partial(Keeps.contexts, Keeps(unit)) for unit in classes}
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
    """

    def __init__(self, unit: Unit) -> None:
        read = feeds_backward(unit)
        own = [n for n in unit.nodes if n.module.partition(".")[0] != AFTER]
        heavy = [n for n in own if rule(n).kind in _HEAVY_KINDS]
        needed = [any(read[r] for r in n.refs()) for n in heavy]
        self._idle = next((i for i, need in enumerate(reversed(needed)) if need), len(needed))
        self._count = len(needed)

    def contexts(self) -> Any:
        """The pair that torch's checkpoint takes: what runs around forward, and around its
        repetition."""
        heavy, collectives = heavy_operations(), collective_operations()
        wanted, seen = self._count - self._idle, 0

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            nonlocal seen
            if op in heavy:
                seen += 1
                self._count = max(self._count, seen)
            keep = seen <= wanted and (op in heavy or op in collectives)
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)
