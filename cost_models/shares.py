"""Replicas of a model on parts of several kinds: each part runs its own, on samples of its own.

A part's ranks run as many micro-batches as its share says; gradients are reduced over the ranks of
all parts, once a step. The step is the slowest part's micro-batches, then the longest tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cost_models.collectives import collective_s, driven, reaching_s
from cost_models.decisions import Decisions
from cost_models.fleet import Fleet
from cost_models.hardware import Cluster, Link
from cost_models.links import PASSES
from cost_models.mixed import MixedCosts, fields_of
from cost_models.share_rules import data_ranks
from cost_models.stage_problem import StageProblem, evaluate, tail_ps
from cost_models.state import State, ranks_of
from cost_models.step import Assignments, Costs, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge:
    """The networks of all parts, in the order of ranks, as the engine drives them, and what joins
    them: the link between, if the user said it, and the engine's share of it."""

    networks: tuple[Cluster, ...]
    between: Link | None
    network_share: float

    def collective_s(
        self, kind: str, size_bytes: float, members: Sequence[int], strides: Sequence[int]
    ) -> float:
        """Seconds of a collective over ranks of all parts: `members` of each, so far apart.

        A ring over all of them goes at the pace of the slowest part, as if all ranks were there,
        and no faster than the link between parts, of which each has what its ranks in one domain
        have; it goes there and back over that link.
        """
        size = sum(members)
        took_s = max(
            reaching_s(network, kind, size_bytes, n, stride, size)
            for network, n, stride in zip(self.networks, members, strides)
        )
        if self.between is None:
            return took_s
        passes = PASSES[kind]
        side_by_side = min(
            network.shape(n, stride)[0]
            for network, n, stride in zip(self.networks, members, strides)
        )
        rate = side_by_side * self.between.useful_bytes_per_s * self.network_share
        known_s = max(network.inter.latency_s for network in self.networks)
        later_s = 2 * passes * max(0.0, self.between.latency_s - known_s)
        return max(took_s, passes * (size - 1) / size * size_bytes / rate) + later_s


@dataclass(kw_only=True)
class ShareCosts(Costs):
    """The costs of one part's GPUs, whose data ranks are `place` among those of all parts."""

    bridge: Bridge
    place: int

    def own_step(self, d: Decisions, assignments: Assignments) -> Step:
        """The rows of this part's ranks; `decisions` as they have them."""
        return Costs.step(self, d.on_part(d.shares[self.place]), assignments)

    def transfers(self, d: Decisions, state: State, kind: str, item_bytes: int) -> float:
        """As `Costs.transfers`; groups of data ranks of all parts go over what joins these."""
        sizes = tuple((share.part, share.dp) for share in d.shares)
        key = (sizes, d.tp, d.cp, d.ep, d.etp, d.shard, state.dense,
               state.expert, kind, item_bytes)  # fmt: skip
        if key not in self._fsdp:
            self._fsdp[key] = sum(
                self._moved_s(d, expert, elements, kind, item_bytes)
                for elements, expert in ((state.dense, False), (state.expert, True))
            )
        return self._fsdp[key]

    def _moved_s(
        self, d: Decisions, expert: bool, elements: int, kind: str, item_bytes: int
    ) -> float:
        ranks = ranks_of(d, expert)
        size, apart, name = ranks.shard, 1, kind
        if kind == "all_reduce_replicas":
            size, apart, name = ranks.replicas, ranks.shard, "all_reduce"
            elements = -(-elements // ranks.shard)
        elif kind == "all_reduce":
            size = ranks.shard * ranks.replicas
        size_bytes, stride = elements * item_bytes, ranks.stride * apart
        if size == 1 or not size_bytes:
            return 0.0
        if size * apart < ranks.shard * ranks.replicas:  # the whole group is in one part
            return float(collective_s(self.network, name, size_bytes, size, stride))
        members = [data_ranks(d, share, expert) // apart for share in d.shares]
        return self.bridge.collective_s(name, size_bytes, members, [stride] * len(members))


@dataclass(kw_only=True)
class SharedCosts(ShareCosts):
    """The costs of the first part, and beside them those of the others, in the order of ranks.

    said: whether the user said the link between parts.
    """

    others: tuple[ShareCosts, ...]
    said: bool

    @property
    def sides(self) -> tuple[ShareCosts, ...]:
        return (self, *self.others)

    def step(self, d: Decisions, assignments: Assignments) -> Step:
        """The first part's rows, the others' `beside`; `decisions` as each part has them."""
        beside = tuple(other.own_step(d, assignments) for other in self.others)
        return replace(self.own_step(d, assignments), beside=beside)


def side_by_side(fleet: Fleet, made: Sequence[Costs]) -> SharedCosts:
    """The costs of replicas on these parts, in this order; what they know is shared."""
    engine = made[0].engine
    bridge = Bridge(
        networks=tuple(driven(costs.cluster, engine.network_share) for costs in made),
        between=fleet.between, network_share=engine.network_share,
    )  # fmt: skip
    first, *others = made
    return SharedCosts(
        **fields_of(first), bridge=bridge, place=0, said=fleet.between is not None,
        others=tuple(ShareCosts(**fields_of(c), bridge=bridge, place=i)
                     for i, c in enumerate(others, 1)),
    )  # fmt: skip


def kinds_of(costs: Costs) -> tuple[Costs, ...]:
    """The costs of each kind of GPU that a plan may use."""
    return costs.sides if isinstance(costs, (MixedCosts, SharedCosts)) else (costs,)


def joined_ps(problems: Sequence[StageProblem], steps: Sequence[Step]) -> tuple[int, bool]:
    """The objective of parts side by side, and whether every rank fits: the longest makespan,
    then the longest tail, since no reduction over parts ends before the slowest has its gradients.

    problems, steps: of each part, `steps` with their stages decided.
    """
    makespan = tail = 0
    fits = True
    for p, step in zip(problems, steps, strict=True):
        d = step.decisions
        objective, _, one_fits = evaluate(p, d.stages, d.pairs)
        after = tail_ps(p, d.stages)
        makespan, tail = max(makespan, objective - after), max(tail, after)
        fits = fits and one_fits
    return makespan + tail, fits
