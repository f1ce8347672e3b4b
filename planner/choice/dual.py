"""Multipliers of memory: a byte at each time point gets the price at which the bound is highest.

The bound of the messages, less what the room costs, holds for any prices; subgradient steps of
Polyak's length raise it. Assignments read off on the way are solutions, and a pool of good states.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from planner.choice.assign import polish, read
from planner.choice.core import Core
from planner.choice.messages import Messages
from planner.choice.problem import Floats, Ints

ROUNDING = 1e-9  # what the sums of a sweep may lose to rounding, as a share
PATIENCE = 5  # sweeps without a better bound before steps get shorter
LENGTH = 0.3  # of the first steps, in Polyak's
SHORTER = 0.6
AVERAGE = 0.3  # weight of the newest subgradient


class Dual:
    """Messages, multipliers and the best bound that they gave.

    seen: states that assignments took. picks, cost: the best assignment.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        self.messages = Messages(core)
        self.multipliers = np.zeros(len(core.memory.room))
        self.best = self.multipliers
        self.bound = -np.inf
        self.last = -np.inf
        self.seen = np.zeros(int(core.offset[-1]), dtype=bool)
        self.picks: Ints | None = None
        self.cost = np.inf
        self.length = LENGTH

    def priced(self) -> Floats:
        """Cost of all states with what their bytes pay."""
        memory = self.core.memory
        return self.core.cost + memory.prices(self.multipliers, len(self.core.cost))

    def sweep(self) -> float:
        """Pass messages once; the bound."""
        found = self.messages.sweep(self.priced())
        paid = float((self.multipliers * self.core.memory.room).sum())
        self.last = found - paid - ROUNDING * (abs(found) + paid)
        if self.last > self.bound:
            self.bound, self.best = self.last, self.multipliers
        return self.last

    def take(self, picks: Ints) -> None:
        """Note an assignment that fits."""
        cost = self.core.total(picks)
        self.seen |= self.core.chosen(picks)
        if cost < self.cost:
            self.picks, self.cost = picks, cost

    def read(self, *, sweeps: int) -> None:
        """Read an assignment off, better it, and note it."""
        found = read(self.messages, self.priced())
        if found is not None:
            self.take(polish(self.messages, found, sweeps))

    def price(self, times: Ints, multipliers: Floats) -> None:
        """Take the multipliers of other rows, at their times."""
        mine = self.core.memory.times
        if len(mine):
            at = np.minimum(np.searchsorted(mine, times), len(mine) - 1)
            self.multipliers = np.zeros(len(mine))
            np.add.at(self.multipliers, at, multipliers)

    def least(self) -> Ints:
        """Each node's best state by its messages alone."""
        found = self.messages.beliefs(self.priced())
        offset = self.core.offset
        return np.array([found[a:b].argmin() for a, b in pairwise(offset)])

    def gaps(self) -> Floats:
        """By how much each state is above its node's best, by the messages."""
        found = self.messages.beliefs(self.priced())
        least: Floats = np.minimum.reduceat(found, self.core.offset[:-1])
        gaps: Floats = found - np.repeat(least, self.core.sizes)
        return gaps

    def ascend(self, sweeps: int, stop: Callable[[], bool]) -> None:
        """So many sweeps, each with a step of the multipliers."""
        memory = self.core.memory
        unit = 1 / np.maximum(memory.room, 1)
        mean = None
        stale = 0
        for k in range(sweeps):
            before = self.bound
            self.sweep()
            stale = 0 if self.bound > before else stale + 1
            self.read(sweeps=4 if k % 5 == 4 else 0)
            if stop():
                return
            if stale >= PATIENCE:
                stale, self.length = 0, self.length * SHORTER
                self.multipliers, mean = self.best, None
                continue
            over = (memory.used(self.core.chosen(self.least())) - memory.room) * unit
            mean = over if mean is None else AVERAGE * over + (1 - AVERAGE) * mean
            step = np.where((self.multipliers <= 0) & (mean < 0), 0.0, mean)
            norm = float((step * step).sum())
            if norm:
                goal = self.cost if np.isfinite(self.cost) else 1.5 * abs(self.last)
                length = self.length * max(goal - self.last, 0.0) / norm
                self.multipliers = np.maximum(self.multipliers / unit + length * step, 0) * unit
