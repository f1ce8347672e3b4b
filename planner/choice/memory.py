"""Memory over time of a reduced problem, as flat arrays.

A time point is a row: bytes of what is live, within the room that what is decided leaves. Points
at which everything fits are no rows, nor those whose live set another's contains with no more room.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.choice.problem import Floats, Ints
from planner.choice.reduce import Graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """times: of the rows. room: bytes left at each. held: of each node, (start, end, bytes by
    state), along rows. state, start, end, nbytes: the same flat, `state` counting along all nodes'
    states; no zeros.
    """

    times: Ints
    room: Ints
    held: tuple[tuple[tuple[int, int, Ints], ...], ...]
    state: Ints
    start: Ints
    end: Ints
    nbytes: Ints

    def prices(self, multipliers: Floats, states: int) -> Floats:
        """What each state pays where a byte at each row costs its multiplier."""
        upto = np.concatenate([[0.0], np.cumsum(multipliers)])
        paid = self.nbytes * (upto[self.end] - upto[self.start])
        return np.bincount(self.state, weights=paid, minlength=states).astype(np.float64)

    def used(self, chosen: NDArray[np.float64] | NDArray[np.bool_]) -> Floats:
        """Bytes at each row where each state is chosen to a share."""
        nbytes = self.nbytes * chosen[self.state]
        rows = len(self.room) + 1
        change = np.bincount(self.start, weights=nbytes, minlength=rows)
        change -= np.bincount(self.end, weights=nbytes, minlength=rows)
        return np.cumsum(change)[:-1].astype(np.float64)


def memory_of(g: Graph, nodes: tuple[int, ...], offset: Ints) -> Memory:
    """nodes: in order; offset: of each node's states along all."""
    limit = g.problem.limit
    pieces = [(i, s, e, u) for i, v in enumerate(nodes) for (s, e), u in g.held[v].items()]
    used = np.cumsum(g.base)
    none = np.zeros(0, dtype=np.int64)
    if limit is None:
        pieces, limit = [], 0
    room = limit - used
    most = np.zeros(len(used) + 1, dtype=np.int64)
    arrives, leaves = np.zeros_like(most), np.zeros_like(most)
    for _, s, e, u in pieces:
        most[s] += u.max()
        most[e] -= u.max()
        arrives[s] += 1
        leaves[e] += 1
    times = np.flatnonzero((np.cumsum(most)[:-1] > room) & bool(pieces))
    while True:  # a point is less than its neighbour if nothing leaves, or arrives, between them
        gone, come = np.cumsum(leaves)[times], np.cumsum(arrives)[times]
        keep = np.ones(len(times), dtype=bool)
        less = (gone[:-1] == gone[1:]) & (room[times[:-1]] >= room[times[1:]])
        keep[:-1] &= ~less
        more = (come[:-1] == come[1:]) & (room[times[1:]] >= room[times[:-1]]) & ~less
        keep[1:] &= ~(more & keep[:-1])
        if keep.all():
            break
        times = times[keep]
    held: list[list[tuple[int, int, Ints]]] = [[] for _ in nodes]
    for i, s, e, u in pieces:
        first, last = (int(n) for n in np.searchsorted(times, (s, e)))
        if first < last:
            held[i].append((first, last, u))
    flat = [(offset[i], piece) for i, found in enumerate(held) for piece in found]
    nbytes = np.concatenate([none, *(u for _, (_, _, u) in flat)])
    lengths = np.array([len(u) for _, (_, _, u) in flat], dtype=np.int64)
    some = nbytes > 0
    return Memory(
        times=times, room=room[times], held=tuple(tuple(found) for found in held),
        nbytes=nbytes[some],
        state=np.concatenate([none, *(a + np.arange(n) for (a, _), n in zip(flat, lengths))])[some],
        start=np.repeat(np.array([p[0] for _, p in flat], dtype=np.int64), lengths)[some],
        end=np.repeat(np.array([p[1] for _, p in flat], dtype=np.int64), lengths)[some],
    )  # fmt: skip
