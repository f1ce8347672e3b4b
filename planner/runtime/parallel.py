"""A model under a plan on this rank: run a step, move weights in and out, clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree

from ir.errors import PlanError
from planner.runtime.context import Context, Report
from planner.runtime.data import before_microbatch
from planner.runtime.pipeline import Stage

LossFn = Callable[[Any, Any], Tensor]


class Parallel:
    """What `parallelize` returns. modules: this rank's sharded modules, one a pipeline stage;
    their parameters keep the names that they have in the user's model."""

    def __init__(self, context: Context, stages: tuple[Stage, ...]) -> None:
        self._context, self._stages = context, stages
        self.plan, self.meshes = context.plan, context.meshes
        self.modules: tuple[nn.Module, ...] = tuple(stage.module for stage in stages)

    @property
    def report(self) -> Report:
        return self._context.report

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this rank by their names in the model, each tensor once."""
        seen: set[nn.Parameter] = set()
        for module in self.modules:
            for name, parameter in module.named_parameters():
                if parameter not in seen:
                    seen.add(parameter)
                    yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer takes."""
        return (parameter for _, parameter in self.named_parameters())

    def step(self, batch: Any, targets: Any = None, loss_fn: LossFn | None = None) -> Tensor:
        """Forward and backward of one step; the mean loss, the same on every rank.

        batch: what the model takes, as keywords (a dict), positions (a tuple) or one tensor;
        targets: what `loss_fn(outputs, targets)` compares with. First dimensions are samples:
        this data rank's, or the whole global batch on every rank. Without a loss_fn the model
        returns its loss. Gradients are left in `.grad` as in any loop; `zero_grad` is the
        optimizer's.
        """
        given = self._microbatches((batch, targets))
        total = torch.zeros((), device=self.meshes.device_type)
        root = cast(FSDPModule, self.modules[0])
        for i, (one, target) in enumerate(given):
            before_microbatch(root, self.plan.decisions, last=i == len(given) - 1)
            outputs = self._call(one)
            loss = outputs if loss_fn is None else loss_fn(outputs, target)
            loss = loss / len(given)
            loss.backward()
            total += loss.detach()
        data = self.meshes.axes["dp", "cp"]
        dist.all_reduce(total, group=data._flatten().get_group())
        return total / data.size()

    def _call(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return self.modules[0](**batch)
        return self.modules[0](*batch) if isinstance(batch, tuple) else self.modules[0](batch)

    def _microbatches(self, given: Any) -> list[Any]:
        """The step's samples of this data rank, cut into the plan's micro-batches."""
        d = self.plan.decisions
        share = d.micro_batch * d.microbatches
        leaves, spec = pytree.tree_flatten(given)
        rows: list[list[Any]] = [[] for _ in range(d.microbatches)]
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.dim():
                count = leaf.shape[0]
                if count == share * d.dp and d.dp > 1:
                    at = self.meshes.rank("dp") * share
                    leaf = leaf[at : at + share]
                elif count != share:
                    raise PlanError(
                        f"the batch has {count} samples",
                        why=f"the plan runs {share} a data rank, {share * d.dp} in all",
                    )
                parts = list(leaf.split(d.micro_batch))
            else:
                parts = [leaf] * d.microbatches
            for row, part in zip(rows, parts):
                row.append(part)
        return [pytree.tree_unflatten(row, spec) for row in rows]
