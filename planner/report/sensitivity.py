"""Sensitivity: what of the inputs would change the decision, and what it does to the step.

The plan and its rivals (the best plan without each of its decisions, and the best one with more
memory) are costed again with one input scaled; the decision flips where a rival is ordered before
the plan. So a flip is of these plans: a search with the input changed may find one nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from cost_models.decisions import Decisions, Workload
from cost_models.estimate import read_assignments, stage_problem, whole_step_ps
from cost_models.hardware import Cluster
from cost_models.stage_problem import evaluate
from cost_models.step import Assignments, Costs
from ir.graph import Graph
from planner.check import Checked
from planner.legality import inconsistent
from planner.score import score_of
from planner.why import MOST_MEMORY, Alternative, Why

FACTORS = (1 / 4, 1 / 2, 2.0, 4.0)  # times an input: as far as hardware on offer differs
SHOWN = (1 / 2, 2.0)  # of the chosen plan, in the chart
IMBALANCE = (1.25, 1.5, 2.0, 3.0)  # busiest expert rank over the mean
HALVINGS = 5  # of the range in which a decision flips, each half of its logarithm

Scaled = Callable[[Cluster, Workload, float], tuple[Cluster, Workload]]


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
    `IMBALANCE`), and where it flips."""

    name: str
    changes: tuple[tuple[float, float], ...]
    flips: tuple[Flip, ...]


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
    comes before the plan."""

    needs_bytes: int
    capacity_bytes: int
    instead: Decisions | None = None
    instead_change: float = 0.0
    more_bytes: int = 0
    more: Decisions | None = None
    more_change: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """rivals: how many plans the chosen one is held against; ahead: of them, those that come
    before it as it is (a plan that was pinned); room: None where nothing was asked for."""

    rivals: int
    ahead: int
    effects: tuple[Effect, ...]
    batches: tuple[Batch, ...]
    room: Room


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
    rivals, freed = list(found.values()), why.roomier(effort)
    roomier = freed.outcome.best if freed else None
    own = table.cost(table.cluster, table.workload, [table.chosen, *rivals])
    fit = [c for c, made in zip(rivals, own[1:]) if made.over_bytes <= 0]
    ahead = [c for c, made in zip(rivals, own[1:]) if made.score < own[0].score]
    asked = [c for c in fit if c not in ahead]
    more = None
    if roomier is not None and roomier.decisions not in (table.chosen.decisions, *found):
        more = Candidate(decisions=roomier.decisions, assignments=roomier.assignments)
    return Sensitivity(
        rivals=len(rivals), ahead=len(ahead),
        effects=tuple(_effect(table, name, scaled, factors, asked)
                      for name, scaled, factors in _inputs(table)),
        batches=tuple(_batches(table, own[0])),
        room=_room(table, own, rivals, more),
    )  # fmt: skip


# --- costing again -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What a candidate comes to. over_bytes: of its fullest rank over the capacity."""

    step_ps: int
    score: int
    peak_bytes: int
    over_bytes: int


class _Table:
    """The chosen plan, and how it and others are costed under other inputs."""

    def __init__(self, checked: Checked) -> None:
        plan = checked.plan
        self.graph: Graph = plan.graph
        self.cluster, self.workload = checked.cluster, plan.workload
        d = plan.decisions
        costs = self._costs(self.cluster, self.workload, [d], d.compile)
        read = read_assignments(costs, d, plan.sharding_by_unit)
        self.chosen = Candidate(decisions=d, assignments=read)

    def _costs(
        self, cluster: Cluster, workload: Workload, made: Iterable[Decisions], compiled: bool
    ) -> Costs:
        points = tuple(dict.fromkeys((d.micro_batch, d.cp) for d in made))
        return Costs(graph=self.graph, cluster=cluster, workload=workload, points=points,
                     compiled=compiled)  # fmt: skip

    def cost(
        self, cluster: Cluster, workload: Workload, candidates: Sequence[Candidate]
    ) -> list[_Made]:
        """Each candidate's step under these inputs; what they share is costed once."""
        known: dict[bool, Costs] = {}
        found = []
        for c in candidates:
            d = c.decisions
            if d.compile not in known:
                alike = [x.decisions for x in candidates if x.decisions.compile == d.compile]
                known[d.compile] = self._costs(cluster, workload, alike, d.compile)
            costs = known[d.compile]
            problem = stage_problem(costs, costs.step(d, c.assignments))
            objective, memory, _ = evaluate(problem, d.stages, d.pairs)
            step, peak = whole_step_ps(costs, objective), max(memory)
            found.append(_Made(step_ps=step, score=score_of(step, d), peak_bytes=peak,
                               over_bytes=peak - cluster.device.memory_bytes))  # fmt: skip
        return found


