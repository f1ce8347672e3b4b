"""What memory forces of a stage program, and what pins do: recomputation that no choice avoids,
whether nothing fits, and whether everything does."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from cost_models.stage_problem import ALL_AGAIN, LEVELS, OPEN, Room, StageProblem, pins_of

ROUNDING = 1e-9  # of sums as floats, relative


def sure_extra(p: StageProblem) -> tuple[int, ...]:
    """Recompute time of each layer that no choice avoids."""
    pins, (full, selective) = pins_of(p), p.recompute_ps
    if pins == {OPEN} and "none" not in p.levels:
        kept = [t for t, level in ((full, "full"), (selective, "selective")) if level in p.levels]
        return tuple(map(min, zip(*kept)))
    if pins == {ALL_AGAIN}:
        return full
    return selective if pins == {(0, -1)} else (0,) * p.layers


def easiest(p: StageProblem) -> StageProblem:
    """Every layer with the less of what it has lowered and not, where it may be lowered."""
    if p.lowered is None:
        return p
    low = p.lowered
    return replace(
        p, lowered=None, state_bytes=tuple(map(min, p.state_bytes, low.state_bytes)),
        gathered_bytes=tuple(map(min, p.gathered_bytes, low.gathered_bytes)),
        tail_own_ps=tuple(map(min, p.tail_own_ps, low.tail_own_ps)),
    )  # fmt: skip


def freely_lowered(p: StageProblem) -> StageProblem:
    """`easiest`, with all the room below that there may be: no harder than the problem."""
    return replace(easiest(p), rooms=())


def forced_ps(p: StageProblem) -> int | None:
    """Recompute time of a micro-batch on all ranks together, at least; None where nothing fits.
    Of lowered layers, what their longer tails come to as such (`_freed_by`).

    Rank r holds k_r micro-batches at least of each of its layers' activations at one moment, so
    the sum of what ranks keep of a micro-batch is at most that of (capacity - state) / k_r. What is
    beyond that is freed where a picosecond frees the most bytes, layers cut anywhere.
    """
    if p.settled or "none" not in p.levels:
        return 0
    if any(q.activation_bytes != p.activation_bytes for q, _ in p.sides):
        return 0
    flights = p.least_in_flight()
    if min(flights) < 1:
        return 0
    ends = (p.first, p.last)
    least = min(map(min, p.working_bytes)) + 2 * min(easiest(p).gathered_bytes)
    left = [p.at(r).capacity_bytes - p.at(r).constant_bytes - least for r in range(p.pp)]
    state = sum(p.state_bytes) + sum(e.state_bytes for e in ends)
    kept = sum(p.activation_bytes[0]) + sum(e.activation_bytes for e in ends)
    places = sum(room / k for room, k in zip(left, flights))
    # what is over in the mean of ranks, and by places: there a byte of state is one in so many
    overs = ((state - sum(left), 1), (state / max(flights) - places, max(flights)))
    found = 0
    for over, each in (max(overs),) if p.lowered is None else overs:
        pieces = _freed_by(p, each) if kept + over > 0 else ()
        again_ps = _freeing_ps(pieces, kept, kept + over)
        if again_ps is None:
            return None
        found = max(found, again_ps)
    for room in p.rooms:
        again_ps = _forced_below_ps(p, room, sum(left), flights)
        if again_ps is None:
            return None
        found = max(found, again_ps)
    return found


def _freeing_ps(
    pieces: Sequence[tuple[float, float]], kept_bytes: int, over_bytes: float
) -> int | None:
    """Picoseconds in which that is freed of what is kept, the cheapest pieces first, (picoseconds a
    byte, bytes) each; None where all of them are too little."""
    again, over = 0.0, over_bytes
    for rate, size in pieces:
        if over <= 0:
            break
        used = min(over, size)
        again, over = again + used * rate, over - used
    return None if over > 1 + kept_bytes * ROUNDING else int(again * (1 - ROUNDING)) - 1


def _forced_below_ps(
    p: StageProblem, room: Room, left_bytes: int, flights: Sequence[int]
) -> int | None:
    """As `forced_ps`, of what ranks hold and lay on a tier together, which moves free nothing of.

    left_bytes: of all ranks for state and activations. Ranks hold, and have moved, one micro-batch
    of each layer's activations at least, or by places k_r, where a rank has room for what it may
    lay there alone.
    """
    none, some, full = (
        tuple(map(operator.add, held, aside))
        for held, aside in zip(p.activation_bytes, room.aside_bytes)
    )
    ends = (p.first, p.last)
    state = sum(p.state_bytes) + sum(e.state_bytes for e in ends)
    state += sum(room.state_bytes) + sum(room.ends_bytes)
    if p.lowered is not None:  # what a layer lays there, less what it frees by that
        state += sum(min(0, low + laid - here - was) for here, low, was, laid in zip(
            p.state_bytes, p.lowered.state_bytes, room.state_bytes, room.lowered_bytes
        ))  # fmt: skip
    kept = sum(none) + sum(e.activation_bytes for e in ends)
    most = max(flights)
    places = sum(1 / k for k in flights)
    mean = state - left_bytes - p.pp * room.mean_bytes
    by_place = state / most - (left_bytes / p.pp + room.most_bytes) * places
    over = kept + max(mean, by_place)
    pieces = _pieces(p.recompute_ps, (none, some, full), p.levels) if over > 0 else ()
    return _freeing_ps(pieces, kept, over)


def _freed_by(p: StageProblem, each: int) -> Sequence[tuple[float, float]]:
    """`_pieces`, and what lowered layers free: of each byte of state one in `each`.

    A longer tail of all ranks together is 1 / pp of it in the mean. What is recomputed of a
    micro-batch is in `lower_bound_ps` (m + pp - 1) / pp times at most, under 1F1B with few
    micro-batches 2 m / (m + 1): as much is what a picosecond of a tail stands for.
    """
    pieces = _pieces(p.recompute_ps, p.activation_bytes, p.levels)
    if p.lowered is None:
        return pieces
    m, pp = p.microbatches, p.pp
    counted = max(m + pp - 1, 2 * pp * m // (m + 1) + 1)
    found: dict[float, float] = {}
    for state, low, own, longer in zip(
        p.state_bytes, p.lowered.state_bytes, p.tail_own_ps, p.lowered.tail_own_ps
    ):
        if low < state:
            rate = max(0, longer - own) * each / (counted * (state - low))
            found[rate] = found.get(rate, 0.0) + (state - low) / each
    return sorted((*pieces, *found.items()))


@functools.lru_cache(maxsize=256)
def _pieces(
    again_ps: tuple[tuple[int, ...], ...], kept: tuple[tuple[int, ...], ...],
    levels: tuple[str, ...],
) -> tuple[tuple[float, int], ...]:  # fmt: skip
    """(picoseconds a byte, bytes) that recomputation of the layers frees, the cheapest first: of
    each layer the lower convex hull of nothing, selective and full."""
    pieces: list[tuple[float, int]] = []
    alike = Counter(zip(*again_ps, *kept))
    for (full_ps, some_ps, none, some, full), count in alike.items():
        ways = [(none - some, some_ps)] * ("selective" in levels)
        ways += [(none - full, full_ps)] * ("full" in levels)
        ways = sorted((w for w in ways if w[0] > 0), key=lambda w: (w[1] / w[0], -w[0]))
        freed = spent = 0
        for size, ps in ways:
            if size > freed:
                rate = (ps - spent) / (size - freed)
                pieces.append((rate, count * (size - freed)))
                freed, spent = size, ps
    return tuple(sorted(pieces))


def surely_fits(p: StageProblem) -> bool:
    """True where every cut fits with nothing recomputed: one rank could hold all that there is."""
    if p.settled or p.ranks or "none" not in p.levels:
        return False
    ends = (p.first, p.last)
    flight = max(max(counts) for rank in range(p.pp) for counts in p.in_flight(rank))
    held = sum(p.activation_bytes[0]) + sum(e.activation_bytes for e in ends)
    state = sum(p.state_bytes) + sum(e.state_bytes for e in ends)
    used = max(*p.working_bytes[0], *(e.working_bytes for e in ends))
    gathered = max(*p.gathered_bytes, *(e.gathered_bytes for e in ends))
    return p.constant_bytes + state + flight * held + used + 2 * gathered <= p.capacity_bytes


def surely_infeasible(problem: StageProblem) -> bool:
    """True where no choice can fit: by count, as each rank takes so many of the least layer, or so
    many of the commonest kind; or by the sum of all ranks."""
    p = easiest(problem)
    free = not p.settled
    allowed = [row for row, level in zip(p.activation_bytes, LEVELS) if level in p.levels]
    least = tuple(map(min, zip(*(allowed if free else p.activation_bytes))))
    act, work = min(least), min(map(min, p.working_bytes))
    state, gathered = min(p.state_bytes), min(p.gathered_bytes)
    (common_state, common_act), common = Counter(zip(p.state_bytes, least)).most_common(1)[0]
    room = common_room = 0
    for rank, flight in enumerate(p.least_in_flight()):
        q = p.at(rank)
        ends = [e for k, e in ((0, q.first), (p.count - 1, q.last)) if p.rank_of(k) == rank]
        left = q.capacity_bytes - q.constant_bytes
        left -= max([work, *(e.working_bytes for e in ends)])
        left -= 2 * max([gathered, *(e.gathered_bytes for e in ends)])
        left -= sum(e.state_bytes + flight * e.activation_bytes for e in ends)
        if left < p.chunks * (state + flight * act):
            return True
        room += left // (state + flight * act) if state + flight * act else p.layers
        each = common_state + flight * common_act
        common_room += left // each if each else common
    return room < p.layers or common_room < common or forced_ps(problem) is None
