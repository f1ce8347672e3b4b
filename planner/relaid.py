"""The plan of a search once more with its matrices over tp as engines have them.

The placement program weighs a unit's time against its bytes by a price, at one sample, before any
mesh is known. Of the mesh that is chosen the whole step says which layout is better: the program's,
or columns and rows (`planner.classic`), which a team that compares would have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cost_models.decisions import Decisions
from cost_models.estimate import stage_problem
from cost_models.stage_problem import evaluate
from cost_models.step import Assignments
from planner.outcome import Tried, decided
from planner.space import Space
from planner.stages import solve


def relaid(space: Space, best: Tried) -> Tried:
    """The best plan, or the same mesh and state with matrices laid by columns and rows where that
    is quicker and fits: with its stages as they are, or with those that are best then."""
    d = best.decisions
    if d.tp == 1 or d.tp_by_part or d.shares:
        return best
    laid = space.assign_classic(d.tp, d.sequence_parallel)
    if not laid or laid == best.assignments:
        return best
    for cut, objective_ps in _cuts(space, best, laid):
        if objective_ps < best.objective_ps:
            best = replace(best, decisions=cut, assignments=laid, objective_ps=objective_ps)
    return best


def _cuts(space: Space, best: Tried, laid: Assignments) -> Iterator[tuple[Decisions, int]]:
    """Decisions that fit, each with its objective."""
    d, costs = best.decisions, space.costs
    step = costs.step(d, laid)
    problem = stage_problem(costs, step)
    objective_ps, _, fits = evaluate(problem, d.stages, d.pairs)
    if fits and all(use.fits for use in space.tier_uses(step, d, problem)):
        yield d, objective_ps
    if d.below is not None or d.moved is not None:
        return  # their stages are decided with what lies below
    whole = replace(d, keep=d.keep or space.kept)
    step = costs.step(whole, laid)
    problem = space.problem(step, whole)
    found = solve(problem, incumbent_ps=best.objective_ps)
    if found.stages:
        cut = decided(whole, found.stages, found.recompute)
        if all(use.fits for use in space.tier_uses(step, cut, problem)):
            yield cut, found.step_ps
