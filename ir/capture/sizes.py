"""Recover a size as a monomial in batch and sequence from its values at two sizes."""

from __future__ import annotations

from fractions import Fraction

from ir.errors import PlanError
from ir.graph import Dim

_POWERS = ((0, 1), (1, 0), (1, 1), (0, 2), (1, 2), (2, 1), (2, 0), (2, 2))


def recover(
    first: int, second: int, sizes: tuple[tuple[int, int], tuple[int, int]], where: str
) -> Dim:
    """The simplest c * b^i * s^j (+ k, where no monomial fits) that is both values."""
    if first == second:
        return Dim(numerator=first)
    (b1, s1), (b2, s2) = sizes
    for i, j in _POWERS:
        m1, m2 = b1**i * s1**j, b2**i * s2**j
        if m1 != m2 and first * m2 == second * m1:
            c = Fraction(first, m1)
            return Dim(numerator=c.numerator, denominator=c.denominator, batch=i, seq=j)
    for i, j in _POWERS[:3]:
        m1, m2 = b1**i * s1**j, b2**i * s2**j
        c = Fraction(second - first, m2 - m1) if m1 != m2 else Fraction(1, 3)
        if c.denominator == 1 and c > 0:
            return Dim(numerator=int(c), batch=i, seq=j, offset=first - int(c) * m1)
    raise PlanError(
        f"a size is {first} at batch {b1}, sequence {s1} and {second} at batch {b2}, sequence {s2}",
        where=where, why="sizes must be products of batch, sequence and constants",
    )  # fmt: skip
