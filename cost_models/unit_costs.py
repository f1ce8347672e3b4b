"""What one unit costs one rank, per micro-batch: seconds by name, bytes kept, collectives.

Everything is computed for many work points (micro-batch, local sequence) at once; a point is a
column. Sizes come from the graph's monomials, split by the unit's assignment on tp, by cp on the
sequence, and by ep and etp on experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cost_models.collectives import collective_s
from cost_models.compute import Kernels
from cost_models.engines import Engine
from cost_models.hardware import Cluster
from cost_models.layout import (
    WHOLE,
    Assignment,
    Option,
    boundary,
    collective,
    moves,
    produced,
)
from ir.backward import HEAVY, differentiable, storage_roots
from ir.graph import ITEM_BYTES, Node, Tensor, Unit
from ir.ops import rule
from ir.ops.attention import pairs

Floats = NDArray[np.float64]
DTYPE_NAMES = {"f32": "fp32", "f64": "fp32", "f16": "fp16", "bf16": "bf16"}
RECOMPUTE_LEVELS = ("none", "selective", "full")
CAST_BYTES = {"fp8": (3.0, 4.0), "nvfp4": (2.5, 3.5)}  # read and written per input, per gradient
# element; runs: casts of tensor-wise scaled training


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Degrees that a unit's own cost depends on, beside what a work point says.

    ep, etp: where experts lie; None leaves grouped matmuls and expert traffic out, and an empty
    cp_kind the traffic of attention: they are costed on their own and added.
    """

    tp: int = 1
    sequence_parallel: bool = False
    cp_kind: str = ""
    ep: int | None = None
    etp: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Collectives of one place in a unit, per micro-batch: bytes and seconds at each point."""

    kind: str
    axis: str
    where: str
    backward: bool
    count: int
    size_bytes: Floats
    seconds: Floats
    hidden_s: Floats


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


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work points: micro-batch, cp and local sequence (after cp), and the context around them."""

    micro_batch: Floats
    cp: Floats
    local_seq: Floats
    axes: Axes
    cluster: Cluster
    kernels: Kernels
    engine: Engine
    precision: str
    is_layer: bool

    @property
    def zeros(self) -> Floats:
        return np.zeros_like(self.micro_batch)

    def sizes(self, tensor: Tensor, at: int, seq_scale: Any = 1) -> tuple[Any, ...]:
        found = list(tensor.sizes(self.micro_batch, self.local_seq * seq_scale))
        if at >= 0:
            found[at] = found[at] / self.axes.tp
        return tuple(found)

    def nbytes(self, tensor: Tensor, at: int) -> Floats:
        return self.zeros + prod(self.sizes(tensor, at)) * ITEM_BYTES[tensor.dtype]


class Heavy(NamedTuple):
    """Seconds and executed FLOPs of one kernel; weight_s is part of backward_s."""

    forward_s: Floats
    backward_s: Floats
    weight_s: Floats
    flop: Floats
    backward_flop: Floats


def compute_dtype(node: Node, unit: Unit, work: Work) -> str:
    """The format a kernel computes in: the values', or the training format for layers' matmuls."""
    base = DTYPE_NAMES.get(unit.values[node.inputs[0]].dtype, "fp32")
    narrow = work.precision in CAST_BYTES and work.is_layer and base == "bf16"
    return work.precision if narrow and node.op in ("linear", "grouped_matmul") else base


def _contraction(node: Node, unit: Unit, ins: list[Any]) -> tuple[Any, Any, Any, Any]:
    """(m, n, k, batch) of a two-operand product, from its letters and local sizes."""
    spec = rule(node).spec(node, tuple(unit.values[r] for r in node.inputs))
    a, b, out = spec.inputs[0], spec.inputs[1], spec.outputs[0]
    size = {**dict(zip(b, ins[1])), **dict(zip(a, ins[0]))}
    pick = lambda keep: prod((size[x] for x in dict.fromkeys((*a, *b)) if keep(x)), start=1.0)  # noqa: E731
    return (
        pick(lambda x: x in a and x not in b and x in out),
        pick(lambda x: x in b and x not in a and x in out),
        pick(lambda x: x in a and x in b and x not in out),
        pick(lambda x: x in a and x in b and x in out),
    )


