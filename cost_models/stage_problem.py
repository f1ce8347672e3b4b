"""Stages: the problem of cutting a chain of layers, and the one objective of a choice.

A choice is layers per global stage and, per stage, a pair (full, selective): the first `full`
layers compute everything again, the next `selective` in part, the rest nothing.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from cost_models.schedule import (
    Timeline,
    chunks_of,
    global_stage,
    latencies_ps,
    makespan_ps,
    order,
    peak_stash,
    rank_of,
    simulate,
)
from cost_models.schedule_orders import as_run

Pair = tuple[int, int]
PairPin = tuple[int | None, int | None]  # as pinned: None is any count, a negative one all layers
OPEN: PairPin = (None, None)
ALL_AGAIN: PairPin = (-1, 0)
ROUNDS = 4  # of micro-batches: one fills the ranks, one empties them, and those between repeat
LEVELS = ("none", "selective", "full")  # the order of activation_bytes and working_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """What the first or the last stage has beside its layers, summed over those units."""

    forward_ps: int = 0
    input_grad_ps: int = 0
    weight_grad_ps: int = 0
    activation_bytes: int = 0
    working_bytes: int = 0
    state_bytes: int = 0
    gathered_bytes: int = 0
    tail_comm_ps: int = 0
    tail_hide_ps: int = 0
    tail_own_ps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """What layers have whose optimizer lies below the device: `StageProblem`'s, per layer."""

    state_bytes: tuple[int, ...]
    gathered_bytes: tuple[int, ...]
    tail_own_ps: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A tier below the device, as one GPU has it: the bytes it may lay there whatever the others
    do that share it, the most that all may in the mean, and what each surely may.

    limits_bytes: of each rank, where they are to lay less than the most.
    state_bytes: of each layer as it is; lowered_bytes: where its optimizer lies below, empty where
    that is not open; aside_bytes: of its activations a micro-batch, by level; ends_bytes: of what
    the first and the last stage have besides.
    """

    tier: str
    most_bytes: int
    mean_bytes: int
    sure_bytes: int
    state_bytes: tuple[int, ...]
    lowered_bytes: tuple[int, ...] = ()
    aside_bytes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    ends_bytes: tuple[int, int]
    limits_bytes: tuple[int, ...] = ()

    def of_rank(self, rank: int) -> int:
        """The most bytes that a GPU of a rank may lay there."""
        return self.limits_bytes[rank] if self.limits_bytes else self.most_bytes

    def beside_bytes(self, stage: Any, count: int) -> Any:
        """Of a stage of so many, or an array of them: bytes there beside its layers'."""
        return self.ends_bytes[0] * (stage == 0) + self.ends_bytes[1] * (stage == count - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProblem:
    """Layers in a row to be cut into pp * chunks stages, each of one layer at least.

    Times are per micro-batch, tuples per layer. recompute_ps: (full, selective), added to the
    layer's input gradient. activation_bytes, working_bytes: (none, selective, full); activations
    are held per micro-batch in flight, the most of a rank's working bytes once, twice the most of
    its gathered bytes once. constant_bytes: per rank. glue: per stage. p2p_ps: per boundary,
    and at least. slow_sends: of each rank's boundary to the next, the last rank's to the first,
    what a send takes longer and for how long it keeps the links; empty where all are alike.
    tail: what a rank does after its last backward, max(0, comm - hide) + own.
    fixed_recompute: one (full, selective) a stage, or a level for every layer, or (level, layers
    a stage); counts are cut to the stage, a negative one means all of its layers, None any.
    ranks: where ranks are not alike, of each the problem as if all were as it is, one object a
    kind, kinds in a row; this one's numbers are then the least of theirs, its capacity the most.
    lowered: where the first layers of a stage, as many as is best, may have these numbers instead;
    then one stage is on a rank. rooms: tiers below that may be too full for a choice.
    """

    schedule: str
    pp: int
    virtual_stages: int = 1
    microbatches: int
    forward_ps: tuple[int, ...]
    input_grad_ps: tuple[int, ...]
    weight_grad_ps: tuple[int, ...]
    recompute_ps: tuple[tuple[int, ...], tuple[int, ...]]
    activation_bytes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    working_bytes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    state_bytes: tuple[int, ...]
    gathered_bytes: tuple[int, ...]
    tail_comm_ps: tuple[int, ...]
    tail_hide_ps: tuple[int, ...]
    tail_own_ps: tuple[int, ...]
    first: Extra = field(default_factory=Extra)
    last: Extra = field(default_factory=Extra)
    constant_bytes: int = 0
    rank_glue_forward_ps: int = 0
    rank_glue_backward_ps: int = 0
    p2p_ps: int = 0
    slow_sends: tuple[tuple[int, int], ...] = ()
    capacity_bytes: int
    fixed_stages: tuple[int, ...] | None = None
    fixed_recompute: tuple[PairPin, ...] | str | tuple[str, int] | None = None
    levels: tuple[str, ...] = LEVELS
    ranks: tuple[StageProblem, ...] = ()
    lowered: Lowered | None = None
    rooms: tuple[Room, ...] = ()

    @property
    def settled(self) -> bool:
        """Whether it is pinned of every stage what is recomputed."""
        return all(None not in pin for pin in pins_of(self))

    def at(self, rank: int) -> StageProblem:
        """The problem as this rank has it."""
        return self.ranks[rank] if self.ranks else self

    @property
    def sides(self) -> tuple[tuple[StageProblem, int], ...]:
        """The kinds of ranks in order, each with how many there are."""
        if not self.ranks:
            return ((self, self.pp),)
        return tuple((next(group), 1 + sum(1 for _ in group))
                     for _, group in itertools.groupby(self.ranks, key=id))  # fmt: skip

    @property
    def layers(self) -> int:
        return len(self.forward_ps)

    @property
    def chunks(self) -> int:
        return chunks_of(self.schedule, self.virtual_stages)

    @property
    def count(self) -> int:
        """Global stages."""
        return self.pp * self.chunks

    def rank_of(self, stage: int) -> int:
        return rank_of(self.schedule, self.pp, stage)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The global stages of a rank, by chunk."""
        return tuple(global_stage(self.schedule, self.pp, rank, c) for c in range(self.chunks))

    def in_flight(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Micro-batches held per chunk at the moments that can be the rank's peak."""
        return in_flight(self.schedule, self.pp, self.microbatches, self.virtual_stages, rank)

    def least_in_flight(self) -> tuple[int, ...]:
        """Per rank: at one moment it holds at least so many micro-batches of every chunk."""
        return least_in_flight(self.schedule, self.pp, self.microbatches, self.virtual_stages)

    def lowering(self, stages: Sequence[int], below: Sequence[int]) -> StageProblem:
        """The problem with so many layers of each of these stages lowered."""
        if self.lowered is None:
            return self
        here = [k < n for n, count in zip(below, stages) for k in range(count)]
        rows: dict[str, Any] = {
            f.name: tuple(a if low else b for low, a, b in zip(
                here, getattr(self.lowered, f.name), getattr(self, f.name)
            )) for f in fields(Lowered)
        }  # fmt: skip
        rooms = tuple(replace(room, lowered_bytes=(), state_bytes=tuple(
            a if low else b for low, a, b in zip(here, room.lowered_bytes, room.state_bytes)
        )) for room in self.rooms)  # fmt: skip
        return replace(self, lowered=None, rooms=rooms, **rows)

    def extras(self, stage: int) -> tuple[Extra, ...]:
        """What the stage has beside its layers."""
        here = (self.first,) if stage == 0 else ()
        return (*here, self.last) if stage == self.count - 1 else here


def least_of(problems: Sequence[StageProblem], names: Sequence[str]) -> dict[str, Any]:
    """Numbers of layers, by level where they have levels: of each the least of these problems."""
    def least(rows: Sequence[Any]) -> Any:
        if isinstance(rows[0][0], tuple):
            return tuple(least(level) for level in zip(*rows))
        return tuple(map(min, *rows)) if len(rows) > 1 else rows[0]

    return {name: least([getattr(p, name) for p in problems]) for name in names}


def pin_of(problem: StageProblem, stage: int) -> PairPin:
    """What is fixed of a stage's recomputation, before it is cut to the stage's layers."""
    pin = problem.fixed_recompute
    if pin is None:
        return OPEN
    if isinstance(pin, str):
        pin = (pin, -1)
    if isinstance(pin[0], str):
        level, count = pin
        return {"full": (count, 0), "selective": (0, count), "none": (0, 0)}[level]
    return pin[stage]


def pins_of(problem: StageProblem) -> set[PairPin]:
    """`pin_of` all stages."""
    if problem.fixed_recompute is None:
        return {OPEN}
    return {pin_of(problem, stage) for stage in range(problem.count)}


def allowed_pairs(problem: StageProblem, stage: int, layers: int) -> tuple[Pair, ...]:
    """Every (full, selective) that a stage of so many layers may have, the least full first."""
    return pairs_of(problem.levels, layers, pin_of(problem, stage))


@functools.lru_cache(maxsize=1024)
def pairs_of(levels: tuple[str, ...], n: int, pin: PairPin = OPEN) -> tuple[Pair, ...]:
    """`allowed_pairs` of n layers. A pin needs no level: what it says is what there is. Where both
    are pinned the full ones come first, and where one is it has as many layers as there are."""
    def counts(fixed: int | None, level: str, most: int) -> Sequence[int]:
        if fixed is not None:
            return (most if fixed < 0 else min(fixed, most),)
        return range(most + 1) if level in levels else (0,)

    kept = counts(pin[1], "selective", n)[0] if pin[0] is None and pin[1] is not None else 0
    return tuple(
        (full, selective)
        for full in counts(pin[0], "full", n - kept)
        for selective in counts(pin[1], "selective", n - full)
        if "none" in levels or full + selective == n or pin != OPEN
    )


def level_of(pair: Pair, place: int) -> int:
    """Index into LEVELS of the stage's layer number `place`."""
    return 2 if place < pair[0] else 1 if place < pair[0] + pair[1] else 0


def starts_of(stages: Sequence[int]) -> list[int]:
    """The first layer of each stage."""
    starts = [0]
    for n in stages[:-1]:
        starts.append(starts[-1] + n)
    return starts


def shifted(stages: Sequence[int], give: int, take: int) -> tuple[int, ...]:
    """The cut with a layer less on one stage and one more on another."""
    cut = list(stages)
    cut[give] -= 1
    cut[take] += 1
    return tuple(cut)


def neighbours(stages: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Cuts with one boundary moved by a layer, the last boundary first."""
    for k in range(len(stages) - 2, -1, -1):
        for give, take in ((k + 1, k), (k, k + 1)):
            if stages[give] > 1:
                yield shifted(stages, give, take)


def moved(stages: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Cuts with a layer less on a stage and one more on any other."""
    for give, take in itertools.permutations(range(len(stages)), 2):
        if stages[give] > 1:
            yield shifted(stages, give, take)


def evaluate(
    problem: StageProblem, stages: Sequence[int], recompute: Sequence[Pair]
) -> tuple[int, tuple[int, ...], bool]:
    """The objective: the step in ps, bytes at the peak per rank, and whether every rank fits.

    The step is the schedule simulated plus the longest tail of a rank.
    """
    assert len(stages) == len(recompute) == problem.count
    assert sum(stages) == problem.layers and min(stages) >= 1
    memory = rank_bytes(problem, stages, recompute)
    fits = all(used <= problem.at(r).capacity_bytes for r, used in enumerate(memory))
    return step_ps(problem, stages, recompute), memory, fits


def slow_of(problem: StageProblem) -> list[tuple[int, int]]:
    """`slow_sends` of every boundary between global stages, in order; empty where there are
    none."""
    found: list[tuple[int, int]] = []
    if not problem.slow_sends:
        return found
    for stage in range(problem.count - 1):
        here, there = sorted((problem.rank_of(stage), problem.rank_of(stage + 1)))
        found.append(
            (0, 0) if here == there else problem.slow_sends[here if there == here + 1 else -1]
        )
    return found


def step_ps(problem: StageProblem, stages: Sequence[int], recompute: Sequence[Pair]) -> int:
    """The schedule simulated plus the longest tail of a rank."""
    return Steps(problem).step_ps(stages, recompute)


def timeline(
    problem: StageProblem, stages: Sequence[int], recompute: Sequence[Pair], events: bool = False
) -> Timeline:
    """The schedule of a choice, simulated. events: with every operation of it."""
    return simulate(
        problem.schedule, *Steps(problem).times_ps(stages, recompute), sends_ps(problem),
        problem.microbatches, problem.pp, problem.virtual_stages, events,
        [busy for _, busy in slow_of(problem)],
    )  # fmt: skip


Times = tuple[list[int], list[int], list[int]]


class Steps:
    """`step_ps` of many choices of one problem: what is in all of them is added up once."""

    def __init__(self, problem: StageProblem) -> None:
        p = self.problem = problem
        sums = {id(q): _sums(q) for q, _ in p.sides}
        self._stages: list[tuple[list[list[int]], int, int, int]] = []
        for k in range(p.count):  # running sums of its rank, and times beside its layers
            q = p.at(p.rank_of(k))
            more = q.extras(k)
            self._stages.append((
                sums[id(q)],
                sum(e.forward_ps for e in more) + q.rank_glue_forward_ps,
                sum(e.input_grad_ps for e in more) + q.rank_glue_backward_ps,
                sum(e.weight_grad_ps for e in more),
            ))  # fmt: skip
        self._ranks: list[tuple[list[list[int]], tuple[int, ...], int, int]] = []
        for rank in range(p.pp):
            q, mine = p.at(rank), p.stages_of(rank)
            more = tuple(e for k in mine for e in q.extras(k))
            self._ranks.append((
                sums[id(q)], mine,
                sum(e.tail_comm_ps - e.tail_hide_ps for e in more),
                sum(e.tail_own_ps for e in more),
            ))  # fmt: skip
        self._queued = any(busy for _, busy in slow_of(p))
        self._latency = latencies_ps(p.schedule, p.pp, p.count, sends_ps(p))

    def step_ps(self, stages: Sequence[int], recompute: Sequence[Pair]) -> int:
        """The step of a choice."""
        p = self.problem
        if self._queued:
            return timeline(p, stages, recompute).makespan_ps + self.tail_ps(stages)
        return makespan_ps(
            p.schedule, *self.times_ps(stages, recompute), self._latency, p.microbatches, p.pp,
            p.virtual_stages,
        ) + self.tail_ps(stages)  # fmt: skip

    def times_ps(self, stages: Sequence[int], recompute: Sequence[Pair]) -> Times:
        """By stage: forward, input gradient with what is computed again, weight gradient."""
        found: Times = ([], [], [])
        forward, backward, weight = found
        i = 0
        for n, (full, selective), (sums, f, b, w) in zip(stages, recompute, self._stages):
            j = i + n
            forward.append(f + sums[0][j] - sums[0][i])
            b += sums[1][j] - sums[1][i]
            if full or selective:
                middle = i + full
                b += sums[3][middle] - sums[3][i] + sums[4][middle + selective] - sums[4][middle]
            backward.append(b)
            weight.append(w + sums[2][j] - sums[2][i])
            i = j
        return found

    def tail_ps(self, stages: Sequence[int]) -> int:
        """The longest tail of a rank."""
        starts, longest = starts_of(stages), 0
        for sums, mine, comm, own in self._ranks:
            for k in mine:
                i = starts[k]
                j = i + stages[k]
                comm += sums[5][j] - sums[5][i]
                own += sums[6][j] - sums[6][i]
            longest = max(longest, max(0, comm) + own)
        return longest


def _sums(q: StageProblem) -> list[list[int]]:
    """Running sums over layers: forward, input and weight gradients, what full and selective
    recomputation take, what of a tail waits, and its own."""
    waits = map(operator.sub, q.tail_comm_ps, q.tail_hide_ps)
    rows = (q.forward_ps, q.input_grad_ps, q.weight_grad_ps, *q.recompute_ps, waits, q.tail_own_ps)
    return [list(itertools.accumulate(row, initial=0)) for row in rows]


def sends_ps(problem: StageProblem) -> list[int]:
    """What a send takes over every boundary between global stages, from the producer's end to the
    consumer's start."""
    slow = slow_of(problem)
    return [problem.p2p_ps + more for more, _ in slow] or [problem.p2p_ps] * (problem.count - 1)


def tail_ps(problem: StageProblem, stages: Sequence[int]) -> int:
    """The longest tail of a rank."""
    return Steps(problem).tail_ps(stages)


def rank_bytes(
    problem: StageProblem, stages: Sequence[int], recompute: Sequence[Pair]
) -> tuple[int, ...]:
    """Bytes at the peak, per rank: constant, state, stash, working space, gathered units."""
    starts, found = starts_of(stages), []
    for rank in range(problem.pp):
        q = problem.at(rank)
        state, working, gathered, held = q.constant_bytes, 0, 0, []
        for k in problem.stages_of(rank):
            act = 0
            for place in range(stages[k]):
                layer, level = starts[k] + place, level_of(recompute[k], place)
                act += q.activation_bytes[level][layer]
                working = max(working, q.working_bytes[level][layer])
                gathered = max(gathered, q.gathered_bytes[layer])
                state += q.state_bytes[layer]
            for e in q.extras(k):
                act += e.activation_bytes
                working = max(working, e.working_bytes)
                gathered = max(gathered, e.gathered_bytes)
                state += e.state_bytes
            held.append(act)
        found.append(state + stash_bytes(problem, rank, held) + working + 2 * gathered)
    return tuple(found)


def below_bytes(
    problem: StageProblem, room: Room, stages: Sequence[int], recompute: Sequence[Pair]
) -> tuple[int, ...]:
    """What each rank's GPUs lay on a tier, a GPU; nothing of the problem is to be lowered."""
    starts, found = starts_of(stages), []
    for rank in range(problem.pp):
        state, held = 0, []
        for k in problem.stages_of(rank):
            i, n = starts[k], stages[k]
            state += sum(room.state_bytes[i : i + n])
            state += room.beside_bytes(k, problem.count)
            held.append(sum(
                room.aside_bytes[level_of(recompute[k], place)][i + place] for place in range(n)
            ))  # fmt: skip
        found.append(state + stash_bytes(problem, rank, held))
    return tuple(found)


def stash_bytes(problem: StageProblem, rank: int, held: Sequence[int]) -> int:
    """The most a rank holds, given each chunk's bytes a micro-batch; as peak_stash has it."""
    return max(sum(c * b for c, b in zip(counts, held)) for counts in problem.in_flight(rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """Where nothing fits: the choice that overflows the least, and its fullest rank and stage."""

    stages: tuple[int, ...]
    recompute: tuple[Pair, ...]
    peak_bytes: tuple[int, ...]
    rank: int
    stage: int
    overflow_bytes: int

    @classmethod
    def of(
        cls, problem: StageProblem, stages: tuple[int, ...], recompute: tuple[Pair, ...]
    ) -> Nearest:
        memory = rank_bytes(problem, stages, recompute)
        over = [used - problem.at(r).capacity_bytes for r, used in enumerate(memory)]
        rank = over.index(max(over))
        return cls(
            stages=stages, recompute=recompute, peak_bytes=memory, rank=rank,
            stage=max(problem.stages_of(rank), key=lambda k: stages[k]),
            overflow_bytes=over[rank],
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found: the best choice if any, a bound on all, what is nearest if none fits.
    below: layers of each stage that are lowered."""

    stages: tuple[int, ...] = ()
    recompute: tuple[Pair, ...] = ()
    below: tuple[int, ...] = ()
    step_ps: int = 0
    bound_ps: int = 0
    nearest: Nearest | None = None


@functools.lru_cache(maxsize=4096)
def in_flight(schedule: str, pp: int, m: int, v: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches held per chunk at the moments that can be a rank's peak.

    Any other moment holds no more of every chunk. With one chunk there is one such moment. From
    some rounds of micro-batches on, one to each rank, there are no others: the middle repeats.
    """
    chunks = chunks_of(schedule, v)
    m -= pp * max(0, m // pp - ROUNDS) if chunks > 1 else 0
    schedule = as_run(schedule, pp)
    if schedule == "gpipe":
        return ((m,),)
    if schedule == "1f1b":
        return ((min(m, pp - rank),),)
    if chunks == 1:
        return ((peak_stash(schedule, pp, m, v, rank, (1,)).peak_bytes,),)
    now, rising = [0] * chunks, False
    seen: dict[tuple[int, ...], None] = {}
    for op, _, chunk in order(schedule, pp, m, v, rank):
        if op == "F":
            now[chunk] += 1
            rising = True
        elif op != "B":
            if rising:
                seen[tuple(now)] = None
            now[chunk] -= 1
            rising = False
    moments = list(seen)
    held = np.array(moments).reshape(len(moments), chunks)
    # one that another holds no less than is no peak: of different moments that is one of the two
    beaten = [int((held >= row).all(axis=1).sum()) > 1 for row in held]
    return tuple(itertools.compress(moments, map(operator.not_, beaten)))


@functools.lru_cache(maxsize=512)
def least_in_flight(schedule: str, pp: int, m: int, v: int) -> tuple[int, ...]:
    """Per rank: at one moment it holds at least so many micro-batches of every chunk."""
    return tuple(max(map(min, in_flight(schedule, pp, m, v, rank))) for rank in range(pp))
