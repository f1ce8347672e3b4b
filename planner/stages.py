"""Stages: which layers on which pipeline stage, and what each stage recomputes, with a bound.

The sweep: the least added recompute time of every arc under its stage's memory, then bounds
propagated over all arcs and the cuts that are left simulated, least bound first. `certify` solves
the same bound in CP-SAT, with what is added by recomputation before and behind a stage exact.
Effort is counted in nodes and operations simulated, never in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from cost_models.schedule import schedule_illegal
from cost_models.stage_problem import (
    Extra,
    Found,
    Nearest,
    Pair,
    StageProblem,
    evaluate,
    rank_bytes,
)
from ir.errors import UsageError
from planner.stage_anneal import annealed
from planner.stage_arcs import INF, Windows
from planner.stage_bounds import Chain, least_tail_ps, lower_bound_ps, propagate
from planner.stage_chain import longest, solve_chain
from planner.stage_chunks import Chunks
from planner.stage_cuts import ALL_CUTS, bound_all, saving_rate, search_near, solve_chunks
from planner.stage_lowered import arcs_of, solve_lowered
from planner.stage_memory import sure_extra, surely_infeasible

__all__ = [
    "Effort", "Extra", "Nearest", "Pair", "StageProblem", "StageSolution", "certify", "evaluate",
    "lower_bound_ps", "near", "refutes", "solve", "surely_infeasible",
]  # fmt: skip



@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is spent: arcs visited, operations simulated, CP-SAT's deterministic seconds."""

    nodes: int = 4_000
    operations: int = 300_000
    solver_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSolution:
    """A choice and how good it is.

    status: OPTIMAL, FEASIBLE (bound_ps < step_ps), INFEASIBLE (see `nearest`), or CUTOFF: no
    choice is below the incumbent given; then the choice is empty. bound_ps: no choice is below it.
    below: of each stage, the layers that are `StageProblem.lowered`.
    """

    status: str
    stages: tuple[int, ...] = ()
    recompute: tuple[Pair, ...] = ()
    below: tuple[int, ...] = ()
    step_ps: int = 0
    bound_ps: int = 0
    peak_bytes: tuple[int, ...] = ()
    nearest: Nearest | None = None


def solve(
    problem: StageProblem, *, incumbent_ps: int | None = None, effort: Effort | None = None
) -> StageSolution:
    """Choose stages and recomputation for the least step that fits, with a bound on all choices.

    incumbent_ps: only a step below it is of interest. Raises UsageError for an illegal schedule.
    """
    p, effort = problem, effort or Effort()
    reason = schedule_illegal(p.schedule, p.pp, p.microbatches, p.virtual_stages)
    if reason is None and p.layers < p.count:
        reason = f"{p.count} stages need as many layers at least, there are {p.layers}"
    if reason is not None:
        raise UsageError(reason)
    floor = lower_bound_ps(p)
    below = INF if incumbent_ps is None else incumbent_ps
    if floor >= below:
        return StageSolution(status="CUTOFF", bound_ps=floor)
    if p.chunks > 1:
        found = solve_chunks(p, below, effort.nodes, effort.operations)
    elif p.lowered is not None:
        found = solve_lowered(p, below, effort.nodes, effort.operations)
    else:
        found = solve_chain(p, below, effort.nodes, effort.operations)
    bound = max(found.bound_ps, floor)
    if found.nearest is not None:
        return StageSolution(status="INFEASIBLE", bound_ps=INF, nearest=found.nearest)
    if bound >= below or not found.stages:
        return StageSolution(status="CUTOFF", bound_ps=bound)
    return StageSolution(
        status="OPTIMAL" if bound >= found.step_ps else "FEASIBLE", stages=found.stages,
        recompute=found.recompute, below=found.below, step_ps=found.step_ps,
        bound_ps=min(bound, found.step_ps),
        peak_bytes=rank_bytes(p.lowering(found.stages, found.below), found.stages, found.recompute),
    )  # fmt: skip


