"""Seconds of transfers between the devices of one domain, and of expert exchanges.

Arrays broadcast; constants are mappings of arrays, as in `gemm.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]
Facts: TypeAlias = Mapping[str, FloatArray]
Number: TypeAlias = FloatArray | float

# What a ring moves of the full tensor over each link, in (ranks - 1) / ranks.
PASSES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


def mixed(
    small_s: FloatArray, large_s: FloatArray, size_bytes: FloatArray, switch_bytes: Number
) -> FloatArray:
    """The small protocol's seconds, giving way to the large one's around a size; never falling.

    A library changes over at the size that its own tuning predicts best, so where the large
    protocol is quicker already, both are as one.
    """
    late = 1 / (1 + (switch_bytes / np.maximum(size_bytes, 1.0)) ** 3)
    return np.asarray(small_s + late * np.maximum(large_s - small_s, 0.0))


def library_seconds(
    c: Facts, size_bytes: FloatArray, ranks: FloatArray, passes: FloatArray, line: FloatArray
) -> FloatArray:
    """A library's collective (NCCL): a protocol of low latency, then one of full rate.

    size_bytes: the full tensor (all_to_all: one rank's buffer). line: bytes a second of a link.
    c: overhead_s, low_sqrt_s: start, and seconds a square root of a byte (more channels are used as
    messages grow) of the small protocol (flags inside the data); switch_bytes: the size at which
    the library changes over; start_s, sqrt_s: of the large one (memory fences); efficiency: of the
    line, at large sizes.
    """
    share = passes * (ranks - 1) / ranks
    root = np.sqrt(size_bytes)
    small_s = c["overhead_s"] + c["low_sqrt_s"] * root
    large_s = c["overhead_s"] + c["start_s"] + c["sqrt_s"] * root
    large_s = large_s + size_bytes * share / (c["efficiency"] * line)
    return mixed(small_s, large_s, size_bytes, c["switch_bytes"])


def custom_all_reduce_seconds(
    c: Facts, size_bytes: FloatArray, ranks: FloatArray, line: FloatArray, library_s: FloatArray
) -> FloatArray:
    """All-reduce by direct reads of peers: one shot, two shots, or the library's where quicker.

    One shot reads every peer's tensor whole; two shots reduce a share each and gather. c:
    one_shot_s, two_shot_s (start and barriers of two ranks), flag (what each further rank's flag
    adds, as a share), one_shot, two_shot (efficiency of the line),
    library (seconds / the library's own: graph launch, other tuning).
    """
    more = 1 + c["flag"] * (ranks - 2)
    one = size_bytes * (ranks - 1) / (c["one_shot"] * line)
    two = 2 * size_bytes * (ranks - 1) / ranks / (c["two_shot"] * line)
    direct = np.minimum(c["one_shot_s"] * more + one, c["two_shot_s"] * more + two)
    return np.asarray(np.minimum(direct, c["library"] * library_s))


def exchange_seconds(
    c: Facts, tokens: FloatArray, topk: FloatArray, hidden: FloatArray, width: FloatArray,
    ranks: FloatArray, domain: FloatArray, line: FloatArray, port: FloatArray,
) -> FloatArray:  # fmt: skip
    """Low-latency dispatch or combine: each token's row to each of its experts' ranks.

    tokens: of one rank. width: bytes an element. domain: ranks that share the link; line, port:
    bytes a second of the link and of a rank's network port. c: overhead_s; hop_s (latency a
    doubling of the domains, from two); link, network (efficiency of line and port).
    """
    moved = tokens * topk * hidden * width
    inside = np.minimum(ranks, domain)
    near_s = moved * (inside - 1) / ranks / (c["link"] * line)
    far_s = moved * (ranks - inside) / ranks / (c["network"] * port)
    hops_s = c["hop_s"] * np.where(ranks > domain, 1 + np.log2(ranks / inside) / 2, 0.0)
    sent_s = np.maximum(near_s, far_s)
    return np.asarray(c["overhead_s"] + hops_s + sent_s)
