"""A twin: the plan's model and mesh at a size for this machine, under the plan's own decisions.

Nothing is solved anew: placements and edges are the plan's words, transplanted to the unit of the
same operations; what the smaller graph contradicts is refused, not adapted.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cost_models.chain import chain_of
from cost_models.decisions import Decisions, Workload
from cost_models.sharding import Sharding
from cost_models.words import assignment_of
from ir.capture import capture_graph
from ir.capture.load import load
from ir.capture.real import (
    Recipe,
    config_of,
    declared,
    in_words_of,
    is_file,
    require_arguments,
)
from ir.errors import PlanError, UsageError
from ir.graph import Graph, Tensor, Unit
from ir.stacks import as_written
from ir.text import format_graph, graph_hash, parse_graph
from planner.mesh import cp_reason, facts_of
from planner.plan import Plan
from planner.routed import lists_of
from planner.runnable import drops, refusals, require_own_forward
from planner.runtime.verify import scale
from planner.runtime.verify.sample import without_dropout

MOST_RANKS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A plan that runs here, and how any process builds its model. notes: what it does not keep.

    axes: the axes it is about where it is one of several, each of a pair of axes.
    """

    plan: Plan
    recipe: Recipe
    notes: tuple[str, ...] = ()
    axes: str = ""


def make_twins(
    plan: Plan,
    model: str,
    args: Mapping[str, str],
    changes: Mapping[str, str],
    most_ranks: int = MOST_RANKS,
) -> tuple[Twin, ...]:
    """The plan's twin, or one for each pair of its axes where one would need too many processes.

    model, args: as the plan was traced. changes: `--twin k=v`. Raises UsageError where the model
    says no way to cut it, PlanError where what is left does not hold the plan's decisions.
    """
    plan, more = _of_own_forward(plan)
    recipes = cut_models(plan.graph, scale.least_layers(plan.decisions), model, args, changes)
    reasons: list[str] = []
    for recipe in recipes:
        made, notes = _fitted(plan, recipe, plan.decisions, most_ranks)
        if made is not None:
            return (Twin(plan=made, recipe=recipe, notes=(*notes, *more)),)
        reasons += notes
    pairs = (_pair(plan, recipes, part, most_ranks, reasons[0], model)
             for part in scale.pairs(plan.decisions))  # fmt: skip
    return tuple(replace(twin, notes=(*twin.notes, *more)) for twin in pairs)


