"""What DTensor cannot do, or does wrong, done right: a torch-function mode around a forward.

Plain tensors that meet DTensors are taken as the same on every rank. An operation without a rule
for its placements runs whole on every rank, counted in the report. Reading a number reads the
whole value; random numbers, attention, convolutions and losses are taken on local tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from planner.runtime import random
from planner.runtime.attention_rule import attend
from planner.runtime.context import Context
from planner.runtime.embedding import embed
from planner.runtime.fused import is_fused, run_fused
from planner.runtime.loss import cross_entropy
from planner.runtime.reshard import gradient_as, reshard

# they read numbers: of a partial sum or a shard DTensor reads the local ones
READS = frozenset({
    "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__",
    "__complex__", "__contains__", "is_nonzero", "equal", "allclose", "__format__",
})  # fmt: skip
# they claim results that split operands do not give, or fail in backward
WHOLE = frozenset({
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "conv_tbc", "group_norm", "batch_norm", "instance_norm", "lstm", "gru", "rnn_tanh", "rnn_relu",
})  # fmt: skip
# they compute nothing
HANDLING = frozenset({
    "__get__", "__set__", "size", "dim", "detach", "requires_grad_", "register_hook",
    "register_post_accumulate_grad_hook", "retain_grad", "backward", "is_floating_point", "numel",
    "nelement", "ndimension", "element_size", "stride", "storage_offset", "is_contiguous",
    "data_ptr", "untyped_storage", "set_", "alias", "is_complex", "get_device", "dim_order",
    "__len__", "__hash__", "__repr__", "has_names", "is_inference", "_is_view", "__deepcopy__",
})  # fmt: skip
VIEWS = frozenset({
    "view", "reshape", "flatten", "unflatten", "expand", "expand_as", "view_as", "reshape_as",
    "repeat_interleave",
})  # fmt: skip


@torch._dynamo.assume_constant_result
def name_of(func: Callable[..., Any]) -> str:
    """What a function is called: to a compiler a constant, as `__name__` is not (torch 2.13)."""
    return getattr(func, "__name__", "")


class Whole(TorchFunctionMode):
    """While it is active, operations on DTensors are right, and those that run whole counted.

    where: the unit, for the report; empty between units, where it does nothing while the mode
    of a unit runs.
    """

    def __init__(self, context: Context, where: str) -> None:
        super().__init__()
        self.context, self.where = context, where

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name == "cross_entropy" and not self._idle():
            return cross_entropy(self.context, *args, **kwargs)
        mesh = _mesh_of(args) or _mesh_of(tuple(kwargs.values()))
        if mesh is None or name in HANDLING or self._idle():
            return func(*args, **kwargs)
        if name in READS:
            return func(*_tree(_read, args), **_tree(_read, kwargs))
        if name in random.ELEMENTWISE or name in random.OTHERS:
            return self._random(func, name, args, kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(func, mesh, *args, **kwargs)
        if func is F.embedding:
            return embed(*args, **kwargs)
        if name in WHOLE:
            return self._whole(func, name, mesh, args, kwargs)
        if _changes(name) and isinstance(args[0], Tensor) and not isinstance(args[0], DTensor):
            # in place, into what every rank has whole: DTensor would write into a copy of its own
            return self._whole(func, name, mesh, args, kwargs)
        here = _Here(mesh)
        args, kwargs = _tree(here, args), _tree(here, kwargs)
        if name in ("cat", "concat", "concatenate") and args:
            args = (_not_empty(args[0]), *args[1:])
        if any(map(is_fused, args)) or any(map(is_fused, kwargs.values())):
            out = run_fused(func, name, args, kwargs)
            if out is not NotImplemented:
                return out
            return self._whole(func, name, mesh, args, kwargs)
        if func is Tensor.unflatten:  # its super() is what torch 2.13 does not compile
            func = torch.unflatten
        try:
            out = func(*args, **kwargs)
        except (NotImplementedError, RuntimeError, ValueError, IndexError, AssertionError) as fault:
            return self._whole(func, name, mesh, args, kwargs, fault)
        if name in VIEWS and isinstance(out, DTensor) and out.requires_grad:
            _pin(out)
        return out

    def _idle(self) -> bool:
        return not self.where and self.context.report.running

    def _whole(
        self, func: Callable[..., Any], name: str, mesh: DeviceMesh, args: Any, kwargs: Any,
        fault: Exception | None = None,
    ) -> Any:  # fmt: skip
        """Run on whole values, the same on every rank."""
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, DTensor)]
        if fault is not None or any(not p.is_replicate() for x in leaves for p in x.placements):
            self.context.report.replicated[self.where, name] += 1
        inside, named = _tree(_local, args), _tree(_local, kwargs)
        changes = _changes(name)
        if changes and isinstance(args[0], DTensor):
            inside = (inside[0].clone(), *inside[1:])
        try:
            out = func(*inside, **named)
        except Exception as second:
            raise second from fault
        wrap = _Here(mesh)
        if changes and not isinstance(args[0], DTensor):
            return out
        if not changes:
            return _tree(wrap, out)
        args[0].copy_(wrap(inside[0] if out is None else out))
        return None if out is None else args[0]

    def _random(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        if _idle_dropout(name, args, kwargs) or not isinstance(x, DTensor):
            return func(*args, **kwargs)
        mesh = x.device_mesh
        if name not in random.ELEMENTWISE or any(p.is_partial() for p in x.placements):
            with random.seeded(self._seed(False, mesh), x.to_local().device):
                return self._whole(func, name, mesh, args, kwargs)
        split = any(isinstance(p, Shard) for p in x.placements)
        with random.seeded(self._seed(split, mesh), x.to_local().device):
            if name.endswith("_"):
                func(x._local_tensor, *args[1:], **kwargs)
                return x
            kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
            out = func(x.to_local(grad_placements=x.placements), *args[1:], **_without(kwargs))
        return pytree.tree_map_only(
            Tensor,
            lambda y: DTensor.from_local(y, mesh, x.placements, run_check=False),
            out,
        )

    def _attend(
        self, func: Callable[..., Any], mesh: DeviceMesh, query: Any, key: Any, value: Any,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        here = _Here(mesh)
        query, key, value = here(query), here(key), here(value)
        dropout = args[1] if len(args) > 1 else kwargs.get("dropout_p", 0.0)
        if not dropout:
            return attend(func, query, key, value, *args, **kwargs)
        split = any(x.placements != (Replicate(),) for x in (query, key, value))
        with random.seeded(self._seed(split, mesh), query.to_local().device):
            return attend(func, query, key, value, *args, **kwargs)

    def _seed(self, split: bool, mesh: DeviceMesh) -> int:
        meshes = self.context.meshes
        samples = meshes.rank("dp") * meshes.cp.size() + meshes.rank("cp")
        return random.drawn_seed(samples, 1 + mesh.get_local_rank() if split else 0)


def _changes(name: str) -> bool:
    """Whether a function writes into its first argument."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _idle_dropout(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a dropout drops nothing."""
    if "dropout" not in name:
        return False
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
    return not training or p == 0


