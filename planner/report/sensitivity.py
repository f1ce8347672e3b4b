"""Sensitivity: what of the inputs would change the decision, and what it does to the step.

The plan and its rivals (the best plan without each of its decisions, and the best one with more
memory) are costed again with one input scaled; the decision flips where a rival is ordered before
the plan. So a flip is of these plans: a search with the input changed may find one nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from cost_models.decisions import Decisions, Workload
from cost_models.estimate import jointly, read_assignments, stage_problem, whole_step_ps
from cost_models.fleet import Fleet, Hardware, parts_of, used_parts
from cost_models.hardware import Cluster
from cost_models.mixed import sides_of
from cost_models.shares import SharedCosts, joined_ps
from cost_models.stage_problem import evaluate
from cost_models.step import Assignments, Costs
from ir.graph import Graph
from planner.check import Checked
from planner.legality import illegal, inconsistent
from planner.score import score_of
from planner.why import MOST_MEMORY, Alternative, Why

FACTORS = (1 / 4, 1 / 2, 2.0, 4.0)  # times an input: as far as hardware on offer differs
SHOWN = (1 / 2, 2.0)  # of the chosen plan, in the chart
IMBALANCE = (1.25, 1.5, 2.0, 3.0)  # busiest expert rank over the mean
HALVINGS = 5  # of the range in which a decision flips, each half of its logarithm

Of = Callable[[Cluster, Workload, float], tuple[Cluster, Workload]]
Scaled = Callable[[Hardware, Workload, float], tuple[Hardware, Workload]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan that is costed again."""

    decisions: Decisions
    assignments: Assignments = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """The input at which another plan comes first. times: the input's own value."""

    times: float
    decisions: Decisions
    change: float  # of the step, the other plan's against the chosen one's, there


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One input: what the chosen plan's step becomes, relative, at each of `SHOWN` (or of
    `IMBALANCE`), which rival comes first there, if one does, and where it flips."""

    name: str
    changes: tuple[tuple[float, float], ...]
    flips: tuple[Flip, ...]
    firsts: tuple[Flip | None, ...] = ()  # as `changes` has them


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Another micro-batch for the chosen plan: its step, relative, and whether it fits; or the
    reason that it is not legal."""

    micro_batch: int
    change: float = 0.0
    over_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory of a GPU at which the decision changes: less than needs_bytes and the plan does not
    fit, and `instead` comes first (with its change of the step); with more_bytes `more` fits, and
    comes before the plan. part: whose GPUs, where the hardware has parts."""

    needs_bytes: int
    capacity_bytes: int
    instead: Decisions | None = None
    instead_change: float = 0.0
    more_bytes: int = 0
    more: Decisions | None = None
    more_change: float = 0.0
    part: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """rivals: how many plans the chosen one is held against; ahead: of them, those that come
    before it as it is (a plan that was pinned); rooms: one, or one of each part that is used."""

    rivals: int
    ahead: int
    effects: tuple[Effect, ...]
    batches: tuple[Batch, ...]
    rooms: tuple[Room, ...]


def sensitivity(
    checked: Checked, why: Why, rows: Sequence[Alternative], effort: int
) -> Sensitivity:
    """Ask about every input that the plan's hardware and model have. effort: of the one search,
    for what more memory would allow."""
    table = _Table(checked)
    found = {
        row.decisions: Candidate(decisions=row.decisions, assignments=row.assignments)
        for row in rows if row.decisions not in (None, table.chosen.decisions)
    }  # fmt: skip
    rivals = list(found.values())
    own = table.cost(table.hardware, table.workload, [table.chosen, *rivals])
    fit = [c for c, made in zip(rivals, own[1:]) if made.over_bytes <= 0]
    ahead = [c for c, made in zip(rivals, own[1:]) if made.score < own[0].score]
    asked = [c for c in fit if c not in ahead]

    def freed(part: str) -> Candidate | None:
        """The best plan with more memory on a part, if it is none of these."""
        answer = why.roomier(effort, part)
        best = answer.outcome.best if answer else None
        if best is None or best.decisions in (table.chosen.decisions, *found):
            return None
        return Candidate(decisions=best.decisions, assignments=best.assignments)

    return Sensitivity(
        rivals=len(rivals), ahead=len(ahead),
        effects=tuple(_effect(table, name, scaled, factors, asked)
                      for name, scaled, factors in _inputs(table)),
        batches=tuple(_batches(table, own[0])),
        rooms=tuple(_room(table, own, rivals, part, freed(part)) for part in table.parts),
    )  # fmt: skip


# --- costing again -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What a candidate comes to. peaks: bytes of the fullest rank of each part, "" where the
    hardware has none. over_bytes: of the rank that is most over its GPU's memory."""

    step_ps: int
    score: int
    peaks: dict[str, int]
    over_bytes: int

    def peak(self, part: str) -> int:
        """Of a part that is not used it is nothing."""
        return self.peaks.get(part, 0)


