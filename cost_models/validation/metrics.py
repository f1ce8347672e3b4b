"""How far predictions are from measurements: errors by class, and whether they rank alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

Pair = tuple[float, float]  # predicted, measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Errors of n predictions, each relative to its measurement.

    mape: mean of |predicted / measured - 1|; median, p90 of the same; bias: mean of the signed
    error, positive where predictions are too large.
    """

    n: int
    mape: float
    median: float
    bias: float
    p90: float


def scores(pairs: Sequence[Pair]) -> Scores:
    """Errors of (predicted, measured) pairs; there is at least one."""
    predicted, measured = np.asarray(pairs, dtype=np.float64).T
    signed = predicted / measured - 1
    far = np.abs(signed)
    return Scores(
        n=len(pairs), mape=float(far.mean()), median=float(np.median(far)),
        bias=float(signed.mean()), p90=float(np.percentile(far, 90)),
    )  # fmt: skip


def kendall_tau(groups: Sequence[Sequence[Pair]], tie: float = 0.03) -> tuple[float, int]:
    """(tau, pairs compared) over all pairs inside each group whose measurements differ by more
    than `tie` of the larger; (concordant - discordant) / compared. nan where none compare."""
    agree = compared = 0
    for group in groups:
        for (p, a), (q, b) in combinations(group, 2):
            if abs(a - b) <= tie * max(a, b):
                continue
            compared += 1
            agree += (p > q) - (p < q) if a > b else (p < q) - (p > q)
    return (agree / compared if compared else float("nan")), compared
