"""Seconds of a call, several times: events on a GPU, the clock on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

LEAST_REPEATS, MOST_REPEATS = 7, 51
# One repeat lasts at least this: above the resolution of the events (0.5 us) and the clock, and
# of what a system does beside.
WINDOW_S = {"cuda": 1e-3, "cpu": 4e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timer:
    """How calls on one device are timed. budget_s: of one probe, warm-up excluded."""

    device: torch.device
    budget_s: float

    def window_s(self, call: Callable[[], object], calls: int) -> float:
        """Seconds of so many calls in a row."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(calls):
            call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def repeats(self, call: Callable[[], object]) -> tuple[float, ...]:
        """Seconds of one call, a value a repeat; warmed up."""
        self.window_s(call, 2)
        once = max(self.window_s(call, 3) / 3, 1e-7)
        calls = max(1, math.ceil(WINDOW_S[self.device.type] / once))
        count = int(self.budget_s / (calls * once))
        count = min(max(count, LEAST_REPEATS), MOST_REPEATS)
        return tuple(self.window_s(call, calls) / calls for _ in range(count))
