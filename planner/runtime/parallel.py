"""A model under a plan on this rank: run a step, move weights in and out, clip."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree

from ir.errors import PlanError
from planner.plan import Plan
from planner.runtime import context_parallel, tied
from planner.runtime.checkpoint import Checkpoints, Parts, Saving
from planner.runtime.clip import clip_grad_norm_
from planner.runtime.context import Context, Report
from planner.runtime.data import before_microbatch
from planner.runtime.export_weights import export
from planner.runtime.health import ExpertLoad, OnLoad
from planner.runtime.init import init
from planner.runtime.load import load
from planner.runtime.loss import parallel_loss, plain_loss
from planner.runtime.nvme import hold_shards
from planner.runtime.optimizer import Factory, make_optimizer
from planner.runtime.pipeline import Stage
from planner.runtime.schedules import Pipeline
from planner.runtime.tied import duplicates

LossFn = Callable[[Any, Any], Tensor]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


def _several(given: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    return () if given is None else (given,) if isinstance(given, torch.optim.Optimizer) else (
        tuple(given)
    )  # fmt: skip


def _sharded(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    return (m for module in modules for m in module.modules() if isinstance(m, FSDPModule))


class Parallel:
    """What `parallelize` returns. modules: this rank's sharded modules, one a pipeline stage;
    their parameters keep the names that they have in the user's model."""

    def __init__(
        self, context: Context, stages: tuple[Stage, ...], plan: Plan | None = None
    ) -> None:
        """plan: of all ranks, where the context's has this rank's share of it."""
        self._context, self._stages = context, stages
        self.plan, self.meshes = plan or context.plan, context.meshes
        self.modules: tuple[nn.Module, ...] = tuple(stage.module for stage in stages)
        self._pipeline = Pipeline(stages, context) if context.plan.decisions.pp > 1 else None
        self._checkpoints = Checkpoints(Parts(
            plan=self.plan, meshes=context.meshes, modules=self.modules,
            weights=context.weights, place=self._place,
            duplicates=frozenset(duplicates(stages, context)),
        ))  # fmt: skip

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

    def init(self, seed: int = 0) -> None:
        """Draw the weights as the model's own code does, from the seed: the same on any mesh.

        Weights that were real when the model was built keep their values. All ranks call it.
        """
        init(self.modules, self._context.weights, seed, self._place)

    def load(self, path: str | Path, *, strict: bool = True) -> None:
        """Read weights from a .safetensors file or a folder of them; each rank its own parts.

        Names are the model's, with or without the first part, or transformers'. strict: false
        skips what the model does not have. All ranks call it; where weights are missing, extra or
        of another shape, all raise PlanError and nothing has changed.
        """
        load(self.modules, self._context.weights, path, self._place, strict=strict)

    def save(
        self, folder: str | Path, optimizer: Optimizers = None, *,
        state: Mapping[str, Any] | None = None, asynchronous: bool = False,
    ) -> Saving:  # fmt: skip
        """Write a checkpoint that any plan of this model can restore; all ranks call it.

        optimizer: one, or several in an order to be kept. state: the first rank's own, as JSON.
        folder: on a file system that all ranks share. It is replaced at the end, when all ranks
        have written: where one fails all raise PlanError, and the checkpoint that was there stays.
        asynchronous: return when tensors are copied; then `wait()` on what is returned.
        """
        return self._checkpoints.save(folder, _several(optimizer), state or {}, asynchronous)

    def restore(
        self, folder: str | Path, optimizer: Optimizers = None, *, strict: bool = True
    ) -> dict[str, Any]:
        """Read what `save` wrote under any plan of this model; the state that was saved with it.

        strict: refuse a model whose weights are alike but whose operations are not. Random numbers
        go on from a seed in the checkpoint, others on each data rank. All ranks call it.
        """
        return self._checkpoints.restore(folder, _several(optimizer), strict)

    def export_safetensors(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the weights as safetensors files under the model's own names, each rank a share of
        whole tensors; all ranks call it. dtype: of floating-point weights, by default as held."""
        export(self._checkpoints.parts, folder, dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's weights by their names in the model, as torch.distributed.checkpoint takes
        them: parameters as DTensors, and the buffers that a checkpoint holds."""
        return dict(self._checkpoints.parts.tensors())

    def _place(self, tensor: Tensor) -> str:
        """The device that holds a parameter or buffer."""
        d, learnt = self.plan.decisions, isinstance(tensor, nn.Parameter)
        below = learnt and "optimizer" in d.tiers
        if below and d.below is not None:
            below = any(
                tensor is p for stage in self._stages for site in stage.sites if site.below
                for p in site.module.parameters()
            )
        return "cpu" if below else self.meshes.device_type

    def optimizer(
        self, kind: str | Factory | None = None, *, folder: str | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        """The plan's optimizer of this rank's parameters, or another: a name, or what makes one
        of parameters. folder: where state lies that the plan holds on a disk, by default that of
        `parallelize`. fp32 shards that the plan lays there are moved there now."""
        place = self._context.folder_of("params")
        if place is not None:
            hold_shards(_sharded(self.modules), place)
        return make_optimizer(
            self.named_parameters(), self.plan, kind,
            folder=self._context.folder if folder is None else folder, **options,
        )  # fmt: skip

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
        counts = self.plan.decisions.microbatches_by_data_rank
        mean = sum(counts) / len(counts)  # each rank's gradients weigh as its samples do
        self._context.health.before_step()

        def share(outputs: Any, target: Any) -> Tensor:
            ours = context_parallel.own_tokens(outputs, target, self._context)
            with parallel_loss(self._context):
                loss = outputs if loss_fn is None else loss_fn(*ours)
            return plain_loss(loss) / mean

        own = parallel_loss(self._context) if loss_fn is None else contextlib.nullcontext()
        with own:
            run = self._pipeline.step if self._pipeline else self._loop
            total = run(given, share)
        data = self.meshes.samples
        dist.all_reduce(total, group=data.get_group())
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
        d, dp = self._context.plan.decisions, self.meshes.rank("dp")
        share = d.micro_batch * d.microbatches
        counts = d.microbatches_by_data_rank
        first, whole = (d.micro_batch * sum(n) for n in (counts[:dp], counts))
        leaves, spec = pytree.tree_flatten(given)
        rows: list[list[Any]] = [[] for _ in range(d.microbatches)]
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.dim():
                count = leaf.shape[0]
                if count == whole and d.dp > 1:
                    leaf = leaf[first : first + share]
                elif count != share:
                    raise PlanError(
                        f"the batch has {count} samples",
                        why=f"the plan runs {share} on this data rank, {whole} in all",
                    )
                parts = list(torch.split(leaf, d.micro_batch))
            else:
                parts = [leaf] * d.microbatches
            for row, part in zip(rows, parts):
                row.append(part)
        return [pytree.tree_unflatten(row, spec) for row in rows]
