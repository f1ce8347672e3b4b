"""Training state: parameters, gradients and optimizer state of a rank, and what lies beside them.

What a ZeRO stage means is the engine's table; here are the bytes. With 16-bit compute there is a
16-bit copy of the parameters wherever they are whole, and fp32 parameters (the optimizer's
master) wherever the optimizer is; stages that hold parameters sharded hold the master alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod

from cost_models.decisions import Decisions, Workload
from cost_models.engines import Engine, ZeroMode
from cost_models.layout import PARTIAL, Assignment, expert_parameters, produced
from ir.errors import UsageError
from ir.graph import Graph, Unit

COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "nvfp4": 2}
GRAD_BYTES = {"fp32": 4, "bf16": 2}
MASTER_BYTES = 4
# bytes a parameter besides the master: Adam's two fp32 moments; SGD's and Muon's fp32 momentum;
# 8-bit Adam's two bytes and a 4-byte scale for each block of 256, twice (Dettmers et al. 2022)
MOMENT_BYTES = {"adamw": 8.0, "sgd": 4.0, "muon": 4.0, "adamw8bit": 2.0 + 8.0 / 256}
OPTIMIZERS = (*MOMENT_BYTES, "adafactor")
# bytes an update reads and writes besides AdamW's: its moments are read and written (2 * 8), so
# an optimizer with fewer bytes of moments moves twice as many fewer
ADAMW_MOMENT_BYTES = 8.0


def grad_bytes(d: Decisions, workload: Workload, engine: Engine) -> int:
    """Bytes of a gradient as it is accumulated and reduced."""
    if workload.precision == "fp32":
        return 4
    decided = GRAD_BYTES[d.grad_dtype]
    return min(decided, engine.fp16_grad_bytes) if workload.precision == "fp16" else decided


def update_bytes(optimizer: str, adamw_bytes: float) -> float:
    """Bytes moved a parameter by one update; adamw_bytes: the engine's measured figure of AdamW.

    Adafactor's factored moments are small beside the parameters. Muon's orthogonalisation
    (matmuls) is not in it.
    """
    return adamw_bytes - 2 * (ADAMW_MOMENT_BYTES - MOMENT_BYTES.get(optimizer, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One parameter on one rank before data-parallel sharding: rows, and elements a row.

    summed: it is whole on every tp rank and its gradient a partial sum there, as a norm's weight
    under sequence parallelism is.
    """

    name: str
    rows: int
    row_elements: int
    expert: bool
    summed: bool = False
    frozen: bool = False

    @property
    def elements(self) -> int:
        return self.rows * self.row_elements


