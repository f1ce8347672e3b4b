"""The estimate of a plan whose parts have replicas of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cost_models.decisions import Decisions
from cost_models.estimate import estimate_alike, stage_problem, step_overhead, whole_step_ps
from cost_models.fleet import RULE
from cost_models.ledger import BREAKDOWN, Estimate
from cost_models.shares import SharedCosts, joined_ps
from cost_models.step import Step


def estimate_shares(costs: SharedCosts, step: Step, d: Decisions) -> Estimate:
    """The estimate of all parts, from each one's own with its stages decided."""
    steps = (replace(step, beside=()), *step.beside)
    pairs = list(zip(costs.sides, steps, strict=True))
    objective, _ = joined_ps([stage_problem(*pair) for pair in pairs], steps)
    total = whole_step_ps(costs, objective)
    made = [estimate_alike(side, own, own.decisions) for side, own in pairs]
    gpus = [share.dp * d.cp * d.tp for share in d.shares]
    ranks = tuple(
        replace(rank, part=side.cluster.name, capacity_bytes=side.cluster.device.memory_bytes)
        for side, e in zip(costs.sides, made) for rank in e.ranks
    )  # fmt: skip
    tightest = max(made, key=lambda e: e.peak_memory_bytes - e.capacity_bytes)
    return Estimate(
        step_time_ps=total,
        breakdown_ps=_mean(made, gpus, total, total - objective - step_overhead(costs)[0]),
        error=max(e.error for e in made), tokens=made[0].tokens, gpus=d.gpus,
        model_flop=sum(e.model_flop // d.dp * s.dp for e, s in zip(made, d.shares)),
        executed_flop=sum(e.executed_flop // d.dp * s.dp for e, s in zip(made, d.shares)),
        peak_flop_per_s=sum(e.peak_flop_per_s * n for e, n in zip(made, gpus)) / d.gpus,
        capacity_bytes=tightest.capacity_bytes, ranks=ranks,
        assumptions=tuple(dict.fromkeys([
            *([] if costs.said else [RULE]), *(note for e in made for note in e.assumptions),
        ])),
        tiers=tuple(use for e in made for use in e.tiers),
    )  # fmt: skip


def _mean(
    made: Sequence[Estimate], gpus: Sequence[int], total: int, jitter: int
) -> tuple[tuple[str, int], ...]:
    """The mean over all GPUs of their parts' breakdowns; what a part waits for others is bubble,
    and the sum is the step."""
    each = [dict(e.breakdown_ps) for e in made]
    found = {
        name: sum(row[name] * n for row, n in zip(each, gpus)) // sum(gpus) for name in BREAKDOWN
    }
    found |= {"bubble": 0, "jitter": jitter}
    found["bubble"] = total - sum(found.values())
    return tuple(found.items())
