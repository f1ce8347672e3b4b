"""The plans of one model on several kinds of GPUs in which every part has replicas of its own.

All parts have the same tp and cp and the same size of micro-batch, and each data rank as many of
these as its part takes: a division that is solved exactly, with each part's own recomputation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cost_models.decisions import Decisions, Keep, Share
from cost_models.estimate import stage_problem
from cost_models.hardware import Cluster
from cost_models.rank_ledger import tier_uses
from cost_models.share_rules import share_fault
from cost_models.shares import ShareCosts, SharedCosts
from cost_models.stage_problem import Pair, StageProblem, tail_ps
from cost_models.step import Assignments, Costs, Step
from planner.bound_chain import Through, through_chain
from planner.bounds import Bounds
from planner.expanding import Expander
from planner.fleet_bounds import Fits
from planner.mesh import Mesh, divisors, shard_sizes, shared_out
from planner.outcome import Outcome, Tried, Unsettled, decided
from planner.search import SHARPENED, Searcher
from planner.share_splits import Division
from planner.stage_planes import ENDLESS
from planner.stages import solve, surely_infeasible
from planner.turns import by_space

ROUNDING = 1e-6  # of sums as floats, relative: what is proved stays below


@dataclass(kw_only=True)
class Pace:
    """One part under one way to hold the state: what its micro-batches take, and what follows.

    A replica is one stage, so what is computed again is what memory asks for, whatever the number
    of micro-batches; one alone accumulates no gradients, and may need less.
    """

    searcher: ShareSearcher
    costs: ShareCosts
    decisions: Decisions  # as of all parts, this one's share of any number of micro-batches
    assignments: Assignments
    _known: dict[int, tuple[int, tuple[Pair, ...]] | None] = field(default_factory=dict)
    _tails: dict[int, int] = field(default_factory=dict)
    _problems: dict[int, tuple[Step, StageProblem]] = field(default_factory=dict)

    def problem(self, microbatches: int) -> tuple[Step, StageProblem]:
        """The step of this part's ranks where they run so many, and its stage program."""
        if microbatches not in self._problems:
            place, d = self.costs.place, self.decisions
            mine = replace(d.shares[place], microbatches=microbatches)
            shares = (*d.shares[:place], mine, *d.shares[place + 1 :])
            step = self.costs.own_step(replace(d, shares=shares), self.assignments)
            fixed, levels = self.searcher.recomputed(step.decisions)
            self._problems[microbatches] = step, stage_problem(
                self.costs, step, fixed_stages=self.searcher.pins.stages, fixed_recompute=fixed,
                levels=levels,
            )  # fmt: skip
        return self._problems[microbatches]

    @functools.cached_property
    def floor_ps(self) -> int:
        """A micro-batch takes no less, of however many."""
        _, p = self.problem(2)
        ends = (p.first, p.last)
        times = (p.forward_ps, p.input_grad_ps, p.weight_grad_ps)
        return (
            sum(map(sum, times)) + p.rank_glue_forward_ps + p.rank_glue_backward_ps
            + sum(e.forward_ps + e.input_grad_ps + e.weight_grad_ps for e in ends)
        )  # fmt: skip

    def each(self, microbatches: int) -> tuple[int, tuple[Pair, ...]] | None:
        """(picoseconds of a micro-batch, its recomputation) where there are so many of them; None
        where that does not fit."""
        few = min(2, microbatches)
        if few not in self._known:
            self._known[few] = self._solved(few)
        return self._known[few]

    def _solved(self, few: int) -> tuple[int, tuple[Pair, ...]] | None:
        step, p = self.problem(few)
        if surely_infeasible(p):
            return None
        found = solve(p)
        if found.status == "INFEASIBLE":
            return None
        assert found.status == "OPTIMAL"  # of one stage every choice is looked at
        cut = decided(step.decisions, found.stages, found.recompute)
        if cut.offload:
            uses = tier_uses([(self.costs.cluster, step)], cut, p)
            if not all(use.fits for use in uses):
                return None
        return (found.step_ps - tail_ps(p, found.stages)) // few, found.recompute

    def run_ps(self, microbatches: int) -> int:
        """What so many micro-batches take; more than any step where they do not fit."""
        found = self.each(microbatches) if microbatches else (0, ())
        return ENDLESS if found is None else microbatches * found[0]

    def tail_ps(self, microbatches: int) -> int:
        """What follows the last of so many: the same whatever their number, but for gradients that
        are summed over tp with each."""
        count = microbatches if self.decisions.tp > 1 else 2
        if count not in self._tails:
            _, p = self.problem(count)
            self._tails[count] = tail_ps(p, (p.layers,))
        return self._tails[count]


