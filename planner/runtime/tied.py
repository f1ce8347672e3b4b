"""Parameters that several pipeline stages hold: tied weights, and what glue reads everywhere.

Each stage that uses such a parameter has a copy, under the name that its own module has for it.
After backward the copies' gradients are summed, in the order of the stages, so that the copies
get the same update and stay equal; the copy of the first stage is the one that counts in a norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from cost_models.chain import chain_of, divide
from cost_models.schedule import rank_of
from ir.graph import Graph, full_name
from planner.runtime.context import Context
from planner.runtime.pipeline import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """One parameter: (global stage, its name there) of every copy, the first stage's first."""

    copies: tuple[tuple[int, str], ...]


def shared_parameters(graph: Graph, stages: Sequence[int]) -> tuple[Shared, ...]:
    """What more than one stage holds, in the order of the graph's parameters.

    A stage that holds both names of a tie has one tensor for them.
    """
    chain, owners = chain_of(graph), dict(graph.tied)
    held: dict[str, dict[int, str]] = {name: {} for name in graph.parameters}
    for stage, positions in enumerate(divide(chain, tuple(stages))):
        names = [p.name for p in chain.glue.parameters if p.kind == "parameter"]
        for link in (chain.links[i] for i in positions):
            names += [
                full_name(link.path, p.name) for p in link.unit.parameters if p.kind == "parameter"
            ]
        for name in names:
            owner = owners.get(name, name)
            if owner in held:
                held[owner].setdefault(stage, name)
    return tuple(Shared(copies=tuple(at.items())) for at in held.values() if len(at) > 1)


def sum_gradients(stages: Sequence[Stage], context: Context) -> None:
    """Add up the gradients of every shared parameter over its copies; each copy gets the sum."""
    for shared, mine in _mine(stages, context):
        grads = {stage: _local(_grad(parameter)) for stage, parameter in mine.items()}
        found = _exchange(shared, grads, context)
        total = torch.stack([found[stage] for stage, _ in shared.copies]).sum(0)
        for grad in grads.values():
            grad.copy_(total)


def align(stages: Sequence[Stage], context: Context) -> None:
    """Give every copy the first one's values: after an initialisation or a load."""
    with torch.no_grad():
        for shared, mine in _mine(stages, context):
            held = {stage: _local(parameter.detach()) for stage, parameter in mine.items()}
            found = _exchange(shared, held, context)
            for copy in held.values():
                copy.copy_(found[shared.copies[0][0]])


def duplicates(stages: Sequence[Stage], context: Context) -> tuple[nn.Parameter, ...]:
    """Parameters of this rank that count elsewhere: copies, but for each the first stage's."""
    return tuple(
        parameter
        for shared, mine in _mine(stages, context)
        for stage, parameter in mine.items()
        if stage != shared.copies[0][0]
    )


def _mine(
    stages: Sequence[Stage], context: Context
) -> list[tuple[Shared, dict[int, nn.Parameter]]]:
    """Shared parameters of which this rank has a copy, and its copies by stage."""
    d = context.plan.decisions
    if d.pp == 1:
        return []
    held = {stage.index: dict(stage.module.named_parameters(remove_duplicate=False))
            for stage in stages}  # fmt: skip
    found = []
    for shared in shared_parameters(context.plan.graph, d.stages):
        mine = {k: held[k][name] for k, name in shared.copies if k in held}
        if mine:
            found.append((shared, mine))
    return found


def _grad(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _exchange(
    shared: Shared, mine: dict[int, torch.Tensor], context: Context
) -> dict[int, torch.Tensor]:
    """Every copy's tensor by stage: this rank's part, which lies alike on all stages."""
    d, mesh = context.plan.decisions, context.meshes.pp
    group, here = mesh.get_group(), mesh.get_local_rank()
    ranks = {stage: rank_of(d.schedule, d.pp, stage) for stage, _ in shared.copies}
    # parameters and gradients may live on the CPU; what is sent is on the device
    found = {stage: x.to(context.meshes.device_type) for stage, x in mine.items()}
    like, work = next(iter(found.values())), []
    for stage, rank in ranks.items():
        if rank == here:
            others = dict.fromkeys(r for r in ranks.values() if r != here)
            for other in others:
                peer = dist.get_global_rank(group, other)
                work.append(dist.P2POp(dist.isend, found[stage].contiguous(), peer, group))
        else:
            found[stage] = torch.empty_like(like)
            peer = dist.get_global_rank(group, rank)
            work.append(dist.P2POp(dist.irecv, found[stage], peer, group))
    for done in dist.batch_isend_irecv(work) if work else ():
        done.wait()
    return found
