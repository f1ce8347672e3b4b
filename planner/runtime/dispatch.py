"""Rows that are with their experts, while the model's code handles them as if they were here.

Between two grouped matmuls a model works on each row alone (activation, gate, cast): those
operations run where the rows are. Anything else asks for the rows, and brings them back once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ir.errors import PlanError
from planner.runtime.exchange import Exchange

aten = torch.ops.aten
# operations that keep rows apart though they are not elementwise, with their `dim` argument's
# place; it must not be the rows'
ALONG_FEATURES = {
    aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.slice.Tensor: 1,
    aten.cat.default: 1, aten.glu.default: 1,
}  # fmt: skip
AS_IT_IS = (
    aten._to_copy.default, aten.detach.default, aten.alias.default, aten.clone.default,
    torch.ops.prim.device.default,  # autograd asks a fake tensor for it
)  # fmt: skip
OF_VALUES = ("T", "mT", "H", "mH", "real", "imag", "data", "grad")  # attributes that need rows
OF_SHAPE = ("size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "nelement")


class Dispatched(Tensor):
    """Presents [n, f]; holds rows [m, f] of the local experts.

    lies: over etp, features are "whole", "split" (f is all of them), or "partial" sums.
    """

    _rows: Tensor
    _exchange: Exchange
    _lies: str
    _home: Tensor | None

    @staticmethod
    def __new__(
        cls: type[Dispatched], rows: Tensor, exchange: Exchange, count: int, lies: str
    ) -> Dispatched:
        ways = len(exchange.blocks) if lies == "split" else 1
        made: Dispatched = Tensor._make_wrapper_subclass(
            cls, (count, rows.shape[1] * ways), dtype=rows.dtype, device=rows.device,
            requires_grad=rows.requires_grad,
        )  # fmt: skip
        made._rows, made._exchange, made._lies, made._home = rows, exchange, lies, None
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"Dispatched({tuple(self.shape)}, {tuple(self._rows.shape)} here)"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        attribute = name == "__get__" and func.__self__.__name__ not in OF_VALUES  # type: ignore[attr-defined]
        if attribute or name in OF_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if _stay(leaves):
            try:
                return _where_they_are(func, leaves, spec)
            except _NotByRow:
                pass
        if name.endswith("_") and not name.endswith("__") and isinstance(leaves[0], Dispatched):
            raise PlanError(f"{name} changes rows that are with their experts")
        args, kwargs = pytree.tree_unflatten(
            [home(x) if isinstance(x, Dispatched) else x for x in leaves], spec
        )
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise PlanError(f"{func} was given rows that are with their experts, past torch functions")


def home(x: Dispatched) -> Tensor:
    """Rows [n, f] back where they came from, in the order they had there."""
    if x._home is None:
        if x._lies == "split":
            raise PlanError(
                "rows with split features are read whole before the experts' last matmul",
                hints=("plan with --fix etp=1",),
            )
        x._home = x._exchange.back(x._rows, Tensor.size(x, 0))
    return x._home


class PerExpert(Tensor):
    """A row of each row's expert (a bias): presents [n, f]; made where the rows are."""

    _table: Tensor
    _experts: Tensor

    @staticmethod
    def __new__(cls: type[PerExpert], table: DTensor, experts: Tensor) -> PerExpert:
        """table: [experts, f], over ep; experts: [n], the expert of each row."""
        made: PerExpert = Tensor._make_wrapper_subclass(
            cls, (experts.shape[0], table.shape[1]), dtype=table.dtype, device=table.device
        )
        made._table, made._experts = table.to_local(), experts
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__" or name in OF_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if Dispatched in types:
            return Dispatched.__torch_function__(func, types, args, kwargs)
        raise PlanError(f"{name} reads a bias of experts away from their rows")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise PlanError(f"{func} reads a bias of experts away from their rows")


class _NotByRow(Exception):
    """The operation looks across rows."""


class _ByRow(TorchDispatchMode):
    """Lets operations run that treat each row alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.pointwise not in func.tags and func not in AS_IT_IS:
            at = ALONG_FEATURES.get(func)
            along = (
                None if at is None else args[at] if len(args) > at else (kwargs or {}).get("dim")
            )
            if along not in (1, -1) and not (func is aten.glu.default and along is None):
                raise _NotByRow
        return func(*args, **(kwargs or {}))


def _stay(leaves: list[Any]) -> bool:
    """Whether the operands are rows of one exchange, and what is the same for every row."""
    given = [x for x in leaves if isinstance(x, Dispatched)]
    first = given[0]
    if any(
        x._exchange is not first._exchange or x._lies != first._lies or x._lies == "partial"
        for x in given
    ):
        return False
    for x in leaves:
        if isinstance(x, Tensor) and not isinstance(x, (Dispatched, PerExpert)):
            if x.dim() > 1 and not (x.dim() == 2 and x.shape[0] == 1):
                return False
            if first._lies == "split" and x.numel() > 1:
                return False
    return True


def _where_they_are(func: Callable[..., Any], leaves: list[Any], spec: Any) -> Any:
    first = next(x for x in leaves if isinstance(x, Dispatched))
    count, m = Tensor.size(first, 0), first._rows.shape[0]

    def local(x: Any) -> Any:
        if isinstance(x, PerExpert):
            return first._exchange.each(x._table, x._experts)
        return x._rows if isinstance(x, Dispatched) else x

    args, kwargs = pytree.tree_unflatten(list(map(local, leaves)), spec)
    with _ByRow():
        out = func(*args, **kwargs)

    def present(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dim() != 2 or x.shape[0] != m:
            raise _NotByRow
        same = next((d for d in leaves if isinstance(d, Dispatched) and d._rows is x), None)
        return same if same is not None else Dispatched(x, first._exchange, count, first._lies)

    made = pytree.tree_map(present, out)
    if made is first:  # changed in place
        first._home = None
    return made
