"""Cross-entropy over ranks: of logits whose classes or rows lie on several, and the right mean.

The mean is over the targets that count on all data ranks of a micro-batch, as for a model that is
not sharded: a rank's loss is its sum over their number divided by the data ranks, since gradients
are averaged over these. The result is a plain scalar, the same on all tp ranks. Where parts of the
hardware have shares of their own, a micro-batch is what the data ranks of one part run at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.overrides import TorchFunctionMode

from planner.runtime.context import Context
from planner.runtime.meshes import Meshes
from planner.runtime.reshard import gradient_as, reshard


def parallel_loss(context: Context) -> contextlib.AbstractContextManager[Any]:
    """Around what computes a loss: the model's call, or the user's function of its outputs."""
    from planner.runtime.fallback import Whole

    d = context.meshes.decisions
    if d.tp > 1:
        return Whole(context, "")
    return Losses(context) if d.dp * d.cp > 1 else contextlib.nullcontext()


def plain_loss(loss: Tensor) -> Tensor:
    """A loss as a plain scalar."""
    if not isinstance(loss, DTensor):
        return loss
    whole = [Replicate()] * loss.device_mesh.ndim
    return loss.redistribute(placements=whole).to_local(grad_placements=whole)


class Losses(TorchFunctionMode):
    """Where no value is split over tp: only the mean needs the other ranks."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        own = _OWN.get(func)
        if own is not None:
            return own(self.context, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def cross_entropy(
    context: Context, input: Tensor, target: Tensor, weight: Tensor | None = None,
    size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None,
    reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """F.cross_entropy, logits [rows, classes] split over tp on either, or on neither."""
    if size_average is not None or reduce is not None:
        reduction = F._Reduction.legacy_get_string(size_average, reduce)  # type: ignore[attr-defined]
    target, weight = _whole(target), None if weight is None else _whole(weight)
    if target.is_floating_point() or target.dim() != input.dim() - 1:
        return F.cross_entropy(
            _whole(input), target, weight, reduction=reduction, ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    inner = "none" if reduction == "none" else "sum"
    at = _lies(input, weight)
    if at == Shard(1):
        found = _over_classes(cast(DTensor, input), target, ignore_index, label_smoothing)
        made = found if inner == "none" else found.sum().to(input.dtype)
    else:
        rows, own, mesh = _whole(input) if at is None else input, target, None
        if at is not None:
            mesh = cast(DTensor, input).device_mesh
            rows = cast(DTensor, input).to_local(grad_placements=(at,))
            own = _rows_of(target, at, mesh.size(), mesh.get_local_rank())
        made = F.cross_entropy(
            rows, own, weight, reduction=inner, ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )  # fmt: skip
        if mesh is not None:
            if inner == "none":
                return DTensor.from_local(made, mesh, (cast(Placement, at),), run_check=False)
            made = cast(Tensor, _Sum.apply(made, mesh.get_group()))
    if reduction != "mean":
        return made
    return made / _count(target, weight, ignore_index, context.meshes).to(made.dtype)


def nll_loss(
    context: Context, input: Tensor, target: Tensor, weight: Tensor | None = None,
    size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """F.nll_loss of whole rows; its mean is over what counts on all data ranks."""
    if size_average is not None or reduce is not None:
        reduction = F._Reduction.legacy_get_string(size_average, reduce)  # type: ignore[attr-defined]
    target, weight = _whole(target), None if weight is None else _whole(weight)
    inner = "none" if reduction == "none" else "sum"
    made = F.nll_loss(_whole(input), target, weight, ignore_index=ignore_index, reduction=inner)
    if reduction != "mean":
        return made
    return made / _count(target, weight, ignore_index, context.meshes).to(made.dtype)


_OWN = MappingProxyType({F.cross_entropy: cross_entropy, F.nll_loss: nll_loss})


def _lies(input: Tensor, weight: Tensor | None) -> Placement | None:
    """How logits are split, where their loss can be taken so: on classes, on rows, or on rows of
    each sample."""
    if not isinstance(input, DTensor) or input.dim() != 2 or input.device_mesh.ndim != 1:
        return None
    at = input.placements[0]
    if at == Shard(1) and input.shape[1] % input.device_mesh.size() == 0 and weight is None:
        return Shard(1)
    joined = isinstance(at, _StridedShard) and at.dim == 0
    ways = input.device_mesh.size() * (at.split_factor if joined else 1)  # type: ignore[attr-defined]
    return at if at == Shard(0) or (joined and input.shape[0] % ways == 0) else None


def _whole(x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    whole = [Replicate()] * x.device_mesh.ndim
    if x.device_mesh.ndim == 1 and x.placements[0] != Replicate():
        x = reshard(x, Replicate(), gradient_as(x.placements[0]))
    return x.redistribute(placements=whole).to_local(grad_placements=whole)


def _rows_of(target: Tensor, at: Placement, ways: int, rank: int) -> Tensor:
    """The targets of a shard of rows, divided as DTensor divides."""
    if isinstance(at, _StridedShard):
        return target.unflatten(0, (at.split_factor, ways, -1))[:, rank].flatten()
    parts = target.chunk(ways)
    return parts[rank] if rank < len(parts) else target[:0]


def _count(target: Tensor, weight: Tensor | None, ignore_index: int, meshes: Meshes) -> Tensor:
    """How many targets count, or their weights, as a mean over the data ranks, or over those of
    this part of the hardware."""
    counts = target != ignore_index
    if weight is None:
        total = counts.sum()
    else:
        total = (weight[target.where(counts, 0)] * counts).sum()
    d = meshes.decisions
    if meshes.part is not None:  # other parts run other numbers of micro-batches
        dist.all_reduce(total, group=meshes.part)
        return total / dist.get_world_size(meshes.part)
    if d.dp * d.cp > 1:
        dist.all_reduce(total, group=meshes.samples.get_group())
    return total / (d.dp * d.cp)


class _Sum(torch.autograd.Function):
    """The sum over ranks that all go on with it: each has the gradient already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return fc.all_reduce(x, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _over_classes(logits: DTensor, target: Tensor, ignore_index: int, smoothing: float) -> Tensor:
    """Losses of rows, [rows] fp32: each rank has some of the classes of every row."""
    mesh = logits.device_mesh
    local = logits.to_local(grad_placements=(Shard(1),))
    loss = _OverClasses.apply(
        local, target, mesh.get_group(), mesh.get_local_rank(), ignore_index, smoothing
    )
    return cast(Tensor, loss)


class _OverClasses(torch.autograd.Function):
    """Cross-entropy of rows whose classes are split: three sums over the ranks, of one number a
    row each (Megatron-LM, arXiv:1909.08053, section 3)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, group: dist.ProcessGroup, rank: int,
        ignore_index: int, smoothing: float,
    ) -> Tensor:  # fmt: skip
        classes = logits.shape[1]
        x = logits.float()
        x = x - fc.all_reduce(x.max(1).values, "max", group).unsqueeze(1)
        at = target - rank * classes
        counts = target != ignore_index
        inside = counts & (at >= 0) & (at < classes)
        at = at.clamp(0, classes - 1)
        picked = x.gather(1, at.unsqueeze(1)).squeeze(1).where(inside, 0.0)
        picked = fc.all_reduce(picked, "sum", group)
        total = classes * dist.get_world_size(group)
        mean = fc.all_reduce(x.sum(1) / total, "sum", group) if smoothing else None
        exp = x.exp_()
        norm = fc.all_reduce(exp.sum(1), "sum", group)
        loss = norm.log() - picked
        if mean is not None:
            loss = (1 - smoothing) * loss + smoothing * (norm.log() - mean)
        ctx.save_for_backward(exp.div_(norm.unsqueeze(1)), at, counts, inside)
        ctx.smoothing, ctx.total, ctx.dtype = smoothing, total, logits.dtype
        return loss.where(counts, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        softmax, at, counts, inside = ctx.saved_tensors
        grad = grad.where(counts, 0.0).unsqueeze(1)
        found = softmax * grad
        hit = grad.where(inside.unsqueeze(1), 0.0) * (1 - ctx.smoothing)
        found.scatter_add_(1, at.unsqueeze(1), -hit)
        if ctx.smoothing:
            found -= grad * (ctx.smoothing / ctx.total)
        return found.to(ctx.dtype), None, None, None, None, None
