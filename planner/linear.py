"""Linear programs written down before a solver has them: given to it number by number, a program
takes longer than to solve it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

INF = float("inf")


@dataclass(frozen=True, slots=True)
class Row:
    """lower <= sum of values * variables <= upper, the variables by their places."""

    lower: float
    upper: float
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def put(self, column: int, value: float) -> None:
        """A variable that is not in the row yet."""
        self.columns.append(column)
        self.values.append(value)


@dataclass(slots=True)
class Draft:
    """A linear program without an objective. bounds: of each variable."""

    bounds: list[tuple[float, float]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def variable(self, lower: float, upper: float) -> int:
        """The place of a new one."""
        self.bounds.append((lower, upper))
        return len(self.bounds) - 1

    def row(
        self, lower: float, upper: float, columns: Iterable[int] = (), values: Iterable[float] = ()
    ) -> Row:
        """A new one, which may be added to."""
        made = Row(lower, upper, [*columns], [*values])
        self.rows.append(made)
        return made

    def load(self) -> Any:
        """GLOP, with this program."""
        from ortools.linear_solver import linear_solver_pb2, pywraplp

        proto = linear_solver_pb2.MPModelProto()
        for lower, upper in self.bounds:
            proto.variable.add(lower_bound=lower, upper_bound=upper)
        for row in self.rows:
            proto.constraint.add(
                lower_bound=row.lower, upper_bound=row.upper, var_index=row.columns,
                coefficient=row.values,
            )  # fmt: skip
        solver = pywraplp.Solver.CreateSolver("GLOP")
        fault = solver.LoadModelFromProto(proto)
        assert not fault, fault
        return solver
