"""Apply a plan to a user's module: the order of the parts, and nothing else.

Pipeline stages, then inside each unit expert, tensor and context parallelism, then recomputation
and offload of activations around it, then compilation, then `fully_shard`. The forward of the
user's modules runs as it is; what a part adds is around it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ir.errors import PlanError
from planner.plan import Plan
from planner.runnable import require_own_forward
from planner.runtime import (
    compiled,
    context_parallel,
    experts,
    narrow,
    offload,
    recompute,
    tensor,
)
from planner.runtime.context import Context, Report
from planner.runtime.data import precision_policy, shard_over_data
from planner.runtime.init import refuse_without_values
from planner.runtime.leaving import settle_at_exit
from planner.runtime.meshes import make_meshes
from planner.runtime.nvme import writable
from planner.runtime.parallel import Parallel
from planner.runtime.pipeline import Stage, split
from planner.runtime.site import Site, find_sites
from planner.runtime.weights import weights_of


def parallelize(
    model: nn.Module, plan: Plan, *, device: str | None = None, compile_backend: str = "inductor",
    folder: str | os.PathLike[str] | None = None,
) -> Parallel:  # fmt: skip
    """Turn a model into what this rank runs under the plan; the process group is there already.

    model: best built under `planner.meta()`; its modules are changed in place. device: "cuda" or
    "cpu", by default the process group's. compile_backend: for plans with compile on. folder: on
    the disk, or the pool, that the plan lays something on.
    Raises PlanError (another world size, no folder), GateError (another model).
    """
    context, stages = begin(model, plan, device, None if folder is None else writable(folder))
    context.folder_of("params")  # refused before anything is changed
    for stage in stages:
        prepare(stage.sites, stage.module, context, compile_backend)
        shard_over_data(stage.module, stage.sites, context.meshes,
                        precision_policy(plan.workload, plan.decisions))  # fmt: skip
        refuse_without_values(stage.module)
    return Parallel(context, stages, plan)


def begin(
    model: nn.Module, plan: Plan, device: str | None = None, folder: Path | None = None
) -> tuple[Context, tuple[Stage, ...]]:
    """The meshes, and the stages of the model that this rank runs, before any part is applied."""
    if not dist.is_initialized():
        raise PlanError(
            "there is no process group",
            hints=("torch.distributed.init_process_group() first", "start with torchrun"),
        )
    require_own_forward(plan)
    settle_at_exit()
    device = device or ("cuda" if dist.get_backend() == "nccl" else "cpu")
    meshes = make_meshes(plan.decisions, device)
    own = plan.decisions.at_data_rank(meshes.rank("dp")).at_pp_rank(meshes.rank("pp"))
    plan = replace(plan, decisions=own)
    sites = find_sites(model, plan)
    weights = weights_of(model, plan.graph.tied)
    context = Context(
        plan=plan, meshes=meshes, report=Report(), weights=weights, folder=folder
    )  # fmt: skip
    in_fp32(model, plan)
    return context, split(model, sites, context)


def in_fp32(model: nn.Module, plan: Plan) -> None:
    """Hold 16-bit parameters in fp32: the optimizer's master. Ties stay tied."""
    if plan.workload.precision == "fp32":
        return
    held: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_floating_point() and p.dtype != torch.float32:
                wide = held.get(p)
                if wide is None:
                    wide = held[p] = nn.Parameter(p.detach().float(), requires_grad=p.requires_grad)
                module._parameters[name] = wide


def prepare(
    sites: Sequence[Site], stage: nn.Module, context: Context, compile_backend: str
) -> None:
    """Everything but data parallelism, for the units of one stage: inner parts first."""
    narrow.apply(sites, stage, context)
    for part in (experts.apply, tensor.apply, context_parallel.apply, recompute.apply_in_part):
        part(sites, stage, context)
    compiled.apply(sites, stage, context, backend=compile_backend)
    recompute.apply_in_full(sites, stage, context)
    offload.apply_activations(sites, stage, context)  # what a compiled graph saves moves as well
    context_parallel.apply_shares(sites, stage, context)
