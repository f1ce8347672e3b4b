"""The linear program of shares of patterns, the restricted master program of column generation.

Each rank has one pattern in all, the ranks together the model's layers of each class, in the order
of the chain as far as lines tell it (`stage_order`); the makespan is at least each path that has
joined. What stages recompute has variables of its own where patterns are of loads alone
(`stage_spread`). Patterns join as their reduced cost tells; paths, lines of the order and limits of
what is recomputed as they are broken. What has not mattered of late leaves again, as a small
program is solved much sooner.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.stage_problem import StageProblem
from planner.interrupts import held
from planner.stage_arcs import Array
from planner.stage_order import hulls
from planner.stage_paths import Known, longest
from planner.stage_patterns import Patterns
from planner.stage_planes import Effort, beside_ps, classes_of, latencies_ps

MISSING = 50.0  # steps that a rank without a pattern costs, or a layer that is on none
MORE = 3  # patterns of a rank that join at once, and that a program begins with
MOST, LEAST = 40, 20  # of a rank, from which on a program is made anew, with so many
LATE = 60  # linear programs for which a path or line has not mattered that is then left out
ITERATIONS = 40  # of the simplex, that take as long as a linear program
CIRCLES = 50_000  # of them, where programs take thousands: from there on it turns in circles
PRICED = 20_000  # patterns that take as long to price
JOIN = 5  # paths or lines that join at once
TOLERANCE = 1e-6  # of the linear solver, relative to the step
MISSED = 1e-6  # of a rank's pattern or a layer, that is not missing
ORDER = 1e-4  # layers of a class too many or too few, that are none
NOISE = 1e-9  # of layers beyond the rate of a side, that are none
REST = 1e-7  # of a reduced cost or a price, that is none

Mask = NDArray[np.bool_]
Line = tuple[int, int]  # a side of the hulls, and the stage up to which it counts
Limit = tuple[int, int]  # a rank, and which of its limits of what it recomputes


def _exact(values: Array) -> Array:
    """Without rounding noise, which the solver takes for numbers, and turns in circles."""
    return np.where(np.abs(values) < NOISE, 0.0, values)


class Master:
    """Times are shares of the time that is asked about.

    After `solved`: objective, shares of all patterns, span (the makespan), reduced (the cost of
    each pattern, infinite where it is not allowed), and missing (whether something is on no rank).
    paths: the rows of those that joined and mattered of late.
    """

    def __init__(
        self, p: StageProblem, below_ps: int, known: Known, patterns: Patterns
    ) -> None:
        from ortools.linear_solver import pywraplp

        self.p, self.unit, self.known, self.effort = p, float(below_ps), known, Effort(programs=0)
        kinds, kind_of = classes_of(p)
        self.fixed, self.latency = beside_ps(p), latencies_ps(p)
        self.counts = np.bincount(kind_of).astype(float)
        self.ranks = [slice(*ends) for ends in itertools.pairwise(patterns.begins)]
        self.stages = [list(p.stages_of(rank)) for rank in range(p.pp)]
        self.rank = np.repeat(np.arange(p.pp), np.diff(patterns.begins))
        self.loads = patterns.loads
        self.times: Array = patterns.times / self.unit  # [pattern, kind * stage of the rank]
        self.tail: Array = patterns.tail_ps / self.unit
        self.layers: Array = patterns.loads.sum(axis=1).astype(float)  # [pattern, class]
        self.spread = patterns.spread
        self.needs, self.counts_of = np.zeros((len(self.tail), 0)), np.zeros((p.pp, 0, p.chunks))
        if self.spread is not None:
            self.needs, self.counts_of = self.spread.needs_ps / self.unit, self.spread.counts
        self.allowed: Mask = np.ones(len(self.tail), dtype=bool)
        self.sides = [(k, *side) for k in range(len(kinds) - 1) for side in hulls(kind_of, k)]
        # [pattern, stage of the rank] of each side: by how much its layers are beyond the rate
        self.new = pywraplp.Solver.CreateSolver
        self.beyond = [
            _exact(patterns.loads[:, :, k] - rate * patterns.loads.sum(axis=2))
            for k, rate, _, _ in self.sides
        ]
        self.parameters = {}
        for name in ("PRIMAL", "DUAL"):
            made = pywraplp.MPSolverParameters()
            made.SetIntegerParam(made.PRESOLVE, made.PRESOLVE_OFF)
            made.SetIntegerParam(made.LP_ALGORITHM, getattr(made, name))
            self.parameters[name] = made
        self.parameters["ANEW"] = made = pywraplp.MPSolverParameters()
        made.SetIntegerParam(made.INCREMENTALITY, made.INCREMENTALITY_OFF)
        self.mattered: dict[int | Line, int] = {}  # by path or line: when it did last
        self.turn = self.begun = 0
        self.limits: dict[Limit, Any] = {}
        mean = p.layers / p.pp
        nearest = [
            part.start + np.argsort(abs(self.layers[part].sum(axis=1) - mean), kind="stable")[:MORE]
            for part in self.ranks
        ]
        self.nearest: list[int] = np.concatenate(nearest).tolist()
        self._begin(self.nearest, known.useful, ())

    def _begin(self, places: Sequence[int], paths: Sequence[int], lines: Sequence[Line]) -> None:
        """A program of these patterns, paths and lines of the order."""
        self.solver: Any = self.new("GLOP")
        self.solver.SetSolverSpecificParametersAsString(f"max_number_of_iterations: {CIRCLES}")
        s, pp = self.solver, self.p.pp
        infinite = s.infinity()
        s.Objective().SetMinimization()
        self._span, longest = s.NumVar(0, infinite, ""), s.NumVar(0, infinite, "")
        s.Objective().SetCoefficient(self._span, 1)
        s.Objective().SetCoefficient(longest, 1)
        self.of_rank = [s.Constraint(1, 1) for _ in range(pp)]
        self.of_class = [s.Constraint(float(n), float(n)) for n in self.counts]
        self.tails = [s.Constraint(0, infinite) for _ in range(pp)]
        self.nothing: list[Any] = []  # what stands for what is missing
        for row in self.of_rank:
            row.SetCoefficient(self._no(), 1)
        for row in self.of_class:
            for sign in (1, -1):
                row.SetCoefficient(self._no(), sign)
        self.disorder = [self._no() for _ in range(2)]
        # what each stage recomputes, where the patterns do not have it
        stages = range(self.p.count if self.spread else 0)
        self.again = [s.NumVar(0, infinite, "") for _ in stages]
        for row in self.tails:
            row.SetCoefficient(longest, 1)
        self.variables: dict[int, Any] = {}  # by pattern
        self.paths: dict[int, Any] = {}  # by path, as those known are numbered
        self.lines: dict[Line, Any] = {}
        limits, self.limits = [*self.limits], {}
        self.runs: Array = np.zeros((64, 3 * self.p.count))  # [path, kind * stage], with room
        for place in places:
            self._add(place)
        for path in paths:
            self._join(path)
        for line in lines:
            self._join_line(line)
        for limit in limits:
            self._join_limit(limit)
        self.begun = self.turn

    def _no(self) -> Any:
        x = self.solver.NumVar(0, self.solver.infinity(), "")
        self.solver.Objective().SetCoefficient(x, MISSING)
        self.nothing.append(x)
        return x

    def allow(self, allowed: Mask) -> None:
        """The patterns that there are from now on."""
        self.allowed = allowed.copy()
        for place, x in self.variables.items():
            x.SetUb(2 if allowed[place] else 0)
        if len(self.variables) > MOST * self.p.pp and self.turn > self.begun + LATE:
            self._renew()

    def forbid(self, some: Mask) -> None:
        self.allowed &= ~some
        for place in np.flatnonzero(some).tolist():
            if place in self.variables:
                self.variables[place].SetUb(0)

    def _renew(self) -> None:
        """Without what has not mattered of late."""
        places: list[int] = []
        for part in self.ranks:
            mine = [i for i in self.variables if part.start <= i < part.stop and self.allowed[i]]
            places += sorted(mine, key=lambda i: (self.reduced[i], i))[:LEAST]
        since = self.turn - LATE
        paths = [i for i in self.paths if self.mattered[i] >= since]
        self._begin(places, paths, [i for i in self.lines if self.mattered[i] >= since])

    def _of_rank(self, rank: int, values: Array) -> Array:
        """[..., kind * stage] of a rank's own stages."""
        shape: tuple[int, ...] = values.shape[:-1]
        mine = values.reshape(*shape, 3, self.p.count)[..., self.stages[rank]]
        return mine.reshape(*shape, 3 * len(self.stages[rank]))

    def _add(self, place: int) -> None:
        """A pattern joins."""
        x = self.variables[place] = self.solver.NumVar(0, 2 if self.allowed[place] else 0, "")
        rank = int(self.rank[place])
        self.of_rank[rank].SetCoefficient(x, 1)
        self.tails[rank].SetCoefficient(x, -float(self.tail[place]))
        for row, n in zip(self.of_class, self.layers[place].tolist()):
            row.SetCoefficient(x, n)
        prices = self._of_rank(rank, self.runs[: len(self.paths)]) @ self.times[place]
        for row, price in zip(self.paths.values(), prices.tolist()):
            row.SetCoefficient(x, -price)
        for line, row in self.lines.items():
            row.SetCoefficient(x, self._upto(place, line))
        for (of, at), row in self.limits.items():
            if of == rank:
                row.SetCoefficient(x, -float(self.needs[place, at]))

    def _join(self, path: int) -> None:
        runs = self.known.runs[path]
        fixed = float(runs @ self.fixed + self.known.sends[path] @ self.latency) / self.unit
        row = self.solver.Constraint(fixed, self.solver.infinity())
        row.SetCoefficient(self._span, 1)
        own = [self._of_rank(rank, runs) for rank in range(self.p.pp)]
        for place, x in self.variables.items():
            row.SetCoefficient(x, -float(self.times[place] @ own[self.rank[place]]))
        for y, n in zip(self.again, runs.reshape(3, -1)[1].tolist()):
            row.SetCoefficient(y, -n)
        if len(self.paths) == len(self.runs):
            self.runs = np.concatenate([self.runs, np.zeros_like(self.runs)])
        self.runs[len(self.paths)] = runs
        self.paths[path] = row
        self.mattered[path] = self.turn

    def _upto(self, place: int, line: Line) -> float:
        """What a pattern has beyond the rate of a side up to a stage."""
        side, stage = line
        some = [k <= stage for k in self.stages[self.rank[place]]]
        return float(_exact(self.beyond[side][place, some].sum()))

    def _join_line(self, line: Line) -> None:
        _, _, least, most = self.sides[line[0]]
        row = self.lines[line] = self.solver.Constraint(least, most)
        self.mattered[line] = self.turn
        for sign, x in zip((1, -1), self.disorder):  # not one of its own: a program with both more
            row.SetCoefficient(x, sign)  # rows and more variables forgets what it came to
        for place, x in self.variables.items():
            row.SetCoefficient(x, self._upto(place, line))

    def _join_limit(self, limit: Limit) -> None:
        rank, at = limit
        row = self.limits[limit] = self.solver.Constraint(0, self.solver.infinity())
        for stage, count in zip(self.stages[rank], self.counts_of[rank, at].tolist()):
            row.SetCoefficient(self.again[stage], count)
        for place, x in self.variables.items():
            if self.rank[place] == rank:
                row.SetCoefficient(x, -float(self.needs[place, at]))

    def solved(self, by: str) -> bool:
        """Solve; False where the solver gave up, with few patterns as well. by: the simplex that is
        near its end, "DUAL" where something was forbidden or broken, "PRIMAL" where patterns
        joined."""
        self.turn += 1
        with held():
            status = self.solver.Solve(self.parameters[by])
            if status != self.solver.OPTIMAL:  # what it begins with may be too far off
                status = self.solver.Solve(self.parameters["ANEW"])
            if status != self.solver.OPTIMAL:  # or what has joined too near to one another
                self.limits = {}
                self._begin(self.nearest, self.known.useful, ())
                status = self.solver.Solve(self.parameters["ANEW"])
        self.effort.programs -= 1 + len(self.rank) // PRICED
        if status != self.solver.OPTIMAL:
            return False
        self.effort.programs -= self.solver.iterations() // ITERATIONS
        # all is read before anything of the program changes
        self.objective = float(self.solver.Objective().Value())
        self.span = max(0.0, self._span.solution_value())
        self.missing = max(x.solution_value() for x in self.nothing) > MISSED
        self.shares: Array = np.zeros(len(self.rank))
        for place, x in self.variables.items():
            self.shares[place] = x.solution_value()
        self.recomputes: Array = np.zeros(self.p.count)
        self.recomputes[: len(self.again)] = [y.solution_value() for y in self.again]
        self.reduced = np.where(self.allowed, self._reduced(), np.inf)
        return True

    def _reduced(self) -> Array:
        ranks, tails, classes, paths, lines = (
            np.array([row.dual_value() for row in rows]) for rows in
            (self.of_rank, self.tails, self.of_class, self.paths.values(), self.lines.values())
        )  # fmt: skip
        names: list[int | Line] = [*self.paths, *self.lines]
        for name, price in zip(names, (*paths, *lines)):
            if abs(price) > REST:
                self.mattered[name] = self.turn
        limits = np.zeros(self.counts_of.shape[:2])
        for limit, row in self.limits.items():
            limits[limit] = row.dual_value()
        runs = paths @ self.runs[: len(paths)]
        order = np.zeros((len(self.sides), self.p.count))  # of all lines behind a stage
        for (side, stage), price in zip(self.lines, lines.tolist()):
            order[side, : stage + 1] += price
        cost = tails[self.rank] * self.tail - ranks[self.rank] - self.layers @ classes
        for rank, part in enumerate(self.ranks):
            cost[part] += self.times[part] @ self._of_rank(rank, runs)
            cost[part] += self.needs[part] @ limits[rank]
            for beyond, prices in zip(self.beyond, order):
                cost[part] -= beyond[part] @ prices[self.stages[rank]]
        return cost

    def priced_in(self) -> bool:
        """Whether patterns joined, as their reduced cost is below zero."""
        fresh = []
        for part in self.ranks:
            mine = part.start + np.flatnonzero(self.reduced[part] < -REST)
            best = mine[np.argsort(self.reduced[mine], kind="stable")[:MORE]]
            fresh += [place for place in best.tolist() if place not in self.variables]
        for place in fresh:
            self._add(place)
        return bool(fresh)

    def broken(self) -> bool:
        """Whether a path, a line or a limit joined, as the shares break it."""
        return self._disordered() or self._beyond_limits() or self._too_long()

    def _beyond_limits(self) -> bool:
        """Whether a rank recomputes less than it needs, or a stage more than it can."""
        off = np.array([
            self.shares[part] @ self.needs[part] - counts @ self.recomputes[stages]
            for part, counts, stages in zip(self.ranks, self.counts_of, self.stages)
        ])  # fmt: skip
        found = [divmod(at, off.shape[1]) for at in np.argsort(-off, axis=None)[:JOIN].tolist()]
        fresh = [limit for limit in found if off[limit] > TOLERANCE and limit not in self.limits]
        for limit in fresh:
            self._join_limit(limit)
        return bool(fresh)

    def _too_long(self) -> bool:
        """Whether a path takes longer than the makespan that the program has."""
        more = np.zeros((3, self.p.count))
        for stages, part in zip(self.stages, self.ranks):
            more[:, stages] = (self.shares[part] @ self.times[part]).reshape(3, -1)
        more[1] += self.recomputes
        times = self.fixed + more.reshape(-1) * self.unit
        limit = self.span + 10 * TOLERANCE
        takes = (self.known.runs @ times + self.known.sends @ self.latency) / self.unit
        worst = np.argsort(-takes, kind="stable")[:JOIN].tolist()
        fresh = [i for i in worst if takes[i] > limit and i not in self.paths]
        if not fresh:
            _, path = longest(self.p, times, self.latency)
            # of times in whole picoseconds, which small ones are far from
            takes_ps = path.runs.reshape(-1) @ times + (path.sends @ self.latency).sum()
            if takes_ps / self.unit <= limit:
                return False
            self.known.add(path)
            fresh = [len(self.known.runs) - 1]
        for at in fresh:
            self._join(at)
        return True

    def stages_of_shares(self) -> Array:
        """[stage, class]: layers, in fractions."""
        found = np.zeros((self.p.count, len(self.counts)))
        for stages, part in zip(self.stages, self.ranks):
            found[stages] = np.tensordot(self.shares[part], self.loads[part], 1)
        return found

    def _disordered(self) -> bool:
        """Whether up to a stage there are more or fewer layers of a class than the chain has."""
        if not self.sides:
            return False
        upto = np.cumsum(self.stages_of_shares(), axis=0)[:-1]
        off = []
        for k, rate, least, most in self.sides:
            value = upto[:, k] - rate * upto.sum(axis=1)
            off.append(np.maximum(least - value, value - most))
        worst = np.array(off)
        found = [divmod(at, worst.shape[1]) for at in np.argsort(-worst, axis=None)[:JOIN].tolist()]
        fresh = [line for line in found if worst[line] > ORDER and line not in self.lines]
        for line in fresh:
            self._join_line(line)
        return bool(fresh)
