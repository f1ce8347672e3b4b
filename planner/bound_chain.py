"""What a micro-batch takes and keeps through the whole chain, of one way to lay a model out.

Sums of unit costs at every work point: what bounds of many meshes are made of.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.decisions import Decisions, Keep
from cost_models.offload import host_s
from cost_models.step import Assignments, Costs
from cost_models.unit_costs import UnitCost
from planner.bound_ranks import Layers, freed, freed_by, least_layer
from planner.offloads import HOST, beside_host

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Through:
    """One micro-batch through the whole chain, forward and backward, at every work point.

    step_s: all of it; kernels_s: what of it transfers hide behind, of that ahead_s in forward;
    quickest_s: the quickest layer, forward_s: its forward alone. kept: bytes, nothing recomputed.
    freed: all that recomputation can free: [piece, (bytes, seconds a byte), point], the cheapest
    piece first; again_freed: where nothing moves to the host's memory, but may to other tiers.
    working: the least that any choice uses. layer: the commonest kind; every: what all layers are,
    the least of all kinds; first, last: (seconds, bytes kept, the most that is used) before the
    first layer and behind the last. kinds_s: one link of each kind.
    """

    step_s: Floats
    kernels_s: Floats
    ahead_s: Floats
    quickest_s: Floats
    forward_s: Floats
    kept: Floats
    freed: Floats
    again_freed: Floats
    working: Floats
    least_working: Floats
    common: int
    layer: Layers
    every: Layers
    first: tuple[Floats, Floats, Floats]
    last: tuple[Floats, Floats, Floats]
    kinds_s: tuple[Floats, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One link of the chain at every work point: seconds, of kernels alone, of these in forward,
    and of all forward; bytes kept and the least that it uses; what recomputation frees, where it is
    a layer, as `Through` has it.
    """

    step_s: Floats
    kernels_s: Floats
    ahead_s: Floats
    forward_s: Floats
    kept_bytes: Floats
    working_bytes: Floats
    freed: Floats
    again_freed: Floats


Units = tuple[UnitCost, ...]  # a unit at every work point: alone, its experts, its context
Known = dict[tuple[int, ...], Link]  # by the identity of costs that outlive it


def through_chain(
    costs: Costs, d: Decisions, assignments: Assignments, keeps: Sequence[Keep] = (),
    moves: bool = False, known: Known | None = None, repeats: bool = True,
) -> Through:  # fmt: skip
    """Add up the chain for a mesh's tp, cp kind and expert layout. keeps: what its layers may keep
    in part beside what d says. moves: a layer may lie below as well as be recomputed. known:
    links of chains of the same costs, which units without experts have in common. repeats: layers
    may be recomputed in full."""
    known = {} if known is None else known
    counts = np.bincount(costs.kind_of, minlength=len(costs.kinds))
    places = costs.chain.layers
    of_layers = np.bincount([costs.kind_of[i] for i in places], minlength=len(costs.kinds))
    zero = np.zeros(len(costs.points))
    step, busy, early, quickest = zero, zero, zero, np.full(len(costs.points), np.inf)
    ahead = np.full(len(costs.points), np.inf)
    kept, working = zero, zero
    least_working = np.full(len(costs.points), np.inf)
    all_freed, all_again, each, layers = [], [], [], {}
    otherwise = [replace(d, keep=keep) for keep in keeps]
    for k, (unit, is_layer, _) in enumerate(costs.kinds):
        found = costs.unit(unit, is_layer, assignments[unit, is_layer], d)
        others = [
            costs.unit(unit, is_layer, assignments[unit, is_layer], way)
            for way in (otherwise if of_layers[k] else ())
        ]
        held, in_stack = (*found, *itertools.chain(*others)), bool(of_layers[k])
        key = (*map(id, held), in_stack, repeats)
        if key not in known:
            known[key] = _link(costs, found, others, moves, in_stack, repeats)
        one = known[key]
        step = step + counts[k] * one.step_s
        busy = busy + counts[k] * one.kernels_s
        early = early + counts[k] * one.ahead_s
        each.append((one.step_s, one.kept_bytes, one.working_bytes))
        if of_layers[k]:
            quickest = np.minimum(quickest, one.step_s)
            ahead = np.minimum(ahead, one.forward_s)
            layers[k] = Layers(
                count=int(of_layers[k]), step_s=one.step_s, kept_bytes=one.kept_bytes,
                working_bytes=one.working_bytes, freed=one.freed, again_freed=one.again_freed,
            )  # fmt: skip
            each_kind = np.array([of_layers[k], 1.0])[:, None]
            all_freed.append(one.freed * each_kind)
            all_again.append(one.again_freed * each_kind)
            least_working = np.minimum(least_working, one.working_bytes)
        working = np.maximum(working, one.working_bytes)
        kept = kept + counts[k] * one.kept_bytes
    # the kind that holds the most of the state: of kinds alike, the commonest
    common = max(layers, key=lambda k: layers[k].count * costs.kinds[k][0].parameter_count)

    def end(links: range) -> tuple[Floats, Floats, Floats]:
        rows = [each[costs.kind_of[i]] for i in links]
        work = [zero, *(w for _, _, w in rows)]
        return (
            sum((t for t, _, _ in rows), zero), sum((b for _, b, _ in rows), zero),
            np.maximum.reduce(work),
        )

    def in_order(all_pieces: list[Floats]) -> Floats:
        pieces = np.concatenate(all_pieces)
        return np.take_along_axis(pieces, np.argsort(pieces[:, 1:], axis=0), axis=0)

    return Through(
        step_s=step, kernels_s=busy, ahead_s=early, quickest_s=quickest, forward_s=ahead, kept=kept,
        freed=in_order(all_freed), again_freed=in_order(all_again), working=working,
        least_working=least_working, common=common, layer=layers[common],
        every=least_layer(list(layers.values())),
        first=end(range(places[0])), last=end(range(places[-1] + 1, len(costs.kind_of))),
        kinds_s=tuple(row[0] for row in each),
    )  # fmt: skip


