"""Plan again without needless change: of the plans nearly as good as the best, the nearest to an
old one.

What a restart must move decides how far two plans are apart. Changes are counted by class, and a
class outweighs all behind it:

1. axes: pp, dp, cp, tp, ep, etp, dp_outer, the parts of the hardware, and how parameters lie on tp:
   every tensor is cut anew;
2. state: ZeRO stage, shard group, offload, the gradients' format: optimizer state changes ranks
   or tiers;
3. program: schedule, virtual stages, micro-batch, each part's share of them, sequence parallelism,
   how cp shares, gathering again, compilation: the step is another, no state moves;
4. layers that another pp rank runs;
5. layers that are computed again otherwise.

Of plans equally far the quickest is taken. Classes 1 to 3 are exact over the search's space, as
far as its effort goes; the layers of 4 and 5 are the old ones where those still fit and are quick
enough, else the quickest with as many of the old stages' recomputations as can be.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

from cost_models.decisions import Decisions
from cost_models.estimate import read_assignments, stage_problem, whole_step_ps
from cost_models.schedule import rank_of
from cost_models.stage_problem import Pair, StageProblem, evaluate
from cost_models.step import Assignments, Costs, Step
from ir.stacks import as_written
from planner.decisions import ANY, Pins
from planner.legality import illegal, inconsistent
from planner.mesh import Mesh
from planner.offloads import keeps_offload
from planner.outcome import decided
from planner.plan import Plan
from planner.search import Outcome, Searcher, Tried
from planner.stages import lower_bound_ps, solve

STATE = ("zero", "offload", "grad_dtype", "formats")  # and the shard group
PROGRAM = ("schedule", "virtual_stages", "micro_batch", "sequence_parallel", "reshard", "compile")
AFTER = (  # follow, or are told apart
    "microbatches", "stages", "recompute", "keep", "shard", "cp_kind", "shares",
)  # fmt: skip
Distance = tuple[int, int, int, int, int]


def changed(old: Decisions, new: Decisions) -> tuple[tuple[str, ...], ...]:
    """The decisions that differ, of classes 1 to 3."""
    plain = {*STATE, *PROGRAM, *AFTER}
    axes = [f.name for f in fields(Decisions) if f.name not in plain]
    found = [
        [key for key in keys if _said(old, key) != _said(new, key)]
        for keys in (axes, STATE, PROGRAM)
    ]
    if _shard(old) != _shard(new):
        found[1].append("shard")
    if old.cp_kind != new.cp_kind and min(old.cp, new.cp) > 1:
        found[2].append("cp_kind")
    if _divided(old) != _divided(new):
        found[2].append("shares")
    return tuple(map(tuple, found))


def _said(d: Decisions, key: str) -> object:
    """A decision; of offload the tiers, as which layers lie there is class 5; of parts their names,
    as what lies on each follows from the axes."""
    if key == "parts":
        return tuple(share.part for share in d.shares) or tuple(name for name, _ in d.parts)
    return d.tiers if key == "offload" else getattr(d, key)


def _divided(d: Decisions) -> tuple[tuple[str, int], ...]:
    """The micro-batches of each part that has replicas of its own."""
    return tuple((share.part, share.microbatches) for share in d.shares)


def distance(old: Decisions, new: Decisions) -> Distance:
    """Changes by class, the gravest first."""
    axes, state, program = map(len, changed(old, new))
    return (
        axes, state, program, _differ(_ranks(old), _ranks(new)),
        _differ(_levels(old), _levels(new)),
    )  # fmt: skip


def _shard(d: Decisions) -> int:
    """The shard group; 0 where it is all data ranks, however many those are."""
    return 0 if d.shard == d.dp * d.cp else d.shard


def _ranks(d: Decisions) -> tuple[int, ...]:
    """Of each layer the pp rank that runs it."""
    return tuple(rank_of(d.schedule, d.pp, k) for k, n in enumerate(d.stages) for _ in range(n))


def _levels(d: Decisions) -> tuple[int, ...]:
    """Of each layer how it is recomputed: 0 not, 1 in part, 2 in full; 3: it lies below. Of
    replicas on parts, on each."""
    half = 1 if d.moved is None else 3
    return tuple(
        2 if i < full else half if i < full + part else 0
        for pairs in ([share.recompute or d.pairs for share in d.shares] or [d.pairs])
        for n, (full, part) in zip(d.stages, pairs) for i in range(n)
    )  # fmt: skip


def _differ(old: tuple[int, ...], new: tuple[int, ...]) -> int:
    """Layers that differ; all, where the models have not as many."""
    return sum(a != b for a, b in zip(old, new)) if len(old) == len(new) else len(new)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """What was chosen: the outcome with it as its best, how far from the old plan, and how far
    the quickest is."""

    outcome: Outcome
    distance: Distance
    best_distance: Distance
    keys: tuple[str, ...]  # of the decisions that change
    slower: float  # than the best, as a share of its step

    @property
    def words(self) -> str:
        """What changes, and what that costs."""
        told = ("layers on another rank", "layers recomputed otherwise")
        said = [*self.keys, *(f"{n} {word}" for n, word in zip(self.distance[3:], told) if n)]
        changes = ", ".join(said) or "nothing"
        if self.distance == self.best_distance:
            return f"the best plan changes least: {changes}"
        return f"changes {changes}; a step {self.slower:+.1%} against the best plan's"


@dataclass(kw_only=True)
class Steadying:
    """The plans within a share of the best one's step, the nearest to the old one first."""

    searcher: Searcher
    old: Plan
    limit_ps: int
    best: tuple[Distance, int, Tried, Costs] | None = None
    allows: Callable[[Tried, Costs], bool] = lambda tried, costs: True
    spent: int = 0
    laid_as_old: dict[tuple[int, bool], bool] = field(default_factory=dict)

    @functools.cached_property
    def same_model(self) -> bool:
        """Whether the old plan is of this graph."""
        from ir.text import format_graph, graph_hash

        graph = as_written(self.searcher.costs.graph)
        return graph_hash(format_graph(graph)) == self.old.graph_hash

    def offer(self, tried: Tried, moved: bool = False) -> None:
        """Keep a plan that is nearer, or as near and quicker. moved: parameters on tp."""
        costs = self.searcher.costs
        far = distance(self.old.decisions, self.named(tried.decisions))
        far = (far[0] + moved, *far[1:])
        key = (far, whole_step_ps(costs, tried.objective_ps))
        if (self.best is None or key < self.best[:2]) and self.allows(tried, costs):
            self.best = (*key, tried, costs)

    def named(self, d: Decisions) -> Decisions:
        """The decisions as a plan of this hardware says them."""
        return d

    def offer_old(self) -> None:
        """The old plan as it is, where it is still legal, fits and is quick enough."""
        costs, d = self.searcher.costs, self.old.decisions
        parts, layers = self.searcher.clusters, len(costs.chain.layers)
        gpus = sum(part.count for part in parts)
        tiers = set.intersection(*({tier.name for tier in part.tiers} for part in parts))
        legal = (
            self.same_model and keeps(self.searcher.pins, d) and self.searcher.runs(d)
            and d.formats in self.searcher.format_ways()
            and inconsistent(d, costs.workload, gpus=gpus, layers=layers) is None
            and illegal(d, costs.workload) is None and {*d.tiers.values()} <= tiers
            and (d.micro_batch, d.cp) in costs.points and d.compile == costs.engine.fused
        )  # fmt: skip
        if not legal:
            return
        laid = read_assignments(costs, d, self.old.sharding_by_unit)
        objective, fits = self._evaluated(d, laid)
        if fits and objective <= self.limit_ps:
            self.offer(Tried(decisions=d, assignments=laid, objective_ps=objective))

    def _evaluated(self, d: Decisions, laid: Assignments) -> tuple[int, bool]:
        """The objective of decisions with their stages, and whether they fit."""
        step = self.searcher.costs.step(d, laid)
        problem = stage_problem(self.searcher.costs, step)
        objective, _, fits = evaluate(problem, d.stages, d.pairs)
        return objective, fits and all(
            use.fits for use in self.searcher.tier_uses(step, d, problem)
        )

    def offer_all(self) -> None:
        """Every way to hold and to run the meshes that may be quick enough, the nearest first."""
        searcher, old = self.searcher, self.old.decisions
        candidates = [m for m in searcher.meshes() if searcher.runs(m)]
        rows: list[tuple[tuple[int, int, int], int, int, Mesh, Decisions]] = []
        for space in (replace(searcher, formats=way) for way in searcher.format_ways()):
            lower = space.bounds(candidates).lower_ps.tolist() if candidates else []
            for mesh, least in zip(candidates, lower):
                if least > self.limit_ps:
                    continue
                for held in space.variants(mesh):
                    for way in self._ways(space, held):
                        for d in space.schedules(way):
                            rows.append((self._coarse(old, d), least, len(rows), mesh, d))
        for far, _, _, mesh, d in sorted(rows, key=lambda row: row[:3]):
            if self.best is not None and far > self.best[0][:3]:
                break
            if self.spent >= searcher.effort:
                break
            self._offer_stages(mesh, d)

    def _ways(self, space: Searcher, held: Decisions) -> Iterator[Decisions]:
        """A way to hold the state, and the same with layers' activations below by count; each of
        them also on the tiers that the old plan has it on."""
        old = self.old.decisions.tiers
        for way in (held, *itertools.islice(space.by_count(held), 1)):
            yield way
            on = {what: old.get(what, tier) for what, tier in way.tiers.items()}
            if on != way.tiers:
                words = (tier.replace(way.tiers[what], on[what], 1) for what, tier in way.offload)
                yield replace(way, offload=tuple(zip(way.tiers, words)))

    def _coarse(self, old: Decisions, d: Decisions) -> tuple[int, int, int]:
        axes, state, program = map(len, changed(old, self.named(d)))
        return axes + self._moved(d), state, program

    def _moved(self, d: Decisions) -> bool:
        """Whether parameters lie otherwise on the same tp."""
        if d.tp == 1 or d.tp != self.old.decisions.tp or not self.same_model:
            return False
        key = (d.tp, d.sequence_parallel)
        if key not in self.laid_as_old:
            laid = self.searcher.assign(*key)
            costs, old = self.searcher.costs, self.old
            then = read_assignments(costs, old.decisions, old.sharding_by_unit)
            self.laid_as_old[key] = placed(costs, laid) == placed(costs, then)
        return not self.laid_as_old[key]

    def _offer_stages(self, mesh: Mesh, d: Decisions) -> None:
        """The best stages of these decisions, with the first set that layers may keep in part for
        which they are quick enough."""
        searcher = self.searcher
        laid = searcher.assign(d.tp, d.sequence_parallel)
        self.spent += 1 + d.pp * d.virtual_stages // 8
        step = searcher.costs.step(d, laid)
        problem = searcher.problem(step, d)
        if self._offer_program(d, step, problem):
            return
        for made, other in searcher.kept_otherwise(step, d, problem):
            self.spent += 1
            if self._offer_program(made, step, other):
                return

    def _offer_program(self, d: Decisions, step: Step, problem: StageProblem) -> bool:
        """The best stages of a program, the old ones first; whether they are quick enough."""
        searcher, old = self.searcher, self.old.decisions
        laid = searcher.assign(d.tp, d.sequence_parallel)
        if lower_bound_ps(problem) > self.limit_ps:
            return False
        alike = len(old.stages) == problem.count and sum(old.stages) == problem.layers
        as_old = alike and (old.moved is None) == (d.moved is None)
        ways = [problem]
        if alike and searcher.pins.stages is None:
            ways.insert(0, replace(problem, fixed_stages=old.stages))
            if as_old and searcher.pins.recompute is None and _may(problem, old.pairs):
                ways.insert(0, replace(ways[0], fixed_recompute=old.pairs))
        for way in ways:
            got = solve(way, incumbent_ps=self.limit_ps + 1)
            if got.status not in ("OPTIMAL", "FEASIBLE"):
                continue
            pairs, objective = got.recompute, got.step_ps
            if as_old and searcher.pins.recompute is None:
                pairs, objective = self._restored(problem, got.stages, pairs, objective)
            cut = decided(d, got.stages, pairs)
            fits = all(use.fits for use in searcher.tier_uses(step, cut, problem))
            if fits:
                tried = Tried(decisions=cut, assignments=laid, objective_ps=objective)
                self.offer(tried, self._moved(d))
            return fits
        return False

    def _restored(
        self, problem: StageProblem, stages: tuple[int, ...], pairs: tuple[Pair, ...], ps: int
    ) -> tuple[tuple[Pair, ...], int]:
        """The old recomputation on each stage that is the old one, where that still does."""
        old = self.old.decisions
        for k, pair in enumerate(old.pairs):
            if stages[k] != old.stages[k] or pairs[k] == pair or not _may(problem, (pair,)):
                continue
            changed = (*pairs[:k], pair, *pairs[k + 1 :])
            objective, _, fits = evaluate(problem, stages, changed)
            if fits and objective <= self.limit_ps:
                pairs, ps = changed, objective
        return pairs, ps


