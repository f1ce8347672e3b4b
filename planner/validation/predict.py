"""A case predicted: its model traced at its dimensions, its step estimated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import cost_models.validation
from cost_models.chain import chain_of
from cost_models.compute import Kernels
from cost_models.decisions import Decisions
from cost_models.estimate import estimate_step, stage_problem, whole_step_ps
from cost_models.forward import forward_of
from cost_models.ledger import Estimate
from cost_models.stage_problem import step_ps
from cost_models.step import Assignments, Costs
from ir.errors import PlanError
from ir.graph import Graph
from planner.capturing import capture
from planner.decisions import Pins
from planner.options import TraceOptions
from planner.search import Searcher
from planner.validation.configure import Case
from planner.validation.configure_layout import stages_of
from planner.validation.rows import Skipped

MODELS = Path(str(cost_models.validation.__file__)).with_name("models.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A case with its graph, and how its units lie on tp: what an estimate needs."""

    case: Case
    graph: Graph
    assignments: Assignments
    kernels: Kernels | None = None  # other than the device's


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A run beside its prediction. Seconds of a step, bytes of the fullest rank; measured ones
    are None where the run has none."""

    id: str
    step_time_s: float
    peak_bytes: int
    measured_s: float | None
    measured_bytes: float | None
    oom: bool
    capacity_bytes: int
    recompute: tuple[tuple[int, int], ...]
    estimate: Estimate


def trace(case: Case) -> Graph:
    """The case's graph, from the cache if it was traced before."""
    options = TraceOptions(model=str(MODELS), args=case.args, hardware=case.cluster.spec)
    options = replace(options, asked=replace(options.asked, precision=case.workload.precision))
    return forward_of(capture(options, case.cluster), case.engine.name)


def prepare(case: Case) -> Prepared:
    """Trace a case and lay its units. Raises Skipped where it cannot be laid out."""
    graph = trace(case)
    d = case.decisions
    layers = len(chain_of(graph).layers)
    if sum(d.stages) != layers:
        if layers < d.pp * d.virtual_stages:
            raise Skipped(f"{d.pp} x {d.virtual_stages} stages for {layers} layers")
        stages = stages_of(layers, d.pp * d.virtual_stages, case.engine.fills_stages)
        case = replace(case, decisions=replace(d, stages=stages))
        d = case.decisions
    costs = costs_of(case, graph)
    laid = Searcher(costs=costs, pins=Pins(place=_places(case))).assign(d.tp, d.sequence_parallel)
    if case.run.is_moe and layers % (d.pp * d.virtual_stages):
        stages = stages_of(layers, d.pp * d.virtual_stages, tail=_tail(costs, d, laid))
        case = replace(case, decisions=replace(d, stages=stages))
    return Prepared(case=case, graph=graph, assignments=laid)


def _tail(costs: Costs, d: Decisions, laid: Assignments) -> int:
    """What follows the last layer (head, loss, further tokens), in layers: NVIDIA's recipes for
    mixtures of experts lay their pipelines out by hand, half way to balanced."""
    step = costs.step(d, laid)
    last = step.chain.layers[-1]

    def busy(link: int) -> int:
        row = step.row(link)
        return row.forward_ps + row.backward_ps

    after = sum(busy(i) for i in range(last + 1, len(step.chain.links)))
    return max(1, round((1 + after / busy(last)) / 2))


def _places(case: Case) -> tuple[tuple[str, str], ...]:
    """Column and row parallel attention, as every framework of the runs has it."""
    args, tp = dict(case.args), case.decisions.tp
    if tp == 1 or args.get("attention", "gqa") != "gqa" or int(args["kv_heads"]) % tp:
        return ()
    names = {"wq": "S(0)", "wk": "S(0)", "wv": "S(0)", "wo": "S(1)"}
    return tuple((f"layers.*.mixer.{name}.weight", at) for name, at in names.items())


