"""Pipeline schedules simulated: the time of a step and the peak of what each rank holds.

Times are integer picoseconds, per global stage (see schedule_orders for which rank runs which).
Sends are asynchronous: a boundary's latency lies between the producer's end and the consumer's
start, and blocks neither. Slow links carry one send at a time, each way.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.schedule_orders import (
    MOST_TURNS,
    SCHEDULES,
    SPLIT_BACKWARD,
    V_SHAPED,
    Op,
    as_run,
    chunks_of,
    global_stage,
    order,
    rank_of,
    schedule_illegal,
)
from ir.errors import PlanError, UsageError

__all__ = [
    "SCHEDULES", "SPLIT_BACKWARD", "V_SHAPED", "Event", "Op", "Stash", "Timeline", "chunks_of",
    "global_stage", "order", "peak_stash", "rank_of", "schedule_illegal", "simulate",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One operation as simulated: where, what, for which micro-batch and chunk, and when."""

    rank: int
    op: str
    microbatch: int
    chunk: int
    start_ps: int
    end_ps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A step: its makespan, how long each rank computes, and its events where asked for.

    peak_in_flight: per rank and chunk, the micro-batches held at the rank's peak, where every
    chunk of the rank holds the same bytes a micro-batch.
    """

    makespan_ps: int
    busy_ps: tuple[int, ...]
    peak_in_flight: tuple[tuple[int, ...], ...]
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stash:
    """What a rank holds at its peak: bytes, and per chunk the micro-batches in each state.

    forward: forward done, no gradient yet. weight: input gradient done, weight gradient not.
    """

    peak_bytes: int
    forward: tuple[int, ...]
    weight: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Program:
    """All operations of a step in an order in which every input comes before its use.

    Three columns: the rank, the cost id, the position of the input. Position 0 is a dummy that
    ends at 0. The cost id is 4 * stage + (F 0, B 1, W 2, BW 3): both its duration and the
    latency of its input.
    """

    ranks: tuple[int, ...]
    costs: tuple[int, ...]
    inputs: tuple[int, ...]


def _costed(
    schedule: str, pp: int, m: int, v: int, rank: int
) -> tuple[list[int], list[int], list[int]]:
    """A rank's operations in columns: cost id, key of the input, key of the output.

    A key is 2 * (stage * m + micro-batch) + (1 for an activation, 2 for a gradient); 0 is none.
    """
    last = pp * chunks_of(schedule, v) - 1
    costs, needs, gives = [], [], []
    table: dict[str, list[tuple[int, int, int]]] = {"F": [], "B": [], "W": [], "BW": []}
    for chunk in range(chunks_of(schedule, v)):
        stage = global_stage(schedule, pp, rank, chunk)
        here = 2 * stage * m
        right = here + 2 * m + 2 if stage < last else -1
        table["F"].append((4 * stage, here - 2 * m + 1 if stage else -1, here + 1))
        table["B"].append((4 * stage + 1, right, here + 2))
        table["W"].append((4 * stage + 2, -1, -1))
        table["BW"].append((4 * stage + 3, right, here + 2))
    for op, mb, chunk in order(schedule, pp, m, v, rank):
        cost, need, give = table[op][chunk]
        costs.append(cost)
        needs.append(need + 2 * mb if need >= 0 else 0)
        gives.append(give + 2 * mb if give >= 0 else 0)
    return costs, needs, gives


@functools.lru_cache(maxsize=64)
def _program(schedule: str, pp: int, m: int, v: int) -> _Program:
    """Merge the ranks' orders: run each rank until it waits, resume it when its input is made."""
    lines = [_costed(schedule, pp, m, v, rank) for rank in range(pp)]
    made = [-1] * (2 * m * pp * chunks_of(schedule, v) + 3)
    made[0] = 0
    waits: dict[int, int] = {}
    at = [0] * pp
    ranks: list[int] = []
    costs: list[int] = []
    inputs: list[int] = []
    ready = list(range(pp - 1, -1, -1))
    count = 0
    while ready:
        rank = ready.pop()
        mine, needs, gives = lines[rank]
        start = i = at[rank]
        for i in range(start, len(mine)):
            position = made[needs[i]]
            if position < 0:
                waits[needs[i]] = rank
                break
            inputs.append(position)
            count += 1
            give = gives[i]
            if give:
                made[give] = count
                if give in waits:
                    ready.append(waits.pop(give))
        else:
            i = len(mine)
        costs += mine[start:i]
        ranks += [rank] * (i - start)
        at[rank] = i
    assert not waits, f"{schedule} pp={pp} m={m} v={v} deadlocks"
    return _Program(ranks=tuple(ranks), costs=tuple(costs), inputs=tuple(inputs))


