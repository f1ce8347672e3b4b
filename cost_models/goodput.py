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

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cost_models.decisions import Decisions, Workload
from cost_models.engines import load_engine
from cost_models.hardware import Cluster
from cost_models.ledger import Estimate
from cost_models.operations import Operations
from cost_models.state import COMPUTE_BYTES, MASTER_BYTES, Held, moment_bytes
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
    cluster: Cluster,
    workload: Workload,
    d: Decisions,
    estimate: Estimate,
    operations: Operations,
) -> tuple[Goodput, ...]:
    """The job on every tier that holds its checkpoint, in the hardware file's order.

    Training waits while a checkpoint is written; restarting is `operations.restart_s` and reading.
    """
    whole = checkpoint_bytes(graph, workload)
    node = _node_bytes(whole, cluster, d, estimate)
    copies = d.dp * d.cp // (d.shard if d.zero else 1)
    per_s = operations.interruptions_per_s(cluster.count)
    mtbf_s = 1 / per_s if per_s else math.inf
    found = []
    for tier in cluster.tiers:
        if node > tier.bytes:
            continue
        write_s, read_s = (
            size / _through(cluster, rate)
            for size, rate in ((node, tier.write_bytes_per_s),
                               (node * copies, tier.read_bytes_per_s))
        )  # fmt: skip
        interval_s, restart_s = best_interval_s(write_s, mtbf_s), operations.restart_s + read_s
        found.append(
            Goodput(
                tier=tier.name, checkpoint_bytes=whole, node_bytes=node,
                read_bytes=node * copies, write_s=write_s, restart_s=restart_s, mtbf_s=mtbf_s,
                interval_s=interval_s,
                useful=useful_share(interval_s, write_s, restart_s, mtbf_s),
            )
        )  # fmt: skip
    return tuple(found)


def chosen(rows: tuple[Goodput, ...], cluster: Cluster, operations: Operations) -> Goodput | None:
    """The tier that the job is counted on: the one named, else the last; None where none can.

    Raises UsageError for a name that the hardware does not have.
    """
    if not operations.tier:
        return rows[-1] if rows else None
    cluster.tier(operations.tier)
    return next((row for row in rows if row.tier == operations.tier), None)


def _through(cluster: Cluster, tier_bytes_per_s: float) -> float:
    """A node's bytes a second to or from a tier: the tier's, or its devices' links together."""
    links = min(cluster.node_size, cluster.count) * cluster.uplink_bytes_per_s()
    return min(tier_bytes_per_s, links)


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


def _node_bytes(whole: int, cluster: Cluster, d: Decisions, e: Estimate) -> int:
    """Bytes of the checkpoint that the busiest node writes: each pp rank's parameters are written
    by its GPUs in equal parts, and a node has `node_size` GPUs in order."""
    parts = [rank.parameters for rank in e.ranks]
    width, node = d.gpus // d.pp, min(cluster.node_size, cluster.count)

    def before(gpu: int) -> float:
        """Parameters, as one pp rank counts them, of all GPUs before this one."""
        full, rest = divmod(gpu, width)
        return sum(parts[:full]) + (parts[full] * rest / width if rest else 0.0)

    edges = {k * node for k in range(cluster.nodes)}
    if cluster.nodes > 2 * d.pp:  # inside a pp rank nodes are alike: those around its ends do
        ends = {r * width // node * node for r in range(d.pp + 1)}
        edges &= {end + by * node for end in ends for by in (-1, 0, 1)}
    most = max(before(min(at + node, d.gpus)) - before(at) for at in sorted(edges))
    return math.ceil(whole * most / sum(parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the busiest node reads of the data: bytes a second, and the share of what its storage
    gives; no share where the hardware file has no tier."""

    node_bytes_per_s: float
    sample_bytes: float
    tier: str
    share: float | None


def inputs(
    graph: Graph,
    cluster: Cluster,
    workload: Workload,
    d: Decisions,
    step_s: float,
    operations: Operations,
) -> Inputs:
    """The rate at which a node of the first stage reads samples: each of its data ranks its own,
    tp and cp ranks of one node together. Raises UsageError for a tier the hardware lacks."""
    tier = next(iter(cluster.tiers[-1:]), None)
    if operations.tier:
        tier = cluster.tier(operations.tier)
    values = dict(graph.root.inputs)
    read = [x for name, x in values.items() if not _is_shifted(name, x, values)]
    sample = operations.sample_bytes or float(sum(x.nbytes(1, workload.seq_len) for x in read))
    node = min(cluster.node_size, cluster.count)
    ranks = min(d.dp, max(1, node // (d.tp * d.cp)))
    rate = ranks * workload.global_batch / d.dp * sample / step_s
    return Inputs(
        node_bytes_per_s=rate, sample_bytes=sample, tier=tier.name if tier else "",
        share=rate / tier.read_bytes_per_s if tier else None,
    )  # fmt: skip


def _is_shifted(name: str, x: Tensor, values: Mapping[str, Tensor]) -> bool:
    """Whether targets are an input's own tokens, the next ones: stored once."""
    others = [v for other, v in values.items() if not other.startswith("targets")]
    return name.startswith("targets") and x.dtype.startswith("i") and x in others
