"""What one unit costs one rank, per micro-batch: seconds by name, bytes kept, collectives.

Everything is computed for many work points (micro-batch, cp and local sequence) at once. Sizes
come from the graph's monomials, split by the unit's assignment on tp, by cp on the sequence, and
by ep and etp on experts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from cost_models.engines import Engine
from cost_models.kernels import CAST_BYTES, heavy_s, light_s, lights
from cost_models.layout import PARTIAL, WHOLE, Assignment, produced
from cost_models.traffic import Traffic, cp_traffic, ep_traffic, tp_traffic
from cost_models.work import Floats, Work
from ir.backward import HEAVY, differentiable, storage_roots
from ir.graph import ITEM_BYTES, Node, Unit
from ir.ops import rule


@dataclass(frozen=True, kw_only=True)
class UnitCost:
    """Per micro-batch and rank, arrays over work points.

    forward_s, backward_s: kernels. weight_s: the part of backward that makes weight gradients
    alone. light_s: forward of what selective recomputation repeats.
    host_forward_s, host_backward_s: what the host adds. traffic: collectives inside the unit.
    kept_bytes: by recomputation level. working_bytes: transient, by level. flop: executed here,
    forward and backward; model_flop: the unit's model math, whole micro-batch, forward.
    attention_s: forward and backward of attention alone, which hides a ring's steps.
    """

    forward_s: Floats
    backward_s: Floats
    weight_s: Floats
    light_s: Floats
    host_forward_s: Floats
    host_backward_s: Floats
    traffic: tuple[Traffic, ...]
    kept_bytes: tuple[Floats, Floats, Floats]
    working_bytes: tuple[Floats, Floats, Floats]
    flop: tuple[Floats, Floats]
    model_flop: Floats
    kernels: int
    attention_s: tuple[Floats, Floats]

    def exposed_s(self, axis: str, *, backward: bool) -> Floats:
        """Traffic of an axis that nothing hides."""
        rows = [t for t in self.traffic if t.axis == axis and t.backward is backward]
        return sum((t.seconds - t.hidden_s for t in rows), np.zeros_like(self.forward_s))


learns_of = functools.cache(differentiable)  # of a unit, which costing asks for at every point


def _kept(
    unit: Unit, names: tuple[str, ...], assignment: Assignment, at: Mapping[str, int], work: Work
) -> Floats:
    """Bytes of kept values. A reader that gathers a split value keeps what it gathered, unless
    the engine gathers again in backward."""
    roots = storage_roots(unit)
    wanted = set(names)
    widest = {r: at[r] for r in names}
    if not work.engine.sp_regather_backward:
        for node, option in zip(unit.nodes, assignment.chosen):
            if rule(node).kind not in HEAVY:
                continue
            for ref, target in zip(node.inputs, option.ins):
                if target == WHOLE and roots[ref] in wanted:
                    widest[roots[ref]] = WHOLE
    shared = {n for n, _ in unit.inputs if n not in unit.diff_inputs}
    return sum(
        (work.nbytes(unit.values[r], widest[r]) for r in names if r not in shared), work.zeros
    )


def _whole(unit: Unit, assignment: Assignment, at: Mapping[str, int]) -> tuple[str, ...]:
    """Values that are split, and whole for a moment: gathered for a reader, or partial sums."""
    found = dict[str, None]()
    for node, option in zip(unit.nodes, assignment.chosen):
        for ref, target in zip(node.inputs, option.ins):
            if target == WHOLE and at[ref] >= 0:
                found[ref] = None
        for ref, made in zip(node.refs(), option.outs):
            if made == PARTIAL and at[ref] >= 0:
                found[ref] = None
    return tuple(r for r in found if r not in unit.parameter_names)


def _logits(unit: Unit) -> tuple[str, ...]:
    """Values of the logits' elements in a unit with the loss: they, their copies, gradients."""
    asked = [n.inputs[0] for n in unit.nodes if n.op == "cross_entropy"]
    if not asked:
        return ()
    elements = prod(unit.values[asked[0]].sizes(1, 1))
    return tuple(
        r for r, t in unit.values.items()
        if r not in unit.parameter_names and prod(t.sizes(1, 1)) == elements
    )  # fmt: skip


def _returned(unit: Unit) -> tuple[str, ...]:
    """What experts return: results of grouped matmuls that no other grouped matmul reads."""
    leads = _leads(unit)
    return tuple(n.name for n in unit.nodes if n.op == "grouped_matmul" and n.name not in leads)


