"""Pipeline schedules: which ones there are, when they are legal, and each rank's order.

A model is cut into pp * v global stages. Stage k lies on rank k % pp, except under the V-shaped
schedules (zbv, dualpipev), where stage k and stage 2 pp - 1 - k share a rank. Operations: F
forward, B input gradient, W weight gradient, BW both in one.

Orders: GPipe (arXiv:1811.06965), 1F1B and interleaved 1F1B (arXiv:2104.04473), ZB-H1 and ZB-V
(arXiv:2401.10241), DualPipeV (arXiv:2412.19437), as torch.distributed.pipelining 2.13 runs them;
ZB-H1, which torch lacks in its memory-bounded form, is derived from 1F1B.
"""

from __future__ import annotations

import functools
import itertools
from typing import TypeAlias

from ir.errors import UsageError

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zbh1", "zbv", "dualpipev")
V_SHAPED = ("zbv", "dualpipev")
SPLIT_BACKWARD = ("zbh1", "zbv", "dualpipev")

MOST_TURNS = 100_000  # micro-batches through a rank's chunks: a schedule is simulated turn by turn

Op: TypeAlias = tuple[str, int, int]  # (F | B | W | BW, micro-batch, chunk of the rank)


def chunks_of(schedule: str, virtual_stages: int) -> int:
    """Chunks a rank runs; schedules without virtual stages have one."""
    return virtual_stages if schedule in ("interleaved", *V_SHAPED) else 1


def global_stage(schedule: str, pp: int, rank: int, chunk: int) -> int:
    """The global stage that `rank` runs as its chunk number `chunk`."""
    if schedule in V_SHAPED and chunk == 1:
        return 2 * pp - 1 - rank
    return chunk * pp + rank


def rank_of(schedule: str, pp: int, stage: int) -> int:
    """The rank that runs global stage `stage`."""
    if schedule in V_SHAPED and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


