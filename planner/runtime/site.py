"""Where the plan's units are in the user's model, and what the plan says of each."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import nn

from cost_models.chain import chain_of
from cost_models.layout import Assignment
from cost_models.offload import layers_below
from cost_models.sharding import Sharding
from cost_models.stage_problem import starts_of
from cost_models.words import assignment_of
from ir.backward import differentiable
from ir.errors import GateError
from ir.graph import AFTER, Tensor, Unit
from planner.chain import stage_units
from planner.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One unit: its module, its class in the plan's graph, and its decisions.

    path: the module's name in the model, "" where the model itself is the one unit. stage: its
    global pipeline stage. assignment: an option for each of the unit's nodes; None where tp = 1.
    recompute: "none", "selective" or "full". below: its fp32 parameters live in host memory, where
    their optimizer is.
    """

    path: str
    module: nn.Module
    unit: Unit
    stage: int
    recompute: str
    sharding: Sharding
    assignment: Assignment | None
    below: bool = False


def find_sites(model: nn.Module, plan: Plan) -> tuple[Site, ...]:
    """Every unit of the plan in the model, in execution order.

    Raises GateError naming the first unit or parameter that the model does not have as planned.
    """
    check_parameters(model, plan)
    d, chain = plan.decisions, chain_of(plan.graph)
    shardings = plan.sharding_by_unit
    stage_of = {
        path: stage
        for stage, paths in enumerate(stage_units(plan.graph, d.stages))
        for path in paths
    }
    layers = [chain.links[i].path for i in chain.layers]
    level: dict[str, str] = {}
    for start, count, (full, some) in zip(starts_of(d.stages), d.stages, d.recompute):
        for place, path in enumerate(layers[start : start + count]):
            level[path] = "full" if place < full else "selective" if place < full + some else "none"
    low = {chain.links[i].path for i in layers_below(chain, d)}
    whole = "optimizer" in d.tiers and d.below is None
    modules = dict(model.named_modules())
    found: dict[str, Site] = {}
    for link in chain.links:
        if link.path in found:
            continue
        sharding = shardings.get(link.unit.name, Sharding())
        found[link.path] = Site(
            path=link.path,
            module=modules[link.path],
            unit=link.unit,
            stage=stage_of[link.path],
            recompute=level.get(link.path, "none"),
            sharding=sharding,
            assignment=assignment_of(link.unit, sharding, d.tp, d.sequence_parallel)
            if d.tp > 1
            else None,
            below=whole or link.path in low,
        )
    return tuple(found.values())


def check_parameters(model: nn.Module, plan: Plan) -> None:
    """Refuse a model whose modules, parameter names or shapes are not those of the plan's graph."""
    modules = dict(model.named_modules())
    for link in chain_of(plan.graph).links:
        if link.path not in modules:
            raise _other(f"the plan's unit {link.path!r} is no module of the model")
    ours = dict(model.named_parameters(remove_duplicate=False))
    aliases = {alias for alias, _ in plan.graph.tied}
    for name, parameter in plan.graph.parameters.items():
        if name not in ours:
            raise _other(f"{name} is a parameter of the plan, not of the model")
        planned, found = parameter.tensor.sizes(1, 1), tuple(ours[name].shape)
        if tuple(planned) != found:
            raise _other(f"{name} is {list(found)} in the model, {list(planned)} in the plan")
    for alias, owner in plan.graph.tied:
        if alias in ours and ours[alias] is not ours[owner]:
            raise _other(f"{alias} is tied to {owner} in the plan, not in the model")
    for name in ours:
        if name not in plan.graph.parameters and name not in aliases:
            raise _other(f"{name} is a parameter of the model, not of the plan")


def returned(unit: Unit) -> tuple[str, ...]:
    """What a unit's module returns: its results, or, where top-level operations joined the unit,
    what they read of it."""
    tail = [n for n in unit.nodes if n.module == AFTER]
    if not tail:
        return unit.outputs
    read = {ref for n in tail for ref in n.inputs} | set(unit.outputs)
    own = [ref for n in unit.nodes if n.module != AFTER for ref in n.refs()]
    return tuple(ref for ref in own if ref in read)


@functools.cache
def results_of(unit: Unit) -> tuple[tuple[Tensor, bool], ...]:
    """What a unit's module returns, in order, and whether it carries a gradient."""
    learns = differentiable(unit)
    return tuple((unit.values[name], learns[name]) for name in returned(unit))


def _other(what: str) -> GateError:
    return GateError(
        what,
        why="the model is not the one that the plan was made for",
        hints=("plan trace MODEL --hardware HW makes a plan for this model",),
    )
