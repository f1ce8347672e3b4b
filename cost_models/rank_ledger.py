"""What each pp rank runs of a step, and every collective it takes part in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from cost_models.borders import messages, values_between
from cost_models.chain import divide
from cost_models.collectives import collective_s
from cost_models.decisions import Decisions
from cost_models.hardware import Cluster
from cost_models.ledger import Collective
from cost_models.stage_problem import PairPin, StageProblem, slow_of, starts_of, stash_bytes
from cost_models.state import State, mode_of, ranks_of, replica_sums
from cost_models.step import Costs, Row, Step
from cost_models.tiers import TierUse, fullest
from ir.graph import full_name


def stage_links(step: Step, stages: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Positions in the chain of what each global stage runs."""
    return divide(step.chain, stages)


def levels_of(step: Step, d: Decisions) -> dict[int, int]:
    """Level of each link: 0 none, 1 selective (or offloaded, where that is counted), 2 full."""
    levels = {}
    layers = step.chain.layers
    for start, count, (full, some) in zip(starts_of(d.stages), d.stages, d.pairs):
        for place in range(count):
            levels[layers[start + place]] = 2 if place < full else 1 if place < full + some else 0
    return levels


def tier_uses(
    sides: Sequence[tuple[Cluster, Step]], d: Decisions, problem: StageProblem
) -> tuple[TierUse, ...]:
    """What lies on each tier below the device, of a plan whose stages are decided: the state, and
    activations of the micro-batches in flight. sides: of each pp rank; a part has tiers of its
    own."""
    found: list[TierUse] = []
    for part in dict.fromkeys(cluster.name for cluster, _ in sides if d.offload):
        mine = [step if cluster.name == part else None for cluster, step in sides]
        cluster = next(cluster for cluster, _ in sides if cluster.name == part)
        found += _tiers_of(cluster, mine, d, problem)
    return tuple(found)


def _tiers_of(
    cluster: Cluster, steps: Sequence[Step | None], d: Decisions, problem: StageProblem
) -> Iterator[TierUse]:
    for name, rank_bytes in laid_by_rank(steps, d, problem).items():
        tier = cluster.tier(name)
        gpus = cluster.sharers(tier)
        if d.tp_by_part:  # the part's ranks alone, whose stages are alike
            own = d.alone(cluster.name)
            used = fullest(own, [n for n, one in zip(rank_bytes, steps) if one], gpus)
        else:
            used = fullest(d, rank_bytes, gpus)
        yield TierUse(name=name, used_bytes=used, bytes=tier.bytes, gpus=gpus)


def laid_by_rank(
    steps: Sequence[Step | None], d: Decisions, problem: StageProblem
) -> dict[str, list[int]]:
    """By tier the bytes that a GPU of each pp rank lays there, of those that have a step."""
    by_rank: dict[str, list[int]] = {name: [0] * d.pp for name in d.tiers.values()}
    for rank, step in enumerate(steps):
        if step is None:
            continue
        links, levels = stage_links(step, d.stages), levels_of(step, d)
        stages = problem.stages_of(rank)
        for i in (i for k in stages for i in links[k]):
            for name, size in step.row(i).below:
                by_rank.setdefault(name, [0] * d.pp)[rank] += size
        aside = [sum(step.row(i).aside[levels.get(i, 0)] for i in links[k]) for k in stages]
        if any(aside):
            by_rank[d.tiers["activations"]][rank] += stash_bytes(problem, rank, aside)
    return by_rank


def moved_level(d: Decisions, fixed: tuple[PairPin, ...] | None = None) -> int:
    """The level whose copies every layer's time has in it: full where all layers are computed
    again, else none. fixed: a pin of (full, selective), negative for all, of stages to be cut."""
    if d.recompute:
        return 2 * all(full >= count for (full, _), count in zip(d.recompute, d.stages))
    return 2 * bool(fixed and all(full is not None and full < 0 for full, _ in fixed))


def moved_again_ps(row: Row, base: int) -> int:
    """What copies add to a layer that is computed again, where others' are not; they keep less,
    which is not taken off: no time is negative."""
    return max(0, sum(row.moved[2]) - sum(row.moved[base]))


def exposed_send_ps(costs: Costs, step: Step, d: Decisions) -> int:
    """What a send takes from a stage's own time, each way; the rest is latency."""
    engine = costs.engine
    share = engine.p2p_exposed if d.virtual_stages == 1 else engine.p2p_exposed_interleaved
    return round(step.p2p_ps * share)


