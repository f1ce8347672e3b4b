"""Goodput: what is left of a job's time after checkpoints, failures and what they undo.

Failures are a Poisson process of mean time M between them. A job that works tau seconds, then
writes a checkpoint for delta seconds, and after a failure restarts for R seconds and works from the
last checkpoint again, does useful work in the share

    tau / (M exp(R/M) (exp((tau + delta) / M) - 1))

of its time (Daly, A higher order estimate of the optimum checkpoint interval, 2006, equation 13:
failures during writing and restarting included). Its best tau solves 1 - tau/M =
exp(-(tau + delta)/M); Young's sqrt(2 delta M) (1974) is the first term of that.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cost_models.decisions import Decisions, Workload
from cost_models.engines import load_engine
from cost_models.fleet import Hardware, used_parts
from cost_models.hardware import Cluster
from cost_models.ledger import Estimate
from cost_models.operations import Operations
from cost_models.state import COMPUTE_BYTES, MASTER_BYTES, Held, moment_bytes
from cost_models.tiers import Tier
from ir.graph import Graph, Tensor

NEWTON_STEPS = 100  # at most; some 10 are needed


def best_interval_s(write_s: float, mtbf_s: float) -> float:
    """Work between checkpoints that leaves the most useful time: Daly's optimum, solved.

    Newton from tau = M, where the convex 1 - x = exp(-x - write_s / M) is approached from above.
    """
    if not write_s:
        return 0.0
    if math.isinf(mtbf_s):
        return math.inf
    written, x = write_s / mtbf_s, 1.0
    for _ in range(NEWTON_STEPS):
        less = -math.expm1(-x - written)
        step = (x - less) / less if less else 0.0
        x = max(0.0, x - step)
        if abs(step) <= 1e-15 * x:
            break
    return x * mtbf_s


def useful_share(interval_s: float, write_s: float, restart_s: float, mtbf_s: float) -> float:
    """The share of the time in which work is done that is kept; 1 where nothing fails."""
    if math.isinf(mtbf_s):
        return 1.0 if math.isinf(interval_s) else interval_s / (interval_s + write_s)
    work, lost = interval_s / mtbf_s, (interval_s + write_s) / mtbf_s
    if lost > 700 or restart_s / mtbf_s > 700:  # exp() ends there: nothing is ever finished
        return 0.0
    grown = math.expm1(lost)
    return math.exp(-restart_s / mtbf_s) * (work / grown if grown else 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """A job whose checkpoints lie on one tier: seconds, bytes, and the useful share.

    interval_s: of work between checkpoints, infinite where nothing fails. node_bytes: what the
    busiest node writes; read_bytes: what it reads to go on.
    """

    tier: str
    checkpoint_bytes: int
    node_bytes: int
    read_bytes: int
    write_s: float
    restart_s: float
    mtbf_s: float
    interval_s: float
    useful: float


def goodput(
    graph: Graph,
    hardware: Hardware,
    workload: Workload,
    d: Decisions,
    estimate: Estimate,
    operations: Operations,
) -> tuple[Goodput, ...]:
    """The job on every tier that holds its checkpoint, in the hardware file's order.

    Training waits while a checkpoint is written; restarting is `operations.restart_s` and reading.
    On several kinds of GPUs any that is used stops them all, a tier is one that all parts have, and
    the part whose busiest node takes longest is waited for.
    """
    parts, whole = used_parts(hardware, d), checkpoint_bytes(graph, workload)
    nodes = [math.ceil(n) for n in _node_bytes(whole, parts, d, estimate)]
    copies = d.dp * d.cp // (d.shard if d.zero else 1)
    mtbf_s, found = _mtbf_s(parts, operations), []
    for tiers in _tiers_of(parts):
        if any(size > tier.bytes for size, tier in zip(nodes, tiers)):
            continue
        write_s = max(
            size / _through(part, tier.write_bytes_per_s)
            for part, size, tier in zip(parts, nodes, tiers)
        )
        read_s = max(
            size * copies / _through(part, tier.read_bytes_per_s)
            for part, size, tier in zip(parts, nodes, tiers)
        )
        interval_s, restart_s = best_interval_s(write_s, mtbf_s), operations.restart_s + read_s
        found.append(
            Goodput(
                tier=tiers[0].name, checkpoint_bytes=whole, node_bytes=max(nodes),
                read_bytes=max(nodes) * copies, write_s=write_s, restart_s=restart_s,
                mtbf_s=mtbf_s, interval_s=interval_s,
                useful=useful_share(interval_s, write_s, restart_s, mtbf_s),
            )
        )  # fmt: skip
    return tuple(found)


def most_useful(
    graph: Graph, parts: Sequence[Cluster], workload: Workload, operations: Operations
) -> float:
    """The share of the time that no plan on all GPUs of these parts exceeds.

    Every byte of a checkpoint is written by a node, and read by one: no sooner than all nodes
    together do. A plan whose checkpoint no tier holds is counted without failures, so it is 1
    where that can be.
    """
    whole, mtbf_s = checkpoint_bytes(graph, workload), _mtbf_s(parts, operations)
    found, held = [], False
    for tiers in _tiers_of(parts):
        if operations.tier not in ("", tiers[0].name):
            continue
        held = held or all(tier.bytes >= whole for tier in tiers)
        write, read = (
            sum(p.nodes * _through(p, rate) for p, rate in zip(parts, rates))
            for rates in ([t.write_bytes_per_s for t in tiers],
                          [t.read_bytes_per_s for t in tiers])
        )  # fmt: skip
        interval_s = best_interval_s(whole / write, mtbf_s)
        restart_s = operations.restart_s + whole / read
        found.append(useful_share(interval_s, whole / write, restart_s, mtbf_s))
    return max(found) if held else 1.0


def _mtbf_s(parts: Sequence[Cluster], operations: Operations) -> float:
    per_s = operations.interruptions_per_s(sum(part.count for part in parts))
    return 1 / per_s if per_s else math.inf


def _tiers_of(parts: Sequence[Cluster]) -> tuple[tuple[Tier, ...], ...]:
    """Each tier that all parts have, as each has it; in the order of the first part's file."""
    named = [{tier.name: tier for tier in part.tiers} for part in parts]
    return tuple(
        tuple(tiers[name] for tiers in named) for name in named[0]
        if all(name in tiers for tiers in named)
    )  # fmt: skip


