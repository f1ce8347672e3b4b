"""What an engine's allocator holds beside what is counted by name, fitted on published peaks.

A rank's peak is `counted + cached + fragmentation x dynamic`: bytes counted by name, blocks that
the allocator keeps whatever the batch, and what it loses around activations, gathered units,
logits and working space. Both are found on a grid, by the least mean error. A peak further off than
OUTLIER counts as OUTLIER. Whether a run fitted is certain where a printed peak is not, and what a
plan is refused for: one predicted on the wrong side of the capacity, by more than a report allows,
counts as WRONG. An engine without a row here keeps constants that no peak has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cost_models.estimate import estimate_step
from cost_models.validation.metrics import Scores, scores
from planner.validation.predict import costs_of
from planner.validation.rows import Run
from planner.validation.scoring import NEAR, SLACK

if TYPE_CHECKING:
    from planner.validation.fit import Fact

Floats = NDArray[np.float64]
OUTLIER = 0.15  # relative; a peak further off says nothing about an allocator
WRONG = 1.0  # a verdict that is wrong, as a relative error


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Engines that share an allocator's constants. table: of engines.toml that has them, and of
    those that repeat them; key: runs alike, which are left out together."""

    tables: tuple[str, ...]
    engines: tuple[str, ...]
    fragmentation: tuple[float, ...]
    cached_bytes: tuple[int, ...]
    key: Callable[[Run], str]


def _model(run: Run) -> str:
    return f"{run.model.get('layers')} layers of {run.model.get('hidden')}"


def _group(run: Run) -> str:
    return run.group


def _steps(first: float, last: float, step: float) -> tuple[float, ...]:
    return tuple(round(first + i * step, 9) for i in range(round((last - first) / step) + 1))


RESERVES = (
    Reserve(
        tables=("deepspeed",), engines=("megatron-deepspeed",),
        fragmentation=_steps(0.1, 0.45, 0.025),
        cached_bytes=tuple(range(2 * 10**9, 7 * 10**9 + 1, 2 * 10**8)), key=_model,
    ),
    Reserve(
        tables=("torchtitan", "torchtitan-eager"), engines=("torchtitan", "torchtitan-eager"),
        fragmentation=_steps(0.02, 0.3, 0.02), cached_bytes=(0,), key=_group,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A fit of one reserve: its constants, and peaks of its runs by constants that were fitted
    without their key, bytes by id. scores: of those that were measured."""

    reserve: Reserve
    fragmentation: float
    cached_bytes: int
    left_out: Mapping[str, int]
    scores: Scores


def ranks_of(fact: Fact) -> Floats:
    """(counted, dynamic) bytes of every rank: what an engine that loses nothing, and one that
    loses as much as is dynamic, holds."""
    case = fact.prepared.case
    engine = replace(case.engine, fragmentation=1.0, cached_bytes=0)
    prepared = replace(fact.prepared, case=replace(case, engine=engine))
    costs, d = costs_of(prepared.case, prepared.graph), case.decisions
    made = estimate_step(costs, costs.step(d, prepared.assignments), d)
    found = [dict(rank.memory_bytes) for rank in made.ranks]
    return np.array([
        (sum(m.values()) - m["fragmentation"], m["fragmentation"]) for m in found
    ], dtype=np.float64)  # fmt: skip


def fit_reserve(reserve: Reserve, facts: Sequence[Fact]) -> Held:
    """Fit on all runs of its engines, and without each key in turn."""
    mine = [f for f in facts if f.prepared.case.engine.name in reserve.engines]
    keys = np.array([reserve.key(f.prepared.case.run) for f in mine])
    grid = list(product(reserve.fragmentation, reserve.cached_bytes))
    peaks = [_peaks(ranks_of(fact), grid) for fact in mine]
    errors = np.stack([_errors(fact, peak) for fact, peak in zip(mine, peaks)])  # [runs, grid]

    def best(rows: NDArray[np.bool_]) -> int:
        return int(np.argmin(errors[rows].mean(axis=0)))

    left_out = [float(peak[best(keys != key)]) for peak, key in zip(peaks, keys)]
    share, cached = grid[best(keys == keys)]
    return Held(
        reserve=reserve, fragmentation=share, cached_bytes=cached,
        left_out={f.row.id: round(peak) for f, peak in zip(mine, left_out)},
        scores=scores([
            (peak, f.row.measured_bytes)
            for f, peak in zip(mine, left_out) if f.row.measured_bytes
        ]),
    )  # fmt: skip


def _errors(fact: Fact, peaks: Floats) -> Floats:
    """Of a run's peak under each pair of constants, relative, as the fit counts them."""
    row = fact.row
    used = peaks / row.capacity_bytes
    wrong = used < 1 - NEAR if row.oom else used > 1 + SLACK
    off = np.abs(peaks / row.measured_bytes - 1) if row.measured_bytes else np.zeros_like(peaks)
    return np.asarray(np.where(wrong, WRONG, np.minimum(off, OUTLIER)))


def _peaks(ranks: Floats, grid: Sequence[tuple[float, float]]) -> Floats:
    """The fullest rank under each pair of constants."""
    at = np.array(grid)
    return np.asarray((ranks[:, :1] + at[:, 1] + ranks[:, 1:] * at[:, 0]).max(axis=0))