class _Table:
    """The chosen plan, and how it and others are costed under other inputs."""

    def __init__(self, checked: Checked) -> None:
        plan = checked.plan
        self.graph: Graph = plan.graph
        self.gain_ppm = plan.solver.axis_gain_ppm
        self.hardware, self.workload = checked.hardware, plan.workload
        d = plan.decisions
        used = used_parts(self.hardware, d)
        several = isinstance(self.hardware, Fleet)
        self.parts = tuple(part.name if several else "" for part in used)
        costs = self._costs(used[0], self.workload, [d], d.compile)
        read = read_assignments(costs, d, plan.sharding_by_unit)
        self.chosen = Candidate(decisions=d, assignments=read)

    def _costs(
        self, cluster: Cluster, workload: Workload, made: Iterable[Decisions], compiled: bool
    ) -> Costs:
        points = tuple(dict.fromkeys((d.micro_batch, d.cp) for d in made))
        return Costs(graph=self.graph, cluster=cluster, workload=workload, points=points,
                     compiled=compiled)  # fmt: skip

    def cost(
        self, hardware: Hardware, workload: Workload, candidates: Sequence[Candidate]
    ) -> list[_Made]:
        """Each candidate's step under these inputs; what they share is costed once."""
        known: dict[tuple[str, bool], Costs] = {}
        found = []
        for c in candidates:
            d = c.decisions
            for part in used_parts(hardware, d):
                if (part.name, d.compile) not in known:
                    alike = [x.decisions for x in candidates if x.decisions.compile == d.compile]
                    made = self._costs(part, workload, alike, d.compile)
                    known[part.name, d.compile] = made
            parts = [known[part.name, d.compile] for part in used_parts(hardware, d)]
            costs = jointly(hardware, parts, d)
            found.append(_made(costs, c, isinstance(hardware, Fleet), self.gain_ppm))
        return found


def _made(costs: Costs, c: Candidate, several: bool, gain_ppm: int) -> _Made:
    """several: whether the hardware has parts. gain_ppm: what an axis must earn."""
    d, step = c.decisions, costs.step(c.decisions, c.assignments)
    if isinstance(costs, SharedCosts):
        steps = (replace(step, beside=()), *step.beside)
        problems = [stage_problem(side, one) for side, one in zip(costs.sides, steps)]
        objective, _ = joined_ps(problems, steps)
        rows = [
            (side.cluster, max(evaluate(p, one.decisions.stages, one.decisions.pairs)[1]))
            for side, one, p in zip(costs.sides, steps, problems)
        ]  # fmt: skip
    else:
        objective, memory, _ = evaluate(stage_problem(costs, step), d.stages, d.pairs)
        rows = [(side.cluster, used) for (side, _), used in zip(sides_of(costs, step), memory)]
    peaks: dict[str, int] = {}
    for cluster, used in rows:
        name = cluster.name if several else ""
        peaks[name] = max(used, peaks.get(name, 0))
    whole = whole_step_ps(costs, objective)
    over = max(used - cluster.device.memory_bytes for cluster, used in rows)
    return _Made(step_ps=whole, score=score_of(whole, d, gain_ppm), peaks=peaks, over_bytes=over)


# --- inputs ------------------------------------------------------------------------------------


