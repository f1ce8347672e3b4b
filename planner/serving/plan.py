"""A plan to serve a model: what was decided, for what load, and what it is predicted to do."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cost_models.hardware import Cluster
from cost_models.serving_decisions import Serving, policy_of
from cost_models.serving_reading import parts_of, served_model
from cost_models.sharding import Sharding
from ir.errors import PlanError
from ir.files import is_stream
from ir.graph import Graph
from planner.plan import Solver, constants_hash, hardware_name, write_whole
from planner.serving.asked import ServeAsked
from planner.serving.predict import Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """Decisions for a graph, under the hashes of what they were made for.

    asked: the load, its limits, and what may be lossy. shardings: placements on tp by unit class,
    none where tp = 1. rows_on_host: tokens up to which the CPU multiplies what it holds. ttft_us,
    tpot_us, peak_memory_bytes: the estimate as it was written.
    """

    graph: Graph = field(repr=False, compare=False)
    graph_hash: str
    hardware: str
    hardware_hash: str
    constants_hash: str
    asked: ServeAsked
    serving: Serving
    shardings: tuple[tuple[str, Sharding], ...] = ()
    rows_on_host: int = 0
    ttft_us: int = 0
    tpot_us: int = 0
    peak_memory_bytes: int = 0
    solver: Solver = field(default_factory=Solver)

    @property
    def sharding_by_unit(self) -> Mapping[str, Sharding]:
        return dict(self.shardings)

    @property
    def lossy(self) -> tuple[str, ...]:
        """What changes numbers: formats in fewer bits, a cache that forgets."""
        s = self.serving
        found = [f"{block} in {word}" for block, word in s.weights if word != self.asked.precision]
        found += [f"cache in {s.kv}"] if s.kv not in ("bf16", "fp16") else []
        return (*found, *([f"cache of {kept_words(s)}"] if s.kv_window else []))

    def __repr__(self) -> str:
        from planner.displays import line

        return line(self)

    def __str__(self) -> str:
        from planner.displays import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        from planner.displays import plan_html

        return plan_html(self)

    def save(self, target: str, *, embed: bool = False, overwrite: bool = False) -> None:
        """Write `target` and the graph beside it, as `Plan.save` does."""
        from ir.text import format_graph
        from planner.serving.text import to_text
        from planner.targets import require_target

        embed = embed or target == "-" or is_stream(target)
        if not overwrite:
            require_target(target, embed=embed, flag="")
        text = to_text(self, embed=embed)
        if target == "-":
            sys.stdout.write(text)
            return
        if not embed:
            write_whole(Path(target).with_suffix(".graph"), format_graph(self.graph))
        write_whole(Path(target), text)


def kept_words(s: Serving) -> str:
    """What a cache with a window keeps, or is read of it."""
    block, top = policy_of(s.kv_policy)
    found = f"{s.kv_window} tokens"
    if top:
        return f"{found} and, of those before, {top} blocks of {block} at a time"
    return f"{found} and an entry for every {block} before" if block else found


def make_serving_plan(
    graph: Graph, spec: str, cluster: Cluster, asked: ServeAsked, found: Prediction,
    shardings: Mapping[str, Sharding], rows_on_host: int, solver: Solver,
) -> ServingPlan:  # fmt: skip
    """The plan of a prediction under the hashes of today's inputs. spec: as `--hardware`."""
    from ir.text import format_graph, graph_hash

    return ServingPlan(
        graph=graph, graph_hash=graph_hash(format_graph(graph)), hardware=hardware_name(spec),
        hardware_hash=cluster.digest, constants_hash=constants_hash(cluster), asked=asked,
        serving=found.serving, shardings=tuple(shardings.items()), rows_on_host=rows_on_host,
        ttft_us=round(found.ttft_s * 1e6), tpot_us=round(found.tpot_s * 1e6),
        peak_memory_bytes=round(dict(found.tiers)["gpu"]), solver=solver,
    )  # fmt: skip


def require_blocks(plan: ServingPlan) -> None:
    """Raise PlanError where the plan says how a block lies, or its format, that the model lacks."""
    there = served_model(plan.graph, plan.asked.engine).block_elements()
    for block in (*(held.block for held in plan.serving.tiers),
                  *(block for block, _ in plan.serving.weights)):  # fmt: skip
        if block not in there:
            raise PlanError(f"the plan places {block}: {plan.graph.name} has none",
                            why=f"its blocks: {', '.join(there)}")  # fmt: skip


def shardings_of(graph: Graph, cluster: Cluster, serving: Serving) -> dict[str, Sharding]:
    """Placements on tp of every unit class, as the costs have matrices: by columns, then by rows,
    the rest (keys and values above their heads, norms) as the per-op program has it best."""
    from cost_models.chain import chain_of
    from cost_models.decisions import Workload
    from cost_models.step import Costs
    from cost_models.words import sharding_of
    from ir.graph import full_name
    from planner.decisions import Pins
    from planner.names import fold
    from planner.space import Space

    if serving.tp == 1:
        return {}
    words = {"column": "S(0)", "row": "S(1)", "whole": "R"}
    links = chain_of(graph).links
    place: list[tuple[str, str]] = []
    for unit, parts in parts_of(graph).items():
        paths = [link.path for link in links if link.unit.name == unit]
        for name, part in parts.items():
            if part.block and part.split in words:
                names = [full_name(path, name) for path in paths]
                place += [(pattern, words[part.split]) for pattern in fold(names)]
    precision = "bf16" if serving.default not in ("fp16", "fp32") else serving.default
    costs = Costs(graph=graph, cluster=cluster, workload=Workload(
        engine="native", global_batch=1, seq_len=1024, precision=precision))  # fmt: skip
    laid = Space(costs=costs, pins=Pins(place=tuple(place))).assign(serving.tp, False)
    return {unit.name: sharding_of(unit, found)
            for (unit, _), found in laid.items()}  # fmt: skip
