"""A pipeline whose ranks are of several kinds: each stage costed on the part it lies on.

Every stage has as many ranks on every part, unless parts have a tp of their own; a part has the
stages that its GPUs divide into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from cost_models.borders import most_bytes, values_between
from cost_models.collectives import Form, driven, send_form
from cost_models.decisions import Decisions
from cost_models.fleet import Fleet, Hardware
from cost_models.hardware import Cluster, Link
from cost_models.point import ps
from cost_models.rank_ledger import exposed_send_ps
from cost_models.stage_problem import StageProblem
from cost_models.step import Assignments, Costs, Step, replicated
from cost_models.words import assignment_of, sharding_of

Laid = dict[tuple[int, int, bool], tuple[Assignments, Assignments]]


@dataclass(kw_only=True)
class PartCosts(Costs):
    """The costs of one part's GPUs, its stages a run of a longer pipeline's.

    border: a send to another part. known: steps by mesh, each with the assignments that it is of;
    no step depends on where in the pipeline the part lies, so orders of parts share them. laid:
    by (assignments, tp, split), the same assignments on a part's own tp.
    """

    border: Form
    known: dict[tuple[Decisions, int], tuple[Assignments, Step]] = field(default_factory=dict)
    laid: Laid = field(default_factory=dict)

    def step(self, d: Decisions, assignments: Assignments) -> Step:
        mine = self.on_tp(d)
        laid = self.lie(mine, assignments) if d.tp_by_part else assignments
        key = mine, id(laid)
        if key not in self.known:
            self.known[key] = laid, super().step(mine if d.tp_by_part else d, laid)
        return replace(self.known[key][1], decisions=d)

    def rescheduled(self, step: Step, d: Decisions) -> Step:
        if not d.tp_by_part:
            return super().rescheduled(step, d)
        return replace(super().rescheduled(step, self.on_tp(d)), decisions=d)

    def lie(self, mine: Decisions, assignments: Assignments) -> Assignments:
        """The assignments, which are for the largest tp, on this part's own. Raises PlanError where
        that splits otherwise."""
        tp, split = mine.tp, mine.sequence_parallel
        key = id(assignments), tp, split
        if key not in self.laid:
            own = {
                (unit, layer): replicated(unit, 1) if tp == 1 else assignment_of(
                    unit, sharding_of(unit, found), tp, split
                )
                for (unit, layer), found in assignments.items()
            }  # fmt: skip
            self.laid[key] = assignments, own
        return self.laid[key][1]

    def on_tp(self, d: Decisions) -> Decisions:
        """The mesh with this part's tp, and no word of parts."""
        if not d.parts and not d.tp_by_part:
            return d
        own = dict(d.tp_by_part).get(self.cluster.name)
        return replace(d if own in (None, d.tp) else d.with_tp(own), parts=(), tp_by_part=())

    def own(self, d: Decisions) -> Decisions:
        """The mesh as far as this part has it: its own stages."""
        own = self.on_tp(d) if d.tp_by_part else d
        return replace(own, pp=self.stages(d), parts=())

    def stages(self, d: Decisions) -> int:
        """The pipeline ranks that lie on this part."""
        tp = dict(d.tp_by_part).get(self.cluster.name, d.tp)
        return self.cluster.count // (d.dp * d.cp * tp)

    def border_s(self, size_bytes: int) -> float:
        """Seconds to send that to the next part."""
        return float(self.border.at(np.asarray(size_bytes, dtype=np.float64)))

    def send_s(self, d: Decisions, size_bytes: int, *, back: bool = False) -> float:
        """As `Costs.send_s`, inside the part; the last stage and the first are on two parts."""
        if back or self.stages(d) == 1:
            return self.border_s(size_bytes)
        return super().send_s(self.own(d), size_bytes)

    def slow_sends(self, d: Decisions, size_bytes: int) -> tuple[tuple[int, int], ...]:
        """As `Costs.slow_sends`, of the boundaries inside the part."""
        return super().slow_sends(self.own(d), size_bytes)


@dataclass(kw_only=True)
class MixedCosts(PartCosts):
    """The costs of the first part, and beside them those of the others, in the order of ranks.

    said: whether the user said the link between parts.
    """

    others: tuple[PartCosts, ...]
    said: bool

    @property
    def sides(self) -> tuple[PartCosts, ...]:
        return (self, *self.others)

    def step(self, d: Decisions, assignments: Assignments) -> Step:
        """The first part's rows, the others' `beside`."""
        beside = tuple(other.step(d, assignments) for other in self.others)
        return replace(super().step(d, assignments), beside=beside)

    def rescheduled(self, step: Step, d: Decisions) -> Step:
        beside = tuple(o.rescheduled(s, d) for o, s in zip(self.others, step.beside))
        return replace(super().rescheduled(step, d), beside=beside)


def sides_of(costs: Costs, step: Step) -> tuple[tuple[Costs, Step], ...]:
    """Of each pp rank, the costs and the step of the part that it lies on."""
    if not isinstance(costs, MixedCosts):
        return ((costs, step),) * step.decisions.pp
    steps = (replace(step, beside=()), *step.beside)
    return tuple(
        (side, one) for side, one in zip(costs.sides, steps)
        for _ in range(side.stages(step.decisions))
    )  # fmt: skip


