"""One mesh, every link of the chain: integer picoseconds and bytes, by name.

A `Row` is what one link costs the rank that runs it; the stage solver and the estimate add rows,
so a plan's step is the same number wherever it is asked for.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from cost_models.chain import Chain, chain_of
from cost_models.collectives import collective_s, driven, send_form
from cost_models.compute import Kernels, load_kernels
from cost_models.crossing import boundary_levels
from cost_models.decisions import Decisions, Workload
from cost_models.engines import Engine, load_engine, uncompiled
from cost_models.hardware import Cluster
from cost_models.keeping import kept_in_part
from cost_models.layout import Assignment, boundary, options
from cost_models.offload import (
    Exposed,
    activation_copies_s,
    below_bytes,
    by_count,
    exposed_s,
    layers_below,
    parameter_copies_s,
    update_kernels,
    update_s,
)
from cost_models.point import PARTS, Point, at_point, ps
from cost_models.schedule import rank_of
from cost_models.state import (
    COMPUTE_BYTES,
    MASTER_BYTES,
    State,
    grad_bytes,
    held,
    in_torch,
    mode_of,
    ranks_of,
    replica_sums,
    reserved_of,
    state_of,
    update_bytes,
)
from cost_models.step_rows import Row, Step
from cost_models.unit_costs import UnitCost, context_cost, expert_cost, learns_of, unit_cost
from cost_models.work import Axes, Floats, Work
from ir.graph import Graph, Unit, full_name

Groups = tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]
Assignments = dict[tuple[Unit, bool], Assignment]  # (unit, is a layer) -> its assignment
# of decisions, all that a row is a function of but what of layers alone is kept, moved or repeated
_OF_ENDS = operator.attrgetter(*(
    f.name for f in fields(Decisions)
    if f.name not in ("offload", "keep", "stages", "recompute")
))  # fmt: skip
MOST_ENDS = 8  # states whose rows are remembered: of a mesh few are asked for by turns


@dataclass(kw_only=True)
class Costs:
    """The cost of anything for one (graph, cluster, workload); remembers what it computed.

    points: (micro-batch, cp) pairs, which unit costs are computed for all at once. compiled:
    False costs a compiling engine's eager mode. variant, variant_kernels: an
    engine and kernels other than the workload's and the device's.
    """

    graph: Graph
    cluster: Cluster
    workload: Workload
    points: tuple[tuple[int, int], ...] = ((1, 1),)
    compiled: bool = True
    variant: Engine | None = None
    variant_kernels: Kernels | None = None
    _units: dict[tuple[object, ...], UnitCost | None] = field(default_factory=dict)
    _fsdp: dict[tuple[object, ...], float] = field(default_factory=dict)
    _points: dict[tuple[object, ...], Point] = field(default_factory=dict)
    _sums: dict[tuple[int, int], float] = field(default_factory=dict)
    _works: dict[bool, Work] = field(default_factory=dict, init=False)
    _updates: dict[int, float] = field(default_factory=dict, init=False)
    _groups: dict[tuple[int, ...], Groups] = field(default_factory=dict, init=False)
    layered: dict[tuple[object, ...], tuple[Step, dict[str, Any]]] = field(default_factory=dict)
    _ends: dict[object, dict[tuple[object, ...], Row]] = field(default_factory=dict, init=False)

    @cached_property
    def chain(self) -> Chain:
        return chain_of(self.graph)

    @cached_property
    def engine(self) -> Engine:
        engine = self.variant or load_engine(self.workload.engine)
        return engine if self.compiled or not engine.fused else uncompiled(engine)

    @cached_property
    def network(self) -> Cluster:
        """The cluster that transfers between ranks are costed over."""
        return driven(self.cluster, self.engine.network_share)

    @cached_property
    def kernels(self) -> Kernels:
        if self.variant_kernels is not None:
            return self.variant_kernels
        return load_kernels(self.cluster.device, attention=self.engine.attention)

    @cached_property
    def _kind_of_link(self) -> tuple[tuple[Unit, bool, frozenset[str]], ...]:
        """(unit, is a layer, its parameters that an earlier link holds) of every link."""
        owners, seen, found = dict(self.graph.tied), set(), []  # type: ignore[var-annotated]
        for link in self.chain.links:
            names = {p.name: full_name(link.path, p.name) for p in link.unit.parameters}
            tensors = {name: owners.get(full, full) for name, full in names.items()}
            earlier = frozenset(name for name, full in tensors.items() if full in seen)
            seen.update(tensors.values())
            found.append((link.unit, link.is_layer, earlier))
        return tuple(found)

    @cached_property
    def kinds(self) -> tuple[tuple[Unit, bool, frozenset[str]], ...]:
        """Distinct (unit, is a layer, parameters held by an earlier link) in chain order."""
        return tuple(dict.fromkeys(self._kind_of_link))

    @cached_property
    def layer_kinds(self) -> frozenset[tuple[Unit, bool]]:
        """(unit, is a layer) of what recomputes and what offloads: what a pipeline divides."""
        links = self.chain.links
        return frozenset((links[i].unit, links[i].is_layer) for i in self.chain.layers)

    @cached_property
    def kind_of(self) -> tuple[int, ...]:
        where = {kind: i for i, kind in enumerate(self.kinds)}
        return tuple(where[kind] for kind in self._kind_of_link)

    @cached_property
    def layer_groups(self) -> Groups:
        """`groups_of` the kinds of all links."""
        return self.groups_of(self.kind_of)

    def groups_of(self, kind_of: tuple[int, ...]) -> Groups:
        """Distinct groups of rows that a layer's links have, and which each layer's are."""
        if kind_of not in self._groups:
            self._groups[kind_of] = self._grouped(kind_of)
        return self._groups[kind_of]

    def _grouped(self, kind_of: tuple[int, ...]) -> Groups:
        kinds = [tuple(kind_of[i] for i in group) for group in self.chain.groups]
        distinct = tuple(dict.fromkeys(kinds))
        where = {group: i for i, group in enumerate(distinct)}
        return distinct, tuple(where[group] for group in kinds)

    def work(self, axes: Axes, is_layer: bool) -> Work:
        if is_layer not in self._works:
            batch, cp = np.asarray(self.points, dtype=np.float64).T
            self._works[is_layer] = Work(
                micro_batch=batch, cp=cp, local_seq=self.workload.seq_len / cp,
                axes=axes, cluster=self.network, kernels=self.kernels, engine=self.engine,
                precision=self.workload.precision, is_layer=is_layer,
                expert_imbalance=self.workload.expert_imbalance,
            )  # fmt: skip
        return self._works[is_layer].on(axes)

    def unit(
        self, unit: Unit, is_layer: bool, assignment: Assignment, d: Decisions
    ) -> tuple[UnitCost, ...]:
        """A unit at every point: alone, and what its experts and a shared sequence add."""
        axes = Axes(tp=d.tp, sequence_parallel=d.sequence_parallel, formats=d.formats)
        work = self.work(axes, is_layer)

        def once(
            make: Callable[..., UnitCost | None], changed: Axes, *more: object,
            kept: tuple[object, ...] = (),
        ) -> Any:  # fmt: skip
            key = (make, unit, is_layer, assignment, changed, *kept)
            if key not in self._units:
                given = (*more, *kept)
                self._units[key] = make(unit, assignment, work.on(changed), *given)
            return self._units[key]

        alone = once(unit_cost, axes)
        kept = dict(d.keep).get(unit.name) if (unit, is_layer) in self.layer_kinds else None
        if kept is not None:
            alone = once(kept_in_part, axes, alone, kept=(kept,))
        experts = once(expert_cost, replace(axes, ep=d.ep, etp=d.etp), alone)
        context = once(context_cost, replace(axes, cp_kind=d.cp_kind), alone)
        return tuple(cost for cost in (alone, experts, context) if cost is not None)

    def step(self, d: Decisions, assignments: Assignments) -> Step:
        """Every row of a mesh, its (micro-batch, cp) one of `points`."""
        if d.below is None:
            rows = self._rows(d, assignments)
        else:  # a second row of each kind, for layers whose state lies below
            above, below = (self._rows(d.with_state(x), assignments) for x in (False, True))
            rows = (*above, *below)
        glue = self.chain.glue
        whole = replicated(glue, d.tp)
        sent = self.boundary_bytes(d)
        found = Step(
            chain=self.chain, decisions=d, rows=rows, kinds=self.kind_of,
            glue=self._row(d, glue, False, frozenset(), whole), p2p_bytes=sent,
            p2p_ps=ps(self.send_s(d, sum(sent))) if d.pp > 1 else 0,
            slow_sends=self.slow_sends(d, sum(sent)),
            reserved=reserved_of(self.graph, d, self.engine, sum(sent)),
            fragmentation=self.engine.fragmentation,
        )  # fmt: skip
        return found if d.below is None else self.lowered(found, d)

    def _rows(self, d: Decisions, assignments: Assignments) -> tuple[Row, ...]:
        """A row of each of `kinds`."""
        return tuple(
            self._row(d, unit, is_layer, earlier, assignments[unit, is_layer])
            for unit, is_layer, earlier in self.kinds
        )

    def kept_otherwise(self, step: Step, d: Decisions, assignments: Assignments) -> Step:
        """The step of a mesh whose layers keep something else in part."""
        rows = list(step.rows)
        for i in range(len(rows)):
            unit, is_layer, _ = self.kinds[i % len(self.kinds)]
            if (unit, is_layer) in self.layer_kinds:
                cost = self.at(d, unit, is_layer, assignments[unit, is_layer])
                rows[i] = replace(
                    rows[i], again_ps=cost.again_ps, kept=cost.kept, working=cost.working
                )
        return replace(step, decisions=d, rows=tuple(rows))

    def rescheduled(self, step: Step, d: Decisions) -> Step:
        """The step of another schedule of the same mesh: what a rank receives is reserved anew, and
        what the ends share is sent, or is not where they now are on one rank."""
        reserved = reserved_of(self.graph, d, self.engine, sum(step.p2p_bytes))
        sends = _ends_apart(d) - _ends_apart(step.decisions)
        rows = step.rows
        if sends and any(row.copied for row in rows):
            rows = tuple(
                replace(row, floor_ps=row.floor_ps + sends * self._copies_ps(d, row.copied))
                for row in rows
            )
        return replace(step, decisions=d, reserved=reserved, rows=rows)

    def boundary_bytes(self, d: Decisions) -> tuple[int, ...]:
        """Bytes of each value that one micro-batch sends from a stage to the next: the widest
        layer's results."""
        found: list[tuple[int, ...]] = [()]
        for unit in dict.fromkeys(k.unit for k in self.chain.links if k.is_layer):
            if d.pp > 1:
                learns = learns_of(unit)
                found.append(tuple(
                    int(unit.values[r].nbytes(d.micro_batch, self.workload.seq_len // d.cp))
                    // (d.tp if self.engine.p2p_scatter
                        or boundary(unit.values[r], d.sequence_parallel and learns[r]) >= 0
                        else 1)
                    for r in unit.outputs
                ))  # fmt: skip
        return max(found, key=sum)

    def at(self, d: Decisions, unit: Unit, is_layer: bool, a: Assignment) -> Point:
        """A unit at the mesh's point."""
        key = (unit, is_layer, a, d.sequence_parallel, d.cp_kind, d.ep, d.etp, d.micro_batch, d.cp,
               d.formats, dict(d.keep).get(unit.name))  # fmt: skip
        if key not in self._points:
            self._points[key] = at_point(self.unit(unit, is_layer, a, d), self.point(d))
        return self._points[key]

    def point(self, d: Decisions) -> int:
        """Which point a mesh's micro-batch and cp are."""
        return self.points.index((d.micro_batch, d.cp))

    def _row(
        self, d: Decisions, unit: Unit, is_layer: bool, earlier: frozenset[str], a: Assignment
    ) -> Row:
        if (unit, is_layer) in self.layer_kinds:
            return self._made_row(d, unit, is_layer, earlier, a)
        # what no pipeline divides is alike whatever layers keep or move, which is asked in a row
        tiers = tuple(dict.fromkeys(d.tiers.values())) if "optimizer" in d.tiers else ()
        same = _OF_ENDS(d), tuple(way for way in d.offload if way[0] != "activations"), tiers
        if same not in self._ends and len(self._ends) >= MOST_ENDS:
            self._ends.clear()
        rows = self._ends.setdefault(same, {})
        key = unit, is_layer, earlier, a
        if key not in rows:
            rows[key] = self._made_row(d, *key)
        return rows[key]

    def _made_row(
        self, d: Decisions, unit: Unit, is_layer: bool, earlier: frozenset[str], a: Assignment
    ) -> Row:
        cost = self.at(d, unit, is_layer, a)
        parameters = held(unit, a, d.ep, d.etp)
        if d.pp == 1:  # what an earlier link holds is on this rank already
            parameters = tuple(h for h in parameters if h.name not in earlier)
        state = state_of(parameters, d, self.workload, self.engine)
        layer = (unit, is_layer) in self.layer_kinds
        beside = self._exposed(d, state, cost, layer)
        tail = self._tail(d, state, cost)
        copied = tuple(
            (h.name, MASTER_BYTES * state_of((h,), d, self.workload, self.engine).shard)
            for h in parameters if h.name in earlier
        )  # fmt: skip
        if _ends_apart(d):
            tail["floor_ps"] += self._copies_ps(d, copied)
        kept, working, aside = cost.kept, cost.working, (0, 0, 0)
        moves, counted = layer and "activations" in d.tiers, d.moved is not None
        if moves and not counted:  # two layers' are on the device at once
            kept, aside = (0, 0, 0), kept
            working = (
                working[0] + 2 * cost.kept[0], working[1] + 2 * cost.kept[1],
                working[2] + 2 * cost.kept[2],
            )  # fmt: skip
        forward, backward = (
            (*parts[:-2], ps(beside.parameters[way]), ps(beside.data[way]))
            for way, parts in enumerate((cost.forward, cost.backward))
        )
        row = Row(
            forward=forward, backward=backward, weight_ps=cost.weight_ps, again_ps=cost.again_ps,
            moved=tuple((0, 0) if counted else (ps(f), ps(b)) for f, b in beside.activations),
            kept=kept, working=working, state=state,
            is_loss=_has_loss(unit), flop=cost.flop,
            model_flop=cost.model_flop, traffic=cost.traffic, copied=copied, aside=aside,
            below=below_bytes(self.engine, self.workload, d, state), **tail,
        )  # fmt: skip
        return by_count(row, kept[0], beside.activations[0]) if moves and counted else row

    def _copies_ps(self, d: Decisions, copied: tuple[tuple[str, int], ...]) -> int:
        """Gradients of what the first stage holds too, sent there once a step."""
        return ps(sum(self.send_s(d, size, back=True) for _, size in copied))

    def counted(self, step: Step, d: Decisions, assignments: Assignments) -> Step:
        """The step of the same mesh and state with activations offloaded by count of layers."""
        rows = []
        for i, row in enumerate(step.rows):
            unit, is_layer, _ = self.kinds[i % len(self.kinds)]
            if (unit, is_layer) in self.layer_kinds:
                cost = self.at(d, unit, is_layer, assignments[unit, is_layer])
                of = d if d.below is None else d.with_state(i >= len(self.kinds))
                moved = self._exposed(of, row.state, cost, True).activations[0]
                row = by_count(row, cost.kept[0], moved)
            rows.append(row)
        return replace(step, decisions=d, rows=tuple(rows))

    def lowered(self, step: Step, d: Decisions) -> Step:
        """The step of the same mesh with another count of layers whose optimizer lies below."""
        low, half = layers_below(self.chain, d), len(self.kinds)
        kinds = tuple(k + half * (i in low) for i, k in enumerate(self.kind_of))
        return replace(step, decisions=d, kinds=kinds)

    # --- data parallelism --------------------------------------------------------------------

    def transfers(self, d: Decisions, state: State, kind: str, item_bytes: int) -> float:
        """Seconds to gather or reduce a unit's local parameters, dense and expert, once."""
        key = (d.tp, d.cp, d.dp, d.ep, d.etp, d.shard, d.dp_outer, d.pp, state.dense,
               state.expert, kind, item_bytes)  # fmt: skip
        if key not in self._fsdp:
            total = 0.0
            for elements, expert in ((state.dense, False), (state.expert, True)):
                ranks = ranks_of(d, expert)
                over = ranks.sharing
                if kind == "all_reduce_replicas":
                    over = ranks.replicating
                    elements = -(-elements // ranks.shard)
                elif kind == "all_reduce":
                    over = ranks.all
                name = "all_reduce" if kind.startswith("all_reduce") else kind
                total += float(collective_s(self.network, name, elements * item_bytes, *over))
            self._fsdp[key] = total
        return self._fsdp[key]

    def send_s(self, d: Decisions, size_bytes: int, *, back: bool = False) -> float:
        """Seconds to send that from a pipeline rank to the next, or from the last to the first
        (back): where the network has several levels, over the innermost boundary."""
        if len(self.cluster.levels) > 1 and d.pp > 1:
            crossed = self._boundaries(d)
            levels = crossed[-1] if back else min(crossed)
            return float(send_form(self.network, levels, d.pipeline // d.pp).at(_one(size_bytes)))
        return float(collective_s(self.network, "p2p", size_bytes, 2, d.pipeline // d.pp))

    def _boundaries(self, d: Decisions) -> tuple[int, ...]:
        """Levels that sends from each pipeline rank to the next cross; at last, to the first."""
        return boundary_levels(self.network, d.pp, d.pipeline // d.pp, d.dp_outer)

    def slow_sends(self, d: Decisions, size_bytes: int) -> tuple[tuple[int, int], ...]:
        """Of each boundary of `_boundaries`, picoseconds that a send takes longer than `send_s`,
        and for how long it keeps the boundary's links; empty where all boundaries are alike."""
        crossed = self._boundaries(d) if d.pp > 1 and len(self.cluster.levels) > 1 else ()
        if len(set(crossed)) < 2:
            return ()
        least, found = self.send_s(d, size_bytes), []
        for levels in crossed:
            form = send_form(self.network, levels, d.pipeline // d.pp)
            more = float(form.at(_one(size_bytes))) - least
            found.append((ps(more), ps(size_bytes * form.s_per_byte)) if more > 0 else (0, 0))
        return tuple(found)

    def summed(self, d: Decisions, state: State) -> tuple[tuple[int, int], ...]:
        """(bytes, times a step) of the sums over tp of gradients of parameters that are whole
        there: FSDP2 sums each one's before it reduces it, as it was computed or accumulated;
        others sum all at once, once a step."""
        mode, (compute, grad) = mode_of(d, self.engine), self.formats(d)
        if d.tp == 1 or not state.summed:
            return ()
        if not in_torch(mode):
            return ((sum(state.summed) * grad, 1),)
        each = bool(mode.reduce_per_microbatch)
        alone = d.microbatches == 1 and d.pp == 1  # a pipeline accumulates, be it a single one
        item = compute if each or alone else grad
        return tuple((n * item, d.microbatches if each else 1) for n in state.summed)

    def summed_s(self, d: Decisions, state: State) -> float:
        """Seconds a step of these sums."""
        return sum(times * self._sum_s(size, d.tp) for size, times in self.summed(d, state))

    def _update_s(self, parameters: int) -> float:
        """Seconds of an update of so many on the device."""
        if parameters not in self._updates:
            each = update_bytes(self.workload.optimizer, self.engine.optimizer_bytes_per_parameter)
            self._updates[parameters] = float(self.kernels.memory_bound_s(each * parameters))
        return self._updates[parameters]

    def _sum_s(self, size_bytes: int, tp: int) -> float:
        if (size_bytes, tp) not in self._sums:
            takes = collective_s(self.network, "all_reduce", size_bytes, tp, 1)
            self._sums[size_bytes, tp] = float(takes)
        return self._sums[size_bytes, tp]

    def formats(self, d: Decisions) -> tuple[int, int]:
        """Bytes of a gathered parameter and of a reduced gradient."""
        return (
            COMPUTE_BYTES[self.workload.precision], grad_bytes(d, self.workload, self.engine)
        )  # fmt: skip

    def _exposed(
        self, d: Decisions, state: State, cost: Point, is_layer: bool
    ) -> Exposed:
        """What prefetched gathers and reductions, and copies over the host link, add to a
        micro-batch."""
        mode = mode_of(d, self.engine)
        compute, grad = self.formats(d)
        data, cluster = (0.0, 0.0), self.cluster
        if mode.gather_per_microbatch or mode.reduce_per_microbatch:
            gather = reduce = 0.0
            if mode.gather_per_microbatch:
                gather = self.transfers(d, state, "all_gather", compute)
            if mode.reduce_per_microbatch:
                reduce = self.transfers(d, state, "reduce_scatter", grad)
                if not d.shares:  # those of other parts run other numbers of micro-batches
                    reduce += self.transfers(d, state, "all_reduce_replicas", grad)
            data = (
                gather * (mode.gather_per_microbatch >= 1),
                gather * (mode.gather_per_microbatch >= 2) + reduce * mode.reduce_per_microbatch,
            )
        moves = is_layer and "activations" in d.tiers
        return exposed_s(
            data, parameter_copies_s(cluster, self.engine, d, state),
            tuple([activation_copies_s(cluster, d.tiers["activations"], k) for k in cost.kept])
            if moves else (),
            cost.kernels_s, self.engine.fsdp_interference,
        )  # fmt: skip

    def _tail(
        self, d: Decisions, state: State, cost: Point
    ) -> dict[str, int]:
        """Per step: gradients reduced and parameters gathered once, the optimizer, offload."""
        mode, engine = mode_of(d, self.engine), self.engine
        compute, grad = self.formats(d)
        reduce, gather = (
            sum(times * self.transfers(d, state, kind, size) for times, kind, size in rows if times)
            for rows in (
                ((mode.reduce_per_step, "reduce_scatter", grad),
                 (replica_sums(mode, d)[1], "all_reduce_replicas", grad),
                 (mode.all_reduce_per_step, "all_reduce", grad)),
                ((mode.gather_per_step, "all_gather", compute),),
            )
        )  # fmt: skip
        summed = self.summed_s(d, state)
        busy = sum(cost.kernels_s)
        hide = (engine.dp_reduce_hidden if reduce else 0.0) * busy
        hide += (engine.dp_gather_hidden if gather else 0.0) * busy
        least = engine.dp_exposed_least
        own, offload = 0.0, 0.0
        if "optimizer" in dict(d.offload):
            offload = update_s(self.cluster, engine, self.workload, d, state)
            offload += float(self.kernels.memory_bound_s(0, update_kernels(engine, d, state)))
        else:
            own = self._update_s(state.updated)
        return {
            "tail_comm_ps": ps((1 - least) * (reduce + gather)), "tail_hide_ps": ps(hide),
            "floor_ps": ps(least * (reduce + gather) + summed), "optimizer_ps": ps(own),
            "offload_ps": ps(offload),
        }  # fmt: skip


def _one(size_bytes: int) -> Floats:
    return np.asarray(size_bytes, dtype=np.float64)


@functools.cache
def _has_loss(unit: Unit) -> bool:
    return any(n.op == "cross_entropy" for n in unit.nodes)


@functools.cache
def replicated(unit: Unit, tp: int) -> Assignment:
    """Every op whole on every tp rank."""
    return Assignment(
        ways=tp, sequence_parallel=False, chosen=tuple(o[0] for o in options(unit, 1).values())
    )


__all__ = ["Assignments", "Costs", "PARTS", "Row", "Step", "ps", "replicated"]


def _ends_apart(d: Decisions) -> bool:
    """Whether the last stage lies on another rank than the first: on a V they share one."""
    return rank_of(d.schedule, d.pp, 0) != rank_of(d.schedule, d.pp, d.pp * d.virtual_stages - 1)
