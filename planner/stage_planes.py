"""A bound of stage programs by cutting planes: linear programs over layers by stage and class.

Every path through the schedule is a linear bound of the makespan (`cost_models/schedule_paths`).
The relaxation: how many layers of each class a stage has and recomputes, in fractions, in the order
of the chain as far as lines tell it (`stage_order`); each rank's memory at its peaks; the paths
that were violated so far. It is asked whether any choice has a step below some time: first in
fractions; then the most layers that each rank can take in that time are rounded down, until all
together cannot take the model's layers; then in whole numbers, by branch and cut
(`stage_whole`), again with each path that its solution violates.
Paths are of the schedule's shape alone, so programs of one shape share them.
"""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cost_models.stage_problem import Room, StageProblem, sends_ps
from planner.interrupts import held
from planner.linear import INF, Draft
from planner.refuted import UNLIMITED
from planner.stage_arcs import Array
from planner.stage_bounds import least_tail_ps
from planner.stage_order import hulls
from planner.stage_paths import Known, longest
from planner.stage_ranks import bound_ps, tables
from planner.stage_whole import solve_tree, solve_whole

TOLERANCE = 1e-6  # of the linear solver, relative to the step: a time is refuted only beyond it
WHOLE = 1e-4  # a number of layers so near to a whole one is taken for it
JOIN = 3  # paths that join a program at once
LEAST_S = 0.05  # that a program counts in whole numbers: to set it up
ITERATIONS = 32  # of the simplex in a tree, that take as long as a linear program
ROOT = 10  # nodes that take as long as a tree's first, with its cuts
ENDLESS = 1 << 62  # picoseconds
COLUMNS = 4_000  # programs with more variables are not bounded so


