"""What is left of a plan's rate in a real job, as text at 80 columns or as one JSON document."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cost_models.fleet import used_parts
from cost_models.goodput import Goodput, goodput, inputs
from cost_models.hardware import Cluster
from cost_models.operations import SOURCES, Operations
from cost_models.prices import Price
from cost_models.units import format_bytes, format_bytes_per_s, format_rate, format_seconds
from planner.charges import Charges, charges, charges_said
from planner.check import Checked

WIDTH = 80
DAY_S, HOUR_S = 86_400, 3600


def goodput_text(
    checked: Checked, operations: Operations, prices: Mapping[str, Price] | None = None
) -> str:
    """Checkpoints on each tier, what failures leave, what a node reads, and what it costs."""
    plan, hardware, e = checked.plan, checked.hardware, checked.estimate
    parts = used_parts(hardware, plan.decisions)
    rows = goodput(plan.graph, hardware, plan.workload, plan.decisions, e, operations)
    reads = inputs(plan.graph, hardware, plan.workload, plan.decisions, e.step_time_s, operations)
    unit = "tokens" if plan.graph.seq_in_input else "samples"
    rate, gpus = e.tokens / e.step_time_s, sum(part.count for part in parts)
    lines = [
        f"{plan.graph.name} on {plan.hardware}: {format_rate(rate)} {unit}/s where nothing fails",
        f"  failures    {operations.failures_per_gpu_hour:.3g} a GPU hour, preemptions"
        f" {operations.preemptions_per_gpu_hour:.3g}: {_each(operations, gpus)}",
    ]
    if rows:
        lines += [
            f"  checkpoint  {format_bytes(rows[0].checkpoint_bytes)};"
            f" the busiest node writes {format_bytes(rows[0].node_bytes)}",
            "",
            f"{'tier':10}{'write':>9}{'restart':>9}{'every':>9}{'steps':>8}{'useful':>9}"
            f"{unit + '/s':>14}",
        ]
    lines += [_tier(row, e.step_time_s * reads.waits, rate / reads.waits) for row in rows]
    named = dict.fromkeys(tier.name for part in parts for tier in part.tiers)
    counted = {row.tier for row in rows}
    lines += [f"{name:10}{_unfit(name, parts)}" for name in named if name not in counted]
    share = f", {reads.share:.1%} of what {reads.tier} gives" if reads.share is not None else ""
    lines += ["", f"  input       a node reads {format_bytes_per_s(reads.node_bytes_per_s)}{share}"]
    if reads.waits > 1:
        most = format_rate(rate / reads.waits)
        lines.append(f"{'':14}steps wait for it: {most} {unit}/s at most")
    lines += [
        *_costs(checked, operations, prices, unit),
        *_defaults(operations),
    ]
    return "\n".join(lines)


def goodput_json(
    checked: Checked, operations: Operations, prices: Mapping[str, Price] | None = None
) -> dict[str, Any]:
    """The same in base units; an interval where nothing fails is null."""
    plan, hardware, e = checked.plan, checked.hardware, checked.estimate
    rows = goodput(plan.graph, hardware, plan.workload, plan.decisions, e, operations)
    reads = inputs(plan.graph, hardware, plan.workload, plan.decisions, e.step_time_s, operations)
    rate = e.tokens / e.step_time_s
    return {
        "schema": "goodput/1",
        "hardware": plan.hardware,
        "step_time_s": e.step_time_s,
        "tokens_per_s": rate,
        "tiers": [
            {key: _finite(value) for key, value in asdict(row).items()}
            | {"expected_tokens_per_s": rate / reads.waits * row.useful}
            for row in rows
        ],
        "input": asdict(reads),
        "assumed": asdict(operations),
        **({"cost": _cost_json(checked, operations, prices)} if prices else {}),
    }


def _charges(
    checked: Checked, operations: Operations, prices: Mapping[str, Price]
) -> Charges:
    plan = checked.plan
    return charges(
        plan.graph, checked.hardware, plan.workload, plan.decisions, checked.estimate,
        operations, prices,
    )  # fmt: skip


def _costs(
    checked: Checked, operations: Operations, prices: Mapping[str, Price] | None, unit: str
) -> list[str]:
    """A line a price, on the tier that the job is counted on."""
    if not prices:
        return []
    parts = used_parts(checked.hardware, checked.plan.decisions)
    said = charges_said(_charges(checked, operations, prices), parts, prices, unit)
    lines = [line for text in said for line in textwrap.wrap(text, WIDTH - 14)]
    return [f"  {'' if i else 'cost':12}{line}" for i, line in enumerate(lines)]


def _cost_json(
    checked: Checked, operations: Operations, prices: Mapping[str, Price]
) -> dict[str, Any]:
    found = _charges(checked, operations, prices)
    keys = ("expected_tokens_per_s", "usd_per_million_tokens", "spot_expected_tokens_per_s",
            "spot_usd_per_million_tokens")  # fmt: skip
    return {key: getattr(found, key) for key in keys}


def _unfit(name: str, parts: Sequence[Cluster]) -> str:
    """Why no checkpoint is counted on a tier."""
    without = [part.name for part in parts if name not in {tier.name for tier in part.tiers}]
    return f"{' and '.join(without)} has none" if without else "too small for a checkpoint"


def _tier(row: Goodput, step_s: float, rate: float) -> str:
    every = math.isfinite(row.interval_s)
    steps = f"{max(1, round(row.interval_s / step_s)):,}" if every else "-"
    return (
        f"{row.tier:10}{format_seconds(row.write_s):>9}{format_seconds(row.restart_s):>9}"
        f"{_long(row.interval_s) if every else 'never':>9}{steps:>8}{row.useful:>9.2%}"
        f"{format_rate(rate * row.useful):>14}"
    )


def _each(operations: Operations, gpus: int) -> str:
    per_s = operations.interruptions_per_s(gpus)
    return f"one in {_long(1 / per_s)}" if per_s else "none"


def _long(seconds: float) -> str:
    """A duration, in hours or days where it is that long."""
    if seconds >= 2 * DAY_S:
        return f"{seconds / DAY_S:,.1f} days"
    return f"{seconds / HOUR_S:.1f} h" if seconds >= 2 * HOUR_S else format_seconds(seconds)


def _defaults(operations: Operations) -> list[str]:
    """What the user did not set, with its source."""
    said = [
        f"{name} {getattr(operations, name):.3g}: {SOURCES[name]}"
        for name in ("failures_per_gpu_hour", "restart_s")
        if getattr(operations, name) == getattr(Operations(), name)
    ]
    wrapped = [line for text in said for line in textwrap.wrap(text, WIDTH - 14)]
    return [f"  {'' if i else 'assumed':12}{line}" for i, line in enumerate(wrapped)]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and math.isinf(value) else value