@functools.cache
def held(unit: Unit, assignment: Assignment, ep: int, etp: int) -> tuple[Held, ...]:
    """What one rank holds of a unit's parameters: split on tp, or over ep and etp."""
    at, experts = produced(unit, assignment), expert_parameters(unit)
    partial = {
        r for n, o in zip(unit.nodes, assignment.chosen) for r, g in zip(n.inputs, o.grads)
        if g == PARTIAL
    }  # fmt: skip
    found = []
    for p in unit.parameters:
        if p.kind == "buffer":
            continue
        sizes = [int(d) for d in p.tensor.sizes(1, 1)]
        if p.name in experts:
            sizes[0] //= ep
            sizes[-1] = -(-sizes[-1] // etp)
        elif at[p.name] >= 0:
            sizes[at[p.name]] //= assignment.ways
        rows = sizes[0] if sizes else 1
        found.append(
            Held(
                name=p.name, rows=rows, row_elements=prod(sizes[1:]), expert=p.name in experts,
                summed=p.name in partial and p.name not in experts and at[p.name] < 0,
                frozen=p.kind == "frozen",
            )
        )  # fmt: skip
    return tuple(found)


Layout = tuple[int, int, tuple[int, int]]  # (ranks, stride, (times, apart)) of `Cluster.shape`


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """How many ranks share a parameter's state, and how many groups repeat that.

    stride: between ranks of a group, one behind the other inside a pipeline's part of the
    cluster; near: data ranks in one such part, parts being `part` ranks.
    """

    shard: int
    replicas: int
    stride: int
    near: int
    part: int

    @property
    def sharing(self) -> Layout:
        """The ranks that share a shard, as collectives take them."""
        return _spread(self.shard, 1, self)

    @property
    def replicating(self) -> Layout:
        """The ranks that hold the same shard."""
        return _spread(self.replicas, self.shard, self)

    @property
    def all(self) -> Layout:
        """All data ranks."""
        return _spread(self.shard * self.replicas, 1, self)


def _spread(size: int, apart: int, ranks: Ranks) -> Layout:
    """`size` data ranks, each `apart` behind the other, over the parts of the cluster."""
    inside = max(1, min(size, ranks.near // apart))
    step = max(1, apart // ranks.near)  # parts between neighbours where a shard has whole parts
    return inside, ranks.stride * min(apart, ranks.near), (size // inside, ranks.part * step)


def ranks_of(d: Decisions, expert: bool) -> Ranks:
    """The sharding group of dense or expert parameters. `shard` counts dp * cp ranks; under
    ZeRO-0 no state is shared, of experts either, whose data ranks are others."""
    if expert:
        stride = d.ep * d.etp
        whole = d.shard >= d.dp * d.cp
        size = d.edp if whole else max(1, min(d.edp, d.shard * d.tp // stride))
        size = size if d.zero else 1
        near = max(1, d.edp // d.dp_outer)
        size = next(
            k for k in range(size, 0, -1) if d.edp % k == 0 and (near % k == 0 or k % near == 0)
        )
        return Ranks(
            shard=size, replicas=d.edp // size, stride=stride, near=near, part=d.pipeline
        )
    return Ranks(
        shard=d.shard, replicas=d.dp * d.cp // d.shard, stride=d.tp,
        near=max(1, d.dp // d.dp_outer) * d.cp, part=d.pipeline,
    )  # fmt: skip


def mode_of(d: Decisions, engine: Engine) -> ZeroMode:
    """The engine's row for the decided ZeRO stage."""
    return engine.zero_mode(d.zero, reshard=d.reshard, pp=d.pp)


def replica_sums(mode: ZeroMode, d: Decisions) -> tuple[int, int]:
    """All-reduces among those that hold the same shard: (of each micro-batch, of each step). Parts
    with replicas of their own run other numbers of micro-batches: there it is one a step."""
    if d.shares:
        return 0, int(mode.reduce_per_microbatch + mode.reduce_per_step > 0)
    return mode.reduce_per_microbatch, mode.reduce_per_step


def in_torch(mode: ZeroMode) -> bool:
    """Whether FSDP2 holds the state, as it does under every ZeRO stage of torch's engines."""
    return mode.call.startswith(("fully_shard", "replicate"))


def _shard(h: Held, shard: int, by_rows: bool) -> int:
    """Elements of the fullest rank: whole rows where FSDP2 splits rows, else a flat share."""
    if by_rows:
        return -(-h.rows // shard) * h.row_elements
    return -(-h.elements // shard)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Bytes of a unit's state on a rank at the peak; gathered_bytes: one unit's transient whole
    copies; elements: of its parameters before the data ranks share them; the same as they move
    between those, padded, dense and expert apart; of each dense one whose gradient is summed over
    tp; those that the optimizer updates; shard: this rank's share of all."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    gathered_bytes: int
    elements: int
    dense: int
    expert: int
    summed: tuple[int, ...]
    updated: int
    shard: int


def state_of(
    parameters: tuple[Held, ...], d: Decisions, workload: Workload, engine: Engine
) -> State:
    """Bytes by the mode's words: whole, shard, or units (sharded, two units whole beside).

    FSDP2 pads what it gathers to whole rows a rank, holds the gathered copy beside the fp32
    shard even in fp32, gives a reduced gradient its parameter's dtype, and keeps whole gradients
    only where micro-batches are accumulated. Where the optimizer is off the GPU, FSDP2's shards of
    parameters and gradients are there with it; what is to be gathered comes up in fp32. An
    engine's own copies of gradients are held where it holds gradients.
    """
    mode = mode_of(d, engine)
    fsdp = in_torch(mode)
    wide = workload.precision == "fp32"
    compute = COMPUTE_BYTES[workload.precision]
    grad = grad_bytes(d, workload, engine)
    copy = engine.gradient_copy_bytes if grad > compute else 0
    own_bytes = MASTER_BYTES if wide else engine.master_bytes or compute  # of what is updated
    master = 0 if (wide and not fsdp) or own_bytes < MASTER_BYTES else MASTER_BYTES
    offloaded, below = "optimizer" in dict(d.offload), "params" in dict(d.offload)
    accumulates = mode.gradients_peak == "whole" and (not fsdp or d.microbatches > 1 or d.pp > 1)
    whole, by_shard = mode.parameters_peak == "whole", mode.optimizer_at_rest == "shard"
    own = 0 if below else compute if wide or offloaded else own_bytes  # of a sharded parameter
    own_master = master if whole else 0
    reduces = 0 if below or (offloaded and fsdp) else own_bytes if fsdp else grad
    parameter = gradient = optimizer = gathered = updated = dense = expert = shard = elements = 0
    over = {expert: ranks_of(d, expert).shard for expert in {h.expert for h in parameters}}
    for h in parameters:
        size, ranks = h.elements, over[h.expert]
        piece = _shard(h, ranks, fsdp)
        moved = piece * ranks if fsdp else size
        elements += size
        shard += piece
        if h.expert:
            expert += moved
        else:
            dense += moved
        if whole:
            parameter += compute * moved
        else:
            parameter += own * piece
            gathered += compute * moved
        if offloaded and fsdp:
            gathered += MASTER_BYTES * piece
        if h.frozen:
            continue  # no gradient, no optimizer
        reduced = reduces * piece
        gradient += max(grad * size, reduced) if accumulates else reduced
        gradient += copy * (size if accumulates else piece)
        if grad < MASTER_BYTES:
            gradient += engine.shard_gradient_bytes * piece
        if mode.gradients_peak == "units" or (not accumulates and (d.zero or not reduced)):
            gathered += grad * moved
        kept = piece if by_shard else size
        if not offloaded:
            optimizer += own_master * kept + moment_bytes(h, kept, workload, engine)
        updated += kept
    if engine.live_parameters:
        gathered = min(gathered, (compute + grad) * engine.live_parameters // 2)
    return State(
        parameter_bytes=parameter, gradient_bytes=gradient, optimizer_bytes=optimizer,
        gathered_bytes=gathered, elements=elements, dense=dense, expert=expert,
        summed=tuple([h.elements for h in parameters if h.summed]), updated=updated, shard=shard,
    )  # fmt: skip


def reserved_of(
    graph: Graph, d: Decisions, engine: Engine, sent_bytes: int
) -> tuple[tuple[str, int], ...]:
    """What a rank holds before the first micro-batch, by name; sent_bytes: of a micro-batch to the
    next stage. Where a pipeline receives each micro-batch in a buffer of its own, each way, those
    in flight are activations already. Cached blocks count as fragmentation.
    """
    groups = [d.tp, d.cp, d.dp * d.cp, d.pp, d.ep, d.etp]
    used = sum(n > 1 for n in groups)
    tables = sum(p.tensor.nbytes(1, 1) for p in graph.root.parameters if p.kind == "buffer")
    received = 2 * d.microbatches * d.virtual_stages - min(d.microbatches, d.pp)
    buffers = used * engine.comm_buffer_bytes
    buffers += engine.bucket_bytes if d.dp * d.cp > 1 else 0
    buffers += received * sent_bytes if engine.receives_apart else 0
    return (
        ("context", engine.context_bytes),
        ("workspace", engine.workspace_bytes + int(tables)),
        ("comm_buffers", buffers),
        ("fragmentation", engine.cached_bytes),
    )


def moment_bytes(h: Held, elements: int, workload: Workload, engine: Engine) -> int:
    """Bytes of the optimizer's moments of so many elements of a parameter."""
    optimizer = workload.optimizer
    if optimizer == "adafactor":  # row and column second moments in fp32, no first (Shazeer 2018)
        return 4 * (h.rows + h.row_elements)
    if optimizer not in MOMENT_BYTES:
        raise UsageError(f"unknown optimizer {optimizer!r}", why=f"known: {', '.join(OPTIMIZERS)}")
    share = 1.0 if workload.precision == "fp32" else engine.moment_share
    return int(-(-MOMENT_BYTES[optimizer] * share * elements // 1))
