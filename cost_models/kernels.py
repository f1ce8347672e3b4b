"""Seconds of a unit's kernels at every work point: heavy ops one by one, light ones in chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from cost_models.formats import decided
from cost_models.layout import WHOLE, Option
from cost_models.work import Floats, Work
from ir.backward import storage_roots
from ir.graph import Node, Unit
from ir.ops import rule
from ir.ops.attention import pairs
from ir.ops.leaf import declared_bytes

DTYPE_NAMES = {"f32": "fp32", "f64": "fp32", "f16": "fp16", "bf16": "bf16"}
CAST_BYTES = {"fp8": (3.0, 4.0), "nvfp4": (2.5, 3.5)}  # read and written per input, per gradient
# element; runs: casts of tensor-wise scaled training


class Heavy(NamedTuple):
    """Seconds and executed FLOPs of one kernel; weight_s is part of backward_s."""

    forward_s: Floats
    backward_s: Floats
    weight_s: Floats
    flop: Floats
    backward_flop: Floats


def compute_dtype(node: Node, unit: Unit, work: Work) -> str:
    """The format a kernel computes in: the values', or for layers' matmuls what is decided, or the
    training format."""
    base = DTYPE_NAMES.get(unit.values[node.inputs[0]].dtype, "fp32")
    layer = work.is_layer or any(n.op == "attention" for n in unit.nodes)  # of further tokens too
    asked = work.precision
    if work.axes.formats:
        by_name = decided(unit, work.axes.formats, work.axes.tp, work.axes.etp)
        asked = by_name.get(node.name, asked)
    narrow = asked in CAST_BYTES and layer and base == "bf16"
    return asked if narrow and node.op in ("linear", "grouped_matmul") else base


def _contraction(node: Node, unit: Unit, ins: list[Any]) -> tuple[Any, Any, Any, Any]:
    """(m, n, k, batch) of a two-operand product, from its letters and local sizes."""
    spec = rule(node).spec(node, tuple(unit.values[r] for r in node.inputs))
    a, b, out = spec.inputs[0], spec.inputs[1], spec.outputs[0]
    size = {**dict(zip(b, ins[1])), **dict(zip(a, ins[0]))}

    def pick(keep: Callable[[str], bool]) -> Any:
        return prod((size[x] for x in dict.fromkeys((*a, *b)) if keep(x)), start=1.0)

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
        cast = _casts(node, unit, dtype, m * inner, m * n, n * inner, work)
        return Heavy(
            forward + cast[0], backward + weight + cast[1], weight, flop,
            flop * sum(map(bool, needs[:2])),
        )  # fmt: skip
    if op.kind == "grouped_gemm":
        return _grouped(node, unit, ins, dtype, work, needs)
    moved = _moved(node, unit, option, work)
    if op.kind == "attention":
        return _attention(node, unit, option, dtype, moved, work)
    if op.kind == "leaf":
        return _leaf(node, option, dtype, moved, work, any(needs))
    flop = work.zeros + op.flop(node, tuple(ins), tuple(outs))
    back = 2.0 * flop
    if op.kind == "conv":
        one = k.conv_s(dtype, flop, moved)
        return Heavy(one, one * sum(map(bool, needs[:2])), one * needs[1], flop, back)
    if op.kind == "scan":
        again = k.scan_s(dtype, back, 2 * moved)
        return Heavy(k.scan_s(dtype, flop, moved), again, work.zeros, flop, back)
    if node.op == "cross_entropy" and work.engine.loss_traffic:
        size = work.zeros + prod(ins[0]) * work.engine.loss_traffic
        return Heavy(k.memory_bound_s(size / 2), k.memory_bound_s(size / 2), work.zeros, flop,
                     0 * flop)  # fmt: skip
    if not any(needs):
        return Heavy(k.memory_bound_s(moved), work.zeros, work.zeros, flop, 0 * flop)
    table = work.nbytes(unit.values[node.inputs[0]], option.ins[0])  # its gradient is dense
    back = moved + (table if node.op in LOOKUPS else 0)
    return Heavy(k.memory_bound_s(moved), k.memory_bound_s(back), work.zeros, flop, 0 * flop)


def _leaf(
    node: Node, option: Option, dtype: str, moved: Floats, work: Work, learns: bool
) -> Heavy:
    """What was declared, shared by the tp ranks where a factor of it is split."""
    outs = tuple(work.sizes(t, WHOLE) for t in node.outputs)
    share = work.axes.tp if any(at >= 0 for at in (*option.ins, *option.outs)) else 1
    flop = work.zeros + rule(node).flop(node, (), outs) / share
    traffic = moved + declared_bytes(node, outs) / share
    forward = work.kernels.generic_s(dtype, flop, traffic)
    if not learns:
        return Heavy(forward, work.zeros, work.zeros, flop, work.zeros)
    backward = work.kernels.generic_s(dtype, 2 * flop, 2 * traffic)
    return Heavy(forward, backward, work.zeros, flop, 2 * flop)


LOOKUPS = ("embedding", "index", "gather")  # read the rows they are asked for, not the table


def _moved(node: Node, unit: Unit, option: Option, work: Work) -> Floats:
    """Bytes a kernel reads and writes at least: operands and results, or the rows looked up."""
    written = sum((work.nbytes(t, at) for t, at in zip(node.outputs, option.outs)), work.zeros)
    given = [work.nbytes(unit.values[r], at) for r, at in zip(node.inputs, option.ins)]
    if node.op in LOOKUPS:
        return 2 * written + sum(given[1:], work.zeros)
    return written + sum(given, work.zeros)


def _casts(
    node: Node, unit: Unit, dtype: str, inputs: Any, results: Any, weights: Any, work: Work
) -> tuple[Floats, Floats]:
    """Quantizing a matmul's input, once for all that read it where modules are fused, and its
    gradient's; weights once a step are left out, but those that the engine casts more often."""
    if dtype not in CAST_BYTES:
        return work.zeros, work.zeros
    first = next(
        n for n in unit.nodes
        if n.op == node.op and n.inputs[0] == node.inputs[0]
        and (n is node or compute_dtype(n, unit, work) == dtype)
    )  # fmt: skip
    if work.engine.fused and first is not node:
        inputs = 0.0 * inputs
    read, grad = CAST_BYTES[dtype]
    k = work.kernels
    scale = work.engine.cast_traffic
    of_input, again, of_grad, of_weight, weight_again = work.engine.cast_beyond
    return (
        k.memory_bound_s(scale * read * inputs + of_input * inputs + of_weight * weights),
        k.memory_bound_s(
            scale * grad * results + again * inputs + of_grad * results + weight_again * weights
        ),
    )


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
    cast = _casts(node, unit, dtype, rows * inner, rows * n, groups * n * inner, work)
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


