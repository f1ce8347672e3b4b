"""How many layers the ranks of a pipeline can take in a given time and memory: a bound of the step.

Rank r that runs n layers of the commonest kind holds their state and, when it first goes backward,
k_r micro-batches of their activations (`flight`). What does not fit is recomputed; a byte a
micro-batch freed there is k_r bytes less. So n layers take rank r no less than
m (n t + recomputation) + its way, the first r layers there and back. The ranks together take all L
layers: the step is at least the L-th smallest of these times over all ranks and n.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.schedule import SPLIT_BACKWARD, V_SHAPED
from planner.bound_chunks import SLACK_BYTES, Chunks, Floats, Ints, chunk_flight

CELLS = 500_000  # of (mesh, rank, layers) at once, to bound memory
HALVINGS = 40  # of the interval that a bound lies in
SPLIT_KINDS = ("zbh1", "folded")  # of schedules whose backward is split


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The commonest kind of layer, by work point; freed: [piece, (bytes, seconds), point];
    again_freed: where nothing moves to the host's memory."""

    count: int
    step_s: Floats
    kept_bytes: Floats
    working_bytes: Floats
    freed: Floats
    again_freed: Floats


def least_layer(kinds: Sequence[Layers]) -> Layers:
    """A layer that is no harder than one of any kind, as often as there are layers: its pieces are
    as large as any kind's, and as cheap."""
    if len(kinds) == 1:
        return kinds[0]

    def cheapest(tables: Sequence[Floats]) -> Floats:
        most = max(len(t) for t in tables)
        rows = [padded(t, most, 0) for t in tables]
        size = np.maximum.reduce([t[:, 0] for t in rows])
        rate = np.minimum.reduce([np.where(t[:, 0] > 0, t[:, 1], np.inf) for t in rows])
        return np.stack([size, np.where(size > 0, rate, 0.0)], axis=1)

    return Layers(
        count=sum(k.count for k in kinds), step_s=np.minimum.reduce([k.step_s for k in kinds]),
        kept_bytes=np.minimum.reduce([k.kept_bytes for k in kinds]),
        working_bytes=np.minimum.reduce([k.working_bytes for k in kinds]),
        freed=cheapest([k.freed for k in kinds]),
        again_freed=cheapest([k.again_freed for k in kinds]),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Meshes with one number of stages, each under one way to hold its state.

    m: micro-batches. state_bytes, layer_s, kept_bytes: of a layer; freed: [mesh, piece, (bytes,
    seconds a byte)] of a layer. room_bytes: of a rank beside its layers. ends_s, ends_bytes,
    ends_kept: [mesh, (before the first layer, behind the last)] seconds, state, activations.
    way_s: [mesh, rank] from the first rank there and home at least. own_s: of each rank, of a
    micro-batch, beside its layers. lowered: [mesh, (bytes, seconds
    a byte)] of a layer's state that may lie elsewhere, of a micro-batch, and the bytes that a rank
    holds aside once any layer's does.
    """

    m: Floats
    layer_s: Floats
    state_bytes: Floats
    kept_bytes: Floats
    freed: Floats
    room_bytes: Floats
    ends_s: Floats
    ends_bytes: Floats
    ends_kept: Floats
    way_s: Floats
    own_s: Floats
    lowered: Floats

    def part(self, some: NDArray[np.int64]) -> Rows:
        return Rows(**{name: getattr(self, name)[some] for name in self.__slots__})


def kind_of_schedule(schedule: str) -> str:
    """Schedules that hold memory alike, as `flight` has them."""
    if schedule == "gpipe":
        return schedule
    if schedule in V_SHAPED:
        return "folded"
    return "zbh1" if schedule in SPLIT_BACKWARD else "fused"


def padded(table: Floats, most: int, axis: int) -> Floats:
    """A table with zeros behind, of that length along an axis."""
    if table.shape[axis] == most:
        return table
    shape = [*table.shape]
    shape[axis] = most - table.shape[axis]
    return np.concatenate([table, np.zeros(shape)], axis=axis)


def flight(pp: int, m: Floats, kind: str) -> Floats:
    """[mesh, rank]: micro-batches of every layer that a rank holds at one moment, at least.

    Under GPipe, 1F1B and interleaved rank r holds min(m, p - r) of every chunk when it first goes
    backward, in a pipeline under GPipe alone all m; ZB-H1 holds min(m, p) on every rank; a V
    min(m, r + 1) of the chunk it has less of.
    """
    rank = np.arange(pp)
    if kind == "gpipe" and pp > 1:
        return np.repeat(m[:, None], pp, axis=1).astype(float)
    most = {"zbh1": np.full(pp, pp), "folded": rank + 1}.get(kind, pp - rank)
    held: Floats = np.minimum(m[:, None], most[None, :])
    return held


def freed(holds: Sequence[Floats], light_s: Floats, whole_s: Floats) -> Floats:
    """What recomputing one layer frees and at what price, [piece, (bytes, seconds a byte), point]:
    the lower convex hull of (nothing, selective, full), so no mix of layers does better."""
    a, b = (np.maximum(holds[0] - holds[n], 0.0) for n in (1, 2))
    rate_a, rate_b = light_s / np.maximum(a, 1e-9), whole_s / np.maximum(b, 1e-9)
    first = rate_a <= rate_b  # selective is the cheaper one
    bytes_1, seconds_1 = np.where(first, a, b), np.where(first, light_s, whole_s)
    bytes_2, seconds_2 = np.where(first, b, a), np.where(first, whole_s, light_s)
    more = np.maximum(bytes_2 - bytes_1, 0.0)
    rate = np.maximum(seconds_2 - seconds_1, 0.0) / np.maximum(more, 1e-9)
    return np.stack([
        np.stack([bytes_1, np.minimum(rate_a, rate_b)]), np.stack([more, rate])
    ])  # fmt: skip


def freed_by(none: Floats, ways: Sequence[tuple[Floats, Floats]]) -> Floats:
    """As `freed`, of any ways to recompute a layer, each (bytes that it keeps, seconds)."""
    sizes = [np.maximum(none - kept, 0.0) for kept, _ in ways]
    at_bytes, at_s = np.zeros_like(none), np.zeros_like(none)
    pieces = np.empty((len(ways), 2, *none.shape))
    for piece in pieces:
        size, least = np.zeros_like(none), np.full_like(none, np.inf)
        for whole, (_, seconds) in zip(sizes, ways):  # the first of the cheapest
            more = whole - at_bytes
            rate = np.maximum(seconds - at_s, 0.0) / np.maximum(more, 1e-9)
            better = (more > 0) & (rate < least)
            size, least = np.where(better, more, size), np.where(better, rate, least)
        piece[0], piece[1] = size, np.where(size > 0, least, 0.0)
        at_bytes, at_s = at_bytes + size, at_s + piece[1] * size
    return pieces


def with_piece(pieces: Floats, size: Floats, rate: Floats) -> Floats:
    """Pieces as `forced_s` has them, [piece, (bytes, seconds a byte), mesh], with one more each."""
    found = np.concatenate([pieces, np.stack([size, rate])[None]])
    order = np.argsort(found[:, 1:], axis=0, kind="stable")
    return np.take_along_axis(found, order, axis=0)


def forced_s(pieces: Floats, over_bytes: Floats, layers: Floats | float = 1.0) -> Floats:
    """Seconds of the cheapest recomputation that frees so many bytes; inf where nothing does.

    pieces: [piece, (bytes, seconds a byte), ...], the cheapest piece first, of one of `layers`.
    """
    seconds, left = np.zeros(np.shape(over_bytes)), np.maximum(over_bytes, 0.0)
    for size, rate in pieces:
        if not np.any(size):
            continue
        used = np.minimum(left, size * layers)
        left = left - used
        seconds += used * np.where(size > 0, rate, 0.0)
    seconds[left > SLACK_BYTES] = np.inf
    return seconds


def ranks_s(
    rows: Rows, pp: int, layers: int, kind: str, chunks: Chunks | None = None, others: int = 0
) -> Floats:
    """Seconds of the pipeline at least, with `layers` layers of the commonest kind. chunks: of an
    interleaved schedule with so many a rank. others: layers of other kinds, which are all that so
    many ranks may have."""
    found = np.empty(len(rows.m))
    most = min(layers, 2 * -(-layers // pp) + 1)
    each = max(1, CELLS // (pp * most))
    for at in range(0, len(found), each):
        some = np.arange(at, min(at + each, len(found)))
        found[some] = _ranks_s(rows.part(some), pp, layers, most, kind, chunks, others)
    return found


def _ranks_s(
    rows: Rows, pp: int, layers: int, most: int, kind: str, chunks: Chunks | None, others: int
) -> Floats:
    m = rows.m
    each_held = None if chunks is None else chunk_flight(pp, m.astype(np.int64), chunks.count)
    held = flight(pp, m, kind) if each_held is None else each_held[:, :, -1].astype(float)
    number = np.arange(1, most + 1)
    last = 0 if kind == "folded" else pp - 1
    ends = np.zeros((3, len(m), pp))
    for column, at in ((0, 0), (1, last)):
        for row, table in enumerate((rows.ends_s, rows.ends_bytes, rows.ends_kept)):
            ends[row, :, at] += table[:, column]
    each = rows.state_bytes[:, None] + held * rows.kept_bytes[:, None]
    room = rows.room_bytes[:, None] - ends[1] - held * ends[2]
    over = (each[:, :, None] * number - room[:, :, None]) / held[:, :, None]
    freed = np.moveaxis(rows.freed, 0, -1)[..., None, None]
    if kind in SPLIT_KINDS:  # nothing is recomputed where backward is split
        freed = freed[:0]
    if chunks is None or each_held is None:
        again = forced_s(freed, over, number.astype(float))
        if np.any(rows.lowered):  # else no layer of this kind is lowered
            size, rate, aside = rows.lowered.T[..., None, None]
            freed = np.broadcast_to(freed, (*freed.shape[:3], pp, 1))
            freed = with_piece(freed, size / held[..., None], rate * held[..., None])
            over = over + aside / held[..., None]
            again = np.minimum(again, forced_s(freed, over, number.astype(float)))
    else:
        over = each[:, :, None] * number - room[:, :, None]
        again = chunks.again_s(freed[..., 0, 0], rows.kept_bytes, over, number, each_held)
    time = (
        m[:, None, None] * (
            number * rows.layer_s[:, None, None] + (rows.own_s[:, None] + ends[0])[:, :, None]
            + again
        ) + rows.way_s[:, :, None]
    )
    flat = time.reshape(len(m), -1)
    if flat.shape[1] <= layers - 1:
        least = np.full(len(m), np.inf)
    else:
        least = np.partition(flat, layers - 1, axis=1)[:, layers - 1]
    if most < layers:  # or some rank has more layers than were looked at
        least = np.minimum(least, m * (most + 1) * rows.layer_s)
    if others < pp:  # so many ranks have a layer at least
        least = np.maximum(least, np.sort(time[:, :, 0], axis=1)[:, pp - others - 1])
    return least


def through_last_s(
    there_s: Floats, last_s: Floats, whole_s: Floats, m: Ints, pp: Ints, rounds: bool
) -> Floats:
    """Seconds at least where backward is not split, by the last stage: `stage_bounds.last_ps` of
    many. there_s: a micro-batch there and back, sends and all; last_s: the last stage at least;
    rounds: the schedule is interleaved."""
    least = there_s + (m - 1) * last_s
    some = np.isfinite(there_s) & (m % pp == 0)
    if not rounds or not np.any(some):
        return least
    first, others = there_s[some] + (pp[some] - 1) * last_s[some], pp[some] - 1
    of_last = np.maximum(0.0, m[some] * whole_s[some] / others - first)
    of_last = of_last / (m[some] - pp[some] + m[some] / others)
    least[some] = np.maximum(least[some], first + (m[some] - pp[some]) * of_last)
    return least


def bubble_s(
    whole_s: Floats, m: Ints, pp: Ints, layers: int, schedules: Collection[str], most_virtual: int,
    sends_s: Floats | float = 0.0,
) -> Floats:  # fmt: skip
    """Seconds at least of schedules that do not split backward, the best of those that are legal;
    whole_s: a micro-batch through all stages, what it recomputes included. sends_s: to a stage and
    back, in the mean of all, that interleaved schedules wait for.

    Each as `stage_bounds.lower_bound_ps` has it, with the mean rank for the busiest: GPipe fills
    and drains once; 1F1B's path through the busiest stage; interleaved with as many chunks a rank
    as there are layers for, where rounds are whole (`stage_bounds.filled_ps`).
    """
    fits = np.isfinite(whole_s)
    whole_s = np.where(fits, whole_s, 1.0)
    mean, least = whole_s / pp, np.full(len(whole_s), np.inf)
    if "gpipe" in schedules:
        least = np.minimum(least, whole_s + (m - 1) * mean)
    if "1f1b" in schedules:
        long, short = (m - 1 - pp) * mean + 2 * whole_s, 2 * whole_s * m / (m + 1)
        least = np.minimum(least, np.where(m < pp, np.inf, np.where(m > pp, long, short)))
    if "interleaved" in schedules:
        v = np.minimum(most_virtual, layers // pp)
        filled = _filled_s(whole_s, m, pp, np.maximum(v, 1), sends_s)
        filled = np.where(m % pp == 0, filled, 0.0)
        least = np.minimum(least, np.where(v < 2, np.inf, filled))
    least = np.where(np.isinf(least), 0.0, least)  # none of them is legal: nothing is said
    return np.where(fits, least, np.inf)


def _filled_s(
    whole_s: Floats, m: Ints, pp: Ints, v: Ints, sends_s: Floats | float
) -> Floats:
    """`stage_bounds.filled_ps` of many: the least T >= m whole / p + the least that T allows."""
    low, high = m * whole_s / pp, 2 * m * whole_s + sends_s
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        most = middle / m
        full = np.minimum(pp - 1, np.floor(whole_s / most))
        idle = most * full * (full - 1) / 2 + np.maximum(0, whole_s - full * most) * full
        holds = middle >= m * whole_s / pp + sends_s + idle / (pp * v)
        low, high = np.where(holds, low, middle), np.where(holds, middle, high)
    return low
