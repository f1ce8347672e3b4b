"""Data parallelism: `fully_shard` in every variant that a plan can hold.

One mechanism for ZeRO 0 to 3 and HSDP. What is sharded is the mesh's "shard" dimension; what a
stage keeps between micro-batches is resharding and synchronisation, set per micro-batch. With
zero = 0 the shard dimension has one rank and gradients are all-reduced over "replicate".
"""

from __future__ import annotations

from collections.abc import Sequence

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
            hints=("--precision bf16", "--engine megatron, and plan export"),
        )
    if workload.precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=COMPUTE[workload.precision], reduce_dtype=REDUCE[d.grad_dtype]
    )


def shard_over_data(
    root: nn.Module, sites: Sequence[Site], meshes: Meshes, policy: MixedPrecisionPolicy
) -> None:
    """Apply `fully_shard` to each unit of a stage, then to the stage itself."""
    d = meshes.decisions
    offload = (
        CPUOffloadPolicy(pin_memory=meshes.device_type != "cpu")
        if dict(d.offload).get("params") == "cpu"
        else OffloadPolicy()
    )
    reshard = d.zero == 3 and d.reshard
    for module in [*(site.module for site in sites if site.module is not root), root]:
        fully_shard(
            module,
            mesh=meshes.data,
            reshard_after_forward=reshard,
            mp_policy=policy,
            offload_policy=offload,
        )


def sharded(root: nn.Module) -> list[FSDPModule]:
    """The modules of a stage that gather and reduce, the stage itself first."""
    return [m for m in root.modules() if isinstance(m, FSDPModule)]


def before_microbatch(root: FSDPModule, d: Decisions, last: bool) -> None:
    """Set what a micro-batch gathers, keeps and reduces, by the ZeRO stage (engines.toml)."""
    each = d.zero >= 2 and d.pp == 1
    root.set_is_last_backward(last)
    root.set_requires_gradient_sync(each or last)
    root.set_reshard_after_backward(last or (d.zero == 3 and d.pp == 1))