def near(
    problem: StageProblem, cuts: Sequence[tuple[int, ...]], *, incumbent_ps: int,
    effort: Effort | None = None, anneal: bool = False,
) -> StageSolution:  # fmt: skip
    """A step below the incumbent's from these cuts on; else CUTOFF.

    anneal: from what is found on that is not far from the incumbent, where no recomputation is
    pinned. Not of layers that may be lowered.
    """
    found = Found()
    if cuts and problem.lowered is None:
        found = search_near(problem, cuts, incumbent_ps, (effort or Effort()).operations)
    if anneal and found.stages and problem.fixed_recompute is None:
        found = annealed(problem, found, incumbent_ps)
    if not found.stages or found.step_ps >= incumbent_ps:
        return StageSolution(status="CUTOFF")
    return StageSolution(
        status="FEASIBLE", stages=found.stages, recompute=found.recompute, step_ps=found.step_ps,
        peak_bytes=rank_bytes(problem, found.stages, found.recompute),
    )  # fmt: skip


def refutes(problem: StageProblem) -> bool:
    """Whether `solve` proves a problem infeasible, and does not only fail to find a choice."""
    few = comb(problem.layers - 1, problem.count - 1) <= ALL_CUTS
    return problem.chunks == 1 or few or surely_infeasible(problem)


def certify(problem: StageProblem, *, incumbent_ps: int, effort: Effort | None = None) -> int:
    """No choice has a step below this: the bound of all cuts, minimised by CP-SAT.

    incumbent_ps: the step of a choice of this problem, which the bound never passes. One stage a
    rank: one-hot arcs, a row a stage as path_bound has it, with the recomputation before and
    behind a stage exact. Several: one-hot cuts, rows a rank as Chunks.bound has them, and a rank's
    memory with what recomputation saves at most. For finalists: takes about a second.
    """
    p, effort = problem, effort or Effort()
    model = _Model(p, incumbent_ps)
    least = lower_bound_ps(p)
    if p.chunks > 1:
        least = max(least, bound_all(p))
        model.add_cuts()
    elif not model.add_arcs():
        return incumbent_ps
    return min(incumbent_ps, max(least, model.solve(effort.solver_s)))


