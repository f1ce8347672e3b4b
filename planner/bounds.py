"""Lower bounds of many meshes at once, from unit costs alone; no solver, no schedule.

A step of m micro-batches on p stages takes m S / p + the mean of the w_r at least: S is a
micro-batch through the whole chain and w_r through its first r layers, which all, or more, are on
the ranks before r. It waits for these and its last gradient goes back through them, so
T >= m t_r + w_r, and the t_r sum to S. Where backward is split, weight gradients may run while that
last one goes back: w_r is r of the quickest layer's forward.
And some rank has ceil(L / p) of the L layers.
Rank r holds the
activations of p - r micro-batches at once, so the ranks' memory bounds what a micro-batch keeps:
what does not fit is recomputed, at the best layer's seconds a byte. `bound_ranks` counts the
layers that each rank can take in a given time besides. Every way to hold the state is bounded by
its own bytes and its own seconds; the least of them is the mesh's bound.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.decisions import Decisions, Keep
from cost_models.formats import Formats
from cost_models.schedule import schedule_illegal
from cost_models.step import Assignments, Costs
from planner.bound_below import Lowering, Room, with_room
from planner.bound_chain import Known, Through, through_chain
from planner.bound_chunks import SLACK_BYTES, Chunks, chunk_flight, filled_chunks
from planner.bound_ranks import (
    SPLIT_KINDS,
    Rows,
    bubble_s,
    flight,
    forced_s,
    kind_of_schedule,
    padded,
    ranks_s,
    through_last_s,
    with_piece,
)
from planner.bound_sends import Sends
from planner.bound_sharing import Sizes
from planner.bound_state import Held, States, Way
from planner.decisions import Pins
from planner.mesh import Mesh

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ROUNDING_BYTES = 1e4  # of sums of bytes as floats
LATE_S = 1e5  # meshes that seem not to fit come behind all others, the nearest to fitting first
MOST_BEYOND = 25.0
FEW = 10  # one in so many layers, or fewer: other kinds say little of the ranks
# schedules with one stage a rank, whose first layers may have their optimizer below, by kind
ALONE = {
    "fused": {"1f1b", "gpipe"}, "gpipe": {"gpipe"}, "zbh1": {"zbh1"}, "folded": set[str](),
}  # fmt: skip
NEVER_PS = float(1 << 60)  # the bound of a mesh that cannot fit
Assign = Callable[[int, bool], Assignments]  # (tp, sequence parallel) -> how units lie


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Of every candidate: a lower bound of its objective, and a guess at it, in picoseconds.

    The guess adds the bubble of the most virtual stages; it orders what is tried first and
    proves nothing.
    """

    lower_ps: NDArray[np.int64]
    guess_ps: NDArray[np.int64]


