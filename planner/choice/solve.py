"""The least cost of a choice problem, with a lower bound.

Reductions first (`reduce`). What is left is small: one integer program (`mip`), exact. Or large:
messages and multipliers (`dual`) give the bound, solutions and a pool of good states; then, round
by round, the program of the pool and of the states nearest to it by the messages (a kernel: it is
reduced again), whose duals are the multipliers of the next sweeps.

Work is counted in sweeps, rounds and branching nodes, so that the answer depends on `effort`
alone; `seconds` only cuts it off.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import numpy as np

from ir.errors import InfeasibleError, PlanError
from planner.choice.core import Core, core_of
from planner.choice.dual import Dual
from planner.choice.mip import Limits, relax, solve_mip
from planner.choice.problem import Ints, Problem, cost_of, feasible
from planner.choice.reduce import Graph, graph_of, reduce, restore

WHOLE_CELLS = 150_000  # of a core that is one program
KERNEL_CELLS = 120_000  # of a kernel, after its reduction
KERNEL_STATES = 3.0  # beside the pool, for each node
LEAST_STATES = 0.1  # the pool alone is taken, however large it is
KERNEL_GAP = 5e-5  # relative, at which a kernel's program stops
SLACK = 0.1  # of a unit of cost, for the rounding of bounds
WARM = 10  # sweeps before memory is priced
SWEEPS, SWEEPS_WHOLE = 60, 20  # with a step of the prices, at effort 1
ROUNDS = 5  # kernels, at effort 1
ROUND_GAIN = 2e-5  # a round that gains less, relative, is the last
BETWEEN = 10  # sweeps after a kernel
NODES = 2000  # branching nodes of a program, at effort 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """picks: a state for each node; cost: theirs. bound: no solution costs less. optimal: none
    costs less than this, to HiGHS's tolerances."""

    picks: tuple[int, ...]
    cost: int
    bound: int
    optimal: bool

    @property
    def gap(self) -> float:
        """What could be gained at most, as a share of the cost."""
        return (self.cost - self.bound) / abs(self.cost) if self.cost > self.bound else 0.0


def solve(
    problem: Problem, *, effort: float = 1.0, seconds: float | None = None,
    better: Callable[[Solution], None] | None = None,
) -> Solution:  # fmt: skip
    """The best solution found. better: called with each that is better than all before.

    Raises InfeasibleError where there is none, PlanError where none was found.
    """
    run = _Run(problem, effort, seconds, better)
    run.whole()
    if run.best is None:
        raise PlanError(
            "no solution was found", why=f"one would cost {run.bound_int()} or more",
            hints=("raise the effort, the seconds or the memory limit",),
        )  # fmt: skip
    return run.best


