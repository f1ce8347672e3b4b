"""What an export is: files, and what became of every decision of the plan."""

from __future__ import annotations

from dataclasses import dataclass

from ir.errors import PlanError
from planner.plan import Plan

CHECKED_TORCH = "2.13"
EXACT, APPROXIMATE, UNSUPPORTED = "exact", "approximate", "unsupported"
FIDELITIES = (EXACT, APPROXIMATE, UNSUPPORTED)  # worse and worse

# Every decision of a training plan, and what of its workload an engine is told.
DECISIONS = (
    "pp", "dp", "cp", "tp", "ep", "etp", "dp_outer", "zero", "shard", "reshard", "micro_batch",
    "microbatches", "schedule", "virtual_stages", "stages", "recompute", "keep", "offload",
    "formats", "sequence_parallel", "compile", "cp_kind", "grad_dtype", "placements", "precision",
    "optimizer", "parts", "shares", "tp_by_part",
)  # fmt: skip
# Without these the file would start another layout of ranks: it is not written at all.
LAYOUT = (
    "pp", "dp", "cp", "tp", "ep", "etp", "attention_dp", "parts", "shares", "tp_by_part", "prefill",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A decision that a target does in part ("approximate") or has no word for ("unsupported")."""

    decision: str
    fidelity: str
    note: str

    def __str__(self) -> str:
        return f"{self.decision} ({self.fidelity}): {self.note}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Files by name; lost: decisions that are not exactly in them; notes: what to know besides."""

    files: tuple[tuple[str, str], ...]
    lost: tuple[Lost, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fidelity(self) -> str:
        """The worst of its decisions."""
        return max((row.fidelity for row in self.lost), key=FIDELITIES.index, default=EXACT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a plan can be written for. task: the plans it takes; checked: the engine's version that
    files were checked against; made: what it is, for documentation; by: `file.function` of this
    folder that makes it, of a plan and its path; engine: of the cost models, that runs it."""

    task: str
    checked: str
    made: str
    by: str
    engine: str = ""


def judge(
    target: str, decisions: tuple[str, ...], rows: tuple[tuple[str, bool, str, str], ...],
    takes: tuple[str, ...],
) -> tuple[Lost, ...]:
    """What is lost, of rows (decision, whether it is exact, else how far, why), in the order of
    `decisions`, each of which has a row. takes: pins under which every plan whose `shard` is the
    default has a layout of ranks that the target has, on GPUs of one kind.

    Raises PlanError where the layout of ranks is among what the target has no word for.
    """  # fmt: skip
    named = [row[0] for row in rows]
    missing = [key for key in decisions if key not in named]
    assert not missing and set(named) <= set(decisions), (target, missing, named)
    found = tuple(
        Lost(decision=key, fidelity=fidelity, note=note)
        for key in decisions
        for name, exact, fidelity, note in rows
        if name == key and not exact
    )
    fatal = [x for x in found if x.fidelity == UNSUPPORTED and x.decision in LAYOUT]
    if fatal:
        besides = dict.fromkeys(row.decision for row in found if row not in fatal)
        said = [f"{row.decision}: {row.note}" for row in fatal]
        if besides:
            said.append(f"and would lose of it besides: {', '.join(besides)}")
        alike = ("--hardware of one kind of GPU",) * any(
            x.decision in ("parts", "shares", "tp_by_part") for x in fatal
        )
        pins = " ".join(f"--fix {pin}" for pin in takes)
        raise PlanError(
            f"--to {target} cannot lay out this plan", why="\n".join(said),
            hints=(*alike, f"plan trace {pins}: layouts that {target} has"),
        )  # fmt: skip
    return found


def training(plan: object, target: str) -> Plan:
    """The plan, where it is one of training. Raises PlanError for one of serving."""
    if not isinstance(plan, Plan):
        raise PlanError(f"--to {target} is about training, and this is a plan of serving",
                        hints=("--to vllm, sglang, llamacpp or leaderworkerset",))  # fmt: skip
    return plan
