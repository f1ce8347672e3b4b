"""Routed experts of a server over its ranks: each runs its own for all tokens, results are summed.

A rank holds a block of the experts (ep), and of each of them a slice (etp), on the device or below
it. The module that combines experts' results runs as it is: an expert that lies elsewhere gives
zeros here, one that is cut gives its part of a sum, and what the module gives is summed over the
ranks. Decoding tokens are few: every rank has them all, so no row is sent to its expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.utils import _pytree as pytree

from ir.errors import PlanError
from planner.routed import (
    inside,
    lists_of,
    routed_modules,
    summing_modules,
    sums_of,
    weights_of,
)
from planner.runtime.context import Context
from planner.runtime.experts import lay_out, region_of, use_grouped_matmuls
from planner.runtime.parts import boxes_of, local_of
from planner.runtime.routed import Tokens, run_routed
from planner.runtime.serve.lent import Place, lent, parameter
from planner.runtime.serve.replicas import met
from planner.runtime.site import Site
from planner.runtime.tensor import fits

aten = torch.ops.aten


def apply(sites: Sequence[Site], stage: nn.Module, context: Context) -> None:
    """Lay stacks of experts over ep and etp, and have their modules give sums over the ranks."""
    if context.meshes.decisions.ep * context.meshes.decisions.etp == 1:
        return
    use_grouped_matmuls(stage)  # for those on the device
    for site in sites:
        lay_out(site, context)
        for names in lists_of(site.unit):
            _leave_out(site, names, context)
        for path in summing_modules(site.unit):
            _sum_over_ranks(site, path, context)
        for path in routed_modules(site.unit) if context.meshes.decisions.tp > 1 else ():
            region = replace(region_of(site, path, context), reductions=())
            run_routed(region, context, WholeTokens(context))


class WholeTokens(Tokens):
    """All tokens on each rank: inside a routed module they are plain tensors."""

    def __init__(self, context: Context) -> None:
        self.mesh, self.split = context.meshes.tp, True
        self.batch = self.own = 0

    def enter(self, x: Any) -> Any:
        return _plain(x) if isinstance(x, DTensor) and x.device_mesh == self.mesh else x

    def leave(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, DTensor):
            return x
        return DTensor.from_local(x, self.mesh, (Replicate(),), run_check=False)


def _plain(x: DTensor) -> Tensor:
    whole = x if x.placements == (Replicate(),) else x.redistribute(placements=(Replicate(),))
    return whole.to_local()


def _leave_out(site: Site, names: Sequence[str], context: Context) -> None:
    """Of experts that are modules of a list, let go of other ranks'. names: one for each expert."""
    local, device = len(names) // context.meshes.decisions.ep, context.meshes.device_type
    for expert, name in enumerate(names):
        if expert // local != context.meshes.rank("ep"):
            where, _, last = name.rpartition(".")
            owner = site.module.get_submodule(where)
            given = owner._parameters[last]
            assert given is not None
            absent = Absent(given.shape, given.dtype, torch.device(device))
            owner._parameters[last] = parameter(absent)


def _sum_over_ranks(site: Site, path: str, context: Context) -> None:
    """Patch a module: inside, stacks of experts are this rank's; what it gives is everybody's."""
    module = site.module.get_submodule(path)
    inner, tokens = module.forward, WholeTokens(context)
    tp, replicas = context.meshes.tp.get_group(), context.meshes.decisions.dp > 1
    places = []
    for weight in weights_of(site.unit):
        owner, _, name = weight.name.rpartition(".")
        if inside(owner, path):
            places.append(Place(site.module.get_submodule(owner), name))

    def with_own(*args: Any, **kwargs: Any) -> Any:
        held = [cast(nn.Parameter, place.module._parameters[place.name]) for place in places]
        given = [parameter(_own(p)) for p in held]
        with lent(places, given, held):
            return inner(*args, **kwargs)

    specs = sums_of(site.unit, path)
    assert specs is not None  # others are refused

    def sums(x: Tensor) -> bool:
        return any(fits(x, spec) for spec in specs)

    run = met(with_own, path, sums, context) if replicas else with_own

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(tokens.enter, (args, kwargs))
        return pytree.tree_map_only(
            Tensor, lambda x: _summed(x, tp) if sums(x) else x, run(*args, **kwargs)
        )

    module.forward = forward


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def _own(p: nn.Parameter) -> Own:
    """A stack over ep and etp as this rank's forward reads it."""
    assert isinstance(p, DTensor)
    return Own(local_of(p), boxes_of(p)[0].offsets[0], p.shape[0])


