"""Bounds of interleaved schedules apart from others: what their ranks hold, chunk by chunk.

`bound_ranks` bounds all schedules that do not split backward at once, and so has the bubble of the
most chunks with the activations of one. Here both are of one number of chunks: when rank r first
goes backward it holds k_1 >= .. >= k_v micro-batches of its chunks (`chunk_flight`), each of which
has a layer at least. Of n layers each but those holds k_v. What does not fit is recomputed: the
layer of a chunk frees no more a second than where the most micro-batches are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SLACK_BYTES = 1e4  # sums of bytes as floats


def chunk_flight(pp: int, m: Ints, v: int) -> Ints:
    """[mesh, rank, chunk]: micro-batches held of each chunk at one moment, the most first."""
    each = m // np.maximum(1, m // pp)  # a round takes so many through all chunks
    rank, chunk = np.arange(pp), np.arange(v)
    ahead = np.minimum((v - 1) * each[:, None] + 2 * (pp - 1 - rank) + 1, (m * v)[:, None])
    rounds, more = np.divmod(ahead, v * each[:, None])
    each = each[:, None, None]
    part = np.clip(more[:, :, None] - chunk * each, 0, each)
    held: Ints = rounds[:, :, None] * each + part
    return held


def filled_chunks(pp: int, v: int, layers: int, others: Sequence[int]) -> Ints:
    """[rank]: how many of its chunks have a layer of the commonest kind; others: the places in the
    chain of all other layers, of which each may be all that a stage has."""
    last = layers - pp * v
    stage = np.arange(pp * v)
    apart = np.zeros(pp * v, dtype=bool)
    for i in others:  # each stage before and behind has a layer at least
        apart |= (stage <= i) & (i <= last + stage)
    found: Ints = v - apart.reshape(v, pp).sum(axis=0)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """How many chunks each rank has, and of how many it is sure that they have a layer of the
    commonest kind (`filled_chunks`)."""

    count: int
    filled: Ints

    def again_s(
        self, pieces: Floats, kept_bytes: Floats, over: Floats, number: Ints, held: Ints
    ) -> Floats:
        """[mesh, rank, layers]: seconds of a micro-batch that what does not fit takes at least; inf
        where nothing does.

        pieces: [piece, (bytes, seconds a byte), mesh] of a layer. kept_bytes: [mesh] of a layer.
        over: [mesh, rank, layers] bytes beyond a rank's if it held of all layers what it holds of
        the last chunk's. number: of layers. held: `chunk_flight`.
        """
        least, most = held[:, :, -1].astype(float), held[:, :, 0].astype(float)
        sure = np.arange(self.count) >= self.count - self.filled[:, None]
        single = (held * sure).sum(axis=2).astype(float)
        over = over + (kept_bytes[:, None] * (single - self.filled * least))[:, :, None]
        rates = pieces[:, 1, :, None]
        price = np.concatenate([rates / most, rates / least])  # [item, mesh, rank]
        sizes = np.concatenate([pieces[:, 0, :, None] * x for x in (single, least)])
        order = np.argsort(price, axis=0, kind="stable")
        price, sizes = (np.take_along_axis(x, order, axis=0) for x in (price, sizes))
        alone = order < len(pieces)  # of the layers that chunks surely have; else of those beside
        beside = np.maximum(0, number - self.filled[:, None])
        seconds, left = np.zeros(over.shape), np.maximum(over, 0.0)
        for rate, size, one in zip(price, sizes, alone):
            used = np.minimum(left, size[:, :, None] * np.where(one[:, :, None], 1, beside))
            left = left - used
            seconds += used * rate[:, :, None]
        seconds[left > SLACK_BYTES] = np.inf
        return seconds
