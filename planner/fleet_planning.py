"""`plan trace` on several kinds of GPUs: what `fleet_search` finds, as a plan."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from cost_models.decisions import Workload
from cost_models.estimate import estimate
from cost_models.fleet import Fleet, used_parts
from cost_models.forward import forward_of
from cost_models.ledger import Estimate
from cost_models.words import sharding_of
from ir.errors import InfeasibleError, UsageError
from ir.graph import Graph
from planner.capturing import Clock
from planner.charged import charged
from planner.charges import decided_by
from planner.decisions import Pins
from planner.fleet_asking import FleetAsking
from planner.fleet_search import FleetSearch, searchers
from planner.fleet_stability import steady_fleet
from planner.infeasible import explained, needs
from planner.interrupts import interruptible
from planner.limits import capped, usd_at_least
from planner.names import gpus_hold
from planner.options import Progress, TraceOptions, TraceResult
from planner.outcome import Outcome
from planner.plan import Plan, Solver, make_plan
from planner.proved import pins_said
from planner.sizing import RETRY_EFFORT
from planner.workload import resolve
from planner.worth import Worth


def plan_fleet(
    graph: Graph, options: TraceOptions, fleet: Fleet, clock: Clock,
    progress: Progress | None = None,
) -> TraceResult:  # fmt: skip
    """Plan a graph for any objective but memory; raises as `planner.tracing.run` does."""
    result, found = attempt_fleet(graph, options, fleet, clock, progress)
    if result is None:
        raise (
            _too_dear(options, found) or _beyond(graph, options, fleet)
            or _infeasible(graph, options, found)
        )
    return result


def _too_dear(options: TraceOptions, found: FleetSearch) -> InfeasibleError | None:
    """Where --max-cost is in the way: by how much, and the parts that cost least."""
    over = [(row.usd, row.searcher.clusters) for row in found.rows if row.usd is not None]
    if not over:
        return None
    limit, (usd, parts) = options.limits.usd, min(over, key=lambda row: row[0])
    return InfeasibleError(
        f"no plan of {found.fleet.spec} costs {limit:g} USD a million tokens or less",
        why=f"the least costs {usd:.4g}, on {'+'.join(part.spec for part in parts)}"
        + (f": {usd / limit - 1:.1%} over --max-cost" if limit else ""),
        hints=(f"--max-cost {usd_at_least(usd)}: the least that was found",),
    )


def _beyond(graph: Graph, options: TraceOptions, fleet: Fleet) -> InfeasibleError | None:
    """Where --max-gpus is in the way: how many GPUs it takes."""
    most = options.limits.gpus
    if most is None or most >= fleet.count:
        return None
    free = replace(options.limits, gpus=None)
    asked = replace(options, limits=free, objective="gpus", effort=RETRY_EFFORT)
    found, _ = attempt_fleet(graph, asked, fleet, Clock())
    if found is None:
        return None
    count = found.plan.decisions.gpus
    return InfeasibleError(
        f"no plan was found that fits {most} GPUs or fewer (--max-gpus {most})",
        why=f"the fewest that hold it are {count}: {count - most} more",
        hints=(f"--max-gpus {count}",),
    )


def attempt_fleet(
    graph: Graph, options: TraceOptions, fleet: Fleet, clock: Clock,
    progress: Progress | None = None,
) -> tuple[TraceResult | None, FleetSearch]:  # fmt: skip
    """The plan within the limits of memory and GPUs, or None where none fits; and the search."""
    if options.objective == "cost" and not options.prices:
        raise UsageError(
            "--objective cost needs prices on hardware of several kinds",
            why="a plan that leaves a part idle is slower and may cost less",
            hints=("--prices FILE", "docs/size.md has the format"),
        )
    workload, echo = resolve(graph, fleet, options.asked, options.pins)
    graph = forward_of(graph, workload.engine)
    worth = worth_of(graph, options, fleet, workload)
    found = FleetSearch(fleet=fleet, workload=workload, worth=worth)
    every = _sizes(fleet, options.limits.gpus)
    with interruptible():  # a plan of one searcher is kept while the next is made
        for sizes in [[n] for n in every] if options.objective == "gpus" else [every]:
            for searcher in searchers(graph, fleet, workload, options, sizes=sizes):
                searcher.progress = progress
                clock.mark("cost_s")
                found.search(searcher)
                if len(searcher.clusters) == 1:
                    found.note_alone()
                clock.mark("solve_s")
                if found.stopped:
                    break
            if found.best is not None or found.stopped:
                break
    if found.best is None:
        if found.stopped:
            raise KeyboardInterrupt
        return None, found
    if options.old is not None and options.stability is not None and not found.stopped:
        words = steady_fleet(found, options.old, options.stability)
        echo = (*echo, f"{options.base}: {words}")
    plan, made = _planned(graph, options.hardware, found, options.pins)
    word = {"gpus": "--objective gpus"}.get(options.objective, f"--max-gpus {options.limits.gpus}")
    if plan.decisions.gpus < fleet.count and (options.objective == "gpus" or options.limits.gpus):
        echo = (*echo, f"{word}: {gpus_hold(plan.decisions.gpus, fleet.count)}")
    result = TraceResult(
        plan=plan, estimate=made, echo=(*echo, *_used(plan, made, fleet, max(sizes), worth)),
        interrupted=found.stopped, baselines=found.baselines, timing=clock.timing(),
    )  # fmt: skip
    if options.objective == "energy":
        line = f"--objective energy: {found.value:.4g} J a token at the devices' power"
        result = replace(result, echo=(*result.echo, line))
    return charged(result, options, fleet), found


def worth_of(graph: Graph, options: TraceOptions, fleet: Fleet, workload: Workload) -> Worth:
    """What the plans of a fleet are compared by."""
    return Worth(
        graph=graph, hardware=fleet, workload=workload, objective=options.objective,
        prices=options.prices, operations=options.operations, most_usd=options.limits.usd,
    )  # fmt: skip


def _sizes(fleet: Fleet, most: int | None) -> list[int]:
    """How many GPUs any of the parts have together, ascending, up to so many. Raises
    InfeasibleError where none has so few."""
    counts = [part.count for part in fleet.parts]
    every = {sum(some) for n in range(1, len(counts) + 1)
             for some in itertools.combinations(counts, n)}  # fmt: skip
    found = sorted(n for n in every if most is None or n <= most)
    if not found:
        raise InfeasibleError(
            f"--max-gpus {most}: every part of {fleet.spec} has more GPUs",
            why=f"parts are used whole, and the smallest has {min(counts)}",
            hints=(f"--max-gpus {min(counts)}",),
        )
    return found


def _planned(
    graph: Graph, spec: str, found: FleetSearch, pins: Pins
) -> tuple[Plan, Estimate]:
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
        pins=pins_said(pins), axis_gain_ppm=found.best.gain_ppm,
        objective="time" if found.worth is None or found.worth.by_time else found.worth.objective,
    )  # fmt: skip
    return make_plan(graph, spec, found.fleet, workload, d, shardings, made, solver), made


def _used(
    plan: Plan, made: Estimate, fleet: Fleet, most: int, worth: Worth
) -> tuple[str, ...]:
    """Which GPUs the plan uses, and which are idle. most: GPUs that it could use."""
    used = [part.name for part in used_parts(fleet, plan.decisions)]
    idle = [part.spec for part in fleet.parts if part.name not in used]
    joint = " beside " if plan.decisions.shares else " then "
    words = joint.join(fleet.part(name).spec for name in used)
    without = {"cost": "cheaper plan", "energy": "plan of less energy"}.get(
        worth.objective, "shorter step" + " of that cost" * (worth.most_usd < math.inf)
    )
    by = ""
    if idle and (worth.objective == "cost" or worth.most_usd < math.inf):
        by = decided_by(worth.charges(plan.decisions, made), fleet.parts, worth.prices)
    return (
        f"--hardware {fleet.spec}: the plan uses {words}",
        *(f"{spec} is idle: no {without} was found with it{', ' * bool(by)}{by}" for spec in idle
          if most == fleet.count),
    )


def _infeasible(graph: Graph, options: TraceOptions, found: FleetSearch) -> InfeasibleError:
    """Why nothing fits: the nearest of each part alone and of all together, and what binds."""
    lines = [
        f"{row.words}: nearest needs {needs(row.searcher, row.outcome.misfit)}"
        for row in found.rows if row.outcome.misfit is not None
    ]  # fmt: skip
    usable = tuple(capped(part, options.limits.memory_bytes) for part in found.fleet.parts)
    asked = FleetAsking(
        graph=forward_of(graph, found.workload.engine),
        fleet=replace(found.fleet, parts=usable), workload=found.workload,
        gain_ppm=options.gain_ppm,
    )
    answer = found.answer()
    return explained(
        asked, options.pins, answer.outcome if answer else Outcome(), "\n".join(lines),
        "every part has whole stages of as many GPUs, and dp divides the global batch of"
        f" {found.workload.global_batch}",
        (options.limits.memory_bytes, max(p.device.memory_bytes for p in found.fleet.parts)),
    )  # fmt: skip
