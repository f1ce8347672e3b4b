"""`plan trace`, of one cluster: workload, search, baselines, plan."""

from __future__ import annotations

import math
from dataclasses import replace

from cost_models.decisions import Workload
from cost_models.engines import load_engine
from cost_models.estimate import estimate_step, whole_step_ps
from cost_models.forward import forward_of
from cost_models.hardware import Cluster
from cost_models.ledger import Estimate
from cost_models.step import Costs
from cost_models.words import sharding_of
from ir.errors import PlanError, UsageError
from ir.graph import Graph
from planner.capturing import Clock
from planner.decisions import Pins
from planner.formats import check_formats
from planner.infeasible import infeasible
from planner.interrupts import interruptible
from planner.keep_checks import pinned_keep
from planner.limits import capped, uncapped
from planner.mesh import cp_reason, divisors, facts_of, meshes, shorter_cp, splits_something
from planner.names import many
from planner.options import Baseline, Progress, TraceOptions, TraceResult
from planner.pin_checks import check_mesh, check_pins
from planner.plan import Plan, Solver, make_plan
from planner.proved import pins_said
from planner.runnable import check_runnable, may_compile, refusals, whole_recomputation_fault
from planner.scale import check_scale
from planner.search import PATIENCE, Outcome, Searcher, Tried
from planner.stability import steady
from planner.workload import resolve


def plan_graph(
    graph: Graph,
    options: TraceOptions,
    cluster: Cluster,
    clock: Clock,
    progress: Progress | None = None,
) -> TraceResult:
    """Plan a graph that is captured already, for time; raises as `run` does."""
    found, searcher, outcome = attempt(graph, options, cluster, clock, progress)
    if found is None:
        memory = options.limits.memory_bytes, cluster.device.memory_bytes
        raise infeasible(searcher, outcome, memory)
    return found


def attempt(
    graph: Graph,
    options: TraceOptions,
    cluster: Cluster,
    clock: Clock,
    progress: Progress | None = None,
) -> tuple[TraceResult | None, Searcher, Outcome]:
    """The fastest plan within the limit of memory, or None where none fits; and the search."""
    check_mesh(options.pins, cluster.count)  # before a batch is named that suits the pins alone
    workload, echo = resolve(graph, cluster, options.asked, options.pins)
    graph = forward_of(graph, workload.engine)
    for key in ("shares", "tp_by_part"):
        if getattr(options.pins, key):
            raise UsageError(f"--fix {options.pins.said(key)} is for hardware of several kinds,"
                             " or of one in groups", why=f"{cluster.spec} is one group",
                             hints=("--hardware h100x16+h100x8 is h100x24 in two groups",)
                             )  # fmt: skip
    layers = facts_of(_chain(graph)).layers
    check_pins(options.pins, workload, gpus=cluster.count, layers=layers)
    check_model(graph, cluster, workload, options.pins)
    usable = capped(cluster, options.limits.memory_bytes)
    if progress:
        progress("costing")
    costs, searcher = _searcher(graph, usable, workload, options.pins, progress)
    searcher.effort, searcher.gain_ppm = options.effort or searcher.effort, options.gain_ppm
    searcher.patience = 1 if options.effort else PATIENCE
    clock.mark("cost_s")
    with interruptible():  # from the first recipe on there is a plan to keep
        baselines, stopped = _baselines(costs, searcher)
        known = _best_of(baselines, options.pins)
        if stopped and known is None:
            raise KeyboardInterrupt
        outcome = Outcome(best=known, interrupted=True) if stopped else searcher.run(known)
    clock.mark("solve_s")
    if outcome.interrupted and outcome.best is None:
        raise KeyboardInterrupt
    if outcome.best is None:
        return None, searcher, outcome
    if options.old is not None and options.stability is not None and not outcome.interrupted:
        kept = steady(searcher, outcome, options.old, options.stability)
        echo, outcome = (*echo, f"{options.base}: {kept.words}"), kept.outcome
    plan, estimate = _planned(graph, options.hardware, cluster, workload, costs, outcome,
                              options.pins)  # fmt: skip
    cp = shorter_cp(facts_of(_chain(graph)), workload, plan.decisions)
    if cp is not None and options.pins.cp is None:
        echo = (*echo, f"cp {cp} ({many(workload.seq_len // cp, 'token')} a rank) was not searched:"
                       f" --fix cp={cp} may be quicker")  # fmt: skip
    found = TraceResult(
        plan=plan, estimate=estimate, echo=echo, interrupted=outcome.interrupted,
        baselines=tuple(row for row, _ in baselines), timing=clock.timing(),
    )  # fmt: skip
    return found, searcher, outcome


