"""Exact reductions: what is forced, what follows another node, what memory does not see.

Of any problem an equal one that is smaller: states that no neighbour can take go; a node whose
state its neighbour's state determines follows it; a table that is a sum of a row and a column
becomes costs; a node that holds no memory and has at most two neighbours is minimised out; a
state that another beats whatever the neighbours do goes. `restore` undoes them all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ir.errors import InfeasibleError
from planner.choice.problem import FORBIDDEN, Floats, Ints, Problem

MOST_CELLS = 4096  # of a table that minimising a node out may make
DOMINANCE_CELLS = 2**18  # of [states, states, neighbour's states]: larger tables are not searched
Interval = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """The state of `node` by its `neighbours`' states (original nodes and states)."""

    node: int
    neighbours: tuple[int, ...]
    table: Ints


@dataclass(slots=True, kw_only=True)
class Graph:
    """What is left while reductions run.

    alive: node -> its original states that are left; costs, tables and bytes run along these.
    held: node -> interval -> bytes by state, the least of them 0; base: change of bytes at each
    time, of all that is decided. undo: in the order made. constant: cost of all that is decided.
    edges, nodes: what changed since it was last looked at, in order.
    """

    problem: Problem
    alive: dict[int, Ints]
    cost: dict[int, Floats]
    tables: dict[int, dict[int, Floats]]
    held: dict[int, dict[Interval, Ints]]
    base: Ints
    undo: list[Decided] = field(default_factory=list)
    constant: float = 0.0
    edges: OrderedDict[tuple[int, int], None] = field(default_factory=OrderedDict)
    nodes: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def copy(self) -> Graph:
        """A graph to reduce apart; arrays that are never written in place are shared."""
        return replace(
            self, alive=dict(self.alive), cost=dict(self.cost), base=self.base.copy(),
            tables={v: dict(found) for v, found in self.tables.items()},
            held={v: dict(found) for v, found in self.held.items()}, undo=list(self.undo),
            edges=OrderedDict(self.edges), nodes=OrderedDict(self.nodes),
        )  # fmt: skip

    def join(self, u: int, v: int, table: Floats) -> None:
        """Add a table [u, v] to what u and v share."""
        if v in self.tables[u]:
            table = self.tables[u][v] + table
        self.tables[u][v] = table
        self.tables[v][u] = table.T
        self.edges[min(u, v), max(u, v)] = None

    def part(self, u: int, v: int) -> None:
        """Remove the table of u and v."""
        del self.tables[u][v], self.tables[v][u]
        self.edges.pop((min(u, v), max(u, v)), None)
        self.nodes[u] = self.nodes[v] = None

    def add(self, v: int, cost: Floats) -> None:
        """Add costs by v's states; infinite ones go. Raises InfeasibleError."""
        self.cost[v] = self.cost[v] + cost
        finite = np.isfinite(self.cost[v])
        if not finite.all():
            self.keep(v, finite)

    def keep(self, v: int, kept: NDArray[np.bool_]) -> None:
        """Drop the other states of v. Raises InfeasibleError if none is left."""
        if not kept.any():
            raise InfeasibleError("no states of the nodes agree", where=f"node {v}")
        self.alive[v] = self.alive[v][kept]
        self.cost[v] = self.cost[v][kept]
        for w, table in self.tables[v].items():
            self.tables[v][w] = table[kept]
            self.tables[w][v] = self.tables[v][w].T
            self.edges[min(v, w), max(v, w)] = None
            self.nodes[w] = None
        found, self.held[v] = self.held[v], {}
        for interval, usage in found.items():
            self.hold(v, interval, usage[kept])
        self.nodes[v] = None

    def hold(self, v: int, interval: Interval, usage: Ints) -> None:
        """Add bytes by v's states."""
        start, end = interval
        if interval in self.held[v]:
            usage = usage + self.held[v].pop(interval)
        least = usage.min()
        self.base[start] += least
        self.base[end] -= least
        if usage.max() > least:
            self.held[v][interval] = usage - least

    def remove(self, v: int) -> None:
        """Remove a node that no table names."""
        del self.alive[v], self.cost[v], self.tables[v], self.held[v]
        self.nodes.pop(v, None)