@dataclass(kw_only=True)
class ShareSearcher(Searcher):
    """The search of replicas on all parts, in the order given."""

    costs: SharedCosts

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        return tuple(side.cluster for side in self.costs.sides)

    def meshes(self) -> Iterator[Mesh]:
        pins, costs, parts = self.pins, self.costs, self.clusters
        alone = (pins.pp, pins.dp_outer, pins.virtual_stages, len(pins.stages or (0,)))
        asked = [name for name, _ in pins.shares or ()]
        names = [part.name for part in parts]
        if any(n not in (None, 1) for n in alone) or (asked and sorted(asked) != sorted(names)):
            return
        domain = min(part.domain_ranks for part in parts)
        counts = [part.count for part in parts]
        said = [dict(pins.shares or ())[name] for name in names] if asked else []
        for mesh in shared_out(costs.chain, counts, domain, costs.workload, pins):
            run = sum(n * m for n, m in zip(self.data_ranks(mesh), said))  # micro-batches, if said
            if not said or run * mesh.micro_batch == costs.workload.global_batch:
                yield mesh

    def data_ranks(self, mesh: Mesh) -> tuple[int, ...]:
        """Of each part."""
        return tuple(part.count // (mesh.tp * mesh.cp) for part in self.clusters)

    def division(
        self, mesh: Mesh, paces: Sequence[Callable[[int], int]], floors: Sequence[int]
    ) -> Division:
        """Of a mesh's micro-batches, as the pins allow."""
        said, most = dict(self.pins.shares or ()), self.pins.microbatches
        asked = tuple(said[part.name] for part in self.clusters) if said else None

        def allowed(division: tuple[int, ...]) -> bool:
            return asked in (None, division) and most in (None, max(division))

        return Division(
            total=self.costs.workload.global_batch // mesh.micro_batch,
            ranks=self.data_ranks(mesh), paces=paces, floors=tuple(floors), allowed=allowed,
        )  # fmt: skip

    def keeps(self, tp: int, split: bool) -> tuple[Keep, ...]:
        """None but the default, or what is pinned: the parts' prices of a byte differ."""
        return ()

    def variants(self, mesh: Mesh) -> Iterator[Decisions]:
        """Those of which every part has whole groups; of two micro-batches each, for now."""
        for d in super().variants(mesh):
            made = replace(d, microbatches=2, shares=tuple(
                Share(part=part.name, dp=n, microbatches=2)
                for part, n in zip(self.clusters, self.data_ranks(mesh))
            ))  # fmt: skip
            if share_fault(made) is None:
                yield made

    def shards(self, mesh: Mesh, zero: int, outer: int) -> tuple[int, ...]:
        """All data ranks, where shards move once a step; else groups inside every part."""
        ranks, pinned = mesh.dp * mesh.cp, self.pins.shard
        near = math.gcd(*self.data_ranks(mesh)) * mesh.cp
        inside = divisors(near)[::-1]
        if pinned is None and zero > 0:
            spreads = {near, *shard_sizes(mesh, self.clusters, self.pins, zero, outer)}
            inside = tuple(s for s in inside if s in spreads)
        elif pinned is None:
            return (1,)
        alone = zero > 0 and self.pins.zero is None  # nobody shares: what ZeRO-0 is
        found = tuple(s for s in inside if pinned in (None, s) and not (alone and s == 1))
        whole = zero < 2 and pinned in (None, ranks)
        return (ranks, *found) if whole else found

    def bounds(self, candidates: Sequence[Mesh], below: Sequence[int] | None = None) -> Bounds:
        """Of the best division of what a micro-batch takes at least on each part."""
        ps = self._divided(candidates, [(2,) * len(self.clusters)] * len(candidates))
        return Bounds(lower_ps=ps, guess_ps=ps)

    def _divided(
        self, candidates: Sequence[Mesh], fits: Sequence[Sequence[int]]
    ) -> NDArray[np.int64]:
        """Bounds of meshes of which so many micro-batches fit on each part: 2 stands for all."""
        found = []
        known: dict[tuple[object, ...], list[Through]] = {}
        point = {p: i for i, p in enumerate(self.costs.points)}
        for m, most in zip(candidates, fits):
            key = (m.tp, m.sequence_parallel, m.cp_kind, m.ep, m.etp)
            if key not in known:
                d = Decisions(tp=m.tp, sequence_parallel=m.sequence_parallel, cp_kind=m.cp_kind,
                              ep=m.ep, etp=m.etp, formats=self.formats)  # fmt: skip
                laid = self.assign(m.tp, m.sequence_parallel)
                known[key] = [through_chain(side, d, laid) for side in self.costs.sides]
            at = point[m.micro_batch, m.cp]
            each = [int(t.step_s[at] * 1e12 * (1 - ROUNDING)) for t in known[key]]
            paces = [partial(_pace, ps, k) for ps, k in zip(each, most)]
            least = self.division(m, paces, each).least_ps(ENDLESS)
            found.append(ENDLESS if least is None else least)
        return np.array(found, dtype=np.int64)

    def _sharpen(
        self, rest: Sequence[int], candidates: Sequence[tuple[Expander, Mesh]], lower: list[int],
        out: Outcome,
    ) -> None:  # fmt: skip
        """Weigh the memory of each part: for one micro-batch, and for several, which accumulate
        gradients."""
        if out.best is None:
            return
        for space, some in by_space([i for i in rest if lower[i] < out.best.score], candidates):
            assert isinstance(space, ShareSearcher)
            meshes = [candidates[i][1] for i in some]
            most = [
                np.cumprod([space._fits(side, meshes, n) for n in (1, 2)], axis=0).sum(axis=0)
                for side in self.costs.sides
            ]
            found = space._divided(meshes, np.transpose(most).tolist())
            for i, mesh, ps in zip(some, meshes, found.tolist()):
                lower[i] = max(lower[i], self._score(ps, mesh))
            out.spent += len(self.clusters) * len(some) // SHARPENED

    def _fits(self, side: Costs, meshes: Sequence[Mesh], microbatches: int) -> NDArray[np.bool_]:
        """Of each mesh, whether ranks of this part may hold it with so many micro-batches. Shards
        that move with each are shared inside a part."""
        fits = Fits(assign=self.assign, pins=self.pins, formats=self.formats)
        whole = [replace(m, microbatches=microbatches) for m in meshes]
        inside = [replace(m, dp=math.gcd(*self.data_ranks(m))) for m in whole]
        return fits.on(side, whole, (0, 1)) | fits.on(side, inside, (2, 3))

    def expand(self, mesh: Mesh, out: Outcome, unsettled: list[Unsettled]) -> None:
        """Solve a mesh's variants, each exactly."""
        laid = self.assign(mesh.tp, mesh.sequence_parallel)
        ways = [made for d in self.variants(mesh) for made in self.schedules(d)]
        out.spent += 1 + len(ways) // 4
        for d in ways:
            paces = [
                Pace(searcher=self, costs=side, decisions=d, assignments=laid)
                for side in self.costs.sides
            ]
            out.solved += 1
            division = self.division(
                mesh, [pace.run_ps for pace in paces], [pace.floor_ps for pace in paces]
            )
            below = self._below(out.best, mesh) if out.best else ENDLESS
            found = division.best([pace.tail_ps for pace in paces], below)
            if found is not None:
                out.best = Tried(
                    decisions=shared_decisions(d, paces, found[1]), assignments=laid,
                    objective_ps=found[0], gain_ppm=self.gain_ppm,
                )  # fmt: skip


def _pace(each_ps: int, most: int, microbatches: int) -> int:
    """What so many micro-batches take where `most` fit, all if that is 2."""
    return ENDLESS if most < min(2, microbatches) else microbatches * each_ps


def shared_decisions(d: Decisions, paces: Sequence[Pace], division: tuple[int, ...]) -> Decisions:
    """The decisions with each part's micro-batches and what it computes again."""
    each = [pace.each(m) for pace, m in zip(paces, division)]
    pairs = [found[1] for found in each if found is not None]
    shares = tuple(
        replace(share, microbatches=m, recompute=() if again == pairs[0] else again)
        for share, m, again in zip(d.shares, division, pairs, strict=True)
    )
    stages = (len(paces[0].costs.chain.layers),)
    keep = d.keep if any(some for again in pairs for _, some in again) else ()
    return replace(
        d.cut(stages, pairs[0]), keep=keep, shares=shares, microbatches=max(division)
    )
