"""A cache that keeps all tokens and reads some: the recent ones and, of what is older, the blocks
whose mean keys the query fits best.

A cache of transformers sees keys, never the query. So keys that leave it say whose they are, and
the attention function that the model's configuration names, ours around the one that it named,
asks them for the blocks of this query. Heads that share keys pick together, by the sum of their
scores; a prompt attends to all of itself. Sources as in cost_models/serving_kv.py.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ir.errors import UsageError

_AROUND = "meshwright_retrieving_"
_OF = "_retrieved_by"


def retrieving_layer(base: type) -> type:
    """A layer of a cache, of a class that grows by tokens: base(window, block, top, below).

    window: recent tokens, kept as they come. block: tokens of each block before them. top: blocks
    that a step reads, by each head of keys. below: blocks wait on the host, their means do not.
    """

    class Layer(base):  # type: ignore[misc]
        is_croppable = False

        keys: Tensor
        values: Tensor

        def __init__(self, window: int, block: int, top: int, below: bool) -> None:
            super().__init__()
            self.window, self.block, self.top, self.below = window, block, top, below
            self.cumulative_length = 0  # tokens that came
            self.asks = False  # attention reads our keys, and so asks for blocks
            self.older: list[Tensor] = []  # keys, values (.., blocks, block, d), means (.., d)

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if isinstance(key_states, DTensor) and isinstance(value_states, DTensor):
                local = self.update(key_states.to_local(), value_states.to_local())
                split = alike(local[0], key_states)
                setattr(split, _OF, self)
                return split, alike(local[1], value_states)
            count = key_states.shape[-2]
            if count == 1 and self.cumulative_length and not self.asks:
                raise UsageError(
                    "this attention reads other keys than its cache has: blocks cannot be picked",
                    why="it makes them of latents, or does not use transformers' functions",
                    hints=("no --kv-policy, or summary:BLOCK",),
                )
            self.cumulative_length += count
            keys, values = super().update(key_states, value_states)
            if count > 1 and self.older:
                keys, values = (torch.cat([old.flatten(2, 3).to(x.device), x], dim=-2)
                                for old, x in zip(self.older, (keys, values)))  # fmt: skip
            self._fold()
            if count == 1:
                keys, values = self.keys, self.values
            keys = keys.view_as(keys)  # the attribute is this call's
            setattr(keys, _OF, self)
            return keys, values

        def _fold(self) -> None:
            """Move whole blocks of what is no longer recent to the older ones."""
            blocks = (self.keys.shape[-2] - self.window) // self.block
            if blocks < 1:
                return
            gone = blocks * self.block
            keys, values = (x[..., :gone, :].unflatten(-2, (blocks, self.block))
                            for x in (self.keys, self.values))  # fmt: skip
            means = keys.float().mean(-2).to(keys.dtype)
            store = "cpu" if self.below else keys.device
            new = [keys.to(store), values.to(store), means]
            self.older = [torch.cat(pair, dim=2) for pair in zip(self.older, new)] or [
                x.contiguous() for x in new]  # fmt: skip
            self.keys, self.values = (x[..., gone:, :].contiguous()
                                      for x in (self.keys, self.values))  # fmt: skip

        def picked(self, query: Tensor) -> list[Tensor]:
            """Keys and values (batch, heads of keys, tokens, d) of a query (batch, heads, 1, d)."""
            *stored, means = self.older
            grouped = query[..., 0, :].unflatten(1, (means.shape[1], -1))
            scores = torch.einsum("bhgd,bhnd->bhn", grouped.float(), means.float())
            best = scores.topk(min(self.top, means.shape[2])).indices.sort().values
            found = []
            for x in stored:
                at = best.to(x.device)
                rows = (torch.arange(n, device=x.device) for n in x.shape[:2])
                batch, head = torch.meshgrid(*rows, indexing="ij")
                blocks = x[batch[..., None], head[..., None], at]
                found.append(blocks.flatten(2, 3).to(query.device))
            return found

        def get_seq_length(self) -> int:
            return self.cumulative_length

        def reset(self) -> None:
            super().reset()
            self.cumulative_length, self.older = 0, []

        def crop(self, *args: Any, **kwargs: Any) -> None:
            raise UsageError("a cache in blocks cannot give tokens back",
                             hints=("generate without an assistant",))  # fmt: skip

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.older = [x.index_select(0, beam_idx.to(x.device)) for x in self.older]

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self.older = [x.repeat_interleave(repeats, dim=0) for x in self.older]

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.older = [x[indices.to(x.device)] for x in self.older]

    Layer.__name__ = "RetrievingLayer"
    return Layer


def alike(local: Tensor, whole: DTensor) -> DTensor:
    """What a rank has of keys or values, split over ranks as what came is: by sequences or heads,
    never by tokens or in a head."""
    assert not any(p.is_partial() or p.is_shard(2) or p.is_shard(3) for p in whole.placements)
    return DTensor.from_local(local, whole.device_mesh, whole.placements, run_check=False)


def read_by_blocks(model: nn.Module) -> None:
    """Have the model's attention ask a `retrieving_layer` for blocks; others it reads as before."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    functions, masks = AttentionInterface(), AttentionMaskInterface()
    for module in model.modules():
        config = getattr(module, "config", None)
        named = getattr(config, "_attn_implementation", None)
        if config is None or not isinstance(named, str) or named.startswith(_AROUND):
            continue
        ours = _AROUND + named
        if ours not in functions:
            AttentionInterface.register(ours, functools.partial(_attend, functions.get(named)))
            AttentionMaskInterface.register(ours, masks[named])
        config._attn_implementation = ours


def _attend(
    function: Callable[..., Any] | None, module: nn.Module, query: Tensor, key: Tensor,
    value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Attention by `function`, or by the eager one of the module's own file where that is None."""
    function = function or _eager(module)
    layer = getattr(key, _OF, None)
    if layer is not None:
        layer.asks = True
        if query.shape[-2] == 1 and layer.older:
            attention_mask = None  # prompts have one length: a step sees all that it is given
            more = layer.picked(_here(query))
            key, value = (_before(older, x) for older, x in zip(more, (key, value)))
    return function(module, query, key, value, attention_mask, *args, **kwargs)


def _here(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _before(older: Tensor, recent: Tensor) -> Tensor:
    """Older tokens, of this rank, and then recent ones, split over ranks as these are."""
    found = torch.cat([older, _here(recent)], dim=-2)
    return alike(found, recent) if isinstance(recent, DTensor) else found


def _eager(module: nn.Module) -> Any:
    """The attention function of the file that defines the module, or what it inherits from."""
    for base in type(module).__mro__:
        found = getattr(sys.modules[base.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise UsageError(f"{type(module).__name__} has no eager attention function to read blocks with",
                     hints=('attn_implementation="sdpa" at from_pretrained',))  # fmt: skip
