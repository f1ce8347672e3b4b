"""A whole configuration, estimated: the one function that pins, search, show and check share."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cost_models.assumptions import assumptions_of, is_moe
from cost_models.decisions import Decisions, Workload
from cost_models.fleet import RULE, Fleet, Hardware, used_parts
from cost_models.ledger import BREAKDOWN, Estimate, RankLedger
from cost_models.mixed import MixedCosts, join, sides_of, together
from cost_models.rank_ledger import (
    executed_flop,
    exposed_send_ps,
    levels_of,
    mean_peak,
    moved_again_ps,
    moved_level,
    rank_collectives,
    stage_links,
    tail_parts,
    tier_uses,
)
from cost_models.rooms import rooms_of
from cost_models.schedule import SPLIT_BACKWARD
from cost_models.sharding import Sharding
from cost_models.shares import SharedCosts, kinds_of, side_by_side
from cost_models.stage_problem import (
    LEVELS,
    Extra,
    Pair,
    PairPin,
    StageProblem,
    evaluate,
    in_flight,
    stash_bytes,
    step_ps,
    tail_ps,
)
from cost_models.step import PARTS, Assignments, Costs, Row, Step, ps, replicated
from cost_models.words import assignment_of
from ir.graph import Graph

DTYPE_OF_PRECISION = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8",
                      "nvfp4": "nvfp4"}  # fmt: skip


def estimate(
    graph: Graph, hardware: Hardware, workload: Workload, decisions: Decisions,
    shardings: Mapping[str, Sharding],
) -> Estimate:  # fmt: skip
    """Predict a training step. shardings: by unit class name; none needed where tp = 1.

    Raises PlanError where placements contradict the graph, UsageError for a missing format.
    """
    return estimate_step(*costed(graph, hardware, workload, decisions, shardings), decisions)


def costed(
    graph: Graph, hardware: Hardware, workload: Workload, decisions: Decisions,
    shardings: Mapping[str, Sharding],
) -> tuple[Costs, Step]:  # fmt: skip
    """The costs of one mesh and its step. Raises as `estimate` does."""
    points = ((decisions.micro_batch, decisions.cp),)
    made = [
        Costs(graph=graph, cluster=part, workload=workload, points=points,
              compiled=decisions.compile)
        for part in used_parts(hardware, decisions)
    ]  # fmt: skip
    costs = jointly(hardware, made, decisions)
    return costs, costs.step(decisions, read_assignments(costs, decisions, shardings))


def jointly(hardware: Hardware, made: Sequence[Costs], decisions: Decisions) -> Costs:
    """The costs of a plan on these parts, those that it uses in the order of its ranks."""
    if decisions.shares and isinstance(hardware, Fleet):
        return side_by_side(hardware, made)
    return together(hardware, made)


def read_assignments(
    costs: Costs, decisions: Decisions, shardings: Mapping[str, Sharding]
) -> Assignments:
    """Every unit's assignment from a plan's words."""
    found: Assignments = {}
    for unit, is_layer, _ in costs.kinds:
        found[unit, is_layer] = (
            replicated(unit, 1)
            if decisions.tp == 1
            else assignment_of(
                unit, shardings.get(unit.name, Sharding()), decisions.tp,
                decisions.sequence_parallel,
            )
        )  # fmt: skip
    return found


# --- the stage problem of a step ---------------------------------------------------------------


def stage_problem(
    costs: Costs,
    step: Step,
    *,
    fixed_stages: tuple[int, ...] | None = None,
    fixed_recompute: tuple[PairPin, ...] | None = None,
    levels: tuple[str, ...] = LEVELS,
) -> StageProblem:
    """What the stage solver needs to know of a mesh; the pins are `StageProblem`'s."""
    def alone(costs: Costs, step: Step) -> StageProblem:
        return _alike(costs, step, fixed_stages, fixed_recompute, levels)

    if not isinstance(costs, MixedCosts):
        return alone(costs, step)
    steps = (replace(step, beside=()), *step.beside)
    return join(costs, step, [alone(c, s) for c, s in zip(costs.sides, steps)])


