"""Clipping gradients by the norm of the whole model's, whatever each rank holds of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ir.errors import PlanError
from ir.graph import Graph


@torch.no_grad()
def clip_grad_norm_(
    modules: Sequence[nn.Module],
    graph: Graph,
    max_norm: float,
    *,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    device_type: str = "cpu",
    elsewhere: Collection[nn.Parameter] = (),
) -> Tensor:
    """Scale this rank's gradients so that the model's have at most `max_norm`; their norm before.

    modules: this rank's stages. elsewhere: copies of what another stage counts. Every rank calls
    it and gets the same number: the norm of the unsharded model's gradients, each tensor counted
    once. Raises PlanError for a norm that is NaN or infinite, if asked to.
    """
    parameters = {p: None for m in modules for p in m.parameters() if p.grad is not None}
    counted = [_gradient(p) for p in _owned(modules, graph, elsewhere)]
    total = _total([g for g, once in counted if once], norm_type, device_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise PlanError(f"the norm of the gradients is {float(total)}",
                        why="clipping would make every gradient NaN or zero")  # fmt: skip
    share = torch.clamp(max_norm / (total + 1e-6), max=1.0)  # as torch.nn.utils does
    for p in parameters:
        local = p.grad._local_tensor if isinstance(p.grad, DTensor) else p.grad
        assert local is not None
        local.mul_(share.to(local.device))
    return total


def _owned(
    modules: Sequence[nn.Module], graph: Graph, elsewhere: Collection[nn.Parameter]
) -> Iterable[nn.Parameter]:
    """Parameters with a gradient that this pipeline rank counts: a tied one with its owner."""
    aliases = {alias for alias, _ in graph.tied}
    found: dict[nn.Parameter, bool] = {}
    for module in modules:
        for name, p in module.named_parameters(remove_duplicate=False):
            if p.grad is not None:
                found[p] = found.get(p, False) or name not in aliases
    others = set(elsewhere)
    return [p for p, counts in found.items() if counts and p not in others]


def _gradient(parameter: nn.Parameter) -> tuple[Tensor, bool]:
    """This rank's part of a gradient, and whether this rank is the one that counts it: of equal
    replicas the first does."""
    grad = parameter.grad
    assert grad is not None
    if not isinstance(grad, DTensor):
        return grad, True
    if any(at.is_partial() for at in grad.placements):
        assert isinstance(parameter, DTensor)
        grad = grad.redistribute(placements=parameter.placements)
    at = grad.device_mesh.get_coordinate() or ()
    first = all(c == 0 for c, held in zip(at, grad.placements) if held.is_replicate())
    return grad._local_tensor, first


def _total(grads: Sequence[Tensor], norm_type: float, device_type: str) -> Tensor:
    """The norm over all ranks of what each counts."""
    norms = [torch.linalg.vector_norm(g.float(), norm_type).to(device_type) for g in grads]
    zero = torch.zeros((), device=device_type)
    mine = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else zero
    if math.isinf(norm_type):
        # a maximum may lose a NaN on the way, a sum does not
        bad = mine.isnan().float()
        mine = mine.nan_to_num(nan=0.0, posinf=math.inf)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        dist.all_reduce(bad)
        return torch.where(bad > 0, torch.full_like(mine, math.nan), mine)
    power = mine**norm_type
    dist.all_reduce(power)
    return power ** (1 / norm_type)
