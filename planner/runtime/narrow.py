"""Linears in fp8: the plan's formats, applied to the user's modules.

A module of the plan's groups keeps its parameter, its name and its place; its product is three
8-bit matmuls. Inputs and weights are e4m3, gradients e5m2, one scale a tensor from its largest
value at that moment; of what is split over tp each rank scales what it has. Results have 16 bits,
and what backward keeps is what it was given.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from cost_models.chain import chain_of
from cost_models.formats import MULTIPLE, decided
from ir.errors import PlanError
from planner.runtime.context import Context
from planner.runtime.reshard import gradient_as, reshard
from planner.runtime.site import Site

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
LEAST = 1e-12  # of a tensor's largest value: one of zeros has a scale as well


def apply(sites: Sequence[Site], stage: nn.Module, context: Context) -> None:
    """Patch the linears that the plan has in fp8: of layers, and of no other unit."""
    d = context.plan.decisions
    layers = {link.path for link in chain_of(context.plan.graph).links if link.is_layer}
    for site in sites if d.formats else ():
        if site.path not in layers:
            continue
        for node_name in decided(site.unit, d.formats, d.tp, d.etp):
            node = next(n for n in site.unit.nodes if n.name == node_name)
            module = site.module.get_submodule(node.module)
            if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
                raise PlanError(
                    f"{site.path}.{node.module} is {type(module).__name__}, not run in fp8",
                    why="nn.Linear modules are",
                    hints=("plan trace without --fix formats and --precision bf16,fp8",),
                )
            module.forward = functools.partial(narrow, module)  # type: ignore[method-assign]


def narrow(module: nn.Linear, x: Tensor) -> Tensor:
    """The module's product in fp8. x: [..., k] -> [..., n]; DTensors as nn.Linear takes them."""
    weight, bias = module.weight, module.bias
    if not isinstance(weight, DTensor):
        return _linear(x, weight, bias)
    return _over_tp(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _Product.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def _over_tp(x: Any, weight: DTensor, bias: Any) -> DTensor:
    """Each rank's own product: columns, rows (a partial sum), or whole weights of split tokens."""
    mesh, (at,) = weight.device_mesh, weight.placements
    last = x.dim() - 1
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, (Replicate(),), run_check=False)
    given: Placement = x.placements[0]
    rows = isinstance(at, Shard) and at.dim == 1
    columns = isinstance(at, (Shard, _StridedShard)) and not rows
    wanted: Placement = Shard(last) if rows else Replicate() if columns else given
    if given.is_partial() or (at == Replicate() and given == Shard(last)):
        wanted = Replicate()
    if given != wanted:
        x = reshard(x, wanted, gradient_as(given))
    back_x: Placement = Partial() if columns else wanted
    back_w: Placement = Partial() if at == Replicate() and wanted != Replicate() else at
    out_at: Placement = (
        Partial() if rows else wanted if not columns
        else _StridedShard(last, split_factor=at.split_factor) if isinstance(at, _StridedShard)
        else Shard(last)
    )  # fmt: skip
    local = _linear(
        x.to_local(grad_placements=(back_x,)), weight.to_local(grad_placements=(back_w,)), None
    )
    if bias is not None:
        local = local + _own_bias(bias, rows, back_w if not columns else at)
    return DTensor.from_local(local, mesh, (out_at,), run_check=False)


def _own_bias(bias: DTensor, rows: bool, back: Placement) -> Tensor:
    """What a rank adds: its columns, or, to a partial sum, the bias on the first rank alone."""
    if not rows:
        return bias.to_local(grad_placements=(back if back.is_partial() else bias.placements[0],))
    whole = bias.to_local(grad_placements=(Replicate(),))
    # elsewhere nothing, and the gradient that the first rank has
    return whole if bias.device_mesh.get_local_rank() == 0 else whole - whole.detach()


class _Product(torch.autograd.Function):
    """x: [m, k], weight: [n, k] -> [m, n], each of the three products in 8 bits. Backward quantizes
    what it is given again, by the scales of forward, and turned: an 8-bit matmul reads both
    operands along what it sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        of_x, of_w = scale_of(x, VALUES), scale_of(weight, VALUES)
        ctx.save_for_backward(x, weight, of_x, of_w)
        x8, w8 = quantized(x, of_x, VALUES), quantized(weight, of_w, VALUES)
        return multiplied(x8, of_x, w8, of_w, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, of_x, of_w = ctx.saved_tensors
        of_g = scale_of(grad, GRADIENTS)
        g8 = quantized(grad, of_g, GRADIENTS)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            w8 = quantized(weight, of_w, VALUES).t().contiguous()
            dx = multiplied(g8, of_g, w8, of_w, grad.dtype)
        if ctx.needs_input_grad[1]:
            x8 = quantized(x, of_x, VALUES)
            dw = multiplied(_turned(g8), of_g, _turned(x8), of_x, grad.dtype)
        return dx, dw


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the 8-bit values are multiplied by to be x again, [] fp32: the largest of x is the
    format's largest."""
    return x.abs().amax().float().clamp(min=LEAST) / torch.finfo(dtype).max


def quantized(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x in 8 bits, contiguous."""
    most = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-most, most).to(dtype).contiguous()


def _turned(x: Tensor) -> Tensor:
    """[m, n] -> [n, m], with zeros to a multiple of what an 8-bit matmul sums at once."""
    rest = -x.shape[0] % MULTIPLE
    if rest:
        x = torch.cat([x, x.new_zeros(rest, x.shape[1])])
    return x.t().contiguous()


def multiplied(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor, dtype: torch.dtype) -> Tensor:
    """a: [m, k], b: [n, k], with their scales -> [m, n], summed in fp32."""
    out: Tensor = torch._scaled_mm(a, b.t(), scale_a=of_a, scale_b=of_b, out_dtype=dtype)
    return out
