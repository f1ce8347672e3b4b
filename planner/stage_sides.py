"""Ranks of several kinds: what no division of the layers among them can undercut.

Of kind i there are p_i ranks, on which item k takes t_ik; W_i is what lies on kind i together. No
rank of the kind is busier than M only if W_i <= p_i M, so for any weights l_i >= 0
    c M + e (W_1 + W_2 + ..) >= sum_i W_i (c l_i / sum_j l_j p_j + e)
                             >= sum_k min_i t_ik (c l_i / sum_j l_j p_j + e).
Weights of 1 / t_ik for each item k in turn make that item's kinds tie: the best are among them
where items' ratios of times are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cost_models.stage_problem import StageProblem

ROUNDING = 1e-9  # of sums as floats, relative


def least_spread(
    times: Sequence[Sequence[float]], only: Sequence[int | None], counts: Sequence[int],
    busiest: float, whole: float,
) -> float:  # fmt: skip
    """busiest * M + whole * (sum of all ranks' times) at least, M being the busiest rank's.

    times: [kind, item]. only: the one kind that an item can be on. counts: ranks of each kind.
    """
    t, n = np.array(times, dtype=np.float64), np.array(counts, dtype=np.float64)
    fixed = np.array([-1 if kind is None else kind for kind in only])
    least, ways = 0.0, np.unique(np.where(t > 0, 1 / np.maximum(t, 1e-30), 0.0), axis=1).T
    for weights in ways:
        if not weights.any():
            continue
        price = busiest * weights / float(weights @ n) + whole
        each = t * price[:, None]
        free = each.min(axis=0)
        bound = np.where(fixed >= 0, each[fixed, np.arange(t.shape[1])], free)
        least = max(least, float(bound.sum()))
    return least


def least_spread_ps(
    p: StageProblem, again_ps: int, sure_extra: Callable[[StageProblem], tuple[int, ...]]
) -> int:
    """The makespan of one stage a rank is at least this; as `lower_bound_ps` has it for ranks
    that are alike. again_ps: recomputation on all ranks together, at least."""
    times, counts, glue = [], [], []
    for q, count in p.sides:
        layers = map(sum, zip(q.forward_ps, q.input_grad_ps, q.weight_grad_ps, sure_extra(q)))
        ends = [e.forward_ps + e.input_grad_ps + e.weight_grad_ps for e in (q.first, q.last)]
        times.append([*layers, *ends, again_ps])
        counts.append(count)
        glue.append(q.rank_glue_forward_ps + q.rank_glue_backward_ps)
    for row in times:  # each kind's own glue, on it alone
        row += [n * each for n, each in zip(counts, glue)]
    kinds = len(counts)
    only = [*[None] * p.layers, 0, kinds - 1, None, *range(kinds)]
    m, pp = p.microbatches, p.pp
    ways: list[tuple[float, float]] = [(m, 0.0)]
    if p.schedule == "gpipe":
        ways += [(m - 1, 1.0)]
    elif p.schedule == "1f1b":
        ways += [(m - 1 - pp, 2.0)] if m > pp else [(0.0, 2 * m / (m + 1))]
    least = max(least_spread(times, only, counts, c, e) for c, e in ways)
    return int(least * (1 - ROUNDING)) - 1


def share_of_layers(p: StageProblem) -> int:
    """Layers of the longest stage, where all ranks took as long."""
    rates = [
        (p.layers / max(1, sum(q.forward_ps) + sum(q.input_grad_ps) + sum(q.weight_grad_ps)), n)
        for q, n in p.sides
    ]
    whole = sum(rate * n for rate, n in rates)
    return min(p.layers, int(p.layers * max(rate for rate, _ in rates) / whole) + 1)
