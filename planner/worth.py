"""What plans on different GPUs are compared by: time, USD or joules; and what USD may not exceed.

On the same GPUs the quickest plan costs least and takes least energy, as both go by the hour. On
others they do not: a plan that leaves a part idle is slower, and may cost less. So a step counts as
many times as a second of its GPUs costs, with the share of the time that failures leave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cost_models.decisions import Decisions, Workload
from cost_models.fleet import Hardware
from cost_models.goodput import most_useful
from cost_models.hardware import Cluster
from cost_models.ledger import Estimate
from cost_models.operations import Operations
from cost_models.prices import Price
from ir.graph import Graph
from planner.charges import Charges, charges, on_spot, usd_per_hour, usd_per_million, watts_of

ENDLESS_PS = 1 << 60  # longer than any step


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """What a plan of a graph on hardware comes to: picoseconds of a step; with the objective cost
    USD a million tokens at the lesser price, with energy joules a token. most_usd: for a million
    tokens at most."""

    graph: Graph
    hardware: Hardware
    workload: Workload
    objective: str = "time"
    prices: Mapping[str, Price]
    operations: Operations
    most_usd: float = math.inf

    @property
    def by_time(self) -> bool:
        return self.objective not in ("cost", "energy")

    @property
    def simple(self) -> bool:
        """Whether the step is all that matters."""
        return self.by_time and math.isinf(self.most_usd)

    def charges(self, d: Decisions, e: Estimate) -> Charges:
        """What a plan costs by each price."""
        return charges(
            self.graph, self.hardware, self.workload, d, e, self.operations, self.prices
        )

    def of(self, d: Decisions, e: Estimate) -> tuple[float, float]:
        """(what a plan comes to, its USD a million tokens)."""
        found = self.charges(d, e)
        each = {"cost": found.least_usd, "energy": found.joules_per_token}
        return each.get(self.objective, e.step_time_ps), found.least_usd

    def least(self, parts: Sequence[Cluster], step_ps: int) -> float:
        """No plan on all GPUs of these parts comes to less whose step takes so long."""
        if self.by_time:
            return step_ps
        useful = most_useful(self.graph, parts, self.workload, self.operations)
        if self.objective == "energy":
            watts = watts_of(parts, self.operations)
            return watts / (useful * self._rate(step_ps)) if useful else math.inf
        return self.least_usd(parts, step_ps)

    def least_usd(self, parts: Sequence[Cluster], step_ps: int) -> float:
        """No plan on all GPUs of these parts costs less for a million tokens, whose step takes so
        long."""
        rate = self._rate(step_ps)
        return min((
            usd_per_million(usd, rate * most_useful(self.graph, parts, self.workload, under))
            for usd, under in self._ways(parts)
        ), default=math.inf)  # fmt: skip

    def longest_ps(self, parts: Sequence[Cluster], value: float) -> int:
        """The longest step with which a plan on these parts may come to no more than that."""
        if self.by_time:
            return int(value)
        each = self.least(parts, ENDLESS_PS) / ENDLESS_PS
        return int(min(value / each, ENDLESS_PS)) if each else ENDLESS_PS

    def _ways(self, parts: Sequence[Cluster]) -> Iterator[tuple[float, Operations]]:
        """(USD an hour, under which operations) of each way to pay for these GPUs."""
        usual = usd_per_hour(parts, self.prices)
        if usual is not None:
            yield usual, self.operations
        spot = usd_per_hour(parts, self.prices, spot=True)
        if spot is not None:
            yield spot, on_spot(self.operations, parts, self.prices)

    def _rate(self, step_ps: int) -> float:
        """Tokens a second."""
        return self.workload.global_batch * self.workload.seq_len / (max(1, step_ps) / 1e12)
