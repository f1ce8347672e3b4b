"""What lies below the device: what moves over the host link for it, and how long that takes.

A GPU's link to its host is its own; the host's memory is shared by the node's GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.decisions import Decisions, Workload
from cost_models.engines import Engine
from cost_models.hardware import Cluster
from cost_models.state import (
    COMPUTE_BYTES,
    GRAD_BYTES,
    MASTER_BYTES,
    MOMENT_BYTES,
    State,
    in_torch,
    mode_of,
    update_bytes,
)

Pair = tuple[float, float]  # seconds, forward and backward


def host_s(cluster: Cluster, size_bytes: float, *, up: bool) -> float:
    """Seconds that bytes of every GPU of a node take from the host's memory (up), or to it."""
    memory = cluster.tier("cpu")
    share = (memory.read_bytes_per_s if up else memory.write_bytes_per_s) / _sharers(cluster)
    return size_bytes / min(cluster.device.host_link_bytes_per_s, share)


def parameter_copies_s(cluster: Cluster, engine: Engine, d: Decisions, state: State) -> Pair:
    """A unit's fp32 shards on their way up to be gathered, and its gradients' on their way down,
    each micro-batch."""
    if "params" not in dict(d.offload):
        return 0.0, 0.0
    mode = mode_of(d, engine)
    up = host_s(cluster, MASTER_BYTES * state.shard, up=True)
    down = host_s(cluster, MASTER_BYTES * state.updated, up=False)
    return (
        up * (mode.gather_per_microbatch >= 1),
        up * (mode.gather_per_microbatch >= 2) + down * mode.reduce_per_microbatch,
    )


def activation_copies_s(cluster: Cluster, kept_bytes: int) -> Pair:
    """What a layer keeps, on its way down in forward and up in backward."""
    return host_s(cluster, kept_bytes, up=False), host_s(cluster, kept_bytes, up=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposed:
    """Seconds that transfers add to one micro-batch of a layer, forward and backward: of the data
    ranks, of parameters on the host link, and of activations by recomputation level."""

    data: Pair
    parameters: Pair
    activations: tuple[Pair, Pair, Pair]


def exposed_s(
    data: Pair, copies: Pair, kept: tuple[Pair, ...], kernels: Pair, share: float
) -> Exposed:
    """What is left of transfers behind a layer's kernels: it takes max(kernels + share *
    transfers, transfers). The data ranks' come first, then parameters' copies, then activations',
    in streams beside each other that one link and one compute stream serve.

    kept: what activations' copies take, by level; full recomputation gives them forward's kernels
    to hide behind in backward.
    """

    def left(transfer: float, compute: float) -> float:
        return max(share * transfer, transfer - compute)

    alone = tuple(left(t, k) for t, k in zip(data, kernels))
    both = tuple(left(t + c, k) for t, c, k in zip(data, copies, kernels))
    levels = []
    for level, moves in enumerate(kept):
        again = kernels[0] if level == 2 else 0.0
        hides = (kernels[0], kernels[1] + again)
        levels.append(tuple(
            max(0.0, left(t + c + m, k) - b)
            for t, c, m, k, b in zip(data, copies, moves, hides, both)
        ))  # fmt: skip
    return Exposed(
        data=(alone[0], alone[1]), parameters=(both[0] - alone[0], both[1] - alone[1]),
        activations=(levels[0], levels[1], levels[2]),  # type: ignore[arg-type]
    )  # fmt: skip


def update_s(
    cluster: Cluster, engine: Engine, workload: Workload, d: Decisions, state: State
) -> float:
    """An update off the GPU, each step: gradients go down and parameters up the host link, if not
    each micro-batch; the host's memory, shared by the node's GPUs, does it; a disk is read and
    written besides."""
    mode, fsdp = mode_of(d, engine), in_torch(mode_of(d, engine))
    sharers, host = _sharers(cluster), cluster.tier("cpu")
    each = update_bytes(workload.optimizer, engine.optimizer_bytes_per_parameter)
    wide = workload.precision == "fp32"
    up = MASTER_BYTES if fsdp else COMPUTE_BYTES[workload.precision]
    down = MASTER_BYTES if fsdp or wide else GRAD_BYTES[d.grad_dtype]
    once = not ("params" in dict(d.offload) and mode.gather_per_microbatch)
    link = state.updated * (up + down) * once / cluster.device.host_link_bytes_per_s
    total = link + each * state.updated * sharers / host.read_bytes_per_s
    tier = dict(d.offload)["optimizer"]
    if tier == "cpu":
        return total
    disk = cluster.tier(tier)
    # FSDP2 keeps the fp32 parameters in memory, the moments alone are on the disk
    item = MOMENT_BYTES.get(workload.optimizer, 0.0) + (0 if fsdp else MASTER_BYTES)
    size = item * state.updated * sharers
    return total + size * (1 / disk.read_bytes_per_s + 1 / disk.write_bytes_per_s)


def _sharers(cluster: Cluster) -> int:
    return min(cluster.node_size, cluster.count)
