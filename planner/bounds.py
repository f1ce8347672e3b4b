"""Lower bounds of many meshes at once, from unit costs alone; no solver, no schedule.

A step of m micro-batches on p stages takes m S / p + l (p - 1) / 2 at least: S is a micro-batch
through the whole chain and l through the quickest layer. For rank r waits for the r layers before
it and its last gradient goes back through them, so T >= m t_r + r l, and the t_r sum to S. Where
backward is split, weight gradients may run while that last one goes back: l is the forward alone.
And some rank has ceil(L / p) of the L layers.
Rank r holds the
activations of p - r micro-batches at once, so the ranks' memory bounds what a micro-batch keeps:
what does not fit is recomputed, at the best layer's seconds a byte.
Bubbles beyond that and the optimizer only add, and so does the least of what the ZeRO stages send.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.collectives import explain
from cost_models.decisions import Decisions
from cost_models.schedule import SPLIT_BACKWARD, V_SHAPED
from cost_models.state import COMPUTE_BYTES, GRAD_BYTES, Layout, held
from cost_models.step import Assignments, Costs
from planner.mesh import Mesh, divisors, outside

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ROUNDING_BYTES = 1e4  # of sums of bytes as floats
LATE_S = 1e5  # meshes that seem not to fit come behind all others, the nearest to fitting first
MOST_BEYOND = 50.0
Assign = Callable[[int, bool], Assignments]  # (tp, sequence parallel) -> how units lie


@dataclass(frozen=True, slots=True, kw_only=True)
class Through:
    """One micro-batch through the whole chain, forward and backward, at every work point.

    step_s: all of it; quickest_s: the quickest layer; forward_s: the quickest forward of one.
    kept: bytes by level (none, selective, full); again_s: what recomputing every layer adds,
    selective and full. relief_s_per_byte: the least time that recomputation takes for a byte it
    frees, of any layer and level.
    """

    step_s: Floats
    quickest_s: Floats
    forward_s: Floats
    kept: tuple[Floats, Floats, Floats]
    again_s: tuple[Floats, Floats]
    relief_s_per_byte: Floats


def through_chain(costs: Costs, d: Decisions, assignments: Assignments) -> Through:
    """Add up the chain for a mesh's tp, cp kind and expert layout."""
    counts = np.bincount(costs.kind_of, minlength=len(costs.kinds))
    layers = {costs.kind_of[i] for i in costs.chain.layers}
    zero = np.zeros(len(costs.points))
    step, quickest = zero, np.full(len(costs.points), np.inf)
    ahead = np.full(len(costs.points), np.inf)
    kept, again = [zero, zero, zero], [zero, zero]
    relief = np.full(len(costs.points), np.inf)
    for k, (unit, is_layer, _) in enumerate(costs.kinds):
        found = costs.unit(unit, is_layer, assignments[unit, is_layer], d)
        alone = found[0]
        one = sum(
            c.forward_s + c.backward_s + c.host_forward_s + c.host_backward_s
            + sum(t.seconds - t.hidden_s for t in c.traffic)
            for c in found
        )  # fmt: skip
        step = step + counts[k] * one
        if k in layers:
            quickest = np.minimum(quickest, one)
            whole = sum(
                c.forward_s + sum(t.seconds - t.hidden_s for t in c.traffic if not t.backward)
                for c in found
            )
            ahead = np.minimum(ahead, whole)
            none = alone.kept_bytes[0]
            for spent, less in ((alone.light_s, 1), (whole, 2)):
                freed = np.maximum(none - alone.kept_bytes[less], 1e-9)
                relief = np.minimum(relief, spent / freed)
            again = [again[0] + counts[k] * alone.light_s, again[1] + counts[k] * whole]
        level = (0, 1, 2) if k in layers else (0, 0, 0)
        kept = [a + counts[k] * alone.kept_bytes[n] for a, n in zip(kept, level)]
    return Through(
        step_s=step, quickest_s=quickest, forward_s=ahead, kept=(kept[0], kept[1], kept[2]),
        again_s=(again[0], again[1]), relief_s_per_byte=relief,
    )  # fmt: skip


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
    elsewhere: bool = False,
    dp_outer: int | None = None,
) -> Bounds:
    """Bound every mesh: its units through the pipeline, and the least data-parallel tail.

    schedules: any of them may run. elsewhere: what needs memory here is not
    on the GPU, so memory forces nothing. dp_outer: as pinned.
    """
    point = {p: i for i, p in enumerate(costs.points)}
    groups: dict[tuple[int, bool, str, int, int], list[int]] = {}
    for i, m in enumerate(candidates):
        key = (m.tp, m.sequence_parallel, m.cp_kind, m.ep, m.etp)
        groups.setdefault(key, []).append(i)
    bounds, guesses = np.zeros(len(candidates)), np.zeros(len(candidates))
    layers = len(costs.chain.layers)
    kinds = {(name in SPLIT_BACKWARD, name in V_SHAPED) for name in (*schedules, "1f1b")}
    tails = _States(costs, dp_outer)
    for (tp, split, kind, ep, etp), members in groups.items():
        d = replace(
            Decisions(), tp=tp, sequence_parallel=split, cp_kind=kind, ep=ep, etp=etp
        )
        laid = assign(tp, split)
        through = through_chain(costs, d, laid)
        rows = [candidates[i] for i in members]
        at = np.array([point[m.micro_batch, m.cp] for m in rows])
        pp, m = np.array([(row.pp, row.microbatches) for row in rows]).T
        step, quickest = through.step_s[at], through.quickest_s[at]
        fullest = -(-layers // pp)  # layers of the rank that has the most
        tail = np.array([tails.least_s(row, laid, s) for row, s in zip(rows, step)])
        state = np.array([tails.surely(r, laid) for r in rows])
        gpu_bytes = costs.cluster.device.memory_bytes
        through_all = np.full(len(rows), np.inf)
        for split, folded in kinds:
            room, most = _room(pp, m, folded)
            over = through.kept[0][at] + np.maximum(
                state - pp * gpu_bytes, state / most - room * gpu_bytes
            )
            over = np.maximum(over, 0.0) * (not elsewhere)
            if split:  # nothing is recomputed: what does not fit cannot run
                least = m * step / pp + through.forward_s[at] * (pp - 1) / 2
                least = np.where((over > ROUNDING_BYTES) | (pp == 1), np.inf, least)
            else:
                forced = over * through.relief_s_per_byte[at]
                least = m * (step + forced) / pp + quickest * (pp - 1) / 2
            through_all = np.minimum(through_all, least)
        bounds[members] = tail + np.maximum(through_all, m * fullest * quickest)
        state = np.array([tails.state(r, laid) for r in rows])
        again, beyond = _again_s(costs, through, at, pp, m, state)
        guess = np.full(len(rows), np.inf)
        for v in range(1, most_virtual + 1):
            load = -(-layers // (pp * v)) * v * (step + again) / layers
            legal = (pp * v <= layers) & ((v == 1) | (m % pp == 0))
            guess = np.where(legal, np.minimum(guess, (m + (pp - 1) / v) * load), guess)
        late = LATE_S * (1 + np.minimum(beyond, MOST_BEYOND))
        guesses[members] = np.where(beyond > 0, late, np.minimum(guess + tail, LATE_S))
    # one part in a million below: the rounding of sums to picoseconds stays above the bound
    return Bounds(
        lower_ps=np.floor(bounds * 1e12 * (1 - 1e-6)).astype(np.int64),
        guess_ps=np.floor(guesses * 1e12).astype(np.int64),
    )


def _room(pp: Ints, m: Ints, folded: bool) -> tuple[Floats, Floats]:
    """(GPUs' worth of memory for one micro-batch's activations, the most in flight on a rank).

    When it first goes backward, rank r holds min(m, p - r) micro-batches of every chunk or more,
    under GPipe, 1F1B, interleaved and ZB-H1, whatever the sizes of its chunks; a schedule folded
    in a V is taken to hold one.
    """
    if folded:
        return pp.astype(float), np.ones(len(pp))
    room = [sum(1 / min(int(n), k) for k in range(1, int(p) + 1)) for p, n in zip(pp, m)]
    return np.array(room), np.minimum(m, pp).astype(float)


def _again_s(
    costs: Costs, through: Through, at: Ints, pp: Ints, m: Ints, state_bytes: Floats
) -> tuple[Floats, Floats]:
    """A guess at the recomputation that memory forces on the first rank under 1F1B, as seconds of
    a micro-batch through the chain; and by how many GPUs' memory even all of it does not do."""
    gpu_bytes = costs.cluster.device.memory_bytes
    room = gpu_bytes - state_bytes
    held = np.minimum(m, pp) / pp
    none, some, full = (held * k[at] for k in through.kept)
    light, heavy = (t[at] for t in through.again_s)
    in_part = np.clip((none - room) / np.maximum(none - some, 1.0), 0, 1)
    in_full = np.clip((none - room) / np.maximum(none - full, 1.0), 0, 1)
    by_part = np.where(some <= room, in_part * light, np.inf)
    again = np.where(none <= room, 0.0, np.minimum(by_part, in_full * heavy))
    return again, np.maximum(0.0, np.minimum(none, full) - room) / gpu_bytes


class _States:
    """A mesh's state: the least data-parallel time, of all ZeRO stages and of the fullest rank,
    and a guess at its bytes.

    A rank's collectives take at least their summed bytes over the bandwidth, and some rank holds
    the mean of the bytes.
    """

    def __init__(self, costs: Costs, dp_outer: int | None) -> None:
        self.costs, self.dp_outer = costs, dp_outer
        self.known: dict[tuple[int, ...], tuple[float, float, float]] = {}
        self.sizes: dict[tuple[int, int, int], tuple[int, int]] = {}

    def least_s(self, m: Mesh, laid: Assignments, step_s: float) -> float:
        """Seconds a step, at least; step_s: a micro-batch through the chain.

        The cheapest mode: everything once a step, or each micro-batch's traffic, of which a layer
        pays a share though hidden, and all that is longer than its compute. Parameters that no
        GPU holds whole are gathered twice each micro-batch.
        """
        if m.dp * m.cp == 1:
            return 0.0
        key = (m.pp, m.tp, m.cp, m.dp, m.ep, m.etp)
        if key not in self.known:
            self.known[key] = self._traffic_s(m, laid)
        once, gather, reduce = self.known[key]
        if m.pp > 1:
            return once
        share = self.costs.engine.fsdp_interference

        def each(traffic_s: float) -> float:
            return m.microbatches * max(share * traffic_s, traffic_s - step_s)

        dense, expert = self._elements(m, laid)
        compute = COMPUTE_BYTES[self.costs.workload.precision]
        if compute * (dense + expert) > self.costs.cluster.device.memory_bytes:
            return each(2 * gather + reduce)
        return min(once, each(reduce), each(gather + reduce))

    def state(self, m: Mesh, laid: Assignments) -> float:
        """A guess at a rank's state and reserves, in bytes: parameters and gradients whole under
        a pipeline, all sharded without."""
        dense, expert = self._elements(m, laid)
        grad = GRAD_BYTES[self.costs.engine.grad_dtype]
        compute = COMPUTE_BYTES[self.costs.workload.precision]
        edp = m.dp * m.cp * m.tp // (m.ep * m.etp)
        shared = dense / (m.dp * m.cp) + expert / edp
        whole = (compute + grad) * (dense + expert) if m.pp > 1 else (4 + grad) * shared
        unit = (compute + grad) * 2 * (dense + expert) / len(self.costs.kind_of)
        return (whole + 12 * shared) / m.pp + (unit if m.pp == 1 else 0.0) + 3e9

    def surely(self, m: Mesh, laid: Assignments) -> float:
        """Bytes that all pp ranks together hold beside activations, at least: gradients and the
        parameters' copies in the leanest ZeRO stage, the optimizer's state elsewhere."""
        dense, expert = self._elements(m, laid)
        item = COMPUTE_BYTES[self.costs.workload.precision] + min(GRAD_BYTES.values())
        if m.pp > 1:
            return item * (dense + expert)
        if m.dp * m.cp == m.microbatches == 1:  # gradients may leave as they are made
            item -= min(GRAD_BYTES.values())
        edp = m.dp * m.cp * m.tp // (m.ep * m.etp)
        return item * (dense / (m.dp * m.cp) + expert / edp)

    def _elements(self, m: Mesh, laid: Assignments) -> tuple[int, int]:
        """(dense, expert) local elements of the whole chain, a tied alias left out."""
        key = (m.tp, m.ep, m.etp)
        if key not in self.sizes:
            dense = expert = 0
            for k in self.costs.kind_of:
                unit, is_layer, earlier = self.costs.kinds[k]
                for h in held(unit, laid[unit, is_layer], m.ep, m.etp):
                    if h.name in earlier:
                        continue
                    dense, expert = dense + h.elements * (not h.expert), expert + (
                        h.elements * h.expert
                    )
            self.sizes[key] = (dense, expert)
        return self.sizes[key]

    def _traffic_s(self, m: Mesh, laid: Assignments) -> tuple[float, float, float]:
        """(everything once a step and exposed, one gather, one reduction) seconds of the mean
        rank, at least: bytes over the group's bandwidth; no grouping of the ranks moves fewer."""
        costs, engine = self.costs, self.costs.engine
        dense, expert = self._elements(m, laid)
        grad = 4 if costs.workload.precision == "fp32" else min(GRAD_BYTES.values())
        edp = m.dp * m.cp * m.tp // (m.ep * m.etp)

        dense_group = (dense, m.dp * m.cp, m.tp)
        expert_group = (expert, edp, m.ep * m.etp)
        gpus = m.pp * m.dp * m.cp * m.tp
        outers = [n for n in outside(m, costs.cluster, self.dp_outer) if n > 1]

        def once(kind: str, item: int, groups: tuple[tuple[int, int, int], ...]) -> float:
            return sum(
                n * item / m.pp * min(
                    f.s_per_byte for layout in lying(size, stride)
                    for f in explain(costs.network, kind, *layout).forms
                )
                for n, size, stride in groups if n and size > 1
            )  # fmt: skip

        def lying(size: int, stride: int) -> list[Layout]:
            """A group in a row, and, where it is all of them, with some outside the pipeline."""
            apart = outers if size * stride * m.pp == gpus else []
            return [
                (size, stride, (1, 1)),
                *((size // n, stride, (n, gpus // n)) for n in apart),
            ]

        compute = COMPUTE_BYTES[costs.workload.precision]
        whole = (dense_group, expert_group)
        domain = costs.cluster.domain_ranks
        # HSDP gathers inside a domain; where experts leave none of it, from nobody
        inside = tuple(
            (n, next(k for k in divisors(size)[::-1] if k == 1 or k * stride <= domain), stride)
            for n, size, stride in whole
        )
        reduce = once("reduce_scatter", grad, whole)
        gather = min(once("all_gather", compute, whole), once("all_gather", compute, inside))
        all_reduce = once("all_reduce", grad, whole)
        hidden = engine.dp_reduce_hidden or engine.dp_gather_hidden
        share = engine.dp_exposed_least if hidden else 1.0
        return share * min(all_reduce, reduce + gather), gather, reduce
