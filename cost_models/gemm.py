"""Seconds of a matrix multiplication: tiles over the SMs, waves, split-K, caches, casts.

Every function takes arrays that broadcast and constants as a mapping of arrays, so that one call
costs a row or thousands, of one device or of several (the fit's).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]
Facts: TypeAlias = Mapping[str, FloatArray]

# (rows, columns) of the output tile that a thread block makes, and the parts that K is split into:
# the choices that GEMM libraries have in common; the quickest is taken, as their heuristics try.
_TILES = ((64, 64), (64, 128), (128, 128), (128, 256), (256, 128))
_NARROW = ((16, 128), (32, 128))  # kernels made for few rows have these too
_SPLITS = (1, 2, 4, 8, 16)
_CHOICES = np.array([(m, n, s) for m, n in _TILES + _NARROW for s in _SPLITS], dtype=np.float64)
_WIDE = len(_TILES) * len(_SPLITS)


def smooth_max(a: FloatArray, b: FloatArray, p: FloatArray) -> FloatArray:
    """(a^p + b^p)^(1/p), scaled so that small seconds do not underflow."""
    most = np.maximum(np.maximum(a, b), 1e-15)
    return most * (1 + (np.minimum(a, b) / most) ** p) ** (1 / p)


def missed(footprint_bytes: FloatArray, cache_bytes: FloatArray) -> FloatArray:
    """Share of reads that a cache does not serve when data of that size is swept cyclically.

    Nothing is missed up to 3/4 of the cache's size, all of it from 5/4: sets fill unevenly.
    """
    return np.clip(2 * footprint_bytes / cache_bytes - 1.5, 0.0, 1.0)


def boosted(seconds: FloatArray, boost: FloatArray, boost_s: FloatArray) -> FloatArray:
    """Seconds of what takes `seconds` at a settled clock, run on an idle device: its power limit
    bites late, so short kernels run faster by `boost`, and those of `boost_s` by half of it."""
    return seconds / (1 + boost * boost_s / (seconds + boost_s))


def gemm_seconds(
    c: Facts, d: Facts, m: FloatArray, n: FloatArray, k: FloatArray, batch: FloatArray,
    *, copies: float, steady: bool, narrow: bool = False,
) -> FloatArray:  # fmt: skip
    """One [m, k] x [k, n], `batch` times.

    c: constants of the kernel family: compute_efficiency, memory_efficiency, overhead_s,
    smoothness, wave (how much of a last, partial wave is waited for), feed (time to feed a 128-wide
    tile, as a share of its arithmetic), fill_s (start and end of a tile), split_s (a second kernel
    that sums the parts of K), sweep (share of a wave's operands that the next one reads anew),
    streams (how many times the SMs could draw the memory's rate, all busy), l2_speed (the cache's
    rate over the memory's), cast (traffic to quantize activations, multiples of reading 16 bits
    and writing 8), decode_per_s (weights an SM unpacks a second), boost, boost_s.
    d: facts of the device and dtype: flop_per_s, bytes_per_s, sm, l2_bytes, and bytes an element:
    weight_bytes, in_bytes, out_bytes. copies: operand sets that a benchmark rotates. narrow:
    whether tiles of fewer than 64 rows are at hand (quantized kernels), steady: a clock that has
    settled, as in training; else kernels run one by one on an idle device.
    """
    choices = _CHOICES if narrow else _CHOICES[:_WIDE]
    tile = choices.reshape(len(choices), 3, *(1,) * np.broadcast(m, n, k, batch).ndim)
    tm, tn, split = tile[:, 0], tile[:, 1], tile[:, 2]
    blocks = np.ceil(m / tm) * np.ceil(n / tn) * batch * split
    full = np.maximum(blocks / d["sm"], 1.0)
    waves = full + np.minimum(c["wave"], 1.0) * (np.ceil(full) - full)
    rate = c["compute_efficiency"] * d["flop_per_s"] / d["sm"]
    feed = 1 + c["feed"] * (128 / tm + 128 / tn - 1.5)
    compute_s = waves * (2 * tm * tn * np.ceil(k / split) / rate * feed + c["fill_s"])
    if not steady:
        compute_s = boosted(compute_s, c["boost"], c["boost_s"])
    read = (n * k * d["weight_bytes"] + m * k * d["in_bytes"]) * batch
    written = m * n * d["out_bytes"] * batch
    strip = np.minimum(np.sqrt(d["sm"] * tm * tn), np.sqrt(m * n))  # of a wave, about square
    again = c["sweep"] * np.maximum(full - 1, 0.0) * 2 * strip * k * d["in_bytes"]
    miss = missed(copies * n * k * d["weight_bytes"] * batch + read + written, d["l2_bytes"])
    stream_s = (read + again) * miss + written
    stream_s = stream_s / (c["memory_efficiency"] * d["bytes_per_s"])
    strips = np.ceil(n / tn) * batch * split  # few blocks draw few bytes
    busy = np.minimum(strips / d["sm"] * c["streams"], 1.0)
    stream_s = stream_s / busy
    if "decode_per_s" in c:
        unpack_s = n * k * batch / (c["decode_per_s"] * np.minimum(d["sm"], strips))
        stream_s = np.where(m > 1, np.maximum(stream_s, unpack_s), stream_s)
    merged = 8 * split * m * n * batch / (c["l2_speed"] * d["bytes_per_s"])
    merged = merged + c["split_s"] * np.sqrt(split)
    one = smooth_max(compute_s, stream_s, c["smoothness"]) + np.where(split > 1, merged, 0.0)
    best = np.min(one, axis=0) + c["overhead_s"]
    if "cast" in c:
        best = best + c["cast"] * 3 * m * k * batch / d["bytes_per_s"]
    return np.asarray(best)
