"""Collectives inside a unit, at every work point: tensor, expert and context parallelism."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from cost_models.collectives import collective_s
from cost_models.crossing import leaving
from cost_models.layout import WHOLE, Assignment, collective, moves
from cost_models.work import Floats, Work
from ir.backward import needed_again
from ir.graph import Node, Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Collectives of one place in a unit, per micro-batch: how many, and bytes of each and
    seconds of all, at each point. again: the unit's forward, run again whole, has them as well."""

    kind: str
    axis: str
    where: str
    backward: bool
    count: Floats
    size_bytes: Floats
    seconds: Floats
    hidden_s: Floats
    again: bool = True


def _row(
    work: Work, kind: str, axis: str, where: str, backward: bool, size: Floats, ranks: int,
    stride: int, exposed: float, count: int = 1, again: bool = True,
) -> Traffic:  # fmt: skip
    seconds = collective_s(work.cluster, kind, size, ranks, stride) * count
    return Traffic(
        kind=kind, axis=axis, where=where, backward=backward, count=work.zeros + count,
        size_bytes=size, seconds=seconds, hidden_s=seconds * (1 - exposed), again=again,
    )  # fmt: skip


def tp_traffic(unit: Unit, assignment: Assignment, work: Work) -> list[Traffic]:
    """The assignment's changes of placement; a vocabulary split over tp reduces its statistics."""
    if work.axes.tp == 1:
        return []
    rows = []
    # torch's checkpoint stops where backward has what it needs; a compiled unit runs as one
    stops = work.engine.recompute_grain == "op" and not work.engine.fused
    needed = needed_again(unit) if stops else {}
    for backward, found in enumerate(moves(unit, assignment)):
        for move in found:
            kind = collective(move.source, move.target)
            if kind:
                size = work.nbytes(unit.values[move.ref], WHOLE)
                again = not stops or any(needed.get(reader) for reader in move.readers)
                rows.append(_row(
                    work, kind, "tp", move.ref, bool(backward), size, work.axes.tp, 1,
                    work.engine.tp_exposed, again=again,
                ))  # fmt: skip
                regather = work.engine.sp_regather_backward and not backward
                if regather and kind == "all_gather":
                    rows.append(_row(
                        work, kind, "tp", f"{move.ref} again", True, size, work.axes.tp, 1,
                        work.engine.tp_exposed,
                    ))  # fmt: skip
    for node, option in zip(unit.nodes, assignment.chosen):
        logits = unit.values[node.inputs[0]] if node.op == "cross_entropy" else None
        if logits is not None and option.ins[0] == len(logits.shape) - 1:
            size = work.zeros + prod(work.sizes(unit.values[node.inputs[1]], WHOLE)) * 4.0
            rows.append(_row(
                work, "all_reduce", "tp", node.name, False, size, work.axes.tp, 1, 1.0, count=3
            ))  # fmt: skip
    return rows


def ep_traffic(unit: Unit, work: Work) -> list[Traffic]:
    """Rows to their experts and back, each way twice; gathered and reduced over etp: those of the
    busiest rank."""
    axes, rows = work.axes, []
    for node in unit.nodes:
        if node.op not in ("dispatch", "combine"):
            continue
        candidates = node.outputs[:1] if node.op == "dispatch" else tuple(
            unit.values[r] for r in node.inputs
        )  # fmt: skip
        size = np.maximum.reduce([work.nbytes(t, WHOLE) for t in candidates]) / axes.tp * work.skew
        for backward in (False, True):
            if axes.ep and axes.ep > 1:
                row = _row(
                    work, "all_to_all", "ep", node.name, backward, size, axes.ep, axes.etp,
                    work.engine.ep_exposed,
                )
                if work.engine.ep_dedupe:
                    seconds = _deduped_s(work, size, _copies(node, unit))
                    hidden = seconds * (1 - work.engine.ep_exposed)
                    row = replace(row, seconds=seconds, hidden_s=hidden)
                rows.append(row)
            if axes.etp > 1:
                kind = "all_gather" if (node.op == "dispatch") != backward else "reduce_scatter"
                rows.append(_row(
                    work, kind, "etp", node.name, backward, size * axes.etp, axes.etp, 1,
                    work.engine.ep_exposed,
                ))  # fmt: skip
    return rows


