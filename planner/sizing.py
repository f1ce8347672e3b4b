"""`plan size`: which hardware, and how much of it, reaches a target; one search a candidate.

A candidate is a device and a count; counts double. A sum of several kinds is one, as it is. All
candidates share the traced graph, the workload and an effort that is a small part of `plan
trace`'s. What a device cannot reach at its peak is not searched, nor what a row beats even there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cost_models.decisions import Decisions, Workload
from cost_models.estimate import estimate_step, whole_step_ps
from cost_models.fleet import Fleet, Hardware
from cost_models.goodput import Goodput, Inputs, inputs
from cost_models.hardware import Cluster, catalogue
from cost_models.ledger import Estimate
from cost_models.operations import Operations
from cost_models.pareto import dominates, front
from cost_models.prices import Price
from cost_models.state import COMPUTE_BYTES
from cost_models.step import Costs
from cost_models.units import format_rate
from ir.errors import InfeasibleError
from ir.graph import Graph
from planner.bounds import mesh_bounds_ps
from planner.charges import charges, usd_per_hour, usd_per_million, watts_of
from planner.decisions import Pins
from planner.fleet_sizing import fastest_on
from planner.limits import Limits, capped, uncapped
from planner.mesh import Mesh, meshes
from planner.options import Progress
from planner.search import Searcher
from planner.space import SEARCHED_SCHEDULES

SEARCH_EFFORT = 60  # `plan trace` has DEFAULT_EFFORT; this finds within some percent of that
RETRY_EFFORT = 400  # where nothing was found that fits
MOST_GPUS = 16_384  # by default: more than all but a few published runs had
PAST = 2.0  # more than so many times the target counts no more: a device's counts end there
AXES = ("time", "cost", "spot", "energy", "gpus", "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a plan must reach: expected tokens a second (0: any), a step of at most so long."""

    tokens_per_s: float = 0.0
    step_time_s: float = math.inf

    def reached(self, row: Sized) -> bool:
        fast = row.expected_tokens_per_s >= self.tokens_per_s
        return fast and row.estimate.step_time_s <= self.step_time_s

    def least_tokens_per_s(self, tokens: int) -> float:
        """The rate of the step alone that is needed; tokens: of a step."""
        return max(self.tokens_per_s, tokens / self.step_time_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """One candidate with the fastest plan that was found for it; of a sum, on any of its parts.

    Rates are tokens a second: of the step alone, and expected, with what checkpoints and failures
    take. joules_per_token: of the expected ones, at the device's power. A price that the user's
    file does not have is None.
    """

    hardware: Hardware
    decisions: Decisions
    estimate: Estimate
    gap: float
    goodput: Goodput | None
    inputs: Inputs
    tokens_per_s: float
    expected_tokens_per_s: float
    joules_per_token: float
    usd_per_million_tokens: float | None = None
    spot_expected_tokens_per_s: float | None = None
    spot_usd_per_million_tokens: float | None = None

    @property
    def gpus(self) -> int:
        """Those that the plan uses."""
        return self.decisions.gpus

    @property
    def headroom_bytes(self) -> int:
        return self.estimate.capacity_bytes - self.estimate.peak_memory_bytes

    def value(self, axis: str) -> float:
        """What an axis counts; smaller is better, and what is not known worst."""
        number = {
            "time": -self.expected_tokens_per_s,
            "cost": self.usd_per_million_tokens,
            "spot": self.spot_usd_per_million_tokens,
            "energy": self.joules_per_token,
            "gpus": self.gpus,
            "memory": -self.headroom_bytes,
        }[axis]
        return math.inf if number is None else float(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A candidate that is no row. reason: memory, slow, cost, unpriced, dominated, or
    gpus of a sum."""

    hardware: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Candidates that reach the target within the limits, in the devices' order, each with
    whether it is on the front of the axes; `searched` plans were looked for."""

    rows: tuple[Sized, ...]
    on_front: tuple[bool, ...]
    axes: tuple[str, ...]
    left: tuple[Left, ...]
    searched: int


def counts(cluster: Cluster, most: int) -> Iterator[int]:
    """Sizes of a cluster that are tried: powers of two inside a node, then of whole nodes."""
    count = 1
    while count <= most:
        yield count
        inside = count < cluster.node_size
        count = min(2 * count, cluster.node_size) if inside else 2 * count


@dataclass(kw_only=True)
class Sizer:
    """Compares clusters for one graph and workload. every: search also candidates that a row is
    known to beat in everything."""

    graph: Graph
    workload: Workload
    target: Target
    operations: Operations = field(default_factory=Operations)
    limits: Limits = field(default_factory=Limits)
    prices: Mapping[str, Price] = field(default_factory=dict)
    axes: tuple[str, ...] = ("time", "energy", "gpus")
    effort: int = SEARCH_EFFORT
    every: bool = False
    progress: Progress | None = None
    rows: list[Sized] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    searched: int = 0
    missed: list[Sized] = field(default_factory=list)
    bounded: list[tuple[float, str]] = field(default_factory=list)

    def run(self, devices: Sequence[Hardware]) -> Sizing:
        """Compare devices (their counts are ours to choose), the most work a joule first, then sums
        as they are.

        Raises InfeasibleError, naming what came nearest, where none reaches the target.
        """
        alone = [device for device in devices if isinstance(device, Cluster)]
        for device in sorted(alone, key=lambda c: (-self._peak(c) / c.device.power_w, c.name)):
            self._follow(device)
        for fleet in devices:
            if isinstance(fleet, Fleet):
                self._join(fleet)
        if not self.rows:
            raise self._nothing(devices)
        marks = front([self._point(row) for row in self.rows])
        return Sizing(
            rows=tuple(self.rows), on_front=marks, axes=self.axes, left=tuple(self.left),
            searched=self.searched,
        )  # fmt: skip

    def _follow(self, device: Cluster) -> None:
        """One device's counts, ascending, until the target is well exceeded."""
        search = _Searches(self.graph, self.workload, device, self.limits, self.effort)
        parameters = COMPUTE_BYTES[self.workload.precision] * self.graph.parameter_count
        tokens = self.workload.global_batch * self.workload.seq_len
        least = self.target.least_tokens_per_s(tokens)
        for count in self._counts(device):
            cluster = replace(device, count=count)
            usable = capped(cluster, self.limits.memory_bytes).device.memory_bytes
            if count * usable < parameters:
                self._leave(cluster, "memory")
                continue
            most = count * self._peak(device) * tokens / search.flop
            if most >= least:
                most = min(most, search.most_tokens_per_s(cluster))
            if most < least:
                self.bounded.append((most, cluster.spec))
                self._leave(cluster, "slow")
                continue
            if not self.every and self._beaten(cluster, most):
                self._leave(cluster, "dominated")
                if most >= PAST * least:
                    return
                continue
            row = self._row(cluster, search)
            if row is not None and row.expected_tokens_per_s >= PAST * least > 0:
                return

    def _join(self, fleet: Fleet) -> None:
        """A sum of several kinds: one candidate, whatever of it the quickest plan uses."""
        if fleet.count > (self.limits.gpus or MOST_GPUS):
            self._leave(fleet, "gpus")
            return
        if self.progress:
            self.progress(f"{fleet.spec}: {len(self.rows)} found")
        self.searched += 1
        found = None
        for effort in (self.effort, max(self.effort, RETRY_EFFORT)):
            found = found or fastest_on(
                self.graph, fleet, self.workload, self.limits.memory_bytes, effort
            )
        if found is None:
            self._leave(fleet, "memory")
        else:
            self._judge(self._priced(fleet, *found))

    def _counts(self, device: Cluster) -> list[int]:
        """The counts that are tried; a hardware file's own is the most of it that there is."""
        most = self.limits.gpus or MOST_GPUS
        if device.name in catalogue():
            return list(counts(device, most))
        found = list(counts(device, min(most, device.count)))
        return found if device.count > most else list(dict.fromkeys([*found, device.count]))

    def _row(self, cluster: Cluster, search: _Searches) -> Sized | None:
        if self.progress:
            self.progress(f"{cluster.spec}: {len(self.rows)} found")
        self.searched += 1
        found = search.fastest(cluster)
        if found is None:
            self._leave(cluster, "memory")
            return None
        return self._judge(self._priced(cluster, *found))

    def _judge(self, row: Sized) -> Sized:
        """Whether it reaches the target within the limits, and is a row."""
        usd = min(row.value("cost"), row.value("spot"))
        if not self.target.reached(row):
            self.missed.append(row)
            self._leave(row.hardware, "slow")
        elif usd > self.limits.usd:
            self.missed.append(row)
            self._leave(row.hardware, "cost" if usd < math.inf else "unpriced")
        else:
            self.rows.append(row)
        return row

    def _priced(self, hardware: Hardware, d: Decisions, e: Estimate, gap: float) -> Sized:
        """What a plan comes to: useful time, energy, USD."""
        found = charges(
            self.graph, hardware, self.workload, d, e, self.operations, self.prices
        )  # fmt: skip
        return Sized(
            hardware=hardware, decisions=d, estimate=e, gap=gap, goodput=found.goodput,
            inputs=inputs(
                self.graph, hardware, self.workload, d, e.step_time_s, self.operations
            ),
            tokens_per_s=found.tokens_per_s, expected_tokens_per_s=found.expected_tokens_per_s,
            joules_per_token=found.joules_per_token,
            usd_per_million_tokens=found.usd_per_million_tokens,
            spot_expected_tokens_per_s=found.spot_expected_tokens_per_s,
            spot_usd_per_million_tokens=found.spot_usd_per_million_tokens,
        )  # fmt: skip

    def _beaten(self, cluster: Cluster, most: float) -> bool:
        """Whether a row is better by every axis than any plan of at most so many tokens a second
        on this cluster."""
        watts = watts_of((cluster,), self.operations)
        least = {
            "time": self._counted(-most), "energy": watts / most, "gpus": float(cluster.count),
            "cost": usd_per_million(usd_per_hour((cluster,), self.prices), most),
            "spot": usd_per_million(usd_per_hour((cluster,), self.prices, spot=True), most),
            "memory": -float(cluster.device.memory_bytes),
        }  # fmt: skip
        point = [least[axis] for axis in self.axes]
        return any(dominates(self._point(row), point) for row in self.rows)

    def _point(self, row: Sized) -> list[float]:
        """What the front is of."""
        numbers = {axis: row.value(axis) for axis in self.axes}
        return [self._counted(x) if axis == "time" else x for axis, x in numbers.items()]

    def _counted(self, minus_tokens_per_s: float) -> float:
        """A rate as the front sees it: beyond `PAST` times the target all are alike."""
        tokens = self.workload.global_batch * self.workload.seq_len
        least = self.target.least_tokens_per_s(tokens)
        return max(minus_tokens_per_s, -PAST * least) if least else minus_tokens_per_s

    def _peak(self, cluster: Cluster) -> float:
        """The most FLOPs a second of a device in the workload's format."""
        formats = {"fp32": ("fp32", "tf32")}.get(self.workload.precision, ())
        formats = (*formats, *self.workload.allowed_formats)
        device = cluster.device
        return max(device.peak(p) for p in (self.workload.precision, *formats) if device.has(p))

    def _leave(self, hardware: Hardware, reason: str) -> None:
        self.left.append(Left(hardware=hardware.spec, reason=reason))

    def _nothing(self, devices: Sequence[Hardware]) -> InfeasibleError:
        most = self.limits.gpus or MOST_GPUS
        near = max(self.missed, key=lambda row: row.expected_tokens_per_s, default=None)
        why = "no plan was found that fits any count"
        if self.bounded:
            rate, spec = max(self.bounded)
            why = f"nearest: {spec}, less than {format_rate(rate)} tokens/s"
        if near is not None:
            why = (
                f"nearest: {near.hardware.spec}, {format_rate(near.expected_tokens_per_s)} tokens/s"
                f" expected, {near.estimate.step_time_s:.3g} s a step"
            )
        return InfeasibleError(
            f"none of {len(devices)} devices reaches the target on {most} GPUs or fewer", why=why,
            hints=("a larger --max-gpus or --global-batch, another --hardware or a lower target",),
        )  # fmt: skip


class _Searches:
    """The fastest plan of one device at any of its counts; counts whose domains are alike share
    how units lie on tp, which is inside a domain."""

    def __init__(
        self, graph: Graph, workload: Workload, device: Cluster, limits: Limits, effort: int
    ) -> None:
        self.memory_bytes, self.effort = limits.memory_bytes, effort
        self.costs = Costs(graph=graph, cluster=replace(device, count=1), workload=workload)
        self.known: dict[int, Searcher] = {}
        self.last: tuple[int, tuple[Mesh, ...], Searcher] | None = None
        step = self.costs.step(Decisions(), Searcher(costs=self.costs).assign(1, False))
        each = sum(sum(step.row(i).flop) for i in range(len(step.chain.links)))
        self.flop = each * workload.global_batch  # executed, nothing computed again

    def most_tokens_per_s(self, cluster: Cluster) -> float:
        """A rate that no plan exceeds, by the search's own bounds; 0 where there is no mesh."""
        found, searcher = self._searcher(cluster)
        if not found:
            return 0.0
        costs = searcher.costs
        least = min(
            int(mesh_bounds_ps(
                costs, found, searcher.assign, schedules=SEARCHED_SCHEDULES, formats=formats
            ).lower_ps.min())
            for formats in searcher.format_ways()
        )  # fmt: skip
        step_ps = whole_step_ps(costs, least)
        return costs.workload.global_batch * costs.workload.seq_len * 1e12 / step_ps

    def fastest(self, cluster: Cluster) -> tuple[Decisions, Estimate, float] | None:
        """(decisions, estimate, gap); None where nothing was found that fits."""
        _, searcher = self._searcher(cluster)
        for effort in (self.effort, max(self.effort, RETRY_EFFORT)):
            searcher.effort = effort
            out = searcher.run()
            if out.best is not None:
                d, costs = out.best.decisions, searcher.costs
                made = estimate_step(costs, costs.step(d, out.best.assignments), d)
                return d, uncapped(made, cluster), out.gap
            if out.seen:
                return None
        return None

    def _searcher(self, cluster: Cluster) -> tuple[tuple[Mesh, ...], Searcher]:
        """The meshes of a count and what searches them; kept for the count asked last."""
        if self.last is None or self.last[0] != cluster.count:
            seen, workload = capped(cluster, self.memory_bytes), self.costs.workload
            found = tuple(meshes(self.costs.chain, seen, workload, Pins()))
            points = dict.fromkeys([(1, 1), *((m.micro_batch, m.cp) for m in found)])
            costs = Costs(
                graph=self.costs.graph, cluster=seen, workload=workload, points=tuple(points)
            )
            alike = self.known.setdefault(cluster.domain_ranks, Searcher(costs=costs))
            self.last = (cluster.count, found, replace(alike, costs=costs))
        return self.last[1], self.last[2]
