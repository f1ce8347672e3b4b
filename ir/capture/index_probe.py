"""Does a layer do something else because of where it stands? Asked while its forward runs.

Layers that differ in nothing but an attribute that equals their position are one class, unless
their forward looks at it. A probe stands in for the attribute and notes arithmetic, comparison
and printing; a subscript (`scales[self.index]`) reads an int past any method, so that is found in
the byte code.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class IndexProbe(int):
    """A layer's own index; whatever computes with it adds `where` to `touched`."""

    touched: set[str]
    where: str


def _noting(name: str) -> Callable[..., Any]:
    def method(self: IndexProbe, *args: Any) -> Any:
        self.touched.add(self.where)
        return getattr(int, name)(self, *args)

    return method


for _name in (
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__radd__", "__sub__",
    "__rsub__", "__mul__", "__rmul__", "__mod__", "__rmod__", "__floordiv__", "__rfloordiv__",
    "__truediv__", "__rtruediv__", "__index__", "__bool__", "__float__", "__int__", "__neg__",
    "__and__", "__pow__", "__rpow__", "__hash__", "__format__", "__str__",
):  # fmt: skip
    setattr(IndexProbe, _name, _noting(_name))


def probe(
    module: nn.Module,
    key: str,
    attributes: set[tuple[str, str]],
    touched: set[str],
    undo: list[Callable[[], None]],
) -> None:
    """Stand probes in for a representative's index attributes; `undo` gets how to take them out."""
    modules = dict(module.named_modules())
    for path, name in sorted(attributes):
        owner = modules.get(path)
        if owner is None or name not in vars(owner):
            continue
        if subscripts_by(owner, name):
            touched.add(key)
        value = vars(owner)[name]
        stand_in = IndexProbe(value)
        stand_in.touched, stand_in.where = touched, key
        setattr(owner, name, stand_in)
        undo.append(lambda owner=owner, name=name, value=value: setattr(owner, name, value))  # type: ignore[misc]


def subscripts_by(module: nn.Module, attribute: str) -> bool:
    """Whether a method reads `x[self.attribute]`, or through a local name."""
    return any(_subscripts(code, attribute) for code in _methods(type(module)))


def _methods(cls: type) -> Iterator[types.CodeType]:
    for base in cls.__mro__:
        if base is nn.Module:
            return
        for name, value in vars(base).items():
            code = getattr(getattr(value, "__func__", value), "__code__", None)
            if isinstance(code, types.CodeType) and name != "__init__":
                yield code


def _subscripts(code: types.CodeType, attribute: str) -> bool:
    """Follow the attribute from its load to a subscript, or into a local and from there."""
    holders: set[str] = set()
    held = False
    for step in dis.get_instructions(code):
        if step.opname == "CACHE":
            continue
        if held and (step.opname == "BINARY_SUBSCR" or step.argrepr == "[]"):
            return True
        if held and step.opname == "STORE_FAST":
            holders.add(str(step.argval))
        loads = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        held = (step.opname == "LOAD_ATTR" and step.argval == attribute) or (
            step.opname.startswith("LOAD_FAST") and loads[-1] in holders
        )
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return any(_subscripts(c, attribute) for c in inner)