def _alike(
    costs: Costs, step: Step, fixed_stages: tuple[int, ...] | None,
    fixed_recompute: tuple[PairPin, ...] | None, levels: tuple[str, ...],
) -> StageProblem:  # fmt: skip
    """The problem where all ranks are of one kind."""
    d, wide = step.decisions, step.wide
    exposed = exposed_send_ps(costs, step, d)
    key = d.schedule in SPLIT_BACKWARD, moved_level(d, fixed_recompute), d.below is not None
    of, layers = costs.layered.get(key, (None, {}))
    if of is None or of.rows is not step.rows or of.kinds is not step.kinds:
        layers = _layers(costs, step, *key)
        costs.layered[key] = step, layers  # the next is often of another schedule of this mesh
    return StageProblem(
        schedule=d.schedule, pp=d.pp, virtual_stages=d.virtual_stages,
        microbatches=d.microbatches,
        constant_bytes=sum(size for _, size in step.reserved) + wide(step.glue.kept[0]),
        rank_glue_forward_ps=step.glue.forward_ps + exposed,
        rank_glue_backward_ps=step.glue.backward_ps + exposed,
        p2p_ps=step.p2p_ps - exposed, slow_sends=step.slow_sends,
        capacity_bytes=costs.cluster.device.memory_bytes,
        fixed_stages=fixed_stages, fixed_recompute=fixed_recompute, levels=levels, **layers,
    )  # fmt: skip


def _layers(costs: Costs, step: Step, split: bool, base: int, counted: bool) -> dict[str, Any]:
    """What of the problem is by layer, and its ends: alike for all schedules that split backward,
    or do not. base: `moved_level`. counted: layers with their state below have rows of their own.

    What stands between two layers goes with the first of them, and is never recomputed.
    """
    chain, wide = step.chain, step.wide
    groups, group_of = costs.groups_of(step.kinds) if counted else costs.layer_groups
    distinct = [[step.rows[k] for k in group] for group in groups]
    spread = operator.itemgetter(*group_of, group_of[-1])  # once more: of one layer a tuple too

    def each(value: Callable[[list[Row]], int]) -> tuple[int, ...]:
        """A number of every layer's links, computed once a kind."""
        found: tuple[int, ...] = spread([value(rows) for rows in distinct])[:-1]
        return found

    def total(value: Callable[[Row], int]) -> tuple[int, ...]:
        return each(lambda rows: sum(map(value, rows)))

    def held(level: int) -> tuple[int, ...]:
        return each(
            lambda rows: wide(rows[0].kept[level]) + sum(wide(r.kept[0]) for r in rows[1:])
        )

    def transient(level: int) -> tuple[int, ...]:
        return each(
            lambda rows: max(
                [wide(rows[0].working[level]), *(wide(r.working[0]) for r in rows[1:])]
            )
        )

    return {
        "forward_ps": total(lambda r: r.forward_ps + r.moved[base][0]),
        "input_grad_ps": total(
            lambda r: r.backward_ps - (r.weight_ps if split else 0) + r.moved[base][1]
        ),
        "weight_grad_ps": total(lambda r: r.weight_ps if split else 0),
        "recompute_ps": (
            each(lambda rows: rows[0].again_ps[1] + moved_again_ps(rows[0], base)),
            each(lambda rows: rows[0].again_ps[0]),
        ),
        "activation_bytes": (held(0), held(1), held(2)),
        "working_bytes": (transient(0), transient(1), transient(2)),
        "state_bytes": total(_state_bytes),
        "gathered_bytes": each(lambda rows: max(wide(r.state.gathered_bytes) for r in rows)),
        "tail_comm_ps": total(lambda r: r.tail_comm_ps),
        "tail_hide_ps": total(lambda r: r.tail_hide_ps), "tail_own_ps": total(_own_ps),
        "rooms": rooms_of(costs.cluster, step, each),
        "first": _extra(step, range(chain.layers[0]), split),
        "last": _extra(step, range(chain.layers[-1] + 1, len(chain.links)), split),
    }  # fmt: skip


def _state_bytes(row: Row) -> int:
    s = row.state
    return s.parameter_bytes + s.gradient_bytes + s.optimizer_bytes


def _own_ps(row: Row) -> int:
    return row.floor_ps + row.optimizer_ps + row.offload_ps


def _extra(step: Step, links: range, split: bool) -> Extra:
    """The links before the first layer, or behind the last, as one."""
    rows, wide = [step.row(i) for i in links], step.wide
    return Extra(
        forward_ps=sum(r.forward_ps for r in rows),
        input_grad_ps=sum(r.backward_ps - (r.weight_ps if split else 0) for r in rows),
        weight_grad_ps=sum(r.weight_ps for r in rows) if split else 0,
        activation_bytes=sum(wide(r.kept[0]) for r in rows),
        working_bytes=max((wide(r.working[0]) for r in rows), default=0),
        state_bytes=sum(map(_state_bytes, rows)),
        gathered_bytes=max((wide(r.state.gathered_bytes) for r in rows), default=0),
        tail_comm_ps=sum(r.tail_comm_ps for r in rows),
        tail_hide_ps=sum(r.tail_hide_ps for r in rows),
        tail_own_ps=sum(map(_own_ps, rows)),
    )


