"""A core as an integer program, by HiGHS; memory rows join as they are violated.

    min  sum cost x + sum table e
    s.t. one x a node; the marginals of e are the x of its ends; e >= 0 continuous; x binary
         bytes at the rows that have joined

Costs are divided by the largest a solution may add, rows by their room: HiGHS's tolerances are
absolute.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import numpy as np
from numpy.typing import NDArray

from planner.choice.core import Core
from planner.choice.problem import Floats, Ints
from planner.highs import Rows, model_of

ROUNDS = 40  # of rows that join
SCALE = 1e4  # the largest cost that HiGHS sees
WITHIN = 0.4  # of a unit of cost: integers that are no further apart are equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """nodes: branching nodes at most. gap: relative, at which a solution is good enough; at 0 it
    is WITHIN one unit of cost. seconds: of the wall clock; None for no limit."""

    nodes: int = 1
    gap: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """picks: one state a node, if a solution was found. bound: no solution costs less. complete:
    the picks are within the gap asked for, or there are none."""

    picks: Ints | None
    bound: float
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxed:
    """share: of each state; multipliers: cost of a byte at each memory row."""

    share: Floats
    multipliers: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What stays when rows join: x, `states` of them, come before e."""

    states: int
    table: Rows
    cost: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What HiGHS answers once: values of x and e, if it has any; duals of the rows that joined."""

    values: Floats | None
    bound: float
    complete: bool
    duals: Floats


def marginals(core: Core) -> tuple[Rows, Floats]:
    """Rows over x then e, and the cost of each e."""
    states, n = int(core.offset[-1]), len(core.nodes)
    row, column, value, prices = [np.repeat(np.arange(n), core.sizes)], [np.arange(states)], [
        np.ones(states)], []  # fmt: skip
    count, cell = n, states
    for (i, j), table in zip(core.ends, core.tables):
        rows, columns = np.nonzero(np.isfinite(table))
        e = cell + np.arange(len(rows))
        ki, kj = table.shape
        at_i, at_j = count + np.arange(ki), count + ki + np.arange(kj)
        row += [at_i[rows], at_i, at_j[columns], at_j]
        column += [e, core.offset[i] + np.arange(ki), e, core.offset[j] + np.arange(kj)]
        value += [np.ones(len(e)), -np.ones(ki), np.ones(len(e)), -np.ones(kj)]
        prices.append(table[rows, columns])
        count += ki + kj
        cell += len(e)
    sides = np.zeros(count)
    sides[:n] = 1.0
    return Rows(
        row=np.concatenate(row), column=np.concatenate(column), value=np.concatenate(value),
        lower=sides, upper=sides,
    ), np.concatenate(prices or [np.zeros(0)])  # fmt: skip


def memory_rows(core: Core, rows: list[int]) -> Rows:
    """The bytes of all states at some rows, as shares of each row's room."""
    memory = core.memory
    row, column, value = [], [], []
    for k, t in enumerate(rows):
        live = np.flatnonzero((memory.start <= t) & (t < memory.end))
        nbytes = np.bincount(memory.state[live], weights=memory.nbytes[live])
        states = np.flatnonzero(nbytes)
        row.append(np.full(len(states), k))
        column.append(states)
        value.append(nbytes[states] / max(int(memory.room[t]), 1))
    none = [np.zeros(0, dtype=np.int64)]
    return Rows(
        row=np.concatenate(row or none), column=np.concatenate(column or none),
        value=np.concatenate(value or none), lower=np.full(len(rows), -np.inf),
        upper=np.array([float(memory.room[t] > 0) for t in rows]),
    )  # fmt: skip


def worst_rows(
    core: Core, share: Floats, known: set[int], *, tolerance: float, most: int = 20
) -> list[int]:
    """Rows that a solution violates: the worst of each stretch of rows that it violates."""
    room = core.memory.room
    excess = core.memory.used(share) - room
    over = excess / np.maximum(room, 1)
    bad = excess > 0.5 + tolerance * room
    edges = np.flatnonzero(np.diff(np.concatenate([[False], bad, [False]]).astype(np.int8)))
    peaks = [int(s + over[s:e].argmax()) for s, e in zip(edges[::2], edges[1::2])]
    peaks = sorted((t for t in peaks if t not in known), key=lambda t: (-over[t], t))
    return peaks[:most]


def covers(core: Core, found: list[Ints]) -> Rows:
    """States that do not fit together: one of each list at least is not taken."""
    none = [np.zeros(0, dtype=np.int64)]
    column = np.concatenate(found or none)
    return Rows(
        row=np.repeat(np.arange(len(found)), [len(states) for states in found]),
        column=column, value=np.ones(len(column)), lower=np.full(len(found), -np.inf),
        upper=np.array([len(states) - 1.0 for states in found]),
    )  # fmt: skip


