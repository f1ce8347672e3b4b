"""`plan size --task serve`: which devices, and how many, serve a load within its limits.

A candidate is a device and a count, and its plan what `plan trace --task serve` finds there. They
are taken from what an hour costs least (USD, or without prices the boards' power) upwards, so that
most are beaten by a row that was found before they are searched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cost_models.hardware import Cluster, catalogue
from cost_models.pareto import dominates, front
from cost_models.prices import Price
from cost_models.serving_decisions import WEIGHT_BYTES
from cost_models.serving_host import host_of
from cost_models.serving_shapes import ServedModel
from ir.errors import InfeasibleError, UsageError
from planner.options import Progress
from planner.serving.asked import ServeAsked, ServePins, serve_pins_said
from planner.serving.meeting import limits_used
from planner.serving.predict import Prediction
from planner.serving.relief import NOTHING, relief
from planner.serving.runnable import ExpertsOf
from planner.serving.search import best_first, predictions
from planner.sizing import PAST, Left, counts

MOST_GPUS = 64  # by default: eight nodes of most devices
AXES = ("cost", "energy", "gpus", "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSized:
    """One candidate with its best plan. watts: the boards' limits. limits_used: the greater of TTFT
    and TPOT over its limit, 0 where there is none. usd_per_hour: None without a price on demand."""

    cluster: Cluster
    found: Prediction
    watts: float
    limits_used: float
    usd_per_hour: float | None = None

    @property
    def usd_per_million_tokens(self) -> float | None:
        """Of tokens that are written."""
        if self.usd_per_hour is None:
            return None
        return self.usd_per_hour / 3600 / self.found.tokens_per_s * 1e6

    @property
    def joules_per_token(self) -> float:
        return self.watts / self.found.tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSizing:
    """Candidates that meet the limits, cheapest first, each with whether it is on the front of the
    axes; `searched` were planned."""

    rows: tuple[ServeSized, ...]
    on_front: tuple[bool, ...]
    axes: tuple[str, ...]
    left: tuple[Left, ...]
    searched: int


@dataclass(kw_only=True)
class ServeSizer:
    """Compares clusters for one model and load. every: search also what a row beats in everything,
    and what bounds exclude."""

    model: ServedModel
    asked: ServeAsked
    pins: ServePins = field(default_factory=ServePins)
    experts: ExpertsOf | None = None
    prices: Mapping[str, Price] = field(default_factory=dict)
    most_gpus: int = MOST_GPUS
    every: bool = False
    progress: Progress | None = None
    rows: list[ServeSized] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    missed: list[ServeSized] = field(default_factory=list)
    searched: int = 0

    def __post_init__(self) -> None:
        if not self.asked.batch:
            raise UsageError("plan size --task serve needs a load: how many requests at once",
                             hints=("--batch 32 --prompt 1024 --output 1024",))  # fmt: skip

    @property
    def axes(self) -> tuple[str, ...]:
        """What the front is of: USD an hour where the file has prices, else the boards' power."""
        priced = any(p.usd_per_gpu_hour is not None for p in self.prices.values())
        return ("cost" if priced else "energy", "gpus", "time")

    def run(self, devices: tuple[Cluster, ...]) -> ServeSizing:
        """Compare devices (their counts are ours to choose).

        Raises InfeasibleError, naming what came nearest, where none meets the limits.
        """
        tried = [replace(d, count=n) for d in devices for n in self._counts(d)]
        ended: set[str] = set()  # devices that have a count well within the limits
        for cluster in sorted(tried, key=lambda c: (*self._least(c), c.name)):
            if cluster.name in ended:
                continue
            row = self._row(cluster)
            if row is not None and row.limits_used <= 1 / PAST:
                ended.add(cluster.name)
        if not self.rows:
            raise self._nothing(devices)
        self.rows.sort(key=lambda row: (*self.point(row), row.cluster.spec))
        return ServeSizing(
            rows=tuple(self.rows), on_front=front([self.point(row) for row in self.rows]),
            axes=self.axes, left=tuple(self.left), searched=self.searched,
        )  # fmt: skip

    def point(self, row: ServeSized) -> tuple[float, ...]:
        """What the front is of; what is faster than half of the limits counts as alike."""
        return (*self._least(row.cluster)[:2], max(row.limits_used, 1 / PAST))

    def _least(self, cluster: Cluster) -> tuple[float, ...]:
        """The least that any plan on a cluster has of each axis: all but the time is known."""
        usd = self._usd_per_hour(cluster)
        hourly = cluster.count * cluster.device.power_w
        if self.axes[0] == "cost":
            hourly = math.inf if usd is None else usd
        return hourly, float(cluster.count), 1 / PAST

    def _counts(self, device: Cluster) -> list[int]:
        """The counts that are tried; a hardware file's own is the most of it that there is."""
        if device.name in catalogue():
            return list(counts(device, self.most_gpus))
        found = list(counts(device, min(self.most_gpus, device.count)))
        return found if device.count > self.most_gpus else list(
            dict.fromkeys([*found, device.count])
        )

    def _row(self, cluster: Cluster) -> ServeSized | None:
        """The candidate's row, where it has one; else why not is kept."""
        most = self.asked.max_tpot_s or math.inf
        reason = ""
        if not self.every:
            if any(dominates(self.point(row), self._least(cluster)) for row in self.rows):
                reason = "dominated"
            elif least_tpot_s(self.model, cluster, self.asked, self.pins) > most:
                reason = "slow"
        row = None
        if not reason:
            row, reason = self._search(cluster)
        if row is None:
            self.left.append(Left(hardware=cluster.spec, reason=reason))
        else:
            self.rows.append(row)
        return row

    def _search(self, cluster: Cluster) -> tuple[ServeSized | None, str]:
        """The best plan within the limits, or why there is none."""
        if self.progress:
            self.progress(f"{cluster.spec}: {len(self.rows)} found")
        self.searched += 1
        try:
            seen, _ = predictions(
                self.model, cluster, self.asked, self.pins, experts=self.experts
            )
        except UsageError:  # the pins, or the engine, divide no such count
            return None, "divided"
        rows = best_first(seen, self.asked, cluster)
        fits = [self._sized(cluster, p) for p in rows if p.fits]
        whole = [row for row in fits if row.found.running >= self.asked.batch]
        met = [row for row in whole if row.limits_used <= 1]
        if met:
            return met[0], ""
        if fits:
            self.missed.append(min(whole or fits, key=self._missed_by))
        return None, "slow" if whole else "room" if fits else "memory"

    def _sized(self, cluster: Cluster, p: Prediction) -> ServeSized:
        return ServeSized(
            cluster=cluster, found=p, watts=cluster.count * cluster.device.power_w,
            limits_used=limits_used(p, self.asked), usd_per_hour=self._usd_per_hour(cluster),
        )  # fmt: skip

    def _usd_per_hour(self, cluster: Cluster) -> float | None:
        price = self.prices.get(cluster.name)
        if price is None or price.usd_per_gpu_hour is None:
            return None
        return price.usd_per_gpu_hour * cluster.count

    def _missed_by(self, row: ServeSized) -> tuple[float, float]:
        return -min(row.found.running, self.asked.batch), row.limits_used

    def _nothing(self, devices: tuple[Cluster, ...]) -> InfeasibleError:
        asked, near = self.asked, min(self.missed, key=self._missed_by, default=None)
        reasons = {left.reason for left in self.left}
        hints = ["a larger --max-gpus, another --hardware, or --allow int8,int4,fp8"]
        why = "no plan was found that fits any count"
        if reasons == {"slow"}:
            why = "reading the weights alone takes longer than --max-tpot on all of them"
        if reasons == {"divided"}:
            why = "the pins, or what the engine runs, leave no way to divide any of the counts"
        if near is not None:
            p = near.found
            why = f"nearest: {near.cluster.spec}, first token {p.ttft_s * 1e3:.0f} ms, then" \
                  f" {p.tpot_s * 1e3:.1f} ms; {p.bottleneck} binds it"  # fmt: skip
            if p.running < asked.batch:
                why += f"; {p.running:.0f} of {asked.batch} requests run at once"
            else:
                flags = [f"--max-ttft {math.ceil(p.ttft_s * 1e3)}ms"] * (
                    asked.max_ttft_s is not None)  # fmt: skip
                flags += [f"--max-tpot {math.ceil(p.tpot_s * 1e3)}ms"] * (
                    asked.max_tpot_s is not None)  # fmt: skip
                hints.insert(0, " ".join(flags) + " can be met")
            helps = relief(p, asked, serve_pins_said(self.pins))
            hints += [helps] if helps != NOTHING else []
        return InfeasibleError(
            f"none of {len(devices)} devices serves {asked.batch} requests at once within the"
            f" limits on {self.most_gpus} GPUs or fewer", why=why, hints=tuple(hints),
        )  # fmt: skip


def least_tpot_s(
    model: ServedModel, cluster: Cluster, asked: ServeAsked, pins: ServePins
) -> float:
    """Seconds between tokens that no plan goes below: every weight that all tokens meet is read
    once a step, from the GPUs' memory, or from below by the links and the CPUs together."""
    words = {pins.weights} if pins.weights else {asked.precision, *asked.formats}
    width = min(WEIGHT_BYTES[word] for word in (*words, *(word for _, word in asked.keep)) if word)
    met = sum(n for block, n in model.block_elements().items()
              if block not in ("routed_experts", "embeddings"))  # fmt: skip
    each, device = met * width / cluster.count, cluster.device
    on_gpu_s = min(each, device.memory_bytes) / device.memory_bandwidth_bytes_per_s
    lower = max(0.0, each - device.memory_bytes)
    dram = max((t.read_bytes_per_s for t in cluster.tiers), default=0.0)
    rate = device.host_link_bytes_per_s
    if dram:
        on_host = max(host_of(device).products_of(word, dram).row_bytes_per_s
                      for word in ("bf16", "fp32"))  # fmt: skip
        rate += on_host / min(cluster.node_size, cluster.count)
    return max(on_gpu_s, lower / rate if lower else 0.0)
