"""Layers are in a row: how many of the first so many can be of a class, as lines of a program."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def hulls(kind_of: Sequence[int], kind: int) -> list[tuple[float, float, float]]:
    """(rate, least, most): of the first n layers, rate * n + least to rate * n + most are of a
    class, for any n: a side of the lower or the upper hull each."""
    found = []
    counts = [0, *itertools.accumulate(int(k == kind) for k in kind_of)]
    for sign in (1, -1):
        hull: list[tuple[int, int]] = []
        for point in enumerate(sign * n for n in counts):
            while len(hull) > 1 and _beneath(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        for (a, b), (c, d) in itertools.pairwise(hull):
            rate = sign * (d - b) / (c - a)
            off = [n - rate * i for i, n in enumerate(counts)]
            found.append((rate, min(off), max(off)))
    return found


def _beneath(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    """Whether b is not above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])
