"""The makespans of many steps of one schedule at once: `schedule.simulate` of whole arrays.

Operations of which none waits for another are one wave, so that a step is some hundred operations
of arrays, however many steps there are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.schedule import _links, _program

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wave:
    """Operations start and on to end, in the order of waves: the cost id of each, and the places
    of its input, of the one before it on its rank and of the one before it on its link."""

    start: int
    end: int
    cost: Ints
    inputs: Ints
    before: Ints
    queue: Ints


class Makespans:
    """Of one schedule. latency_ps: as `latencies_ps` has it. busy_ps: as `simulate` has it."""

    def __init__(
        self, schedule: str, pp: int, microbatches: int, virtual_stages: int,
        latency_ps: Sequence[int], busy_ps: Sequence[int] = (),
    ) -> None:  # fmt: skip
        links = tuple(_links(schedule, pp, busy_ps)) if any(busy_ps) else ()
        queues = tuple((here, there) for here, there, _ in links)
        self._waves, self._last, self._cost = _waves(schedule, pp, microbatches, virtual_stages,
                                                     queues)  # fmt: skip
        self._latency = np.array(latency_ps, dtype=np.int64)[:, None]
        # the operation of place 0 is none, its cost id -1
        self._busy = np.array([*(busy for _, _, busy in links), 0], dtype=np.int64)[:, None]

    def of(self, duration_ps: Ints) -> Ints:
        """[choice]: in ps. duration_ps: [4 * stage + (F 0, B 1, W 2, BW 3), choice]."""
        ends = np.zeros((len(self._cost), duration_ps.shape[1]), dtype=np.int64)
        sent = np.zeros_like(ends) if len(self._busy) > 1 else ends
        for w in self._waves:
            wave = sent[w.inputs]
            wave += self._latency[w.cost]
            np.maximum(wave, ends[w.before], out=wave)
            wave += duration_ps[w.cost]
            ends[w.start : w.end] = wave
            if sent is not ends:
                taken = sent[w.queue] + self._busy[self._cost[w.queue]]
                waits = self._busy[w.cost] > 0
                sent[w.start : w.end] = np.where(waits, np.maximum(wave, taken), wave)
        found: Ints = ends[self._last].max(axis=0)
        return found


@functools.lru_cache(maxsize=32)
def _waves(
    schedule: str, pp: int, m: int, v: int, queues: tuple[tuple[int, int], ...]
) -> tuple[tuple[_Wave, ...], Ints, Ints]:
    """The waves; the place of each rank's last operation; the cost id of each place.

    queues: by cost id the link that what it makes goes over, empty where links carry any number.
    """
    program = _program(schedule, pp, m, v)
    count = len(program.ranks) + 1
    before, queue, wave = [0] * count, [0] * count, [0] * count
    last, sent = [0] * pp, dict.fromkeys(queues, 0)
    for at, (rank, cost, source) in enumerate(zip(program.ranks, program.costs, program.inputs), 1):
        before[at], last[rank] = last[rank], at
        if queues and queues[cost][0] != queues[cost][1]:
            queue[at], sent[queues[cost]] = sent[queues[cost]], at
        wave[at] = 1 + max(wave[before[at]], wave[source], wave[queue[at]])
    order = np.argsort(wave, kind="stable")
    place = np.argsort(order, kind="stable")
    columns = np.array([(-1, *program.costs), (0, *program.inputs), before, queue])[:, order]
    columns[1:] = place[columns[1:]]
    ends = np.cumsum(np.bincount(wave)).tolist()
    waves = tuple(
        _Wave(start=a, end=b, cost=columns[0, a:b], inputs=columns[1, a:b],
              before=columns[2, a:b], queue=columns[3, a:b])
        for a, b in itertools.pairwise(ends)
    )  # fmt: skip
    return waves, place[last], columns[0]
