"""Seconds of a fused mixture-of-experts MLP on one rank: routing, tiles an expert, traffic.

Arrays broadcast; constants and facts are mappings of arrays, as in `gemm.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.gemm import boosted, missed, smooth_max
from ir.errors import PlanError

FloatArray: TypeAlias = NDArray[np.float64]
Facts: TypeAlias = Mapping[str, FloatArray]

# (rows, columns) of output tiles a tuned kernel picks from.
_TUNED = ((16, 64), (16, 128), (32, 128), (64, 128), (128, 128), (128, 256))
_DRAWS = 8
MOST_EXPERTS = 1_000_000  # of a layer, whose loads are drawn


@functools.lru_cache(maxsize=4096)
def rows_of_experts(
    tokens: int, experts: int, topk: int, ranks: int, skew: float | None
) -> tuple[float, ...]:
    """Rows that each expert of the busiest of `ranks` ranks is given, most first.

    skew None: balanced; below one row an expert, `ceil` of the share is hit. Else loads are drawn
    from a power law with that exponent between 1 and .8 tokens (few rows: .01 and 2) and scaled,
    as AIConfigurator's benchmark draws them; the mean of the sorted loads of a few draws.
    Drawn loads raise PlanError where a token would pick an expert twice, and of more experts than
    are drawn.
    """
    local, total = experts // ranks, tokens * topk
    if skew is None:
        hit = min(local, max(1, -(-total // ranks)))
        return (max(total / ranks, 1.0) / hit,) * hit
    if topk > experts:
        raise PlanError(f"a token picks {topk} experts of {experts}",
                        hints=("plan trace traces the model again",))  # fmt: skip
    if experts > MOST_EXPERTS:
        raise PlanError(f"a layer of {experts:,} experts, of {MOST_EXPERTS:,} at most",
                        hints=("plan trace traces the model again",))  # fmt: skip
    low, high = (1.0, tokens * 0.8) if total > experts else (0.01, 2.0)
    power = 1 - skew
    uniform = np.random.default_rng(0).random((_DRAWS, experts))
    load = ((high**power - low**power) * uniform + low**power) ** (1 / power)
    load = np.round(load / load.sum(axis=1, keepdims=True) * total)
    draw = np.random.default_rng(1)
    for row in load:  # a token picks an expert once: what is over goes to others, at random
        np.minimum(row, tokens, out=row)
        while (over := total - row.sum()) >= 1:
            places = draw.permutation(np.flatnonzero(row < tokens))[: int(over)]
            row[places] += np.minimum(np.floor(over / len(places)), tokens - row[places])
    load = load.reshape(_DRAWS, ranks, local)
    busiest = load[np.arange(_DRAWS), load.sum(axis=2).argmax(axis=1)]
    mean = np.sort(busiest, axis=1)[:, ::-1].mean(axis=0)
    hit = max(1, round(float((busiest > 0).sum(axis=1).mean())))
    kept = np.maximum(mean[:hit], 1.0)
    return tuple(float(x) for x in kept * max(busiest.sum(axis=1).mean(), 1.0) / kept.sum())


def tiles_of(rows: tuple[float, ...], tile: int) -> float:
    """Row tiles of all experts, each expert's last one counted whole."""
    return float(np.ceil(np.asarray(rows) / tile - 1e-9).sum())


def moe_seconds(
    c: Facts, d: Facts, loads: list[tuple[float, ...]], tokens: FloatArray, topk: FloatArray,
    hidden: FloatArray, inter: FloatArray, tuned: NDArray[np.bool_],
    untuned_tile: NDArray[np.int64], *, steady: bool,
) -> FloatArray:  # fmt: skip
    """Gate and up, activation, down, weighted sum. All [rows].

    loads: rows of each local expert. inter: of one rank. tuned: whether the kernel was tuned for
    this many experts of this width on the device; else it runs `untuned_tile` [2, rows].
    c: as gemm's, and traffic (activation bytes moved / counted), masked (share of that traffic
    for rows of other ranks' experts), elsewhere (share of their arithmetic that is done),
    untuned_compute, untuned_stream (rates of an untuned kernel on 64 x 64 tiles / tuned ones).
    """
    mine = np.array([sum(load) for load in loads])
    hit = np.array([float(len(load)) for load in loads])
    other = np.maximum(tokens * topk - mine, 0.0)
    names = [(float(m), float(n)) for m, n in _TUNED]
    heights = {m for m, _ in names} | {float(x) for x in np.unique(untuned_tile[0])}
    counts = {m: np.array([tiles_of(load, int(m)) for load in loads]) for m in heights}
    own = np.select([untuned_tile[0] == m for m in counts], list(counts.values()), 0.0)
    rate = c["compute_efficiency"] * d["flop_per_s"] / d["sm"]

    swept = missed(hit * 3 * hidden * inter * d["weight_bytes"], d["l2_bytes"])
    swept = swept / c["memory_efficiency"] + 0.1

    def one(columns: FloatArray, inner: FloatArray) -> FloatArray:
        def at(tm: FloatArray, tn: FloatArray, strips: FloatArray, plain: bool) -> FloatArray:
            across = np.ceil(columns / tn)
            blocks = (strips + c["elsewhere"] * other / tm) * across
            full = np.maximum(blocks / d["sm"], 1.0)
            waves = full + np.minimum(c["wave"], 1.0) * (np.ceil(full) - full)
            feed = 1 + c["feed"] * (128 / tm + 128 / tn - 1.5)
            square = plain & (tm == 64) & (tn == 64)
            speed = rate * np.where(square, c["untuned_compute"], 1.0)
            compute_s = waves * (2 * tm * tn * inner / speed * feed + c["fill_s"])
            if not steady:
                compute_s = boosted(compute_s, c["boost"], c["boost_s"])
            held = hit * columns * inner * d["weight_bytes"]
            busy = np.minimum(hit * across / d["sm"] * c["streams"], 1.0)
            stream_s = held * swept / d["bytes_per_s"] / busy
            stream_s = stream_s / np.where(square, c["untuned_stream"], 1.0)
            return smooth_max(compute_s, stream_s, c["smoothness"])

        best = [at(np.asarray(m), np.asarray(n), counts[m], False) for m, n in names]
        plain = at(untuned_tile[0] * 1.0, untuned_tile[1] * 1.0, own, True)
        return np.where(tuned, np.min(best, axis=0), plain)

    matmul_s = one(2 * inter, hidden) + one(hidden, inter)
    rows = mine + c["masked"] * other
    moved = 2 * (rows * (3 * hidden + 6 * inter) + tokens * hidden)
    moved = moved * (missed(moved, d["l2_bytes"]) + 0.2)
    return np.asarray(matmul_s + c["traffic"] * moved / d["bytes_per_s"] + c["overhead_s"])
