"""Whole assignments: read off messages one node after the other, and bettered node by node."""

from __future__ import annotations

import numpy as np

from planner.choice.core import Core
from planner.choice.messages import Messages
from planner.choice.problem import Floats, Ints


def read(messages: Messages, cost: Floats) -> Ints | None:
    """Each node's best state by its messages, given its earlier neighbours, where memory holds.

    cost: of all states, with what their bytes pay. None where a node has no state left.
    """
    core = messages.core
    picks = np.zeros(len(core.nodes), dtype=np.int64)
    used = np.zeros(len(core.memory.room), dtype=np.int64)
    for v, (before, after) in enumerate(messages.sides):
        score = cost[core.offset[v] : core.offset[v + 1]]
        if len(after.near):
            score = score + messages.inbox[v][after.slots].sum(axis=0)
        if len(before.near):
            score = score + before.table[:, before.start + picks[before.near]].sum(axis=1)
        held = core.memory.held[v]
        if held:
            score = np.where(_fitting(core, used, v), score, np.inf)
        best = int(score.argmin())
        if not np.isfinite(score[best]):
            return None
        picks[v] = best
        for start, end, nbytes in held:
            if nbytes[best]:
                used[start:end] += nbytes[best]
    return picks


def polish(messages: Messages, picks: Ints, sweeps: int = 4) -> Ints:
    """Give each node in turn its best state where its neighbours stay and memory holds."""
    core = messages.core
    picks = picks.copy()
    used = core.memory.used(core.chosen(picks)).round().astype(np.int64)
    for _ in range(sweeps):
        changed = False
        for v, (before, after) in enumerate(messages.sides):
            score = core.cost[core.offset[v] : core.offset[v + 1]]
            for side in (before, after):
                if len(side.near):
                    score = score + side.table[:, side.start + picks[side.near]].sum(axis=1)
            now = int(picks[v])
            if score.min() >= score[now]:
                continue
            held = core.memory.held[v]
            for start, end, nbytes in held:
                used[start:end] -= nbytes[now]
            if held:
                score = np.where(_fitting(core, used, v), score, np.inf)
            best = int(score.argmin())
            changed |= best != now
            picks[v] = best
            for start, end, nbytes in held:
                used[start:end] += nbytes[best]
        if not changed:
            break
    return picks


def _fitting(core: Core, used: Ints, v: int) -> np.ndarray:
    """Which states of v fit beside what is used."""
    room = core.memory.room
    fits = np.ones(core.sizes[v], dtype=bool)
    for start, end, nbytes in core.memory.held[v]:
        fits &= nbytes <= (room[start:end] - used[start:end]).min()
    return fits
