"""Limits of serving: how much of them a plan uses, and what one phase gives for the other's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.serving.asked import ServeAsked
from planner.serving.predict import Prediction

TILTS = 16  # a phase may count for 2 to that power of its steps, where a limit is on it


def limits_used(p: Prediction, asked: ServeAsked) -> float:
    """The greater of TTFT and TPOT over its limit; 1 is just met, 0 where there is none."""
    return used(p.ttft_s, p.tpot_s, asked)


def used(ttft_s: float, tpot_s: float, asked: ServeAsked) -> float:
    return max(ttft_s / (asked.max_ttft_s or np.inf), tpot_s / (asked.max_tpot_s or np.inf))


def for_limits(
    first: Prediction, asked: ServeAsked, tilted: Callable[[int], Prediction | None]
) -> list[Prediction]:
    """Plans that give some of a phase's time for the other's, where the first misses a limit: from
    all that can be given, by bisection, to the least with which the limit is met; where both are
    missed, to where they are missed alike. tilted: the plan in which a decode step counts for
    2^tilt of a wave's, or a prompt for 2^-tilt."""
    found: list[Prediction] = []
    if not first.fits or limits_used(first, asked) <= 1:
        return found
    sign = 1 if _tpot_over_ttft(first, asked) > 0 else -1
    low, high, tilt = 0, TILTS, TILTS
    while tilt != low:
        p = tilted(sign * tilt)
        if p is None:
            break
        found.append(p)
        if limits_used(p, asked) > 1 and sign * _tpot_over_ttft(p, asked) > 0:
            low = tilt
        else:
            high = tilt
        tilt = (low + high) // 2
    return found


def _tpot_over_ttft(p: Prediction, asked: ServeAsked) -> float:
    """How much more of its limit TPOT uses than TTFT, each 0 where there is none."""
    return used(0.0, p.tpot_s, asked) - used(p.ttft_s, 0.0, asked)