def join(
    costs: MixedCosts, step: Step, problems: Sequence[StageProblem]
) -> StageProblem:
    """The stage problem of all parts, from that of each as if it had every rank."""
    d = step.decisions
    steps = (step, *step.beside)
    exposed = [exposed_send_ps(c, s, d) for c, s in zip(costs.sides, steps)]
    counts = [side.stages(d) for side in costs.sides]
    alike = not d.tp_by_part
    values = () if alike else values_between(step.chain, d, costs.workload.seq_len)
    tps = [d.tp if alike else side.on_tp(d).tp for side in costs.sides]
    sends: list[tuple[int, int]] = []
    for one, p, count, own, after in zip(steps, problems, counts, tps, (*tps[1:], tps[0])):
        inside = one.slow_sends or ((0, 0),) * count
        sends += [(p.p2p_ps + more, kept) for more, kept in inside[: count - 1]]
        size_bytes = sum(step.p2p_bytes) if alike else most_bytes(values, own, after)
        crossing = max(0, ps(costs.border_s(size_bytes)) - min(exposed))
        # at last, from the last stage back to the first
        sends.append((crossing, ps(size_bytes * costs.border.s_per_byte)))
    return mixed(list(zip(problems, counts)), sends)


def mixed(
    sides: Sequence[tuple[StageProblem, int]], sends: Sequence[tuple[int, int]]
) -> StageProblem:
    """A problem whose ranks are so many of each kind, in this order.

    sends: of each rank's boundary to the next, the last rank's to the first: what a send takes,
    and for how long it keeps the links.
    """
    kinds = [p for p, _ in sides]
    count = sum(n for _, n in sides)
    hop = min(took for took, _ in sends[:-1])
    slow = tuple((took - hop, kept if took > hop else 0) for took, kept in sends)
    slow = slow if any(more for more, _ in slow[:-1]) else ()

    def least(name: str) -> tuple[int, ...]:
        return tuple(map(min, zip(*(getattr(p, name) for p in kinds))))

    def levels(name: str) -> tuple[tuple[int, ...], ...]:
        by_level = zip(*(getattr(p, name) for p in kinds))
        return tuple(tuple(map(min, zip(*rows))) for rows in by_level)

    alike = tuple(replace(p, pp=count, p2p_ps=hop, slow_sends=slow) for p in kinds)
    again, kept, used = map(levels, ("recompute_ps", "activation_bytes", "working_bytes"))
    return replace(
        alike[0], recompute_ps=(again[0], again[1]), activation_bytes=(kept[0], kept[1], kept[2]),
        working_bytes=(used[0], used[1], used[2]), forward_ps=least("forward_ps"),
        input_grad_ps=least("input_grad_ps"), weight_grad_ps=least("weight_grad_ps"),
        state_bytes=least("state_bytes"), gathered_bytes=least("gathered_bytes"),
        tail_comm_ps=least("tail_comm_ps"), tail_own_ps=least("tail_own_ps"),
        tail_hide_ps=tuple(map(max, zip(*(p.tail_hide_ps for p in kinds)))),
        first=kinds[0].first, last=kinds[-1].last,
        constant_bytes=min(p.constant_bytes for p in kinds),
        rank_glue_forward_ps=min(p.rank_glue_forward_ps for p in kinds),
        rank_glue_backward_ps=min(p.rank_glue_backward_ps for p in kinds),
        capacity_bytes=max(p.capacity_bytes for p in kinds),
        ranks=tuple(p for p, (_, n) in zip(alike, sides) for _ in range(n)),
    )  # fmt: skip


def border_form(parts: Sequence[Cluster], between: Link | None, network_share: float) -> Form:
    """What a send from a GPU of one part to one of another takes: it goes through both networks,
    at the rate of the slower, and through the link between them where one is said.

    network_share: as `driven` has it.
    """
    forms = [send_form(driven(part, network_share), 1, 1) for part in parts]
    overhead_s = max(form.overhead_s for form in forms)
    s_per_byte = max(form.s_per_byte for form in forms)
    if between is not None:  # the overhead has a network's own latency in it
        known_s = max(part.inter.latency_s for part in parts)
        overhead_s += max(0.0, between.latency_s - known_s)
        s_per_byte = max(s_per_byte, 1 / (between.useful_bytes_per_s * network_share))
    return Form(algorithm="send", overhead_s=overhead_s, sqrt_s=0.0, s_per_byte=s_per_byte)


def together(hardware: Hardware, made: Sequence[Costs]) -> Costs:
    """The costs of a pipeline over these parts, in this order; what they know is shared."""
    if len(made) == 1 or not isinstance(hardware, Fleet):
        return made[0]
    clusters = [costs.cluster for costs in made]
    border = border_form(clusters, hardware.between, made[0].engine.network_share)
    first, *others = made
    return MixedCosts(
        **fields_of(first), border=border, said=hardware.between is not None,
        others=tuple(PartCosts(**fields_of(c), border=border) for c in others),
    )  # fmt: skip


def fields_of(costs: Costs) -> dict[str, Any]:
    """What another kind of costs of the same cluster is made of; what they know is shared."""
    return {f.name: getattr(costs, f.name) for f in fields(Costs) if f.init}
