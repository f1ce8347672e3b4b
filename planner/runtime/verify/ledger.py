"""What a plan predicts against what its ranks would do, at the plan's full size.

Bytes of parameters, gradients and optimizer state, and every collective by kind, axis and size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cost_models.engines import load_engine
from cost_models.ledger import RankLedger
from cost_models.state import mode_of
from planner.plan import Plan, load_cluster, recost
from planner.routed import expert_count, inside, reductions, routed_modules
from planner.runtime.parallel import LossFn
from planner.runtime.verify.full_size import Made, Seen, look_at

ROWS_OF_EXPERTS = "rows for each expert, one int64 each, so that ranks know what they get"
OWN_TOKENS = "a routed module runs on each rank's own tokens, and makes there what it needs"
ON_HOST = "lies on the host, and comes to the device as it is used"

Key = tuple[str, str, int]  # kind, axis, bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison. what: a kind of collective, counted a step, of size_bytes each over `axis`;
    or a kind of state ("parameters", "gradients", "optimizer"), in bytes, without an axis.

    where: what the plan says it is for. reason: why a difference is as it should be.
    """

    pp_rank: int
    what: str
    axis: str
    size_bytes: int
    where: str
    planned: int
    found: int
    reason: str = ""

    @property
    def equal(self) -> bool:
        return self.planned == self.found

    def __str__(self) -> str:
        size = f" of {self.size_bytes:,} bytes over {self.axis}" if self.axis else " bytes"
        told = f" ({self.where})" * bool(self.where) + f": {self.reason}" * bool(self.reason)
        return (
            f"pp rank {self.pp_rank}: {self.what}{size}: planned {self.planned:,}, "
            f"found {self.found:,}{told}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerResult:
    """Every comparison that was made, of one rank of each pipeline rank that was looked at."""

    rows: tuple[Row, ...]

    @property
    def differences(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.equal)

    @property
    def equal(self) -> bool:
        """Whether every difference has its reason."""
        return all(row.reason for row in self.differences)


def check_ledger(
    plan: Plan,
    model: nn.Module,
    inputs: Made,
    loss: LossFn,
    *,
    targets: Made | None = None,
    pp_ranks: Sequence[int] | None = None,
    folder: Path = Path(),
) -> LedgerResult:
    """Compare the plan's ledger with a step on a fake process group of the plan's size.

    model: as `planner.meta()` builds it; it is not changed. inputs and targets: of (batch,
    seq_len), as `plan trace` takes them; targets are class numbers [batch, seq_len] by default.
    pp_ranks: which to look at, by default the first, one in the middle and the last.
    Raises PlanError in a process that has a process group already.
    """
    d = plan.decisions
    estimate = recost(plan, load_cluster(plan, folder))
    rows: list[Row] = []
    for pp_rank in pp_ranks or sorted({0, d.pp // 2, d.pp - 1}):
        seen, ledger = look_at(plan, pp_rank, model, inputs, targets, loss), estimate.ranks[pp_rank]
        rows += [*_state_rows(plan, ledger, seen), *_sent_rows(plan, ledger, seen)]
    return LedgerResult(rows=tuple(rows))


def _state_rows(plan: Plan, ledger: RankLedger, seen: Seen) -> list[Row]:
    """Parameters, gradients and optimizer state: where whole copies are kept for the step, they
    are the parameters and the local shards the optimizer's."""
    mode = mode_of(plan.decisions, load_engine(plan.workload.engine))
    kept = mode.parameters_peak == "whole"
    found = {
        "parameters": seen.whole if kept else seen.local,
        "gradients": seen.gradients,
        "optimizer": seen.optimizer + (seen.local if kept else 0),
    }
    planned = dict(ledger.memory_bytes)
    # a fake CPU cannot tell the host from the device
    hosted = {"optimizer", "params"} & dict(plan.decisions.offload).keys()
    return [
        Row(
            pp_rank=ledger.pp_rank, what=what, axis="", size_bytes=0, where="",
            planned=planned[what], found=size,
            reason=ON_HOST if hosted and planned[what] < size else "",
        )
        for what, size in found.items()
    ]  # fmt: skip


def _sent_rows(plan: Plan, ledger: RankLedger, seen: Seen) -> list[Row]:
    """Planned and found collectives side by side, by kind, axis and size."""
    planned: Counter[Key] = Counter()
    where: dict[Key, list[str]] = {}
    for c in ledger.collectives:
        key = (c.kind, c.axis, c.size_bytes)
        planned[key] += c.count
        where.setdefault(key, []).append(c.where)
    found: Counter[Key] = Counter()
    for (axes, kind, size), count in seen.sent.items():
        keys = [(kind, axis, size) for axis in axes]
        found[next((key for key in keys if key in planned), keys[0])] += count
    small = _small(plan)
    return [
        Row(
            pp_rank=ledger.pp_rank, what=key[0], axis=key[1], size_bytes=key[2],
            where=", ".join(where.get(key, ())), planned=planned[key], found=found[key],
            reason=small.get((key[0], key[2]), "") if found[key] > planned[key]
            else _left_out(plan, key, where.get(key, [])) if found[key] < planned[key] else "",
        )
        for key in dict.fromkeys([*planned, *sorted(found)])
    ]  # fmt: skip


def _left_out(plan: Plan, key: Key, where: Sequence[str]) -> str:
    """Why a planned collective is not made: all it is for is in routed modules."""
    routed = tuple(f"{u.name}:{path}" for u in plan.graph.units for path in routed_modules(u))
    return OWN_TOKENS if key[1] == "tp" and all(w.startswith(routed) for w in where) else ""


def _small(plan: Plan) -> dict[tuple[str, int], str]:
    """Collectives (kind, bytes) of a few numbers each that the ledger leaves out, and why."""
    d, tokens = plan.decisions, plan.workload.seq_len // plan.decisions.cp // plan.decisions.tp
    found = {
        ("all_reduce", 4): "losses and statistics, one fp32 each",
        ("all_reduce", 8): "how many targets count, one int64 a micro-batch",
    }
    for unit in plan.graph.units:
        for path in routed_modules(unit):
            counts = 8 * expert_count(unit, path)
            found["all_to_all", counts] = ROWS_OF_EXPERTS
            found["all_gather", counts * d.etp] = ROWS_OF_EXPERTS

            def ours(where: str, path: str = path) -> bool:
                return inside(where, path)

            for reduction in reductions(unit, ours):
                size = 4 * math.prod(reduction.made.sizes(d.micro_batch, tokens))
                found.setdefault(("all_reduce", size), "a statistic of the router over all tokens")
    return found
