"""One stage, and the optimizer of its first layers below: how many layers are best, exactly.

A stage of all layers has one time and one peak for each choice of what is computed again; with the
optimizers of more layers below it holds less and its step takes longer. All numbers of layers are
weighed at once, against the problem with none below and the one with all.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from cost_models.stage_problem import (
    PairPin,
    StageProblem,
    allowed_pairs,
    least_of,
    pairs_of,
    pin_of,
)
from planner.stage_arcs import INF, Array, Rows, options_of

WEIGHED = ("1f1b", "gpipe")  # schedules that are one after the other on one stage


def best_count(
    none: StageProblem, every: StageProblem, most: int, below_ps: int
) -> int | None:
    """How many layers, of 1 to `most`, take the least step that fits, if that is below `below_ps`;
    none, every: the problem with the optimizers of no layers below, and of all."""
    if none.schedule not in WEIGHED or most < 1:
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
    gathered = np.maximum(
        np.maximum.accumulate((0, *every.gathered_bytes)),
        np.maximum.accumulate((0, *none.gathered_bytes[::-1]))[::-1],
    )
    gathered = np.maximum(gathered, max((e.gathered_bytes for e in ends), default=0))
    fixed = p.constant_bytes + total("state_bytes") + 2 * gathered
    fixed = fixed + flight * sum(e.activation_bytes for e in ends)
    least = max((e.working_bytes for e in ends), default=0)

    def step_ps(q: StageProblem, n: slice) -> Array:
        """Of these counts, [layers below]."""
        held, quickest = _quickest(
            (*q.recompute_ps, *q.activation_bytes, *q.working_bytes),
            pin_of(p, 0), p.levels, flight, least,
        )  # fmt: skip
        some = np.searchsorted(held, p.capacity_bytes - fixed[n], side="right")
        again = quickest[some]
        steps = m * (each[n] + np.where(again < INF, again, 0)) + tail[n]
        return np.where(again < INF, steps, INF)

    rooms = [(
        room.most_bytes - _mixed(room.state_bytes, low.state_bytes) - sum(room.ends_bytes),
        room.aside_bytes,
    ) for room, low in zip(none.rooms, every.rooms)]  # fmt: skip
    tight = any(np.any(left < flight * sum(map(max, zip(*aside)))) for left, aside in rooms)
    rows = (none.recompute_ps, none.activation_bytes, none.working_bytes)
    alike = rows == (every.recompute_ps, every.activation_bytes, every.working_bytes)
    if alike and not tight:
        return step_ps(none, slice(p.layers + 1))

    def tight_ps(q: StageProblem, n: int) -> int:
        """Of one count, where a room below may be too full."""
        asides = [row for _, aside in rooms for row in aside]
        o = options_of(
            np.array((*q.recompute_ps, *q.activation_bytes, *q.working_bytes, *asides)),
            allowed_pairs(p, 0, p.layers),
        )  # fmt: skip
        used = flight * o.act_bytes + np.maximum(o.work_bytes, least)
        fits = used <= p.capacity_bytes - fixed[n]
        for (left, _), laid in zip(rooms, o.aside_bytes):
            fits &= flight * laid <= left[n]
        again = o.extra_ps[fits].min(initial=INF)
        return int(m * (each[n] + again) + tail[n]) if again < INF else INF

    # layers below are computed again in another time, or hold other bytes: the least of both
    names = ("recompute_ps", "activation_bytes", "working_bytes")
    easiest = replace(none, **least_of((none, every), names))
    steps = step_ps(easiest, slice(p.layers + 1))
    found, best = np.full_like(steps, INF), INF
    for n in np.argsort(steps[1 : most + 1], kind="stable").tolist():
        if steps[n + 1] >= best:
            break
        mixed = replace(
            none, recompute_ps=_joined(none.recompute_ps, every.recompute_ps, n + 1),
            activation_bytes=_joined(none.activation_bytes, every.activation_bytes, n + 1),
            working_bytes=_joined(none.working_bytes, every.working_bytes, n + 1),
        )  # fmt: skip
        found[n + 1] = (
            tight_ps(mixed, n + 1) if tight else step_ps(mixed, slice(n + 1, n + 2))[0]
        )
        best = min(best, found[n + 1])
    return found


@functools.lru_cache(maxsize=64)
def _quickest(
    rows: Rows, pin: PairPin, levels: tuple[str, ...], flight: int, least: int
) -> tuple[Array, Array]:
    """Of one stage of all layers, whatever its state: what it may hold beside that, in order, and
    by how many of these fit the least time added; INF where none does. rows: by layer, as
    `options_of` has them. flight: micro-batches held. least: bytes used at least."""
    o = options_of(np.array(rows, dtype=np.int64), pairs_of(levels, len(rows[0]), pin))
    held = flight * o.act_bytes + np.maximum(o.work_bytes, least)
    order = np.argsort(held, kind="stable")
    return held[order], np.minimum.accumulate(np.concatenate(([INF], o.extra_ps[order])))


def _joined(none: Rows, every: Rows, n: int) -> Any:
    """Of each level the first n layers of `every` and the rest of `none`."""
    return tuple((*high[:n], *low[n:]) for low, high in zip(none, every))


def _mixed(none: tuple[int, ...], every: tuple[int, ...]) -> Array:
    """[n]: the sum of the first n of `every` and of the rest of `none`."""
    first, rest = np.cumsum((0, *every)), np.cumsum((0, *none))
    return first + rest[-1] - rest
