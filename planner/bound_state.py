"""What every way to hold a mesh's state holds and takes at least, of many meshes at once.

A way is a ZeRO stage, whether parameters are gathered again, and where the optimizer is. The more
ranks share a state the less each holds, so bytes are those where all data ranks share it; seconds
are the least of any sharing that the search tries. Each way is bounded by its own bytes and its
own seconds; sharper, and slower, each sharing by its own (`States.shared`).
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.decisions import Decisions
from cost_models.engines import ZeroMode
from cost_models.offload import below_bytes, parameter_copies_s, update_s
from cost_models.state import (
    COMPUTE_BYTES,
    MASTER_BYTES,
    MOMENT_BYTES,
    grad_bytes,
    held,
    in_torch,
    reserved_of,
    state_of,
    update_bytes,
)
from cost_models.step import Assignments, Costs
from cost_models.tiers import together
from planner.bound_sends import Sending, Sends, axes_of
from planner.bound_sharing import Shared, Sizes, in_table, sizes_of
from planner.decisions import Pins
from planner.legality import illegal
from planner.mesh import Mesh, outside
from planner.offloads import counts_layers, counts_state, grad_dtypes, off_host, offloads

Floats = NDArray[np.float64]
MANY = 10**9  # parameters of which a rate is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How state is held. offload as in `Decisions`."""

    zero: int
    reshard: bool
    offload: tuple[tuple[str, str], ...]
    grad_dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stacked:
    """What meshes are, whatever the way: their axes as floats, and `Sizes` as arrays, [mesh, part,
    (dense, expert)]; traffic: by (bytes of a gradient, ZeRO, whether rows are shared whole), as
    `States._traffic_of` has it; pieces: by the last two, as `States._pieces` has it; sends: by
    ZeRO, as `States._sends_of` has it. firsts: of meshes that share their state alike, whatever the
    batch, the first; which: of each mesh, whose place among these its like has."""

    meshes: Sequence[Mesh]
    firsts: Sequence[tuple[Mesh, Sizes]]
    which: NDArray[np.int64]
    axes: Floats
    held: Floats
    learnt: Floats
    traffic: dict[tuple[int, int, bool], Floats]
    pieces: dict[tuple[int, bool], tuple[Floats, Floats]]
    sends: dict[int, Sends]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Of one way, by mesh: [mesh, part] bytes of state and of one unit's transient copies; seconds
    of a step that all pp ranks together spend behind the last backward at least; [(forward,
    backward), mesh] seconds that a micro-batch's transfers take the whole chain, those of the host
    too, hidden or not; by tier below, bytes that all pp ranks lay there at least, a GPU each; what
    sends take; and the part of what would lie below that there is room for."""

    state_bytes: Floats
    gathered_bytes: Floats
    tail_s: Floats
    each_s: Floats
    laid_bytes: dict[str, Floats]
    sends: Sends
    share: Floats | float = 1.0


class States:
    """The state of candidates, by way."""

    def __init__(self, costs: Costs, pins: Pins) -> None:
        self.costs, self.pins = costs, pins
        self.sharings, self.sending = Shared(costs, pins), Sending(costs, pins)
        self._sizes: dict[tuple[bytes, ...], Sizes] = {}
        self._last: _Stacked | None = None
        self._nth: int | None = None  # of a mesh's sharings

    def shared(self, nth: int) -> States:
        """The same with the state of each mesh shared as the nth of its sharings has it, the most
        ranks first, or the last."""
        found = copy.copy(self)  # what is known of meshes is both's
        found._nth, found._last = nth, None
        return found

    def count(self, m: Mesh) -> int:
        """How many sharings a mesh has."""
        return max(len(self.sharings.of(m, zero).ranks) for zero in (0, 1))

    @property
    def by_layer(self) -> bool:
        """Whether the optimizer of some layers may lie below."""
        return counts_state(self.pins, self.costs.cluster, self.costs.workload.engine)

    @property
    def moves(self) -> bool:
        """Whether the activations of some layers may."""
        return counts_layers(self.pins, self.costs.cluster, self.costs.workload.engine)

    def ways(self, pipeline: bool, every_tier: bool = False) -> tuple[Way, ...]:
        """What the table and the pins allow, of those that hold and move the same the first: that
        depends on there being a pipeline. every_tier: state lies on others than the host's memory
        too, where no pin says where."""
        pins, found = self.pins, {}  # type: ignore[var-annotated]
        places = [*offloads(pins, self.costs.cluster)]
        if every_tier and pins.offload is None:
            engine, cluster = self.costs.workload.engine, self.costs.cluster
            for place in places:  # what is added is asked in turn
                on = off_host(Decisions(offload=place), pins, engine, cluster)
                places += [d.offload for d in on if d.offload not in places]
        held = [*itertools.product(
            places, grad_dtypes(pins, self.costs.engine, self.costs.cluster)
        )]  # fmt: skip
        for zero in (0, 1, 2, 3) if pins.zero is None else (pins.zero,):
            for reshard in (False, True) if zero == 3 and not pipeline else (False,):
                for offload, grad in held:
                    d = Decisions(
                        pp=2 if pipeline else 1, zero=zero, reshard=reshard, offload=offload
                    )
                    allowed = pins.reshard in (None, reshard)
                    if allowed and not illegal(d, self.costs.workload, scheduled=False):
                        way = Way(zero=zero, reshard=reshard, offload=offload, grad_dtype=grad)
                        mode = self.costs.engine.zero_mode(zero, reshard=reshard, pp=d.pp)
                        alike = replace(
                            mode, name="", call="", parameters_at_rest="", gradients_at_rest=""
                        )
                        found.setdefault((alike, zero > 0, in_torch(mode), offload, grad), way)
        return tuple(found.values())

    def lowered(self, way: Way, ways: Iterable[Way], pipeline: bool) -> list[Way]:
        """Of these, the ways of the same state with all optimizers below."""
        def alike(w: Way) -> tuple[object, ...]:
            mode = self.costs.engine.zero_mode(w.zero, reshard=w.reshard, pp=1 + pipeline)
            same = replace(
                mode, name="", call="", parameters_at_rest="", gradients_at_rest=""
            )
            return same, w.zero > 0, w.grad_dtype

        below = (w for w in ways if "optimizer" in dict(w.offload) and alike(w) == alike(way))
        return [] if way.offload else [*below]

    def sizes(self, laid: Assignments, ep: int, etp: int, layer: int) -> Sizes:
        """layer: the commonest kind of layer. A tied alias is left out."""
        costs, layers = self.costs, self.costs.chain.layers
        kinds = costs.kind_of
        ends = kinds[: layers[0]], kinds[layers[-1] + 1 :]
        parts = Counter(kinds), Counter([layer]), *map(Counter, ends)
        units = [(held(unit, laid[unit, is_layer], ep, etp), earlier)
                 for unit, is_layer, earlier in costs.kinds]  # fmt: skip
        found = sizes_of(units, parts, sorted({kinds[i] for i in layers}))
        return self._sizes.setdefault(found.same, found)

    def reserved(self, m: Mesh) -> float:
        """Bytes that a rank holds besides, with as few virtual stages as there may be."""
        sent, engine = self.sending.bytes(m), self.costs.engine
        return sum(size for _, size in reserved_of(self.costs.graph, axes_of(m), engine, sent))

    def _sends_of(self, stacked: _Stacked, zero: int) -> Sends:
        """Of the sharing that is asked about, if one is."""
        key = min(zero, 1)
        if key not in stacked.sends:
            outers: list[int | None] = [None] * len(stacked.meshes)
            if self._nth is not None:
                rows = [self.sharings.of(m, key) for m in stacked.meshes]
                outers = [int(row.outer[row.nth(self._nth)]) for row in rows]
            stacked.sends[key] = self.sending.of(stacked.meshes, outers)
        return stacked.sends[key]

    def room_bytes(self, meshes: Sequence[Mesh], name: str) -> tuple[Floats, Floats]:
        """Of each mesh, what a GPU may lay on a tier in the mean, and whatever others lay there."""
        cluster = self.costs.cluster
        tier = cluster.tier(name)
        gpus, most = cluster.sharers(tier), []
        for m in meshes:
            ranks = m.dp * m.cp * m.tp
            outer = max(outside(m, cluster, self.pins.dp_outer), default=1)
            most.append(tier.bytes / together(ranks // outer, ranks * m.pp // outer, gpus))
        count = np.array([m.dp * m.cp * m.tp * m.pp for m in meshes])
        return tier.bytes * -(-count // gpus) / count, np.array(most)

    def of(
        self, way: Way, meshes: Sequence[Mesh], sizes: Sequence[Sizes], kernels_s: Floats
    ) -> Held:
        """Bytes and seconds of a way, of meshes that are all pipelines or none.

        kernels_s: of a micro-batch through the chain: transfers hide behind these alone.
        """
        costs, engine = self.costs, self.costs.engine
        stacked = self._stacked(meshes, sizes)
        pp, m = stacked.axes[1], stacked.axes[3]
        some = Decisions(
            pp=2 if pp[0] > 1 else 1, zero=way.zero, reshard=way.reshard, offload=way.offload,
            grad_dtype=way.grad_dtype,
        )  # fmt: skip
        mode = engine.zero_mode(way.zero, reshard=way.reshard, pp=some.pp)
        fsdp = in_torch(mode)
        accumulates = ((m > 1) | (pp > 1) | (not fsdp))[:, None]
        pieces, moved = self._pieces(stacked, way.zero, fsdp)
        state, gathered, updated = self._bytes(
            some, mode, moved, pieces, stacked.learnt.sum(axis=2), accumulates
        )
        grad = grad_bytes(some, costs.workload, engine)
        reduce_all, gather, reduce = self._traffic_of(stacked, grad, way.zero, fsdp)
        once = mode.reduce_per_step * reduce + mode.gather_per_step * gather
        once = once + mode.all_reduce_per_step * reduce_all
        least = engine.dp_exposed_least
        behind = engine.dp_reduce_hidden * bool(
            mode.reduce_per_step or mode.all_reduce_per_step
        ) + engine.dp_gather_hidden * bool(mode.gather_per_step)
        tail = least * once + np.maximum(0.0, (1 - least) * once - behind * kernels_s[:, None])
        ahead = min(mode.gather_per_microbatch, 1)
        each = np.stack([
            ahead * gather,
            (mode.gather_per_microbatch - ahead) * gather + mode.reduce_per_microbatch * reduce,
        ])  # fmt: skip
        if self._nth is not None:
            ours = self._ours(stacked, way.zero)
            tail, each = np.where(ours, tail, np.inf), np.where(ours, each, np.inf)
        tail, each = tail.min(axis=1), each.min(axis=2)
        shard = pieces[0, :, 0]
        each = each + self._copies_s(some, shard, updated[:, 0])
        return Held(
            state_bytes=state, gathered_bytes=gathered, laid_bytes=self._laid(way, shard, updated),
            tail_s=tail + updated[:, 0] * self._update_s(some, way), each_s=each,
            sends=self._sends_of(stacked, way.zero),
        )  # fmt: skip

    def _laid(self, way: Way, shard: Floats, updated: Floats) -> dict[str, Floats]:
        """`below_bytes` of all links, before it rounds: [mesh] by tier. shard, updated: elements.
        """
        d = Decisions(zero=way.zero, offload=way.offload, grad_dtype=way.grad_dtype)
        some = replace(state_of((), d, self.costs.workload, self.costs.engine), updated=MANY)
        parts = [
            dict(below_bytes(self.costs.engine, self.costs.workload, d, state))
            for state in (some, replace(some, updated=0, shard=MANY))
        ]
        return {
            tier: (1 - 1e-9) * (parts[0][tier] * updated[:, 0] + parts[1][tier] * shard) / MANY
            for tier in parts[0]
        }

    def _stacked(self, meshes: Sequence[Mesh], sizes: Sequence[Sizes]) -> _Stacked:
        """The last one again where the meshes are the same list: every way asks for it."""
        if self._last is None or self._last.meshes is not meshes:
            axes = [(r.cp, r.pp, r.dp, r.microbatches, r.tp, r.ep, r.etp) for r in meshes]
            firsts: dict[tuple[int | Sizes, ...], tuple[Mesh, Sizes]] = {}
            keys = [(m.pp, m.tp, m.cp, m.dp, m.ep, m.etp, one) for m, one in zip(meshes, sizes)]
            for key, m, one in zip(keys, meshes, sizes):
                firsts.setdefault(key, (m, one))
            places = {key: i for i, key in enumerate(firsts)}
            self._last = _Stacked(
                meshes=meshes, axes=np.array(axes, dtype=float).T, traffic={}, pieces={}, sends={},
                firsts=tuple(firsts.values()), which=np.array([places[key] for key in keys]),
                held=np.stack([s.held for s in sizes]), learnt=np.stack([s.learnt for s in sizes]),
            )  # fmt: skip
        return self._last

    def _pieces(self, stacked: _Stacked, zero: int, fsdp: bool) -> tuple[Floats, Floats]:
        """[(held, learnt), mesh, part] elements of the fullest rank, and those that are moved:
        exactly of one sharing, else of all data ranks, and without what FSDP2 adds to move it."""
        key = min(zero, 1), fsdp
        if key not in stacked.pieces:
            ranks = [self._shared_by(m, key[0]) for m, _ in stacked.firsts]
            found = np.stack([
                self.sharings.pieces(one, dense, expert, fsdp)
                for (_, one), (dense, expert) in zip(stacked.firsts, ranks)
            ], axis=1)[:, stacked.which]  # fmt: skip
            moved = np.stack([stacked.held, stacked.learnt])
            if fsdp and self._nth is not None:
                moved = found * np.array(ranks)[stacked.which][None, :, None, :]
            stacked.pieces[key] = found.sum(axis=3), moved.sum(axis=3)
        return stacked.pieces[key]

    def _shared_by(self, m: Mesh, zero: int) -> tuple[int, int]:
        """How many ranks share what is dense, and experts: of one sharing, else all data ranks."""
        if self._nth is None:
            shard = m.dp * m.cp if zero else 1
            return shard, m.dp * m.cp * m.tp // (m.ep * m.etp) if zero else 1
        row = self.sharings.of(m, zero)
        dense, expert = row.ranks[row.nth(self._nth)].tolist()
        return dense, expert

    def _ours(self, stacked: _Stacked, zero: int) -> NDArray[np.bool_]:
        """[mesh, way to share]: whether it is of the sharing that is asked about."""
        assert self._nth is not None
        rows = [self.sharings.of(m, min(zero, 1)) for m, _ in stacked.firsts]
        return in_table([row.of_way == row.nth(self._nth) for row in rows])[stacked.which]

    def _traffic_of(self, stacked: _Stacked, grad: int, zero: int, fsdp: bool) -> Floats:
        """`Shared.moved_s` of all, [3, mesh, way to share], the last again where there are fewer.
        """
        key = grad, min(zero, 1), fsdp
        if key not in stacked.traffic:
            each = [self.sharings.moved_s(m, one, grad, zero, fsdp) for m, one in stacked.firsts]
            stacked.traffic[key] = np.moveaxis(in_table(each)[stacked.which], -1, 0)
        return stacked.traffic[key]

    def _bytes(
        self, d: Decisions, mode: ZeroMode, moved: Floats, pieces: Floats, learnt: Floats,
        accumulates: NDArray[np.bool_],
    ) -> tuple[Floats, Floats, Floats]:  # fmt: skip
        """`state_of` of many: (state, gathered, updated).

        moved, pieces: as `_pieces` has them; learnt: elements with a gradient.
        """
        (whole, moved_learnt), (piece, part) = moved, pieces
        workload, engine = self.costs.workload, self.costs.engine
        fsdp, wide = in_torch(mode), workload.precision == "fp32"
        compute, grad = COMPUTE_BYTES[workload.precision], grad_bytes(d, workload, engine)
        copy = engine.gradient_copy_bytes if grad > compute else 0
        own = MASTER_BYTES if wide else engine.master_bytes or compute
        master = 0 if (wide and not fsdp) or own < MASTER_BYTES else MASTER_BYTES
        below = "params" in dict(d.offload)
        offloaded = "optimizer" in dict(d.offload)
        gathered = np.zeros_like(whole)
        if mode.parameters_peak == "whole":
            state = compute * whole
        else:
            state = (0 if below else compute if wide or offloaded else own) * piece
            gathered = gathered + compute * whole
        if offloaded and fsdp and d.below is None:
            gathered = gathered + MASTER_BYTES * piece
        reduced = (own if fsdp else grad) * part * (not (below or (offloaded and fsdp)))
        summed = accumulates & (mode.gradients_peak == "whole")
        state = state + np.where(summed, np.maximum(grad * learnt, reduced), reduced)
        state = state + copy * np.where(summed, learnt, part)
        if grad < MASTER_BYTES:
            state = state + engine.shard_gradient_bytes * part
        if mode.gradients_peak == "units":
            gathered = gathered + grad * moved_learnt
        updated = part if mode.optimizer_at_rest == "shard" else learnt
        if not offloaded:
            moments = MOMENT_BYTES.get(workload.optimizer, 0.0)
            moments *= 1.0 if wide else engine.moment_share
            state = state + (master * (mode.parameters_peak == "whole") + moments) * updated
        if engine.live_parameters:
            gathered = np.minimum(gathered, (compute + grad) * engine.live_parameters // 2)
        return state, gathered, updated

    def _copies_s(self, d: Decisions, shard: Floats, updated: Floats) -> Floats:
        """Seconds that a micro-batch's parameters below are on their way, and their gradients, as
        `Held.each_s` has them."""
        none = state_of((), d, self.costs.workload, self.costs.engine)
        each = np.array([
            parameter_copies_s(self.costs.cluster, self.costs.engine, d, state)
            for state in (replace(none, shard=MANY), replace(none, updated=MANY))
        ]) / MANY  # fmt: skip
        found: Floats = each[0][:, None] * shard + each[1][:, None] * updated
        return found

    def _update_s(self, d: Decisions, way: Way) -> float:
        """Seconds of an update, of one parameter, at least."""
        costs, engine = self.costs, self.costs.engine
        if "optimizer" not in d.tiers:
            each = update_bytes(costs.workload.optimizer, engine.optimizer_bytes_per_parameter)
            return float(costs.kernels.memory_bound_s(each * MANY, 0)) / MANY
        state = replace(state_of((), d, costs.workload, engine), updated=MANY)
        below = update_s(costs.cluster, engine, costs.workload, d, state) / MANY
        return below if d.below is None else min(below, self._update_s(d.with_state(False), way))
