"""Fused projections (qkv, gate and up): each rank holds its own rows of every part.

The plan leaves such a product split through the code that takes it apart. Its parameter is a
DTensor placed `_StridedShard(dim, split_factor=parts)`: each of the parts is split over tp, so
that what the parameter means as a whole is unchanged. So is the product of it, until it is taken
apart, which then needs no communication.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from cost_models.layout import Assignment
from ir.graph import Node, Unit

PRODUCTS = frozenset({"linear", "addmm", "matmul", "mm", "__matmul__"})
TAKES_APART = frozenset({
    "split", "chunk", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split",
})  # fmt: skip
# they keep the last dimension as it is, or change single elements
KEEPS = frozenset({
    "view", "reshape", "flatten", "unflatten", "to", "float", "half", "bfloat16", "type",
    "contiguous", "clone", "gelu", "silu", "relu",
})  # fmt: skip
_THROUGH = ("view", "reshape_copy", "cast", "copy", "add", "permute")


@functools.lru_cache(maxsize=256)
def fused_parameters(unit: Unit, assignment: Assignment) -> dict[str, int]:
    """Parameters of the unit that several equal parts lie in, and how many.

    A product that is taken apart on the dimension that it is split on, as planned, is traced back
    to the parameters that it is of.
    """
    options = assignment.of(unit)
    parts: dict[str, int] = {}
    for node in unit.nodes:
        if node.op != "split" or not node.attr("equal"):
            continue
        rank = len(node.outputs[0].shape)
        at = node.number("dim") % rank
        if options[node.name].ins[0] != at or options[node.name].outs[0] != at:
            continue
        for name in _behind(unit, assignment, node.inputs[0]):
            parts[name] = len(node.outputs)
    return parts


def _behind(unit: Unit, assignment: Assignment, ref: str) -> list[str]:
    """The parameters, split over tp, of the product that a value is."""
    options, found = assignment.of(unit), []
    while (node := unit.producers.get(ref)) is not None:
        chosen = options[node.name]
        found += [
            r for r, at in zip(node.inputs, chosen.ins) if r in unit.parameter_names and at >= 0
        ]
        if node.op not in _THROUGH or not _one_value(unit, node):
            return found if node.op in ("linear", "matmul") else []
        ref = next(r for r in node.inputs if r not in unit.parameter_names)
    return []


def _one_value(unit: Unit, node: Node) -> bool:
    return sum(r not in unit.parameter_names for r in node.inputs) == 1


def strided(at: Placement, parts: int) -> Placement:
    """The placement of a parameter of several parts, each split."""
    return _StridedShard(at.dim, split_factor=parts) if isinstance(at, Shard) else at


def is_fused(x: Any) -> bool:
    return isinstance(x, DTensor) and isinstance(x.placements[0], _StridedShard)


@torch._dynamo.assume_constant_result
def _dim_and_parts(at: Any) -> tuple[int, int]:
    """Of a `_StridedShard`. torch 2.13 compiles no reading of its fields."""
    return at.dim, at.split_factor


def run_fused(func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    """Run an operation on operands of several parts on every rank's own rows.

    NotImplemented where that cannot be: the operands must be gathered then.
    """
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, DTensor)]
    joined = [x for x in given if is_fused(x)]
    factor = _dim_and_parts(joined[0].placements[0])[1] if joined else 0
    if not joined or any(_dim_and_parts(x.placements[0])[1] != factor for x in joined):
        return NotImplemented
    if name in TAKES_APART:
        return _apart(name, args, kwargs)
    rest = [x for x in given if not is_fused(x)]
    if name in PRODUCTS:
        if any(x.placements != (Replicate(),) for x in rest):
            return NotImplemented
    elif name not in KEEPS or rest:
        return NotImplemented
    args = tuple(map(_as_shard, args))
    out = func(*args, **{key: _as_shard(value) for key, value in kwargs.items()})
    last = out.dim() - 1
    if out.placements != (Shard(last),) or (
        name in KEEPS and out.shape[last] != joined[0].shape[-1]
    ):
        return NotImplemented
    return _labelled(out, _StridedShard(last, split_factor=factor))


def _apart(name: str, args: Any, kwargs: Any) -> Any:
    """Take a value of several parts apart: each part of it, split as any other value."""
    x, *rest = args
    if not is_fused(x):
        return NotImplemented
    at, parts = _dim_and_parts(x.placements[0])
    size = rest[0] if rest else next(iter(kwargs.values()))
    dim = (rest[1] if len(rest) > 1 else kwargs.get("dim", 0)) % x.dim()
    if dim != at or len(rest) + len(kwargs) > 2:
        return NotImplemented
    if isinstance(size, (list, tuple)):
        counts = len(size) if len(set(size)) == 1 else 0
    else:
        counts = size if name.endswith(("chunk", "tensor_split")) else x.shape[dim] // size
    if counts != parts or x.shape[dim] % counts:
        return NotImplemented
    local: Tensor = x.to_local(grad_placements=x.placements)
    return tuple(
        DTensor.from_local(part, x.device_mesh, (Shard(dim),), run_check=False)
        for part in local.chunk(counts, dim)
    )


def _as_shard(x: Any) -> Any:
    """The same rows under a name that DTensor's rules know."""
    return _labelled(x, Shard(_dim_and_parts(x.placements[0])[0])) if is_fused(x) else x


def _labelled(x: DTensor, at: Placement) -> DTensor:
    local = x.to_local(grad_placements=x.placements)
    return DTensor.from_local(local, x.device_mesh, (at,), run_check=False)