def step_overhead(costs: Costs) -> tuple[int, float]:
    """(host picoseconds a step, jitter as a share of the step): both for any mesh."""
    engine = costs.engine
    gpus = sum(one.cluster.count for one in kinds_of(costs))
    doublings = max(0.0, math.log2(gpus / engine.jitter_from_gpus))
    return ps(engine.step_host_s), engine.jitter_per_doubling * doublings


def whole_step_ps(costs: Costs, objective_ps: int) -> int:
    """The step with host overhead and jitter, from the stage problem's objective."""
    host, share = step_overhead(costs)
    return objective_ps + host + round(share * (objective_ps + host))


# --- the estimate ------------------------------------------------------------------------------


def estimate_step(costs: Costs, step: Step, d: Decisions) -> Estimate:
    """The estimate of one mesh with its stages and recomputation decided."""
    if isinstance(costs, SharedCosts):
        from cost_models.share_estimate import estimate_shares

        return estimate_shares(costs, step, d)
    return estimate_alike(costs, step, d)


def estimate_alike(costs: Costs, step: Step, d: Decisions) -> Estimate:
    """The same where all replicas are alike, or of those of one part."""
    problem = stage_problem(costs, step)
    objective, memory, _ = evaluate(problem, d.stages, d.pairs)
    total = whole_step_ps(costs, objective)
    sides = sides_of(costs, step)
    kinds = kinds_of(costs)
    breakdown = _breakdown(costs, sides, problem, d, objective, total)
    ranks = tuple(
        RankLedger(
            pp_rank=rank, parameters=_elements(one, problem, d, rank),
            in_flight=_in_flight(one, problem, d, rank)[0],
            memory_bytes=_memory(one, problem, d, rank, memory[rank]),
            collectives=rank_collectives(side, one, problem, d.at_pp_rank(rank), rank),
            capacity_bytes=side.cluster.device.memory_bytes if step.beside else None,
        )
        for rank, (side, one) in enumerate(sides)
    )  # fmt: skip
    model = 3 * sum(step.row(i).model_flop for i in range(len(step.chain.links)))
    dtype = DTYPE_OF_PRECISION[costs.workload.precision]
    capacities = [side.cluster.device.memory_bytes for side, _ in sides]
    left = [capacity - used for capacity, used in zip(capacities, memory)]
    return Estimate(
        step_time_ps=total, breakdown_ps=tuple(breakdown.items()),
        error=max(side.kernels.error(is_moe(step.chain)) for side in kinds),
        tokens=costs.workload.global_batch * costs.workload.seq_len, gpus=d.gpus,
        model_flop=model * d.microbatches * d.dp, executed_flop=executed_flop(sides, d, problem),
        peak_flop_per_s=mean_peak(sides, d, dtype),
        capacity_bytes=capacities[left.index(min(left))], ranks=ranks,
        assumptions=tuple(dict.fromkeys([
            *([RULE] if isinstance(costs, MixedCosts) and not costs.said else []),
            *(note for side in kinds for note in assumptions_of(side, d)),
        ])),
        tiers=tier_uses([(side.cluster, one) for side, one in sides], d, problem),
    )  # fmt: skip


def _rank_parts(step: Step, d: Decisions, problem: StageProblem, rank: int) -> dict[str, int]:
    """Busy picoseconds of a rank over the step, by part; recomputation apart."""
    links = stage_links(step, d.stages)
    levels, base = levels_of(step, d), moved_level(d)
    parts = dict.fromkeys((*PARTS, "recompute"), 0)
    for stage in problem.stages_of(rank):
        for row in (*(step.row(i) for i in links[stage]), step.glue):
            for name, f, b in zip(PARTS, row.forward, row.backward):
                parts[name] += f + b
        for i in links[stage]:
            row, level = step.row(i), levels.get(i, 0)
            parts["offload"] += sum(row.moved[base])
            if level:
                part = "offload" if level == 1 and d.moved is not None else "recompute"
                parts[part] += row.again_ps[level - 1]
            if level == 2:
                parts["offload"] += moved_again_ps(row, base)
    return {name: value * d.microbatches for name, value in parts.items()}


