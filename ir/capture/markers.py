"""What folding left in the trace: where a unit begins and ends, and where one runs again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import fx

from ir.backward import differentiable
from ir.capture.body import Body, Known
from ir.graph import Node, Unit

if TYPE_CHECKING:
    from ir.capture.lower import Lowering


def enter(low: Lowering, a: fx.Node) -> None:
    """A representative begins: its arguments become inputs, its parameters its own."""
    xs, path, _ = _operands(a)
    body = Body(path=path)
    for full in (*low.parameters, *low.buffers):
        if full.startswith(f"{path}."):
            body.own(low.described(full, full[len(path) + 1 :]))
    names, refs = [], []
    for index, x in enumerate(xs):
        ref, name = str(low.value(x)), f"in{index}"
        body.take(name, low.body.values[ref], low.body.diff.get(ref, False))
        names.append(name)
        refs.append(ref)
    low.enclosing.append((low.body, tuple(refs)))
    low.body = body
    low.env[a] = (body, names)


def leave(low: Lowering, a: fx.Node) -> None:
    """A representative ends: it is a class, and its first instance."""
    xs, path, key = _operands(a)
    body = low.body
    outputs = tuple(str(low.value(x)) for x in xs)
    low.body, refs = low.enclosing.pop()
    outer = tuple(str(low.value(node)) for node, _ in body.outer)
    unit = Unit(
        name=key, inputs=tuple(body.inputs), parameters=tuple(body.parameters.values()),
        nodes=tuple(body.nodes), outputs=outputs,
        diff_inputs=tuple(name for name, _ in body.inputs if body.diff[name]),
    )  # fmt: skip
    low.classes[key] = Known(unit=unit, outer=outer)
    _instance(low, a, path, key, (*refs, *outer))


def again(low: Lowering, a: fx.Node) -> None:
    """Another instance of a class; where other inputs carry a gradient, a class of its own."""
    xs, path, key = _operands(a)
    known = low.classes[key]
    refs = (*(str(low.value(x)) for x in xs), *known.outer)
    names = [name for name, _ in known.unit.inputs]
    learns = tuple(name for name, ref in zip(names, refs) if low.body.diff.get(ref))
    if learns != known.unit.diff_inputs:
        key = f"{key}/{','.join(learns)}"
        unit = replace(known.unit, name=key, diff_inputs=learns)
        low.classes.setdefault(key, replace(known, unit=unit))
    _instance(low, a, path, key, refs)


def _instance(low: Lowering, a: fx.Node, path: str, key: str, refs: tuple[str, ...]) -> None:
    unit = low.classes[key].unit
    learns = differentiable(unit)
    returns = low.returns.get(path)
    node = Node(
        name=low.body.unique(path), op="call", inputs=refs,
        outputs=tuple(unit.values[o] for o in unit.outputs),
        attrs=(("path", path), *((("returns", returns),) if returns else ()), ("unit", key)),
        source=low.source_of(a),
    )  # fmt: skip
    low.body.add(node, tuple(learns[o] and not low.no_grad for o in unit.outputs))
    low.env[a] = (low.body, list(node.refs()))


def _operands(a: fx.Node) -> tuple[list[fx.Node], str, str]:
    """(tensors, module path, class) of a marker."""
    xs: Any = a.args[0]
    return list(xs), str(a.args[-2]), str(a.args[-1])


MARKERS: Mapping[str, Callable[[Lowering, fx.Node], None]] = MappingProxyType(
    {"enter": enter, "leave": leave, "call": again}
)
