"""The choice problem: one state a node, least total cost, under a limit of memory over time.

    min  sum_v cost[v][x_v] + sum_(u,v) table[u,v][x_u, x_v]
    s.t. sum over v live at t of usage[v][x_v] <= limit, for every time t
         x_v is a state of v; no cost or table entry at FORBIDDEN or above is taken

A node is live over a half-open interval; an empty one holds nothing. Costs and usages are
integers; sums of those that a solution takes stay below 2**53, so that floats hold them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ir.errors import PlanError

FORBIDDEN = 10**18  # what no solution takes; the contest's files write it so
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Nodes with states, tables over pairs of them, and memory over time.

    costs: of each node's states. usages: bytes of each state while the node is live; intervals:
    [start, end) of each node. edges: (u, v) with u != v, several of one pair allowed; tables:
    [states of u, states of v] each. limit: bytes at any time; None for no limit.
    """

    costs: tuple[Ints, ...]
    usages: tuple[Ints, ...]
    intervals: tuple[tuple[int, int], ...]
    edges: tuple[tuple[int, int], ...]
    tables: tuple[Ints, ...]
    limit: int | None = None

    def __post_init__(self) -> None:
        sizes = [len(c) for c in self.costs]
        if not len(self.costs) == len(self.usages) == len(self.intervals):
            raise PlanError("nodes need as many costs as usages and intervals")
        if len(self.edges) != len(self.tables):
            raise PlanError(f"{len(self.edges)} edges, but {len(self.tables)} tables")
        for v, usage in enumerate(self.usages):
            if len(usage) != sizes[v] or not sizes[v]:
                raise PlanError("a node needs states, a cost and a usage each", where=f"node {v}")
        for (u, v), table in zip(self.edges, self.tables):
            if not (0 <= u < len(sizes) and 0 <= v < len(sizes)) or u == v:
                raise PlanError("an edge joins two nodes of the problem", where=f"edge {u}, {v}")
            if table.shape != (sizes[u], sizes[v]):
                raise PlanError(
                    "a table has one entry for each pair of states", where=f"edge {u}, {v}",
                    why=f"{table.shape} for {sizes[u]} x {sizes[v]} states",
                )  # fmt: skip


def cost_of(problem: Problem, picks: Sequence[int]) -> int:
    """Total cost; FORBIDDEN or more where something forbidden is taken."""
    total = sum(int(c[k]) for c, k in zip(problem.costs, picks))
    for (u, v), table in zip(problem.edges, problem.tables):
        total += int(table[picks[u], picks[v]])
    return total


def peak_of(problem: Problem, picks: Sequence[int]) -> int:
    """Most bytes live at any time."""
    horizon = max((end for _, end in problem.intervals), default=0)
    change = np.zeros(horizon + 1, dtype=np.int64)
    for (start, end), usage, k in zip(problem.intervals, problem.usages, picks):
        if start < end:
            change[start] += usage[k]
            change[end] -= usage[k]
    return int(np.cumsum(change).max(initial=0))


def feasible(problem: Problem, picks: Sequence[int]) -> bool:
    """Nothing forbidden is taken, and memory holds."""
    within = problem.limit is None or peak_of(problem, picks) <= problem.limit
    return within and cost_of(problem, picks) < FORBIDDEN