def _breakdown(
    costs: Costs, sides: Sequence[tuple[Costs, Step]], problem: StageProblem, d: Decisions,
    objective: int, total: int,
) -> dict[str, int]:
    """Exposed time of the busiest rank by name; what it waits for sends is pp_comm, the rest of
    its idle time bubble; the parts sum to the step."""
    by_rank = [_rank_parts(one, d, problem, r) for r, (_, one) in enumerate(sides)]
    busiest = max(range(d.pp), key=lambda r: (sum(by_rank[r].values()), -r))
    sent = 2 * d.microbatches * d.virtual_stages * exposed_send_ps(*sides[busiest], d)
    parts = by_rank[busiest]
    tails = [tail_parts(one, d, problem, r) for r, (_, one) in enumerate(sides)]
    slowest = max(range(d.pp), key=lambda r: (sum(tails[r]), -r))
    reduce, update, offload = tails[slowest]
    busy = sum(parts.values()) + sent
    makespan = objective - sum(tails[slowest])
    free = _no_latency_ps(problem, d) if d.pp > 1 else makespan
    host, _ = step_overhead(costs)
    found = dict.fromkeys(BREAKDOWN, 0)
    found |= parts
    found["dp_comm"] += reduce
    found["optimizer"] = update
    found["offload"] += offload
    late = max(0, min(makespan - free, makespan - busy))
    found["pp_comm"] = sent + late
    found["bubble"] = makespan - busy - late
    found["host"] += host
    found["jitter"] = total - objective - host
    return found


def _no_latency_ps(problem: StageProblem, d: Decisions) -> int:
    """The makespan if sends arrived at once."""
    at_once = replace(problem, p2p_ps=0, slow_sends=())  # ranks' own sends are not looked at
    return step_ps(at_once, d.stages, d.pairs) - tail_ps(at_once, d.stages)


def _elements(step: Step, problem: StageProblem, d: Decisions, rank: int) -> int:
    """Parameters of a rank before the data ranks share them."""
    links = stage_links(step, d.stages)
    states = [step.row(i).state for k in problem.stages_of(rank) for i in links[k]]
    return sum(s.elements for s in states)


def _in_flight(
    step: Step, problem: StageProblem, d: Decisions, rank: int
) -> tuple[tuple[int, ...], int]:
    """(micro-batches held by chunk, bytes of them) at a rank's activation peak."""
    links, levels = stage_links(step, d.stages), levels_of(step, d)
    grown = [
        sum(step.wide(step.row(i).kept[levels.get(i, 0)]) for i in links[k])
        for k in problem.stages_of(rank)
    ]
    counts = max(
        in_flight(d.schedule, d.pp, d.microbatches, d.virtual_stages, rank),
        key=lambda c: (sum(x * y for x, y in zip(c, grown)), c),
    )
    most = stash_bytes(problem, rank, grown)
    assert sum(x * y for x, y in zip(counts, grown)) == most
    return counts, most


def _memory(
    step: Step, problem: StageProblem, d: Decisions, rank: int, peak: int
) -> tuple[tuple[str, int], ...]:
    """A rank's peak by name, before and after what the allocator adds; sums to the peak."""
    links, levels = stage_links(step, d.stages), levels_of(step, d)
    mine = [links[k] for k in problem.stages_of(rank)]
    rows = [step.row(i) for group in mine for i in group]

    def level(i: int) -> int:
        return levels.get(i, 0)

    held = [
        [sum(step.row(i).kept[level(i)] for i in g if not step.row(i).is_loss) for g in mine],
        [sum(step.row(i).kept[level(i)] for i in g if step.row(i).is_loss) for g in mine],
    ]
    counts, _ = _in_flight(step, problem, d, rank)
    working = max(
        ((step.row(i).working[level(i)], step.row(i).is_loss) for g in mine for i in g),
        default=(0, False),
    )
    reserved = dict(step.reserved)
    found = {
        "parameters": sum(r.state.parameter_bytes for r in rows),
        "gradients": sum(r.state.gradient_bytes for r in rows),
        "optimizer": sum(r.state.optimizer_bytes for r in rows),
        "activations": sum(c * h for c, h in zip(counts, held[0])) + step.glue.kept[0],
        "gathered": 2 * max(r.state.gathered_bytes for r in rows),
        "logits": sum(c * h for c, h in zip(counts, held[1])) + (working[0] if working[1] else 0),
        "workspace": reserved["workspace"] + (0 if working[1] else working[0]),
        "comm_buffers": reserved["comm_buffers"],
        "context": reserved["context"],
    }
    return (*found.items(), ("fragmentation", peak - sum(found.values())))


__all__ = ["Pair", "estimate", "estimate_step", "stage_problem", "whole_step_ps"]
