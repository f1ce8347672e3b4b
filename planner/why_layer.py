"""`plan why --layer NAME`: where a unit runs, what it takes and holds, and what its other ways to
recompute would do to the step and to the memory of its rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

from cost_models.decisions import Decisions
from cost_models.estimate import costed, stage_problem, whole_step_ps
from cost_models.mixed import sides_of
from cost_models.rank_ledger import levels_of, stage_links
from cost_models.schedule import SPLIT_BACKWARD, rank_of
from cost_models.shares import SharedCosts, joined_ps
from cost_models.stage_problem import LEVELS, Pair, evaluate
from cost_models.step import Costs, Step
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
    or full. ways: empty where a unit is never recomputed. part: that it lies on, where the hardware
    has parts."""

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
    part: str = ""


def layers(base: Checked, name: str) -> tuple[Layer, ...]:
    """What a plan does with one unit: on each part of the hardware that has replicas of its own, or
    where it lies. Raises UsageError for a name that is none."""
    plan, d = base.plan, base.plan.decisions
    costs, step = costed(plan.graph, base.hardware, plan.workload, d, plan.sharding_by_unit)
    paths = [link.path for link in costs.chain.links]
    if name not in paths:
        near = get_close_matches(name, paths, n=3) or paths[:1] + paths[-1:]
        raise UsageError(f"--layer {name}: {plan.graph.name} has no such unit",
                         hints=tuple(f"did you mean {path}?" for path in near))  # fmt: skip
    at = paths.index(name)
    if not isinstance(costs, SharedCosts):
        stage = next(k for k, links in enumerate(stage_links(step, d.stages)) if at in links)
        rank = rank_of(d.schedule, d.pp, stage)
        side, own = sides_of(costs, step)[rank]
        problem = stage_problem(costs, step)
        room = [one.cluster.device.memory_bytes for one, _ in sides_of(costs, step)]

        def asked(pairs: Sequence[Pair]) -> tuple[int, int]:
            objective, memory, _ = evaluate(problem, d.stages, pairs)
            over = max(used - most for used, most in zip(memory, room))
            return whole_step_ps(costs, objective), over

        part = "" if not d.parts else side.cluster.name
        return (_layer(base, side, own, d, at, stage, part, asked),)
    steps = (replace(step, beside=()), *step.beside)
    problems = [stage_problem(one, own) for one, own in zip(costs.sides, steps)]
    room = [one.cluster.device.memory_bytes for one in costs.sides]

    def side_by_side(i: int, pairs: Sequence[Pair]) -> tuple[int, int]:
        mine = replace(steps[i].decisions, recompute=tuple(pairs))
        others = [*steps[:i], replace(steps[i], decisions=mine), *steps[i + 1 :]]
        held = [evaluate(p, o.decisions.stages, o.decisions.pairs)[1]
                for p, o in zip(problems, others)]  # fmt: skip
        objective, _ = joined_ps(problems, others)
        over = max(max(memory) - most for memory, most in zip(held, room))
        return whole_step_ps(costs, objective), over

    return tuple(
        _layer(base, side, own, own.decisions, at, 0, side.cluster.name, partial(side_by_side, i))
        for i, (side, own) in enumerate(zip(costs.sides, steps))
    )


def _layer(
    base: Checked, costs: Costs, step: Step, d: Decisions, at: int, stage: int, part: str,
    asked: Callable[[Sequence[Pair]], tuple[int, int]],
) -> Layer:  # fmt: skip
    """A unit, link `at`, on the ranks that these costs and this step are of. asked: of other counts
    of recomputation by stage the whole step, and the fullest rank's bytes less its GPU's."""
    plan, path = base.plan, costs.chain.links[at].path
    row, level = step.row(at), levels_of(step, d).get(at, 0)
    problem = stage_problem(costs, step)
    s, rank = row.state, rank_of(d.schedule, d.pp, stage)
    again = row.again_ps[level - 1] if level else 0

    def way(other: int) -> Way:
        found = Way(level=LEVELS[other], kept_bytes=step.wide(row.kept[other]))
        e = base.estimate
        if other == level:
            left = e.peak_memory_bytes - e.capacity_of(e.fullest)
            return replace(found, step_s=e.step_time_s, over_bytes=left)
        if other and (d.schedule in SPLIT_BACKWARD or "activations" in dict(d.offload)):
            return replace(found, refused="not with this schedule or offload")
        pairs = list(d.recompute or ((0, 0),) * len(d.stages))
        pairs[stage] = _moved(pairs[stage], level, other)
        step_ps, over = asked(pairs)
        return replace(found, step_s=step_ps / 1e12, over_bytes=over)

    placed = placements(plan.sharding_by_unit, plan.graph)
    return Layer(
        name=path, part=part, stage=stage, pp_rank=rank, level=LEVELS[level],
        forward_s=row.forward_ps / 1e12, backward_s=(row.backward_ps + again) / 1e12,
        state_bytes=s.parameter_bytes + s.gradient_bytes + s.optimizer_bytes,
        in_flight=max(map(max, problem.in_flight(rank))),
        placements=tuple(
            (key, word) for key, word in placed.items() if d.tp > 1 and key.startswith(f"{path}.")
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
    of = f" of {found.part}" * bool(found.part)
    lines = [
        f"{found.name}: stage {found.stage} on pp rank {found.pp_rank}{of}, recompute"
        f" {found.level}",
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


def document(found: Sequence[Layer]) -> dict[str, Any]:
    """The same with stable keys, base units. `others`: the unit on the other parts that have
    replicas of their own."""
    first, *others = map(_layer_json, found)
    return {"schema": "why/1", "layer": first, **({"others": others} if others else {})}


def _layer_json(found: Layer) -> dict[str, Any]:
    return {
        "name": found.name, **({"part": found.part} if found.part else {}),
        "stage": found.stage, "pp_rank": found.pp_rank,
        "recompute": found.level, "forward_s": found.forward_s,
        "backward_s": found.backward_s, "state_bytes": found.state_bytes,
        "in_flight": found.in_flight, "placements": dict(found.placements),
        "ways": [
            {"recompute": way.level, "kept_bytes": way.kept_bytes,
             **({"refused": way.refused} if way.refused else
                {"step_time_s": way.step_s, "over_bytes": way.over_bytes})}
            for way in found.ways
        ],
    }  # fmt: skip
