"""Changes of placement that are fixed in both directions."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from cost_models.layout import PARTIAL, WHOLE


def placement_of(at: int) -> Placement:
    """A placement as DTensor says it: a dimension, WHOLE or PARTIAL."""
    return {WHOLE: Replicate(), PARTIAL: Partial()}.get(at) or Shard(at)


class _Reshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: DTensor, to: Placement, back: Placement) -> DTensor:
        ctx.back = back
        moved = x.redistribute(placements=(to,))
        return moved if moved is not x else cast(DTensor, x.view_as(x))

    @staticmethod
    def backward(ctx: Any, grad: DTensor) -> tuple[DTensor, None, None]:
        return grad.redistribute(placements=(ctx.back,)), None, None


def reshard(x: DTensor, to: Placement, back: Placement) -> DTensor:
    """x, now lying as `to`; its gradient, however it arrives, goes on as `back`.

    DTensor's own redistribution takes the gradient to where x lay, which for a partial sum costs
    a collective that the plan does not have, or (a masked partial sum) cannot be done at all.
    """
    if x.placements == (to,) and not x.requires_grad:
        return x
    return cast(DTensor, _Reshard.apply(x, to, back))


def gradient_as(at: Placement) -> Placement:
    """How the gradient of a value that lies so must arrive: whole for a partial sum."""
    return Replicate() if at.is_partial() else at
