"""Seconds of fused attention: tiles of queries over the SMs, keys and values through the caches.

Arrays broadcast; constants and facts are mappings of arrays, as in `gemm.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.gemm import boosted, missed, smooth_max

FloatArray: TypeAlias = NDArray[np.float64]
Facts: TypeAlias = Mapping[str, FloatArray]

_ROWS = 128.0  # queries of one thread block; keys are read in steps of as many


def attended(queries: FloatArray, window: FloatArray, causal: bool = True) -> FloatArray:
    """Pairs of a query and a key that one head multiplies, whole tiles counted.

    window: keys that a query sees, itself included; 0 is all. Causal: half a tile's worth more
    than s^2 / 2; a window adds three quarters, at both ends together.
    """
    if not causal:
        return queries * queries
    reach = np.where(window > 0, np.minimum(window, queries), queries)
    full = queries * reach - reach * reach / 2
    return full + queries * np.where(reach < queries, 0.75 * _ROWS, _ROWS / 2)


def prefill_seconds(
    c: Facts, d: Facts, batch: FloatArray, queries: FloatArray, heads: FloatArray,
    kv_heads: FloatArray, dim_qk: FloatArray, dim_v: FloatArray, window: FloatArray,
    *, steady: bool,
) -> FloatArray:  # fmt: skip
    """Causal attention of whole sequences, the new keys and values written to their cache.

    c: compute_efficiency, tail (share of 128 queries that a block is as long as: the longest one
    bounds small grids), overhead_s, traffic (bytes moved / those of q, k, v, o and the cache
    written; beside the arithmetic, not hidden by it), l2_speed (the cache's rate over memory's),
    smoothness, boost, boost_s.
    d: flop_per_s, bytes_per_s, sm, l2_bytes, kv_bytes (of a cached element).
    """
    pairs = attended(queries, window)
    flop = 2 * batch * heads * pairs * (dim_qk + dim_v)
    rate = c["compute_efficiency"] * d["flop_per_s"]
    reach = np.where(window > 0, np.minimum(window, queries), queries)
    last = 2 * np.minimum(queries, _ROWS) * (reach + _ROWS) * (dim_qk + dim_v)
    compute_s = smooth_max(flop / rate, c["tail"] * last / rate * d["sm"], c["smoothness"])
    if not steady:
        compute_s = boosted(compute_s, c["boost"], c["boost_s"])
    tokens = batch * queries
    moved = 2 * tokens * heads * (dim_qk + dim_v)
    moved = moved + tokens * kv_heads * (dim_qk + dim_v) * (2 + d["kv_bytes"])
    miss = missed(moved, d["l2_bytes"])
    swept = miss + (1 - miss) / c["l2_speed"]
    moved_s = c["traffic"] * moved * swept / d["bytes_per_s"]
    return np.asarray(compute_s + moved_s + c["overhead_s"])


def decode_seconds(
    c: Facts, d: Facts, batch: FloatArray, kv_len: FloatArray, heads: FloatArray,
    kv_heads: FloatArray, dim_qk: FloatArray, dim_v: FloatArray, window: FloatArray,
    shared: FloatArray,
) -> FloatArray:  # fmt: skip
    """One query a sequence against its cache.

    shared: bytes an element of keys that serve as values too (MLA's latent) counts once: dim_v
    of them. c: memory_efficiency, compute_efficiency, smoothness, overhead_s, stage_s (latency a
    doubling of the keys adds: more parts, merged in steps), fill_s (start and end of a thread
    block, one a sequence and key head), l2_speed (cache rate over memory's).
    """
    reach = np.where(window > 0, np.minimum(window, kv_len), kv_len)
    held = batch * reach * kv_heads * (dim_qk + dim_v - shared) * d["kv_bytes"]
    miss = missed(held, d["l2_bytes"])
    cached = held * (1 - miss) / (c["l2_speed"] * d["bytes_per_s"])
    stream_s = held * miss / (c["memory_efficiency"] * d["bytes_per_s"]) + cached
    rate = c["compute_efficiency"] * d["flop_per_s"]
    rows = np.maximum(heads / kv_heads, 64.0) * kv_heads  # a tile's rows, filled or not
    compute_s = 2 * batch * rows * reach * (dim_qk + dim_v) / rate
    stages = np.log2(1 + reach / _ROWS)
    work_s = smooth_max(stream_s, compute_s, c["smoothness"])
    waves = np.maximum(batch * kv_heads / d["sm"] - 1, 0.0)
    start_s = c["overhead_s"] + c["stage_s"] * stages + c["fill_s"] * waves
    return np.asarray(work_s + start_s)
