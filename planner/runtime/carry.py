"""Values between units: what a unit is given, as this rank's part, and what it gives on.

The model's own forward, between units, sees whole shapes: with tensor parallelism a value that
carries a gradient is a DTensor on the tp mesh, split on the sequence under sequence parallelism.
What carries none (rotary tables, masks, token numbers) stays a plain, whole tensor.

With context parallelism a value with a sequence dimension that a unit made is a DTensor on the cp
mesh, split on it; under sequence parallelism on cp and tp as one axis. Its tokens are in the order
of the ranks' shares, which is the sequence's but for a zigzag. A plain value is whole, and a unit
takes its share of it.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from cost_models.layout import boundary
from ir.graph import Tensor
from planner.runtime.context import Context
from planner.runtime.reshard import gradient_as, placement_of, reshard
from planner.runtime.shares import Shares, shares_of


def unwrap(value: torch.Tensor, spec: Tensor, learns: bool, context: Context) -> torch.Tensor:
    """This rank's part of what a unit is given, a plain tensor.

    spec: the input in the unit's graph. learns: whether it carries a gradient.
    """
    d = context.meshes.decisions
    if d.cp > 1:
        value = _own_tokens(value, spec, context)
    if d.tp > 1 and (learns or isinstance(value, DTensor)):
        at = placement_of(boundary(spec, d.sequence_parallel and learns))
        if not isinstance(value, DTensor):
            value = DTensor.from_local(value, context.meshes.tp, (Replicate(),), run_check=False)
        if value.placements != (at,):
            value = reshard(value, at, gradient_as(value.placements[0]))
        return value.to_local(grad_placements=(at,))
    return value


def wrap(local: torch.Tensor, spec: Tensor, learns: bool, context: Context) -> torch.Tensor:
    """What a unit gives on, from this rank's part of it; the inverse of `unwrap`."""
    d, tokens = context.meshes.decisions, tokens_dim(spec)
    if d.cp > 1 and tokens is not None:
        split = d.tp > 1 and learns and boundary(spec, d.sequence_parallel) >= 0
        mesh = context.meshes.cp_tp if split else context.meshes.cp
        return DTensor.from_local(local, mesh, (Shard(tokens),), run_check=False)
    if d.tp > 1 and learns:
        at = placement_of(boundary(spec, d.sequence_parallel))
        return DTensor.from_local(local, context.meshes.tp, (at,), run_check=False)
    return local


def tokens_dim(spec: Tensor) -> int | None:
    """The dimension that context parallelism splits; none where there are two, as in a mask."""
    found = [i for i, d in enumerate(spec.shape) if d.seq]
    return found[0] if len(found) == 1 else None


def _own_tokens(value: torch.Tensor, spec: Tensor, context: Context) -> torch.Tensor:
    """This cp rank's share of a value: of a whole one a slice; what a unit made is there."""
    at, meshes = tokens_dim(spec), context.meshes
    if isinstance(value, DTensor) and at is not None and value.placements != (Shard(at),):
        value = value.redistribute(placements=(Shard(at),))
    if at is None or isinstance(value, DTensor):
        return leave_cp(value, context)
    shares, rank = shares_of(context.plan), meshes.rank("cp")
    if spec.shape[at].batch:  # batch and sequence in one dimension, the batch outside
        return _within_samples(value, at, shares, rank, context)
    return shares.take(value, at, rank)


def leave_cp(value: torch.Tensor, context: Context) -> torch.Tensor:
    """A value from between units without its cp axis: this rank's tokens, on tp where they were.

    What top-level operations averaged over the tokens is the same on every rank. Gradients are
    averaged over cp in the end, and each rank's has its own tokens' part alone: ways times as
    much of it.
    """
    meshes = context.meshes
    axes = value.device_mesh.mesh_dim_names if isinstance(value, DTensor) else ()
    if not isinstance(value, DTensor) or axes not in (("cp",), ("cp_tp",)):
        return value
    if not value.placements[0].is_shard():
        whole = value.redistribute(placements=(Replicate(),))
        local = whole.to_local(grad_placements=(Replicate(),)).clone()
        if local.requires_grad:
            local.register_hook(lambda grad: grad * meshes.cp.size())
        return local
    local = value.to_local(grad_placements=value.placements)
    if axes == ("cp",):
        return local
    return DTensor.from_local(local, meshes.tp, value.placements, run_check=False)


def _within_samples(
    value: torch.Tensor, at: int, shares: Shares, rank: int, context: Context
) -> torch.Tensor:
    rows = value.unflatten(at, (context.plan.decisions.micro_batch, -1))
    return shares.take(rows, at + 1, rank).flatten(at, at + 1)
