"""Robust least squares with priors: Levenberg-Marquardt in numpy, for tens of parameters.

Minimises `sum rho(r_i / scale) + sum ((x_j - start_j) / prior_sd_j)^2`, rho soft-L1
(`2 (sqrt(1 + z^2) - 1)`): a row far off counts by its distance, not by its square. Parameters are
best logarithms of the constants: then a constant stays positive and prior_sd is a relative spread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Where a fit ended.

    x: the parameters. sd: their standard deviations, from the curvature at x and the residuals'
    spread. cost: the objective at x. steps: accepted steps. residuals: unweighted, at x.
    """

    x: FloatArray
    sd: FloatArray
    cost: float
    steps: int
    residuals: FloatArray


def fit(
    residuals: Callable[[FloatArray], FloatArray],
    start: FloatArray,
    prior_sd: FloatArray,
    *,
    scale: float = 0.05,
    weights: FloatArray | None = None,
    most_steps: int = 60,
    tolerance: float = 1e-6,
    jacobian: Callable[[FloatArray], FloatArray] | None = None,
    difference: float = 1e-4,
) -> Fitted:
    """Minimise from `start`, which is also the mean of the prior.

    residuals: parameters [n] -> residuals [m], log(predicted / measured) as a rule.
    prior_sd: [n] in the parameters' units; infinite where nothing is known, 0 holds it fixed.
    scale: residual at which a row begins to count as an outlier. weights: [m] of each row.
    tolerance: relative gain of the objective at which it stops. jacobian: parameters -> [m, n];
    forward differences of that step where there is none. Deterministic.
    """
    start = np.asarray(start, dtype=np.float64)
    sd = np.asarray(prior_sd, dtype=np.float64)
    free = np.flatnonzero(sd > 0)
    pull = 1 / sd[free]  # 0 where the prior is flat
    x, first = start.copy(), np.asarray(residuals(start), dtype=np.float64)
    share = np.ones_like(first) if weights is None else np.asarray(weights, dtype=np.float64)

    def objective(r: FloatArray, at: FloatArray) -> float:
        loss = 2 * (np.sqrt(1 + (r / scale) ** 2) - 1)
        return float(share @ loss + np.sum(((at[free] - start[free]) * pull) ** 2))

    r, cost = first, objective(first, x)
    damping, steps = 1e-3, 0
    curvature = np.diag(pull**2)
    for _ in range(most_steps):
        if jacobian is None:
            slopes = _differences(residuals, x, r, free, difference)
        else:
            slopes = jacobian(x)[:, free]
        robust = share / np.sqrt(1 + (r / scale) ** 2) / scale**2
        curvature = slopes.T @ (robust[:, None] * slopes) + np.diag(pull**2)
        slope = slopes.T @ (robust * r) + (x[free] - start[free]) * pull**2
        gained = False
        for _ in range(12):
            bent = curvature + damping * np.diag(np.diag(curvature) + 1e-12)
            trial = x.copy()
            trial[free] -= np.linalg.solve(bent, slope)
            moved = np.asarray(residuals(trial), dtype=np.float64)
            lower = objective(moved, trial) if np.all(np.isfinite(moved)) else np.inf
            if lower < cost:
                gained = cost - lower > tolerance * cost
                x, r, cost = trial, moved, lower
                damping, steps = max(damping / 5, 1e-9), steps + 1
                break
            damping *= 4
        if not gained:
            break
    spread = np.zeros_like(x)
    spread[free] = np.sqrt(np.diag(np.linalg.pinv(curvature)))
    return Fitted(x=x, sd=spread, cost=cost, steps=steps, residuals=r)


def _differences(
    residuals: Callable[[FloatArray], FloatArray],
    x: FloatArray,
    at: FloatArray,
    free: NDArray[np.intp],
    difference: float,
) -> FloatArray:
    """Forward differences, [m, free]."""
    columns = []
    for j in free:
        moved = x.copy()
        moved[j] += difference
        columns.append((np.asarray(residuals(moved), dtype=np.float64) - at) / difference)
    return np.stack(columns, axis=1) if columns else np.zeros((len(at), 0))
