"""Lowering of operations that stand for a whole module: declared leaves, recognised experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import fx

from ir.capture.leaf import MARK, costs
from ir.capture.sized import Sized
from ir.capture.sizes import recover
from ir.graph import Tensor, dim

if TYPE_CHECKING:
    from ir.capture.lower import Lowering


def declared_leaf(low: Lowering, a: fx.Node, b: Sized) -> None:
    """One node with the declared costs; what it keeps is an output of its own."""
    xs: Any = a.args[0]
    path, count = str(a.args[2]), int(a.args[3])  # type: ignore[arg-type]
    where = low.source_of(a)
    outs = [low.tensor(x, y, where) for x, y in zip(a.meta["val"], b.value)]
    given = [[x.meta["val"].shape for x in xs[:count]], [x.shape for x in b.operands[:count]]]
    shapes = tuple([tuple(int(d) for d in shape) for shape in some] for some in given)
    declared = getattr(type(low.model.get_submodule(path)), MARK)
    attrs, kept = costs(
        declared, path, shapes, lambda x, y: recover(x, y, low.sizes, where), outs, low.sizes
    )
    refs = tuple(str(low.value(x)) for x in xs)
    all_outs = (*outs, kept) if kept else tuple(outs)
    low.put(a, "leaf", refs, all_outs, {**attrs, "inputs": count})
    low.env[a] = (low.body, list(low.body.nodes[-1].refs()[: len(outs)]))


def expert_linear(low: Lowering, a: fx.Node, b: Sized) -> None:
    """One linear of every expert: a grouped matmul over weights that stay where they are."""
    rows, names, offsets = _operands(low, a)
    n, k = low.body.values[names[0]].shape
    held = low.body.values[names[0]].dtype
    stacked = Tensor(shape=(dim(len(names)), k, n), dtype=held)
    pointer = low.put(a, "stack_view", names, (stacked,), {})
    out = low.tensor(a.meta["val"], b.value, low.source_of(a))
    low.put(a, "grouped_matmul", (rows, pointer, offsets), (out,), {})
    low.env[a] = (low.body, low.body.nodes[-1].name)


def expert_bias(low: Lowering, a: fx.Node, b: Sized) -> None:
    """The biases of that linear."""
    rows, names, offsets = _operands(low, a)
    one = low.body.values[names[0]]
    stacked = Tensor(shape=(dim(len(names)), *one.shape), dtype=one.dtype)
    pointer = low.put(a, "stack_view", names, (stacked,), {})
    out = low.body.values[rows]
    low.put(a, "expert_bias", (rows, pointer, offsets), (out,), {})
    low.env[a] = (low.body, low.body.nodes[-1].name)


def _operands(low: Lowering, a: fx.Node) -> tuple[str, tuple[str, ...], str]:
    """(rows, each expert's parameter, offsets)."""
    rows, experts, offsets = (x for x in a.args)
    names = tuple(str(low.value(x)) for x in experts)  # type: ignore[arg-type,union-attr]
    return str(low.value(rows)), names, str(low.value(offsets))  # type: ignore[arg-type]


LEAVES: Mapping[str, Callable[[Lowering, fx.Node, Sized], None]] = MappingProxyType(
    {"run": declared_leaf, "expert_linear": expert_linear, "expert_bias": expert_bias}
)
