"""`plan trace --task serve`: capture, predict every way to serve, and the plan of the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cost_models.hardware import Cluster
from cost_models.serving_decisions import WEIGHT_BYTES, ServeLoad, Serving
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_reading import served_model
from cost_models.serving_tiers import rows_on_host
from ir.check import check_sizes
from ir.graph import Graph
from planner.options import Timing
from planner.plan import Solver
from planner.serving.asked import ServeAsked, ServePins, serve_pins_said
from planner.serving.plan import ServingPlan, make_serving_plan, shardings_of
from planner.serving.predict import Prediction, predict
from planner.serving.runnable import experts_of
from planner.serving.search import search

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeResult:
    """A plan of serving with its prediction, and the best of other divisions of the GPUs."""

    plan: ServingPlan
    found: Prediction
    others: tuple[Prediction, ...]
    timing: Timing
    echo: tuple[str, ...] = ()


def plan_serving(
    graph: Graph, spec: str, cluster: Cluster, asked: ServeAsked, pins: ServePins,
    progress: Progress | None = None,
) -> tuple[ServingPlan, Prediction, tuple[Prediction, ...]]:  # fmt: skip
    """Plan a graph that is captured. Raises InfeasibleError, UsageError as the search does."""
    check_sizes(graph, 1, asked.prompt + asked.output)
    model = served_model(graph, asked.engine)
    found = search(model, cluster, asked, pins, progress, experts_of(graph))
    s = found.best.serving
    rows = 0
    if any(held.place == "compute" for held in s.tiers):
        width = min(WEIGHT_BYTES[s.format_of(h.block)] for h in s.tiers if h.place == "compute")
        rows = rows_on_host(cluster, s, width)
    plan = make_serving_plan(
        graph, spec, cluster, asked, found.best, shardings_of(graph, cluster, s), rows,
        Solver(status="OPTIMAL", meshes=found.tried, meshes_solved=found.tried,
               pins=serve_pins_said(pins)),
    )  # fmt: skip
    return plan, found.best, found.others


def recosted(plan: ServingPlan, cluster: Cluster, serving: Serving | None = None) -> Prediction:
    """The plan's decisions with today's hardware data and constants."""
    load = ServeLoad(prompt=plan.asked.prompt, output=plan.asked.output)
    engine = load_serving_engine(plan.asked.engine)
    model = served_model(plan.graph, engine.name)
    return predict(model, cluster, engine, serving or plan.serving, load)