class Own(torch.Tensor):
    """A stack (experts, ..) of which this rank holds `local`, consecutive ones from `first` on.

    One that it does not hold gives zeros. flipped: the last two dimensions change places.
    """

    local: Tensor
    first: int
    flipped: bool

    @staticmethod
    def __new__(
        cls, local: Tensor, first: int, experts: int, flipped: bool = False
    ) -> Own:
        shape = (experts, *_flipped(local.shape[1:], flipped))
        made: Own = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=False
        )
        made.local, made.first, made.flipped = local, first, flipped
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Own({list(self.shape)}, {self.local.shape[0]} from {self.first} on)"

    def one(self, expert: int) -> Tensor:
        """An expert's weight, wherever it is; one of zeros where it is another rank's."""
        at = expert % self.shape[0] - self.first
        if not 0 <= at < self.local.shape[0]:
            if self.dim() == 2:
                return torch.zeros(self.shape[1:], dtype=self.dtype, device=self.device)
            return Absent(self.shape[1:], self.dtype, self.device)
        found = self.local[at]
        return found.t() if self.flipped else found

    def rows(self, experts: Tensor) -> Tensor:
        """Of a table (experts, f) the row of each of some experts, zeros for others' experts."""
        at = experts - self.first
        here = (at >= 0) & (at < self.local.shape[0])
        found = self.local[at.clamp(0, self.local.shape[0] - 1)]
        return found * here.unsqueeze(-1)

    def products(self, func: Any, rows: Tensor, ends: Tensor) -> Tensor:
        """A grouped matmul: rows (n, k) by expert, whose rows end at `ends` (experts)."""
        mine = ends[self.first : self.first + self.local.shape[0]]
        before = ends[self.first - 1 : self.first] if self.first else torch.zeros_like(mine[:1])
        found = rows.new_zeros(rows.shape[0], self.shape[-1])
        edges = torch.cat((before, mine)).tolist()
        start, end = edges[0], edges[-1]
        if start == end:
            return found
        if type(self.local) is Tensor:
            weight = self.local.mT if self.flipped else self.local
            found[start:end] = func(rows[start:end], weight, mine - before)
            return found
        for at, (a, b) in enumerate(itertools.pairwise(edges)):
            if a < b:
                found[a:b] = rows[a:b] @ self.one(self.first + at)
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        rule = _OWN.get(func)
        if rule is None or kwargs:
            raise PlanError(
                f"{func} reads a stack of experts that lies over ranks",
                why="experts are taken one by one, or multiplied by grouped matmuls",
            )
        return rule(func, *args)


def _flipped(shape: Sequence[int], flip: bool) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if flip else tuple(shape)


def _same(func: Any, w: Own) -> Own:
    return Own(w.local, w.first, w.shape[0], w.flipped)


def _turn(func: Any, w: Own, *dims: int) -> Own:
    if w.dim() != 3 or {d % 3 for d in dims} != {1, 2}:
        raise PlanError(f"dimensions {dims} of a stack of experts over ranks change places")
    return Own(w.local, w.first, w.shape[0], not w.flipped)


def _taken(func: Any, w: Own, dim: int, expert: int) -> Tensor:
    if dim % w.dim():
        raise PlanError(f"dimension {dim} of a stack of experts over ranks is cut")
    return w.one(int(expert))


def _looked_up(func: Any, w: Own, experts: Sequence[Tensor | None]) -> Tensor:
    (index,) = experts
    if w.dim() != 2 or index is None:
        raise PlanError("a stack of experts over ranks is gathered by expert, one for each row")
    return w.rows(index)


def _grouped(func: Any, rows: Tensor, w: Own, ends: Tensor, *rest: Any) -> Tensor:
    return w.products(func, rows, ends)


_OWN: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same, aten.alias.default: _same, aten.transpose.int: _turn,
    aten.select.int: _taken, aten.index.Tensor: _looked_up,
    aten._grouped_mm.default: _grouped,
}  # fmt: skip


class Absent(torch.Tensor):
    """An expert's weight that another rank holds: what it multiplies is zero."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Absent:
        made: Absent = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=False
        )
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Absent({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        weight = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Absent))
        if func in (aten.detach.default, aten.alias.default):
            return Absent(weight.shape, weight.dtype, weight.device)
        if func in (aten.t.default, aten.transpose.int):
            return Absent(weight.shape[::-1], weight.dtype, weight.device)
        if func is aten.mm.default and args[1] is weight:
            return args[0].new_zeros(args[0].shape[0], weight.shape[1])
        if func is aten.linear.default and args[1] is weight and args[2:] in ((), (None,)):
            return args[0].new_zeros(*args[0].shape[:-1], weight.shape[0])
        args, kwargs = pytree.tree_map_only(
            Absent, lambda x: torch.zeros(x.shape, dtype=x.dtype, device=x.device),
            (args, kwargs or {}),
        )  # fmt: skip
        return func(*args, **kwargs)