def _durations(
    forward_ps: Sequence[int], input_grad_ps: Sequence[int], weight_grad_ps: Sequence[int]
) -> list[int]:
    """By cost id."""
    rows = zip(forward_ps, input_grad_ps, weight_grad_ps)
    return [t for f, b, w in rows for t in (f, b, w, b + w)]


def latencies_ps(schedule: str, pp: int, stages: int, p2p_ps: Sequence[int]) -> list[int]:
    """Of inputs, by cost id. A boundary inside a rank has no latency."""
    found = []
    for k in range(stages):
        here = rank_of(schedule, pp, k)
        left = p2p_ps[k - 1] if k and rank_of(schedule, pp, k - 1) != here else 0
        right = p2p_ps[k] if k < stages - 1 and rank_of(schedule, pp, k + 1) != here else 0
        found += [left, right, 0, right]
    return found


def _costs(
    schedule: str, pp: int, forward_ps: Sequence[int], input_grad_ps: Sequence[int],
    weight_grad_ps: Sequence[int], p2p_ps: Sequence[int],
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Duration and input latency by cost id."""
    return (
        _durations(forward_ps, input_grad_ps, weight_grad_ps),
        latencies_ps(schedule, pp, len(forward_ps), p2p_ps),
    )


def makespan_ps(
    schedule: str, forward_ps: Sequence[int], input_grad_ps: Sequence[int],
    weight_grad_ps: Sequence[int], latency_ps: list[int], microbatches: int, pp: int,
    virtual_stages: int = 1,
) -> int:  # fmt: skip
    """What `simulate` makes of a step where links carry any number of sends at once, and no more:
    for many steps of one schedule. latency_ps: as `latencies_ps` has it. Raises UsageError where
    the schedule cannot run so."""
    reason = schedule_illegal(schedule, pp, microbatches, virtual_stages)
    if reason is not None:
        raise UsageError(reason)
    duration = _durations(forward_ps, input_grad_ps, weight_grad_ps)
    if pp == 1:
        return microbatches * (duration[0] + duration[3])
    program = _program(schedule, pp, microbatches, virtual_stages)
    return max(_unhindered(program, duration, latency_ps, pp)[1])


def simulate(
    schedule: str, forward_ps: Sequence[int], input_grad_ps: Sequence[int],
    weight_grad_ps: Sequence[int], p2p_ps: Sequence[int], microbatches: int, pp: int,
    virtual_stages: int = 1, events: bool = False, busy_ps: Sequence[int] = (),
) -> Timeline:  # fmt: skip
    """Run a step: each rank in its order, an operation when its input has arrived.

    forward_ps, input_grad_ps, weight_grad_ps: per global stage, integer picoseconds. p2p_ps: per
    boundary (one less), from the producer's end to the consumer's start; sends block nobody.
    busy_ps: per boundary, how long each send keeps its link from the next one that way.
    Raises UsageError where the schedule cannot run so, PlanError for more events than are shown.
    """
    m = microbatches
    stages = pp * chunks_of(schedule, virtual_stages)
    reason = schedule_illegal(schedule, pp, m, virtual_stages)
    if reason is not None:
        raise UsageError(reason)
    assert len(forward_ps) == len(input_grad_ps) == len(weight_grad_ps) == stages
    assert len(p2p_ps) == stages - 1
    duration, latency = _costs(
        schedule, pp, forward_ps, input_grad_ps, weight_grad_ps, p2p_ps
    )  # fmt: skip
    if events and m > MOST_TURNS:  # of a rank alone: of a pipeline `schedule_illegal` says it
        raise PlanError(f"a step of {m:,} micro-batches is not drawn",
                        why=f"its operations are shown one by one, of {MOST_TURNS:,} at most",
                        hints=("plan show has its times and its memory",))  # fmt: skip
    if pp == 1 and not events:  # of any number: one rank waits for nobody
        whole = m * (duration[0] + duration[3])
        return Timeline(makespan_ps=whole, busy_ps=(whole,),
                        peak_in_flight=_peaks(schedule, pp, m, virtual_stages))  # fmt: skip
    program = _program(schedule, pp, m, virtual_stages)
    if any(busy_ps):
        ends, free = _queued(program, duration, latency, _links(schedule, pp, busy_ps), pp)
    else:
        ends, free = _unhindered(program, duration, latency, pp)
    busy = [0] * pp
    for k in range(stages):
        busy[rank_of(schedule, pp, k)] += m * duration[4 * k] + m * duration[4 * k + 3]
    return Timeline(
        makespan_ps=max(free),
        busy_ps=tuple(busy),
        peak_in_flight=_peaks(schedule, pp, m, virtual_stages),
        events=_events(schedule, pp, m, virtual_stages, duration, ends) if events else (),
    )


def _unhindered(
    program: _Program, duration: list[int], latency: list[int], pp: int
) -> tuple[list[int], list[int]]:
    """When each operation ends, and each rank, where links carry any number of sends at once."""
    ends = [0]
    add = ends.append
    free = [0] * pp
    for rank, cost, position in zip(program.ranks, program.costs, program.inputs):
        start = ends[position] + latency[cost]
        now = free[rank]
        if now > start:
            start = now
        start += duration[cost]
        free[rank] = start
        add(start)
    return ends, free


def _queued(
    program: _Program, duration: list[int], latency: list[int],
    links: list[tuple[int, int, int]], pp: int,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """The same where a send waits until its link has carried the one before.

    links: by cost id, the ranks that what it makes goes between, and for how long it is on it.
    """
    ends, sent, free = [0], [0], [0] * pp
    taken: dict[tuple[int, int], int] = {}
    for rank, cost, position in zip(program.ranks, program.costs, program.inputs):
        end = max(free[rank], sent[position] + latency[cost]) + duration[cost]
        free[rank] = end
        ends.append(end)
        here, there, busy = links[cost]
        start = max(end, taken.get((here, there), 0)) if busy else end
        taken[here, there] = start + busy
        sent.append(start)
    return ends, free


def _links(schedule: str, pp: int, busy_ps: Sequence[int]) -> list[tuple[int, int, int]]:
    """`_queued`'s: an activation goes to the next stage, a gradient to the one before."""
    found = []
    for stage in range(len(busy_ps) + 1):
        here = rank_of(schedule, pp, stage)
        for boundary, other in ((stage, stage + 1), (stage - 1, stage - 1)):
            inside = 0 <= boundary < len(busy_ps)
            there = rank_of(schedule, pp, other) if inside else here
            found.append((here, there, busy_ps[boundary] if there != here else 0))
        found += [(here, here, 0), found[-1]]  # a weight's gradient stays; both gradients at once
    return found


def _events(
    schedule: str, pp: int, m: int, v: int, duration: list[int], ends: list[int]
) -> tuple[Event, ...]:
    """The simulated operations in order of start, then rank."""
    lines = [iter(order(schedule, pp, m, v, rank)) for rank in range(pp)]
    found = []
    program = _program(schedule, pp, m, v)
    for rank, cost, end in zip(program.ranks, program.costs, ends[1:], strict=True):
        op, mb, chunk = next(lines[rank])
        found.append(
            Event(
                rank=rank, op=op, microbatch=mb, chunk=chunk,
                start_ps=end - duration[cost], end_ps=end,
            )
        )  # fmt: skip
    return tuple(sorted(found, key=lambda e: (e.start_ps, e.rank, e.end_ps)))


@functools.lru_cache(maxsize=512)
def _peaks(schedule: str, pp: int, m: int, v: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches held per rank and chunk, all chunks alike, kept until the weight gradient."""
    schedule = as_run(schedule, pp)
    if schedule == "gpipe":
        return ((m,),) * pp
    if schedule == "1f1b":
        return tuple((min(m, pp - rank),) for rank in range(pp))
    alike = (1,) * chunks_of(schedule, v)
    found = (peak_stash(schedule, pp, m, v, rank, alike) for rank in range(pp))
    return tuple(
        tuple(f + w for f, w in zip(stash.forward, stash.weight, strict=True)) for stash in found
    )


def peak_stash(
    schedule: str, pp: int, microbatches: int, virtual_stages: int, rank: int,
    act_bytes_per_chunk: Sequence[int], w_bytes_per_chunk: Sequence[int] | None = None,
) -> Stash:  # fmt: skip
    """The most bytes of activations that a rank holds at once, by walking its order.

    act_bytes_per_chunk: kept a micro-batch from its forward to its input gradient.
    w_bytes_per_chunk: of these, kept on until the weight gradient; all of them if None.
    """
    held = tuple(act_bytes_per_chunk)
    late = held if w_bytes_per_chunk is None else tuple(w_bytes_per_chunk)
    return _stash(schedule, pp, microbatches, virtual_stages, rank, held, late)


@functools.lru_cache(maxsize=65536)
def _stash(
    schedule: str, pp: int, m: int, v: int, rank: int, held: tuple[int, ...], late: tuple[int, ...]
) -> Stash:
    chunks = len(held)
    assert chunks == len(late) == chunks_of(schedule, v)
    forward, weight = [0] * chunks, [0] * chunks
    now = peak = 0
    best = (tuple(forward), tuple(weight))
    for op, _, chunk in order(schedule, pp, m, v, rank):
        if op == "F":
            forward[chunk] += 1
            now += held[chunk]
        elif op == "W":
            weight[chunk] -= 1
            now -= late[chunk]
        else:
            forward[chunk] -= 1
            now -= held[chunk]
            if op == "B":
                weight[chunk] += 1
                now += late[chunk]
        if now > peak:
            peak, best = now, (tuple(forward), tuple(weight))
    return Stash(peak_bytes=peak, forward=best[0], weight=best[1])
