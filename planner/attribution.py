"""What each change between two plans does alone: the old plan costed with one change at a time.

A change that no legal plan has alone goes with the ones it needs. What changes do only together is
a row of its own, so that the rows sum to the whole difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace

from cost_models.chain import chain_of
from cost_models.decisions import Decisions, Workload
from cost_models.fleet import Hardware
from cost_models.forward import forward_of
from cost_models.ledger import Estimate
from ir.errors import PlanError
from planner.check import Checked, require_legal
from planner.plan import Plan

Coster = Callable[[Plan, Hardware], Estimate]

TOGETHER = "together"  # the row of what only the changes at once do
AXES = ("pp", "dp", "cp", "tp", "ep", "etp", "dp_outer", "parts", "shares", "tp_by_part")
PROGRAM = ("schedule", "virtual_stages")
BUNDLES = (  # decisions that are one choice
    ("zero", "reshard"), ("shard",), ("micro_batch",), PROGRAM, ("stages",),
    ("recompute", "keep"), ("offload",), ("formats",), ("sequence_parallel",), ("compile",),
    ("cp_kind",), ("grad_dtype",),
)  # fmt: skip
FOLLOWS = ("microbatches",)  # of the batch, dp and the micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What some changes do, the others left as they were. keys: the decisions and inputs changed;
    (TOGETHER,) is what is left of the whole. ps and bytes: new less old."""

    keys: tuple[str, ...]
    step_time_ps: int
    peak_memory_bytes: int


def effects(old: Checked, new: Checked, cost: Coster) -> tuple[Effect, ...]:
    """The effect of each change, the greatest first, and of all together; none without changes."""
    changed = _bundles(old, new)
    alone: list[tuple[tuple[str, ...], Estimate]] = []
    waiting: list[tuple[str, ...]] = []
    for keys in changed:
        found = _costed(old, new, keys, cost)
        if found is None:
            waiting.append(keys)
        else:
            alone.append((keys, found))
    if waiting:
        alone = _joined(old, new, waiting, alone, cost)
    a, b = old.estimate, new.estimate
    computed_again = (*old.plan.decisions.recompute, *new.plan.decisions.recompute)
    quiet = () if any(map(any, computed_again)) else ("recompute",)  # an entry a stage, all of none
    rows = [
        Effect(keys=tuple(key for key in keys if key not in quiet),
               step_time_ps=e.step_time_ps - a.step_time_ps,
               peak_memory_bytes=e.peak_memory_bytes - a.peak_memory_bytes)
        for keys, e in alone
    ]  # fmt: skip
    rows.sort(key=lambda row: (-abs(row.step_time_ps), -abs(row.peak_memory_bytes)))
    rest_ps = b.step_time_ps - a.step_time_ps - sum(row.step_time_ps for row in rows)
    rest = b.peak_memory_bytes - a.peak_memory_bytes - sum(row.peak_memory_bytes for row in rows)
    if rest_ps or rest:
        rows.append(Effect(keys=(TOGETHER,), step_time_ps=rest_ps, peak_memory_bytes=rest))
    return tuple(rows)


def _joined(
    old: Checked,
    new: Checked,
    waiting: list[tuple[str, ...]],
    alone: list[tuple[tuple[str, ...], Estimate]],
    cost: Coster,
) -> list[tuple[tuple[str, ...], Estimate]]:
    """What is not legal alone, as one change, with as few of the others as make it legal.

    All of them are the new plan, so there is an end.
    """
    for count in range(len(alone) + 1):
        for more in itertools.combinations(alone, count):
            keys = sum((keys for keys, _ in more), sum(waiting, ()))
            found = new.estimate if count == len(alone) else _costed(old, new, keys, cost)
            if found is not None:
                return [*(row for row in alone if row not in more), (keys, found)]
    raise AssertionError("all changes are the new plan")


def _bundles(old: Checked, new: Checked) -> list[tuple[str, ...]]:
    """The keys that differ, those of one choice together; inputs first."""
    a, b = old.plan, new.plan
    found: list[tuple[str, ...]] = []
    if a.graph_hash != b.graph_hash:
        found.append(("model",))
    if old.hardware.digest != new.hardware.digest:
        found.append(("hardware",))
    found += [
        (f.name,) for f in fields(Workload)
        if getattr(a.workload, f.name) != getattr(b.workload, f.name)
    ]  # fmt: skip
    differ = {f.name for f in fields(Decisions)
              if getattr(a.decisions, f.name) != getattr(b.decisions, f.name)}  # fmt: skip
    differ -= {*FOLLOWS}
    if _full_shard(a.decisions) and _full_shard(b.decisions):
        differ -= {"shard"}
    if a.shardings != b.shardings and not differ & {"tp", "sequence_parallel"}:
        found.append(("placements",))
    axes = (*AXES, "sequence_parallel") if 1 in (a.decisions.tp, b.decisions.tp) else AXES
    stages = len(a.decisions.stages) != len(b.decisions.stages)
    bundles: tuple[tuple[str, ...], ...] = (axes, *BUNDLES)
    if stages:  # what has an entry a stage goes with what makes the stages
        pipeline = (*PROGRAM, "stages", "recompute", "keep")
        bundles = ((*axes, *pipeline), *BUNDLES) if "pp" in differ else (axes, pipeline, *BUNDLES)
    for bundle in bundles:
        keys = tuple(key for key in bundle if key in differ)
        differ -= {*keys}
        found += [keys] if keys else []
    return found


def _full_shard(d: Decisions) -> bool:
    return d.shard == d.dp * d.cp


def _costed(old: Checked, new: Checked, keys: Collection[str], cost: Coster) -> Estimate | None:
    """The old plan with these keys of the new one, costed; None where that is no legal plan."""
    a, b = old.plan, new.plan
    workload = replace(a.workload, **{
        f.name: getattr(b.workload, f.name) for f in fields(Workload) if f.name in keys
    })  # fmt: skip
    d = replace(a.decisions, **{
        f.name: getattr(b.decisions, f.name) for f in fields(Decisions) if f.name in keys
    })  # fmt: skip
    if _full_shard(a.decisions) and "shard" not in keys:
        d = replace(d, shard=d.dp * d.cp)
    batches, left = divmod(workload.global_batch, d.dp * d.micro_batch)
    if d.shares:
        batches, left = max(d.microbatches_by_data_rank), 0
    if left or not batches:
        return None
    model = b if "model" in keys else a
    placed = b if {*keys} & {"tp", "sequence_parallel", "placements", "model"} else a
    if d.tp > 1 and not placed.shardings:
        return None
    if sum(d.stages) != len(chain_of(model.graph).layers):
        return None
    plan = replace(
        a, graph=forward_of(model.graph, workload.engine), graph_hash=model.graph_hash,
        workload=workload,
        decisions=replace(d, microbatches=batches),
        shardings=placed.shardings if d.tp > 1 else (),
    )  # fmt: skip
    hardware = new.hardware if "hardware" in keys else old.hardware
    try:
        require_legal(replace(plan, hardware=hardware.spec), hardware)
        return cost(plan, hardware)
    except PlanError:
        return None
