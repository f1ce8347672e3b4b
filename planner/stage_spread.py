"""What a rank recomputes of which only the layers are chosen: where all ways to recompute them are
too many, that is left to the linear program, which spreads it over the rank's stages.

It recomputes so much in all, each stage no more than its layers do, and at each moment that can be
the rank's peak enough to fit. The least in all is a knapsack of each moment in fractions (what
saves most bytes for its time first), made up to the next sum that whole layers take.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.stage_problem import StageProblem
from planner.stage_arcs import Array

LEVELS = ("none", "selective", "full")
MOST_SUMS = 200_000  # of what whole layers recompute, that are found
BYTE = 1.0  # of memory that is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of a micro-batch. least_ps: what a pattern recomputes in all, infinite where it does not fit.
    A pattern's needs_ps, by [pattern, limit], are at most what the stages of its rank recompute,
    each times counts, by [rank, limit, stage of the rank]."""

    least_ps: Array
    needs_ps: Array
    counts: Array


def spread_of(
    p: StageProblem, rank: int, of: Array, loads: NDArray[np.int64], moments: int
) -> Spread:
    """Of a rank whose stages have such loads, [pattern, stage of the rank, class]. of: [number,
    class], what the problem knows of each class of layers. moments: of all ranks the most."""
    stages, held = p.stages_of(rank), np.array(p.in_flight(rank), dtype=float)
    steps = [_steps(p, of[:, k]) for k in range(of.shape[1])]
    most = [max(_again_ps(p, of[:, k])) for k in range(of.shape[1])]
    free = np.array([_free(p, of[:, k]) for k in range(of.shape[1])])
    over = _over(p, rank, of, loads, held) - (loads @ free) @ held.T
    least = np.zeros(len(loads))
    for row, counts in zip(over.T, held):
        least = np.maximum(least, _least(row, counts, loads, steps))
    rate = max((size / ps for some in steps for ps, size in some), default=0.0)
    counts = np.zeros((1 + len(stages) + moments, len(stages)))
    needs = np.zeros((len(loads), len(counts)))
    counts[0], needs[:, 0] = 1, least
    counts[1 : 1 + len(stages)], needs[:, 1 : 1 + len(stages)] = -np.eye(len(stages)), -loads @ most
    if rate:
        here = slice(1 + len(stages), 1 + len(stages) + len(held))
        counts[here], needs[:, here] = held, over / rate
    fits = np.isfinite(least)
    least[fits] = needs[fits, 0] = _made_up(p, of, loads.sum(axis=1), least[fits])
    return Spread(least_ps=least, needs_ps=needs, counts=counts[None])


def _again_ps(p: StageProblem, of: Array) -> list[float]:
    """What a layer of a class recomputes, by level that the program has."""
    return [(0.0, float(of[9]), float(of[8]))[LEVELS.index(x)] for x in p.levels]


def _free(p: StageProblem, of: Array) -> float:
    """Bytes of a micro-batch that a layer of a class saves for no time."""
    saves = _saves(p, of)
    return max(size for ps, size in zip(_again_ps(p, of), saves) if not ps)


def _saves(p: StageProblem, of: Array) -> list[float]:
    """Bytes of a micro-batch that a layer of a class saves, by level that the program has."""
    return [float(of[10] - of[10 + LEVELS.index(x)]) for x in p.levels]


def _steps(p: StageProblem, of: Array) -> list[tuple[float, float]]:
    """(ps, bytes of a micro-batch that they save) from a level to the next, what saves most for its
    time first."""
    levels = list(zip(_again_ps(p, of), _saves(p, of)))
    at, found = (0.0, _free(p, of)), []
    while rest := [x for x in levels if x[0] > at[0] and x[1] > at[1]]:
        to = max(rest, key=lambda x: ((x[1] - at[1]) / (x[0] - at[0]), x[0]))
        found.append((to[0] - at[0], to[1] - at[1]))
        at = to
    return found


def _over(
    p: StageProblem, rank: int, of: Array, loads: NDArray[np.int64], held: Array
) -> Array:
    """[pattern, moment]: bytes beyond the capacity of a rank that recomputes nothing, at least."""
    layers, stages = loads.sum(axis=1), p.stages_of(rank)
    ends = [e for k in stages for e in p.extras(k)]

    def most(of_class: Array, of_ends: list[int]) -> Array:
        return np.where(layers > 0, of_class, 0).max(axis=1, initial=max([0, *of_ends]))

    own = p.constant_bytes + layers @ of[3] + sum(e.state_bytes for e in ends)
    own += 2 * most(of[4], [e.gathered_bytes for e in ends])
    levels = [13 + LEVELS.index(x) for x in p.levels]
    own += most(of[levels].min(axis=0), [e.working_bytes for e in ends])
    beside = held @ [float(sum(e.activation_bytes for e in p.extras(k))) for k in stages]
    found: Array = own[:, None] + beside + (loads @ of[10]) @ held.T - p.capacity_bytes
    return found


def _least(
    over: Array, counts: Array, loads: NDArray[np.int64], steps: list[list[tuple[float, float]]]
) -> Array:
    """What is recomputed at least so that this fits; counts: micro-batches held by each stage."""
    left, took = over.copy(), np.zeros(len(over))
    items = [
        (count * size / ps, ps, count * size, stage, k)
        for stage, count in enumerate(counts.tolist()) if count
        for k, some in enumerate(steps) for ps, size in some
    ]  # fmt: skip
    for _, ps, size, stage, k in sorted(items, reverse=True):
        layers = np.clip(left / size, 0, loads[:, stage, k])
        took += layers * ps
        left -= layers * size
    return np.where(left > BYTE, np.inf, took)


def _made_up(p: StageProblem, of: Array, layers: NDArray[np.int64], least: Array) -> Array:
    """To the next sum of what whole layers recompute. layers: [pattern, class], of the rank."""
    sums = np.zeros(1)
    for k, most in enumerate(layers.max(axis=0, initial=0).tolist()):
        each = np.array(_again_ps(p, of[:, k]))
        for _ in range(most):
            if len(sums) * len(each) > MOST_SUMS:
                return least
            sums = np.unique(sums[:, None] + each)
    at = np.searchsorted(sums, least * (1 - 1e-9) - 1)
    found: Array = sums[np.minimum(at, len(sums) - 1)]
    return found
