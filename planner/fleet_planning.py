"""`plan trace` on several kinds of GPUs: what `fleet_search` finds, as a plan."""

from __future__ import annotations

from dataclasses import replace

from cost_models.estimate import estimate
from cost_models.fleet import Fleet, used_parts
from cost_models.ledger import Estimate
from cost_models.words import sharding_of
from ir.errors import InfeasibleError, UsageError
from ir.graph import Graph
from planner.fleet_asking import FleetAsking
from planner.fleet_search import FleetSearch, searchers
from planner.infeasible import explained, needs
from planner.limits import capped
from planner.options import Progress, TraceOptions, TraceResult
from planner.outcome import Outcome
from planner.plan import Plan, Solver, make_plan
from planner.tracing import Clock
from planner.workload import resolve


def plan_fleet(
    graph: Graph, options: TraceOptions, fleet: Fleet, clock: Clock,
    progress: Progress | None = None,
) -> TraceResult:  # fmt: skip
    """Plan a graph for time; raises as `planner.tracing.run` does."""
    if options.objective != "time":
        raise UsageError(f"--objective {options.objective} is for hardware of one kind",
                         hints=tuple(f"--hardware {p.spec}" for p in fleet.parts))  # fmt: skip
    if options.limits.gpus or options.limits.usd_per_million_tokens:
        raise UsageError("--max-gpus and --max-cost are for hardware of one kind",
                         why=f"{fleet.spec} has several")  # fmt: skip
    if options.stability is not None:
        raise UsageError("--stability is for hardware of one kind", why=f"{fleet.spec} has several")
    workload, echo = resolve(graph, fleet, options.asked, options.pins)
    found = FleetSearch(fleet=fleet, workload=workload)
    for searcher in searchers(graph, fleet, workload, options):
        searcher.progress = progress
        clock.mark("cost_s")
        found.search(searcher)
        if len(searcher.clusters) == 1:
            found.note_alone()
        clock.mark("solve_s")
        if found.rows[-1].outcome.interrupted:
            break
    stopped = found.rows[-1].outcome.interrupted
    if found.best is None:
        if stopped:
            raise KeyboardInterrupt
        raise _infeasible(graph, options, found)
    plan, made = _planned(graph, options.hardware, found)
    return TraceResult(
        plan=plan, estimate=made, echo=(*echo, *_used(plan, fleet)), interrupted=stopped,
        baselines=found.baselines, timing=clock.timing(),
    )  # fmt: skip


def _planned(graph: Graph, spec: str, found: FleetSearch) -> tuple[Plan, Estimate]:
    assert found.best is not None and found.costs is not None
    d, workload = found.decisions, found.workload
    shardings = {u.name: sharding_of(u, a) for (u, _), a in found.best.assignments.items()}
    if d.tp == 1:
        shardings = {}
    made = estimate(graph, found.fleet, workload, d, shardings)
    bound, step = found.bound_ps(), found.step_ps
    outs = [row.outcome for row in found.rows]
    solver = Solver(
        status="OPTIMAL" if bound >= step else "FEASIBLE",
        gap_ppm=round((step - bound) / step * 1e6), bound_us=bound // 1_000_000,
        meshes=sum(out.meshes for out in outs), meshes_solved=sum(out.expanded for out in outs),
    )  # fmt: skip
    return make_plan(graph, spec, found.fleet, workload, d, shardings, made, solver), made


def _used(plan: Plan, fleet: Fleet) -> tuple[str, ...]:
    """Which GPUs the plan uses, and which are idle."""
    used = [part.name for part in used_parts(fleet, plan.decisions)]
    idle = [part.spec for part in fleet.parts if part.name not in used]
    joint = " beside " if plan.decisions.shares else " then "
    words = joint.join(fleet.part(name).spec for name in used)
    return (
        f"--hardware {fleet.spec}: the plan uses {words}",
        *(f"{spec} is idle: no shorter step was found with it" for spec in idle),
    )


def _infeasible(graph: Graph, options: TraceOptions, found: FleetSearch) -> InfeasibleError:
    """Why nothing fits: the nearest of each part alone and of all together, and what binds."""
    lines = [
        f"{row.words}: nearest needs {needs(row.searcher, row.outcome.misfit)}"
        for row in found.rows if row.outcome.misfit is not None
    ]  # fmt: skip
    usable = tuple(capped(part, options.limits.memory_bytes) for part in found.fleet.parts)
    asked = FleetAsking(
        graph=graph, fleet=replace(found.fleet, parts=usable), workload=found.workload
    )
    answer = found.answer()
    return explained(
        asked, options.pins, answer.outcome if answer else Outcome(), "\n".join(lines),
        "every part has whole stages of as many GPUs, and dp divides the global batch of"
        f" {found.workload.global_batch}",
    )  # fmt: skip