class _Model:
    """A CP-SAT model of the bound. Times are rounded down to units, where picoseconds are many."""

    def __init__(self, p: StageProblem, incumbent_ps: int) -> None:
        from ortools.sat.python import cp_model

        self.p, self.incumbent, self.cp = p, incumbent_ps, cp_model
        self.model = cp_model.CpModel()
        self.unit = max(1, incumbent_ps >> 36)
        self.limit = 2 * (incumbent_ps // self.unit) + 2
        self.span, self.tail = self.time("makespan"), self.time("tail")

    def time(self, name: str) -> Any:
        return self.model.new_int_var(0, self.limit, name)

    def total(self, terms: list[tuple[Any, int]], up: bool = False) -> Any:
        """Sum of variable * ps in units, rounded down, or up where it is subtracted."""
        unit = self.unit
        return self.cp.LinearExpr.weighted_sum(
            [x for x, _ in terms], [-(-ps // unit) if up else ps // unit for _, ps in terms]
        )

    def excess(self, name: str, expression: Any) -> Any:
        """max(0, expression), from above."""
        more = self.time(name)
        self.model.add(more >= expression)
        return more

    def solve(self, seconds: float) -> int:
        self.model.minimize(self.span + self.tail)
        solver = self.cp.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 0
        solver.parameters.max_deterministic_time = seconds
        solver.parameters.catch_sigint_signal = False  # Ctrl-C is the search's, not this program's
        status = solver.solve(self.model)
        if status == self.cp.INFEASIBLE:  # no cut is as good as the incumbent
            return self.incumbent
        return max(0, round(solver.best_objective_bound)) * self.unit

    def add_arcs(self) -> bool:
        """One stage a rank; False where no arc is left below the incumbent."""
        p, model = self.p, self.model
        most = min(p.layers - p.count + 1, longest(p, self.incumbent + 1))
        arcs = arcs_of(p, Windows(p), most)
        chain = Chain(p.count, p.layers, most)
        bound = propagate(p, arcs, chain, self.incumbent + 1).bound
        stages: list[list[tuple[Any, int, int]]] = []
        for s in range(p.count):
            places = np.argwhere(bound[s] < INF).tolist()
            stages.append([(model.new_bool_var(""), i, n) for i, n in places])
        if not all(stages):
            return False
        for s, row in enumerate(stages):
            model.add_exactly_one(x for x, _, _ in row)
            for j in range(1, p.layers if s + 1 < p.count else 0):
                ends = [x for x, i, n in row if i + n + 1 == j]
                starts = [x for x, i, _ in stages[s + 1] if i == j]
                model.add(sum(ends) == sum(starts))
        terms = {}
        for kind, table in (("f", arcs.forward), ("b", arcs.backward + arcs.extra),
                            ("w", arcs.weight), ("t", arcs.tail)):  # fmt: skip
            terms[kind] = [[(x, int(table[s, i, n])) for x, i, n in row]
                           for s, row in enumerate(stages)]  # fmt: skip
        for tails in terms["t"]:
            model.add(self.tail >= self.total(tails))
        self._add_paths(terms)
        return True

    def _add_paths(self, terms: dict[str, list[list[tuple[Any, int]]]]) -> None:
        """Rows of path_bound."""
        p, model, m, S = self.p, self.model, self.p.microbatches, self.p.count
        hop = p.p2p_ps // self.unit
        low = {kind: [self.total(row) for row in terms[kind]] for kind in "fbw"}
        high = {kind: [self.total(row, up=True) for row in terms[kind]] for kind in "fbw"}
        f, b, w = low["f"], low["b"], low["w"]
        t = [x + y + z for x, y, z in zip(f, b, w)]
        if p.schedule == "gpipe":
            slow, back = self.time("forward"), self.time("backward")
            for s in range(S):
                model.add(slow >= f[s])
                model.add(back >= b[s] + w[s])
            model.add(self.span >= sum(t) + 2 * hop * (S - 1) + (m - 1) * (slow + back))
            return
        split = p.schedule == "zbh1"
        for s in range(S):
            ahead = S - 1 - s
            trip = sum(f[s + 1 :]) + sum(b[s + 1 :]) + 2 * hop * ahead
            trip += 0 if split else sum(w[s + 1 :])
            back = high["b"][s] + high["w"][s]
            first = self.excess(f"first{s}", trip - ahead * high["f"][s])
            last = self.excess(f"last{s}", trip - ahead * back)
            rounds = (m - 1) // (ahead + 1)
            line = sum(f[:s]) + hop * s + m * t[s]
            if not split:
                line += sum(b[:s]) + sum(w[:s]) + hop * s
            ways = [line + first + last] if rounds else [line + first] + [line + last] * (not split)
            if rounds > 1:
                more = self.excess(f"more{s}", trip - ahead * (high["f"][s] + back))
                ways = [way + (rounds - 1) * more for way in ways]
            if split:
                home = sum(b[:s]) + hop * s - (min(s, m - 1) + 1) * high["w"][s]
                ways += [way + home for way in ways]
            for way in ways:
                model.add(self.span >= way)

    def add_cuts(self) -> None:
        """Several stages a rank: where each stage begins, one-hot."""
        p, model, S, L = self.p, self.model, self.p.count, self.p.layers
        chunks = Chunks(p)
        cuts: list[list[tuple[Any, int]]] = []
        for k in range(S + 1):
            places = range(L, L + 1) if k == S else range(k if k else 0, L - S + k + 1 if k else 1)
            if p.fixed_stages is not None:
                places = range(sum(p.fixed_stages[:k]), sum(p.fixed_stages[:k]) + 1)
            cuts.append([(model.new_bool_var(""), j) for j in places])
            model.add_exactly_one(x for x, _ in cuts[-1])
        at = [sum(j * x for x, j in row) for row in cuts]
        for k in range(S):
            model.add(at[k + 1] >= at[k] + 1)
        self._add_ranks(chunks, cuts)
        model.add(self.tail >= least_tail_ps(p) // self.unit)

    def _add_ranks(self, chunks: Chunks, cuts: list[list[tuple[Any, int]]]) -> None:
        """Rows of Chunks.bound."""
        p, model, m, q = self.p, self.model, self.p.microbatches, chunks.profile
        sums = chunks.sums.copy()
        sums[1, 1:] += np.cumsum(np.array(sure_extra(p), dtype=np.int64))

        def upto(kind: int, up: bool = False) -> list[Any]:
            return [self.total([(x, int(sums[kind, j])) for x, j in row], up) for row in cuts]

        low, high = [upto(kind) for kind in range(3)], [upto(kind, True) for kind in range(3)]
        fixed = np.zeros((3, p.count), dtype=np.int64)
        fixed[0], fixed[1] = p.rank_glue_forward_ps, p.rank_glue_backward_ps
        for k, e in ((0, p.first), (p.count - 1, p.last)):
            fixed[:, k] += (e.forward_ps, e.input_grad_ps, e.weight_grad_ps)

        def span(kind: int, i: int, j: int, most: bool = False) -> Any:
            """Time of stages i to j, j left out: at least, or at most."""
            here = int(fixed[kind, i:j].sum())
            if most:
                return high[kind][j] - low[kind][i] + -(-here // self.unit)
            return low[kind][j] - high[kind][i] + here // self.unit

        S, back = p.count, (1,) if chunks.split else (1, 2)
        cross = [int(c) // self.unit for c in chunks.cross]
        for r in range(p.pp):
            stages = [int(k) for k in q.stage[r]]
            load = m * sum(span(kind, k, k + 1) for k in stages for kind in range(3))
            load += m * self._recompute(chunks, r, cuts)
            head = span(0, 0, r) + cross[r]
            home = 0 if chunks.split else span(1, 0, r) + span(2, 0, r) + cross[r]
            model.add(self.span >= head + load + home)
            k = int(q.first_stage[r])
            spent = sum(int(c) * span(0, s, s + 1, True) for c, s in zip(q.first_done[r], stages))
            behind = sum(span(kind, k + 1, S) for kind in back)
            trip = span(0, 0, S) + behind + 2 * cross[-1] - cross[k]
            model.add(self.span >= trip + load - spent + home)
            k = int(q.last_stage[r])
            done = sum(int(q.last_done[r, kind, c]) * span(kind, s, s + 1)
                       for c, s in enumerate(stages) for kind in range(3))  # fmt: skip
            rest = span(0, k + 1, S) + sum(span(kind, 0, S) for kind in back)
            model.add(self.span >= head + done + rest + 2 * cross[-1] - cross[k])

    def _recompute(self, chunks: Chunks, rank: int, cuts: list[list[tuple[Any, int]]]) -> Any:
        """Time a rank must add at least, in units: what it saves is bounded by the best rate."""
        p, rate = self.p, saving_rate(self.p)
        if rate is None or any(sure_extra(p)):
            return 0
        again = self.time(f"again{rank}")
        kept = np.concatenate(([0], np.cumsum(p.activation_bytes[0])))
        more = [p.extras(k) for k in p.stages_of(rank)]
        state = p.constant_bytes + sum(e.state_bytes for es in more for e in es)
        working = max([min(map(min, p.working_bytes)),
                       *(e.working_bytes for es in more for e in es)])  # fmt: skip
        for counts in p.in_flight(rank):
            held = state + working
            for c, (k, es) in enumerate(zip(p.stages_of(rank), more)):
                held += counts[c] * sum(e.activation_bytes for e in es)
                for sign, row in ((1, cuts[k + 1]), (-1, cuts[k])):
                    held += sum(sign * (int(chunks.sums[3, j]) + counts[c] * int(kept[j])) * x
                                for x, j in row)  # fmt: skip
            saved = int(rate * max(counts) * self.unit * (1 + 1e-9)) + 1
            self.model.add(held - saved * again <= p.capacity_bytes)
        return again
