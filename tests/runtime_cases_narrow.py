"""Worker functions of test_runtime_narrow: fp8 linears beside the same arithmetic by hand."""

from __future__ import annotations

import functools
from typing import Any

import torch
from runtime_cases_tensor import example, own_part, run_beside, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from planner.plan import Plan
from planner.runtime import narrow
from planner.runtime.fused import strided
from planner.runtime.parallelize import parallelize


def rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    """x as its 8-bit values say: its largest value is the format's largest."""
    most = torch.finfo(kind).max
    scale = x.abs().max() / most
    return (x / scale).clamp(-most, most).to(kind).to(x.dtype) * scale


class ByHand(torch.autograd.Function):
    """[m, k] x [n, k]: values rounded to e4m3, gradients to e5m2, products in the values' dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return rounded(x, torch.float8_e4m3fn) @ rounded(w, torch.float8_e4m3fn).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = (rounded(t, torch.float8_e4m3fn) for t in ctx.saved_tensors)
        g = rounded(grad, torch.float8_e5m2)
        return g @ w, g.T @ x


def linear_by_hand(module: nn.Linear, split: str, ways: int, x: Tensor) -> Tensor:
    """A linear whose ranks round what they have: columns or rows of the weight, those of three
    parts, or all of it."""
    flat = x.reshape(-1, x.shape[-1])
    if split == "rows":
        parts = zip(flat.chunk(ways, 1), module.weight.chunk(ways, 1))
        out = sum(ByHand.apply(a.contiguous(), b) for a, b in parts)
    elif split == "columns":
        out = torch.cat([ByHand.apply(flat, b) for b in module.weight.chunk(ways)], 1)
    elif split == "fused":  # of three parts each rank has its own rows
        parts = module.weight.view(3, ways, -1, flat.shape[1]).transpose(0, 1)
        own = [ByHand.apply(flat, part.flatten(0, 1)) for part in parts]
        out = torch.stack(own, 1).view(len(flat), ways, 3, -1).transpose(1, 2).flatten(1)
    else:
        out = ByHand.apply(flat, module.weight)
    out = out.view(*x.shape[:-1], -1)
    return out if module.bias is None else out + module.bias


def by_hand(model: nn.Module, split: dict[str, str], ways: int) -> None:
    """split: of names' last parts, how their weight is split over tp."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and last in split:
            module.forward = functools.partial(linear_by_hand, module, split[last], ways)


def beside(rank: int, name: str, plan: Plan, split: dict[str, str]) -> dict:
    """A step under the plan, and of the model whose named linears are rounded by hand; the loss
    of the model as it is."""
    module = example(name)
    torch.manual_seed(0)
    model = module.build(size="tiny")
    ids, targets = tokens(plan), tokens(plan, seed=2)
    plain = float(module.loss(model(input_ids=ids), targets).detach())
    by_hand(model, split, plan.decisions.tp)
    found = run_beside(model, plan, {"input_ids": ids}, targets, module.loss)
    return {**found, "plain": plain}


def linears(rank: int, ways: int) -> dict[str, list[float]]:
    """Of a linear split over tp in each way: how far its result and gradients are from by hand."""
    mesh, found = init_device_mesh("cpu", (ways,)), {}
    laid = {  # of the weight, the bias, and what is given
        "columns": (Shard(0), Shard(0), Replicate()),
        "fused": (strided(Shard(0), 3), strided(Shard(0), 3), Replicate()),
        "rows": (Shard(1), Replicate(), Shard(2)),
        "": (Replicate(), Replicate(), Replicate()),
    }
    for split, (at, of_bias, given) in laid.items():
        torch.manual_seed(0)
        module = nn.Linear(64, 96)
        x, g = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 96)
        out = linear_by_hand(module, split, ways, x)
        out.backward(g)
        expected = [out.detach(), x.grad, module.weight.grad, module.bias.grad]
        ours = nn.Linear(64, 96)
        for name, place in (("weight", at), ("bias", of_bias)):
            whole = module.get_parameter(name).detach()
            setattr(ours, name, nn.Parameter(distribute_tensor(whole, mesh, (place,))))
        y = distribute_tensor(x.detach(), mesh, (given,)).requires_grad_()
        out = narrow.narrow(ours, y)
        back = Replicate() if split in ("rows", "") else out.placements[0]
        out.backward(distribute_tensor(g, mesh, (back,)))
        made = [out.detach(), y.grad, ours.weight.grad, ours.bias.grad]
        found[split] = [
            float((a.full_tensor() - b).abs().max() / b.abs().max()) for a, b in zip(made, expected)
        ]
    return found


def compiled(rank: int, name: str, plan: Plan, eager: Plan) -> tuple[float, float, dict]:
    """Loss and gradients' distance of compiled units from the same ones eager."""
    module, found = example(name), []
    ids, targets = tokens(plan), tokens(plan, seed=2)
    for one in (plan, eager):
        torch.manual_seed(0)
        parallel = parallelize(module.build(size="tiny"), one, compile_backend="aot_eager")
        loss = parallel.step({"input_ids": ids}, targets, module.loss)
        found.append((float(loss), dict(parallel.named_parameters()), parallel.report))
    (loss, ours, report), (other, theirs, _) = found
    far = max(
        float((a - b).norm() / b.norm().clamp(min=1e-9))
        for n, p in ours.items()
        for a, b in [own_part(p.grad, theirs[n].grad.full_tensor())]
    )
    return abs(loss - other), far, dict(report.uncompiled)
