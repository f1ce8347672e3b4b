"""The plan's optimizer over this rank's parameters.

Elementwise optimizers are torch's own: they run on shards as they are, and where the plan holds
parameters' fp32 shards on the host, so do they. Those that look at whole matrices gather one
parameter at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from cost_models.chain import chain_of
from cost_models.offload import layers_below
from ir.errors import PlanError
from planner.plan import Plan
from planner.runtime.nvme import hold_on_disk

Factory = Callable[..., Optimizer]
Named = tuple[str, nn.Parameter]


def make_optimizer(
    named: Iterable[Named],
    plan: Plan,
    kind: str | Factory | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Optimizer:
    """An optimizer as the plan has it, its state where the plan lays it.

    kind: a name ("adamw", "sgd", "adafactor", "muon", "adamw8bit"), by default the plan's, or what
    makes an optimizer of parameters. folder: on the disk that the plan names, if it does.
    Raises PlanError for an optimizer that cannot be had here, or a disk without a folder.
    """
    tier = plan.decisions.tiers.get("optimizer")
    on_disk = tier not in (None, "cpu")
    if on_disk and folder is None:
        raise PlanError(f"the plan holds optimizer state on {tier}, and no folder is given",
                        hints=("parallel.optimizer(..., folder=...)",))  # fmt: skip
    learning = [(name, p) for name, p in named if p.requires_grad]
    kind = plan.workload.optimizer if kind is None else kind
    if callable(kind):
        made = kind([p for _, p in learning], **options)
    elif kind in MAKERS:
        made = MAKERS[kind](learning, plan, options)
    else:
        raise PlanError(f"unknown optimizer {kind!r}", why=f"known: {', '.join(MAKERS)}")
    if on_disk and folder is not None:
        hold_on_disk(made, folder, _below(plan, learning))
    return made


def _adamw(learning: list[Named], plan: Plan, options: dict[str, Any]) -> Optimizer:
    return torch.optim.AdamW([p for _, p in learning], **options)


def _below(plan: Plan, learning: list[Named]) -> list[nn.Parameter] | None:
    """The parameters whose state lies below, where that is counted by layers; None: of all."""
    if plan.decisions.below is None:
        return None
    chain = chain_of(plan.graph)
    paths = tuple(f"{chain.links[i].path}." for i in layers_below(chain, plan.decisions))
    return [p for name, p in learning if name.startswith(paths)]


def _sgd(learning: list[Named], plan: Plan, options: dict[str, Any]) -> Optimizer:
    return torch.optim.SGD([p for _, p in learning], **{"momentum": 0.9, **options})


def _adafactor(learning: list[Named], plan: Plan, options: dict[str, Any]) -> Optimizer:
    return OnWhole([p for _, p in learning], torch.optim.Adafactor, **options)


def _muon(learning: list[Named], plan: Plan, options: dict[str, Any]) -> Optimizer:
    """Matrices of layers by Muon; the rest (embeddings, head, vectors) by AdamW, as is usual."""
    layers = tuple(f"{path}." for path in plan.graph.layers)
    matrices = [p for name, p in learning if p.dim() >= 2 and name.startswith(layers)]
    chosen = set(matrices)
    others = [p for _, p in learning if p not in chosen]
    groups = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
    return Muon([g for g in groups if g["params"]], **options)


def _adamw8bit(learning: list[Named], plan: Plan, options: dict[str, Any]) -> Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as fault:
        raise PlanError(
            "adamw8bit needs torchao", why=str(fault), hints=("pip install torchao",)
        ) from fault
    made: Optimizer = AdamW8bit([p for _, p in learning], **options)
    return made


MAKERS: dict[str, Callable[[list[Named], Plan, dict[str, Any]], Optimizer]] = {
    "adamw": _adamw, "sgd": _sgd, "adafactor": _adafactor, "muon": _muon, "adamw8bit": _adamw8bit,
}  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the device that communicates."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    local = tensor._local_tensor.to(mesh.device_type)
    return DTensor(local, tensor._spec, requires_grad=False).full_tensor()


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, where `like` has its own."""
    if not isinstance(like, DTensor):
        return full
    mesh = like.device_mesh
    spread = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part = spread.redistribute(placements=like.placements)._local_tensor
    return part.to(like._local_tensor.device)


def local_of(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class OnWhole(Optimizer):
    """An optimizer that looks at whole tensors, and whose state is small beside them: each
    parameter and its gradient are gathered, every rank computes the same, and keeps its part."""

    def __init__(self, params: Any, factory: Factory, **options: Any) -> None:
        self._factory = factory
        like = factory([nn.Parameter(torch.zeros(1))], **options)
        super().__init__(params, dict(like.defaults))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            options = {k: v for k, v in group.items() if k in self.defaults}
            for p in group["params"]:
                if p.grad is None:
                    continue
                full = nn.Parameter(whole(p.detach()), requires_grad=True)
                full.grad = whole(p.grad)
                one = self._factory([full], **options)
                one.state[full] = {
                    k: v.to(full.device) if k != "step" else v for k, v in self.state[p].items()
                }
                one.step()
                self.state[p] = one.state[full]
                local_of(p.detach()).copy_(own_part(full.detach(), p))
        return loss


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024) of groups with `muon`, AdamW of the others.

    The momentum is as sharded as its parameter; the update of one matrix at a time is gathered,
    orthogonalised on every rank alike, and each keeps its part. Stacks of matrices (experts) are
    taken matrix by matrix.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95,
        nesterov: bool = True, ns_steps: int = 5, **adamw: Any,
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, weight_decay=weight_decay, **adamw)
        more = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "muon": True}
        self.defaults |= more
        for group in self.param_groups:
            for key, value in more.items():
                group.setdefault(key, value)

    def _init_group(self, group: Any, *lists: Any) -> Any:
        return False if group["muon"] else super()._init_group(group, *lists)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        state, grad = self.state[p], p.grad
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer, momentum = state["momentum_buffer"], group["momentum"]
        buffer.lerp_(grad, 1 - momentum)
        update = grad.lerp(buffer, momentum) if group["nesterov"] else buffer
        rows, columns = p.shape[-2:]
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        part = own_part(orthogonal(whole(update), group["ns_steps"]).to(p.dtype), p)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        local_of(p.detach()).add_(part, alpha=-lr)


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """The nearest half-orthogonal matrix, roughly, by Newton-Schulz in bf16. matrix: [..., m, n].

    Coefficients and precision as in torch.optim.Muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