def chosen(
    rows: tuple[Goodput, ...], parts: Sequence[Cluster], operations: Operations
) -> Goodput | None:
    """The tier that the job is counted on: the one named, else the last; None where none can.

    Raises UsageError for a name that a part does not have.
    """
    if not operations.tier:
        return rows[-1] if rows else None
    for part in parts:
        part.tier(operations.tier)
    return next((row for row in rows if row.tier == operations.tier), None)


def _through(cluster: Cluster, tier_bytes_per_s: float) -> float:
    """A node's bytes a second to or from a tier: the tier's, or its devices' links together."""
    links = _node_gpus(cluster) * cluster.uplink_bytes_per_s()
    return min(tier_bytes_per_s, links)


def _node_gpus(cluster: Cluster) -> int:
    return min(cluster.node_size, cluster.count)


def checkpoint_bytes(graph: Graph, workload: Workload) -> int:
    """What a checkpoint holds, in bytes: parameters as they are updated, each once, and moments.

    A frozen parameter has no moments. Buffers and the optimizer's counters are left out.
    """
    engine = load_engine(workload.engine)
    compute = COMPUTE_BYTES[workload.precision]
    own = MASTER_BYTES if workload.precision == "fp32" else engine.master_bytes or compute
    total = 0
    for p in graph.parameters.values():
        rows, *others = [int(n) for n in p.tensor.sizes(1, 1)] or [1]
        h = Held(name=p.name, rows=rows, row_elements=math.prod(others), expert=False)
        total += own * h.elements
        if p.kind != "frozen":
            total += moment_bytes(h, h.elements, workload, engine)
    return total