def _link(
    costs: Costs, found: Units, others: Sequence[Units], moves: bool, is_layer: bool, repeats: bool
) -> Link:
    """One link of its unit's costs; others: the same with other operations kept in part."""
    wide, zero = 1 + costs.engine.fragmentation, np.zeros(len(costs.points))
    one = sum(
        (c.forward_s + c.backward_s + c.host_forward_s + c.host_backward_s
         + sum(t.seconds - t.hidden_s for t in c.traffic)
         for c in found), zero,
    )  # fmt: skip
    holds = [wide * sum((c.kept_bytes[n] for c in found), zero) for n in range(3)]
    uses = [wide * sum((c.working_bytes[n] for c in found), zero) for n in range(3)]
    kernels = sum((c.forward_s for c in found), zero), sum((c.backward_s for c in found), zero)
    times = {"step_s": one, "kernels_s": kernels[0] + kernels[1], "ahead_s": kernels[0]}
    if not is_layer:
        return Link(**times, forward_s=zero, kept_bytes=holds[0], working_bytes=uses[0],
                    freed=zero, again_freed=zero)  # fmt: skip
    whole = sum(
        (c.forward_s + sum(t.seconds - t.hidden_s for t in c.traffic if not t.backward)
         for c in found), zero,
    )  # fmt: skip
    light = sum((c.light_s for c in found), zero)
    ways = [(holds[1], light), (holds[2], whole)][: 1 + repeats]
    pieces = again = freed(holds, light, whole) if repeats else freed_by(holds[0], ways)
    if others or moves:
        for other in others:
            held = wide * sum((c.kept_bytes[1] for c in other), zero)
            ways.append((held, sum((c.light_s for c in other), zero)))
        elsewhere, on_host = (
            [(zero, _moved_s(costs, holds[0] / wide, kernels, tier)) for tier in tiers * moves]
            for tiers in (beside_host(costs.cluster), (HOST,))
        )
        again = freed_by(holds[0], ways + elsewhere)
        pieces = freed_by(holds[0], ways + on_host)
    return Link(
        **times, forward_s=whole, kept_bytes=holds[0],
        working_bytes=np.minimum.reduce(uses[: 2 + repeats]), freed=pieces, again_freed=again,
    )  # fmt: skip


def _moved_s(
    costs: Costs, kept_bytes: Floats, kernels: tuple[Floats, Floats], tier: str
) -> Floats:
    """Seconds that a layer's copies to a tier and back add at least: nothing else is on the link,
    or waits behind the same kernels."""
    share, added = costs.engine.fsdp_interference, np.zeros_like(kept_bytes)
    for compute, up in zip(kernels, (False, True)):
        takes = np.asarray(host_s(costs.cluster, kept_bytes, up=up, tier=tier))
        added = added + np.maximum(share * takes, takes - compute)
    return added