def schedule_illegal(
    schedule: str, pp: int, microbatches: int, virtual_stages: int = 1
) -> str | None:
    """Why this schedule cannot run so, or None. The conditions are torch's own, but for the most
    turns, which are what is simulated."""
    m, v = microbatches, virtual_stages
    if schedule not in SCHEDULES:
        return f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}"
    if pp < 1 or m < 1 or v < 1:
        return "pp, microbatches and virtual_stages are 1 at least"
    if schedule not in ("interleaved", *V_SHAPED) and v != 1:
        return f"{schedule} has no virtual stages (virtual_stages={v})"
    if pp > 1 and m * chunks_of(schedule, v) > MOST_TURNS:
        return f"{m:,} micro-batches through a pipeline, of at most {MOST_TURNS:,} turns a rank"
    if schedule not in ("gpipe", "1f1b") and pp == 1:
        return f"{schedule} needs pp of 2 at least"
    if schedule == "interleaved" and v < 2:
        return "interleaved needs virtual_stages of 2 at least"
    if schedule in V_SHAPED and v != 2:
        return f"{schedule} needs virtual_stages=2"
    if schedule in ("1f1b", "zbh1") and m < pp:
        return f"{schedule} needs microbatches >= pp ({m} < {pp})"
    if schedule == "interleaved" and m % max(1, m // pp):
        return f"interleaved needs microbatches % {m // pp} == 0 (microbatches={m}, pp={pp})"
    if schedule == "dualpipev" and m < 2 * pp:
        return f"dualpipev needs microbatches >= 2 * pp ({m} < {2 * pp})"
    return None


def as_run(schedule: str, pp: int) -> str:
    """The schedule in whose order it runs: one rank alone takes one micro-batch after the other,
    by any name."""
    return "1f1b" if pp == 1 else schedule


def _gpipe(m: int) -> list[Op]:
    return [("F", i, 0) for i in range(m)] + [("BW", i, 0) for i in range(m)]


def _1f1b(p: int, m: int, rank: int) -> list[Op]:
    warm = min(m, p - 1 - rank)
    ops: list[Op] = [("F", i, 0) for i in range(warm)]
    for i in range(m - warm):
        ops += [("F", warm + i, 0), ("BW", i, 0)]
    return ops + [("BW", i, 0) for i in range(m - warm, m)]


def _zbh1(p: int, m: int, rank: int) -> list[Op]:
    """1F1B whose weight gradients lag `rank` micro-batches: they fill what was the bubble."""
    warm = min(m, p - 1 - rank)
    ops: list[Op] = [("F", i, 0) for i in range(warm)]
    lag = min(rank, m)
    for i in range(m):
        if warm + i < m:
            ops.append(("F", warm + i, 0))
        ops.append(("B", i, 0))
        if i >= lag:
            ops.append(("W", i - lag, 0))
    return ops + [("W", i, 0) for i in range(m - lag, m)]


def _interleaved(p: int, m: int, v: int, rank: int) -> list[Op]:
    """Rounds of m // max(1, m // p) micro-batches through all chunks, depth first."""
    each = m // max(1, m // p)
    total = m * v
    warm = min((v - 1) * each + 2 * (p - 1 - rank), total)
    forward, backward = _rounds(m, v, each)
    steady = itertools.chain.from_iterable(zip(forward[warm:], backward))
    return [*forward[:warm], *steady, *backward[total - warm :]]


@functools.lru_cache(maxsize=16)
def _rounds(m: int, v: int, each: int) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """Every rank's forwards and its backwards, in order: rounds of `each` micro-batches."""
    rounds = [
        (around + place, chunk)
        for around in range(0, m, each) for chunk in range(v) for place in range(each)
    ]  # fmt: skip
    forward: tuple[Op, ...] = tuple(("F", mb, chunk) for mb, chunk in rounds)
    return forward, tuple(("BW", mb, v - 1 - chunk) for mb, chunk in rounds)


class _Counted:
    """Operations in order, micro-batches of each (op, chunk) counted up by themselves."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.next: dict[tuple[str, int], int] = {}
        self.pending: list[tuple[int, int]] = []

    def add(self, op: str, chunk: int, times: int = 1) -> None:
        for _ in range(times):
            count = "B" if op == "BW" else op
            mb = self.next.get((count, chunk), 0)
            self.next[count, chunk] = mb + 1
            self.ops.append((op, mb, chunk))
            if op == "B":
                self.pending.append((mb, chunk))

    def add_weight(self) -> None:
        """The oldest weight gradient that is due, if any."""
        if self.pending:
            self.ops.append(("W", *self.pending.pop(0)))


def _zbv(p: int, m: int, rank: int) -> list[Op]:
    """ZB-V of the paper, section 6: laid out for 2p - 1 micro-batches at least, then cut to m."""
    n = max(2 * p - 1, m)
    line = _Counted()
    line.add("F", 0, 2 * (p - rank) - 1)
    for _ in range(rank):
        line.add("F", 1)
        line.add("F", 0)
    for _ in range(p - rank):
        for op in ("F", "B", "W"):
            line.add(op, 1)
    done = line.next
    while done["F", 1] < done["F", 0] or done["F", 0] < n:
        if done["F", 0] < n:
            line.add("F", 0)
        line.add("B", 0)
        line.add("W", 0)
        for op in ("F", "B", "W"):
            line.add(op, 1)
    for _ in range(rank):
        line.add("B", 0)
        line.add("B", 1)
    for _ in range(p - rank):
        line.add("B", 0)
        line.add("W", 0)
    for chunk in (1, 0):
        line.add("W", chunk, done["B", chunk] - done.get(("W", chunk), 0))
    return [op for op in line.ops if op[1] < m]


def _dualpipev(p: int, m: int, rank: int) -> list[Op]:
    """The eight steps of DeepSeek's DualPipeV; a forward runs beside a full backward."""
    line = _Counted()
    line.add("F", 0, 2 * (p - rank - 1))
    for _ in range(rank + 1):
        line.add("F", 0)
        line.add("F", 1)
    for _ in range(p - rank - 1):
        line.add("B", 1)
        line.add_weight()
        line.add("F", 1)
    for _ in range(m - 2 * p + rank + 1):
        for forward, backward in ((0, 1), (1, 0)):
            line.add("F", forward)
            line.add("BW", backward)
    for _ in range(p - rank - 1):
        line.add("BW", 1)
        line.add("F", 1)
        line.add("BW", 0)
    split = False
    for i in range(rank + 1):
        split = split or (i == (rank + 1) // 2 and rank % 2 == 1)
        line.add("B" if split else "BW", 1)
        split = split or (i == (rank + 1) // 2 and rank % 2 == 0)
        line.add("B" if split else "BW", 0)
    for _ in range(p - rank - 1):
        line.add_weight()
        line.add("B" if split else "BW", 0)
    for _ in range(rank + 1):
        line.add_weight()
    return line.ops


@functools.lru_cache(maxsize=4096)
def order(
    schedule: str, pp: int, microbatches: int, virtual_stages: int, rank: int
) -> tuple[Op, ...]:
    """The operations of one rank, in the order it runs them: (op, micro-batch, chunk).

    Raises UsageError where the schedule cannot run so.
    """
    reason = schedule_illegal(schedule, pp, microbatches, virtual_stages)
    if reason is not None:
        raise UsageError(reason)
    schedule, m = as_run(schedule, pp), microbatches
    if schedule == "gpipe":
        return tuple(_gpipe(m))
    if schedule == "1f1b":
        return tuple(_1f1b(pp, m, rank))
    if schedule == "zbh1":
        return tuple(_zbh1(pp, m, rank))
    if schedule == "interleaved":
        return tuple(_interleaved(pp, m, virtual_stages, rank))
    return tuple(_zbv(pp, m, rank) if schedule == "zbv" else _dualpipev(pp, m, rank))