def _leads(unit: Unit) -> set[str]:
    """Values that grouped matmuls are made of."""
    leads = set[str]()
    for node in reversed(unit.nodes):
        if node.op == "grouped_matmul" or any(r in leads for r in node.refs()):
            leads.update(node.inputs)
    return leads


def _repeated(unit: Unit, engine: Engine) -> tuple[str, ...]:
    """Matmuls that selective recomputation repeats: none, or every second one."""
    linear = tuple(n.name for n in unit.nodes if n.op == "linear")
    return linear[1::2] if engine.selective == "alternate" else ()


def _selective(unit: Unit, engine: Engine) -> tuple[str, ...]:
    """What selective recomputation keeps: the cheapest that the matmuls' results lead to; where
    it repeats some of them, all that heavy operations made but those."""
    if engine.selective != "alternate":
        return unit.saved_selective
    wanted, repeated = set(unit.saved_selective), _repeated(unit, engine)
    kept = [name for name, _ in unit.inputs if name in wanted]
    for node in unit.nodes:
        if node.op == "linear":
            kept += () if node.name in repeated else (node.name,)
        elif rule(node).kind in HEAVY:
            kept += (r for r in node.refs() if r in wanted)
    return tuple(kept)


def unit_cost(unit: Unit, assignment: Assignment, work: Work) -> UnitCost:
    """Cost a unit under an assignment at every work point."""
    learns, at = learns_of(unit), produced(unit, assignment)
    forward, backward, light, weight = work.zeros, work.zeros, work.zeros, work.zeros
    flop_f, flop_b, model, kernels = work.zeros, work.zeros, work.zeros, 0
    attention_s = (work.zeros, work.zeros)
    repeated = _repeated(unit, work.engine)
    for node, option in zip(unit.nodes, assignment.chosen):
        op = rule(node)
        if op.kind == "grouped_gemm":
            model = model + 2.0 * prod(_whole_sizes(node, unit, work)[0]) * prod(
                unit.values[node.inputs[1]].sizes(1, 1)[1:]
            ) / _whole_sizes(node, unit, work)[0][-1]
            continue  # costed with the experts
        if op.kind in HEAVY or not op.fusible:
            f, b, w, ff, fb = heavy_s(node, unit, option, work, learns)
            forward, backward, weight = forward + f, backward + b, weight + w
            flop_f, flop_b = flop_f + ff, flop_b + fb
            light = light + (f if op.kind not in HEAVY or node.name in repeated else 0)
            kernels += 1
            if op.kind == "attention":
                attention_s = (attention_s[0] + f, attention_s[1] + b)
        outs = tuple(work.sizes(t, WHOLE, work.cp) for t in node.outputs)
        model = model + op.flop(node, _whole_sizes(node, unit, work), outs)
    for run in lights(unit, work):
        f, b = light_s(run, unit, at, learns, work)
        forward, backward, light, kernels = forward + f, backward + b, light + f, kernels + 1
    traffic = tuple(tp_traffic(unit, assignment, work))
    keep = unit.saved_fused if work.engine.saves == "min-cut" else unit.saved
    logits = _logits(unit)
    each = work.engine.loss_bytes
    if logits and at[logits[0]] >= 0 and work.engine.split_loss_bytes:
        each = work.engine.split_loss_bytes
    logits = logits if each else ()
    left = (*logits, *(() if work.engine.combine_saves else _returned(unit)))
    none, some = (
        _kept(unit, tuple(r for r in names if r not in left), assignment, at, work)
        for names in (keep, _selective(unit, work.engine))
    )
    some = np.minimum(none, some)
    entry = sum(
        (work.nbytes(t, at[n]) for n, t in unit.inputs if n in unit.diff_inputs), work.zeros
    )
    full = np.minimum(entry, none)
    roots = storage_roots(unit)
    largest = np.maximum.reduce([
        work.zeros,
        *(work.nbytes(unit.values[r], at[r]) for r in at
          if learns[r] and roots[r] not in unit.parameter_names),
        *(work.nbytes(unit.values[r], WHOLE) for r in _whole(unit, assignment, at)),
    ])  # fmt: skip
    transient = 2 * largest
    if logits:
        one = work.nbytes(unit.values[logits[0]], at[logits[0]])
        transient = each * one / ITEM_BYTES[unit.values[logits[0]].dtype]
    host_f, host_b = _host(unit, kernels, forward, backward, work)
    return UnitCost(
        forward_s=forward, backward_s=backward, weight_s=weight, light_s=light,
        host_forward_s=host_f, host_backward_s=host_b, traffic=traffic,
        kept_bytes=(none, some, full),
        working_bytes=(transient, transient + none - some, transient + none - full),
        flop=(flop_f, flop_b), model_flop=model, kernels=kernels, attention_s=attention_s,
    )  # fmt: skip


