"""The cache of a call: the planned one whoever calls, and of each rank its own part.

A call of the model, by `generate` or in a loop by hand, is given the plan's cache where it brings
none. One that it brings is kept as the plan says or refused; on a stage of a pipeline its length is
that of the stage's own layers, and what a static cache holds is what the rank has of the heads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from ir.errors import PlanError
from planner.runtime.serve.kv import KEPT, Kv, cache_of, of_transformers
from planner.runtime.serve.pipe import NAMES, layers_here
from planner.runtime.serve.retrieve import alike

_LEAVE_OUT = "leave it out: the planned cache is given"


def with_cache(
    model: Any, forward: Callable[..., Any], kv: Kv, staged: bool, args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """What a forward is called with, its cache among what is named. Raises PlanError for a cache
    of the caller's that is not kept as planned."""
    if not of_transformers(model):
        return args, kwargs
    names = [*inspect.signature(forward).parameters]
    named = next((name for name in NAMES if name in names), None)
    if named is None:
        return args, kwargs
    args, kwargs = args[:1], dict(zip(names[1:], args[1:])) | kwargs
    cache = kwargs.get(named)
    if cache is None and (staged or not kv.plain) and _wanted(model, kwargs):
        cache = kwargs[named] = cache_of(model, kv)
    if cache is None:
        return args, kwargs
    if not kv.plain and getattr(cache, KEPT, None) != kv:
        raise PlanError(
            f"{named}={type(cache).__name__}, and the plan keeps its cache {said(kv)}",
            why="what this one holds is not in the plan's memory", hints=(_LEAVE_OUT,),
        )  # fmt: skip
    _keep_own(cache)
    if staged:
        layers_here(cache)
    return args, kwargs


def _wanted(model: Any, kwargs: Mapping[str, Any]) -> bool:
    use = kwargs.get("use_cache")
    return bool(getattr(model.config.get_text_config(), "use_cache", True) if use is None else use)


def said(kv: Kv) -> str:
    """How a plan keeps its cache, in words."""
    words = [f"in {kv.word}"] * (kv.word != "bf16") + ["on the host"] * kv.below
    if kv.window:
        words.append(f"as {kv.window} tokens" + " and blocks" * (kv.block > 0))
    return ", ".join(words)


def refuse_implementation(kv: Kv, named: Any) -> None:
    """Raise PlanError for a kind of cache that a call of `generate` asks for by name."""
    if named:
        raise PlanError(f"cache_implementation={named!r}, and the plan keeps its cache {said(kv)}",
                        hints=(_LEAVE_OUT, "a plan with kv=bf16 on the GPU, and no --kv-window"))


def _keep_own(cache: Any) -> None:
    """Have the layers of a static cache hold what this rank has of keys and values.

    They are written in place, by index, into tensors made of the first keys: made of those of a
    rank, they are of its heads alone, as those of a cache that grows are.
    """
    from transformers.cache_utils import StaticLayer

    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, StaticLayer) and not getattr(layer, "of_rank", False):
            layer.__class__ = _of_rank(type(layer))


@functools.cache
def _of_rank(base: type) -> type:
    class Layer(base):  # type: ignore[misc]
        of_rank = True
        keys: Tensor
        is_initialized: bool

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if not isinstance(key_states, DTensor) or not isinstance(value_states, DTensor):
                whole: tuple[Tensor, Tensor] = super().update(
                    key_states, value_states, *args, **kwargs
                )
                return whole
            keys, values = key_states.to_local(), value_states.to_local()
            if self.is_initialized and self.keys.shape[:2] != keys.shape[:2]:
                if int(self.get_seq_length()):
                    raise PlanError("a static cache that holds other heads or sequences than this"
                                    " rank's", hints=("a cache of the served model's own",))
                self.is_initialized = False  # made before the first keys: of all ranks' heads
            found = super().update(keys, values, *args, **kwargs)
            return alike(found[0], key_states), alike(found[1], value_states)

    Layer.__name__ = base.__name__
    return Layer
