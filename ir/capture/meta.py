"""Models without memory: parameters, buffers and inputs on the meta device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# A real tensor of this size made while the model is built is memory for nothing: no factory reads
# the values of one. A smaller one stays real, so that buffers may be computed and looked at.
LARGEST_REAL_ELEMENTS = 2**22
_CREATORS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
_FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)


class _LargeOnMeta(TorchFunctionMode):
    """Creates on meta what is too large to be looked at, and does not fill what has no memory."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS or getattr(func, "__module__", "") == nn.init.__name__:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        if (
            func in _CREATORS
            and kwargs.get("device") is None
            and _elements(args, kwargs) > (LARGEST_REAL_ELEMENTS)
        ):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _elements(args: Any, kwargs: Any) -> int:
    """How many elements a call of torch.empty and its like asks for."""
    size = kwargs.get("size", args[0] if args and isinstance(args[0], (tuple, list)) else args)
    return math.prod(n for n in size if isinstance(n, int))


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put every parameter on meta as it is registered; buffers stay real, so RoPE tables are right.

    A parameter registered twice (tied weights) stays one parameter.
    """
    original = nn.Module.register_parameter
    moved: dict[int, tuple[Any, Any]] = {}  # id -> the real one, kept alive, and its stand-in

    def register(module: nn.Module, name: str, param: Any) -> None:
        if isinstance(param, nn.Parameter) and not param.is_meta:
            param = moved.setdefault(id(param), (param, _stand_in(param)))[1]
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextlib.contextmanager
def default_dtype_kept() -> Iterator[None]:
    """Put the default dtype back, which a factory may set and forget."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


def _stand_in(param: nn.Parameter) -> nn.Parameter:
    stand_in = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
    stand_in.__dict__.update(param.__dict__)
    return stand_in


def move_to_meta(model: nn.Module) -> None:
    """Move what is still real: parameters, buffers, and tensors that modules hold as attributes."""
    moved: dict[int, tuple[Any, Any]] = {}

    def meta(value: Tensor) -> Any:
        if value.is_meta:
            return value
        stand_in = _stand_in(value) if isinstance(value, nn.Parameter) else value.to("meta")
        return moved.setdefault(id(value), (value, stand_in))[1]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = meta(tensor)
        for name, value in vars(module).items():
            if name.startswith("_") and name.endswith(("_hooks", "_parameters", "_buffers")):
                continue
            if isinstance(value, Tensor):
                module.__dict__[name] = meta(value)
            elif isinstance(value, (tuple, list, dict)) and value and name != "_modules":
                module.__dict__[name] = pytree.tree_map_only(Tensor, meta, value)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def on_meta(value: Any) -> Any:
    """The same nested value with its tensors on meta."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), value)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """What every trace needs: constants made on meta, and `F.grouped_mm` in any dtype."""
    with _constants_without_values(), _grouped_mm_in_any_dtype():
        yield


@contextlib.contextmanager
def _constants_without_values() -> Iterator[None]:
    """`torch.tensor(values, device=x.device)` in a forward: export cannot keep one on meta."""
    original = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device")) != "meta":
            return original(data, *args, **kwargs)
        model = original(data, dtype=kwargs.get("dtype"), device="cpu")
        return torch.zeros(tuple(model.shape), dtype=model.dtype, device="meta")

    torch.tensor = tensor
    try:
        yield
    finally:
        torch.tensor = original


@contextlib.contextmanager
def _grouped_mm_in_any_dtype() -> Iterator[None]:
    """Its shape rule allows bf16 alone, though its kernels do more.

    What a plan trains in is the plan's precision, not the dtype the factory happened to build.
    """
    registrations: Any = torch._meta_registrations
    strict = getattr(registrations, "_meta_grouped_mm_common", None)
    output = getattr(registrations, "_create_grouped_mm_output_tensor", None)
    if strict is None or output is None:
        yield
        return

    def lenient(mat_a: Tensor, mat_b: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("scale_a") is not None or mat_a.dtype != mat_b.dtype:
            return strict(mat_a, mat_b, *args, **kwargs)
        return output(mat_a, mat_b, kwargs.get("offs"), kwargs.get("out_dtype"))

    registrations._meta_grouped_mm_common = lenient
    try:
        yield
    finally:
        registrations._meta_grouped_mm_common = strict