def _chain(graph: Graph):  # type: ignore[no-untyped-def]
    from cost_models.chain import chain_of

    return chain_of(graph)


# --- searching --------------------------------------------------------------------------------


def check_model(graph: Graph, cluster: Cluster, workload: Workload, pins: Pins) -> None:
    """Pins that this model cannot hold: a pipeline it has no cuts for, tp that splits nothing; and
    a step too large to plan."""
    chain = _chain(graph)
    if not chain.links:
        raise PlanError(
            f"{graph.name} has no submodule with parameters to plan",
            why="units are submodules: a layer, the embedding, the head",
            hints=("put the parameters of the top module into submodules that it calls",),
        )
    check_scale(graph, cluster, workload)
    facts = facts_of(chain)
    stages = (pins.pp or 1) * (pins.virtual_stages or 1)
    if pins.pp and pins.virtual_stages and stages > facts.layers:
        raise UsageError(
            f"--fix pp={pins.pp} and --fix virtual_stages={pins.virtual_stages}: {stages} stages",
            why=f"every stage has a layer at least, and the model has {facts.layers}",
            hints=(f"--fix virtual_stages={max(1, facts.layers // pins.pp)} at most",),
        )
    if pins.stages and min(pins.stages) < 1:
        raise UsageError("--fix stages: every stage has a layer at least")
    if (pins.pp or 1) > 1 and facts.pipeline_reason:
        raise UsageError(
            f"--fix pp={pins.pp}: this model has no pipeline", why=facts.pipeline_reason,
            hints=("--fix pp=1",),
        )  # fmt: skip
    if (pins.pp or 1) > facts.layers:
        raise UsageError(
            f"--fix pp={pins.pp}: the model has {facts.layers} layers to divide",
            hints=(f"--fix pp={facts.layers} at most",),
        )
    if (pins.tp or 1) > 1 and not splits_something(chain, pins.tp or 1):
        raise UsageError(
            f"--fix tp={pins.tp}: no matmul of the layers divides by {pins.tp}",
            hints=("a tp that divides the heads and the hidden sizes",),
        )
    if (pins.cp or 1) > 1:
        kinds = (pins.cp_kind,) if pins.cp_kind else ("allgather",)
        reason = cp_reason(facts, workload, kinds[0], pins.tp or 1, pins.cp or 1)
        if reason:
            raise UsageError(f"--fix cp={pins.cp} cannot hold", why=reason)
    for key, sizes in (("ep", facts.experts), ("etp", facts.expert_features)):
        degree = getattr(pins, key) or 1
        if degree > 1 and (not sizes or any(n % degree for n in sizes)):
            what = "experts" if key == "ep" else "expert features"
            words = " and ".join(map(str, sizes)) or "none"
            fit = [n for n in divisors(math.gcd(*sizes)) if n > 1][-3:] if sizes else []
            raise UsageError(
                f"--fix {key}={degree}: it does not divide the {what} ({words})",
                hints=(f"--fix {' or '.join(f'{key}={n}' for n in fit)}",) if fit else (),
            )
    _check_places(graph, pins)
    check_formats(pins.formats, graph, cluster, workload)
    pinned_keep(pins.keep or (), graph)
    compiled = load_engine(workload.engine).fused and may_compile(workload, pins)
    check_runnable(refusals(graph, workload, compiled), pins)
    again = whole_recomputation_fault(graph, workload, compiled)
    if again and (pins.tp or 1) > 1 and pins.recompute is not None and any(pins.recompute.full):
        raise UsageError(
            f"--fix {pins.said('tp')} and --fix {pins.said('recompute')} cannot be run of this"
            " model", why=again, hints=("recompute=selective", "tp=1", "compile=off"),
        )  # fmt: skip


def _check_places(graph: Graph, pins: Pins) -> None:
    from planner.names import matches

    for pattern, words in pins.place:
        for name, p in graph.parameters.items():
            rank = len(p.tensor.shape)
            if words != "R" and matches(pattern, name) and int(words[2:-1]) >= rank:
                raise UsageError(
                    f"--fix place:{pattern}={words}: {name} has {rank} dimensions",
                    hints=(f"S(0) to S({rank - 1}), or R",),
                )
        if not any(matches(pattern, name) for name in graph.parameters):
            names = list(graph.parameters)
            raise UsageError(
                f"--fix place:{pattern}={words}: no parameter has that name",
                hints=(f"parameters are named {names[0]} ... {names[-1]}",),
            )