def relax(core: Core, *, rows: list[int], seconds: float | None = None) -> Relaxed | None:
    """Solve the linear program; rows join (`rows` is added to) until it holds at all of them."""
    program = _program(core)
    for _ in range(ROUNDS):
        memory = memory_rows(core, rows)
        found = _highs(program, (memory,), limits=Limits(seconds=seconds), relaxed=True)
        if found.values is None:
            return None
        share = found.values[: core.offset[-1]]
        more = worst_rows(core, share, set(rows), tolerance=1e-7)
        if not more:
            multipliers = np.zeros(len(core.memory.room))
            multipliers[rows] = found.duals / np.maximum(core.memory.room[rows], 1)
            return Relaxed(share=share, multipliers=multipliers)
        rows += more
    return None


def solve_mip(
    core: Core, *, rows: list[int], limits: Limits, hint: Ints | None = None
) -> Answer:
    """Solve the integer program; rows join until the solution holds at all of them.

    A solution that HiGHS takes to hold, by its tolerance, and that does not, is cut off by itself.
    """
    program = _program(core)
    bound = -np.inf
    together: list[Ints] = []
    for _ in range(ROUNDS):
        found = _highs(
            program, (memory_rows(core, rows), covers(core, together)), limits=limits,
            hint=None if hint is None else core.chosen(hint),
        )
        bound = max(bound, found.bound + core.constant)
        if found.values is None:
            return Answer(picks=None, bound=bound, complete=found.complete)
        ends = zip(core.offset[:-1], core.offset[1:])
        picks = np.array([found.values[a:b].argmax() for a, b in ends], dtype=np.int64)
        if core.fits(picks):
            return Answer(picks=picks, bound=bound, complete=found.complete)
        chosen = core.chosen(picks)
        more = worst_rows(core, chosen.astype(float), set(rows), tolerance=0.0)
        memory = core.memory
        for t in worst_rows(core, chosen.astype(float), set(), tolerance=0.0) if not more else ():
            live = memory.state[(memory.start <= t) & (t < memory.end)]
            together.append(np.unique(live[chosen[live]]))
        rows += more
    return Answer(picks=None, bound=bound, complete=False)


def _program(core: Core) -> Program:
    table, prices = marginals(core)
    return Program(
        states=int(core.offset[-1]), table=table, cost=np.concatenate([core.cost, prices])
    )


def _highs(
    program: Program, joined: tuple[Rows, ...], *, limits: Limits, relaxed: bool = False,
    hint: NDArray[np.bool_] | None = None,
) -> Found:  # fmt: skip
    from ortools.math_opt.python import mathopt

    cost, states = program.cost, program.states
    scale = SCALE / max(float(np.abs(cost).max(initial=0)), 1.0)
    model = model_of(
        [0.0] * len(cost), [1.0] * len(cost),
        [k < states and not relaxed for k in range(len(cost))], cost * scale,
        (program.table, *joined),
    )  # fmt: skip
    params = mathopt.SolveParameters()
    if limits.seconds is not None:
        params.time_limit = timedelta(seconds=max(limits.seconds, 0.01))
    hints = []
    if not relaxed:
        params.relative_gap_tolerance = limits.gap
        params.absolute_gap_tolerance = 0.0 if limits.gap else WITHIN * scale
        params.node_limit = limits.nodes
        if hint is not None:
            hints = [mathopt.SolutionHint(variable_values={
                model.get_variable(k): float(hint[k]) for k in range(states)
            })]  # fmt: skip
    result = mathopt.solve(
        model, mathopt.SolverType.HIGHS, params=params,
        model_params=mathopt.ModelSolveParameters(solution_hints=hints),
    )  # fmt: skip
    ended = (mathopt.TerminationReason.OPTIMAL, mathopt.TerminationReason.INFEASIBLE)
    complete = result.termination.reason in ended
    bound = result.termination.objective_bounds.dual_bound / scale
    if not result.has_primal_feasible_solution() or (relaxed and not complete):
        return Found(values=None, bound=bound, complete=complete, duals=np.zeros(0))
    own = len(program.table.lower)
    duals = np.zeros(sum(len(rows.lower) for rows in joined))
    if relaxed and result.has_dual_feasible_solution():
        rows = [model.get_linear_constraint(k) for k in range(own, own + len(duals))]
        duals = np.maximum(-np.array(result.dual_values(rows), dtype=np.float64), 0) / scale
    return Found(
        values=np.array(result.variable_values(list(model.variables()))), bound=bound,
        complete=complete, duals=duals,
    )  # fmt: skip
