"""Integer program 1: one way to lay each op of a unit over tp, exactly (`planner.choice`).

Variables: x[n, o] = 1 where node n runs option o, one a node. A value's moves cost a table over its
maker and its readers: every distinct placement asked for (forward, and of its gradient) is paid
once, however many readers share it. Where the readers are too many for a table, each placement is
a variable of its own, u = 1 where a reader asks for it. A parameter that two nodes read lies one
way.

    min  sum (time[n, o] + price * bytes[n, o]) x[n, o] + sum over tables f of f[cell] e[f, cell]
    s.t. sum_o x[n, o] = 1; the marginals of e[f, .] are the x of f's nodes; e >= 0; x binary

Times are integers of picoseconds before the solver sees them; at equal cost the earlier option
wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

from cost_models.layout import Assignment
from cost_models.step import Costs
from cost_models.work import Axes
from ir.backward import differentiable
from ir.errors import InfeasibleError, PlanError
from ir.graph import Unit
from planner.choice.problem import FORBIDDEN as NEVER
from planner.choice.problem import Problem
from planner.choice.solve import solve as choose
from planner.sharding_program import (
    Demand,
    Program,
    demands,
    pair_ps,
    result_demands,
    tabulate,
)

FORBIDDEN = 10**17  # a cost no plan reaches: a day in picoseconds
CELLS = 4096  # of the table of a value: one with more readers is a sum of pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A cost that depends on a few nodes: `table` has one axis for each of `nodes`, ascending;
    numbers behind the last node's are of variables beside them."""

    nodes: tuple[int, ...]
    table: NDArray[np.int64]


def factors(program: Program) -> list[Factor]:
    """The objective as a sum of tables: each node's own cost, each value's moves, agreement on
    parameters. A node with one option is no variable."""
    learns = differentiable(program.unit)
    sizes = [len(found) for found in program.choices]
    found = [
        Factor(nodes=(i,), table=np.array(prices, dtype=np.int64))
        for i, prices in enumerate(program.cost_ps) if sizes[i] > 1
    ]  # fmt: skip
    makers = {r: (i, k) for i, n in enumerate(program.unit.nodes) for k, r in enumerate(n.refs())}
    asked = _asked(program, learns)
    fresh = len(sizes)
    for ref, by_node in asked.items():
        made = _value_factors(program, by_node, makers.get(ref), ref, sizes, fresh)
        fresh = max([fresh, *(n + 1 for f in made for n in f.nodes)])
        found += made
    return found + _agreement(program, sizes)


Asked = dict[str, dict[int, list[frozenset[Demand]]]]


def _asked(program: Program, learns: dict[str, bool]) -> Asked:
    """value -> node -> what each of the node's options asks of it; -1 is the unit's boundary."""
    table: Asked = {}
    for i, (node, found) in enumerate(zip(program.unit.nodes, program.choices)):
        each = [demands(program, node, o, learns) for o in found]
        for ref in dict.fromkeys(node.inputs):
            if ref not in program.unit.parameter_names:
                table.setdefault(ref, {})[i] = [
                    frozenset(d for d in wanted if d[0] == ref) for wanted in each
                ]
    for d in result_demands(program, learns):
        fixed = table.setdefault(d[0], {}).setdefault(-1, [frozenset()])
        fixed[0] |= {d}
    return table


def _value_factors(
    program: Program, by_node: dict[int, list[frozenset[Demand]]], maker: tuple[int, int] | None,
    ref: str, sizes: list[int], fresh: int,
) -> list[Factor]:  # fmt: skip
    """What moving one value costs, over its maker and readers: each distinct demand once.

    fresh: the first number that is no node's and no variable's so far.
    """
    outs = (
        [program.fixed[ref]]
        if maker is None
        else [o.outs[maker[1]] for o in program.choices[maker[0]]]
    )
    free = [i for i in by_node if i >= 0 and sizes[i] > 1]
    always = frozenset(
        d for i, wants in by_node.items() if i < 0 or sizes[i] == 1 for d in wants[0]
    )
    own = (maker[0],) if maker is not None and sizes[maker[0]] > 1 else ()
    nodes = tuple(sorted({*free, *own}))
    if prod(sizes[i] for i in nodes) > CELLS:
        readers = {i: by_node[i] for i in free}
        return _asked_by_many(program, readers, own, outs, always, fresh)
    table = np.zeros([sizes[i] for i in nodes], dtype=np.int64)
    price: dict[tuple[int, Demand], int] = {}
    for cell in np.ndindex(*table.shape):
        at = dict(zip(nodes, cell))
        made = outs[at[own[0]]] if own else outs[0]
        wanted = always.union(*(by_node[i][at[i]] for i in free))
        for d in wanted:
            if (made, d) not in price:
                price[made, d] = pair_ps(program, made, d)
            table[cell] += price[made, d]
    return [Factor(nodes=nodes, table=table)] if table.any() else []