def _searcher(
    graph: Graph, cluster: Cluster, workload: Workload, pins: Pins, progress: Progress | None
) -> tuple[Costs, Searcher]:
    """Costs at every work point that the candidates of the pins, and the recipes, have."""
    chain = _chain(graph)
    if pins.keep:
        pins = replace(pins, keep=pinned_keep(pins.keep, graph))
    wide = [pins, *(recipe for _, recipe in _recipes(graph, cluster, pins))]
    points = dict.fromkeys(
        (m.micro_batch, m.cp) for p in wide for m in meshes(chain, cluster, workload, p)
    )
    points[1, 1] = None
    costs = Costs(
        graph=graph, cluster=cluster, workload=workload, points=tuple(points),
        compiled=may_compile(workload, pins),
    )  # fmt: skip
    return costs, Searcher(costs=costs, pins=pins, progress=progress)


def _recipes(graph: Graph, cluster: Cluster, pins: Pins) -> list[tuple[str, Pins]]:
    """The classic recipes as pins: what a team would run without a planner."""
    tp = cluster.domain_ranks if cluster.domain_ranks <= 8 else 8
    plain = Pins(pp=1, tp=1, cp=1, ep=1, etp=1, offload=(), formats=(), compile=pins.compile)
    full = cluster.count
    return [
        ("ddp", replace(plain, zero=0)),
        ("fsdp", replace(plain, zero=3, shard=full)),
        ("fsdp+tp", replace(plain, tp=tp, zero=3, sequence_parallel=None)),
        ("3d", replace(plain, pp=None, tp=tp, zero=1, schedule="1f1b")),
        *[("fsdp+ep", replace(plain, ep=e, zero=None)) for e in _expert_degree(graph, cluster)],
    ]  # fmt: skip


def _expert_degree(graph: Graph, cluster: Cluster) -> list[int]:
    """The widest ep inside one domain: one expert a GPU where there are as many GPUs."""
    experts = facts_of(_chain(graph)).experts
    fits = [e for e in divisors(cluster.domain_ranks) if all(n % e == 0 for n in experts)]
    return fits[-1:] if experts and fits[-1] > 1 else []


Found = list[tuple[Baseline, Tried | None]]


def _baselines(costs: Costs, searcher: Searcher) -> tuple[Found, bool]:
    """Cost every recipe with the same model; one that cannot be laid out is left out. True where
    Ctrl-C ended it."""
    rows: Found = []
    chain = costs.chain
    for name, recipe in _recipes(costs.graph, costs.cluster, searcher.pins):
        if recipe.tp and recipe.tp > 1 and not splits_something(chain, recipe.tp):
            continue
        if name == "3d" and facts_of(chain).pipeline_reason:
            continue
        found = searcher.under(recipe).run()
        if found.best is not None:
            seconds = whole_step_ps(costs, found.best.objective_ps) / 1e12
            rows.append((Baseline(name=name, step_time_s=seconds, fits=True), found.best))
        elif found.misfit is not None:
            m = found.misfit
            made = estimate_step(costs, costs.step(m.decisions, m.assignments), m.decisions)
            rows.append((Baseline(name=name, step_time_s=made.step_time_s, fits=False), None))
        if found.interrupted:
            return rows, True
    return rows, False


def _best_of(rows: Found, pins: Pins) -> Tried | None:
    """The best recipe, as the search's incumbent; with pins, recipes are another space."""
    found = [tried for _, tried in rows if tried is not None]
    if pins != Pins() or not found:
        return None
    return min(found, key=lambda t: t.score)


def _planned(
    graph: Graph, spec: str, cluster: Cluster, workload: Workload, costs: Costs, out: Outcome,
    pins: Pins,
) -> tuple[Plan, Estimate]:
    assert out.best is not None
    d = out.best.decisions
    estimate = uncapped(estimate_step(costs, costs.step(d, out.best.assignments), d), cluster)
    bound = whole_step_ps(costs, out.bound_ps)
    solver = Solver(
        status="OPTIMAL" if out.proved else "FEASIBLE", gap_ppm=round(out.gap * 1e6),
        bound_us=bound // 1_000_000, meshes=out.meshes, meshes_solved=out.expanded,
        pins=pins_said(pins), axis_gain_ppm=out.best.gain_ppm,
    )  # fmt: skip
    shardings = {
        unit.name: sharding_of(unit, a) for (unit, _), a in out.best.assignments.items()
    }
    plan = make_plan(graph, spec, cluster, workload, d, shardings, estimate, solver)
    return plan, estimate