def graph_of(problem: Problem) -> Graph:
    """The whole problem, its forbidden entries infinite. Raises InfeasibleError."""
    nodes = range(len(problem.costs))
    horizon = max((end for _, end in problem.intervals), default=0)
    g = Graph(
        problem=problem,
        alive={v: np.arange(len(problem.costs[v])) for v in nodes},
        cost={v: _floats(problem.costs[v]) for v in nodes},
        tables={v: {} for v in nodes},
        held={v: {} for v in nodes},
        base=np.zeros(max(horizon, 0) + 1, dtype=np.int64),
    )
    if problem.limit is not None:
        for v, (start, end) in enumerate(problem.intervals):
            if start < end:
                g.hold(v, (start, end), problem.usages[v])
    for (u, v), table in zip(problem.edges, problem.tables):
        g.join(u, v, _floats(table))
    for v in nodes:
        g.add(v, np.zeros(len(g.cost[v])))
        g.nodes[v] = None
    return g


def _floats(costs: Ints) -> Floats:
    found = costs.astype(np.float64)
    found[costs >= FORBIDDEN] = np.inf
    return found


def reduce(g: Graph) -> None:
    """Apply the reductions until none changes anything. Raises InfeasibleError."""
    _settle(g, dominance=False)
    while True:
        _fit(g)
        _settle(g, dominance=False)
        before = _states(g)
        g.nodes.update(dict.fromkeys(g.alive))
        _settle(g, dominance=True)
        if _states(g) == before:
            return


def _states(g: Graph) -> int:
    return sum(len(states) for states in g.alive.values())


def _fit(g: Graph) -> None:
    """Drop what does not fit though all others hold their least, and bytes that always fit."""
    if g.problem.limit is None:
        return
    used = np.cumsum(g.base)
    if used.max(initial=0) > g.problem.limit:
        raise InfeasibleError(
            f"the least states need {int(used.max())} bytes at time {int(used.argmax())}",
            why=f"the limit is {g.problem.limit}",
        )
    most = used.copy()
    for v in g.alive:
        for (start, end), usage in g.held[v].items():
            most[start:end] += usage.max()
    short = np.concatenate([[0], np.cumsum(most > g.problem.limit)])
    for v in g.alive:
        kept = np.ones(len(g.alive[v]), dtype=bool)
        for (start, end), usage in list(g.held[v].items()):
            if short[start] == short[end]:  # never short of memory while it is live
                del g.held[v][start, end]
                g.nodes[v] = None
            kept &= usage <= g.problem.limit - used[start:end].max()
        if not kept.all():
            g.keep(v, kept)


def _settle(g: Graph, *, dominance: bool) -> None:
    """Look at every table that changed, then at nodes, until all is at rest."""
    while g.edges or g.nodes:
        if g.edges:
            _edge(g, *g.edges.popitem(last=False)[0])
            continue
        v = g.nodes.popitem(last=False)[0]
        if not g.held[v] and len(g.tables[v]) <= 2 and _minimise_out(g, v):
            continue
        if dominance and len(g.alive[v]) > 1:
            beaten = _beaten(g, v)
            if beaten.any():
                g.keep(v, ~beaten)


def _edge(g: Graph, u: int, v: int) -> None:
    """Reduce by one table."""
    table = g.tables[u][v]
    finite = np.isfinite(table)
    if not finite.all():
        rows, columns = np.asarray(finite.any(axis=1)), np.asarray(finite.any(axis=0))
        if not rows.all():
            g.keep(u, rows)
        if not columns.all():
            g.keep(v, columns)
        finite = finite[np.ix_(rows, columns)]
    if finite.all():
        table = g.tables[u][v]
        row = table[:, 0] - table[0, 0]
        if (table - row[:, None] == table[0]).all():
            g.part(u, v)
            g.add(u, row)
            g.add(v, table[0])
        return
    if (finite.sum(axis=1) == 1).all():
        _follow(g, u, v, finite.argmax(axis=1))
    elif (finite.sum(axis=0) == 1).all():
        _follow(g, v, u, finite.argmax(axis=0))