def _of_own_forward(plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """The plan of the model's own forward, which is what the twin runs, and what that is not of the
    engine's. Raises PlanError where the plan's placements are of the engine's."""
    d = plan.decisions
    if plan.graph.written is None:
        return plan, ()
    if max(d.tp, d.ep, d.etp) > 1:
        require_own_forward(plan)
    note = (f"the twin runs every token through every expert, as the model is written;"
            f" {plan.workload.engine} routes them")  # fmt: skip
    return replace(plan, graph=as_written(plan.graph)), (note,)


def _pair(
    plan: Plan, recipes: tuple[Recipe, ...], part: Decisions, most: int, reason: str, model: str
) -> Twin:
    """The twin of two axes. reason: why there is none of all axes."""
    axes = " ".join(axis for axis in scale.AXES if getattr(part, axis) > 1)
    for recipe in recipes:
        made, notes = _fitted(plan, recipe, part, most)
        if made is not None:
            return Twin(plan=made, recipe=recipe, notes=notes, axes=axes)
    raise PlanError(
        f"no twin of the model holds the plan's decisions: {reason}",
        why=f"of axes {axes} alone: {notes[0]}" if notes[0] != reason else "", hints=_hints(model),
    )  # fmt: skip


def _hints(model: str) -> tuple[str, ...]:
    what = "arguments of its factory" if is_file(model) else "keys of its configuration"
    return (f"--twin k=v with {what}: sizes that divide as the whole model's do",)


# --- the smaller model --------------------------------------------------------------------------


def cut_models(
    graph: Graph, least: int, model: str, args: Mapping[str, str], changes: Mapping[str, str]
) -> tuple[Recipe, ...]:
    """Ways to build the twin, the smallest first: a configuration cut by itself to `least` layers
    or one of each class, a file by its TWIN and `--twin`. graph: of the whole model."""
    if not is_file(model):
        from ir.capture import hf_cut

        config, _, where = config_of(model)
        layers = max(least, _kinds_of_layers(graph), 2)
        whole = {**config, **_typed(config, args)}
        with in_words_of("--twin"):
            small = [hf_cut.cut(whole, layers, changes, where, heads) for heads in (4, 8)]
        return tuple(Recipe(spec=model, config=json.dumps(config)) for config in small)
    given = declared(model)
    if not given and not changes:
        raise UsageError(
            f"{model} does not say how it is cut to a size for this machine",
            hints=(
                "--twin n_layers=4 --twin dim=64: arguments of its factory",
                'TWIN = {"n_layers": 4, "dim": 64} in the file says it for good',
            ),
        )
    require_arguments(model, {**args, **changes}, "--twin")
    found = [{**args, **sizes, **changes} for sizes in given or ({},)]
    for sizes in found:
        require_arguments(model, sizes, "TWIN:")
    return tuple(Recipe(spec=model, args=tuple(sizes.items())) for sizes in found)


def _typed(config: Mapping[str, object], args: Mapping[str, str]) -> dict[str, object]:
    """`--arg` texts as the configuration's values."""
    from ir.capture import hf

    changed = hf._changed(config, args, "")
    return {key: value for key, value in changed.items() if config.get(key) != value}


def _kinds_of_layers(graph: Graph) -> int:
    """Classes of layers: at least one of each is in the twin."""
    return len({link.unit.name for link in chain_of(graph).links if link.is_layer})


@functools.lru_cache(maxsize=16)
def capture_twin(recipe: Recipe, precision: str) -> Graph:
    """The twin's graph. Traced in the plan's precision, so that its places are named as the
    plan's: a cast is a node. Then every 16-bit value is fp32, as the twin runs."""
    if recipe.config:
        from ir.capture import hf

        raw = json.loads(recipe.config)
        source = hf.source(raw, name="twin", args={}, key="", where=recipe.spec)
    else:
        source = load(recipe.spec, dict(recipe.args))
    graph = capture_graph(source, precision=precision)  # as the plan's: with its dropout
    if drops(graph):
        without_dropout(source.model)
        if drops(capture_graph(source, precision=precision)):
            raise PlanError(
                "the twin drops values at random, and its dropout cannot be switched off",
                hints=("--twin dropout=0, whatever the factory calls it",),
            )
    return parse_graph(format_graph(_in_fp32(graph)))


def _in_fp32(graph: Graph) -> Graph:
    """The same graph without 16-bit values."""

    def wide(t: Tensor) -> Tensor:
        return replace(t, dtype="f32") if t.dtype in ("bf16", "f16") else t

    def body(unit: Unit) -> Unit:
        return replace(
            unit,
            inputs=tuple((name, wide(t)) for name, t in unit.inputs),
            parameters=tuple(replace(p, tensor=wide(p.tensor)) for p in unit.parameters),
            nodes=tuple(replace(n, outputs=tuple(map(wide, n.outputs))) for n in unit.nodes),
        )

    return replace(graph, units=tuple(map(body, graph.units)), root=body(graph.root))


# --- the plan on it -----------------------------------------------------------------------------


def _fitted(
    plan: Plan, recipe: Recipe, decisions: Decisions, most_ranks: int
) -> tuple[Plan | None, tuple[str, ...]]:
    """The plan on the twin's graph and the smallest mesh that holds it, with notes; or the
    reason why there is none."""
    graph = capture_twin(recipe, plan.workload.precision)
    chain = chain_of(graph)
    layers = len(chain.layers)
    if layers < scale.stage_count(decisions):
        return None, (f"the twin has {layers} layers for {scale.stage_count(decisions)} stages",)
    facts = facts_of(chain)
    length = min(scale.LENGTH, plan.workload.seq_len, graph.max_seq_len or scale.LENGTH)
    words, notes = words_for(plan.graph, plan.sharding_by_unit, graph)

    def contradicts(d: Decisions, workload: Workload) -> str | None:
        if facts.sequence and length % (d.cp * d.tp if d.sequence_parallel else d.cp):
            return f"{length} tokens do not divide by cp*tp"
        if reason := cp_reason(facts, workload, d.cp_kind, d.tp, d.cp):
            return reason
        for degree, sizes in ((d.ep, facts.experts), (d.etp, facts.expert_features)):
            if any(n % degree for n in sizes):
                return f"experts of the twin do not divide by {degree}"
        for rule, reason in refusals(graph, workload, d.compile):
            if rule.applies(d):
                return reason
        faults = (
            misplaced(graph, words, tp, d.sequence_parallel and tp > 1)
            for tp in sorted({d.tp, *d.tp_of_rank}, reverse=True)
        )  # fmt: skip
        return next(filter(None, faults), None)

    found = scale.smallest(decisions, plan.workload, layers, length, most_ranks, contradicts)
    if isinstance(found, str):
        return None, (found,)
    small, workload = found
    made = replace(
        plan, graph=graph, graph_hash=graph_hash(format_graph(graph)), decisions=small,
        workload=workload, shardings=tuple(words.items()) if small.tp > 1 else (),
    )  # fmt: skip
    return made, (*notes, *scale.lost(decisions, small))


def misplaced(
    graph: Graph, words: Mapping[str, Sharding], tp: int, sequence_parallel: bool
) -> str | None:
    """Which unit the plan's placements do not fit on that tp, or None."""
    if tp == 1:
        return None
    for unit in dict.fromkeys(link.unit for link in chain_of(graph).links):
        try:
            assignment_of(unit, words.get(unit.name, Sharding()), tp, sequence_parallel)
        except PlanError as fault:
            return f"{fault.what} on tp {tp} ({fault.where}: {fault.why})"
    return None


def words_for(
    whole: Graph, shardings: Mapping[str, Sharding], graph: Graph
) -> tuple[dict[str, Sharding], tuple[str, ...]]:
    """The whole model's placements for each unit class of the twin's graph, and what the twin
    leaves out."""
    theirs = list(dict.fromkeys(link.unit for link in chain_of(whole).links))
    mine = list(dict.fromkeys(link.unit for link in chain_of(graph).links))
    words: dict[str, Sharding] = {}
    used: set[str] = set()
    notes = []
    for unit in mine:
        alike = [u for u in theirs if _structure(u) == _structure(unit)]
        if not alike:
            path = next(x.path for x in chain_of(graph).links if x.unit is unit)
            notes.append(f"{path} of the twin has operations that no unit of the model has")
            continue
        first = next((u for u in alike if u.name not in used), alike[0])
        used.add(first.name)
        given = shardings.get(first.name, Sharding())
        own = tuple((name, at) for name, at in given.parameters if name in unit.parameter_names)
        words[unit.name] = replace(given, parameters=own)
    for unit in theirs:
        if unit.name not in used:
            path = next(x.path for x in chain_of(whole).links if x.unit is unit)
            notes.append(f"no unit of the twin stands for {path}")
    return words, tuple(notes)


def _structure(unit: Unit) -> tuple[object, ...]:
    """What a unit is apart from its sizes: operations, what they read, parameters' names. Experts
    that are modules of a list are one for all, as their number is a size."""
    more = {name for names in lists_of(unit) for name in names[1:]}
    return (
        tuple((n.name, n.op, tuple(r for r in n.inputs if r not in more)) for n in unit.nodes),
        tuple((p.name, p.kind, len(p.tensor.shape)) for p in unit.parameters if p.name not in more),
        unit.outputs,
    )