def _asked_by_many(
    program: Program, readers: dict[int, list[frozenset[Demand]]], own: tuple[int, ...],
    outs: list[int], always: frozenset[Demand], fresh: int,
) -> list[Factor]:  # fmt: skip
    """The same as a sum of pairs: demands that cost, of the same options, are a variable, 1 where
    any reader asks, which the maker's placement prices. 1 where none asks is only dearer.

    own: the maker, where it has options; outs: the value's placement in each of them.
    """
    def prices(d: Demand) -> NDArray[np.int64]:
        return np.array([pair_ps(program, made, d) for made in outs], dtype=np.int64)

    found = [Factor(nodes=own, table=prices(d)) for d in sorted(always) if own]  # always paid
    alike: dict[tuple[bool, ...], NDArray[np.int64]] = {}  # those that all readers ask for at once
    for d in dict.fromkeys(d for wants in readers.values() for each in wants for d in sorted(each)):
        if d not in always and prices(d).any():
            who = tuple(d in each for wants in readers.values() for each in wants)
            alike[who] = alike.get(who, 0) + prices(d)
    for number, (who, price) in enumerate(alike.items(), fresh):
        paid = np.stack([np.zeros_like(price), price], axis=-1)  # [maker's options, 2]
        found.append(Factor(nodes=(*own, number), table=paid if own else paid[0]))
        asks = iter(who)
        for i, wants in readers.items():
            unpaid = np.array([[FORBIDDEN * next(asks), 0] for _ in wants])
            if unpaid.any():
                found.append(Factor(nodes=(i, number), table=unpaid))
    return found


def _agreement(program: Program, sizes: list[int]) -> list[Factor]:
    """Readers of one parameter agree how it lies."""
    readers: dict[str, list[tuple[int, int]]] = {}
    for i, node in enumerate(program.unit.nodes):
        for k, ref in enumerate(node.inputs):
            if ref in program.unit.parameter_names:
                readers.setdefault(ref, []).append((i, k))
    found = []
    for places in readers.values():
        for (i, k), (j, m) in pairwise(places):
            table = np.array([
                [0 if a.ins[k] == b.ins[m] else FORBIDDEN for b in program.choices[j]]
                for a in program.choices[i]
            ])  # fmt: skip
            axes = tuple(n for n in (i, j) if sizes[n] > 1)
            if i != j and table.any():
                found.append(Factor(nodes=axes, table=table.reshape([sizes[n] for n in axes])))
    return found


def _joined(parts: list[Factor], sizes: Mapping[int, int]) -> Factor:
    """The sum of factors, over all their nodes."""
    nodes = tuple(sorted({n for f in parts for n in f.nodes}))
    table = np.zeros([sizes[n] for n in nodes], dtype=np.int64)
    for f in parts:
        table = table + f.table.reshape([sizes[n] if n in f.nodes else 1 for n in nodes])
    return Factor(nodes=nodes, table=table)


