"""What a plan comes to in a real job: the rate that failures leave, energy, USD on demand and spot.

Both prices are by the GPU hour, so at one number of GPUs the plan of most tokens a second also
costs least a token and takes least energy. Spot machines are taken away beside failing: each
preemption costs what a failure does. Sources: cost_models/goodput.py, docs/size.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cost_models.decisions import Decisions, Workload
from cost_models.goodput import Goodput, chosen, goodput
from cost_models.hardware import Cluster
from cost_models.ledger import Estimate
from cost_models.operations import Operations
from cost_models.prices import Price
from ir.graph import Graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Charges:
    """Rates are tokens a second: of the step alone, and expected, with what checkpoints and
    failures take. joules_per_token: of the expected ones, at the device's power. spot_: with
    preemptions beside failures. A price that the user's file does not have is None."""

    goodput: Goodput | None
    tokens_per_s: float
    expected_tokens_per_s: float
    joules_per_token: float
    usd_per_million_tokens: float | None = None
    spot_goodput: Goodput | None = None
    spot_expected_tokens_per_s: float | None = None
    spot_usd_per_million_tokens: float | None = None

    @property
    def least_usd(self) -> float:
        """The lesser of what a million tokens cost; infinite without a price."""
        both = (self.usd_per_million_tokens, self.spot_usd_per_million_tokens)
        return min((usd for usd in both if usd is not None), default=math.inf)


def charges(
    graph: Graph,
    cluster: Cluster,
    workload: Workload,
    d: Decisions,
    e: Estimate,
    operations: Operations,
    price: Price | None,
) -> Charges:
    """What a plan comes to. Raises UsageError for a tier that the hardware does not have."""

    def kept(under: Operations) -> Goodput | None:
        return chosen(goodput(graph, cluster, workload, d, e, under), cluster, under)

    usual, rate = kept(operations), e.tokens / e.step_time_s
    expected = rate * (usual.useful if usual else 1.0)
    watts = cluster.count * cluster.device.power_w * operations.pue
    found = Charges(
        goodput=usual, tokens_per_s=rate, expected_tokens_per_s=expected,
        joules_per_token=watts / expected if expected else math.inf,
    )  # fmt: skip
    if price is None:
        return found
    if price.usd_per_gpu_hour is not None:
        usd = usd_per_million(price.usd_per_gpu_hour, cluster.count, expected)
        found = replace(found, usd_per_million_tokens=usd)
    if price.spot_usd_per_gpu_hour is None:
        return found
    spot = kept(on_spot(operations, price))
    expected = rate * (spot.useful if spot else 1.0)
    usd = usd_per_million(price.spot_usd_per_gpu_hour, cluster.count, expected)
    return replace(
        found, spot_goodput=spot, spot_expected_tokens_per_s=expected,
        spot_usd_per_million_tokens=usd,
    )  # fmt: skip


def on_spot(operations: Operations, price: Price) -> Operations:
    """The operations where machines are also taken away, as often as the price file says."""
    taken = operations.preemptions_per_gpu_hour + (price.spot_preemptions_per_gpu_hour or 0.0)
    return replace(operations, preemptions_per_gpu_hour=taken)


def usd_per_million(usd_per_gpu_hour: float | None, gpus: int, tokens_per_s: float) -> float:
    """USD for a million tokens at that rate; infinite where there is no price, or no rate."""
    if usd_per_gpu_hour is None or not tokens_per_s:
        return math.inf
    return usd_per_gpu_hour * gpus / 3600 / tokens_per_s * 1e6


def charges_said(found: Charges, price: Price, unit: str) -> tuple[str, ...]:
    """A line a price: what a million tokens (or samples) cost by it."""
    lines = []
    if found.usd_per_million_tokens is not None:
        lines.append(f"on demand: {found.usd_per_million_tokens:.4g} USD a million {unit}")
    if found.spot_usd_per_million_tokens is not None:
        useful = f", {found.spot_goodput.useful:.1%} useful" if found.spot_goodput else ""
        lines.append(
            f"spot: {found.spot_usd_per_million_tokens:.4g} USD a million {unit}, taken away"
            f" {price.spot_preemptions_per_gpu_hour:.3g} times a GPU hour{useful}"
        )
    return tuple(lines)