def costs_of(case: Case, graph: Graph, kernels: Kernels | None = None) -> Costs:
    d, engine = case.decisions, case.engine
    for switch in case.switches:
        engine = engine.switched(switch)
    return Costs(
        graph=graph, cluster=case.cluster, workload=case.workload, points=((d.micro_batch, d.cp),),
        variant=engine, variant_kernels=kernels,
    )  # fmt: skip


def predict(prepared: Prepared) -> Prediction:
    """Estimate a case; where recomputation is unstated, the least that fits."""
    case = prepared.case
    costs = costs_of(case, prepared.graph, prepared.kernels)
    made = None
    for recompute in _recomputes(case):
        d = replace(case.decisions, recompute=recompute)
        made = estimate_step(costs, costs.step(d, prepared.assignments), d)
        if made.peak_memory_bytes <= 0.97 * made.capacity_bytes:
            break
    assert made is not None
    step_time_s = made.step_time_s
    if timed(case, d.recompute) != d.recompute:
        at = replace(case.decisions, recompute=timed(case, d.recompute))
        step_time_s = estimate_step(costs, costs.step(at, prepared.assignments), at).step_time_s
    run = case.run
    measured = run.step_time_s
    if measured is None and run.flop_per_s:
        measured = run.flop_factor * made.model_flop / run.flop_per_s
    if measured is None and run.mfu:
        measured = made.model_flop / (run.mfu * costs.cluster.device.peak("bf16") * made.gpus)
    return Prediction(
        id=run.id, step_time_s=step_time_s, peak_bytes=made.peak_memory_bytes,
        measured_s=None if run.oom else measured, measured_bytes=run.peak_bytes, oom=run.oom,
        capacity_bytes=made.capacity_bytes, recompute=d.recompute, estimate=made,
    )  # fmt: skip


def settled(prepared: Prepared) -> Prepared:
    """With recomputation decided: `step_s` needs no memory then."""
    found = predict(prepared)
    d = replace(prepared.case.decisions, recompute=timed(prepared.case, found.recompute))
    return replace(prepared, case=replace(prepared.case, decisions=d))


def timed(
    case: Case, recompute: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    """What recomputation takes where a source does not state it: NVIDIA's recipes choose modules,
    the cheap ones first, so that a share x of what is kept costs x^2 of the forward."""
    if case.recompute != "unstated" or case.engine.name != "megatron":
        return recompute
    stages = case.decisions.stages
    return tuple((round(f * f / n), some) for (f, some), n in zip(recompute, stages))


def step_s(prepared: Prepared) -> float:
    """Seconds of a step of a settled case: `predict` without names and memory."""
    case = prepared.case
    costs = costs_of(case, prepared.graph, prepared.kernels)
    d = case.decisions
    problem = stage_problem(costs, costs.step(d, prepared.assignments))
    return whole_step_ps(costs, step_ps(problem, d.stages, d.recompute)) / 1e12


def _recomputes(case: Case) -> list[tuple[tuple[int, int], ...]]:
    """(full, selective) layers of each stage to try in order."""
    stages = case.decisions.stages

    def share(full: float, some: float) -> tuple[tuple[int, int], ...]:
        return tuple((round(n * full), math.ceil(n * some) if full < 1 else 0) for n in stages)

    if case.recompute == "none":
        return [share(0, 0)]
    if case.recompute == "full":
        return [share(1, 0)]
    if case.recompute == "selective":
        return [share(0, 1)]
    if case.recompute.startswith("full:"):
        return [share(float(case.recompute[5:]), 0)]
    if case.recompute == "unstated":
        return [share(0, 0), share(0, 1), *(
            tuple((math.ceil(n * f), n - math.ceil(n * f)) for n in stages)
            for f in (0.125, 0.25, 0.5, 0.75, 1.0)
        )]  # fmt: skip
    raise PlanError(f"recompute {case.recompute!r} is not known")
