"""Is a plan still true: does it fit, and do its inputs and its estimate agree with today's?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cost_models.decisions import Decisions
from cost_models.fleet import Fleet, Hardware, used_parts
from cost_models.ledger import Estimate
from cost_models.units import format_bytes, format_seconds
from ir.errors import GateError, InfeasibleError, PlanError
from ir.graph import Graph, Unit
from ir.stacks import as_written
from planner.legality import inconsistent, tp_fault
from planner.plan import Plan, Solver, constants_hash, load_cluster, recost, step_time_us

if TYPE_CHECKING:
    from planner.serving.plan import ServingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A plan against today: the estimate anew, and what moved since it was written.

    inputs: (name, hash then, hash now). stale: whether the stored estimate is not the new one.
    """

    plan: Plan
    hardware: Hardware
    estimate: Estimate
    inputs: tuple[tuple[str, str, str], ...]
    stale: bool

    def __repr__(self) -> str:
        from planner.displays import text

        return text(self)

    def _repr_html_(self) -> str:
        from planner.displays import checked_html

        return checked_html(self)

    @property
    def moved(self) -> tuple[str, ...]:
        """A line for each thing that differs."""
        lines = [f"{name}: {_short(then)} -> {_short(now)}" for name, then, now in self.inputs]
        if not self.stale:
            return tuple(lines)
        p, e = self.plan, self.estimate
        why = "with today's inputs" if lines else "re-costed: its decisions were edited"
        then = f"{format_seconds(p.step_time_us / 1e6)} and {format_bytes(p.peak_memory_bytes)}"
        now = f"{format_seconds(e.step_time_s)} and {format_bytes(e.peak_memory_bytes)}"
        return (*lines, f"estimate: {then} as written, {now} {why}")


def examine(plan: Plan, folder: Path) -> Checked:
    """Re-cost a plan. Raises PlanError where its decisions contradict its hardware."""
    hardware = load_cluster(plan, folder)
    require_legal(plan, hardware)
    estimate = recost(plan, hardware)
    pairs = (
        (f"hardware {plan.hardware}", plan.hardware_hash, hardware.digest),
        ("cost constants", plan.constants_hash, constants_hash(hardware)),
    )
    found = (step_time_us(estimate), estimate.peak_memory_bytes)
    return Checked(
        plan=plan,
        hardware=hardware,
        estimate=estimate,
        inputs=tuple(pair for pair in pairs if pair[1] != pair[2]),
        stale=found != (plan.step_time_us, plan.peak_memory_bytes),
    )


def require_legal(plan: Plan, hardware: Hardware) -> None:
    """Raise PlanError where a plan's decisions contradict each other or its hardware."""
    d = plan.decisions
    reason = fault_of_parts(d, hardware)
    if not isinstance(hardware, Fleet):
        reason = reason or inconsistent(d, plan.workload, gpus=hardware.count)
    if reason:
        raise PlanError(f"the plan contradicts its hardware {plan.hardware}: {reason}")
    for part in used_parts(hardware, d):
        for word in (plan.workload.precision, *dict(d.formats).values()):
            part.device.peak(word)
        for tier in d.tiers.values():
            part.tier(tier)


def fault_of_parts(d: Decisions, hardware: Hardware) -> str | None:
    """Why a plan's stages do not lie on the hardware's parts, or None."""
    if not isinstance(hardware, Fleet):
        return "its stages name parts, and the hardware has none" if d.parts else (
            "it has shares of parts, and the hardware has none" if d.shares else None
        )  # fmt: skip
    for share in d.shares:
        gpus = share.dp * d.cp * d.tp
        found = next((part for part in hardware.parts if part.name == share.part), None)
        if found is None:
            return f"it has no part {share.part}"
        if found.count != gpus:
            return f"a share of {gpus} GPUs lies on {found.spec}"
    if not d.parts:
        return None if d.shares else "its stages name no parts"
    if tp_fault(d):
        return tp_fault(d)
    for name, ranks in d.parts:
        each = d.dp * d.cp * dict(d.tp_by_part).get(name, d.tp)
        found = next((part for part in hardware.parts if part.name == name), None)
        if found is None:
            return f"it has no part {name}"
        if found.count != ranks * each:
            return f"{ranks} stages of {each} GPUs lie on {found.spec}"
    return None


