"""Linear programs of stages in whole numbers, by HiGHS's branch and cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.highs import Rows, model_of
from planner.interrupts import held
from planner.stage_arcs import Array

HEURISTICS = ("rens", "rins", "root_reduced_cost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What a program in whole numbers came to. values: of each variable, where a solution was
    found. complete: it was solved to its end, so that without values there is no solution.
    least: no solution has a lower objective. nodes: of the tree. iterations: of the simplex."""

    values: Array | None
    complete: bool
    least: float
    nodes: int
    iterations: int


def solve_whole(solver: Any, whole: list[int], nodes: int, above: float) -> Whole:
    """The program of a linear solver with its objective, the variables of these indices in whole
    numbers, to so many nodes of the tree at most. above: no solution has an objective so high."""
    from ortools.linear_solver import linear_solver_pb2
    from ortools.math_opt.python import mathopt

    proto = linear_solver_pb2.MPModelProto()
    solver.ExportModelToProto(proto)
    given, rows = proto.variable, [r for r in proto.constraint if r.lower_bound > -math.inf
                                   or r.upper_bound < math.inf]  # fmt: skip
    integers = set(whole)
    model = model_of(
        [v.lower_bound for v in given], [v.upper_bound for v in given],
        [i in integers for i in range(len(given))],
        np.array([v.objective_coefficient for v in given]),
        [Rows(
            row=np.repeat(np.arange(len(rows)), [len(r.var_index) for r in rows]),
            column=np.concatenate([r.var_index for r in rows]).astype(np.int64),
            value=np.concatenate([r.coefficient for r in rows]),
            lower=np.array([r.lower_bound for r in rows]),
            upper=np.array([r.upper_bound for r in rows]),
        )],
    )  # fmt: skip
    params = mathopt.SolveParameters(node_limit=nodes)
    # the same answer on any number of cores, and no solution that presolving put out of place
    params.highs.string_options.update(parallel="off", presolve="off")
    # mostly there is none: what looks for one in programs of its own takes longer than the tree
    params.highs.bool_options.update({f"mip_heuristic_run_{name}": False for name in HEURISTICS})
    # without a limit HiGHS pumps for a first solution, which takes as long as the tree
    params.highs.double_options["objective_bound"] = above
    with held():
        result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=params)
    reason = mathopt.TerminationReason
    ended = result.termination.reason in (reason.OPTIMAL, reason.INFEASIBLE)
    found = result.has_primal_feasible_solution()
    stats = result.solve_stats
    return Whole(
        values=np.array(result.variable_values(list(model.variables()))) if found else None,
        complete=ended, least=result.termination.objective_bounds.dual_bound,
        nodes=max(1, stats.node_count), iterations=stats.simplex_iterations,
    )  # fmt: skip
