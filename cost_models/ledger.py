"""What one rank does and holds, by name; and the estimate made of it.

Times are integer picoseconds, memory integer bytes, rounded before anything is compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.tiers import TierUse

BREAKDOWN = (
    "compute", "recompute", "tp_comm", "dp_comm", "ep_comm", "cp_comm", "pp_comm", "bubble",
    "optimizer", "offload", "host", "jitter",
)  # fmt: skip
MEMORY = (
    "parameters", "gradients", "optimizer", "activations", "gathered", "logits", "workspace",
    "comm_buffers", "context", "fragmentation",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """`count` collectives a step of `size_bytes` each (the full tensor; all-to-all and p2p: what
    one rank holds) over `axis`, done for `where` (a unit class and edge, or a state); `total_s`
    alone on the wire, `exposed_s` after what hides it, both for all of them together."""

    kind: str
    axis: str
    size_bytes: int
    count: int
    where: str
    total_s: float
    exposed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLedger:
    """One pp rank's account of a step: `memory_bytes` has the keys of `MEMORY`, in order.

    parameters: elements of the units it runs, split over tp and experts, before the data ranks
    share them; in_flight: micro-batches whose activations it holds at the peak, by chunk.
    capacity_bytes: what its GPU has, where ranks' GPUs are of several kinds. part: of the hardware,
    where each part has replicas of its own, and with them such a rank.
    """

    pp_rank: int
    parameters: int
    in_flight: tuple[int, ...]
    memory_bytes: tuple[tuple[str, int], ...]
    collectives: tuple[Collective, ...]
    capacity_bytes: int | None = None
    part: str = ""

    @property
    def name(self) -> str:
        """Which rank it is, in words."""
        return f"pp rank {self.pp_rank}" + (f" of {self.part}" if self.part else "")

    @property
    def peak_bytes(self) -> int:
        return sum(size for _, size in self.memory_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A step of training, predicted.

    `breakdown_ps` has the keys of `BREAKDOWN` and sums to `step_time_ps`: exposed time of the
    busiest pp rank; where parts have replicas of their own, the mean over GPUs, what a part waits
    for others being bubble. `error` is the expected relative error. `model_flop` counts 6N + full
    attention for the whole step and job, `executed_flop` what the devices run. peak_flop_per_s,
    capacity_bytes: of a GPU; where these are of several kinds the mean, and the fullest rank's.
    `tiers`: the fullest of each that holds something.
    """

    step_time_ps: int
    breakdown_ps: tuple[tuple[str, int], ...]
    error: float
    tokens: int
    gpus: int
    model_flop: int
    executed_flop: int
    peak_flop_per_s: float
    capacity_bytes: int
    ranks: tuple[RankLedger, ...]
    assumptions: tuple[str, ...] = ()
    tiers: tuple[TierUse, ...] = ()

    @property
    def step_time_s(self) -> float:
        return self.step_time_ps / 1e12

    @property
    def peak_memory_bytes(self) -> int:
        """Of the fullest rank."""
        return self.fullest.peak_bytes

    def capacity_of(self, rank: RankLedger) -> int:
        return self.capacity_bytes if rank.capacity_bytes is None else rank.capacity_bytes

    @property
    def fullest(self) -> RankLedger:
        """The pp rank with the least memory left; the first of equals."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes - self.capacity_of(rank))

    @property
    def fits(self) -> bool:
        ranks = all(rank.peak_bytes <= self.capacity_of(rank) for rank in self.ranks)
        return ranks and all(use.fits for use in self.tiers)

    @property
    def model_flop_per_s_per_gpu(self) -> float:
        return self.model_flop / self.step_time_s / self.gpus

    @property
    def mfu(self) -> float:
        return self.model_flop_per_s_per_gpu / self.peak_flop_per_s