def heavy_s(
    node: Node, unit: Unit, option: Option, work: Work, learns: dict[str, bool]
) -> Heavy:
    """Time and FLOPs of a node that is not fusible."""
    op, k = rule(node), work.kernels
    dtype = compute_dtype(node, unit, work)
    ins = [work.sizes(unit.values[r], at) for r, at in zip(node.inputs, option.ins)]
    outs = [work.sizes(t, at) for t, at in zip(node.outputs, option.outs)]
    needs = [learns[r] for r in node.inputs]
    if op.kind == "gemm":
        m, n, inner, batch = _contraction(node, unit, ins)
        forward = k.gemm_s(dtype, m, n, inner, batch)
        none = work.zeros
        backward = k.gemm_s(dtype, m, inner, n, batch) if needs[0] else none
        weight = k.gemm_s(dtype, inner, n, m, batch) if any(needs[1:2]) else none
        flop = work.zeros + 2.0 * m * n * inner * batch
        cast = _casts(dtype, m * inner, m * n, work)
        return Heavy(
            forward + cast[0], backward + weight + cast[1], weight, flop,
            flop * sum(map(bool, needs[:2])),
        )  # fmt: skip
    if op.kind == "grouped_gemm":
        return _grouped(node, unit, ins, dtype, work, needs)
    moved = _moved(node, unit, option, work)
    if op.kind == "attention":
        return _attention(node, unit, option, dtype, moved, work)
    flop = work.zeros + op.flop(node, tuple(ins), tuple(outs))
    back = 2.0 * flop
    if op.kind == "conv":
        one = k.conv_s(dtype, flop, moved)
        return Heavy(one, one * sum(map(bool, needs[:2])), one * needs[1], flop, back)
    if op.kind == "scan":
        again = k.scan_s(dtype, back, 2 * moved)
        return Heavy(k.scan_s(dtype, flop, moved), again, work.zeros, flop, back)
    if not any(needs):
        return Heavy(k.memory_bound_s(moved), work.zeros, work.zeros, flop, 0 * flop)
    table = work.nbytes(unit.values[node.inputs[0]], option.ins[0])  # its gradient is dense
    back = moved + (table if node.op in LOOKUPS else 0)
    return Heavy(k.memory_bound_s(moved), k.memory_bound_s(back), work.zeros, flop, 0 * flop)


LOOKUPS = ("embedding", "index", "gather")  # read the rows they are asked for, not the table


def _moved(node: Node, unit: Unit, option: Option, work: Work) -> Floats:
    """Bytes a kernel reads and writes at least: operands and results, or the rows looked up."""
    written = sum((work.nbytes(t, at) for t, at in zip(node.outputs, option.outs)), work.zeros)
    given = [work.nbytes(unit.values[r], at) for r, at in zip(node.inputs, option.ins)]
    if node.op in LOOKUPS:
        return 2 * written + sum(given[1:], work.zeros)
    return written + sum(given, work.zeros)


def _casts(dtype: str, inputs: Any, results: Any, work: Work) -> tuple[Floats, Floats]:
    """Quantizing a matmul's input, and its gradient's; weights once a step are left to it."""
    if dtype not in CAST_BYTES:
        return work.zeros, work.zeros
    read, grad = CAST_BYTES[dtype]
    k = work.kernels
    return k.memory_bound_s(read * inputs), k.memory_bound_s(grad * results)


def _grouped(
    node: Node, unit: Unit, ins: list[Any], dtype: str, work: Work, needs: list[bool]
) -> Heavy:
    """Rows gathered over etp, experts over ep, features over etp."""
    axes, k = work.axes, work.kernels
    rows = ins[0][0] * axes.etp
    experts, inner, n = unit.values[node.inputs[1]].sizes(1, 1)
    groups = experts / (axes.ep or 1)
    first = not _after_grouped(unit, node.inputs[0])
    n, inner = (n / axes.etp, inner) if first else (n, inner / axes.etp)
    forward = k.grouped_gemm_s(dtype, rows, groups, n, inner)
    dgrad = k.grouped_gemm_s(dtype, rows, groups, inner, n)
    flop = work.zeros + 2.0 * rows * n * inner
    cast = _casts(dtype, rows * inner, rows * n, work)
    weight = forward if needs[1] else work.zeros
    backward = weight + (dgrad if needs[0] else 0) + cast[1]
    return Heavy(forward + cast[0], backward, weight, flop, flop * sum(map(bool, needs[:2])))