def _inputs(table: _Table) -> Iterator[tuple[str, Scaled, tuple[float, ...]]]:
    """(name, how it is scaled, by what) of every input that the plan can feel: of hardware of
    several kinds the networks together, and what is each part's own."""
    parts = parts_of(table.hardware)
    if len(parts) > 1 or parts[0].domain_ranks < parts[0].count:
        yield "network bandwidth", partial(_of_parts, _network, ""), FACTORS
    for part in parts:
        name, of = (f" of {part.name}", part.name) if len(parts) > 1 else ("", "")
        if part.domain_ranks > 1:
            yield f"{part.intra.name} bandwidth{name}", partial(_of_parts, _intra, of), FACTORS
        yield f"memory bandwidth{name}", partial(_of_parts, _memory, of), FACTORS
        yield f"arithmetic rate{name}", partial(_of_parts, _peak, of), FACTORS
    if table.chosen.decisions.offload:
        yield "host link bandwidth", partial(_of_parts, _host, ""), FACTORS
    if any(n.op == "grouped_matmul" for u in table.graph.units for n in u.nodes):
        yield "expert imbalance", _imbalance, IMBALANCE


def _of_parts(
    scaled: Of, name: str, hardware: Hardware, w: Workload, times: float
) -> tuple[Hardware, Workload]:
    """name: of the part that is scaled; "" is each, and with networks what joins them."""
    if not isinstance(hardware, Fleet):
        return scaled(hardware, w, times)
    parts = tuple(
        scaled(part, w, times)[0] if name in ("", part.name) else part for part in hardware.parts
    )
    link = hardware.between
    if link is not None and scaled is _network:
        link = replace(link, bytes_per_s=times * link.bytes_per_s)
    return replace(hardware, parts=parts, between=link), w


def _network(c: Cluster, w: Workload, times: float) -> tuple[Cluster, Workload]:
    inter = replace(c.inter, bytes_per_s=times * c.inter.bytes_per_s)
    levels = tuple(replace(one, bytes_per_s=times * one.bytes_per_s) for one in c.levels)
    return replace(c, inter=inter, levels=levels), w


def _intra(c: Cluster, w: Workload, times: float) -> tuple[Cluster, Workload]:
    return replace(c, intra=replace(c.intra, bytes_per_s=times * c.intra.bytes_per_s)), w


def _memory(c: Cluster, w: Workload, times: float) -> tuple[Cluster, Workload]:
    rate = times * c.device.memory_bandwidth_bytes_per_s
    return replace(c, device=replace(c.device, memory_bandwidth_bytes_per_s=rate)), w


def _peak(c: Cluster, w: Workload, times: float) -> tuple[Cluster, Workload]:
    peaks = tuple((name, times * rate) for name, rate in c.device.peak_flop_per_s)
    return replace(c, device=replace(c.device, peak_flop_per_s=peaks)), w


def _host(c: Cluster, w: Workload, times: float) -> tuple[Cluster, Workload]:
    rate = times * c.device.host_link_bytes_per_s
    return replace(c, device=replace(c.device, host_link_bytes_per_s=rate)), w


def _imbalance(c: Hardware, w: Workload, times: float) -> tuple[Hardware, Workload]:
    """times: the imbalance itself, which is 1 where all experts have as much."""
    return c, replace(w, expert_imbalance=max(times, 1.0))


def _effect(
    table: _Table, name: str, scaled: Scaled, factors: tuple[float, ...],
    rivals: Sequence[Candidate],
) -> Effect:  # fmt: skip
    """What an input does to the chosen plan, and the nearest value each way at which another is
    first."""
    own = 1.0 if scaled is not _imbalance else table.workload.expert_imbalance
    asked = [f for f in factors if scaled is not _imbalance or f > own]
    both = [table.chosen, *rivals]
    known = {f: table.cost(*scaled(table.hardware, table.workload, f), both) for f in asked}
    base = table.cost(table.hardware, table.workload, both[:1])[0].step_ps
    changes = tuple((f, known[f][0].step_ps / base - 1) for f in asked
                    if f in SHOWN or scaled is _imbalance)  # fmt: skip
    firsts = tuple(_flip(f, both, known[f]) if _first(known[f]) else None for f, _ in changes)
    flips = []
    below, above = [f for f in asked if f < own][::-1], [f for f in asked if f > own]
    for side in (below, above):
        last = own
        for factor in side:
            first = _first(known[factor])
            if first:
                flips.append(_narrowed(table, scaled, both, last, factor))
                break
            last = factor
    return Effect(name=name, changes=changes, flips=tuple(flips), firsts=firsts)