def _node_bytes(
    whole: int, parts: Sequence[Cluster], d: Decisions, e: Estimate
) -> tuple[float, ...]:
    """Bytes of the checkpoint that the busiest node of each part writes: each pp rank's parameters
    are written by its GPUs in equal parts, and GPUs go in the order of ranks, node by node."""
    held = [rank.parameters for rank in e.ranks[: d.pp]]  # of replicas on parts, all hold all
    wide = [d.dp * d.cp * tp for tp in d.tp_of_rank] if d.tp_by_part else [d.gpus // d.pp] * d.pp
    starts = [0, *itertools.accumulate(wide)]

    def before(gpu: int) -> float:
        """Parameters, as one pp rank counts them, of all GPUs before this one."""
        full = bisect.bisect_right(starts, gpu) - 1
        rest = gpu - starts[full]
        return sum(held[:full]) + (held[full] * rest / wide[full] if rest else 0.0)

    found, first = [], 0
    for part in parts:
        node, end = _node_gpus(part), first + part.count
        edges = {first + k * node for k in range(part.nodes)}
        if part.nodes > 2 * d.pp:  # inside a pp rank nodes are alike: those around its ends do
            ends = {(at - first) // node * node + first for at in starts}
            edges &= {at + by * node for at in ends for by in (-1, 0, 1)}
        most = max(before(min(at + node, end)) - before(at) for at in sorted(edges))
        found.append(whole * most / sum(held))
        first = end
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the busiest node reads of the data: bytes a second, and the share of what its storage
    gives; no share where the hardware file has no tier."""

    node_bytes_per_s: float
    sample_bytes: float
    tier: str
    share: float | None

    @property
    def waits(self) -> float:
        """Times as long a step takes as storage gives its samples: 1 where it is quick enough."""
        return max(1.0, self.share or 0.0)


def inputs(
    graph: Graph,
    hardware: Hardware,
    workload: Workload,
    d: Decisions,
    step_s: float,
    operations: Operations,
) -> Inputs:
    """The rate at which a node of the first stage reads samples: each of its data ranks its own,
    tp and cp ranks of one node together; where parts have replicas of their own, the part that has
    least to spare. Raises UsageError for a tier the hardware lacks."""
    parts = used_parts(hardware, d)
    values = dict(graph.root.inputs)
    read = [x for name, x in values.items() if not _is_shifted(name, x, values)]
    sample = operations.sample_bytes or float(sum(x.nbytes(1, workload.seq_len) for x in read))
    each = [workload.global_batch / d.dp]
    if d.shares:
        each = [float(share.microbatches * d.micro_batch) for share in d.shares]
    ranks = [share.dp for share in d.shares] or [d.dp]
    wide = d.cp * (d.tp_of_rank[0] if d.tp_by_part else d.tp)
    rows = []
    for part, dp, samples in zip(parts, ranks, each):
        tier = part.tier(operations.tier) if operations.tier else next(
            iter(part.tiers[-1:]), None
        )  # fmt: skip
        rate = min(dp, max(1, _node_gpus(part) // wide)) * samples * sample / step_s
        rows.append(Inputs(
            node_bytes_per_s=rate, sample_bytes=sample, tier=tier.name if tier else "",
            share=rate / tier.read_bytes_per_s if tier else None,
        ))  # fmt: skip
    return max(rows, key=lambda row: (row.share or 0.0, row.node_bytes_per_s))


def _is_shifted(name: str, x: Tensor, values: Mapping[str, Tensor]) -> bool:
    """Whether targets are an input's own tokens, the next ones: stored once."""
    others = [v for other, v in values.items() if not other.startswith("targets")]
    return name.startswith("targets") and x.dtype.startswith("i") and x in others
