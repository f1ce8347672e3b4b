"""Linear programs of stages in whole numbers: by HiGHS's branch and cut, which raises a bound, and
by CP-SAT, which is quicker where few of the numbers can be more than one or two."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.highs import Rows, model_of
from planner.interrupts import held
from planner.stage_arcs import Array

GRAINS = 10**7  # of one, to which a row with other than whole numbers is rounded for CP-SAT
NEAR = 1e-9  # a number so near to a whole one is taken for it
HEURISTICS = ("rens", "rins", "root_reduced_cost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """What branch and cut came to. values: of each variable, where a solution was found. complete:
    it was solved to its end, so that without values there is no solution. least: no solution has a
    lower objective. nodes: of the tree. iterations: of the simplex."""

    values: Array | None
    complete: bool
    least: float
    nodes: int
    iterations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What CP-SAT came to. values: of each variable, where a solution was found. none: there is no
    solution. took: the solver's own seconds, the same on every machine."""

    values: Array | None
    none: bool
    took: float


def solve_tree(solver: Any, whole: list[int], nodes: int, above: float) -> Tree:
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
    return Tree(
        values=np.array(result.variable_values(list(model.variables()))) if found else None,
        complete=ended, least=result.termination.objective_bounds.dual_bound,
        nodes=max(1, stats.node_count), iterations=stats.simplex_iterations,
    )  # fmt: skip


def solve_whole(solver: Any, shares: Collection[int], most: float) -> Whole:
    """Some solution in whole numbers of a linear solver's program, whose variables are not
    negative; its objective is passed over.

    shares: the variables that need not be whole. most: of the solver's own seconds. Numbers are
    rounded so that no solution is lost: one that is found may break a row by some grains.
    """
    from ortools.linear_solver import linear_solver_pb2
    from ortools.sat.python import cp_model

    proto = linear_solver_pb2.MPModelProto()
    solver.ExportModelToProto(proto)
    grains = np.array([GRAINS if i in shares else 1 for i in range(len(proto.variable))])
    model = cp_model.CpModel()
    given = [
        model.new_int_var(math.ceil(x.lower_bound * n), math.floor(x.upper_bound * n), "")
        for x, n in zip(proto.variable, grains.tolist())
    ]
    for row in proto.constraint:
        columns, values = list(row.var_index), np.array(row.coefficient)
        near = (abs(values - values.round()) < NEAR) & (values.round() != 0)  # none is lost
        whole = bool((grains[columns] == 1).all() and near.all())
        least = values.round() if whole else values * (GRAINS / grains[columns])
        lost = float(abs(least[grains[columns] > 1]).sum())  # as shares are of whole grains, too
        some = [given[i] for i in columns]
        for sign, bound in ((1, row.upper_bound), (-1, -row.lower_bound)):
            if bound < math.inf:
                total = np.floor(sign * least).astype(np.int64).tolist()
                limit = math.floor(bound + NEAR) if whole else math.ceil(bound * GRAINS + lost)
                model.add(cp_model.LinearExpr.weighted_sum(some, total) <= limit)
    search = cp_model.CpSolver()
    search.parameters.num_workers = 1  # the same answer on any number of cores
    search.parameters.random_seed = 0
    search.parameters.max_deterministic_time = most
    search.parameters.catch_sigint_signal = False
    with held():
        status = search.solve(model)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return Whole(
        values=np.array(search.values(given)) / grains if found else None,
        none=status == cp_model.INFEASIBLE, took=search.response_proto.deterministic_time,
    )  # fmt: skip
