"""Seconds of a call, several times: events on a GPU, the clock on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

LEAST_REPEATS, MOST_REPEATS = 7, 51
# One repeat lasts at least this: above the resolution of the events (0.5 us) and the clock.
WINDOW_S = {"cuda": 1e-3, "cpu": 1e-3}
# On a CPU other programs take turns with this one, and only ever add time: the fastest of so many
# repeats counts.
TRIES = 3


def undisturbed(seconds: Sequence[float]) -> tuple[float, ...]:
    """The fastest one in TRIES, three at the least."""
    return tuple(sorted(seconds)[: max(3, len(seconds) // TRIES)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Timer:
    """How calls on one device are timed. budget_s: of one probe, warm-up excluded."""

    device: torch.device
    budget_s: float

    @property
    def on_host(self) -> Timer:
        """The same by the host's clock."""
        return replace(self, device=torch.device("cpu"))

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
        on_cpu = self.device.type == "cpu"
        count = max(count, TRIES * LEAST_REPEATS) if on_cpu else count
        tried = tuple(self.window_s(call, calls) / calls for _ in range(count))
        return undisturbed(tried) if on_cpu else tried
