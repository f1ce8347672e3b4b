"""What the reductions leave, as flat arrays: the states of all nodes run along one axis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planner.choice.memory import Memory, memory_of
from planner.choice.problem import Floats, Ints
from planner.choice.reduce import Graph


@dataclass(frozen=True, kw_only=True)
class Core:
    """nodes: of the original problem, ascending. offset: of each node's states, and their total.
    cost: of all states. ends, tables: of each edge (i, j), i < j counting along `nodes`.
    """

    nodes: tuple[int, ...]
    offset: Ints
    cost: Floats
    ends: tuple[tuple[int, int], ...]
    tables: tuple[Floats, ...]
    memory: Memory
    constant: float

    @cached_property
    def sizes(self) -> Ints:
        """States of each node."""
        return np.diff(self.offset)

    @cached_property
    def cells(self) -> int:
        """Entries of all tables."""
        return sum(t.size for t in self.tables)

    def total(self, picks: Ints) -> float:
        """Cost of one state a node; infinite where forbidden."""
        found = self.constant + float(self.cost[self.offset[:-1] + picks].sum())
        return found + sum(
            float(t[picks[i], picks[j]]) for (i, j), t in zip(self.ends, self.tables)
        )

    def chosen(self, picks: Ints) -> NDArray[np.bool_]:
        """True at the state of each node."""
        found = np.zeros(self.offset[-1], dtype=bool)
        found[self.offset[:-1] + picks] = True
        return found

    def fits(self, picks: Ints) -> bool:
        """Memory holds at every row."""
        return bool((self.memory.used(self.chosen(picks)) <= self.memory.room + 0.5).all())


def core_of(g: Graph) -> Core:
    """The graph's arrays."""
    nodes = tuple(sorted(g.alive))
    at = {v: i for i, v in enumerate(nodes)}
    offset = np.concatenate([[0], np.cumsum([len(g.alive[v]) for v in nodes])]).astype(np.int64)
    edges = [(v, w) for v in nodes for w in sorted(g.tables[v]) if v < w]
    return Core(
        nodes=nodes, offset=offset,
        cost=np.concatenate([g.cost[v] for v in nodes] or [np.zeros(0)]),
        ends=tuple((at[v], at[w]) for v, w in edges),
        tables=tuple(np.ascontiguousarray(g.tables[v][w]) for v, w in edges),
        memory=memory_of(g, nodes, offset),
        constant=g.constant,
    )  # fmt: skip
