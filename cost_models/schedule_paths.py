"""Paths through a schedule: each is a lower bound of its makespan, whatever the stages take.

A path is a row of operations of which each waits for the one before: on its rank, or for its
input. What they take, with the sends between them, is a sum over stages and boundaries: linear in
the stages' times. The makespan is the most over all paths.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.schedule import _costs, _Program, _program, _unhindered, chunks_of
from cost_models.schedule_orders import SPLIT_BACKWARD, global_stage, order

Ints = NDArray[np.int64]
KINDS = {"F": (1, 0, 0), "B": (0, 1, 0), "W": (0, 0, 1), "BW": (0, 1, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """runs: [path, (forward, input, weight gradient), stage], how often each is run on the path.
    sends: [path, boundary], how often it waits for a send over each, either way."""

    runs: Ints
    sends: Ints


def critical_path(
    schedule: str, forward_ps: Sequence[int], input_grad_ps: Sequence[int],
    weight_grad_ps: Sequence[int], p2p_ps: Sequence[int], microbatches: int, pp: int,
    virtual_stages: int = 1,
) -> tuple[int, Paths]:  # fmt: skip
    """The makespan of a step, as `simulate` has it without busy links, and a path that long."""
    duration, latency = _costs(schedule, pp, forward_ps, input_grad_ps, weight_grad_ps, p2p_ps)
    program = _program(schedule, pp, microbatches, virtual_stages)
    before = _before(schedule, pp, microbatches, virtual_stages)
    ends, free = _unhindered(program, duration, latency, pp)
    stages = len(forward_ps)
    counts, waits = [0] * (4 * stages), [0] * (4 * stages)
    at = ends.index(max(free))
    while at:
        cost, source = program.costs[at - 1], program.inputs[at - 1]
        counts[cost] += 1
        if source and ends[source] + latency[cost] == ends[at] - duration[cost]:
            waits[cost] += 1
            at = source
        else:
            at = before[at - 1]
    n = np.array(counts, dtype=np.int64).reshape(stages, 4).T
    w = np.array(waits, dtype=np.int64).reshape(stages, 4).T
    runs = np.stack([n[0], n[1] + n[3], n[2] + n[3]])
    sends = w[0, 1:] + w[1, :-1] + w[3, :-1]
    return max(free), Paths(runs=runs[None], sends=sends[None])


@functools.lru_cache(maxsize=64)
def _before(schedule: str, pp: int, m: int, v: int) -> tuple[int, ...]:
    """Of each operation the one before it on its rank, as positions; 0 is none."""
    program: _Program = _program(schedule, pp, m, v)
    last, found = [0] * pp, []
    for at, rank in enumerate(program.ranks, 1):
        found.append(last[rank])
        last[rank] = at
    return tuple(found)


@functools.lru_cache(maxsize=16)
def rank_paths(schedule: str, pp: int, m: int, v: int) -> Paths:
    """Paths that stay on one rank from the first operation of a chunk to the last of another.

    Such a path comes there through the stages before and goes home through them; or it comes back
    from the last stage to the rank's first backward, or leaves with its last forward for there.
    """
    chunks, runs, sends = chunks_of(schedule, v), [], []
    stages = pp * chunks
    back = (0, 1, 0) if schedule in SPLIT_BACKWARD else (0, 1, 1)

    def way(first: int, count: tuple[int, int, int]) -> tuple[Ints, Ints]:
        """Once through stages first and on to the last; or those before -first."""
        here = np.arange(stages)
        inside = here >= first if first >= 0 else here < -first
        edges = np.arange(stages - 1)
        crossed = edges >= first - 1 if first >= 0 else edges < -first
        return np.outer(count, inside), crossed.astype(np.int64)

    def joined(*parts: tuple[Ints, Ints]) -> tuple[Ints, Ints]:
        return sum(p[0] for p in parts), sum(p[1] for p in parts)  # type: ignore[return-value]

    nothing = np.zeros((3, stages), dtype=np.int64), np.zeros(stages - 1, dtype=np.int64)
    round_trip = joined(way(0, (1, 0, 0)), way(0, back))
    for rank in range(pp):
        ops = order(schedule, pp, m, v, rank)
        mine = [global_stage(schedule, pp, rank, c) for c in range(chunks)]
        table = np.zeros((len(ops) + 1, 3, chunks), dtype=np.int64)
        table[np.arange(1, len(ops) + 1), :, [c for _, _, c in ops]] = [KINDS[o] for o, _, _ in ops]
        done = table.cumsum(axis=0)
        forwards = [[i for i, (o, _, c) in enumerate(ops) if o == "F" and c == k]
                    for k in range(chunks)]  # fmt: skip
        backs = [[i for i, (o, _, c) in enumerate(ops) if o in ("B", "BW") and c == k]
                 for k in range(chunks)]  # fmt: skip
        first, last = min(b[0] for b in backs), max(f[-1] for f in forwards)
        turn, leave = mine[ops[first][2]], mine[ops[last][2]]
        heads = [(f[0], way(-k, (1, 0, 0)) if k else nothing) for f, k in zip(forwards, mine)]
        tails = [(b[-1] + 1, way(-k, back) if k else nothing) for b, k in zip(backs, mine)]
        ways = [(h, t) for h in heads for t in [*tails, (len(ops), nothing)]]
        returned = joined(way(0, (1, 0, 0)), way(turn + 1, back))
        ways += [((first, returned), t) for t in [*tails, (len(ops), nothing)]]
        left = joined(way(leave + 1, (1, 0, 0)), way(0, back))
        ways += [(h, (last + 1, left)) for h in heads]
        for (start, came), (end, went) in ways:
            if start >= end:
                continue
            run, sent = joined(came, went)
            run[:, mine] += done[end] - done[start]
            runs.append(run)
            sends.append(sent)
    return Paths(runs=np.stack([*runs, round_trip[0]]), sends=np.stack([*sends, round_trip[1]]))
