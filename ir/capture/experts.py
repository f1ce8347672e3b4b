"""The one data-dependent pattern that is recognised: a router, and a list of equal experts.

A forward that loops over experts (`nonzero`, `tolist`, `bincount`) cannot be traced. Where a
module holds a router, which ends in a linear layer with one output for each member of a
`ModuleList` of equal modules, what it computes is known: route each token to its top k experts, run
them, sum. That it computes nothing else is tried, with experts whose answers are known.
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
    """A module that routes: its router, its experts, how many each token goes to. width: features
    of a token."""

    router: nn.Module
    width: int
    experts: tuple[nn.Module, ...]
    top_k: int


def find_routed(model: nn.Module) -> dict[str, Routed]:
    """Modules of the pattern by path. Raises PlanError where top k cannot be told, where a module
    does more than route, and where there is none but with experts that differ."""
    found, differ = {}, None
    for path, module in model.named_modules():
        for experts in module.children():
            if not isinstance(experts, nn.ModuleList) or len(experts) < 2:
                continue
            routers = [m for m in module.children() if m is not experts and _scores(m, experts)]
            if not routers:
                continue
            other = next((i for i, e in enumerate(experts) if not _alike(e, experts[0])), None)
            if other is not None:
                differ = differ or _unequal(path, module, experts, other)
                continue
            top_k = _top_k(path, module, len(experts))
            found[path] = _routes_alone(path, module, [
                Routed(
                    router=m, width=_linears(m)[0].in_features, experts=tuple(experts), top_k=top_k
                ) for m in routers
            ])  # fmt: skip
    if differ and not found:
        raise differ
    return found


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _scores(module: nn.Module, experts: nn.ModuleList) -> bool:
    """Whether a module ends in a linear layer with an output for each expert."""
    linears = _linears(module)
    return bool(linears) and linears[-1].out_features == len(experts)


def _alike(a: nn.Module, b: nn.Module) -> bool:
    return signature(a, set()) == signature(b, set())


def _unequal(path: str, module: nn.Module, experts: nn.ModuleList, other: int) -> PlanError:
    """What is said of a list whose first and `other` experts differ."""
    sizes = [{name: list(p.shape) for name, p in experts[i].named_parameters()} for i in (0, other)]
    shapes = (
        f"{name} is {size} in the first and {sizes[1].get(name)} in number {other}"
        for name, size in sizes[0].items() if sizes[1].get(name) != size
    )  # fmt: skip
    return PlanError(
        f"{path} routes tokens to experts that are not alike", where=path,
        why=next(shapes, f"number {other} has other modules or settings than the first"),
        hints=(
            "experts of one kind and shape run as grouped matmuls",
            f"or declare it a leaf: ir.leaf({type(module).__name__}, flop=...)",
        ),
    )  # fmt: skip


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


def _routes_alone(path: str, module: nn.Module, candidates: list[Routed]) -> Routed:
    """The candidate with which the module does nothing but route. Raises PlanError where there is
    none: all else that the forward does would be lost."""
    faults = []
    for routed in candidates:
        fault = _fault(module, routed)
        if fault is None:
            return routed
        faults.append(fault)
    raise PlanError(
        f"{path} does more than route tokens to its experts", where=path, why=faults[0],
        hints=(
            "a module of its own for the router and the experts, and what stands beside them"
            " around it",
            f"or declare it a leaf: ir.leaf({type(module).__name__}, flop=...)",
        ),
    )  # fmt: skip


def _fault(module: nn.Module, routed: Routed) -> str | None:
    """What a module does beside routing, or None. Its own forward runs on the CPU with experts that
    answer orthogonal vectors (or zero, where there are as many as features): what is no sum of them
    is not the experts'."""
    width, count = routed.width, len(routed.experts)
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
    return fault


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
        for module, (path, pattern) in zip(modules, routed.items()):
            module.forward = _grouped(path, pattern)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _grouped(path: str, pattern: Routed) -> Callable[..., Tensor]:
    ops, first = torch.ops, pattern.experts[0]
    linears = [name for name, m in first.named_modules() if isinstance(m, nn.Linear)]

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        scores = pattern.router(tokens)
        if not isinstance(scores, Tensor) or scores.shape != (len(tokens), len(pattern.experts)):
            raise PlanError(
                f"{path} has a router that gives no score for each token and expert",
                where=path,
                why=f"expected one tensor, [tokens, {len(pattern.experts)}]",
                hints=(f"a router of linear layers alone; top {pattern.top_k} beside it",),
            )
        weights, index = scores.float().softmax(-1).topk(pattern.top_k, dim=-1)
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