class _Run:
    """One search: the incumbent and the bound so far, and what work is left."""

    def __init__(
        self, problem: Problem, effort: float, seconds: float | None,
        better: Callable[[Solution], None] | None,
    ) -> None:  # fmt: skip
        self.problem, self.effort, self.better = problem, effort, better
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.bound = float(sum(int(c.min()) for c in (*problem.costs, *problem.tables)))
        self.extra = KERNEL_STATES
        self.best: Solution | None = None
        self.graph = graph_of(problem)

    def left_s(self) -> float | None:
        """Seconds left, if they are limited."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def over(self) -> bool:
        """Out of time, or nothing is left to prove."""
        left = self.left_s()
        return (left is not None and left <= 0) or (
            self.best is not None and self.best.cost <= self.bound_int()
        )

    def bound_int(self) -> int:
        """The bound, rounded to what integers can cost."""
        return ceil(self.bound - SLACK)

    def offer(self, picks: tuple[int, ...]) -> None:
        """Note a solution of the whole problem."""
        cost = cost_of(self.problem, picks)
        if (self.best is None or cost < self.best.cost) and feasible(self.problem, picks):
            found = self.best = self.solution(picks, cost)
            if self.better is not None:
                self.better(found)

    def solution(self, picks: tuple[int, ...], cost: int) -> Solution:
        """Picks with the bound of now."""
        bound = min(self.bound_int(), cost)
        return Solution(picks=picks, cost=cost, bound=bound, optimal=bound >= cost)

    def whole(self) -> None:
        """Reduce, solve, and set the last bound."""
        reduce(self.graph)
        core = core_of(self.graph)
        if not core.nodes:
            self.bound = self.graph.constant
            self.offer(restore(self.graph, {}))
            return
        dual = Dual(core)
        self.sweep(dual, WARM)
        self.ascend(dual, SWEEPS_WHOLE if core.cells <= WHOLE_CELLS else SWEEPS)
        if core.cells > WHOLE_CELLS:
            self.kernels(dual)
        if core.cells <= WHOLE_CELLS or self.best is None:
            self.program(dual)
        if self.best is not None:
            self.best = self.solution(self.best.picks, self.best.cost)

    def kernels(self, dual: Dual) -> None:
        """Kernels until one gains too little."""
        for _ in range(ceil(ROUNDS * self.effort)):
            before = dual.cost
            if self.over():
                return
            self.kernel(dual)
            if before - dual.cost < ROUND_GAIN * abs(dual.cost):
                return

    def sweep(self, dual: Dual, sweeps: int) -> None:
        for _ in range(sweeps):
            if not self.over():
                dual.sweep()
        self.bound = max(self.bound, dual.bound)

    def ascend(self, dual: Dual, sweeps: int) -> None:
        def stop() -> bool:
            self.take(dual)
            return self.over()

        if not self.over():
            dual.ascend(ceil(sweeps * self.effort), stop)

    def take(self, dual: Dual) -> None:
        """Note what the dual has found."""
        self.bound = max(self.bound, dual.bound)
        if dual.picks is not None and (self.best is None or dual.cost < self.best.cost):
            chosen = dict(zip(dual.core.nodes, dual.picks.tolist()))
            self.offer(restore(self.graph, chosen))

    def program(self, dual: Dual) -> None:
        """The core as one integer program."""
        if self.over():
            return
        found = solve_mip(
            dual.core, rows=[], hint=dual.picks,
            limits=Limits(nodes=ceil(NODES * self.effort), seconds=self.left_s()),
        )  # fmt: skip
        if found.picks is None and found.complete:
            raise InfeasibleError("no states of the nodes fit together in memory")
        self.bound = max(self.bound, found.bound)
        if found.picks is not None:
            dual.take(found.picks)
            self.take(dual)

    def kernel(self, dual: Dual) -> None:
        """Solve for the states that look best; sweep with its multipliers."""
        graph, core = self._kernel(dual)
        rows: list[int] = []
        relaxed = relax(core, rows=rows, seconds=self.left_s())
        if relaxed is None:  # no solution among these states, or no time
            self.extra *= 2
            return
        found = solve_mip(
            core, rows=rows, hint=self._hint(graph, core),
            limits=Limits(
                nodes=ceil(NODES * self.effort), gap=KERNEL_GAP, seconds=self.left_s()
            ),
        )  # fmt: skip
        at = {v: i for i, v in enumerate(dual.core.nodes)}
        if found.picks is not None:
            picks = restore(graph, dict(zip(core.nodes, found.picks.tolist())))
            dual.take(np.array(
                [np.searchsorted(self.graph.alive[v], picks[v]) for v in at], dtype=np.int64
            ))  # fmt: skip
            self.take(dual)
        dual.seen[:] = False
        if dual.picks is not None:
            dual.seen |= dual.core.chosen(dual.picks)
        support = relaxed.share > 1e-6
        for i, v in enumerate(core.nodes):
            states = graph.alive[v][support[core.offset[i] : core.offset[i + 1]]]
            dual.seen[dual.core.offset[at[v]] + np.searchsorted(self.graph.alive[v], states)] = True
        dual.price(core.memory.times, relaxed.multipliers)
        for _ in range(BETWEEN):
            if self.over():
                return
            dual.sweep()
            dual.read(sweeps=2)
            self.take(dual)

    def _kernel(self, dual: Dual) -> tuple[Graph, Core]:
        """The problem of the pool and the states nearest to their node's best, reduced."""
        order = np.argsort(dual.gaps(), kind="stable")
        extra = self.extra
        while True:
            some = dual.seen.copy()
            some[order[: int(extra * len(dual.core.nodes))]] = True
            graph = self.graph.copy()
            for v, a, b in zip(dual.core.nodes, dual.core.offset[:-1], dual.core.offset[1:]):
                if not some[a:b].all():
                    graph.keep(v, some[a:b])
            reduce(graph)
            core = core_of(graph)
            if core.cells <= KERNEL_CELLS or extra < LEAST_STATES:
                return graph, core
            extra /= 2

    def _hint(self, graph: Graph, core: Core) -> Ints | None:
        """The incumbent in a kernel, if the kernel still has its states."""
        if self.best is None:
            return None
        at = [np.flatnonzero(graph.alive[v] == self.best.picks[v]) for v in core.nodes]
        if not all(len(found) for found in at):
            return None
        return np.array([found[0] for found in at], dtype=np.int64)
