"""Data parallelism: `fully_shard` in every variant that a plan can hold.

One mechanism for ZeRO 0 to 3 and HSDP. What is sharded is the mesh's "shard" dimension; what a
stage keeps between micro-batches is resharding and synchronisation, set per micro-batch. With
zero = 0 the shard dimension has one rank and gradients are all-reduced over "replicate".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from cost_models.decisions import Decisions, Workload
from cost_models.layout import expert_parameters
from ir.errors import PlanError
from planner.runtime.meshes import Meshes
from planner.runtime.site import Site

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REDUCE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def precision_policy(workload: Workload, d: Decisions) -> MixedPrecisionPolicy:
    """fp32 parameters; compute in the workload's precision; reduce in the gradients' format."""
    if workload.precision not in COMPUTE:
        raise PlanError(
            f"precision {workload.precision} is not run by the native engine",
            hints=("--precision bf16,fp8", "--engine megatron"),
        )
    if workload.precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=COMPUTE[workload.precision], reduce_dtype=REDUCE[d.grad_dtype]
    )


def shard_over_data(
    root: nn.Module, sites: Sequence[Site], meshes: Meshes, policy: MixedPrecisionPolicy
) -> None:
    """Apply `fully_shard` to each unit of a stage, then to the stage itself.

    Parameters of experts are shared by other ranks than the rest, a unit's two groups by one call.
    """
    d = meshes.decisions
    experts = {p for site in sites for p in _experts(site)} if d.ep * d.etp * d.tp > 1 else set()
    over_experts, place = _over_experts(experts, meshes) if experts else (None, None)
    # what lies in files is not pinned: that would be a copy in the host's memory
    pinned = meshes.device_type != "cpu" and d.tiers.get("params", "cpu") == "cpu"
    host = CPUOffloadPolicy(pin_memory=pinned)
    below = {site.module for site in sites if site.below}
    whole = "optimizer" in d.tiers and d.below is None  # the stage itself as well
    reshard = d.zero == 3 and d.reshard
    units = _together([site.module for site in sites if site.module is not root])
    for modules in [*units, [root]]:
        module, hosted = modules[0], whole or all(m in below for m in modules)
        fully_shard(
            modules if len(modules) > 1 else module,
            mesh=meshes.data,
            reshard_after_forward=reshard,
            mp_policy=policy,
            offload_policy=host if hosted else OffloadPolicy(),
            shard_placement_fn=place,
        )
        groups = fully_shard.state(module)._fsdp_param_groups if experts else ()  # type: ignore[attr-defined]
        for group in groups:
            if group.mesh_info is over_experts:
                _average_over_data(group, meshes)
    for site in sites:
        if any(n.op == "stack_view" for n in site.unit.nodes):  # an expert may have no token
            cast(FSDPModule, site.module).set_reduce_scatter_unused_params(True, recurse=False)


def _over_experts(experts: set[nn.Parameter], meshes: Meshes) -> tuple[Any, Any]:
    """FSDP2's description of the experts' data ranks, and what places their parameters there."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import (
            HSDPMeshInfo,
            ShardPlacementResult,
        )
    except ImportError as fault:
        raise PlanError(
            f"torch {torch.__version__} shards a unit's parameters over one mesh only",
            why="experts lie over other ranks than the rest of their layer",
            hints=("torch 2.12 or later", "--fix ep=1 --fix tp=1"),
        ) from fault
    from torch.distributed.tensor import Shard

    mesh = HSDPMeshInfo(meshes.expert_data, shard_mesh_dim=1, replicate_mesh_dim=0)
    placed = ShardPlacementResult(Shard(0), mesh)
    return mesh, lambda parameter: placed if parameter in experts else None


def _together(modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The modules one by one, but those that share parameters in one group, as FSDP2 asks."""
    groups: list[list[nn.Module]] = []
    for module in modules:
        own = set(module.parameters())
        tied = [g for g in groups if any(own & set(m.parameters()) for m in g)]
        rest = [g for g in groups if g not in tied]
        groups = [*rest, [*(m for g in tied for m in g), module]]
    return groups


def _experts(site: Site) -> list[nn.Parameter]:
    return [site.module.get_parameter(name) for name in sorted(expert_parameters(site.unit))]


def _average_over_data(group: Any, meshes: Meshes) -> None:
    """Divide the gradients of experts by the data ranks: one rank's expert has tokens of ep * etp
    ranks, so the sum over edp ranks is over all. Gloo scales no sums: there it is done after."""
    ranks = meshes.decisions.dp * meshes.decisions.cp
    group.gradient_divide_factor = float(ranks)
    shard = group.mesh_info.shard_mesh_size
    group.force_sum_reduction_for_comms = meshes.device_type == "cpu" and shard not in (1, ranks)


def sharded(root: nn.Module) -> list[FSDPModule]:
    """The modules of a stage that gather and reduce, the stage itself first."""
    return [m for m in root.modules() if isinstance(m, FSDPModule)]


def before_microbatch(root: FSDPModule, d: Decisions, last: bool) -> None:
    """Set what a micro-batch gathers, keeps and reduces, by the ZeRO stage (engines.toml).

    To FSDP2 every backward is the last one: else it still has the micro-batch before in mind, and
    prefetches a unit of that, which nothing asks for.
    """
    each = d.zero >= 2 and d.pp == 1
    root.set_requires_gradient_sync(each or last)
    if d.shares:  # replicas on other parts run other numbers of micro-batches, and meet at the last
        root.set_requires_all_reduce(last)
    root.set_reshard_after_backward(last or (d.zero == 3 and d.pp == 1))
