"""Programs of sparse rows as HiGHS is given them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Sparse rows: lower <= sum of values * variables <= upper."""

    row: Ints
    column: Ints
    value: Floats
    lower: Floats
    upper: Floats


def model_of(
    lower: Sequence[float], upper: Sequence[float], whole: Sequence[bool], cost: Floats,
    parts: Sequence[Rows],
) -> Any:  # fmt: skip
    """The model that minimises cost times variables between these bounds, under all of these rows.
    whole: whether each variable is an integer."""
    from ortools.math_opt import model_pb2
    from ortools.math_opt.python import mathopt

    proto = model_pb2.ModelProto()
    variables = proto.variables
    variables.ids.extend(range(len(cost)))
    variables.lower_bounds.extend(lower)
    variables.upper_bounds.extend(upper)
    variables.integers.extend(whole)
    some = np.flatnonzero(cost)
    proto.objective.linear_coefficients.ids.extend(some.tolist())
    proto.objective.linear_coefficients.values.extend(cost[some].tolist())
    first = np.cumsum([0, *(len(part.lower) for part in parts)])
    constraints = proto.linear_constraints
    constraints.ids.extend(range(int(first[-1])))
    constraints.lower_bounds.extend(np.concatenate([p.lower for p in parts]).tolist())
    constraints.upper_bounds.extend(np.concatenate([p.upper for p in parts]).tolist())
    row = np.concatenate([p.row + at for p, at in zip(parts, first)])
    column = np.concatenate([p.column for p in parts])
    order = np.lexsort((column, row))
    matrix = proto.linear_constraint_matrix
    matrix.row_ids.extend(row[order].tolist())
    matrix.column_ids.extend(column[order].tolist())
    matrix.coefficients.extend(np.concatenate([p.value for p in parts])[order].tolist())
    return mathopt.Model.from_model_proto(proto)