def solve(program: Program, *, cells: int = 200_000) -> tuple[int, ...]:
    """The optimal option of each node.

    Nodes are eliminated exactly while the table over their neighbours has at most `cells` cells
    (of a transformer layer nothing is left); `planner.choice` solves what remains (cells=0: all
    of it). Raises PlanError if it does not prove its answer, InfeasibleError if nothing agrees.
    """
    every = left = factors(program)
    sizes = {n: size for f in left for n, size in zip(f.nodes, f.table.shape)}
    variables = sorted(sizes)
    undo: list[tuple[int, tuple[int, ...], NDArray[np.int64]]] = []
    while variables:
        near: dict[int, set[int]] = {v: set() for v in variables}
        for f in left:
            for n in f.nodes:
                near[n].update(f.nodes)
        cost = {v: prod(sizes[n] for n in near[v]) for v in variables}
        best = min(variables, key=lambda v: (cost[v], v))
        if cost[best] > cells:
            break
        touching = [f for f in left if best in f.nodes]
        joined = _joined(touching, sizes)
        axis = joined.nodes.index(best)
        rest = tuple(n for n in joined.nodes if n != best)
        undo.append((best, rest, joined.table.argmin(axis=axis)))
        left = [f for f in left if best not in f.nodes]
        least = joined.table.min(axis=axis)
        left.append(Factor(nodes=rest, table=np.minimum(least, FORBIDDEN)))  # sums stay small
        variables.remove(best)
    picks = _by_choice(left, variables, sizes, program.unit.name) if variables else {}
    for node, rest, choice in reversed(undo):
        picks[node] = int(choice[tuple(picks[n] for n in rest)])
    if sum(int(f.table[tuple(picks[n] for n in f.nodes)]) for f in every) >= FORBIDDEN:
        raise InfeasibleError(
            f"no way to lay {program.unit.name} over tp agrees on its parameters",
            hints=("drop a place: pin",),
        )
    return tuple(picks.get(i, 0) for i in range(len(program.choices)))


def _by_choice(
    left: list[Factor], variables: list[int], sizes: Mapping[int, int], name: str
) -> dict[int, int]:
    """The rest as a choice problem; a table of three nodes or more is a node that they follow."""
    at = {v: i for i, v in enumerate(variables)}
    costs = [np.zeros(sizes[v], dtype=np.int64) for v in variables]
    edges: list[tuple[int, int]] = []
    tables: list[NDArray[np.int64]] = []
    for f in left:
        if not f.nodes:
            continue  # what elimination has settled
        table = np.where(f.table < FORBIDDEN, f.table, NEVER)
        if len(f.nodes) == 1:
            costs[at[f.nodes[0]]] = costs[at[f.nodes[0]]] + table
        elif len(f.nodes) == 2:
            edges.append((at[f.nodes[0]], at[f.nodes[1]]))
            tables.append(table)
        else:
            cells = np.argwhere(table < NEVER)
            for axis, node in enumerate(f.nodes):
                edges.append((len(costs), at[node]))
                same = cells[:, axis, None] == np.arange(sizes[node])
                tables.append(np.where(same, 0, NEVER))
            costs.append(table[tuple(cells.T)])
    found = choose(Problem(
        costs=tuple(costs), usages=tuple(np.zeros_like(c) for c in costs),
        intervals=((0, 0),) * len(costs), edges=tuple(edges), tables=tuple(tables),
    ))  # fmt: skip
    if not found.optimal:
        raise PlanError(
            f"the sharding program of {name} was not solved",
            why=f"{found.cost} ps found, {found.bound} ps proved",
        )
    return dict(zip(variables, found.picks))


def best_assignment(
    costs: Costs, unit: Unit, is_layer: bool, axes: Axes, micro_batch: int, cp: int,
    price_ps_per_byte: float | None = None, placed: dict[str, int] | None = None,
) -> Assignment:  # fmt: skip
    """The optimal way to lay a unit over tp, at one micro-batch, cp and price of memory.

    Unless the caller says, a byte is worth fetching it over the fastest link each micro-batch.
    """
    if price_ps_per_byte is None:
        price_ps_per_byte = 1e12 / costs.cluster.intra.useful_bytes_per_s
    program = tabulate(
        costs, unit, is_layer, axes, micro_batch, cp, price_ps_per_byte, placed or {},
    )
    picks = solve(program)
    return Assignment(
        ways=axes.tp, sequence_parallel=axes.sequence_parallel,
        chosen=tuple(found[pick] for found, pick in zip(program.choices, picks)),
    )  # fmt: skip
