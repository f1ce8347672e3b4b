"""Formats of a layer's matmuls by group: what computes in fewer bits than the plan's precision.

Values between operations, what backward keeps, gathered parameters, gradients and the optimizer
stay as the precision has them: a narrow matmul quantizes what it is given and gives 16 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

from ir.graph import Node, Unit
from ir.ops import rule

GROUPS = ("attention", "mlp", "experts")  # of a layer's matmuls by parameters
NARROW = ("fp8", "nvfp4")
MULTIPLE = 16  # cuBLASLt and torch._scaled_mm: sides of an 8-bit matmul divide by 16
Formats = tuple[tuple[str, str], ...]  # (group, format), in the order of GROUPS


def _mixes(node: Node, unit: Unit) -> bool:
    """Whether a node mixes positions: attention, a scan, a product of two computed values."""
    kind = rule(node).kind
    return kind in ("attention", "scan") or (
        kind == "gemm" and not any(r in unit.parameter_names for r in node.inputs[:2])
    )


@functools.cache
def groups_of(unit: Unit) -> dict[str, str]:
    """The group of every linear and grouped matmul of a unit that may be narrow, by its name.

    attention: linears that what mixes positions is made of, and the first that it goes to.
    experts: grouped matmuls. mlp: the others. A router, which leads to the choice of experts and
    not to their rows, stays in the plan's precision: it is in no group.
    """
    reached, last = set[str](), set[str]()
    for node in unit.nodes:
        if _mixes(node, unit):
            reached.update(node.refs())
        elif any(r in reached for r in node.inputs):
            if node.op == "linear":
                last.add(node.name)
            elif rule(node).fusible:
                reached.update(node.refs())
    attended = _before(unit, lambda n: n.inputs if n.name in last or _mixes(n, unit) else ())
    chosen = _before(unit, lambda n: n.inputs if n.op == "topk" else ())
    found = {}
    for node in unit.nodes:
        if node.op == "grouped_matmul":
            found[node.name] = "experts"
        elif node.op == "linear" and (node.name in last or node.name in attended):
            found[node.name] = "attention"
        elif node.op == "linear" and node.name not in chosen:
            found[node.name] = "mlp"
    return found


def _before(unit: Unit, wanted: Callable[[Node], Sequence[str]]) -> set[str]:
    """Values that what nodes want is made of."""
    found = set[str]()
    for node in reversed(unit.nodes):
        found.update(wanted(node))
        if any(r in found for r in node.refs()):
            found.update(node.inputs)
    return found


@functools.cache
def decided(unit: Unit, formats: Formats, tp: int, etp: int) -> dict[str, str]:
    """The format of every matmul that `formats` says one for, by its node's name.

    tp, etp: what may split its weight. A weight whose sides these leave no multiples of 16 stays
    in the plan's precision: no 8-bit kernel takes it.
    """
    words, found = dict(formats), {}
    for node in unit.nodes:
        word = words.get(groups_of(unit).get(node.name, ""))
        if word is None:
            continue
        ways = etp if node.op == "grouped_matmul" else tp
        sides = unit.values[node.inputs[1]].sizes(1, 1)[-2:]
        if word not in NARROW or not any(side % (MULTIPLE * ways) for side in sides):
            found[node.name] = word
    return found


def groups_in(units: Iterable[Unit]) -> tuple[str, ...]:
    """The groups that layers have."""
    found = {group for unit in units for group in groups_of(unit).values()}
    return tuple(group for group in GROUPS if group in found)
