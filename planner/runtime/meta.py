"""Models without weights: parameters on the meta device, buffers real.

How each parameter would have been filled is recorded, so that `parallel.init` can do it later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from planner.runtime.tape import Replay, Tape, large, made


@contextmanager
def meta() -> Iterator[None]:
    """Build modules whose parameters have no storage; buffers are computed as they always are.

    `torch.device("meta")` would leave buffers that no checkpoint holds (rotary tables) as garbage.
    Not safe with several threads that build modules.
    """
    tape = Tape()
    moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # id -> the real one, its stand-in
    create, register, buffer = (
        nn.Parameter.__new__, nn.Module.register_parameter, nn.Module.register_buffer,
    )  # fmt: skip

    def parameter(cls: Any, data: Any = None, requires_grad: bool = True) -> nn.Parameter:
        if cls is not nn.Parameter or type(data) not in (Tensor, nn.Parameter):
            return cast(nn.Parameter, create(cls, data, requires_grad))
        found = tape.given(data) if not data.is_meta else made(data)
        empty = data if data.is_meta else torch.empty_like(data, device="meta")
        fresh: Any = create(cls, empty, requires_grad)
        if found is not None:
            fresh._recorded = found  # the same memory, as a parameter and its data are
            tape.parameters.add(found.memory)
        return cast(nn.Parameter, fresh)

    def hollow(real: nn.Parameter) -> nn.Parameter:
        """A parameter that was made before, or is of a class of its own; a tie stays a tie."""
        if real.is_meta or type(real) is not nn.Parameter:
            return real
        if id(real) not in moved:
            moved[id(real)] = (real, parameter(nn.Parameter, real, real.requires_grad))
        return moved[id(real)][1]

    def on_meta(module: nn.Module, name: str, given: nn.Parameter | None) -> None:
        register(module, name, hollow(given) if given is not None else None)

    def with_values(module: nn.Module, name: str, given: Any, persistent: bool = True) -> None:
        buffer(module, name, filled(given) if isinstance(given, Tensor) else given, persistent)

    nn.Parameter.__new__ = parameter  # type: ignore[method-assign, assignment]
    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    nn.Module.register_buffer = with_values  # type: ignore[method-assign, assignment]
    try:
        with _Recording(tape):
            yield
    finally:
        nn.Parameter.__new__ = create  # type: ignore[method-assign]
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        nn.Module.register_buffer = buffer  # type: ignore[method-assign]


class _Recording(TorchFunctionMode):
    """Notes what makes or changes tensors."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__set__":
            return self._assign(func, *args)
        if name == "__get__" and func.__self__.__name__ not in OF_VALUES:  # type: ignore[attr-defined]
            return func(*args, **kwargs)
        if large(func, args, kwargs):
            return self._tape.note(
                func, args, kwargs, lambda *a, **k: func(*a, **{**k, "device": "meta"})
            )
        return self._tape.note(func, args, kwargs, func)

    def _assign(self, func: Callable[..., Any], tensor: Tensor, value: Any) -> Any:
        """`parameter.data = value`: the parameter is what the value is."""
        is_data = func.__self__.__name__ == "data"  # type: ignore[attr-defined]
        if not (is_data and tensor.is_meta and made(tensor)):
            return func(tensor, value)
        known = made(value) if value.is_meta else self._tape.given(value)
        tensor._recorded = known  # type: ignore[attr-defined]
        if known is not None:
            self._tape.parameters.add(known.memory)
        return func(tensor, value.to("meta"))


OF_VALUES = ("data", "T", "mT", "H", "mH", "real", "imag")  # attributes that are tensors


def filled(tensor: Tensor) -> Tensor:
    """A recorded tensor with its values, unless they are made of parameters, which have none."""
    known = made(tensor)
    if known is None or not tensor.is_meta:
        return tensor
    if known.tape.sources(known.memory) & known.tape.parameters:
        return tensor
    first = torch.initial_seed()
    replay = Replay(seed_of=lambda memory: (first + memory) % 2**63, device=torch.device("cpu"))
    return replay.make(known)
