"""The data of integer program 1 (`planner.sharding`): what each way to lay an op over tp costs.

Times are integers of picoseconds before a solver sees them; a price says what a byte held is
worth. `objective_ps` states again what the program minimises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cost_models.collectives import collective_s
from cost_models.kernels import heavy_s
from cost_models.layout import (
    PARTIAL,
    WHOLE,
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
from ir.errors import InfeasibleError
from ir.graph import Node, Unit
from ir.ops import rule

STATE_BYTES = 16  # a parameter's share of memory where nothing shards it: the price's yardstick
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
