"""Integer program 1: one way to lay each op of a unit over tp, exactly (`planner.choice`).

Variables: x[n, o] = 1 where node n runs option o, one a node. A value's moves cost a table over its
maker and its readers: every distinct placement asked for (forward, and of its gradient) is paid
once, however many readers share it. A parameter that two nodes read lies one way.

    min  sum (time[n, o] + price * bytes[n, o]) x[n, o] + sum over tables f of f[cell] e[f, cell]
    s.t. sum_o x[n, o] = 1; the marginals of e[f, .] are the x of f's nodes; e >= 0; x binary

Times are integers of picoseconds before the solver sees them; at equal cost the earlier option
wins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

from cost_models.collectives import collective_s
from cost_models.kernels import heavy_s
from cost_models.layout import (
    PARTIAL,
    WHOLE,
    Assignment,
    Option,
    boundary,
    collective,
    dual,
    given_placements,
    options,
)
from cost_models.step import Costs, ps
from cost_models.work import Axes, Work
from ir.backward import HEAVY, differentiable
from ir.errors import InfeasibleError, PlanError
from ir.graph import Node, Unit
from ir.ops import rule
from planner.choice.problem import FORBIDDEN as NEVER
from planner.choice.problem import Problem
from planner.choice.solve import solve as choose

STATE_BYTES = 16  # a parameter's share of memory where nothing shards it: the price's yardstick
FORBIDDEN = 10**17  # a cost no plan reaches: a day in picoseconds
TIE_PS = 1  # earlier options are cheaper by this each, so that equal optima have one answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The data of one integer program: all costs are tabulated before a solver sees them.

    choices: options of each node; cost_ps: of each option. moves: (value, direction) -> what
    each (made in, wanted as) pair costs. made_by: the node that makes a value, or -1 for inputs,
    whose placement is fixed[v]. regathers: what is gathered for a forward is gathered again in
    backward, as the engine keeps its shard alone.
    """

    unit: Unit
    choices: tuple[tuple[Option, ...], ...]
    cost_ps: tuple[tuple[int, ...], ...]
    move_ps: dict[tuple[str, int, int], int]
    fixed: dict[str, int]
    sequence_parallel: bool
    regathers: bool = False


def tabulate(
    costs: Costs, unit: Unit, is_layer: bool, axes: Axes, micro_batch: int, cp: int,
    price_ps_per_byte: float, placed: dict[str, int],
) -> Program:  # fmt: skip
    """Time and memory of every option. placed: parameters (relative names) that are pinned."""
    work = replace(
        costs.work(axes, is_layer),
        micro_batch=np.array([float(micro_batch)]),
        cp=np.array([float(cp)]),
        local_seq=np.array([costs.workload.seq_len / cp]),
    )
    learns = differentiable(unit)
    table = options(unit, axes.tp)
    choices, prices = [], []
    for node in unit.nodes:
        kept = [o for o in table[node.name] if _allowed(node, o, unit, placed)]
        if not kept:
            raise InfeasibleError(
                "a pinned placement cannot be run",
                where=f"{node.name} {node.source}",
                why="no option of the operation reads its parameters so",
            )
        choices.append(tuple(kept))
        prices.append(tuple(
            _option_ps(node, o, unit, work, learns) + i * TIE_PS
            + round(price_ps_per_byte * _option_bytes(node, o, unit, work))
            for i, o in enumerate(kept)
        ))  # fmt: skip
    seconds: dict[tuple[str, int, int], int] = {}
    for ref in unit.values:
        if ref not in unit.parameter_names:
            seconds |= _move_table(ref, unit, work)
    return Program(
        unit=unit, choices=tuple(choices), cost_ps=tuple(prices), move_ps=seconds,
        fixed=given_placements(unit, axes.sequence_parallel),
        sequence_parallel=axes.sequence_parallel, regathers=work.engine.sp_regather_backward,
    )  # fmt: skip


def _allowed(node: Node, option: Option, unit: Unit, placed: dict[str, int]) -> bool:
    for ref, at in zip(node.inputs, option.ins):
        if ref in placed and ref in unit.parameter_names and placed[ref] != at:
            return False
        # a table is looked up whole or by rows: columns would break the tie with an output head
        if node.op == "embedding" and ref in unit.parameter_names and at == 1:
            return False
    return True


def _option_ps(node: Node, o: Option, unit: Unit, work: Work, learns: dict[str, bool]) -> int:
    op = rule(node)
    if op.kind in HEAVY or not op.fusible:
        h = heavy_s(node, unit, o, work, learns)
        return ps(h.forward_s[0] + h.backward_s[0])
    if op.view:
        return 0
    moved = sum(work.nbytes(t, at)[0] for t, at in zip(node.outputs, o.outs))
    return ps(float(work.kernels.memory_bound_s(3 * moved))) if moved else 0


def _option_bytes(node: Node, o: Option, unit: Unit, work: Work) -> float:
    """Memory that an option holds: its parameters' state and its results."""
    held = 0.0
    for ref, at in zip(node.inputs, o.ins):
        if ref in unit.parameter_names:
            size = float(unit.values[ref].numel()) * STATE_BYTES
            held += size / (work.axes.tp if at >= 0 else 1)
    if rule(node).view:
        return held
    return held + float(sum(work.nbytes(t, at)[0] for t, at in zip(node.outputs, o.outs)))


