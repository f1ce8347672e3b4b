"""What a plan comes to in a real job: the rate that failures leave, energy, USD on demand and spot.

Both prices are by the GPU hour, so on the same GPUs the plan of most tokens a second also
costs least a token and takes least energy. What a plan leaves idle is not charged. Spot machines
are taken away beside failing: each preemption costs what a failure does. Sources:
cost_models/goodput.py, docs/size.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cost_models.decisions import Decisions, Workload
from cost_models.fleet import Hardware, used_parts
from cost_models.goodput import Goodput, chosen, goodput, inputs
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
    hardware: Hardware,
    workload: Workload,
    d: Decisions,
    e: Estimate,
    operations: Operations,
    prices: Mapping[str, Price],
) -> Charges:
    """What a plan comes to on the GPUs that it uses. prices: by device; a sum is not known where
    one of them has no such price. Raises UsageError for a tier that the hardware does not have."""
    parts = used_parts(hardware, d)

    def kept(under: Operations) -> Goodput | None:
        return chosen(goodput(graph, hardware, workload, d, e, under), parts, under)

    reads = inputs(graph, hardware, workload, d, e.step_time_s, operations)
    usual, rate = kept(operations), e.tokens / e.step_time_s / reads.waits
    expected = rate * (usual.useful if usual else 1.0)
    watts = watts_of(parts, operations)
    found = Charges(
        goodput=usual, tokens_per_s=e.tokens / e.step_time_s, expected_tokens_per_s=expected,
        joules_per_token=watts / expected if expected else math.inf,
    )  # fmt: skip
    hourly = usd_per_hour(parts, prices)
    if hourly is not None:
        found = replace(found, usd_per_million_tokens=usd_per_million(hourly, expected))
    hourly = usd_per_hour(parts, prices, spot=True)
    if hourly is None:
        return found
    spot = kept(on_spot(operations, parts, prices))
    expected = rate * (spot.useful if spot else 1.0)
    return replace(
        found, spot_goodput=spot, spot_expected_tokens_per_s=expected,
        spot_usd_per_million_tokens=usd_per_million(hourly, expected),
    )  # fmt: skip


def watts_of(parts: Sequence[Cluster], operations: Operations) -> float:
    """What the GPUs of these parts draw, and the building for them."""
    return sum(part.count * part.device.power_w for part in parts) * operations.pue


def usd_per_hour(
    parts: Sequence[Cluster], prices: Mapping[str, Price], *, spot: bool = False
) -> float | None:
    """What all GPUs of these parts cost an hour; None where the file does not say it. spot: each
    device at its spot price, one that has none on demand; None where none has one."""
    found = [prices.get(part.kind) for part in parts]
    if spot and all(p is None or p.spot_usd_per_gpu_hour is None for p in found):
        return None
    hourly = [
        None if p is None
        else p.spot_usd_per_gpu_hour if spot and p.spot_usd_per_gpu_hour is not None
        else p.usd_per_gpu_hour
        for p in found
    ]  # fmt: skip
    known = [usd * part.count for usd, part in zip(hourly, parts) if usd is not None]
    return sum(known) if len(known) == len(parts) else None


def on_spot(
    operations: Operations, parts: Sequence[Cluster], prices: Mapping[str, Price]
) -> Operations:
    """The operations where machines are also taken away, as often as the price file says: the mean
    of all GPUs, as any one's stops the job."""
    taken = operations.preemptions_per_gpu_hour + preemptions(parts, prices)
    return replace(operations, preemptions_per_gpu_hour=taken)


def preemptions(parts: Sequence[Cluster], prices: Mapping[str, Price]) -> float:
    """How often a spot GPU is taken away in an hour, the mean of all; one on demand never is."""
    each = [(part.count, prices[part.kind].spot_preemptions_per_gpu_hour) for part in parts]
    return sum(n * (often or 0.0) for n, often in each) / sum(n for n, _ in each)


def usd_per_million(usd_per_hour: float | None, tokens_per_s: float) -> float:
    """USD for a million tokens at that rate; infinite where there is no price, or no rate."""
    if usd_per_hour is None or not tokens_per_s:
        return math.inf
    return usd_per_hour / 3600 / tokens_per_s * 1e6


def decided_by(found: Charges, parts: Sequence[Cluster], prices: Mapping[str, Price]) -> str:
    """Which price of a plan is its lesser, by which plans are compared; "" where no device of the
    hardware (all its parts, idle ones too) has a spot price, so that there is one price alone."""
    known = [prices[part.kind] for part in parts if part.kind in prices]
    spot = [p.spot_usd_per_gpu_hour is not None for p in known]
    if not any(spot):
        return ""
    if found.spot_usd_per_million_tokens != found.least_usd:
        return "by the lesser of on demand and spot; for this plan on demand"
    return "by spot prices" + "; on demand where a device has none" * (not all(spot))


def charges_said(
    found: Charges, parts: Sequence[Cluster], prices: Mapping[str, Price], unit: str
) -> tuple[str, ...]:
    """A line a price: what a million tokens (or samples) cost by it."""
    lines = []
    if found.usd_per_million_tokens is not None:
        lines.append(f"on demand: {found.usd_per_million_tokens:.4g} USD a million {unit}")
    if found.spot_usd_per_million_tokens is not None:
        useful = f", {found.spot_goodput.useful:.1%} useful" if found.spot_goodput else ""
        lines.append(
            f"spot: {found.spot_usd_per_million_tokens:.4g} USD a million {unit}, taken away"
            f" {preemptions(parts, prices):.3g} times a GPU hour{useful}"
        )
    return tuple(lines)
