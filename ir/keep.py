"""What of a unit may be kept one by one where it is computed again in part: its dear operations.

A checkpoint runs a unit's forward again from its inputs; what it kept of the first run it does not
repeat. So which of the dear operations are kept is free: every subset is right, and costs the
bytes of what is kept and the seconds of what is not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from ir.backward import HEAVY, feeds_backward
from ir.graph import AFTER, Node, Unit
from ir.ops import rule

ONE_EACH = ("gemm", "grouped_gemm", "attention", "conv")  # one operation of torch a node
COUNTED = ("gemm", "attention", "conv")  # and as many of them, however a unit is run


def dear(unit: Unit) -> tuple[Node, ...]:
    """The operations that a runtime can count, in the order they run; joined ones left out."""
    own = [n for n in unit.nodes if n.module.partition(".")[0] != AFTER]
    return tuple(n for n in own if rule(n).kind in ONE_EACH)


@functools.cache
def idle(unit: Unit) -> int:
    """How many of the last dear operations nothing needs in backward: a layer's last projection
    is only added to its input."""
    read = feeds_backward(unit)
    needed = [any(read[r] for r in n.refs()) for n in dear(unit)]
    return next((i for i, need in enumerate(reversed(needed)) if need), len(needed))


@functools.cache
def keepable(unit: Unit) -> tuple[Node, ...]:
    """The operations that are kept or repeated one by one, in order: the dear ones that backward
    leads to. None of a unit with operations that run as a number of others unknown here (scans,
    leaves, experts): it keeps what it does by default.
    """
    kinds = {rule(n).kind for n in unit.nodes} & set(HEAVY)
    if not kinds <= set(COUNTED):
        return ()
    found = dear(unit)
    return found[: len(found) - idle(unit)]


def word(node: Node, unit: Unit) -> str:
    """How a plan names an operation: by its module where that is a linear, else by its own name."""
    short = node.name.removesuffix("/linear")
    return node.name if short in unit.producers else short


def words(unit: Unit) -> tuple[str, ...]:
    """The words of all that can be kept, in order."""
    return tuple(word(n, unit) for n in keepable(unit))


def repeated(unit: Unit, kept: Iterable[str]) -> tuple[Node, ...]:
    """The operations that are repeated where only those of these words are kept."""
    found = frozenset(kept)
    return tuple(n for n in keepable(unit) if word(n, unit) not in found)
