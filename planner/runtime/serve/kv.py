"""The cache of keys and values in its planned format and window, for models of transformers.

A layer's keys and values are kept as `Packed` along the head dimension, each token and head with a
scale of its own; attention reads them in the model's dtype. Ranks that share the heads or the
sequences each pack their own, and so keep what one rank would. Sliding layers keep their window, as
transformers reads it off the model's configuration; a planned window, which forgets what is older,
holds for every layer. Where a policy is planned, each block of what is older leaves its mean, or
is read when a query picks it (`retrieve`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cost_models.serving_decisions import Serving, policy_of
from ir.errors import UsageError
from planner.runtime.serve.packed import Packed, pack
from planner.runtime.serve.retrieve import alike, read_by_blocks, retrieving_layer

KEPT = "kept_as_planned"  # of a cache that `cache_of` made
KV_FORMATS = ("bf16", "fp8", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kv:
    """How the cache is kept. word: a format of KV_FORMATS, bf16 being the model's own. window:
    tokens that are kept, 0 for all. block: tokens that become one entry when they leave the window,
    0 where they are forgotten. top: they stay, and a step reads so many such blocks. below: layers
    wait on the host."""

    word: str = "bf16"
    window: int = 0
    block: int = 0
    top: int = 0
    below: bool = False

    @classmethod
    def planned(cls, s: Serving, below: bool = False) -> Kv:
        block, top = policy_of(s.kv_policy)
        word = "bf16" if s.kv in ("bf16", "fp16") else s.kv
        return cls(word=word, window=s.kv_window, block=block, top=top, below=below)

    @property
    def plain(self) -> bool:
        return self == Kv()


def cache_of(model: Any, kv: Kv) -> Any:
    """An empty cache for one call of `generate`. Raises UsageError for a model without one."""
    if not of_transformers(model):
        raise UsageError(
            "the plan says how keys and values are kept, and the model keeps them its own way",
            hints=("--fix kv=bf16, and no --kv-window: then the model's own cache is used",),
        )
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if kv.top:
        read_by_blocks(model)
    cache = DynamicCache(config=model.config, offloading=kv.below and not kv.top)
    for at, layer in enumerate(cache.layers):
        if kv.window and isinstance(layer, DynamicLayer):
            width = min(kv.window, getattr(layer, "sliding_window", None) or kv.window)
            if kv.block and getattr(layer, "sliding_window", kv.window + 1) > kv.window:
                layer = (retrieving_layer(DynamicLayer)(kv.window, kv.block, kv.top, kv.below)
                         if kv.top else _summary_layer(DynamicLayer)(kv.window, kv.block))
            else:
                layer = DynamicSlidingWindowLayer(sliding_window=width)
            cache.layers[at] = layer
        if kv.word != "bf16":
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise UsageError(
                    f"a cache of {type(layer).__name__} is kept as it is",
                    why=f"kv={kv.word} packs keys and values of attention alone",
                    hints=("--fix kv=bf16",),
                )
            layer.__class__ = _packed_layer(type(layer), kv.word)
    setattr(cache, KEPT, kv)
    return cache


def of_transformers(model: nn.Module) -> bool:
    """Whether a model is of transformers, and so takes its caches."""
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _packed_layer(base: type, word: str) -> type:
    """A cache layer whose keys and values are `Packed`."""

    class Layer(base):  # type: ignore[misc]
        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            self.keys = pack(key_states[..., :0, :], word)
            self.values = pack(value_states[..., :0, :], word)

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if isinstance(key_states, DTensor) and isinstance(value_states, DTensor):
                kept = self.update(key_states.to_local(), value_states.to_local(), *args, **kwargs)
                return alike(kept[0], key_states), alike(kept[1], value_states)
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            packed = (pack(key_states, word), pack(value_states, word))
            keys, values = super().update(*packed, *args, **kwargs)
            return _plain(keys), _plain(values)

    Layer.__name__ = f"{word.capitalize()}{base.__name__}"
    return Layer


def _summary_layer(base: type) -> type:
    """A cache layer that keeps a window, and of each block before it the mean of its keys and of
    its values. A prompt attends to all of itself; what follows to what is kept.

    Keys are means of rotated keys, as they are cached; every sequence has as many tokens.
    """

    class Layer(base):  # type: ignore[misc]
        is_croppable = False

        def __init__(self, window: int, block: int) -> None:
            super().__init__()
            self.window, self.block = window, block
            self.cumulative_length = 0  # tokens that came, kept or not
            self.means = 0  # entries that stand for blocks, the first of those kept

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            self.cumulative_length += key_states.shape[-2]
            blocks = (keys.shape[-2] - self.means - self.window) // self.block
            if blocks > 0:
                self.keys, self.values = (self._folded(x, blocks) for x in (keys, values))
                self.means += blocks
            return keys, values

        def _folded(self, x: Tensor, blocks: int) -> Tensor:
            end = self.means + blocks * self.block
            old = x[..., self.means : end, :].unflatten(-2, (blocks, self.block))
            means = old.float().mean(-2).to(x.dtype)
            return torch.cat([x[..., : self.means, :], means, x[..., end:, :]], dim=-2)

        def get_seq_length(self) -> int:
            return self.cumulative_length

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            entries = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
            return entries + query_length, self.cumulative_length - entries

        def reset(self) -> None:
            super().reset()
            self.cumulative_length = self.means = 0

        def crop(self, *args: Any, **kwargs: Any) -> None:
            raise UsageError("a cache of means of blocks cannot give tokens back",
                             hints=("generate without an assistant",))  # fmt: skip

    Layer.__name__ = "SummaryLayer"
    return Layer


def even_mask(ids: Tensor, given: Any) -> Tensor:
    """The mask of prompts that all have as many tokens. Raises UsageError for one that leaves some
    out: a mean of a block would have them in it."""
    if given is not None and not bool(torch.as_tensor(given).all()):
        raise UsageError("prompts of several lengths, and the plan's cache has means of blocks",
                         why="padding would be in them",
                         hints=("ask prompts of one length together",))  # fmt: skip
    return torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device)


def _plain(x: Tensor) -> Tensor:
    return x.whole() if isinstance(x, Packed) else x


def kv_bytes(cache: Any) -> int:
    """Bytes that a cache holds now."""
    found = 0
    for layer in cache.layers:
        older = getattr(layer, "older", ())
        for x in (getattr(layer, "keys", None), getattr(layer, "values", None), *older):
            if isinstance(x, Packed):
                found += x.held_bytes
            elif isinstance(x, torch.Tensor):
                found += x.numel() * x.element_size()
    return found