@dataclass(slots=True, kw_only=True)
class Effort:
    """Linear programs that may still be solved; after them in whole numbers seconds of CP-SAT, as
    it counts them, and nodes of a tree."""

    programs: int = 300
    whole_s: float = 0.0
    nodes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """least_ps: no choice has a step below it. refuted: none has one below the time that was asked
    about. cuts: else some that may have, best guess first. held_ps: numbers of layers were found
    with this step, as far as it is known here what they take and hold; else ENDLESS."""

    refuted: bool
    least_ps: int
    cuts: list[tuple[int, ...]]
    held_ps: int = ENDLESS


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A solution: times by kind and stage in ps, the tail, layers by rank and by stage."""

    times: Array
    tail_ps: float
    ranks: list[float]
    stages: list[float]


def applies(p: StageProblem) -> bool:
    """Whether a program is of the kind that is bounded here: nothing of it pinned, ranks alike."""
    free = p.fixed_stages is None and p.fixed_recompute is None and "none" in p.levels
    alike = not p.ranks and p.lowered is None
    return free and alike and p.count * len(set(_rows(p))) * len(p.levels) <= COLUMNS


def classes_of(p: StageProblem) -> tuple[list[tuple[int, ...]], list[int]]:
    """What a program knows of each class of layers, and the class of each layer."""
    rows = _rows(p)
    kinds = sorted(set(rows), key=rows.index)
    return kinds, [kinds.index(row) for row in rows]


def beside_ps(p: StageProblem) -> Array:
    """[kind * stage]: times of a stage beside its layers."""
    found = np.zeros((3, p.count))
    found[0], found[1] = p.rank_glue_forward_ps, p.rank_glue_backward_ps
    for k, e in ((0, p.first), (p.count - 1, p.last)):
        found[:, k] += (e.forward_ps, e.input_grad_ps, e.weight_grad_ps)
    return found.reshape(-1)


def latencies_ps(p: StageProblem) -> Array:
    """[boundary]: of a send from a stage to the next."""
    across = [p.rank_of(b) != p.rank_of(b + 1) for b in range(p.count - 1)]
    return np.array(sends_ps(p), dtype=float) * across


def _rows(p: StageProblem) -> list[tuple[int, ...]]:
    """What the program knows of each layer."""
    return list(zip(
        p.forward_ps, p.input_grad_ps, p.weight_grad_ps, p.state_bytes, p.gathered_bytes,
        p.tail_comm_ps, p.tail_hide_ps, p.tail_own_ps, *p.recompute_ps, *p.activation_bytes,
        *p.working_bytes, *(r for room in p.rooms for r in (room.state_bytes, *room.aside_bytes)),
    ))  # fmt: skip


def refute(p: StageProblem, below_ps: int, known: Known, effort: Effort) -> Answer:
    """Whether no choice has a step below this."""
    if bound_ps(p, below_ps) >= below_ps:
        return Answer(refuted=True, least_ps=below_ps, cuts=[])
    planes = _Planes(p, below_ps, known, effort)
    refuted = planes.empty()
    known.used(planes.joined)
    least = below_ps if refuted else min(below_ps, math.floor(planes.least * below_ps))
    return Answer(
        refuted=refuted, least_ps=least, cuts=[] if refuted else planes.cuts,
        held_ps=below_ps if planes.held else ENDLESS,
    )


class _Planes:
    """The linear program. Times are shares of the time that is asked about."""

    def __init__(self, p: StageProblem, below_ps: int, known: Known, effort: Effort) -> None:
        from ortools.linear_solver import pywraplp

        self.p, self.known, self.effort = p, known, effort
        self.unit = float(below_ps)
        self.draft = Draft()
        self.warm = pywraplp.MPSolverParameters()  # a program begins where the last one ended
        self.warm.SetIntegerParam(self.warm.PRESOLVE, self.warm.PRESOLVE_OFF)
        self.warm.SetIntegerParam(self.warm.LP_ALGORITHM, self.warm.DUAL)
        self.cuts: list[tuple[int, ...]] = []
        self.least = 0.0  # no choice takes less, as a share of the time that is asked about
        self.held = False
        self.joined: set[int] = set()
        self.kinds, self.kind_of = classes_of(p)
        self.of = np.array(self.kinds, dtype=float).T  # [number, class]
        each = self.of[:3].sum(axis=0)
        most = int(below_ps * (1 + TOLERANCE) / max(1.0, p.microbatches * each.min()))
        self.fixed = beside_ps(p)
        most = max(p.chunks, min(p.layers, most))
        number = [self.draft.variable(p.chunks, most) for _ in range(p.pp)]
        self.span, self.tail = (self.draft.variable(0, 1 + TOLERANCE) for _ in range(2))
        self.columns: list[tuple[int, int, int, int]] = []  # stage, class, level, variable
        self._add_columns(number)
        self._add_order()
        self._add_memory()
        self._add_tails()
        self._add_ranks()
        self.draft.row(-INF, 1 + TOLERANCE, (self.span, self.tail), (1, 1))
        s, k, level, self.places = np.array(self.columns).T
        self.at = s, k, level
        stages = p.count
        # what a unit of each variable adds to (forward, input gradient, weight gradient) of stages
        adds = np.zeros((3, stages, len(self.columns)))
        own = level == 0
        for kind in range(3):
            adds[kind, s[own], np.flatnonzero(own)] = self.of[kind, k[own]]
        for place, row in ((1, 9), (2, 8)):
            some = level == place
            adds[1, s[some], np.flatnonzero(some)] = self.of[row, k[some]]
        self.adds: Array = adds.reshape(3 * stages, -1)
        self.latency = latencies_ps(p)
        self.constant: Array = np.zeros(0)
        self._price()
        for path in known.useful:  # a program of the same shape mostly needs the same
            self.joined.add(path)
            self.draft.row(*self._row_of(path))
        self.solver: Any = self.draft.load()
        self.variables: list[Any] = self.solver.variables()
        self.number = [self.variables[i] for i in number]

    def _price(self) -> None:
        """What each path known takes beside the layers."""
        done = len(self.constant)
        runs, sends = self.known.runs[done:], self.known.sends[done:]
        more = runs @ self.fixed + sends @ self.latency
        self.constant = np.concatenate([self.constant, more])

    def _may_be(self, stage: int, kind: int) -> bool:
        """Whether a layer of this class can lie on this stage: each stage has a layer at least."""
        p = self.p
        last = p.layers - 1 if stage == p.count - 1 else p.layers - p.count + stage
        places = range(stage, last + 1) if stage else range(p.layers - p.count + 1)
        return any(self.kind_of[i] == kind for i in places)

    def _add_columns(self, number: list[int]) -> None:
        p, s = self.p, self.draft
        counts = [self.kind_of.count(k) for k in range(len(self.kinds))]
        again = [level for level, name in ((1, "selective"), (2, "full")) if name in p.levels]
        of_class = [s.row(n, n) for n in counts]
        of_rank = [s.row(0, 0) for _ in range(p.pp)]
        for row, x in zip(of_rank, number):
            row.put(x, -1)
        for stage in range(p.count):
            some = s.row(1, p.layers)
            for k, n in enumerate(counts):
                if not self._may_be(stage, k):
                    continue
                x = s.variable(0, n)
                self.columns.append((stage, k, 0, x))
                for row in (some, of_class[k], of_rank[p.rank_of(stage)]):
                    row.put(x, 1)
                if again:
                    within = s.row(-INF, 0)
                    within.put(x, -1)
                for level in again:
                    y = s.variable(0, n)
                    self.columns.append((stage, k, level, y))
                    within.put(y, 1)

    def _add_order(self) -> None:
        """Layers are in a row: of the first so many, so many are of a class, between the hulls of
        what the chain has at any whole number."""
        p, s = self.p, self.draft
        own = {(stage, k): x for stage, k, level, x in self.columns if level == 0}
        sides = [(k, *side) for k in range(len(self.kinds) - 1)
                 for side in hulls(self.kind_of, k)]  # fmt: skip
        before: list[int] = []
        for stage in range(p.count - 1):
            upto = []
            for k in range(len(self.kinds)):
                row, total = s.row(0, 0), s.variable(0, p.layers)
                row.put(total, -1)
                if before:
                    row.put(before[k], 1)
                if (stage, k) in own:
                    row.put(own[stage, k], 1)
                upto.append(total)
            before = upto
            for k, rate, least, most in sides:
                row = s.row(least, most)
                for kind, total in enumerate(upto):
                    row.put(total, (kind == k) - rate)

    def _add_memory(self) -> None:
        """Of every rank at every moment that can be its peak, in shares of the capacity."""
        p, capacity = self.p, float(self.p.capacity_bytes)
        if p.capacity_bytes >= UNLIMITED:
            return
        levels = [at for at, name in enumerate(("none", "selective", "full")) if name in p.levels]
        work = min(float(self.of[13 + level].min()) for level in levels)
        for rank in range(p.pp):
            stages = p.stages_of(rank)
            ends = [e for k in stages for e in p.extras(k)]
            used = float(p.constant_bytes + sum(e.state_bytes for e in ends))
            used += max([work, *(e.working_bytes for e in ends)])
            used += 2 * max([self.of[4].min(), *(e.gathered_bytes for e in ends)])
            mine = [c for c in self.columns if c[0] in stages]
            for counts in p.in_flight(rank):
                held = dict(zip(stages, counts))
                beside = sum(held[k] * e.activation_bytes for k in stages for e in p.extras(k))
                row = self.draft.row(-INF, (capacity - used - beside) / capacity)
                for k, kind, level, x in mine:
                    size = held[k] * self.of[10 + level, kind]
                    size -= held[k] * self.of[10, kind] if level else -self.of[3, kind]
                    row.put(x, size / capacity)
            for room in p.rooms:
                self._add_room(room, rank, mine)

    def _add_room(self, room: Room, rank: int, mine: list[tuple[int, int, int, int]]) -> None:
        """Of a rank at the same moments, in shares of what it may lay on a tier below."""
        stages = self.p.stages_of(rank)
        places = [self.kind_of.index(k) for k in range(len(self.kinds))]
        ends = sum(room.beside_bytes(k, self.p.count) for k in stages)
        for counts in self.p.in_flight(rank):
            held = dict(zip(stages, counts))
            row = self.draft.row(-INF, (room.of_rank(rank) - ends) / room.most_bytes)
            for k, kind, level, x in mine:
                aside = [column[places[kind]] for column in room.aside_bytes]
                size = held[k] * (aside[level] - (aside[0] if level else 0))
                size += 0 if level else room.state_bytes[places[kind]]
                row.put(x, size / room.most_bytes)

    def _add_tails(self) -> None:
        p = self.p
        comm, own = self.of[5] - self.of[6], self.of[7]
        self.draft.row(least_tail_ps(p) / self.unit, INF).put(self.tail, 1)
        for rank in range(p.pp):
            stages = p.stages_of(rank)
            ends = [e for k in stages for e in p.extras(k)]
            mine = [c for c in self.columns if c[0] in stages and c[2] == 0]
            for share in (0, 1):
                fixed = sum(e.tail_own_ps + share * (e.tail_comm_ps - e.tail_hide_ps)
                            for e in ends)  # fmt: skip
                row = self.draft.row(fixed / self.unit, INF)
                row.put(self.tail, 1)
                for _, kind, _, x in mine:
                    row.put(x, -(own[kind] + share * comm[kind]) / self.unit)

    def _add_ranks(self) -> None:
        """The most layers of a kind that a rank has in the time, in whole numbers, and what so
        many recompute."""
        p = self.p
        for table in tables(p):
            kinds = {self.kind_of[i] for i in table.layers}
            for rank, most in enumerate(table.most(math.ceil(self.unit * (1 + TOLERANCE)))):
                mine = [c for c in self.columns if p.rank_of(c[0]) == rank]
                layers = [x for _, kind, level, x in mine if level == 0 and kind in kinds]
                row = self.draft.row(-INF, most)
                for x in layers:
                    row.put(x, 1)
                for fixed, rate in table.recomputed(rank, most):
                    row = self.draft.row(fixed / self.unit, INF)
                    for x in layers:
                        row.put(x, -rate / self.unit)
                    for _, kind, level, x in mine:
                        if level:
                            row.put(x, float(self.of[10 - level, kind]) / self.unit)

    def _row_of(self, path: int) -> tuple[float, float, list[int], list[float]]:
        """The makespan is at least this path: bounds, variables, coefficients."""
        prices = self.known.runs[path] @ self.adds / self.unit
        some = np.flatnonzero(prices)
        columns = [self.span, *self.places[some].tolist()]
        return self.constant[path] / self.unit, INF, columns, [1.0, *(-prices[some]).tolist()]

    def _join(self, path: int) -> None:
        """A row more, once the solver has the program."""
        self.joined.add(path)
        lower, upper, columns, values = self._row_of(path)
        row = self.solver.Constraint(lower, upper)
        for column, value in zip(columns, values):
            row.SetCoefficient(self.variables[column], value)

    def _solved(self, variable: Any, most: bool) -> Point | None:
        """The least or the most of a variable; None where nothing is left."""
        self.effort.programs -= 1
        objective = self.solver.Objective()
        objective.Clear()
        objective.SetCoefficient(variable, 1)
        objective.SetOptimizationDirection(most)
        with held():
            status = self.solver.Solve(self.warm)
        if status == self.solver.FEASIBLE:  # stopped, where nothing else stops it than its handler
            signal.raise_signal(signal.SIGINT)
        if status == self.solver.INFEASIBLE:
            return None
        if status != self.solver.OPTIMAL:  # it gave up: nothing is proved
            self.effort.programs = 0
            return Point(times=self.fixed, tail_ps=0.0, ranks=[], stages=[])
        return self._point(np.array([x.solution_value() for x in self.variables]))

    def _point(self, values: Array) -> Point:
        """A solution of the program, by its variables' indices."""
        columns = values[self.places]
        layers = np.zeros(self.p.count)
        own = self.at[2] == 0
        np.add.at(layers, self.at[0][own], columns[own])
        return Point(
            times=self.fixed + self.adds @ columns,
            tail_ps=float(values[self.tail]) * self.unit,
            ranks=values[[x.index() for x in self.number]].tolist(), stages=layers.tolist(),
        )  # fmt: skip

    def _holds(self, point: Point) -> bool:
        """Whether no path takes a solution beyond the time; those that do join."""
        limit = self.unit * (1 + 2 * TOLERANCE) - point.tail_ps
        takes = self.known.runs @ point.times + self.known.sends @ self.latency
        worst = np.argsort(-takes, kind="stable")[:JOIN]
        beyond = [int(i) for i in worst if takes[i] > limit]
        fresh = [i for i in beyond if i not in self.joined]
        if not beyond:
            span, path = longest(self.p, point.times, self.latency)
            if span <= limit:
                return True
            self.known.add(path)
            self._price()
            fresh = [len(self.constant) - 1]
        for path_at in fresh:
            self._join(path_at)
        return not fresh

    def _least(self, variable: Any, most: bool) -> Point | None:
        """As `_solved`, where every path holds; or the last one where the effort ran out."""
        while True:
            point = self._solved(variable, most)
            if point is None or self.effort.programs <= 0 or self._holds(point):
                return point

    def empty(self) -> bool:
        """Whether nothing is left: told by the ranks' numbers, or in whole numbers."""
        point = self._least(self.variables[self.span], False)
        ranks_too = not (self.effort.whole_s or self.effort.nodes)  # whole numbers tell more
        while ranks_too and point is not None and self.effort.programs > 0:
            before = [x.ub() for x in self.number]
            ranks = point.ranks
            order = sorted(range(self.p.pp), key=lambda r: (-ranks[r], r))
            for rank in order:
                x = self.number[rank]
                found = self._least(x, True)
                if found is None:
                    return True
                point = found
                if self.effort.programs <= 0:
                    break
                x.SetUb(min(x.ub(), math.floor(found.ranks[rank] + WHOLE)))
                if sum(y.ub() for y in self.number) < self.p.layers or x.ub() < x.lb():
                    return True
            else:
                point = self._least(self.variables[self.span], False)
            if before == [x.ub() for x in self.number]:
                break
        if point is None:
            return True
        self._guess(point)
        return bool(point.stages) and (self._whole() or (not self.held and self._tree()))

    def _guess(self, point: Point) -> None:
        """A cut near a point where the time may be kept, unless the solver gave up."""
        if point.stages:
            self.cuts.append(rounded(point.stages, self.p.layers))

    def _whole(self) -> bool:
        """Whether nothing is left in whole numbers: of layers by stage and class, and of ranks."""
        shares = (self.span, self.tail)
        while self.effort.whole_s > 0:
            found = solve_whole(self.solver, shares, self.effort.whole_s)
            self.effort.whole_s -= max(found.took, LEAST_S)
            if found.none:
                return True
            if found.values is None:
                break
            point = self._point(found.values)
            self._guess(point)
            self.held = self._holds(point)
            if self.held:
                break
        return False

    def _tree(self) -> bool:
        """As `_whole`, by branch and cut."""
        objective = self.solver.Objective()
        objective.Clear()
        objective.SetOptimizationDirection(False)
        for x in (self.span, self.tail):
            objective.SetCoefficient(self.variables[x], 1)
        sums = (x.index() for x in self._sums())
        whole = [*(x.index() for x in self.number), *self.places.tolist(), *sums]
        while self.effort.nodes > 0:
            found = solve_tree(self.solver, whole, self.effort.nodes, above=2.0)  # a row: 1
            self.effort.nodes -= ROOT + found.nodes
            self.effort.programs -= 1 + found.iterations // ITERATIONS
            if found.values is None and found.complete:
                return True
            self.least = max(self.least, found.least - 2 * TOLERANCE)
            if found.values is None:
                break
            point = self._point(found.values)
            self._guess(point)
            self.held = self._holds(point)
            if self.held:
                break
        return False

    def _sums(self) -> Iterator[Any]:
        """Of each rank how many layers of a class it has, and recomputes: a tree that parts these
        is smaller than one that parts what is on each of its stages."""
        p, s = self.p, self.solver
        groups: dict[tuple[int, int, int], list[int]] = {}
        for stage, kind, level, x in self.columns:
            groups.setdefault((p.rank_of(stage), kind, level), []).append(x)
        for some in groups.values():
            total, row = s.NumVar(0, p.layers, ""), s.Constraint(0, 0)
            row.SetCoefficient(total, -1)
            for x in some:
                row.SetCoefficient(self.variables[x], 1)
            yield total


def rounded(stages: Sequence[float], layers: int) -> tuple[int, ...]:
    """Whole stages of one layer at least, their ends the nearest to those given."""
    ends, count = [0], len(stages)
    for k, end in enumerate(np.cumsum(stages).tolist(), 1):
        ends.append(min(max(round(end), ends[-1] + 1), layers - count + k))
    return tuple(b - a for a, b in itertools.pairwise(ends))
