"""The one data-dependent pattern that is recognised: a router, and a list of equal experts.

A forward that loops over experts (`nonzero`, `tolist`, `bincount`) cannot be traced. Where a
module holds a linear layer with one output for each member of a `ModuleList` of equal modules,
what it computes is known: route each token to its top k experts, run them, sum. That it computes
nothing else is tried, with experts whose answers are known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ir.capture import torch_ops
from ir.capture.fold import signature
from ir.capture.leaf import run
from ir.errors import PlanError

assert run and torch_ops.NAMES  # imported for their registrations
SAME = 1e-3  # of answers of unit length, in 32 bits
_TOP_K = ("top_k", "topk", "num_experts_per_tok", "experts_per_token", "k")


@torch.library.custom_op("meshwright_leaf::expert_linear", mutates_args=())
def expert_linear(rows: Tensor, weights: list[Tensor], offsets: Tensor) -> Tensor:
    """Each expert's rows times its weight. rows: [r, k] by expert; weights: [n, k] -> [r, n]."""
    raise NotImplementedError("for tracing only")


@torch.library.custom_op("meshwright_leaf::expert_bias", mutates_args=())
def expert_bias(rows: Tensor, biases: list[Tensor], offsets: Tensor) -> Tensor:
    """Each expert's rows plus its bias."""
    raise NotImplementedError("for tracing only")


@expert_linear.register_fake
def _(rows: Tensor, weights: list[Tensor], offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights[0].shape[0])


@expert_bias.register_fake
def _(rows: Tensor, biases: list[Tensor], offsets: Tensor) -> Tensor:
    return torch.empty_like(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """A module that routes: its router, its experts, how many each token goes to."""

    router: nn.Linear
    experts: tuple[nn.Module, ...]
    top_k: int


def find_routed(model: nn.Module) -> dict[str, Routed]:
    """Modules of the pattern by path. Raises PlanError where top k cannot be told."""
    found = {}
    for path, module in model.named_modules():
        for experts in module.children():
            if not isinstance(experts, nn.ModuleList) or len(experts) < 2:
                continue
            routers = [
                m
                for m in module.children()
                if isinstance(m, nn.Linear) and m.out_features == len(experts)
            ]
            if len(routers) == 1 and len({signature(e, set()) for e in experts}) == 1:
                top_k = _top_k(path, module, len(experts))
                found[path] = Routed(router=routers[0], experts=tuple(experts), top_k=top_k)
                _check_routes_alone(path, module, found[path])
    return found


class _Known(nn.Module):
    """An expert that answers the same to every row."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, rows: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.answer.expand(*rows.shape[:-1], -1)


class _Beside(nn.Module):
    """A layer that is neither router nor expert."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise RuntimeError(f"it runs {self.name}, which is neither its router nor its experts")


def _check_routes_alone(path: str, module: nn.Module, routed: Routed) -> None:
    """Run the module's own forward on the CPU with experts that answer orthogonal vectors (or zero,
    where there are as many as features): what is no sum of them is not the experts'. Raises
    PlanError: all else that the forward does would be lost."""
    width, count = routed.router.in_features, len(routed.experts)
    drawn = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn, device="cpu")

    answers = torch.zeros(count, width, device="cpu")
    if count < width:
        answers = torch.linalg.qr(random(width, count)).Q.T
    twin = copy.copy(module)  # whose tables are its own: what it holds is not touched
    twin._modules, twin._parameters, twin._buffers = {}, {}, {}
    for name, child in module.named_children():
        twin._modules[name] = _Beside(name) if any(True for _ in child.parameters()) else child
        if child is routed.router:
            router = nn.Linear(width, count, bias=False, device="cpu")
            router.weight.data = random(count, width) / width  # all experts are about as likely
            twin._modules[name] = router
        elif tuple(child.children()) == routed.experts:
            twin._modules[name] = nn.ModuleList(map(_Known, answers))
    for mine, theirs in ((twin._parameters, module._parameters), (twin._buffers, module._buffers)):
        mine |= {
            k: v if v is None else torch.zeros(
                v.shape, dtype=torch.float if v.is_floating_point() else v.dtype, device="cpu"
            ) for k, v in theirs.items()
        }  # fmt: skip
    fault: str | None = None
    try:
        with torch.no_grad(), torch.device("cpu"):
            out = twin(random(2, 16, width))
    except Exception as error:  # the user's code, on what it was not written for
        words = (str(error).splitlines() or [type(error).__name__])[0]
        fault = f"with known experts it fails: {words[:200]}"
    else:
        if not isinstance(out, Tensor):
            fault = f"it returns a {type(out).__name__}, expected one tensor"
        else:
            rows = out.reshape(-1, out.shape[-1]).float()
            shares = rows @ answers.T if rows.shape[-1] == width else None
            if shares is None or not bool((rows - shares @ answers).abs().max() <= SAME):
                fault = "its result is not a sum of what its experts answer"
            elif int((shares.abs() > SAME).sum(dim=-1).max()) > routed.top_k:
                fault = f"a token takes the answers of more than its top {routed.top_k} experts"
    if fault:
        raise PlanError(
            f"{path} does more than route tokens to its experts", where=path, why=fault,
            hints=(
                "a module of its own for the router and the experts, and what stands beside them"
                " around it",
                f"or declare it a leaf: ir.leaf({type(module).__name__}, flop=...)",
            ),
        )  # fmt: skip


def _top_k(path: str, module: nn.Module, experts: int) -> int:
    values = {
        value
        for name, value in vars(module).items()
        if type(value) is int and 1 <= value <= experts and name.lower().endswith(_TOP_K)
    }
    if len(values) != 1:
        raise PlanError(
            f"{path} routes tokens to experts; to how many, it does not say", where=path,
            why=f"looked for one int attribute named {', '.join(_TOP_K)}: found {sorted(values)}",
            hints=(f"declare it a leaf: ir.leaf({type(module).__name__}, flop=...)",),
        )  # fmt: skip
    return values.pop()


@contextmanager
def experts_in_groups(model: nn.Module, routed: dict[str, Routed]) -> Iterator[None]:
    """Inside, modules of the pattern run as router, dispatch, grouped matmuls and combine."""
    modules = [model.get_submodule(path) for path in routed]
    try:
        for module, pattern in zip(modules, routed.values()):
            module.forward = _grouped(pattern)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _grouped(pattern: Routed) -> Callable[..., Tensor]:
    ops, first = torch.ops, pattern.experts[0]
    linears = [name for name, m in first.named_modules() if isinstance(m, nn.Linear)]

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, index = pattern.router(tokens).float().softmax(-1).topk(pattern.top_k, dim=-1)
        rows, offsets = ops.meshwright.moe_experts_dispatch(tokens, index, len(pattern.experts))
        for name in linears:
            same = [expert.get_submodule(name) for expert in pattern.experts]
            first.get_submodule(name).forward = _linear(same, offsets)
        try:
            rows = first(rows)
        finally:
            for name in linears:
                del first.get_submodule(name).forward
        return ops.meshwright.moe_experts_combine(rows, weights.to(x.dtype), index).view(x.shape)

    return forward


def _linear(same: list[Any], offsets: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(rows: Tensor) -> Tensor:
        out = torch.ops.meshwright_leaf.expert_linear(rows, [m.weight for m in same], offsets)
        if same[0].bias is None:
            return out
        return torch.ops.meshwright_leaf.expert_bias(out, [m.bias for m in same], offsets)

    return forward
