"""A model under a plan on this rank: run a step, move weights in and out, clip."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree

from ir.errors import PlanError
from planner.runtime import context_parallel, tied
from planner.runtime.clip import clip_grad_norm_
from planner.runtime.context import Context, Report
from planner.runtime.data import before_microbatch
from planner.runtime.health import ExpertLoad, OnLoad
from planner.runtime.loss import parallel_loss, plain_loss
from planner.runtime.optimizer import Factory, make_optimizer
from planner.runtime.pipeline import Stage
from planner.runtime.schedules import Pipeline

LossFn = Callable[[Any, Any], Tensor]


class Parallel:
    """What `parallelize` returns. modules: this rank's sharded modules, one a pipeline stage;
    their parameters keep the names that they have in the user's model."""

    def __init__(self, context: Context, stages: tuple[Stage, ...]) -> None:
        self._context, self._stages = context, stages
        self.plan, self.meshes = context.plan, context.meshes
        self.modules: tuple[nn.Module, ...] = tuple(stage.module for stage in stages)
        self._pipeline = Pipeline(stages, context) if context.plan.decisions.pp > 1 else None

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

    def optimizer(
        self, kind: str | Factory | None = None, *, folder: str | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        """The plan's optimizer of this rank's parameters, or another: a name, or what makes one
        of parameters. folder: where state lies that the plan holds on a disk."""
        return make_optimizer(self.named_parameters(), self.plan, kind, folder=folder, **options)

    def clip_grad_norm_(
        self, max_norm: float, *, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Scale gradients so that the whole model's have that norm at most; their norm before,
        the same on every rank. All ranks call it, after `step`."""
        return clip_grad_norm_(
            self.modules, self.plan.graph, max_norm, norm_type=norm_type,
            error_if_nonfinite=error_if_nonfinite, device_type=self.meshes.device_type,
            elsewhere=tied.duplicates(self._stages, self._context),
        )  # fmt: skip

    def step(self, batch: Any, targets: Any = None, loss_fn: LossFn | None = None) -> Tensor:
        """Forward and backward of one step; the mean loss, the same on every rank.

        batch: what the model takes, as keywords (a dict), positions (a tuple) or one tensor;
        targets: what `loss_fn(outputs, targets)` compares with. First dimensions are samples:
        this data rank's, or the whole global batch on every rank. Without a loss_fn the model
        returns its loss. Gradients are left in `.grad` as in any loop; `zero_grad` is the
        optimizer's.
        """
        if loss_fn is None and self.plan.decisions.cp > 1:
            raise PlanError(
                "under cp > 1 the model cannot take its own loss",
                why="each rank has the results of its share of the tokens, in a model whose"
                " forward knows whole sequences",
                hints=("parallel.step(batch, targets, loss_fn) with a loss of single positions",),
            )
        given = self._microbatches((batch, targets))
        self._context.health.before_step()

        def share(outputs: Any, target: Any) -> Tensor:
            ours = context_parallel.own_tokens(outputs, target, self._context)
            with parallel_loss(self._context):
                loss = outputs if loss_fn is None else loss_fn(*ours)
            return plain_loss(loss) / len(given)

        own = parallel_loss(self._context) if loss_fn is None else contextlib.nullcontext()
        with own:
            run = self._pipeline.step if self._pipeline else self._loop
            total = run(given, share)
        data = self.meshes.axes["dp", "cp"]
        dist.all_reduce(total, group=data._flatten().get_group())
        self._context.health.after_step(self.meshes)
        return total / data.size()

    def expert_load(self) -> tuple[ExpertLoad, ...]:
        """What the experts of each routed layer had to do in the last step; all ranks call it."""
        return self._context.health.load(self.meshes)

    def on_expert_load(self, callback: OnLoad) -> None:
        """Call back with `expert_load()` after each step; register it on every rank."""
        self._context.health.on_load(callback)

    def _loop(self, given: list[Any], share: Callable[[Any, Any], Tensor]) -> Tensor:
        """One micro-batch after another, where there is no pipeline; the sum of their shares."""
        total = torch.zeros((), device=self.meshes.device_type)
        root = cast(FSDPModule, self.modules[0])
        for i, (one, target) in enumerate(given):
            before_microbatch(root, self.plan.decisions, last=i == len(given) - 1)
            loss = share(self._call(one), target)
            loss.backward()
            total += loss.detach()
        return total

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
                parts = list(torch.split(leaf, d.micro_batch))
            else:
                parts = [leaf] * d.microbatches
            for row, part in zip(rows, parts):
                row.append(part)
        return [pytree.tree_unflatten(row, spec) for row in rows]