def _first(made: Sequence[_Made]) -> int:
    """Which candidate comes first; the chosen one is number 0 and wins a tie."""
    return min(range(len(made)), key=lambda i: (made[i].score, i))


def _narrowed(
    table: _Table, scaled: Scaled, both: Sequence[Candidate], still: float, flipped: float
) -> Flip:
    """The flip between a value where the chosen plan is first and one where it is not."""
    made = table.cost(*scaled(table.hardware, table.workload, flipped), both)
    for _ in range(HALVINGS):
        middle = (still * flipped) ** 0.5
        there = table.cost(*scaled(table.hardware, table.workload, middle), both)
        if _first(there):
            flipped, made = middle, there
        else:
            still = middle
    return _flip(flipped, both, made)


def _flip(times: float, both: Sequence[Candidate], made: Sequence[_Made]) -> Flip:
    """What comes first at a value."""
    first = _first(made)
    return Flip(times=times, decisions=both[first].decisions,
                change=made[first].step_ps / made[0].step_ps - 1)  # fmt: skip


def _batches(table: _Table, own: _Made) -> Iterator[Batch]:
    """Half and twice the micro-batch, all other decisions as they are."""
    d, c = table.chosen.decisions, table.chosen
    gpus = None if isinstance(table.hardware, Fleet) else table.hardware.count
    for size in (d.micro_batch / 2, 2 * d.micro_batch):
        times = size / d.micro_batch
        counts = [share.microbatches / times for share in d.shares]
        count = max(counts, default=table.workload.global_batch / (d.dp * size))
        if any(n % 1 for n in (size, count, *counts)):
            continue
        shares = tuple(replace(s, microbatches=int(n)) for s, n in zip(d.shares, counts))
        other = replace(d, micro_batch=int(size), microbatches=int(count), shares=shares)
        reason = inconsistent(other, table.workload, gpus=gpus) or illegal(other, table.workload)
        if reason:
            yield Batch(micro_batch=int(size), reason=reason)
            continue
        made = table.cost(table.hardware, table.workload, [replace(c, decisions=other)])[0]
        yield Batch(micro_batch=int(size), change=made.step_ps / own.step_ps - 1,
                    over_bytes=max(0, made.over_bytes))  # fmt: skip


def _room(
    table: _Table, own: Sequence[_Made], rivals: Sequence[Candidate], part: str,
    more: Candidate | None,
) -> Room:  # fmt: skip
    """What of the memory of a part's GPU the decision hangs on; times do not change with it."""
    cluster = next(p for p in parts_of(table.hardware) if part in ("", p.name))
    chosen, capacity = own[0], cluster.device.memory_bytes
    needs = chosen.peak(part)
    room = Room(needs_bytes=needs, capacity_bytes=capacity, part=part)
    smaller = [(made.score, i) for i, made in enumerate(own[1:]) if made.peak(part) < needs]
    if smaller:
        i = min(smaller)[1]
        room = replace(room, instead=rivals[i].decisions,
                       instead_change=own[1 + i].step_ps / chosen.step_ps - 1)  # fmt: skip
    if more is not None:
        made = table.cost(table.hardware, table.workload, [more])[0]
        takes = part == "" or made.peak(part) > capacity  # else it fits, and was not found
        fits = made.peak(part) <= MOST_MEMORY * capacity
        if takes and fits and made.score < chosen.score:
            room = replace(room, more=more.decisions, more_bytes=made.peak(part),
                           more_change=made.step_ps / chosen.step_ps - 1)  # fmt: skip
    return room
