"""Pipeline stages that answer calls of the model: every rank calls it alike, each runs its part.

A call runs the user's own top-level forward on every rank. What a stage hands on is sent with its
shape, which grows with the cache; what the last stage returns, the model returns on every rank, so
that `generate` goes on everywhere with the same tokens. Each rank's cache has its own layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from planner.runtime.carry import unwrap, wrap
from planner.runtime.context import Context
from planner.runtime.pipeline import Left, Stage

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
_MOST_DIMENSIONS = 6
NAMES = ("past_key_values", "cache_params")  # what forwards call their cache


def answer_calls(stage: Stage, forward: Callable[..., Any], context: Context) -> None:
    """Have the stage's module answer calls of the whole model. forward: its own, of this stage."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        ids = next((x for x in pytree.tree_leaves((args, kwargs))
                    if isinstance(x, Tensor) and x.dim() >= 2), None)  # fmt: skip
        if ids is not None:
            context.sample.batch, context.sample.tokens = ids.shape[:2]
        rank, ranks = context.meshes.rank("pp"), context.meshes.decisions.pp
        stage.received = [
            wrap(_receive(rank - 1, context), value.tensor, value.learns, context)
            for value in stage.arriving
        ]
        outputs: Any = None
        try:
            outputs = forward(*args, **kwargs)
        except Left as left:
            for value in stage.leaving:
                local = unwrap(left.given[value.place], value.tensor, value.learns, context)
                _send(local, rank + 1, context)
        finally:
            stage.received = []
        cache = next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)
        return _shared(outputs, ranks - 1, cache, context)

    stage.module.forward = run


def _peer(place: int, context: Context) -> int:
    """The global rank of a place on this rank's pipeline."""
    return int(dist.get_global_rank(context.meshes.pp.get_group(), place))


def _send(x: Tensor, place: int, context: Context) -> None:
    head = torch.zeros(2 + _MOST_DIMENSIONS, dtype=torch.int64)
    head[0], head[1] = _DTYPES.index(x.dtype), x.dim()
    head[2 : 2 + x.dim()] = torch.tensor(x.shape)
    to = _peer(place, context)
    dist.send(head.to(x.device), to)
    dist.send(x.contiguous(), to)


def _receive(place: int, context: Context) -> Tensor:
    head = torch.zeros(2 + _MOST_DIMENSIONS, dtype=torch.int64, device=context.meshes.device_type)
    source = _peer(place, context)
    dist.recv(head, source)
    dtype, dims, *sizes = head.tolist()
    found = torch.empty(sizes[:dims], dtype=_DTYPES[dtype], device=context.meshes.device_type)
    dist.recv(found, source)
    return found


@dataclass(frozen=True, slots=True)
class _Stand:
    """Stands for a leaf of the outputs: a tensor of that shape and dtype, or what each rank has of
    its own (a cache), where dtype is None."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


def outputs_whole(outputs: Any) -> Any:
    """What the model returns, as the whole model returns it: no tensor in parts."""
    return pytree.tree_map_only(DTensor, DTensor.full_tensor, outputs)


def _shared(outputs: Any, last: int, cache: Any, context: Context) -> Any:
    """What the last stage returned, on every rank: tensors whole, a cache each rank's own."""
    group, source = context.meshes.pp.get_group(), _peer(last, context)
    tensors: list[Tensor] = []
    box: list[Any] = [None]
    if context.meshes.rank("pp") == last:
        outputs = outputs_whole(outputs)
        tensors = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
        box = [pytree.tree_map(_stand, outputs)]
    dist.broadcast_object_list(box, source, group=group)
    given = iter(tensors)

    def take(stand: Any) -> Any:
        if not isinstance(stand, _Stand):
            return stand
        if stand.dtype is None:
            return cache
        x = next(given).contiguous() if tensors else torch.empty(
            stand.shape, dtype=stand.dtype, device=context.meshes.device_type
        )  # fmt: skip
        dist.broadcast(x, source, group=group)
        return x

    return pytree.tree_map(take, box[0])


def _stand(leaf: Any) -> Any:
    """What is sent in the place of a leaf."""
    if isinstance(leaf, Tensor):
        return _Stand(tuple(leaf.shape), leaf.dtype)
    return leaf if isinstance(leaf, str | int | float | bool | type(None)) else _Stand()


def layers_here(cache: Any) -> Any:
    """A cache whose length is that of this rank's own layers: a stage never fills the others."""
    if not getattr(cache, "of_stage", False):
        made: Any = type(cache)
        cache.__class__ = _of_stage(made)
    return cache


@functools.cache
def _of_stage(lengths: type) -> type:
    class Here(lengths):  # type: ignore[misc]
        of_stage = True
        layers: list[Any]

        def _own(self, layer_idx: int) -> int:
            filled = [i for i, layer in enumerate(self.layers)
                      if getattr(layer, "is_initialized", False)]  # recurrent ones have no length
            if layer_idx in filled or not filled:
                return layer_idx
            wanted = getattr(self.layers[layer_idx], "is_sliding", False)
            alike = [i for i in filled if getattr(self.layers[i], "is_sliding", False) == wanted]
            return (alike or filled)[0]

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return int(super().get_seq_length(self._own(layer_idx)))

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            found: tuple[int, int] = super().get_mask_sizes(query_length, self._own(layer_idx))
            return found

        def crop(self, *args: Any, **kwargs: Any) -> None:
            every = self.layers
            self.layers = [x for x in every if getattr(x, "is_initialized", True)]
            try:
                super().crop(*args, **kwargs)
            finally:
                self.layers = every

    Here.__name__ = lengths.__name__
    return Here