def require_fit(checked: Checked) -> None:
    """Raise InfeasibleError where the plan does not fit, with the fullest rank by name."""
    estimate = checked.estimate
    if estimate.fits:
        return
    for use in estimate.tiers:
        if not use.fits:
            raise InfeasibleError(
                f"the plan does not fit {checked.plan.hardware}", why=f"tier {use.said}",
                hints=("plan trace anew finds a plan that fits, if there is one",),
            )
    rank = estimate.fullest
    items = sorted(rank.memory_bytes, key=lambda item: -item[1])
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in items if size >= 5e7)
    raise InfeasibleError(
        f"the plan does not fit {checked.plan.hardware} "
        f"({format_bytes(estimate.capacity_bytes)} a GPU)",
        why=f"needs {format_bytes(estimate.peak_memory_bytes)} on pp rank {rank.pp_rank}: {parts}",
        hints=("plan trace anew finds a plan that fits, if there is one",),
    )


def require_fresh(checked: Checked, source: str) -> None:
    """Raise GateError where inputs or estimate moved, saying what."""
    if checked.moved:
        raise GateError(
            "the plan is stale",
            where=source,
            why="\n".join(checked.moved),
            hints=("plan check --update re-costs and rewrites it", "plan trace plans anew"),
        )


def require_model(plan: Plan | ServingPlan, traced: Graph, model: str) -> None:
    """Raise GateError where a model traced anew is not the one the plan was made for.

    Lines that moved in its file make no other model, nor does its label: a plan made in Python
    has its class's name, one of the command line its file's.
    """
    from ir.text import format_graph, graph_hash

    known = as_written(plan.graph)
    text = format_graph(replace(traced, name=known.name))
    if graph_hash(text) == plan.graph_hash:
        return
    if unplaced(text) == unplaced(format_graph(known)):
        return
    raise GateError(
        f"the plan is for another model than {model}",
        why="\n".join(_differences(known, traced)),
        hints=(f"plan trace {model} --hardware {plan.hardware}",),
    )


def updated(checked: Checked) -> Plan:
    """The plan under today's inputs, re-costed; what its search proved holds no more."""
    if not checked.moved:
        return checked.plan
    us = step_time_us(checked.estimate)
    return replace(
        checked.plan,
        hardware_hash=checked.hardware.digest,
        constants_hash=constants_hash(checked.hardware),
        step_time_us=us,
        peak_memory_bytes=checked.estimate.peak_memory_bytes,
        solver=Solver(),
    )


def _differences(old: Graph, new: Graph) -> list[str]:
    """What is not alike in two models, in a few lines."""
    lines = [] if old.name == new.name else [f"{old.name} became {new.name}"]
    lines += [f"the first unit that differs is {where}" for where in _first_unit(old, new)]
    if old.parameter_count != new.parameter_count:
        lines.append(f"parameters: {old.parameter_count:,} -> {new.parameter_count:,}")
    for word, here, there in (("gone", old, new), ("new", new, old)):
        names = [name for name in here.parameters if name not in there.parameters]
        if names:
            lines.append(f"{word}: {names[0]}" + (f" and {len(names) - 1} more" * (len(names) > 1)))
    changed = [
        f"{name}: {p.tensor} -> {new.parameters[name].tensor}"
        for name, p in old.parameters.items()
        if name in new.parameters and p.tensor != new.parameters[name].tensor
    ]
    return [*lines, *changed[:2]] or ["parameters are alike; operations are not"]


def _first_unit(old: Graph, new: Graph) -> list[str]:
    """Where, in execution order, the first unit is that is not alike, and one line of it."""
    from ir.text import format_unit

    def body(unit: Unit) -> list[str]:
        return unplaced(format_unit(replace(unit, name="_")))

    for (_, path, then), (_, place, now) in zip(old.calls(), new.calls()):
        if path != place:
            return [f"{path}, where the model has {place}"]
        if body(then) != body(now):
            lines = [x for x in body(now) if x not in body(then)]
            return [f"{path}" + (f": {lines[0].strip()}" if lines else "")]
    return []


def unplaced(text: str | list[str]) -> list[str]:
    """Lines of a graph's text without the places in the model's file."""
    lines = text.splitlines() if isinstance(text, str) else text
    return [line.partition(" @")[0] for line in lines]


def _short(digest: str) -> str:
    return digest[:15]