def _after_grouped(unit: Unit, ref: str) -> bool:
    """Whether rows come, through pointwise ops, from another grouped matmul."""
    todo, seen = [ref], set()
    while todo:
        node = unit.producers.get(todo.pop())
        if node is None or node.name in seen:
            continue
        if node.op == "grouped_matmul":
            return True
        seen.add(node.name)
        if node.op != "dispatch":
            todo += node.inputs
    return False


def _attention(
    node: Node, unit: Unit, option: Option, dtype: str, moved: Floats, work: Work
) -> Heavy:
    """Pairs of the whole sequence, shared by the cp ranks: balanced, as zigzag halves are."""
    cp = work.cp
    q = work.sizes(unit.values[node.inputs[0]], option.ins[0], cp)
    v = work.sizes(unit.values[node.inputs[2]], WHOLE, cp)
    keys = work.sizes(unit.values[node.inputs[1]], WHOLE, cp)[2]
    seen = pairs(node, np.asarray(q[2], dtype=np.int64), np.asarray(keys, dtype=np.int64))
    flop = work.zeros + 2.0 * q[0] * q[1] * seen * (q[3] + v[3]) / cp
    head = int(min(q[3], v[3]))
    forward = work.kernels.attention_s(dtype, flop, moved, head_dim=head)
    backward = work.kernels.attention_s(dtype, 2.5 * flop, 2 * moved, backward=True, head_dim=head)
    return Heavy(forward, backward, work.zeros, flop, 2.5 * flop)


def chains(unit: Unit) -> list[list[Node]]:
    """Fusible nodes in runs that a compiler makes one kernel of: joined by values, and between
    the same heavy ops (equal depth), so that no run waits for itself."""
    depth: dict[str, int] = dict.fromkeys(unit.values, 0)
    leader: dict[str, str] = {}
    runs: dict[str, list[Node]] = {}
    for node in unit.nodes:
        level = max((depth[r] for r in node.inputs), default=0)
        fusible = rule(node).fusible
        depth.update(dict.fromkeys(node.refs(), level if fusible else level + 1))
        if not fusible:
            continue
        near = [leader[r] for r in node.inputs if r in leader and depth[r] == level]
        home = near[0] if near else node.name
        for other in near[1:]:
            if other != home:
                moved = runs.pop(other)
                runs[home] += moved
                leader.update({r: home for n in moved for r in n.refs()})
        runs.setdefault(home, []).append(node)
        leader.update(dict.fromkeys(node.refs(), home))
    return [run for run in runs.values() if any(not rule(n).view for n in run)]


def _light_s(
    run: list[Node], unit: Unit, at: dict[str, int], learns: dict[str, bool], work: Work
) -> tuple[Floats, Floats]:
    """One fused kernel each way: reads what the run is given, writes what leaves it; backward
    reads that and the gradients of what leaves, and writes those of what is given."""
    made = {r for n in run for r in n.refs()}
    roots = storage_roots(unit)
    given = dict.fromkeys(r for n in run for r in n.inputs if r not in made)
    outside = {r for n in unit.nodes if n.name not in made for r in n.inputs} | set(unit.outputs)
    left = [r for r in made if r in outside and not rule(unit.producers[r]).view] or [
        run[-1].name
    ]
    size = lambda r: np.minimum(  # noqa: E731
        work.nbytes(unit.values[r], at[r]), work.nbytes(unit.values[roots[r]], at[roots[r]])
    )
    ins = sum((size(r) for r in given), work.zeros)
    outs = sum((size(r) for r in sorted(left)), work.zeros)
    diff = sum((size(r) for r in given if learns[r]), work.zeros)
    grads = sum((size(r) for r in sorted(left) if learns[r]), work.zeros)
    factor = work.engine.unfused_factor
    forward = work.kernels.memory_bound_s((ins + outs) * factor)
    any_back = any(learns[r] for r in given)
    backward = work.kernels.memory_bound_s((diff + diff + grads) * factor)
    return forward, backward if any_back else work.zeros


