"""A network simulated by what each of its links carries: the oracle of test_levels.

Every group of an axis runs its collective at once; a link's bytes over its rate, at most of all
links, is how long they take at least. Nothing here knows of shapes, shares or bottlenecks.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise


def groups_of(count: int, size: int, stride: int) -> list[list[int]]:
    """All groups of `size` ranks, `stride` apart, that fill `count` ranks from the first."""
    blocks = range(0, count - size * stride + 1, size * stride)
    firsts = [block + lane for block in blocks for lane in range(stride)]
    return [[first + i * stride for i in range(size)] for first in firsts]


class Network:
    """Ports of ranks, uplinks of units: spans as `Cluster.spans`, rates a rank into each level.

    dragonfly: levels whose units have a link to each other one, of an equal share of the whole.
    """

    def __init__(self, spans, rates, dragonfly=()):
        self.spans, self.rates, self.dragonfly = spans, rates, dragonfly
        self.bytes = defaultdict(float)

    def send(self, a: int, b: int, size: float, port_a: int, port_b: int) -> None:
        """Bytes from rank a to rank b through the ports of others in their domains."""
        if a // self.spans[0] == b // self.spans[0]:
            return
        self.bytes["out", 0, port_a] += size
        self.bytes["in", 0, port_b] += size
        for k, span in enumerate(self.spans[1:-1], 1):
            here, there = a // span, b // span
            if here != there:
                same_above = a // self.spans[k + 1] == b // self.spans[k + 1]
                link = (here, there) if k in self.dragonfly and same_above else here
                self.bytes["out", k, link] += size
                self.bytes["in", k, (here, there) if k in self.dragonfly and same_above
                           else there] += size  # fmt: skip

    def seconds(self) -> float:
        return max(size / self._rate(k, at) for (_, k, at), size in self.bytes.items())

    def _rate(self, k, at) -> float:
        whole = (self.spans[k] if k else 1) * self.rates[k]
        if not isinstance(at, tuple):
            return whole
        units = self.spans[k + 1] // self.spans[k]
        return whole / (units - 1)


def ring(network: Network, groups, size: float, passes: float) -> float:
    """Rings, one for each member that the fullest domain has of a group: channel c leaves and
    enters domains by the port of its member c. Seconds."""
    for group in groups:
        domains = defaultdict(list)
        for rank in group:
            domains[rank // network.spans[0]].append(rank)
        channels = min(map(len, domains.values()))
        each = size * passes * (len(group) - 1) / len(group) / channels
        for c in range(channels):
            inside = list(domains.values())
            for here, there in pairwise([*inside, inside[0]]):
                if here is not there:
                    a, b = here[c % len(here)], there[c % len(there)]
                    network.send(a, b, each, a, b)
    return network.seconds()


def exchange(network: Network, groups, size: float) -> float:
    """Every rank sends its buffer, `size`, to all of its group alike. Seconds."""
    for group in groups:
        for a in group:
            for b in group:
                network.send(a, b, size / len(group), a, b)
    return network.seconds()


def sends(network: Network, stages: int, stride: int, size: float, boundary: int) -> float:
    """Every rank of a stage sends to the rank of its place in the next. Seconds."""
    for rank in range(boundary * stride, (boundary + 1) * stride):
        network.send(rank, rank + stride, size, rank, rank + stride)
    return network.seconds()
