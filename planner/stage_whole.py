"""Linear programs of stages in whole numbers, by HiGHS's branch and cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.interrupts import held
from planner.stage_arcs import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What a program in whole numbers came to. values: of each variable, where a solution was
    found. complete: it was solved to its end, so that without values there is no solution.
    nodes: of the tree. iterations: of the simplex."""

    values: Array | None
    complete: bool
    nodes: int
    iterations: int


def solve_whole(solver: Any, whole: list[int], nodes: int) -> Whole:
    """The program of a linear solver with its objective, the variables of these indices in whole
    numbers, to so many nodes of the tree at most."""
    from ortools.linear_solver import linear_solver_pb2
    from ortools.math_opt import model_pb2
    from ortools.math_opt.python import mathopt

    source = linear_solver_pb2.MPModelProto()
    solver.ExportModelToProto(source)
    proto = model_pb2.ModelProto()
    count = len(source.variable)
    proto.variables.ids.extend(range(count))
    proto.variables.lower_bounds.extend([v.lower_bound for v in source.variable])
    proto.variables.upper_bounds.extend([v.upper_bound for v in source.variable])
    integers = [False] * count
    for i in whole:
        integers[i] = True
    proto.variables.integers.extend(integers)
    rows = [r for r in source.constraint
            if r.lower_bound > -math.inf or r.upper_bound < math.inf]  # fmt: skip
    some = proto.linear_constraints
    some.ids.extend(range(len(rows)))
    some.lower_bounds.extend([r.lower_bound for r in rows])
    some.upper_bounds.extend([r.upper_bound for r in rows])
    matrix = proto.linear_constraint_matrix
    for at, row in enumerate(rows):
        columns = np.array(row.var_index, dtype=np.int64)
        order = np.argsort(columns, kind="stable")
        matrix.row_ids.extend([at] * len(columns))
        matrix.column_ids.extend(columns[order].tolist())
        matrix.coefficients.extend(np.array(row.coefficient)[order].tolist())
    objective = [(i, v.objective_coefficient) for i, v in enumerate(source.variable)
                 if v.objective_coefficient]  # fmt: skip
    proto.objective.linear_coefficients.ids.extend([i for i, _ in objective])
    proto.objective.linear_coefficients.values.extend([c for _, c in objective])
    model = mathopt.Model.from_model_proto(proto)
    params = mathopt.SolveParameters(node_limit=nodes)
    # the same answer on any number of cores, and no solution that presolving put out of place
    params.highs.string_options.update(parallel="off", presolve="off")
    with held():
        result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=params)
    reason = mathopt.TerminationReason
    ended = result.termination.reason in (reason.OPTIMAL, reason.INFEASIBLE)
    found = result.has_primal_feasible_solution()
    stats = result.solve_stats
    return Whole(
        values=np.array(result.variable_values(list(model.variables()))) if found else None,
        complete=ended, nodes=max(1, stats.node_count), iterations=stats.simplex_iterations,
    )  # fmt: skip