def _copies(node: Node, unit: Unit) -> float:
    """Experts a token goes to: the width of the index, [tokens, k]."""
    index = unit.values[node.inputs[-1]]
    return float(index.sizes(1, 1)[-1]) if len(index.shape) == 2 else 1.0


def _deduped_s(work: Work, size: Floats, copies: float) -> Floats:
    """Seconds to send each token once to each rank, and once over the network to each domain,
    that has one of its `copies` experts, uniformly routed; all at once. size: of all copies."""
    ep, stride = work.axes.ep or 1, work.axes.etp
    one = size / copies

    def met(places: int) -> float:
        return float(places * (1 - (1 - 1 / places) ** copies))

    shape = work.cluster.shape(ep, stride)
    found = collective_s(work.cluster, "all_to_all", one * met(ep), shape[0], stride)
    for members, rate, latency_s in leaving(work.cluster, shape):
        remote = one * met(ep // shape[0]) * (1 - members / ep)
        found = np.maximum(found, remote / rate + latency_s)
    return found


def _cp_row(
    work: Work, kind: str, where: str, backward: bool, size: Floats, steps: bool
) -> Traffic:
    """One cp collective at every point, each in its own group; steps: one send a ring step."""
    seconds = work.zeros
    count = work.cp - 1 if steps else np.minimum(work.cp - 1, 1.0)
    for cp in sorted({int(c) for c in work.cp}):
        here = work.cp == cp
        times = cp - 1 if steps else 1
        if cp == 1:
            continue
        if cp * work.axes.tp > work.cluster.count:  # a point of other meshes
            seconds = np.where(here, np.inf, seconds)
            continue
        one = collective_s(work.cluster, kind, size, cp, work.axes.tp)
        seconds = np.where(here, one * times, seconds)
    return Traffic(
        kind=kind, axis="cp", where=where, backward=backward, count=count, size_bytes=size,
        seconds=seconds, hidden_s=work.zeros,
    )  # fmt: skip


def cp_traffic(
    unit: Unit, assignment: Assignment, work: Work, attention_s: tuple[Floats, Floats]
) -> list[Traffic]:
    """Keys and values around the cp ranks: ring hides behind attention, the others do not."""
    if (work.cp == 1).all():
        return []
    rows = []
    for node, option in zip(unit.nodes, assignment.chosen):
        if node.op != "attention":
            continue
        shard = [work.nbytes(unit.values[r], at) for r, at in zip(node.inputs, option.ins)]
        q, kv, out = shard[0], shard[1] + shard[2], work.nbytes(node.outputs[0], option.outs[0])
        for backward in (False, True):
            times = 2 if backward else 1
            if work.axes.cp_kind == "ring":
                row = _cp_row(work, "p2p", node.name, backward, kv * times, True)
                hidden = np.minimum(
                    row.seconds * (1 - work.engine.cp_exposed), attention_s[int(backward)]
                )
                # backward: keys and values again, their gradients beside them, two sends a step
                rows.append(
                    replace(row, hidden_s=hidden, count=row.count * times, size_bytes=kv)
                )
            elif work.axes.cp_kind == "allgather":
                kinds = ("all_gather", "reduce_scatter") if backward else ("all_gather",)
                rows += [
                    _cp_row(work, kind, node.name, backward, kv * work.cp, False)
                    for kind in kinds
                ]
            else:
                rows += [
                    _cp_row(work, "all_to_all", f"{node.name} {what}", backward, size, False)
                    for what, size in (("q", q), ("kv", kv), ("out", out))
                ]
    return rows