def mesh_bounds_ps(
    costs: Costs,
    candidates: Sequence[Mesh],
    assign: Assign,
    *,
    most_virtual: int = 8,
    schedules: Sequence[str] = ("gpipe", "1f1b", "interleaved"),
    pins: Pins | None = None,
    below: Sequence[int] | None = None,
    formats: Formats = (),
    keeps: Callable[[int, bool], Sequence[Keep]] = lambda tp, split: (),
    repeats: Callable[[int], bool] = lambda tp: True,
    apart: bool = False,
    states: States | None = None,
) -> Bounds:
    """Bound every mesh: its units through the pipeline, and the least data-parallel tail.

    schedules: any of them may run. pins: of how state is held. keeps: what layers may keep in
    part beside the default, by (tp, sequence parallel); repeats: whether they may be recomputed in
    full, by tp. Where what needs memory here is
    pinned elsewhere than on the GPU, memory forces nothing. below: bounds are not sharpened beyond
    these picoseconds. formats: of all of them. apart: interleaved schedules are bounded each by its
    own number of chunks, which is sharper and takes longer. states: how state is held, if not as
    one kind of GPUs holds it.
    """
    point = {p: i for i, p in enumerate(costs.points)}
    groups: dict[tuple[int, bool, str, int, int], list[int]] = {}
    for i, m in enumerate(candidates):
        key = (m.tp, m.sequence_parallel, m.cp_kind, m.ep, m.etp)
        groups.setdefault(key, []).append(i)
    table, states = _Table(costs, candidates), states or States(costs, pins or Pins())
    table.schedules = frozenset(schedules)
    table.by_layer = states.by_layer
    table.reserved, table.sent = (
        np.array([of(m) for m in candidates], dtype=float)
        for of in (states.reserved, states.sending.bytes)
    )
    table.most_virtual = max(most_virtual, states.pins.virtual_stages or 1)
    table.apart = apart and "interleaved" in table.schedules
    known: Known = {}
    for (tp, split, kind, ep, etp), members in groups.items():
        d = Decisions(
            tp=tp, sequence_parallel=split, cp_kind=kind, ep=ep, etp=etp, formats=formats
        )
        laid = assign(tp, split)
        through = through_chain(costs, d, laid, keeps(tp, split), states.moves, known, repeats(tp))
        at = [point[candidates[i].micro_batch, candidates[i].cp] for i in members]
        table.fill(members, through, at, states.sizes(laid, ep, etp, through.common))
    bounds, guesses, beyond = (np.zeros(len(candidates)) for _ in range(3))
    limit = np.full(len(candidates), np.inf) if below is None else np.array(below) / 1e12
    for pipeline in (False, True):
        mine = np.flatnonzero((table.pp > 1) == pipeline)
        if len(mine):
            for some, tight, found in table.by_room(mine, states):
                if apart:
                    bounds[some] = table.shared_s(some, states, limit, tight)
                    continue
                bounds[some], tails, guess_bytes = table.least_s(some, states, limit, tight, found)
                guesses[some], beyond[some] = table.guess_s(some, tails, guess_bytes, most_virtual)
    guesses = np.maximum(guesses, np.minimum(bounds, LATE_S * (2 + MOST_BEYOND)))
    # of meshes that cannot fit, in the order of what they are over
    guesses += np.where(bounds * 1e12 >= NEVER_PS, beyond, 0.0)
    # one part in a million below: the rounding of sums to picoseconds stays above the bound
    assert not np.any(np.isnan(bounds)), "a bound that is no number says nothing"
    lower = np.minimum(np.floor(bounds * 1e12 * (1 - 1e-6)), NEVER_PS)
    return Bounds(
        lower_ps=lower.astype(np.int64), guess_ps=np.floor(guesses * 1e12).astype(np.int64)
    )


