"""What attention keeps of the tokens behind it, and reads: windows, and two policies that lose.

Both keep the last `recent` tokens as they are. Of what is older, in blocks of `block` tokens,
- summary: one entry a block is kept, the mean of its keys and of its values;
- retrieve: all is kept, and one mean key a block; a step scores those keys, and reads the `top`
  blocks that score most. Where the cache lies below the GPU, the recent tokens and the mean keys
  stay on it, and the blocks are fetched when they are known.

Sources: StreamingLLM (arXiv:2309.17453) for what is recent, Compressive Transformers
(arXiv:1911.05507) for means of blocks, Quest (arXiv:2406.10774) and InfLLM (arXiv:2402.04617) for
blocks picked by a key each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.serving_decisions import KV_BYTES, Serving, policy_of
from cost_models.serving_shapes import Attend, ServedModel

FloatArray: TypeAlias = NDArray[np.float64]
LAYERS_HERE = 2  # of a cache below the GPU: one in use, one on its way


@functools.lru_cache(maxsize=64)
def forgetful(model: ServedModel, window: int, policy: str = "") -> ServedModel:
    """The model with a cache that loses what is older than so many tokens, as the policy says;
    layers that see fewer are as they were, and 0 loses none. A prompt attends to all of itself (as
    transformers' sliding cache has it): the window is of what is kept, not of the model's mask."""
    if not window:
        return model
    block, top = policy_of(policy)

    def narrow(a: Attend) -> Attend:
        if a.window and a.window <= window:
            return a
        if not block:
            return replace(a, window=window, prompt_window=a.window)
        return replace(a, recent=window, block=block, top=top)

    layers = tuple(replace(layer, attention=tuple(narrow(a) for a in layer.attention))
                   for layer in model.layers)  # fmt: skip
    return replace(model, layers=layers)


def _blocks(attend: Attend, tokens: FloatArray) -> FloatArray:
    """Whole blocks of what is no longer recent."""
    return np.asarray(np.floor(np.maximum(tokens - attend.recent, 0.0) / attend.block))


def _key_share(attend: Attend) -> float:
    """Of an entry, its key; a latent is both."""
    return 1.0 if attend.latent else attend.dim_qk / (attend.dim_qk + attend.dim_v)


def kept(attend: Attend, tokens: FloatArray) -> FloatArray:
    """Entries that are kept of so many tokens; a mean key is a part of one."""
    if attend.block:
        blocks = _blocks(attend, tokens)
        if attend.top:
            return tokens + blocks * _key_share(attend)
        return tokens - blocks * (attend.block - 1)
    return np.minimum(tokens, attend.window) if attend.window else tokens


def picked(attend: Attend, tokens: FloatArray) -> FloatArray:
    """Tokens that a step retrieves."""
    if not attend.top:
        return 0.0 * tokens
    return np.asarray(np.minimum(_blocks(attend, tokens), attend.top) * attend.block)


def seen(attend: Attend, tokens: FloatArray) -> FloatArray:
    """Entries that a decoding token attends to."""
    if attend.top:
        return np.asarray(tokens - _blocks(attend, tokens) * attend.block + picked(attend, tokens))
    return kept(attend, tokens)


def beside_bytes(attend: Attend, s: Serving, tokens: FloatArray) -> FloatArray:
    """Bytes that the policy moves on the GPU beside attention, a sequence and step, on one rank:
    the mean keys that are scored, or the token that joins a mean."""
    each = attend.cached(s.tp) * KV_BYTES[s.kv]
    if attend.top:
        return (_blocks(attend, tokens) * _key_share(attend) + 1) * each
    return np.where(_blocks(attend, tokens) > 0, each, 0.0)


def kv_bytes(model: ServedModel, s: Serving, tokens: FloatArray) -> FloatArray:
    """Bytes that sequences of so many tokens keep of one rank of the stage that keeps most,
    wherever: caches and states."""
    each = []
    for layer in model.layers:
        found = np.zeros(np.shape(tokens))
        for attend in layer.attention:
            found = found + kept(attend, tokens) * attend.cached(s.tp) * KV_BYTES[s.kv]
        each.append(found + sum(one.state_bytes / s.tp for one in layer.recurrences))
    return _of_fullest(model, s, each)


def _of_fullest(model: ServedModel, s: Serving, each: Sequence[FloatArray]) -> FloatArray:
    """The most that a stage has, where a layer of each class has that."""
    stages = [sum(n * own for n, own in zip(counts, each, strict=True))
              for counts in dict.fromkeys(model.stages(s.pp))]  # fmt: skip
    return np.asarray(functools.reduce(np.maximum, stages))


def retrieves(model: ServedModel) -> bool:
    return any(a.top for layer in model.layers for a in layer.attention)


def kv_here_bytes(model: ServedModel, s: Serving, tokens: FloatArray) -> FloatArray:
    """Bytes of them that are on the GPU: all or, of a cache below it, LAYERS_HERE layers at a time;
    of what is retrieved the recent tokens and mean keys of all layers too."""
    whole = kv_bytes(model, s, tokens)
    if s.kv_tier == "gpu":
        return whole
    share = min(1.0, LAYERS_HERE * s.pp / model.layer_count)
    if not retrieves(model):
        return whole * share
    each = []
    for layer in model.layers:
        found = np.zeros(np.shape(tokens))
        for attend in layer.attention:
            entry = attend.cached(s.tp) * KV_BYTES[s.kv]
            if not attend.top:
                found = found + share * kept(attend, tokens) * entry
                continue
            stays = tokens - _blocks(attend, tokens) * (attend.block - _key_share(attend))
            found = found + (stays + share * picked(attend, tokens)) * entry
        each.append(found + share * sum(one.state_bytes / s.tp for one in layer.recurrences))
    return _of_fullest(model, s, each)
