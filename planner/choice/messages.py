"""Tree-reweighted message passing, one node after the other (Kolmogorov, TRW-S, 2006).

Messages move cost between a table and its nodes: whatever they are, the sum of least entries is
a lower bound, and passes up and down the nodes' order raise it. Bytes pay multipliers by time
point, so that the bound holds under memory too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.choice.core import Core
from planner.choice.problem import Floats, Ints


@dataclass(frozen=True, slots=True)
class Side:
    """Tables of a node with its earlier, or its later, neighbours, side by side.

    table: [states, cells of all neighbours]; slots: its messages from them, of all messages to
    it; owner: neighbour of each cell; start: its first cell; to: where its own messages go.
    """

    near: Ints
    table: Floats
    slots: slice
    owner: Ints
    start: Ints
    to: Ints


class Messages:
    """The messages, and the bound of the last pass."""

    def __init__(self, core: Core) -> None:
        self.core = core
        n = len(core.nodes)
        near: list[list[tuple[int, Floats]]] = [[] for _ in range(n)]
        for (i, j), table in zip(core.ends, core.tables):
            near[i].append((j, table))
            near[j].append((i, table.T))
        for found in near:
            found.sort(key=lambda e: e[0])
        sizes = core.sizes
        self.first = np.concatenate(
            [[0], np.cumsum([len(near[v]) * sizes[v] for v in range(n)])]
        ).astype(np.int64)
        self.sent = np.zeros(self.first[-1])
        slot = [{w: k for k, (w, _) in enumerate(near[v])} for v in range(n)]
        self.sides: list[tuple[Side, Side]] = []
        self.inbox: list[Floats] = []
        self.share: list[float] = []
        for v in range(n):
            before = sum(w < v for w, _ in near[v])
            halves = []
            for some in (slice(0, before), slice(before, len(near[v]))):
                part = near[v][some]
                cells = [t.shape[1] for _, t in part]
                halves.append(Side(
                    near=np.array([w for w, _ in part], dtype=np.int64),
                    table=np.concatenate([t for _, t in part], axis=1) if part
                    else np.zeros((sizes[v], 0)),
                    slots=some,
                    owner=np.repeat(np.arange(len(part)), cells),
                    start=np.concatenate([[0], np.cumsum(cells)[:-1]]).astype(np.int64)
                    if part else np.zeros(0, dtype=np.int64),
                    to=np.concatenate([
                        self.first[w] + slot[w][v] * sizes[w] + np.arange(sizes[w])
                        for w, _ in part
                    ]) if part else np.zeros(0, dtype=np.int64),
                ))  # fmt: skip
            self.sides.append((halves[0], halves[1]))
            self.inbox.append(
                self.sent[self.first[v] : self.first[v + 1]].reshape(len(near[v]), sizes[v])
            )
            self.share.append(1 / max(before, len(near[v]) - before, 1))

    def sweep(self, cost: Floats) -> float:
        """Pass up and down once; the lower bound of the core with these costs, memory aside."""
        offset = self.core.offset
        for v in range(len(self.core.nodes)):
            self._send(v, cost[offset[v] : offset[v + 1]], 1)
        bound = self.core.constant
        for v in range(len(self.core.nodes) - 1, -1, -1):
            bound += self._send(v, cost[offset[v] : offset[v + 1]], 0)
        return bound

    def _send(self, v: int, cost: Floats, side: int) -> float:
        """Send a node's messages to one side; its least cost and what the messages leave behind."""
        half = self.sides[v][side]
        inbox = self.inbox[v]
        belief = cost + inbox.sum(axis=0)
        least = float(belief.min())
        if not len(half.near):
            return least
        own = (self.share[v] * (belief - least)) - inbox[half.slots]
        out = (half.table + own.T[:, half.owner]).min(axis=0)
        low = np.minimum.reduceat(out, half.start)
        self.sent[half.to] = out - low[half.owner]
        return least + float(low.sum())

    def beliefs(self, cost: Floats) -> Floats:
        """Of every state: its cost and all messages to its node."""
        found = cost.copy()
        for v, inbox in enumerate(self.inbox):
            found[self.core.offset[v] : self.core.offset[v + 1]] += inbox.sum(axis=0)
        return found
