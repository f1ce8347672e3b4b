"""The simulated step as Chrome trace events, which Perfetto and chrome://tracing open.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU: complete events
(X), arrows between them (s, f), asynchronous pairs (b, e), names (M); times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cost_models.decisions import Decisions
from cost_models.schedule import Event, global_stage
from cost_models.simulated import TAIL, Simulated

PS_PER_US = 1_000_000
INSIDE_PS = 1_000  # before an operation's end, where its arrow leaves: what viewers tell apart
COMPUTE, AFTER = 0, 1  # threads of a pp rank's process
NAMES = {"F": "forward", "B": "input gradient", "W": "weight gradient", "BW": "backward"}
TAIL_NAMES = dict(zip(TAIL, ("gradient reduction", "optimizer", "offload")))

Record = dict[str, Any]


def trace_text(s: Simulated, d: Decisions, title: str) -> str:
    """The trace as one JSON document, an event a line."""
    lines = ",\n".join(json.dumps(event) for event in events(s, d))
    about = json.dumps({"plan": title, "step_us": s.step_ps / PS_PER_US, "made_by": "plan report"})
    return f'{{"displayTimeUnit": "ms", "otherData": {about}, "traceEvents": [\n{lines}\n]}}\n'


def events(s: Simulated, d: Decisions) -> Iterator[Record]:
    """A process a pp rank, or a part that has replicas of its own, and one for the step:
    operations, sends, what follows the pipeline."""
    for rank, name in enumerate(s.rows):
        yield _named("process_name", rank, name if s.parts else f"pp {name}")
        yield _named("process_sort_index", rank, rank)
        yield _named("thread_name", rank, "forward and backward", COMPUTE)
        yield _named("thread_name", rank, "after the pipeline", AFTER)
    step = len(s.rows)
    yield _named("process_name", step, "the step")
    yield _named("process_sort_index", step, step)
    yield _named("thread_name", step, "parts of the step", COMPUTE)
    stages = {
        (e.rank, e.chunk): e.rank if s.parts else global_stage(d.schedule, d.pp, e.rank, e.chunk)
        for e in s.line.events
    }
    takers = {(e.op[0], stages[e.rank, e.chunk], e.microbatch): e
              for e in s.line.events if e.op != "W"}  # fmt: skip
    for number, event in enumerate(s.line.events):
        stage = stages[event.rank, event.chunk]
        yield _operation(s, event, stage)
        next_ = {} if s.parts else {"F": stage + 1, "B": stage - 1, "BW": stage - 1}
        other = next_.get(event.op, -1)
        taker = takers.get((event.op[0], other, event.microbatch))
        if taker and taker.rank != event.rank:
            yield from _send(event, taker, s.sends_ps[min(stage, other)], number)
    for rank, tail in enumerate(s.tails_ps):
        at = s.line.makespan_ps
        for name, size in zip(TAIL, tail):
            if size:
                yield _slice(TAIL_NAMES[name], "comm" if name == "dp_comm" else name, rank, AFTER,
                             at, at + size)  # fmt: skip
            at += size
    at = 0
    for name, size in (("pipeline", s.line.makespan_ps), ("longest tail", s.tail_ps),
                       ("host", s.host_ps), ("jitter", s.jitter_ps)):  # fmt: skip
        if size:
            yield _slice(name, "step", step, COMPUTE, at, at + size)
        at += size


def _operation(s: Simulated, e: Event, stage: int) -> Record:
    """A forward or backward, and what it is made of; where the two gradients are apart, only the
    whole of them is known by name."""
    parts = s.forward_ps[stage] if e.op == "F" else s.backward_ps[stage] if e.op == "BW" else ()
    args: Record = {"stage": stage, "microbatch": e.microbatch, "virtual_stage": e.chunk}
    args |= {f"{name}_us": ps / PS_PER_US for name, ps in parts}
    category = "forward" if e.op == "F" else "backward"
    return _slice(f"{NAMES[e.op]} {e.microbatch}", category, e.rank, COMPUTE, e.start_ps, e.end_ps,
                  args)  # fmt: skip


def _send(e: Event, taker: Event, took_ps: int, number: int) -> Iterator[Record]:
    """An arrow from an operation to the one that takes what it made; and the send itself, from
    the end of one to its arrival, where that is not inside the operations. Where a slow link is
    taken by an earlier send, it arrives later by that."""
    what = "activations" if e.op == "F" else "gradients"
    same = {"cat": "comm", "id": number, "name": f"{what} to rank {taker.rank}"}
    here = {"pid": e.rank, "tid": COMPUTE}
    yield same | here | {"ph": "s", "ts": (e.end_ps - INSIDE_PS) / PS_PER_US}
    yield same | {"ph": "f", "bp": "e", "pid": taker.rank, "tid": COMPUTE,
                  "ts": taker.start_ps / PS_PER_US}  # fmt: skip
    if took_ps:
        args = {"microbatch": e.microbatch}
        yield same | here | {"ph": "b", "ts": e.end_ps / PS_PER_US, "args": args}
        yield same | here | {"ph": "e", "ts": (e.end_ps + took_ps) / PS_PER_US}


def _slice(
    name: str, category: str, process: int, thread: int, start_ps: int, end_ps: int,
    args: Record | None = None,
) -> Record:  # fmt: skip
    found: Record = {
        "name": name, "cat": category, "ph": "X", "pid": process, "tid": thread,
        "ts": start_ps / PS_PER_US, "dur": (end_ps - start_ps) / PS_PER_US,
    }  # fmt: skip
    return found | ({"args": args} if args else {})


def _named(what: str, process: int, value: object, thread: int = 0) -> Record:
    key = "sort_index" if what.endswith("sort_index") else "name"
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {key: value}}