def _follow(g: Graph, leader: int, v: int, at: Ints) -> None:
    """v's state is `at` the leader's: its costs, tables and bytes become the leader's."""
    cost = g.cost[v][at] + g.tables[leader][v][np.arange(len(at)), at]
    full = np.zeros(len(g.problem.costs[leader]), dtype=np.int64)
    full[g.alive[leader]] = g.alive[v][at]
    g.undo.append(Decided(node=v, neighbours=(leader,), table=full))
    g.part(leader, v)
    for w in list(g.tables[v]):
        table = g.tables[v][w][at]
        g.part(v, w)
        g.join(leader, w, table)
    for interval, usage in g.held[v].items():
        g.hold(leader, interval, usage[at])
    g.remove(v)
    g.add(leader, cost)


def _minimise_out(g: Graph, v: int) -> bool:
    """Take the best state of a node that holds nothing, for each state of its neighbours."""
    near = tuple(g.tables[v])
    if len(near) == 2 and len(g.alive[near[0]]) * len(g.alive[near[1]]) > MOST_CELLS:
        return False
    joint = g.cost[v]
    if len(near) == 1:
        joint = joint[:, None] + g.tables[v][near[0]]
    elif near:
        joint = joint[:, None, None] + (
            g.tables[v][near[0]][:, :, None] + g.tables[v][near[1]][:, None, :]
        )
    best = joint.min(axis=0)
    full = np.zeros([len(g.problem.costs[w]) for w in near], dtype=np.int64)
    full[np.ix_(*(g.alive[w] for w in near))] = g.alive[v][joint.argmin(axis=0)]
    g.undo.append(Decided(node=v, neighbours=near, table=full))
    for w in near:
        g.part(v, w)
    g.remove(v)
    if len(near) == 2:
        g.join(near[0], near[1], best)
    elif near:
        g.add(near[0], best)
    else:
        g.constant += float(best)
    return True


def _beaten(g: Graph, v: int) -> NDArray[np.bool_]:
    """States of v to which another is at least as good, whatever the neighbours do."""
    n = len(g.alive[v])
    beats = np.ones((n, n), dtype=bool)  # [j, i]: j at least as good as i
    for usage in g.held[v].values():
        beats &= usage[:, None] <= usage[None, :]
    if any(n * t.size > DOMINANCE_CELLS for t in g.tables[v].values()):
        return np.zeros(n, dtype=bool)
    excess = g.cost[v][:, None] - g.cost[v][None, :]
    for table in g.tables[v].values():
        if np.isfinite(table).all():
            excess = excess + (table[:, None] - table[None]).max(axis=2)
        else:
            with np.errstate(invalid="ignore"):
                less = table[:, None] - table[None]
            less[np.isnan(less)] = -np.inf
            excess = excess + less.max(axis=2)
    beats &= excess <= 0
    np.fill_diagonal(beats, False)
    beaten = np.zeros(n, dtype=bool)
    for i in range(n):  # of equals the first stays
        beaten[i] = (beats[:, i] & ~beaten).any()
        beats[i] &= not beaten[i]
    return beaten


def restore(g: Graph, chosen: Mapping[int, int]) -> tuple[int, ...]:
    """The states of all original nodes. chosen: node left -> index among its states left."""
    picks = {v: int(g.alive[v][k]) for v, k in chosen.items()}
    for step in reversed(g.undo):
        picks[step.node] = int(step.table[tuple(picks[w] for w in step.neighbours)])
    return tuple(picks[v] for v in range(len(g.problem.costs)))