def light_s(
    run: list[Node], unit: Unit, at: Mapping[str, int], learns: dict[str, bool], work: Work
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

    readers = [n for n in unit.nodes if n.name not in made and any(r in made for r in n.inputs)]
    if work.engine.loss_traffic and readers and {n.op for n in readers} == {"cross_entropy"}:
        return work.zeros, work.zeros  # the loss reads 16-bit logits itself

    def size(r: str) -> Floats:
        whole = work.nbytes(unit.values[roots[r]], at[roots[r]])
        return np.minimum(work.nbytes(unit.values[r], at[r]), whole)

    ins = sum((size(r) for r in given), work.zeros)
    outs = sum((size(r) for r in sorted(left)), work.zeros)
    diff = sum((size(r) for r in given if learns[r]), work.zeros)
    grads = sum((size(r) for r in sorted(left) if learns[r]), work.zeros)
    factor = work.engine.unfused_factor
    forward = work.kernels.memory_bound_s((ins + outs) * factor)
    any_back = any(learns[r] for r in given)
    backward = work.kernels.memory_bound_s((diff + diff + grads) * factor)
    return forward, backward if any_back else work.zeros


def lights(unit: Unit, work: Work) -> list[list[Node]]:
    if work.engine.fused:
        return chains(unit)
    return [[n] for n in unit.nodes if rule(n).fusible and not rule(n).view]