def tail_parts(
    step: Step, d: Decisions, problem: StageProblem, rank: int
) -> tuple[int, int, int]:
    """(exposed reduction, optimizer, offload) of a rank after its last backward."""
    links = stage_links(step, d.stages)
    rows = [step.row(i) for k in problem.stages_of(rank) for i in links[k]]
    comm = sum(r.tail_comm_ps - r.tail_hide_ps for r in rows)
    return (
        max(0, comm) + sum(r.floor_ps for r in rows),
        sum(r.optimizer_ps for r in rows),
        sum(r.offload_ps for r in rows),
    )


def mean_peak(sides: Sequence[tuple[Costs, Step]], d: Decisions, dtype: str) -> float:
    """FLOP/s of the mean GPU."""
    peaks = [side.cluster.device.peak(dtype) for side, _ in sides]
    return fmean(peaks, d.tp_of_rank) if d.tp_by_part else fmean(peaks)


def executed_flop(
    sides: Sequence[tuple[Costs, Step]], d: Decisions, problem: StageProblem
) -> int:
    """FLOPs that all devices run in a step, recomputation included."""
    total, tps = 0, d.tp_of_rank
    for rank, (_, step) in enumerate(sides):
        links, levels = stage_links(step, d.stages), levels_of(step, d)
        for i in (i for k in problem.stages_of(rank) for i in links[k]):
            forward, backward = step.row(i).flop
            total += (forward + backward + (forward if levels.get(i) == 2 else 0)) * tps[rank]
    return total * d.cp * d.dp * d.microbatches


