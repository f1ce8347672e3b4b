"""`plan why --layer NAME`: where a unit runs, what it takes and holds, and what its other ways to
recompute would do to the step and to the memory of its rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from cost_models.estimate import read_assignments, stage_problem, whole_step_ps
from cost_models.rank_ledger import levels_of, stage_links
from cost_models.schedule import SPLIT_BACKWARD, rank_of
from cost_models.stage_problem import LEVELS, Pair, evaluate
from cost_models.step import Costs
from cost_models.units import format_bytes, format_seconds
from ir.errors import UsageError
from planner.check import Checked
from planner.placements import placements


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One level of recomputation. kept_bytes: of one micro-batch. Where one layer of the stage
    goes there: the step, and the fullest rank's bytes less a GPU's. refused: why it cannot."""

    level: str
    kept_bytes: int
    step_s: float = 0.0
    over_bytes: int = 0
    refused: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A unit under a plan; seconds of one micro-batch, bytes of one rank. level: none, selective
    or full. ways: empty where a unit is never recomputed."""

    name: str
    stage: int
    pp_rank: int
    level: str
    forward_s: float
    backward_s: float
    state_bytes: int
    in_flight: int
    placements: tuple[tuple[str, str], ...]
    ways: tuple[Way, ...]


def layer(base: Checked, name: str) -> Layer:
    """What a plan does with one unit. Raises UsageError for a name that is none."""
    plan, d = base.plan, base.plan.decisions
    costs = Costs(
        graph=plan.graph, cluster=base.cluster, workload=plan.workload,
        points=((d.micro_batch, d.cp),), compiled=d.compile,
    )  # fmt: skip
    paths = [link.path for link in costs.chain.links]
    if name not in paths:
        near = get_close_matches(name, paths, n=3) or paths[:1] + paths[-1:]
        raise UsageError(f"--layer {name}: {plan.graph.name} has no such unit",
                         hints=tuple(f"did you mean {path}?" for path in near))  # fmt: skip
    step = costs.step(d, read_assignments(costs, d, plan.sharding_by_unit))
    at = paths.index(name)
    stage = next(k for k, links in enumerate(stage_links(step, d.stages)) if at in links)
    row, level = step.row(at), levels_of(step, d).get(at, 0)
    problem = stage_problem(costs, step)
    s, rank = row.state, rank_of(d.schedule, d.pp, stage)
    again = row.again_ps[level - 1] if level else 0

    def way(other: int) -> Way:
        found = Way(level=LEVELS[other], kept_bytes=step.wide(row.kept[other]))
        if other == level:
            return replace(
                found, step_s=base.estimate.step_time_s,
                over_bytes=base.estimate.peak_memory_bytes - base.estimate.capacity_bytes,
            )  # fmt: skip
        if other and (d.schedule in SPLIT_BACKWARD or "activations" in dict(d.offload)):
            return replace(found, refused="not with this schedule or offload")
        pairs = list(d.recompute or ((0, 0),) * len(d.stages))
        pairs[stage] = _moved(pairs[stage], level, other)
        objective, memory, _ = evaluate(problem, d.stages, pairs)
        return replace(
            found, step_s=whole_step_ps(costs, objective) / 1e12,
            over_bytes=max(memory) - base.estimate.capacity_bytes,
        )  # fmt: skip

    placed = placements(plan.sharding_by_unit, plan.graph)
    return Layer(
        name=name, stage=stage, pp_rank=rank, level=LEVELS[level],
        forward_s=row.forward_ps / 1e12, backward_s=(row.backward_ps + again) / 1e12,
        state_bytes=s.parameter_bytes + s.gradient_bytes + s.optimizer_bytes,
        in_flight=max(map(max, problem.in_flight(rank))),
        placements=tuple(
            (key, word) for key, word in placed.items() if d.tp > 1 and key.startswith(f"{name}.")
        ),
        ways=tuple(map(way, range(len(LEVELS)))) if at in costs.chain.layers else (),
    )  # fmt: skip


def _moved(pair: Pair, old: int, new: int) -> Pair:
    """The stage's counts with one of its layers at another level."""
    counts = [0, pair[1], pair[0]]  # by level; what is not recomputed is not counted
    counts[old] -= 1
    counts[new] += 1
    return counts[2], counts[1]


def text(found: Layer) -> str:
    """The same at 80 columns."""
    lines = [
        f"{found.name}: stage {found.stage} on pp rank {found.pp_rank}, recompute {found.level}",
        f"  a micro-batch  forward {format_seconds(found.forward_s)}, backward "
        f"{format_seconds(found.backward_s)}; {found.in_flight} in flight at most",
        f"  state          {format_bytes(found.state_bytes)} of weights, gradients, optimizer",
    ]
    lines += [f"  {word:14} {name.removeprefix(found.name + '.')}"
              for name, word in found.placements]  # fmt: skip
    if found.ways:
        lines.append(f"  {'recompute':14} {'keeps':>9} {'step':>9}  with one layer of the stage so")
    for way in found.ways:
        over = (
            f"{format_bytes(way.over_bytes)} over a GPU: memory binds" if way.over_bytes > 0
            else f"{format_bytes(-way.over_bytes)} left"
        )  # fmt: skip
        now = " (now)" * (way.level == found.level)
        told = f"{'':>9}  {way.refused}" if way.refused else (
            f"{format_seconds(way.step_s):>9}  {over}"
        )
        lines.append(f"  {way.level + now:14} {format_bytes(way.kept_bytes):>9} {told}")
    return "\n".join(line[:80] for line in lines)


def document(found: Layer) -> dict[str, Any]:
    """The same with stable keys, base units."""
    return {
        "schema": "why/1",
        "layer": {
            "name": found.name, "stage": found.stage, "pp_rank": found.pp_rank,
            "recompute": found.level, "forward_s": found.forward_s,
            "backward_s": found.backward_s, "state_bytes": found.state_bytes,
            "in_flight": found.in_flight, "placements": dict(found.placements),
            "ways": [
                {"recompute": way.level, "kept_bytes": way.kept_bytes,
                 **({"refused": way.refused} if way.refused else
                    {"step_time_s": way.step_s, "over_bytes": way.over_bytes})}
                for way in found.ways
            ],
        },
    }  # fmt: skip
