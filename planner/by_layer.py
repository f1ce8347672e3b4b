"""One stage, and the optimizer of its first layers below: how many layers are best, exactly.

A stage of all layers has one time and one peak for each choice of what is computed again; with the
optimizers of more layers below it holds less and its step takes longer. All numbers of layers are
weighed at once, against the problem with none below and the one with all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cost_models.stage_problem import StageProblem
from planner.stage_arcs import INF, Array, Options, Rows, Windows
from planner.stage_bounds import lower_bound_ps

CELLS = 1_000_000  # of (layers below, what is computed again) at once, to bound memory
WEIGHED = ("1f1b", "gpipe")  # schedules that are one after the other on one stage


def best_count(
    none: StageProblem, every: StageProblem, most: int, below_ps: int
) -> int | None:
    """How many layers, of 1 to `most`, take the least step that fits, if that is below `below_ps`;
    none, every: the problem with the optimizers of no layers below, and of all."""
    if none.schedule not in WEIGHED or most < 1:
        return None
    easiest = replace(none, state_bytes=tuple(map(min, none.state_bytes, every.state_bytes)))
    if lower_bound_ps(easiest) >= below_ps:
        return None
    steps = _steps_ps(none, every, most)[1 : most + 1]
    best = int(np.argmin(steps))
    return best + 1 if steps[best] < min(below_ps, INF) else None


def _steps_ps(none: StageProblem, every: StageProblem, most: int) -> Array:
    """[layers below]: the least step that fits, INF where none does, or where another is surely
    better."""
    p, m = none, none.microbatches
    ends, (flight,) = p.extras(0), p.in_flight(0)[0]

    def total(name: str) -> Array:
        """[layers below]: a sum over the layers."""
        return _mixed(getattr(none, name), getattr(every, name)) + sum(
            getattr(e, name) for e in ends
        )

    each = total("forward_ps") + total("input_grad_ps") + total("weight_grad_ps")
    each = each + p.rank_glue_forward_ps + p.rank_glue_backward_ps
    tail = np.maximum(0, total("tail_comm_ps") - total("tail_hide_ps")) + total("tail_own_ps")
    gathered = [
        max((*every.gathered_bytes[:n], *none.gathered_bytes[n:],
             *(e.gathered_bytes for e in ends)))
        for n in range(p.layers + 1)
    ]  # fmt: skip
    fixed = p.constant_bytes + total("state_bytes") + 2 * np.array(gathered)
    fixed = fixed + flight * sum(e.activation_bytes for e in ends)
    least = max((e.working_bytes for e in ends), default=0)
    def step_ps(options: Options, n: slice) -> Array:
        """Of these counts, [layers below]."""
        held = flight * options.act_bytes + np.maximum(options.work_bytes, least)
        found, first = np.full(len(each[n]), INF), n.start or 0
        some = max(1, CELLS // len(held))
        for at in range(0, len(found), some):
            rows = slice(first + at, min(first + at + some, first + len(found)))
            fits = fixed[rows, None] + held <= p.capacity_bytes
            again = np.where(fits, options.extra_ps, INF).min(axis=1)
            fit = again < INF
            steps = m * (each[rows] + np.where(fit, again, 0)) + tail[rows]
            found[at : at + some] = np.where(fit, steps, INF)
        return found

    # where layers below are computed again in another time, or hold other bytes: the least of both
    easiest = Windows(replace(
        none, recompute_ps=_least(none.recompute_ps, every.recompute_ps),
        activation_bytes=_least(none.activation_bytes, every.activation_bytes),
        working_bytes=_least(none.working_bytes, every.working_bytes),
    )).options(0, 0, p.layers)  # fmt: skip
    steps = step_ps(easiest, slice(p.layers + 1))
    rows = (none.recompute_ps, none.activation_bytes, none.working_bytes)
    if rows == (every.recompute_ps, every.activation_bytes, every.working_bytes):
        return steps
    found, best = np.full_like(steps, INF), INF
    for n in np.argsort(steps[1 : most + 1], kind="stable").tolist():
        if steps[n + 1] >= best:
            break
        mixed = replace(
            none, recompute_ps=_joined(none.recompute_ps, every.recompute_ps, n + 1),
            activation_bytes=_joined(none.activation_bytes, every.activation_bytes, n + 1),
            working_bytes=_joined(none.working_bytes, every.working_bytes, n + 1),
        )  # fmt: skip
        found[n + 1] = step_ps(Windows(mixed).options(0, 0, p.layers), slice(n + 1, n + 2))[0]
        best = min(best, found[n + 1])
    return found


def _least(none: Rows, every: Rows) -> Any:
    """The less of both, by level and layer."""
    return tuple(tuple(map(min, low, high)) for low, high in zip(none, every))


def _joined(none: Rows, every: Rows, n: int) -> Any:
    """Of each level the first n layers of `every` and the rest of `none`."""
    return tuple((*high[:n], *low[n:]) for low, high in zip(none, every))


def _mixed(none: tuple[int, ...], every: tuple[int, ...]) -> Array:
    """[n]: the sum of the first n of `every` and of the rest of `none`."""
    first, rest = np.cumsum((0, *every)), np.cumsum((0, *none))
    return first + rest[-1] - rest
