"""What a group of ranks has of the network that it crosses, level by level.

A group's `shape` is how many of its ranks are in one unit: of domains, then of each level, at last
all (`Cluster.shape`). All groups of an axis send at once, so each rank counts on its own share of
its unit's links and no more.
"""

from __future__ import annotations

from cost_models.hardware import Cluster
from cost_models.levels import exchange_share, ring_share

Shape = tuple[int, ...]


def latencies_s(cluster: Cluster) -> tuple[float, ...]:
    """End to end, where that level of the network is the outermost that is crossed."""
    return (cluster.inter.latency_s, *(level.latency_s for level in cluster.levels[1:]))


def shares_bytes_per_s(cluster: Cluster) -> tuple[float, ...]:
    """What a rank has of the links from its unit into each level of the network."""
    return (
        cluster.inter.useful_bytes_per_s,
        *(level.useful_bytes_per_s for level in cluster.levels[1:]),
    )


def crossed_by(shape: Shape) -> int:
    """How many levels of the network a group crosses, or passes on its way to one it crosses."""
    return next((k for k in range(len(shape) - 1, 0, -1) if shape[k] > shape[k - 1]), 0)


def ring_bytes_per_s(cluster: Cluster, shape: Shape) -> float:
    """The rate of a group's ring: it leaves each unit once, over the links of its ranks there."""
    spans, rates = cluster.spans, shares_bytes_per_s(cluster)
    found = []
    for k in range(crossed_by(shape)):
        across = bool(cluster.levels) and shape[k + 1] > shape[k]
        share = ring_share(cluster.levels[k], spans[k + 1] // spans[k]) if across else 1.0
        found.append(shape[k] * rates[k] * share)
    return min(found)


def leaving(cluster: Cluster, shape: Shape) -> tuple[tuple[int, float, float], ...]:
    """Where each rank sends to all others, level by level: how many of the group are in a unit
    below it, what a rank has of the unit's links outward (bytes a second), latency."""
    spans, rates, found = cluster.spans, shares_bytes_per_s(cluster), []
    for k in range(crossed_by(shape)):
        share = 1.0
        if cluster.levels:
            units, met = spans[k + 1] // spans[k], max(2, shape[k + 1] // shape[k])
            share = exchange_share(cluster.levels[k], units, met)
        found.append((shape[k], rates[k] * share, latencies_s(cluster)[k]))
    return tuple(found)


def send_bytes_per_s(cluster: Cluster, crossed: int, stride: int) -> float:
    """The rate of a rank's send to the one `stride` on, across so many levels, beyond the first:
    of a unit's ranks the last `stride` send over its links, all others to ranks inside."""
    spans, rates, found = cluster.spans, shares_bytes_per_s(cluster), []
    for k in range(1, crossed):
        outermost = k == crossed - 1
        units = spans[k + 1] // spans[k]
        share = ring_share(cluster.levels[k], units) if outermost else 1.0
        found.append(rates[k] * share * spans[k] / min(stride, spans[k]))
    return min(found)


def boundary_levels(cluster: Cluster, stages: int, stride: int, copies: int = 1) -> tuple[int, ...]:
    """Levels of the network that the sends from each of `stages` to the next cross; the last
    entry is from the last stage back to the first.

    A stage is `stride` ranks in a row; `copies` such pipelines lie one behind the other.
    """
    spans, whole = cluster.spans, stages * stride
    found = []
    for stage in range(stages):
        most = 0
        for copy in range(copies):
            start = copy * whole + stage * stride
            step = stride if stage < stages - 1 else -(stages - 1) * stride
            low, high = sorted((start, start + step))
            for k, span in enumerate(spans[:-1]):
                # a pair (x, x + |step|), x in [low, low + stride), has a border between them
                if (high + stride - 1) // span * span > low:
                    most = max(most, k + 1)
        found.append(most)
    return tuple(found)