def _whole_sizes(node: Node, unit: Unit, work: Work) -> tuple[Any, ...]:
    """Sizes of a node's inputs before any split."""
    return tuple(work.sizes(unit.values[r], WHOLE, work.cp) for r in node.inputs)


def expert_cost(
    unit: Unit, assignment: Assignment, work: Work, alone: UnitCost
) -> UnitCost | None:
    """What a unit's grouped matmuls and expert traffic add, at `work.axes` ep and etp; None where
    there are none. Memory is counted with the unit, as if every rank had the mean number of rows:
    here is what the busiest rank has beyond that."""
    learns = learns_of(unit)
    sums = [work.zeros] * 5
    kernels = 0
    for node, option in zip(unit.nodes, assignment.chosen):
        if rule(node).kind == "grouped_gemm":
            sums = [a + b for a, b in zip(sums, heavy_s(node, unit, option, work, learns))]
            kernels += 1
    traffic = tuple(ep_traffic(unit, work))
    if not kernels and not traffic:
        return None
    none, some = (
        _kept(unit, names, assignment, produced(unit, assignment), work) * (work.skew - 1)
        for names in _dispatched(unit, work.engine.saves)
    )
    host_f, host_b = _host(unit, alone.kernels, alone.forward_s, alone.backward_s, work)
    return replace(
        _nothing(work), forward_s=sums[0] * work.skew, backward_s=sums[1] * work.skew,
        host_forward_s=host_f - alone.host_forward_s,
        host_backward_s=host_b - alone.host_backward_s,
        weight_s=sums[2] * work.skew, traffic=traffic, flop=(sums[3], sums[4]), kernels=kernels,
        kept_bytes=(none, some, work.zeros), working_bytes=(work.zeros, none - some, none),
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _dispatched(unit: Unit, saves: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Values kept for backward that lie with their experts, without recomputation and selective:
    what follows from a dispatch and leads to a grouped matmul. saves: what the engine does."""
    there, leads = set[str](), _leads(unit)
    for node in unit.nodes:
        if node.op == "dispatch":
            there.add(node.name)
        elif node.op != "combine" and any(r in there for r in node.inputs):
            there.update(node.refs())
    keep = unit.saved_fused if saves == "min-cut" else unit.saved
    found = tuple(r for r in keep if r in there & leads)
    return found, tuple(r for r in unit.saved_selective if r in found)


def context_cost(
    unit: Unit, assignment: Assignment, work: Work, alone: UnitCost
) -> UnitCost | None:
    """What sharing the sequence over cp adds to a unit; None where it has no attention."""
    traffic = tuple(cp_traffic(unit, assignment, work, alone.attention_s))
    return replace(_nothing(work), traffic=traffic) if traffic else None


def _nothing(work: Work) -> UnitCost:
    z = work.zeros
    return UnitCost(
        forward_s=z, backward_s=z, weight_s=z, light_s=z, host_forward_s=z, host_backward_s=z,
        traffic=(), kept_bytes=(z, z, z), working_bytes=(z, z, z), flop=(z, z), model_flop=z,
        kernels=0, attention_s=(z, z),
    )  # fmt: skip


def _host(
    unit: Unit, kernels: int, forward: Floats, backward: Floats, work: Work
) -> tuple[Floats, Floats]:
    """What the host adds: a direction takes hypot(device, host), or both where it waits. The device
    is what runs beside experts: they are launched once their rows are counted."""
    engine = work.engine
    grouped = [n for n in unit.nodes if n.op == "grouped_matmul"]
    experts = max((unit.values[n.inputs[1]].sizes(1, 1)[0] for n in grouped), default=0)
    local = experts / (work.axes.ep or experts or 1)  # at least one, where ep is not counted yet
    routed = engine.moe_layer_host_s + engine.expert_host_s * local
    routed_in = dict(work.axes.formats).get("experts", work.precision)
    narrow = engine.narrow_host_ratio if routed_in in CAST_BYTES else 1.0
    dense = engine.layer_host_s if work.is_layer else 0.0
    layer = routed * narrow if grouped else dense
    ahead = kernels * engine.kernel_host_s + 0.35 * layer
    back = 2 * kernels * engine.kernel_host_s + 0.65 * layer
    if engine.host_blocks:
        return work.zeros + ahead, work.zeros + back
    return np.hypot(forward, ahead) - forward, np.hypot(backward, back) - backward
