"""The plan's axes as device meshes over the ranks of this job.

Ranks are laid inside out: tp innermost, then cp, then dp, then pp, and outside of pp the last
factor, `dp_outer`, of dp. Where parts of the hardware have another tp each, their stages are meshes
of their own, one part's ranks behind the other's. A data rank is a (dp, cp) pair; `shard`
consecutive data ranks share state, groups of them replicate it. Expert layers lay a stage's ranks
out anew: etp innermost, then ep, then edp.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cost_models.decisions import Decisions
from cost_models.state import ranks_of
from ir.errors import PlanError
from planner.runtime.lines import Line, blocks, lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Meshes:
    """Submeshes that this rank is part of, all one-dimensional but `data` and `expert_data`.

    data: ("replicate", "shard") over the data ranks, what `fully_shard` takes; expert_data: the
    same for parameters of experts. cp_tp: cp and tp as one axis, tp innermost. Sizes of one are
    meshes as well, so nothing is optional. Each is cut once: torch 2.13 compiles no unit in which
    a mesh is cut anew (`device_mesh._get_submesh is not an OpOverload`).

    line: where parts of the hardware have another tp each, the pipeline of this data rank. The
    meshes, pp too, are then of this part's ranks alone, the first_stage of which is told.
    """

    device_type: str
    decisions: Decisions
    root: DeviceMesh  # (pp, replicate, shard, tp)
    expert_root: DeviceMesh  # (pp, expert_replicate, expert_shard, ep, etp)
    axes: DeviceMesh  # (pp, dp, cp, tp): for groups of one axis
    pp: DeviceMesh
    dp: DeviceMesh
    cp: DeviceMesh
    tp: DeviceMesh
    cp_tp: DeviceMesh
    ep: DeviceMesh
    etp: DeviceMesh
    data: DeviceMesh
    expert_data: DeviceMesh
    part: dist.ProcessGroup | None = None  # data ranks of this one's part, where it has a share
    line: Line | None = None
    first_stage: int = 0

    def rank(self, axis: str) -> int:
        """This process's place on an axis: pp, dp, cp, tp, ep or etp."""
        mesh = self.expert_root if axis in ("ep", "etp") else self.axes
        return int(mesh.get_local_rank(axis)) + (self.first_stage if axis == "pp" else 0)

    @property
    def samples(self) -> DeviceMesh:
        """The data ranks that run this one's stage: dp and cp as one axis."""
        return self.dp if self.line is not None else self.axes["dp", "cp"]._flatten()


def _part_group(d: Decisions, axes: DeviceMesh) -> dist.ProcessGroup | None:
    """The data ranks of this rank's part of the hardware, which run as many micro-batches as it;
    None where parts have no shares of their own."""
    mine, at = None, 0
    for share in d.shares:  # every rank makes every group, in one order
        block = axes.mesh[:, at : at + share.dp]
        for ranks in block.permute(0, 3, 1, 2).flatten(2).flatten(0, 1).tolist():
            group = dist.new_group(ranks)
            mine = group if dist.get_rank() in ranks else mine
        at += share.dp
    return mine


def laid_ranks(d: Decisions) -> torch.Tensor:
    """The job's ranks in the order of the axes (pp, dp, cp, tp), the last fastest."""
    places = torch.arange(d.gpus, dtype=torch.int).reshape(d.dp_outer, d.pp, -1)
    return places.transpose(0, 1).reshape(-1)


def make_meshes(d: Decisions, device_type: str) -> Meshes:
    """Build the meshes of these decisions. Raises PlanError where the world has another size."""
    world = dist.get_world_size()
    if world != d.gpus:
        raise PlanError(
            f"this job has {world} processes, the plan {d.gpus}",
            why=f"pp {d.pp} x dp {d.dp} x cp {d.cp} x tp {d.tp}",
            hints=(f"torchrun with {d.gpus} processes",
                   f"plan trace MODEL --hardware NAMEx{world} --base plan.json"),
        )  # fmt: skip
    if d.tp_by_part:
        return _by_part(d, device_type)
    order = tuple(laid_ranks(d).tolist()) if d.dp_outer > 1 else None
    return _cut(d, device_type, *_roots(d, device_type, order))


def _roots(
    d: Decisions, device_type: str, order: tuple[int, ...] | None
) -> tuple[DeviceMesh, DeviceMesh, DeviceMesh]:
    """`Meshes.root`, `expert_root` and `axes` over these ranks, or all; every rank makes them."""
    dense, expert = ranks_of(d, False), ranks_of(d, True)
    lay = functools.partial(_mesh, dist.group.WORLD, device_type, order)
    root = lay((
        ("pp", d.pp), ("replicate", dense.replicas), ("shard", dense.shard), ("tp", d.tp),
    ))  # fmt: skip
    expert_root = lay((
        ("pp", d.pp), ("expert_replicate", expert.replicas), ("expert_shard", expert.shard),
        ("ep", d.ep), ("etp", d.etp),
    ))  # fmt: skip
    return root, expert_root, lay((("pp", d.pp), ("dp", d.dp), ("cp", d.cp), ("tp", d.tp)))


def _cut(
    d: Decisions, device_type: str, root: DeviceMesh, expert_root: DeviceMesh, axes: DeviceMesh
) -> Meshes:
    return Meshes(
        device_type=device_type, decisions=d, root=root, expert_root=expert_root, axes=axes,
        pp=axes["pp"], dp=axes["dp"], cp=axes["cp"], tp=root["tp"],
        cp_tp=axes["cp", "tp"]._flatten() if d.cp > 1 and d.tp > 1 else axes["cp"],
        ep=expert_root["ep"], etp=expert_root["etp"], data=root["replicate", "shard"],
        expert_data=expert_root["expert_replicate", "expert_shard"],
        part=_part_group(d, axes),
    )  # fmt: skip


def _by_part(d: Decisions, device_type: str) -> Meshes:
    """The meshes of this rank's part, and its pipeline over all parts. Every rank makes every
    part's groups, in one order."""
    rank, every = dist.get_rank(), lines(d)
    groups = [_line_group(dist.group.WORLD, sum(line, ())) for line in every]
    laid = [(own, ranks, _roots(own, device_type, ranks)) for own, ranks in blocks(d)]
    own, _, roots = next(row for row in laid if rank in row[1])
    meshes = _cut(own, device_type, *roots)
    data = meshes.rank("dp")
    stage = next(k for k, ranks in enumerate(every[data]) if rank in ranks)
    return replace(
        meshes, decisions=d.at_pp_rank(stage), first_stage=stage - meshes.rank("pp"),
        line=Line(
            ranks=every[data], stage=stage, rank=meshes.rank("tp"), split=d.sequence_parallel,
            group=groups[data],
        ),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _line_group(world: dist.ProcessGroup, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """A group of these ranks of the world, one for all that ask."""
    group = dist.new_group(list(ranks))
    return group


@functools.lru_cache(maxsize=64)
def _mesh(
    world: dist.ProcessGroup, device_type: str, order: tuple[int, ...] | None,
    axes: tuple[tuple[str, int], ...],
) -> DeviceMesh:  # fmt: skip
    """The world's ranks over axes of these sizes, in this order or their own; one mesh for all
    that ask, for each has process groups of its own."""
    names, sizes = tuple(name for name, _ in axes), tuple(size for _, size in axes)
    if order is None:
        return init_device_mesh(device_type, sizes, mesh_dim_names=names)
    return DeviceMesh(device_type, torch.tensor(order).reshape(sizes), mesh_dim_names=names)