def _move_table(ref: str, unit: Unit, work: Work) -> dict[tuple[str, int, int], int]:
    """Picoseconds of every change of placement of a value, exposed share."""
    tensor = unit.values[ref]
    size = float(work.nbytes(tensor, WHOLE)[0])
    one = {
        kind: ps(
            float(collective_s(work.cluster, kind, size, work.axes.tp, 1)) * work.engine.tp_exposed
        )
        for kind in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
    }
    places = (WHOLE, PARTIAL, *range(len(tensor.shape)))
    return {
        (ref, p, q): one[collective(p, q)]
        for p in places for q in places if q != PARTIAL and collective(p, q)
    }  # fmt: skip


Demand = tuple[str, int, bool]  # value, placement wanted (or its gradient arrives in), backward


def demands(
    program: Program, node: Node, option: Option, learns: dict[str, bool]
) -> list[Demand]:
    """What an option asks of the values it reads."""
    found = []
    for ref, at, grad in zip(node.inputs, option.ins, option.grads):
        if ref not in program.unit.parameter_names:
            found.append((ref, at, False))
            if learns[ref]:
                found.append((ref, grad, True))
    return found


def pair_ps(program: Program, made: int, demand: Demand) -> int:
    """What a demand costs where the value is made in placement `made`."""
    ref, at, backward = demand
    source, target = (at, dual(made)) if backward else (made, at)
    again = program.regathers and not backward and collective(source, target) == "all_gather"
    return program.move_ps.get((ref, source, target), 0) * (2 if again else 1)


def result_demands(program: Program, learns: dict[str, bool]) -> list[Demand]:
    """The unit's results lie at its boundary."""
    found = []
    for ref in program.unit.outputs:
        if ref not in program.unit.parameter_names:
            at = boundary(
                program.unit.values[ref], program.sequence_parallel and learns[ref]
            )
            found.append((ref, at, False))
            if learns[ref]:
                found.append((ref, at, True))
    return found


def objective_ps(program: Program, picks: tuple[int, ...]) -> int:
    """The program's objective for one option a node: what `solve` minimises, stated again."""
    learns = differentiable(program.unit)
    made = dict(program.fixed)
    total, wanted = 0, dict.fromkeys(result_demands(program, learns))
    for node, found, price, pick in zip(
        program.unit.nodes, program.choices, program.cost_ps, picks
    ):
        total += price[pick]
        made.update(zip(node.refs(), found[pick].outs))
        wanted.update(dict.fromkeys(demands(program, node, found[pick], learns)))
    return total + sum(pair_ps(program, made[d[0]], d) for d in wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A cost that depends on a few nodes: `table` has one axis for each of `nodes`, ascending."""

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
    for ref, by_node in asked.items():
        found += _value_factor(program, ref, by_node, makers.get(ref), sizes)
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


def _value_factor(
    program: Program,
    ref: str,
    by_node: dict[int, list[frozenset[Demand]]],
    maker: tuple[int, int] | None,
    sizes: list[int],
) -> list[Factor]:
    """What moving one value costs, over its maker and readers: each distinct demand once."""
    outs = (
        [program.fixed[ref]]
        if maker is None
        else [o.outs[maker[1]] for o in program.choices[maker[0]]]
    )
    free = [i for i in by_node if i >= 0 and sizes[i] > 1]
    always = frozenset(
        d for i, wants in by_node.items() if i < 0 or sizes[i] == 1 for d in wants[0]
    )
    own = [maker[0]] if maker is not None and sizes[maker[0]] > 1 else []
    nodes = tuple(sorted({*free, *own}))
    shape = tuple(sizes[i] for i in nodes)
    table = np.zeros(shape, dtype=np.int64)
    price: dict[tuple[int, Demand], int] = {}
    for cell in np.ndindex(*shape):
        at = dict(zip(nodes, cell))
        made = outs[at[maker[0]]] if own and maker else outs[0]
        wanted = always.union(*(by_node[i][at[i]] for i in free))
        for d in wanted:
            if (made, d) not in price:
                price[made, d] = pair_ps(program, made, d)
            table[cell] += price[made, d]
    return [Factor(nodes=nodes, table=table)] if table.any() else []


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


def _joined(parts: list[Factor], sizes: list[int]) -> Factor:
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
    sizes = [len(found) for found in program.choices]
    left = factors(program)
    variables = sorted({n for f in left for n in f.nodes})
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
        left.append(Factor(nodes=rest, table=joined.table.min(axis=axis)))
        variables.remove(best)
    picks = _by_choice(left, variables, sizes, program.unit.name) if variables else {}
    for node, rest, choice in reversed(undo):
        picks[node] = int(choice[tuple(picks[n] for n in rest)])
    found = tuple(picks.get(i, 0) for i in range(len(sizes)))
    if sum(int(f.table[tuple(found[n] for n in f.nodes)]) for f in factors(program)) >= FORBIDDEN:
        raise InfeasibleError(
            f"no way to lay {program.unit.name} over tp agrees on its parameters",
            hints=("drop a place: pin",),
        )
    return found


def _by_choice(
    left: list[Factor], variables: list[int], sizes: list[int], name: str
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
