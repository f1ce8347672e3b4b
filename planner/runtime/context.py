"""What every part of the runtime is told: the plan, this rank's meshes, and where to report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ir.errors import PlanError
from ir.graph import Tensor
from planner.plan import Plan
from planner.runtime.health import Health
from planner.runtime.meshes import Meshes
from planner.runtime.weights import Weights


@dataclass(slots=True)
class Report:
    """What running showed that the plan did not say; grows as the model runs.

    replicated: how often an operation that cannot run split ran whole, by (unit, operation).
    loose_edges: planned changes of placement inside a unit's own forward that no module boundary
    carries, so that DTensor makes them where it needs them.
    uncompiled: classes of units that could not be compiled, each with the compiler's reason.
    running: whether the forward of a unit runs now, under tensor parallelism.
    """

    replicated: Counter[tuple[str, str]] = field(default_factory=Counter)
    loose_edges: list[str] = field(default_factory=list)
    uncompiled: dict[str, str] = field(default_factory=dict)
    running: bool = False


@dataclass(slots=True)
class Sample:
    """What runs now, where that is not the plan's micro-batch: a server's sequences and tokens of
    each. shares: tokens of every replica of attention, where there are some."""

    batch: int = 0
    tokens: int = 0
    shares: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One application of a plan on this rank. plan: with the decisions of this rank's part of the
    hardware, where parts have shares of their own."""

    plan: Plan
    meshes: Meshes
    report: Report
    health: Health = field(default_factory=Health)
    weights: Weights = field(default_factory=Weights)
    sample: Sample = field(default_factory=Sample)
    folder: Path | None = None  # what another tier below than the host's memory is here

    def folder_of(self, what: str) -> Path | None:
        """Where files of what is offloaded lie; None: nowhere, or in the host's memory.

        Raises PlanError where the plan names another tier and there is no folder.
        """
        tier = self.plan.decisions.tiers.get(what, "cpu")
        if tier == "cpu":
            return None
        if self.folder is None:
            raise PlanError(f"the plan holds {what} on {tier}, and no folder is given",
                            hints=("planner.parallelize(..., folder=...)",))  # fmt: skip
        return self.folder

    def sizes(self, spec: Tensor) -> tuple[int, ...]:
        """The shape of a value of the graph as it runs now, whole."""
        batch = self.sample.batch or self.plan.decisions.micro_batch
        return tuple(spec.sizes(batch, self.sample.tokens or self.plan.workload.seq_len))