def steady(searcher: Searcher, found: Outcome, old: Plan, share: float) -> Steady:
    """Of the plans whose step is within `share` of the best one's the nearest to the old plan.

    The outcome's bound stays that of the search: no plan is quicker than that.
    """
    best = found.best
    assert best is not None
    limit = objective_limit(searcher.costs, best.objective_ps, share)
    at = Steadying(searcher=searcher, old=old, limit_ps=limit)
    at.offer(best, at._moved(best.decisions))
    assert at.best is not None
    first = at.best[0]
    at.offer_old()
    at.offer_all()
    far, step_ps, chosen, _ = at.best
    whole = whole_step_ps(searcher.costs, best.objective_ps)
    return Steady(
        outcome=replace(found, best=chosen, bound=min(found.bound, chosen.score)), distance=far,
        best_distance=first, keys=sum(changed(old.decisions, chosen.decisions), ()),
        slower=step_ps / whole - 1,
    )  # fmt: skip


def objective_limit(costs: Costs, best_ps: int, share: float) -> int:
    """The largest objective whose whole step is within `share` of the best one's."""
    whole = whole_step_ps(costs, best_ps)
    return objective_within(costs, whole + round(share * 1e6) * whole // 1_000_000)


def objective_within(costs: Costs, step_ps: int) -> int:
    """The largest objective whose whole step is not beyond step_ps."""
    low, high = 0, step_ps
    while low < high:
        middle = (low + high + 1) // 2
        if whole_step_ps(costs, middle) <= step_ps:
            low = middle
        else:
            high = middle - 1
    return low


def placed(costs: Costs, laid: Assignments) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Of every unit its parameters' placements on tp."""
    rows = []
    for unit, is_layer, _ in costs.kinds:
        names = unit.parameter_names
        rows.append(tuple(sorted({
            (ref, at) for node, option in zip(unit.nodes, laid[unit, is_layer].chosen)
            for ref, at in zip(node.inputs, option.ins) if ref in names
        })))  # fmt: skip
    return tuple(rows)


def keeps(pins: Pins, d: Decisions) -> bool:
    """Whether a plan has what is pinned."""
    for key, value in pins.items():
        if key == "recompute":
            if value.counts(d.stages) != _pairs(d):
                return False
        elif key == "shares":
            if sorted(value) != sorted(_divided(d)):
                return False
        elif key == "offload":
            if not keeps_offload(value, d):
                return False
        elif (
            key not in ("weights", "formats") and getattr(d, key) != value and value != ANY
        ):
            return False
    return not pins.place


def _pairs(d: Decisions) -> tuple[Pair, ...]:
    return d.recompute or ((0, 0),) * len(d.stages)


def _may(problem: StageProblem, pairs: tuple[Pair, ...]) -> bool:
    """Whether the problem's levels have what the pairs recompute."""
    full, part = (sum(n) for n in zip(*pairs))
    return ("full" in problem.levels or not full) and ("selective" in problem.levels or not part)
