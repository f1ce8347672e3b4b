"""Modules that the user declares to be one operation, and how they are traced as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ir.errors import PlanError
from ir.graph import Attr
from ir.graph import Tensor as Value
from ir.ops.leaf import work_point

MARK = "__meshwright_leaf__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What `ir.leaf` was given."""

    flop: Any
    bytes: Any
    saved: Any
    factors: str
    output: Callable[..., Any] | None


@torch.library.custom_op("meshwright_leaf::run", mutates_args=())
def run(xs: list[Tensor], like: list[Tensor], path: str, count: int) -> list[Tensor]:
    """A leaf: `xs` are `count` inputs, then its parameters; results are as `like`."""
    raise NotImplementedError("a leaf is traced, not run")


@run.register_fake
def _(xs: list[Tensor], like: list[Tensor], path: str, count: int) -> list[Tensor]:
    return [torch.empty_like(x) for x in like]


@contextmanager
def leaves_as_one(model: nn.Module) -> Iterator[None]:
    """Inside, a declared module's forward is one opaque operation."""
    patched = []
    try:
        for path, module in model.named_modules():
            declared = getattr(type(module), MARK, None)
            if declared is not None and "forward" not in vars(module):
                module.forward = _opaque(path, module, declared)
                patched.append(module)
        yield
    finally:
        for module in patched:
            del module.forward


def _opaque(path: str, module: nn.Module, declared: Declared) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        out = declared.output(*args, **kwargs) if declared.output else torch.empty_like(tensors[0])
        flat, spec = pytree.tree_flatten(out)
        like = [x.detach() for x in flat]
        own = [*module.parameters(), *module.buffers()]
        results = torch.ops.meshwright_leaf.run([*tensors, *own], like, path, len(tensors))
        return pytree.tree_unflatten(results, spec)

    return forward


def costs(
    declared: Declared, path: str, shapes: tuple[list[tuple[int, ...]], ...], recover: Any,
    outs: list[Value], sizes: tuple[tuple[int, int], ...],
) -> tuple[dict[str, Attr], Value | None]:  # fmt: skip
    """(attributes, the tensor it keeps) from shapes at both sizes; costs become monomials."""
    attrs: dict[str, Attr] = {"factors": declared.factors}
    kept = None
    for name in ("flop", "bytes", "saved"):
        cost = getattr(declared, name)
        if cost is None:
            continue
        size = recover(*(_evaluate(cost, name, path, given) for given in shapes))
        for (b, s), given in zip(sizes, shapes):
            point = work_point(tuple(outs), tuple(t.sizes(b, s) for t in outs))
            if size.at(*point) != _evaluate(cost, name, path, given):
                raise PlanError(
                    f"{name}= of leaf {path} cannot be told from its result's shape",
                    why=f"it is {size}; the result is {', '.join(map(str, outs))}",
                    hints=("give the leaf a result with batch and sequence dimensions",),
                )  # fmt: skip
        if name == "saved":
            kept = Value(shape=(size,), dtype="u8")
            attrs["kept"] = True
        else:
            attrs[name] = str(size)
    return attrs, kept


def _evaluate(cost: Any, name: str, path: str, shapes: list[tuple[int, ...]]) -> int:
    """A cost at given shapes: a number counts rows of the first input."""
    try:
        value = cost(*shapes) if callable(cost) else cost * prod(shapes[0][:-1])
        return int(value)
    except Exception as fault:
        raise PlanError(
            f"{name}= of leaf {path} raised {type(fault).__name__}: {fault}",
            why=f"it was given the shapes {', '.join(map(str, shapes))}",
        ) from fault
