"""The plans of one model on several kinds of GPUs: pipelines whose stages lie on all of them.

A stage has as many ranks on every part, or each part a tp of its own; layers are cut by what each
part takes for them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cost_models.decisions import Decisions, Keep
from cost_models.hardware import Cluster
from cost_models.mixed import MixedCosts, PartCosts
from cost_models.step import Assignments
from ir.errors import PlanError
from planner.bound_chain import Through, through_chain
from planner.bounds import NEVER_PS, Bounds
from planner.expanding import Expander
from planner.fleet_bounds import Fits
from planner.mesh import Mesh, laid_out, parted
from planner.outcome import Outcome
from planner.search import SHARPENED, Searcher
from planner.space import Space
from planner.stage_sides import least_spread
from planner.turns import by_space

SCHEDULES = ("1f1b", "gpipe", "zbh1")  # one stage a rank: a chunk's part would change within a rank
ROUNDING = 1e-6  # of sums as floats, relative: what is proved stays below


@dataclass(kw_only=True)
class FleetSearcher(Searcher):
    """The search of pipelines over all parts, in one order. apart: of those whose parts have
    another tp each, else of all others: one takes no effort from the other."""

    costs: MixedCosts
    apart: bool = False
    _passed: dict[tuple[str, Decisions, int], Through] = field(default_factory=dict)

    def share(self, other: FleetSearcher) -> None:
        """Know what a search of the same parts in another order knows: how units lie on tp, as
        its first part has it, and what meshes cost on each part."""
        self._laid = other._laid
        known = {side.cluster.name: side for side in other.costs.sides}
        for side in self.costs.sides:
            side.known = known[side.cluster.name].known
            side.laid = known[side.cluster.name].laid

    def _lay(self, tp: int, split: bool) -> Assignments:
        """As the first part has it, or the first that has so many GPUs."""
        side = next(side for side in self.costs.sides if side.cluster.count >= tp)
        if side is self.costs:
            return super()._lay(tp, split)
        return Space(costs=side, pins=self.pins)._lay(tp, split)

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        return tuple(side.cluster for side in self.costs.sides)

    def meshes(self) -> Iterator[Mesh]:
        """Meshes of which every part has whole stages, one at least."""
        return filter(self._lies, self.candidates()) if self.apart else self.candidates()

    def candidates(self) -> Iterator[Mesh]:
        """The same, whatever smaller tps split."""
        costs, parts = self.costs, self.clusters
        widest = math.gcd(*(part.count for part in parts))
        if self.pins.dp_outer not in (None, 1):
            return
        domain = min(part.domain_ranks for part in parts)
        gpus = sum(part.count for part in parts)
        if self.apart:
            yield from parted(costs.chain, parts, costs.workload, self.pins)
            return
        for mesh in laid_out(costs.chain, gpus, domain, costs.workload, self.pins):
            if mesh.pp > 1 and widest % (mesh.dp * mesh.cp * mesh.tp) == 0:
                yield mesh

    def _lies(self, mesh: Mesh) -> bool:
        """Whether every part's tp splits the units as the largest does."""
        if not self.runs(mesh):
            return False
        laid = self.assign(mesh.tp, mesh.sequence_parallel)
        d = Decisions(tp=mesh.tp, sequence_parallel=mesh.sequence_parallel,
                      tp_by_part=mesh.tp_by_part)  # fmt: skip
        try:
            for side in self.costs.sides:
                side.lie(side.on_tp(d), laid)
        except PlanError:
            return False
        return True

    def keeps(self, tp: int, split: bool) -> tuple[Keep, ...]:
        """None but the default, or what is pinned: the parts' prices of a byte differ."""
        return ()

    def variants(self, mesh: Mesh) -> Iterator[Decisions]:
        for d in super().variants(mesh):
            if d.dp_outer == 1:
                parts = tuple((side.cluster.name, side.stages(d)) for side in self.costs.sides)
                yield replace(d, parts=parts)

    @property
    def searched_schedules(self) -> tuple[str, ...]:
        return tuple(s for s in super().searched_schedules if s in SCHEDULES)

    def bounds(self, candidates: Sequence[Mesh], below: Sequence[int] | None = None) -> Bounds:
        """As `mesh_bounds_ps`, without what data parallelism and memory add.

        Of the busiest rank as `least_spread` has it; under 1F1B, of the way there and back too.
        """
        found = np.zeros((2, len(candidates)))
        known: dict[tuple[object, ...], list[Through]] = {}
        point = {p: i for i, p in enumerate(self.costs.points)}
        for i, m in enumerate(candidates):
            key = (m.tp, m.sequence_parallel, m.cp_kind, m.ep, m.etp, m.tp_by_part)
            if key not in known:
                d = Decisions(tp=m.tp, sequence_parallel=m.sequence_parallel, cp_kind=m.cp_kind,
                              ep=m.ep, etp=m.etp, formats=self.formats,
                              tp_by_part=m.tp_by_part)  # fmt: skip
                laid = self.assign(m.tp, m.sequence_parallel)
                known[key] = [self._through(side, d, laid) for side in self.costs.sides]
            found[:, i] = self._mesh_s(m, known[key], point[m.micro_batch, m.cp])
        lower, guess = np.floor(found * 1e12 * (1 - ROUNDING)).astype(np.int64)
        return Bounds(lower_ps=lower, guess_ps=guess)

    def _sharpen(
        self, rest: Sequence[int], candidates: Sequence[tuple[Expander, Mesh]], lower: list[int],
        out: Outcome,
    ) -> None:  # fmt: skip
        """Leave out those that would not fit if all ranks had as much memory as any part's."""
        if out.best is None or self.apart:
            return
        most = max(self.costs.sides, key=lambda side: side.cluster.device.memory_bytes)
        for space, some in by_space([i for i in rest if lower[i] < out.best.score], candidates):
            fits = Fits(assign=space.assign, pins=space.pins, formats=space.formats,
                        schedules=space.searched_schedules)  # fmt: skip
            for i, may in zip(some, fits.on(most, [candidates[i][1] for i in some])):
                lower[i] = lower[i] if may else int(NEVER_PS)
            out.spent += len(some) // SHARPENED

    def _through(self, side: PartCosts, d: Decisions, laid: Assignments) -> Through:
        """A micro-batch through the whole chain on one part."""
        if not d.tp_by_part:
            return through_chain(side, d, laid)
        mine = side.on_tp(d)
        key = (side.cluster.name, mine, d.tp)
        if key not in self._passed:
            self._passed[key] = through_chain(side, mine, side.lie(mine, laid))
        return self._passed[key]

    def _mesh_s(self, m: Mesh, through: Sequence[Through], at: int) -> tuple[float, float]:
        """Seconds of the step at least, and a guess at it."""
        costs = self.costs
        layers, kind_of = costs.chain.layers, costs.kind_of
        own = dict(m.tp_by_part)
        counts = [part.count // (m.dp * m.cp * own.get(part.name, m.tp)) for part in self.clusters]
        repeats = Counter(kind_of[layers[0] : layers[-1] + 1])
        each = [[n * float(t.kinds_s[k][at]) for k, n in repeats.items()] for t in through]
        for row, t in zip(each, through):
            row += [float(t.first[0][at]), float(t.last[0][at])]
        only = [*[None] * len(repeats), 0, len(counts) - 1]
        busy, whole = (least_spread(each, only, counts, c, e) for c, e in ((1.0, 0.0), (0.0, 1.0)))
        least = m.microbatches * busy
        if set(self.searched_schedules) <= {"1f1b", "gpipe"}:
            c, e = (m.microbatches - 1 - m.pp, 2.0)
            if c > 0:
                least = max(least, least_spread(each, only, counts, c, e))
        return least, (m.microbatches + m.pp - 1) * max(busy, whole / m.pp)