def rank_collectives(
    costs: Costs, step: Step, problem: StageProblem, d: Decisions, rank: int
) -> tuple[Collective, ...]:
    """What a rank sends in a step, rows of the same place and size added up.

    Groups that replicate a shard (HSDP) all-reduce theirs as often as it is reduced.
    """
    links, levels = stage_links(step, d.stages), levels_of(step, d)
    at = costs.point(d)
    rows: dict[tuple[str, str, int, str], list[float]] = {}

    def add(kind: str, axis: str, size: int, where: str, count: int, s: float, x: float) -> None:
        row = rows.setdefault((kind, axis, size, where), [0, 0.0, 0.0])
        row[0], row[1], row[2] = row[0] + count, row[1] + s, row[2] + x

    share = _exposed_share(costs, step, problem, d, rank)
    for i in (i for k in problem.stages_of(rank) for i in links[k]):
        row, unit = step.row(i), step.chain.links[i].unit
        for t in row.traffic:
            again = levels.get(i) == 2 and t.again and not t.backward
            repeats = d.microbatches * (2 if again else 1)
            if not t.count[at]:
                continue
            seconds = float(t.seconds[at])
            add(t.kind, t.axis, int(t.size_bytes[at]), f"{unit.name}:{t.where}",
                int(t.count[at]) * repeats, seconds * repeats,
                (seconds - float(t.hidden_s[at])) * repeats)  # fmt: skip
        for size, times in costs.summed(d, row.state):
            took = times * float(collective_s(costs.network, "all_reduce", size, d.tp, 1))
            add("all_reduce", "tp", size, f"{unit.name} gradients", times, took, took)
        parts: tuple[tuple[State, bool], ...] = ((row.state, False),)
        if d.ep * d.etp * d.tp > 1:  # else the same ranks share both, in one collective
            parts = (replace(row.state, expert=0), False), (replace(row.state, dense=0), True)
        for part, expert in parts:
            ranks, elements = ranks_of(d, expert), part.dense + part.expert
            over = {
                "all_gather": ranks.shard, "reduce_scatter": ranks.shard,
                "all_reduce_replicas": ranks.replicas, "all_reduce": ranks.shard * ranks.replicas,
            }  # fmt: skip
            for kind, times, item in _repeats(costs, d):
                if over[kind] > 1 and times and elements:
                    one = costs.transfers(d, part, kind, item)
                    held = ranks.shard if kind == "all_reduce_replicas" else 1
                    size = -(-elements // held) * item
                    add(kind.removesuffix("_replicas"), "edp" if expert else "dp", size,
                        f"{unit.name} parameters", times, one * times,
                        share * one * times)  # fmt: skip
    if d.pp > 1:
        crossed = [
            min(k, other) for k in problem.stages_of(rank) for other in (k - 1, k + 1)
            if 0 <= other < problem.count and problem.rank_of(other) != rank
        ]  # fmt: skip
        slow = slow_of(problem)
        took = problem.p2p_ps + exposed_send_ps(costs, step, d)
        for k in [k for k in crossed if d.tp_by_part and len({*d.tp_of_rank[k : k + 2]}) > 1]:
            crossed.remove(k)
            for piece, sent, part_of in _over_border(costs, step.decisions, rank, k):
                portion = d.microbatches * part_of / 1e12
                add("p2p", "pp", piece, "between stages", d.microbatches * sent,
                    portion * (took + (slow[k][0] if slow else 0)),
                    portion * exposed_send_ps(costs, step, d))  # fmt: skip
        times = d.microbatches * len(crossed)
        later = d.microbatches * sum(slow[k][0] for k in crossed) if slow else 0
        for size in step.p2p_bytes if crossed else ():
            each = size / sum(step.p2p_bytes) / 1e12
            portion = times * size / sum(step.p2p_bytes) / 1e12
            add("p2p", "pp", size, "between stages", times, portion * took + later * each,
                portion * exposed_send_ps(costs, step, d))  # fmt: skip
        for size, others in _shared(costs, step, problem, d, rank):
            one = costs.send_s(d, size, back=True)
            add("p2p", "pp", size, "tied gradients", others, others * one, others * one)
    return tuple(
        Collective(
            kind=kind, axis=axis, size_bytes=size, count=int(count), where=where, total_s=s,
            exposed_s=x,
        )
        for (kind, axis, size, where), (count, s, x) in rows.items()
    )  # fmt: skip


def _over_border(
    costs: Costs, d: Decisions, rank: int, boundary: int
) -> Iterator[tuple[int, int, float]]:
    """(bytes of a message, messages of a micro-batch, share of all bytes) of each value that the
    busiest GPU of a pp rank sends to a stage with another tp."""
    tps, values = d.tp_of_rank, values_between(costs.chain, d, costs.workload.seq_len)
    whole = sum(size for size, _ in values)
    for size, split in values:
        other = tps[boundary + (boundary == rank)]
        yield *messages(tps[rank], other, size, split), size / whole


def _shared(
    costs: Costs, step: Step, problem: StageProblem, d: Decisions, rank: int
) -> list[tuple[int, int]]:
    """(gradient bytes, other ranks) of each tied parameter of which this rank has a copy."""
    owners, found = dict(costs.graph.tied), {}
    holders: dict[str, list[int]] = {}
    for stage, positions in enumerate(stage_links(step, d.stages)):
        for i in positions:
            link, sizes = step.chain.links[i], dict(step.row(i).copied)
            for p in link.unit.parameters:
                full = full_name(link.path, p.name)
                full = owners.get(full, full)
                holders.setdefault(full, []).append(problem.rank_of(stage))
                if p.name in sizes:
                    found[full] = sizes[p.name]
    ranks = {full: set(holders[full]) for full in found}
    return [(size, len(ranks[full]) - 1) for full, size in found.items()
            if rank in ranks[full] and len(ranks[full]) > 1]  # fmt: skip


def _repeats(costs: Costs, d: Decisions) -> tuple[tuple[str, int, int], ...]:
    """(kind, times a step, bytes an element) of what moves for a unit's parameters."""
    mode, (compute, grad) = mode_of(d, costs.engine), costs.formats(d)
    gathers = mode.gather_per_microbatch * d.microbatches + mode.gather_per_step
    reduces = mode.reduce_per_microbatch * d.microbatches + mode.reduce_per_step
    each, once = replica_sums(mode, d)
    return (
        ("all_gather", gathers, compute), ("reduce_scatter", reduces, grad),
        ("all_reduce_replicas", each * d.microbatches + once, grad),
        ("all_reduce", mode.all_reduce_per_step, grad),
    )  # fmt: skip


def _exposed_share(
    costs: Costs, step: Step, problem: StageProblem, d: Decisions, rank: int
) -> float:
    """The share of a rank's data-parallel traffic that the step waits for: known for the rank as
    a whole, and said of each of its collectives alike."""
    links = stage_links(step, d.stages)
    total, waited = 0.0, tail_parts(step, d, problem, rank)[0] / 1e12
    for row in (step.row(i) for k in problem.stages_of(rank) for i in links[k]):
        waited += d.microbatches * (row.forward[-1] + row.backward[-1]) / 1e12
        waited -= costs.summed_s(d, row.state)  # a row of its own
        total += sum(
            times * costs.transfers(d, row.state, kind, item)
            for kind, times, item in _repeats(costs, d) if times
        )
    return max(0.0, min(1.0, waited / total)) if total else 0.0
