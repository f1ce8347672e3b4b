"""Fit the constants of a training step on published runs, by group-wise least squares.

    python -m planner.validation.fit --data DIR [--write]

Every constant is a named physical thing with a prior; groups weigh alike, however many rows they
have. Figures reported are cross-validated by group, with one source left out, and with one family
of hardware left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np

from cost_models.compute import kernels_of
from cost_models.constants_table import Constants, load_constants
from planner.validation.predict import Prediction, Prepared, predict

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One constant: where it lives, its prior, and how far it may be from it (of the logarithm).

    place: "hopper/clock.derate" is a constant of a family of devices, "*/..." of all;
    "engine:megatron/tp_exposed" a field of an engine and of those based on it; "link:inter" the
    network's efficiency. most: its largest value.
    """

    place: str
    prior: float
    sd: float
    most: float = math.inf


def changed(prepared: Prepared, values: Values) -> Prepared:
    """A case under other constants."""
    case = prepared.case
    engine, cluster = case.engine, case.cluster
    fields: dict[str, float] = {}
    numbers: dict[str, float] = {}
    factors: dict[str, dict[str, float]] = {}
    for place, value in values.items():
        where, _, name = place.partition("/")
        if where.startswith("engine:"):
            if engine.name in where[7:].split("+"):
                fields[name] = value
        elif where.startswith("switch:"):
            factors.setdefault(where[7:], {})[name] = value
        elif where == "link":
            inter = cluster.inter
            scale = inter.efficiency / 0.87
            cluster = replace(cluster, inter=replace(inter, efficiency=min(1.0, value * scale)))
        elif where in ("*", cluster.device.family):
            numbers[name] = value
    table = overlay(load_constants(cluster.device.constants), numbers)
    kernels = kernels_of(cluster.device, table, engine.attention)
    switches = tuple(
        (name, tuple({**dict(row), **factors.get(name, {})}.items()))
        for name, row in engine.switches
    )
    engine = replace(engine, switches=switches, **fields)  # type: ignore[arg-type]
    made = replace(case, engine=engine, cluster=cluster)
    return replace(prepared, case=made, kernels=kernels)


def overlay(table: Constants, numbers: Mapping[str, float]) -> Constants:
    """A table with some numbers changed; what it does not have is not added."""
    return replace(table, items=tuple(
        replace(c, value=numbers[c.name]) if c.name in numbers else c for c in table.items
    ))  # fmt: skip
