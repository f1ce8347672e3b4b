"""Plan again without needless change on hardware of several kinds: of all that is searched there,
parts alone, replicas and pipelines over them, the plan nearest to the old one.

Classes of change are those of `planner/stability.py`. An old plan of one kind of GPUs is taken as
one of the part of that name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cost_models.decisions import Decisions, Share
from cost_models.estimate import stage_problem
from cost_models.fleet import Fleet
from cost_models.rank_ledger import tier_uses
from cost_models.shares import SharedCosts, joined_ps
from cost_models.step import Assignments, Costs
from planner.check import fault_of_parts
from planner.fleet_search import FleetSearch, named
from planner.fleet_space import FleetSearcher
from planner.mesh import Mesh
from planner.outcome import Outcome, Tried
from planner.plan import Plan
from planner.search import Searcher
from planner.share_space import Pace, ShareSearcher, shared_decisions
from planner.stability import Steady, Steadying, changed, objective_within


@dataclass(kw_only=True)
class FleetSteadying(Steadying):
    """The plans of one part alone, or of pipelines over several in one order."""

    fleet: Fleet

    def named(self, d: Decisions) -> Decisions:
        return named(d, self.searcher.costs)

    def offer_old(self) -> None:
        """The old plan, where this is the search of its parts."""
        d, searcher = self.old.decisions, self.searcher
        names = [share.part for share in d.shares] or [name for name, _ in d.parts]
        if names != [part.name for part in searcher.clusters] or fault_of_parts(d, self.fleet):
            return
        apart = isinstance(searcher, FleetSearcher) and searcher.apart
        if (bool(d.shares), bool(d.tp_by_part)) == (isinstance(searcher, ShareSearcher), apart):
            super().offer_old()


@dataclass(kw_only=True)
class ShareSteadying(FleetSteadying):
    """The plans of replicas on several parts: each way to hold the state with the old division of
    the micro-batches, where that is quick enough, else with the quickest."""

    searcher: ShareSearcher

    def _evaluated(self, d: Decisions, laid: Assignments) -> tuple[int, bool]:
        costs = self.searcher.costs
        step = costs.step(d, laid)
        steps = (replace(step, beside=()), *step.beside)
        problems = [stage_problem(side, one) for side, one in zip(costs.sides, steps)]
        objective, fits = joined_ps(problems, steps)
        uses = [
            use for side, one, p in zip(costs.sides, steps, problems)
            for use in tier_uses([(side.cluster, one)], one.decisions, p)
        ]  # fmt: skip
        return objective, fits and all(use.fits for use in uses)

    def _ways(self, space: Searcher, held: Decisions) -> Iterator[Decisions]:
        return iter((held,))

    def _coarse(self, old: Decisions, d: Decisions) -> tuple[int, int, int]:
        """At least: the division may be the old one."""
        return super()._coarse(old, self._as_old(d) or d)

    def _as_old(self, d: Decisions) -> Decisions | None:
        """The same with the old plan's division, where its parts are these and it is legal."""
        old = {share.part: share for share in self.old.decisions.shares}
        if list(old) != [share.part for share in d.shares]:
            return None
        shares: tuple[Share, ...] = tuple(
            replace(share, microbatches=old[share.part].microbatches) for share in d.shares
        )
        return replace(d, shares=shares, microbatches=max(s.microbatches for s in shares))

    def _offer_stages(self, mesh: Mesh, d: Decisions) -> None:
        searcher = self.searcher
        laid = searcher.assign(d.tp, d.sequence_parallel)
        self.spent += 1
        paces = [
            Pace(searcher=searcher, costs=side, decisions=d, assignments=laid)
            for side in searcher.costs.sides
        ]
        tails = [pace.tail_ps for pace in paces]
        division = searcher.division(
            mesh, [pace.run_ps for pace in paces], [pace.floor_ps for pace in paces]
        )
        as_old, found = self._as_old(d), None
        if as_old is not None:
            each = tuple(share.microbatches for share in as_old.shares)
            ran = sum(n * m for n, m in zip(division.ranks, each))
            if ran == division.total and division.allowed(each):
                tail = max(after(m) for after, m in zip(tails, each))
                step = division.makespan_ps(each) + tail
                found = (step, each) if step <= self.limit_ps else None
        found = found or division.best(tails, self.limit_ps + 1)
        if found is not None:
            tried = Tried(decisions=shared_decisions(d, paces, found[1]), assignments=laid,
                          objective_ps=found[0])  # fmt: skip
            self.offer(tried, self._moved(d))


def steady_fleet(found: FleetSearch, old: Plan, share: float) -> str:
    """Put the plan in the place of the best that is nearest to the old one, of those that come to
    no more than the best and `share` of it; what changes, in words. The bound stays that of the
    search."""
    best, costs = found.best, found.costs
    assert best is not None and costs is not None
    old, floor = as_of(old, found.fleet), found.bound()
    limit = found.value + round(share * 1e6) * found.value / 1_000_000
    if found.worth is None or found.worth.by_time:
        limit = int(found.value) + round(share * 1e6) * int(found.value) // 1_000_000

    def allows(tried: Tried, its: Costs) -> bool:
        value, usd = found.worth_of(tried, its)
        return value <= limit and (found.worth is None or usd <= found.worth.most_usd)

    rows = sorted(found.rows, key=lambda row: row.searcher.costs is not costs)  # its own first
    at: FleetSteadying | None = None
    for row in rows:
        searcher, known = row.searcher, at.best if at else None
        kind = ShareSteadying if isinstance(searcher.costs, SharedCosts) else FleetSteadying
        longest = objective_within(searcher.costs, found.longest_ps(searcher, limit))
        at = kind(searcher=searcher, old=old, limit_ps=longest, fleet=found.fleet,  # type: ignore[arg-type]
                  best=known, allows=allows)  # fmt: skip
        if known is None:
            at.offer(best, at._moved(best.decisions))
            first = at.best
        at.offer_old()
        at.offer_all()
    assert at is not None and at.best is not None and first is not None
    far, step_ps, chosen, its = at.best
    kept = Steady(
        outcome=Outcome(best=chosen), distance=far, best_distance=first[0],
        keys=sum(changed(old.decisions, named(chosen.decisions, its)), ()),
        slower=step_ps / first[1] - 1,
    )  # fmt: skip
    found.put(chosen, its, floor)
    return kept.words


def as_of(old: Plan, fleet: Fleet) -> Plan:
    """The old plan, its decisions naming the part that they are of: of hardware of one kind, the
    part of that name."""
    d = old.decisions
    name = old.hardware.rpartition("x")[0]
    if d.parts or d.shares or name not in {part.name for part in fleet.parts}:
        return old
    return replace(old, decisions=replace(d, parts=((name, d.pp),)))
