"""Lower bounds of many meshes at once, from unit costs alone; no solver, no schedule.

A step of m micro-batches on p stages takes m S / p + l (p - 1) / 2 at least: S is a micro-batch
through the whole chain and l through the quickest layer. For rank r waits for the r layers before
it and its last gradient goes back through them, so T >= m t_r + r l, and the t_r sum to S.
Recomputation, bubbles beyond that, data-parallel traffic and the optimizer only add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cost_models.decisions import Decisions
from cost_models.step import Assignments, Costs
from planner.mesh import Mesh

Assign = Callable[[int, bool], Assignments]  # (tp, sequence parallel) -> how units lie


def through_chain_s(costs: Costs, d: Decisions, assignments: Assignments) -> tuple[
    NDArray[np.float64], NDArray[np.float64]
]:  # fmt: skip
    """(whole chain, quickest layer) seconds of one micro-batch, forward and backward, at every
    work point, for the mesh's tp, cp kind and expert layout."""
    counts = np.bincount(costs.kind_of, minlength=len(costs.kinds))
    layers = {costs.kind_of[i] for i in costs.chain.layers}
    total, quickest = 0.0, np.inf
    for k, (unit, is_layer, _) in enumerate(costs.kinds):
        found = costs.unit(unit, is_layer, assignments[unit, is_layer], d)
        one = sum(
            c.forward_s + c.backward_s + c.host_forward_s + c.host_backward_s
            + sum(t.seconds - t.hidden_s for t in c.traffic)
            for c in found
        )  # fmt: skip
        total = total + counts[k] * one
        if k in layers:
            quickest = np.minimum(quickest, one)
    return np.asarray(total), np.asarray(quickest)


def mesh_bounds_ps(
    costs: Costs, candidates: Sequence[Mesh], assign: Assign
) -> NDArray[np.int64]:
    """A lower bound of each mesh's step objective, in picoseconds, rounded down."""
    point = {p: i for i, p in enumerate(costs.points)}
    groups: dict[tuple[int, bool, str, int, int], list[int]] = {}
    for i, m in enumerate(candidates):
        key = (m.tp, m.sequence_parallel, m.cp_kind, m.ep, m.etp)
        groups.setdefault(key, []).append(i)
    bounds = np.zeros(len(candidates))
    for (tp, split, kind, ep, etp), members in groups.items():
        d = replace(
            Decisions(), tp=tp, sequence_parallel=split, cp_kind=kind, ep=ep, etp=etp
        )
        total, quickest = through_chain_s(costs, d, assign(tp, split))
        rows = np.array([
            (point[candidates[i].micro_batch, candidates[i].cp], candidates[i].pp,
             candidates[i].microbatches)
            for i in members
        ])  # fmt: skip
        at, pp, m = rows.T
        bounds[members] = m * total[at] / pp + quickest[at] * (pp - 1) / 2
    # one part in a million below: the rounding of sums to picoseconds stays above the bound
    return np.floor(bounds * 1e12 * (1 - 1e-6)).astype(np.int64)
