"""Which of several are not worse in everything than another."""

from __future__ import annotations

from collections.abc import Sequence


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether a is at least as small as b in every number, and smaller in one."""
    return all(x <= y for x, y in zip(a, b)) and tuple(a) != tuple(b)


def front(points: Sequence[Sequence[float]]) -> tuple[bool, ...]:
    """For each point whether no other dominates it; smaller is better, equals stay together."""
    return tuple(not any(dominates(q, p) for q in points) for p in points)
