"""What the native runtime cannot run of a model: rules on its graph, for planning time.

`legality.py` says which decisions go together; here is which decisions a model allows, so that no
plan is made that `parallelize` refuses. Rules hold for the engines that are our own runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from cost_models.chain import chain_of
from cost_models.decisions import Decisions, Workload
from cost_models.engines import load_engine
from ir.errors import PlanError, UsageError
from ir.graph import Graph, full_name
from planner.cuts import stub_fault
from planner.decisions import Pins
from planner.plan import Plan
from planner.routed import no_expert_axis, no_expert_tensor_axis, no_shared_tokens
from planner.token_flow import flow_of


class Axes(Protocol):
    """What rules look at: a candidate mesh of the search, or whole decisions."""

    @property
    def pp(self) -> int: ...
    @property
    def cp(self) -> int: ...
    @property
    def tp(self) -> int: ...
    @property
    def ep(self) -> int: ...
    @property
    def etp(self) -> int: ...
    @property
    def cp_kind(self) -> str: ...
    @property
    def sequence_parallel(self) -> bool: ...
    @property
    def tp_by_part(self) -> tuple[tuple[str, int], ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRule:
    """Decisions that a model may not allow: the pins it is about, when, and why (None: fine).

    compiled: it holds for compiled units alone.
    """

    keys: tuple[str, ...]
    applies: Callable[[Axes], bool]
    reason: Callable[[Graph], str | None]
    fix: str
    compiled: bool = False


def drops(graph: Graph) -> bool:
    """Whether any operation drops values at random."""
    return any(
        n.op == "dropout" or (n.op == "attention" and n.attr("dropout"))
        for u in (*graph.units, graph.root) for n in u.nodes
    )  # fmt: skip


def _draws(graph: Graph) -> str | None:
    return "torch compiles no dropout whose draws tp ranks share or split" if (
        drops(graph)
    ) else None  # fmt: skip


def _without_dropout(graph: Graph) -> str | None:
    return "attention drops probabilities, for all of a query's keys" if (
        flow_of(graph).dropout
    ) else None  # fmt: skip


def no_tp_by_part(graph: Graph) -> str | None:
    """Why stages of this model may not have another tp on each part of the hardware, or None."""
    chain = chain_of(graph)
    holders = Counter(
        full_name(link.path, p.name) for link in {k.path: k for k in chain.links}.values()
        for p in link.unit.parameters if p.kind == "parameter"
    )  # fmt: skip
    glue = any(p.kind == "parameter" for p in chain.glue.parameters)
    if graph.tied or glue or any(n > 1 for n in holders.values()):
        return (
            "several stages hold one parameter: with another tp somewhere its shards are not"
            " equal, and there is nothing to sum rank by rank"
        )
    if any(n.op == "grouped_matmul" for u in graph.units for n in u.nodes):
        return "experts lie over all ranks of a stage, and stages would not have as many"
    return None


RULES: tuple[GraphRule, ...] = (
    GraphRule(keys=("pp",), applies=lambda a: a.pp > 1, reason=stub_fault, fix="pp=1"),
    GraphRule(
        keys=("ep", "etp"),
        applies=lambda a: a.ep * a.etp > 1,
        reason=no_expert_axis,
        fix="ep=1 and etp=1",
    ),
    GraphRule(
        keys=("etp",), applies=lambda a: a.etp > 1, reason=no_expert_tensor_axis, fix="etp=1"
    ),
    GraphRule(
        keys=("tp", "cp"),
        applies=lambda a: a.tp * a.cp > 1,
        reason=no_shared_tokens,
        fix="tp=1 and cp=1",
    ),
    GraphRule(
        keys=("cp",),
        applies=lambda a: a.cp > 1,
        reason=lambda graph: flow_of(graph).reason or None,
        fix="cp=1",
    ),
    GraphRule(
        keys=("cp", "cp_kind"),
        applies=lambda a: a.cp > 1 and a.cp_kind in ("ring", "allgather"),
        reason=_without_dropout,
        fix="cp_kind=ulysses, cp=1, or a model without dropout in attention",
    ),
    GraphRule(
        keys=("tp",),
        applies=lambda a: a.tp > 1,
        reason=_draws,
        fix="tp=1, compile=off, or a model without dropout",
        compiled=True,
    ),
    GraphRule(
        keys=("tp_by_part",),
        applies=lambda a: bool(a.tp_by_part),
        reason=no_tp_by_part,
        fix="tp_by_part=none",
    ),
)

NATIVE = ("native", "native-compiled")  # engines that are `planner.parallelize`


def refusals(
    graph: Graph, workload: Workload, compiled: bool
) -> tuple[tuple[GraphRule, str], ...]:
    """The rules that this model meets, each with its reason; none for other engines. compiled:
    whether its units are."""
    if workload.engine not in NATIVE:
        return ()
    found = ((rule, rule.reason(graph)) for rule in RULES if compiled or not rule.compiled)
    return tuple((rule, reason) for rule, reason in found if reason)


def whole_recomputation_fault(graph: Graph, workload: Workload, compiled: bool) -> str | None:
    """Why no unit may be computed again whole beside a tp above 1; None: it may.

    torch 2.13 repeats a compiled routed unit on all tokens, not on a tp rank's own (pytorch issue
    166926); the runtime runs it eager then, which is not what a compiled plan costs.
    """
    if not compiled or workload.engine not in NATIVE:
        return None
    routed = any(n.op == "grouped_matmul" for u in graph.units for n in u.nodes)
    return "compiled experts under tp cannot be computed again whole" if routed else None


def require_own_forward(plan: Plan) -> None:
    """Raise PlanError for a plan of an engine that has experts of its own in the model's place: the
    runtime runs the model's forward."""
    if plan.graph.written is not None:
        raise PlanError(
            f"the plan is for {plan.workload.engine}, which routes tokens to experts where the"
            " model's forward multiplies all tokens with all experts",
            why="Meshwright's runtime runs the model's own forward",
            hints=("plan trace --engine native-compiled plans for it",),
        )


def may_compile(workload: Workload, pins: Pins) -> bool:
    """Whether units are costed as the engine compiles them: a schedule that it runs eager alone,
    pinned, is costed so."""
    schedules = load_engine(workload.engine).compiled_schedules
    return pins.compile is not False and pins.schedule in (None, *schedules)


def check_runnable(refused: Sequence[tuple[GraphRule, str]], pins: Pins) -> None:
    """Raise UsageError where pins ask for what the runtime cannot run of this model."""
    names = {f.name for f in fields(Decisions)} - {"recompute", "stages", "shares"}
    asked = Decisions(**{key: value for key, value in pins.items() if key in names})
    for rule, reason in refused:
        said = [f"--fix {pins.said(key)}" for key in rule.keys if getattr(pins, key) is not None]
        if said and rule.applies(asked):
            raise UsageError(
                f"{' and '.join(said)} cannot be run of this model", why=reason, hints=(rule.fix,)
            )