# --- inputs ------------------------------------------------------------------------------------


def _inputs(table: _Table) -> Iterator[tuple[str, Scaled, tuple[float, ...]]]:
    """(name, how it is scaled, by what) of every input that the plan can feel."""
    cluster = table.cluster
    if cluster.domain_ranks < cluster.count:
        yield "network bandwidth", _network, FACTORS
    if cluster.domain_ranks > 1:
        yield f"{cluster.intra.name} bandwidth", _intra, FACTORS
    yield "memory bandwidth", _memory, FACTORS
    yield "arithmetic rate", _peak, FACTORS
    if table.chosen.decisions.offload:
        yield "host link bandwidth", _host, FACTORS
    if any(n.op == "grouped_matmul" for u in table.graph.units for n in u.nodes):
        yield "expert imbalance", _imbalance, IMBALANCE


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


def _imbalance(c: Cluster, w: Workload, times: float) -> tuple[Cluster, Workload]:
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
    known = {f: table.cost(*scaled(table.cluster, table.workload, f), both) for f in asked}
    base = table.cost(table.cluster, table.workload, both[:1])[0].step_ps
    changes = tuple((f, known[f][0].step_ps / base - 1) for f in asked
                    if f in SHOWN or scaled is _imbalance)  # fmt: skip
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
    return Effect(name=name, changes=changes, flips=tuple(flips))


def _first(made: Sequence[_Made]) -> int:
    """Which candidate comes first; the chosen one is number 0 and wins a tie."""
    return min(range(len(made)), key=lambda i: (made[i].score, i))


def _narrowed(
    table: _Table, scaled: Scaled, both: Sequence[Candidate], still: float, flipped: float
) -> Flip:
    """The flip between a value where the chosen plan is first and one where it is not."""
    made = table.cost(*scaled(table.cluster, table.workload, flipped), both)
    for _ in range(HALVINGS):
        middle = (still * flipped) ** 0.5
        there = table.cost(*scaled(table.cluster, table.workload, middle), both)
        if _first(there):
            flipped, made = middle, there
        else:
            still = middle
    first = _first(made)
    return Flip(times=flipped, decisions=both[first].decisions,
                change=made[first].step_ps / made[0].step_ps - 1)  # fmt: skip


def _batches(table: _Table, own: _Made) -> Iterator[Batch]:
    """Half and twice the micro-batch, all other decisions as they are."""
    d, c = table.chosen.decisions, table.chosen
    for size in (d.micro_batch / 2, 2 * d.micro_batch):
        count = table.workload.global_batch / (d.dp * size)
        if size % 1 or count % 1:
            continue
        other = replace(d, micro_batch=int(size), microbatches=int(count))
        reason = inconsistent(other, table.workload, gpus=table.cluster.count)
        if reason:
            yield Batch(micro_batch=int(size), reason=reason)
            continue
        made = table.cost(table.cluster, table.workload, [replace(c, decisions=other)])[0]
        yield Batch(micro_batch=int(size), change=made.step_ps / own.step_ps - 1,
                    over_bytes=max(0, made.over_bytes))  # fmt: skip


def _room(
    table: _Table, own: Sequence[_Made], rivals: Sequence[Candidate], more: Candidate | None
) -> Room:
    """What of a GPU's memory the decision hangs on; times do not change with it."""
    chosen, capacity = own[0], table.cluster.device.memory_bytes
    room = Room(needs_bytes=chosen.peak_bytes, capacity_bytes=capacity)
    smaller = [(made.score, i) for i, made in enumerate(own[1:])
               if made.peak_bytes < chosen.peak_bytes]  # fmt: skip
    if smaller:
        i = min(smaller)[1]
        room = replace(room, instead=rivals[i].decisions,
                       instead_change=own[1 + i].step_ps / chosen.step_ps - 1)  # fmt: skip
    if more is not None:
        made = table.cost(table.cluster, table.workload, [more])[0]
        if made.score < chosen.score and made.peak_bytes <= MOST_MEMORY * capacity:
            room = replace(room, more=more.decisions, more_bytes=made.peak_bytes,
                           more_change=made.step_ps / chosen.step_ps - 1)  # fmt: skip
    return room