def _lights(unit: Unit, work: Work) -> list[list[Node]]:
    if work.engine.fused:
        return chains(unit)
    return [[n] for n in unit.nodes if rule(n).fusible and not rule(n).view]


def _kept(
    unit: Unit, names: tuple[str, ...], assignment: Assignment, at: dict[str, int], work: Work
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


def unit_cost(unit: Unit, assignment: Assignment, work: Work) -> UnitCost:
    """Cost a unit under an assignment at every work point."""
    learns, at = differentiable(unit), produced(unit, assignment)
    forward, backward, light, weight = work.zeros, work.zeros, work.zeros, work.zeros
    flop_f, flop_b, model, kernels = work.zeros, work.zeros, work.zeros, 0
    attention_s = (work.zeros, work.zeros)
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
            light = light + (f if op.kind not in HEAVY else 0)
            kernels += 1
            if op.kind == "attention":
                attention_s = (attention_s[0] + f, attention_s[1] + b)
        outs = tuple(work.sizes(t, WHOLE, work.cp) for t in node.outputs)
        model = model + op.flop(node, _whole_sizes(node, unit, work), outs)
    for run in _lights(unit, work):
        f, b = _light_s(run, unit, at, learns, work)
        forward, backward, light, kernels = forward + f, backward + b, light + f, kernels + 1
    traffic = tuple(_tp_traffic(unit, assignment, work))
    keep = unit.saved_fused if work.engine.saves == "min-cut" else unit.saved
    none = _kept(unit, keep, assignment, at, work)
    some = np.minimum(none, _kept(unit, unit.saved_selective, assignment, at, work))
    entry = sum(
        (work.nbytes(t, at[n]) for n, t in unit.inputs if n in unit.diff_inputs), work.zeros
    )
    full = np.minimum(entry, none)
    largest = np.maximum.reduce(
        [work.zeros, *(work.nbytes(unit.values[r], at[r]) for r in at if learns[r]
                       and r not in unit.parameter_names)]
    )  # fmt: skip
    host_f, host_b = _host(unit, kernels, forward, backward, work)
    return UnitCost(
        forward_s=forward, backward_s=backward, weight_s=weight, light_s=light, host_forward_s=host_f,
        host_backward_s=host_b, traffic=traffic, kept_bytes=(none, some, full),
        working_bytes=(2 * largest, 2 * largest + none - some, 2 * largest + none - full),
        flop=(flop_f, flop_b), model_flop=model, kernels=kernels, attention_s=attention_s,
    )  # fmt: skip


def _whole_sizes(node: Node, unit: Unit, work: Work) -> tuple[Any, ...]:
    """Sizes of a node's inputs before any split."""
    return tuple(work.sizes(unit.values[r], WHOLE, work.cp) for r in node.inputs)


def expert_cost(unit: Unit, assignment: Assignment, work: Work) -> UnitCost | None:
    """What a unit's grouped matmuls and expert traffic add, at `work.axes` ep and etp; None where
    there are none. Memory is counted with the unit."""
    learns = differentiable(unit)
    sums = [work.zeros] * 5
    kernels = 0
    for node, option in zip(unit.nodes, assignment.chosen):
        if rule(node).kind == "grouped_gemm":
            sums = [a + b for a, b in zip(sums, heavy_s(node, unit, option, work, learns))]
            kernels += 1
    traffic = tuple(_ep_traffic(unit, work))
    if not kernels and not traffic:
        return None
    return replace(
        _nothing(work), forward_s=sums[0], backward_s=sums[1], weight_s=sums[2], traffic=traffic,
        flop=(sums[3], sums[4]), kernels=kernels,
    )  # fmt: skip


def context_cost(
    unit: Unit, assignment: Assignment, work: Work, alone: UnitCost
) -> UnitCost | None:
    """What sharing the sequence over cp adds to a unit; None where it has no attention."""
    traffic = tuple(_cp_traffic(unit, assignment, work, alone.attention_s))
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
    """What the host adds: a direction takes hypot(device, host)."""
    engine = work.engine
    routed = any(n.op == "grouped_matmul" for n in unit.nodes)
    layer = engine.moe_layer_host_s if routed else (engine.layer_host_s if work.is_layer else 0.0)
    ahead = kernels * engine.kernel_host_s + 0.35 * layer
    back = 2 * kernels * engine.kernel_host_s + 0.65 * layer
    return np.hypot(forward, ahead) - forward, np.hypot(backward, back) - backward


def _row(
    work: Work, kind: str, axis: str, where: str, backward: bool, size: Floats, ranks: int,
    stride: int, exposed: float, count: int = 1,
) -> Traffic:  # fmt: skip
    seconds = collective_s(work.cluster, kind, size, ranks, stride) * count
    return Traffic(
        kind=kind, axis=axis, where=where, backward=backward, count=count, size_bytes=size,
        seconds=seconds, hidden_s=seconds * (1 - exposed),
    )  # fmt: skip


def _tp_traffic(unit: Unit, assignment: Assignment, work: Work) -> list[Traffic]:
    """The assignment's changes of placement; a vocabulary split over tp reduces its statistics."""
    if work.axes.tp == 1:
        return []
    rows = []
    for backward, found in enumerate(moves(unit, assignment)):
        for move in found:
            kind = collective(move.source, move.target)
            if kind:
                size = work.nbytes(unit.values[move.ref], WHOLE)
                rows.append(_row(
                    work, kind, "tp", move.ref, bool(backward), size, work.axes.tp, 1,
                    work.engine.tp_exposed,
                ))  # fmt: skip
                regather = work.engine.sp_regather_backward and not backward
                if regather and kind == "all_gather":
                    rows.append(_row(
                        work, kind, "tp", f"{move.ref} again", True, size, work.axes.tp, 1,
                        work.engine.tp_exposed,
                    ))  # fmt: skip
    for node, option in zip(unit.nodes, assignment.chosen):
        if node.op == "cross_entropy" and option.ins[0] == len(unit.values[node.inputs[0]].shape) - 1:
            size = work.zeros + prod(work.sizes(unit.values[node.inputs[1]], WHOLE)) * 4.0
            rows.append(_row(
                work, "all_reduce", "tp", node.name, False, size, work.axes.tp, 1, 1.0, count=3
            ))  # fmt: skip
    return rows


def _ep_traffic(unit: Unit, work: Work) -> list[Traffic]:
    """Rows to their experts and back, each way twice; gathered and reduced over etp."""
    axes, rows = work.axes, []
    for node in unit.nodes:
        if node.op not in ("dispatch", "combine"):
            continue
        candidates = node.outputs[:1] if node.op == "dispatch" else tuple(
            unit.values[r] for r in node.inputs
        )  # fmt: skip
        size = np.maximum.reduce([work.nbytes(t, WHOLE) for t in candidates]) / axes.tp
        for backward in (False, True):
            if axes.ep and axes.ep > 1:
                rows.append(_row(
                    work, "all_to_all", "ep", node.name, backward, size, axes.ep, axes.etp,
                    work.engine.ep_exposed,
                ))  # fmt: skip
            if axes.etp > 1:
                kind = "all_gather" if (node.op == "dispatch") != backward else "reduce_scatter"
                rows.append(_row(
                    work, kind, "etp", node.name, backward, size * axes.etp, axes.etp, 1,
                    work.engine.ep_exposed,
                ))  # fmt: skip
    return rows


def _cp_row(
    work: Work, kind: str, where: str, backward: bool, size: Floats, steps: bool
) -> Traffic:
    """One cp collective at every point, each in its own group; steps: one send a ring step."""
    seconds, count = work.zeros, 1
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
        count = times if here.all() else count
    return Traffic(
        kind=kind, axis="cp", where=where, backward=backward, count=count, size_bytes=size,
        seconds=seconds, hidden_s=work.zeros,
    )  # fmt: skip


def _cp_traffic(
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
                rows.append(replace(row, hidden_s=hidden))
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


__all__ = ["Axes", "Traffic", "UnitCost", "Work", "boundary", "chains", "context_cost", "expert_cost", "heavy_s", "unit_cost"]