class _Table:
    """Numbers of every candidate, by its place."""

    def __init__(self, costs: Costs, candidates: Sequence[Mesh]) -> None:
        self.costs, self.candidates = costs, candidates
        self.pp, self.m = np.array([(c.pp, c.microbatches) for c in candidates]).T
        self.chain: list[Through] = []
        self.sizes: list[Sizes] = []
        self._stacks: dict[tuple[str | int, ...], Floats] = {}
        self.group = np.zeros((2, len(candidates)), dtype=np.int64)  # of chain, and its point
        self.layers = len(costs.chain.layers)
        self.schedules: frozenset[str] = frozenset()  # that may run, and the most chunks a rank
        self.most_virtual = 1
        # of each mesh: bytes beside all else, and of a micro-batch's send
        self.reserved, self.sent = (np.zeros(len(candidates)) for _ in range(2))
        self.apart = False  # whether each number of chunks is bounded by itself
        self.by_layer = False  # whether the optimizer of some layers may lie below

    def fill(self, members: list[int], through: Through, at: list[int], sizes: Sizes) -> None:
        self.group[0, members], self.group[1, members] = len(self.chain), at
        self.chain.append(through)
        self.sizes.append(sizes)

    def get(self, mine: Ints, name: str, *at: int) -> Floats:
        """A number of these meshes' chains, [mesh, ...]: a field of `Through`, or a place in it."""
        if (name, *at) not in self._stacks:
            values = map(operator.attrgetter(name), self.chain)
            rows = [np.moveaxis(np.asarray(v[at[0]] if at else v), -1, 0) for v in values]
            if name.endswith("freed"):  # of chains that recompute in fewer ways, pieces of nothing
                most = max(v.shape[1] for v in rows)
                rows = [padded(v, most, 1) for v in rows]
            self._stacks[name, *at] = np.stack(rows)
        found: Floats = self._stacks[name, *at][self.group[0, mine], self.group[1, mine]]
        return found

    def by_room(self, mine: Ints, states: States) -> list[tuple[Ints, bool, dict[Way, Held]]]:
        """Meshes that are all pipelines or none, apart by whether the host's memory may be too full
        for what they would lay there, which is weighed of these alone; with how they hold state, by
        way, where they stay together."""
        rows, sizes = self._rows(mine)
        kernels, pp = self.get(mine, "kernels_s"), self.pp[mine]
        aside = states.moves * self.get(mine, "kept") * self._in_flight(mine) / pp
        most = np.zeros(len(mine))
        ways = states.ways(bool(pp[0] > 1)) if states.pins.offload is None else ()
        found = {way: states.of(way, rows, sizes, kernels) for way in ways}
        for held in found.values():
            most = np.maximum(most, held.laid_bytes.get("cpu", most * 0) / pp + aside)
        tight = most > states.room_bytes(rows, "cpu")[0] if np.any(most) else most > 0
        if np.all(tight == tight[0]):
            return [(mine, bool(tight[0]), found)]
        return [(mine[tight == part], part, {}) for part in (False, True)]

    def _rows(self, mine: Ints) -> tuple[list[Mesh], list[Sizes]]:
        return (
            [self.candidates[i] for i in mine], [self.sizes[g] for g in self.group[0, mine]]
        )

    def shared_s(self, mine: Ints, states: States, limit: Floats, tight: bool) -> Floats:
        """As `least_s`, of each way to share the state by its own bytes and seconds."""
        least, limit = np.full(len(mine), np.inf), limit.copy()
        count = np.array([states.count(m) for m in self._rows(mine)[0]])
        for nth in range(count.max()):
            some = np.flatnonzero(count > nth)
            found, _, _ = self.least_s(mine[some], states.shared(nth), limit, tight, {})
            least[some] = np.minimum(least[some], found)
            limit[mine] = np.minimum(limit[mine], least)
        return least

    def least_s(
        self, mine: Ints, states: States, limit: Floats, tight: bool, known: Mapping[Way, Held]
    ) -> tuple[Floats, Floats, Floats]:
        """(bound, least tail, a guess at a rank's bytes beside activations) of meshes that are
        all pipelines or none. tight: room below is weighed. known: some
        ways to hold state."""
        rows, sizes = self._rows(mine)
        step, pp = self.get(mine, "step_s"), self.pp[mine]
        reserved = self.reserved[mine]
        room = self.costs.cluster.device.memory_bytes - reserved
        working, kernels = self.get(mine, "least_working"), self.get(mine, "kernels_s")
        kinds = {kind_of_schedule(name) for name in self._merged}
        chunks = range(2, self.most_virtual + 1) if self.apart else ()
        if "fused" in kinds:  # holds no more than GPipe: its bound is one of both
            kinds.discard("gpipe")
        least, tail, held_bytes = (np.full(len(mine), np.inf) for _ in range(3))
        found = {
            way: known.get(way) or states.of(way, rows, sizes, kernels)
            for way in states.ways(bool(pp[0] > 1), every_tier=tight)
        }
        rooms = {tier.name: states.room_bytes(rows, tier.name)
                 for tier in self.costs.cluster.tiers if tight}  # fmt: skip
        for way, held in found.items():
            left = [size[0] - held.laid_bytes.get(tier, 0.0) / pp for tier, size in rooms.items()]
            if left and np.any(some := np.minimum.reduce(left) < -SLACK_BYTES):
                held = replace(held, tail_s=np.where(some, np.inf, held.tail_s))
            tail = np.minimum(tail, held.tail_s / pp)
            if "optimizer" not in dict(way.offload) or way.offload == states.pins.offload:
                beside = 2 * self._wide(held.gathered_bytes[:, 1]) + held.state_bytes[:, 0] / pp
                held_bytes = np.minimum(held_bytes, reserved + working + beside)
            lower = states.lowered(way, found, bool(pp[0] > 1)) if self.by_layer else []
            both: list[Held | None] = [with_room(held, found[low], rooms, pp) for low in lower]
            if pp[0] == 1:
                for below in both or [None]:
                    least = np.minimum(
                        least, self._alone_s(mine, step, held, room, way, below, rooms.get("cpu"))
                    )
                continue
            at_most = np.minimum(least, limit[mine])
            programs = [(0, kind) for kind in sorted(kinds)] + [(v, "fused") for v in chunks]
            for v, kind in programs:
                alone = self.schedules & ALONE[kind] and not v
                for below in (both if alone else []) or [None]:
                    found_s = self._pipeline_s(
                        mine, step, held, room, kind, way, at_most, below, v, rooms.get("cpu")
                    )
                    least = np.minimum(least, found_s)
                    at_most = np.minimum(at_most, least)
        return least, tail, held_bytes

    @functools.cached_property
    def _counted(self) -> tuple[str, ...]:
        """What the layers of ranks are counted as: where other kinds are not few, also as what all
        layers are."""
        few = (self.layers - self.chain[0].layer.count) * FEW <= self.layers
        return ("layer",) if few else ("layer", "every")

    @property
    def _merged(self) -> frozenset[str]:
        """The schedules that are bounded together, by kind."""
        return self.schedules - {"interleaved"} if self.apart else self.schedules

    def _elsewhere(self, way: Way) -> bool:
        return "activations" in dict(way.offload)

    def _alone_s(
        self, mine: Ints, step: Floats, held: Held, room: Floats, way: Way, below: Held | None,
        host: Room | None,
    ) -> Floats:  # fmt: skip
        """One rank has the whole chain. What its transfers take each way, forward and backward, is
        hidden but for a share, or beyond what its kernels take meanwhile. below: the same with all
        optimizers below, which those of some layers may be, as far as there is room. host: the room
        in the host's memory, where that may be too full."""
        kept, working = self.get(mine, "kept"), self.get(mine, "working")
        over = held.state_bytes[:, 0] + working - room
        over = over + 2 * self._wide(held.gathered_bytes[:, 1])
        everywhere = over
        over = kept + over / self._in_flight(mine)
        freed = np.moveaxis(self.get(mine, "freed"), 0, -1)
        share, m = self.costs.engine.fsdp_interference, self.m[mine]
        at_once, low, ahead = self._in_flight(mine), self._lowering(mine), self.get(mine, "ahead_s")
        kernels = ahead, self.get(mine, "kernels_s") - ahead
        least, found = np.zeros(len(mine)), np.zeros(len(mine))
        if host is not None and not self._elsewhere(way):
            everywhere = everywhere + low.laid_bytes(held, below, room) - host[1]
            pieces = np.moveaxis(self.get(mine, "again_freed"), 0, -1)
            least = forced_s(pieces, kept + everywhere / at_once)
        # transfers take both of these at least, and those of layers that lie below as much of each
        if below is not None:
            size, rate = low.freed(held, below, room)
            copies = np.maximum(0.0, below.each_s - held.each_s) * low.learn
            whole = np.maximum(1.0, held.state_bytes[:, 0] - below.state_bytes[:, 0])
        else:
            again = 0.0 if self._elsewhere(way) else forced_s(freed, over)
        for hides in itertools.product((False, True), repeat=2):
            rest = [1.0 if hidden else share for hidden in hides]
            each = sum(
                part * s - hidden * k
                for part, s, hidden, k in zip(rest, held.each_s, hides, kernels)
            )
            if below is not None:
                price = rate / m + sum(part * s for part, s in zip(rest, copies)) / whole
                pieces = with_piece(freed, size / at_once, price * at_once)
                again = 0.0 if self._elsewhere(way) else forced_s(pieces, over)
            found = np.maximum(found, m * (step + np.maximum(again, least) + each) + held.tail_s)
        return found

    @functools.cached_property
    def _learn(self) -> NDArray[np.bool_]:
        """By chain, whether all its parameters learn; asked once all are filled in."""
        return np.array([np.array_equal(s.held[0], s.learnt[0]) for s in self.sizes])

    def _lowering(self, mine: Ints) -> Lowering:
        return Lowering(
            layers=self.layers, alike=self.chain[0].layer.count,
            learn=self._learn[self.group[0, mine]],
            fragmentation=self.costs.engine.fragmentation,
        )

    def _in_flight(self, mine: Ints) -> Ints:
        """Micro-batches that the first rank holds at once, at least."""
        m, pp = self.m[mine], self.pp[mine]
        held: Ints = np.minimum(m, pp)
        return np.where(pp > 1, m, held) if self.schedules == {"gpipe"} else held

    def _wide(self, size_bytes: Floats) -> Floats:
        return size_bytes * (1 + self.costs.engine.fragmentation)

    def _pipeline_s(
        self, mine: Ints, step: Floats, held: Held, room: Floats, kind: str, way: Way,
        at_most: Floats, below: Held | None, v: int = 0, host: Room | None = None,
    ) -> Floats:  # fmt: skip
        """Several ranks, under one kind of schedule; at_most: above it no bound is sharpened.
        below, host: as `_alone_s` has it. v: interleaved with so many chunks a rank, where it is.
        """
        pp, m, split = self.pp[mine], self.m[mine], kind in SPLIT_KINDS
        schedules = {"interleaved"} if v else self._merged
        chunks = v or 1 + (kind == "folded")
        if self.costs.engine.receives_apart:
            room = room - 2 * m * (chunks - 1) * self.sent[mine]
        own = 2 * self._own_sends(kind, v) * held.sends.each_s  # of a micro-batch, of each rank
        step = step + pp * own
        quickest, way_s = self.get(mine, "quickest_s"), self._way_s(mine, split, held.sends)
        each_way = way_s.cumsum(axis=1)[np.arange(len(mine)), pp - 1]  # of all ranks
        if self._elsewhere(way):
            again = np.zeros(len(mine))
        else:
            most, places, common = (np.zeros(len(mine)) for _ in range(3))
            others = self.layers - self.chain[0].layer.count  # ranks may have nothing but these
            for p in np.unique(pp):
                held_at_once = flight(int(p), m[pp == p], kind)
                if v:
                    held_at_once = chunk_flight(int(p), m[pp == p], v)[:, :, -1].astype(float)
                most[pp == p] = held_at_once.max(axis=1)
                each = np.sort(1 / held_at_once, axis=1)
                places[pp == p] = each.sum(axis=1)
                common[pp == p] = each[:, : max(0, int(p) - others)].sum(axis=1)
            left = room - self.get(mine, "least_working")
            state = held.state_bytes[:, 0]
            kept, freed = self.get(mine, "kept"), np.moveaxis(self.get(mine, "freed"), 0, -1)
            freed = freed[:0] if split else freed  # nothing is recomputed there
            gathered = 2 * self._wide(held.gathered_bytes[:, 1])
            mean = kept + state - pp * left + gathered * np.maximum(0, pp - others)
            by_place = kept + state / most - places * left + gathered * common
            if below is None:
                again = forced_s(freed, np.maximum(mean, by_place))
            else:
                size, rate = self._lowering(mine).freed(held, below, room)
                rate = rate / np.maximum(m + pp - 1, 2 * pp * m / (m + 1))  # `stage_bounds`' pieces
                again = np.maximum(
                    forced_s(with_piece(freed, size, rate), mean),
                    forced_s(with_piece(freed, size / most, rate * most), by_place),
                )
            if host is not None:
                laid = self._lowering(mine).laid_bytes(held, below, room)
                pieces = np.moveaxis(self.get(mine, "again_freed"), 0, -1)
                pieces = pieces[:0] if split else pieces
                again = np.maximum(again, forced_s(pieces, np.maximum(
                    mean + laid - pp * host[0], by_place + laid / most - places * host[1]
                )))  # fmt: skip
        least = (m * (step + again) + each_way) / pp
        fullest = -(-self.layers // pp)  # layers of the rank that has the most
        least = np.maximum(least, m * np.maximum(fullest * quickest + own, held.sends.busy_s))
        if not split:  # a micro-batch goes there and back
            hidden = 1 - self.costs.engine.p2p_exposed_interleaved if v else 0  # sends, but awaited
            there = step + again + 2 * hidden * held.sends.each_s * (pp * chunks - 1)
            there = there + 2 * held.sends.chain_slower_s(chunks, kind == "folded")
            last = quickest + self.get(mine, "last", 0)
            least = np.maximum(least, through_last_s(there, last, step + again, m, pp, bool(v)))
            middle = ((v or 2) - 1) / 2  # of two chunks at least
            sends = 2 * held.sends.before_chunk_s(middle, pp, hidden)
            most_v = v or self.most_virtual
            bubble = bubble_s(step + again, m, pp, self.layers, schedules, most_v, sends)
            least = np.maximum(least, bubble)
        if v:
            final = 2 * held.sends.before_chunk_s(v - 1, pp, hidden)
            rounds = m * (step + again) / pp + final + quickest * (pp - 1) / 2
            least = np.where(m % pp == 0, np.maximum(least, rounds), least)
            never = [schedule_illegal("interleaved", *row, v) is not None
                     for row in zip(pp.tolist(), m.tolist())]  # fmt: skip
            least = np.where(np.array(never) | (pp * v > self.layers), np.inf, least)
        tail = held.tail_s / pp
        near = np.flatnonzero(least + tail < at_most)
        if not self._elsewhere(way):
            for p in np.unique(pp[near]):
                some = near[pp[near] == p]
                for name in self._counted if below is None else ("layer",):
                    sharper = self._by_ranks(
                        mine, some, held, room, kind, way_s, own, int(p), below, v, name
                    )
                    least[some] = np.maximum(least[some], sharper)
        # what the ends keep stays, wherever layers' activations lie: of one micro-batch at least,
        # under GPipe of all
        at_once = m if kind == "gpipe" else np.ones(len(mine))
        alone = held.state_bytes[:, 2:4] + at_once[:, None] * self._ends(mine, 1)
        alone = alone + self._ends(mine, 2) - room[:, None]
        bound: Floats = np.where((alone > ROUNDING_BYTES).any(axis=1), np.inf, least + tail)
        return bound

    def _ends(self, mine: Ints, part: int) -> Floats:
        """[mesh, (first, last)]: of what is before and behind the layers seconds, bytes kept of a
        micro-batch, or working bytes."""
        return np.stack([self.get(mine, end, part) for end in ("first", "last")], axis=1)

    def _own_sends(self, kind: str, v: int) -> float:
        """Of a micro-batch's sends how many a rank's own time is taken by each way, at least."""
        engine = self.costs.engine
        single, several = engine.p2p_exposed, engine.p2p_exposed_interleaved
        if v or kind == "folded":
            return (v or 2) * several
        if kind != "fused" or "interleaved" not in self._merged:
            return single
        return min(single, 2 * several) if self._merged & {"1f1b", "gpipe"} else 2 * several

    def _way_s(self, mine: Ints, split: bool, by_mesh: Sends) -> Floats:
        """[mesh, rank]: from the first rank there and home, through as many of the first layers,
        and sent on from as many ranks."""
        ranks = int(self.pp[mine].max())
        sends = by_mesh.before(ranks)
        if split:
            return self.get(mine, "forward_s")[:, None] * np.arange(ranks) + sends
        chain, rows = self.costs.chain, [np.zeros(len(mine))]
        for i in chain.layers[: ranks - 1]:
            rows.append(rows[-1] + self.get(mine, "kinds_s", self.costs.kind_of[i]))
        return np.stack(rows, axis=1) + 2 * sends

    def _by_ranks(
        self, mine: Ints, some: Ints, held: Held, room: Floats, kind: str, way_s: Floats,
        own_s: Floats, pp: int, below: Held | None, v: int, name: str,
    ) -> Floats:  # fmt: skip
        """name: of the layers that are counted, the commonest kind or what all of them are."""
        these, chunks, part = mine[some], None, 1 if name == "layer" else 4
        count = getattr(self.chain[0], name).count
        if v:
            chain, common = self.costs.chain, self.chain[0].common
            others = [n for n, i in enumerate(chain.layers)
                      if part == 1 and self.costs.kind_of[i] != common]  # fmt: skip
            chunks = Chunks(count=v, filled=filled_chunks(pp, v, self.layers, others))
        working = self.get(these, f"{name}.working_bytes")
        working = working + 2 * self._wide(held.gathered_bytes[some, part])
        seconds, kept, uses = (self._ends(these, n) for n in range(3))
        more = np.maximum(0.0, uses - self.get(these, f"{name}.working_bytes")[:, None])
        if kind == "folded":  # one rank has both ends, and uses the larger
            more = np.stack([np.zeros(len(some)), more.max(axis=1)], axis=1)
        lowered = np.zeros((3, len(some)))
        if below is not None:
            lowered[0] = held.state_bytes[some, 1] - below.state_bytes[some, 1]
            rate = self._lowering(mine).freed(held, below, room)[1][some]
            lowered[1] = rate / (pp * self.m[these])
            copies = below.gathered_bytes[some, 1] - held.gathered_bytes[some, part]
            lowered[2] = 2 * self._wide(np.maximum(0.0, copies))
        rows = Rows(
            m=self.m[these].astype(float), layer_s=self.get(these, f"{name}.step_s"),
            state_bytes=held.state_bytes[some, part],
            kept_bytes=self.get(these, f"{name}.kept_bytes"),
            freed=self.get(these, f"{name}.freed"), room_bytes=room[some] - working, ends_s=seconds,
            ends_bytes=held.state_bytes[some, 2:4] + more, ends_kept=kept, way_s=way_s[some, :pp],
            own_s=own_s[some], lowered=lowered.T,
        )  # fmt: skip
        return ranks_s(rows, pp, count, kind, chunks, self.layers - count)

    def guess_s(
        self, mine: Ints, tail: Floats, held_bytes: Floats, most_virtual: int
    ) -> tuple[Floats, Floats]:
        """What a plan of the mesh may come to; and how late it is for what it seems to be over."""
        pp, m, layers = self.pp[mine], self.m[mine], self.layers
        step = self.get(mine, "step_s")
        again, beyond = self._again_s(mine, pp, m, held_bytes)
        guess = np.full(len(mine), np.inf)
        for v in range(1, most_virtual + 1):
            load = -(-layers // (pp * v)) * v * (step + again) / layers
            legal = (pp * v <= layers) & ((v == 1) | (m % pp == 0))
            guess = np.where(legal, np.minimum(guess, (m + (pp - 1) / v) * load), guess)
        late = LATE_S * np.minimum(beyond, MOST_BEYOND)
        return np.where(beyond > 0, LATE_S + late, np.minimum(guess + tail, LATE_S)), late

    def _again_s(self, mine: Ints, pp: Ints, m: Ints, held_bytes: Floats) -> tuple[Floats, Floats]:
        """A guess at what memory forces on the first rank, recomputation or copies to
        the host, as seconds of a micro-batch through the chain; and by how many GPUs' memory even
        all of it does not do."""
        gpu_bytes = self.costs.cluster.device.memory_bytes
        held = self._in_flight(mine) / pp
        over = self.get(mine, "kept") - (gpu_bytes - held_bytes) / held
        freed = np.moveaxis(self.get(mine, "freed"), 0, -1)
        beyond = np.maximum(0.0, over - freed[:, 0].sum(axis=0)) * held / gpu_bytes
        beyond = np.where(beyond * gpu_bytes > ROUNDING_BYTES, beyond, 0.0)
        return np.where(beyond > 0, 0.0, forced_s(freed, over)), beyond