def _without(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "input"}


def _mesh_of(values: Any) -> DeviceMesh | None:
    """The mesh of the first DTensor among arguments, lists of them included."""
    for x in values:
        if isinstance(x, DTensor):
            return x.device_mesh
        if isinstance(x, (tuple, list)):
            found = _mesh_of(x)
            if found is not None:
                return found
    return None


def _tree(change: Callable[[Any], Any], value: Any) -> Any:
    """Change every tensor in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        parts = [_tree(change, x) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: _tree(change, x) for key, x in value.items()}
    return value


class _Here:
    """Make plain tensors DTensors, the same on every rank; bring replicated ones from another
    mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(x, DTensor):
            if x.device_mesh == self.mesh or any(not p.is_replicate() for p in x.placements):
                return x
            x = x.to_local()
        at: list[Placement] = [Replicate()] * self.mesh.ndim
        return DTensor.from_local(x, self.mesh, at, run_check=False)


def _not_empty(parts: Any) -> Any:
    """Without the tensors of shape [0] that torch.cat leaves out (a cache that is still empty)."""
    kept = [x for x in parts if x.dim() != 1 or len(x)]
    return kept or parts


def _read(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _local(x: Tensor) -> Tensor:
    """The whole value; its gradient, the same on every rank, goes back to where it lay."""
    if not isinstance(x, DTensor):
        return x
    whole: tuple[Placement, ...] = (Replicate(),) * x.device_mesh.ndim
    if x.placements != whole:
        one = x.device_mesh.ndim == 1
        x = (
            reshard(x, Replicate(), gradient_as(x.placements[0]))
            if one
            else x.redistribute(placements=whole)
        )
    return x.to_local(grad_placements=whole)


def _pin(out: DTensor) -> None:
    """Have a view's gradient lie as the view: another placement may not be viewed back."""
    lies = out.placements

    def pinned(grad: Tensor) -> Tensor:
        if not isinstance(grad, DTensor) or grad.placements == lies:
            return grad
        if all(g.is_partial() and p.is_replicate() for g, p in zip(grad.placements, lies)):
            return grad  # a sum that the plan reduces further back
        return grad.redistribute(placements=[gradient_as(p) for p in lies])

    out.register_hook(pinned)
