"""What lies below the device: what moves over the host link for it, and how long that takes.

A link to the host is shared by as many GPUs as the hardware file says (`uplink_gpus`), a tier by
those of a node, or by as many as its row says; all of them are taken to copy at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from cost_models.chain import Chain
from cost_models.decisions import Decisions, Workload
from cost_models.engines import Engine
from cost_models.hardware import Cluster
from cost_models.point import ps
from cost_models.stage_problem import starts_of
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
from cost_models.step_rows import Row
from cost_models.work import Floats

Pair = tuple[float, float]  # seconds, forward and backward
Size = TypeVar("Size", float, Floats)  # one number, or one a work point


def host_s(cluster: Cluster, size_bytes: Size, *, up: bool, tier: str = "cpu") -> Size:
    """Seconds that bytes of every GPU of a node take from a tier (up), or to it. Another tier than
    the host's memory is read and written through that, piece by piece: the slower of the two."""
    return size_bytes / copy_bytes_per_s(cluster, tier, up=up)


def copy_bytes_per_s(cluster: Cluster, tier: str, *, up: bool) -> float:
    """What one GPU gets of its link, the host's memory and the tier where all copy at once."""
    on_the_way = [cluster.tier(name) for name in dict.fromkeys(("cpu", tier))]
    shares = [
        (t.read_bytes_per_s if up else t.write_bytes_per_s) / cluster.sharers(t)
        for t in on_the_way
    ]
    return min(cluster.uplink_bytes_per_s(), *shares)


def host_note(cluster: Cluster) -> str:
    """What copies between GPUs and their host are taken to share, in words."""
    memory, link = cluster.tier("cpu"), cluster.uplink_bytes_per_s() / 1e9
    gpus = cluster.sharers(memory)
    rates = (memory.read_bytes_per_s / 1e9, memory.write_bytes_per_s / 1e9)
    total = " and ".join(f"{r:,.0f} GB/s {w}" for r, w in zip(rates, ("read", "written")))
    got = min(link, *(rate / gpus for rate in rates))
    uplink = min(cluster.uplink_gpus, cluster.count)
    behind = f"a link for {uplink} of them" if uplink > 1 else "a link each"
    return (f"host copies: all {gpus} GPUs of a node at once, {got:,.1f} GB/s each at least:"
            f" {behind}, its memory {total} for all")  # fmt: skip


def tier_notes(cluster: Cluster, d: Decisions) -> list[str]:
    """The same of other tiers that each micro-batch's copies go to, in words."""
    moved = [name for what, name in d.tiers.items() if what != "optimizer" and name != "cpu"]
    return [
        f"copies of tier {name}: through the host's memory, all GPUs at once, each reads"
        f" {copy_bytes_per_s(cluster, name, up=True) / 1e9:,.1f} GB/s and writes"
        f" {copy_bytes_per_s(cluster, name, up=False) / 1e9:,.1f}"
        for name in dict.fromkeys(moved)
    ]


def parameter_copies_s(cluster: Cluster, engine: Engine, d: Decisions, state: State) -> Pair:
    """A unit's fp32 shards on their way up to be gathered, and its gradients' on their way down
    into the host's memory, each micro-batch."""
    tier = d.tiers.get("params")
    if tier is None:
        return 0.0, 0.0
    mode = mode_of(d, engine)
    up = host_s(cluster, MASTER_BYTES * state.shard, up=True, tier=tier)
    down = host_s(cluster, MASTER_BYTES * state.updated, up=False)
    return (
        up * (mode.gather_per_microbatch >= 1),
        up * (mode.gather_per_microbatch >= 2) + down * mode.reduce_per_microbatch,
    )


def by_count(row: Row, kept_bytes: int, moved_s: Pair) -> Row:
    """A layer's row where layers are offloaded one by one: the level between none and full keeps
    nothing on the device, which has two layers' activations while copies run. What copies add to
    forward counts with what they add to backward, as recomputation does."""
    return replace(
        row, again_ps=(ps(moved_s[0]) + ps(moved_s[1]), row.again_ps[1]),
        kept=(row.kept[0], 0, row.kept[2]), aside=(0, kept_bytes, 0),
        working=(row.working[0], row.working[0] + 2 * kept_bytes, row.working[2]),
    )


def activation_copies_s(cluster: Cluster, tier: str, kept_bytes: int) -> Pair:
    """What a layer keeps, on its way down in forward and up in backward."""
    down, up = (host_s(cluster, kept_bytes, up=way, tier=tier) for way in (False, True))
    return down, up


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposed:
    """Seconds that transfers add to one micro-batch of a layer, forward and backward: of the data
    ranks, of parameters on the host link, and of activations by recomputation level."""

    data: Pair
    parameters: Pair
    activations: tuple[Pair, Pair, Pair]


NONE_S = (0.0, 0.0)
NOTHING = Exposed(data=NONE_S, parameters=NONE_S, activations=(NONE_S, NONE_S, NONE_S))


def exposed_s(
    data: Pair, copies: Pair, kept: tuple[Pair, ...], kernels: Pair, share: float
) -> Exposed:
    """What is left of transfers behind a layer's kernels: it takes max(kernels + share *
    transfers, transfers). The data ranks' come first, then parameters' copies, then activations',
    in streams beside each other that one link and one compute stream serve.

    kept: what activations' copies take, by level, empty where there are none; full recomputation
    gives them forward's kernels to hide behind in backward.
    """
    if not kept and data == copies == NONE_S:
        return NOTHING

    def left(transfer: float, compute: float) -> float:
        return max(share * transfer, transfer - compute)

    alone = tuple(left(t, k) for t, k in zip(data, kernels))
    both = tuple(left(t + c, k) for t, c, k in zip(data, copies, kernels))
    levels: list[Pair] = [] if kept else [NONE_S] * 3
    for level, moves in enumerate(kept):
        again = kernels[0] if level == 2 else 0.0
        hides = (kernels[0], kernels[1] + again)
        forward, backward = (
            max(0.0, left(t + c + m, k) - b)
            for t, c, m, k, b in zip(data, copies, moves, hides, both)
        )
        levels.append((forward, backward))
    return Exposed(
        data=(alone[0], alone[1]), parameters=(both[0] - alone[0], both[1] - alone[1]),
        activations=(levels[0], levels[1], levels[2]),
    )  # fmt: skip


def update_s(
    cluster: Cluster, engine: Engine, workload: Workload, d: Decisions, state: State
) -> float:
    """An update off the GPU, each step: gradients go down and parameters up the host link, if not
    each micro-batch; the host's memory, shared by the node's GPUs, does it; a disk is read and
    written besides, of what lies there."""
    fsdp = in_torch(mode_of(d, engine))
    host = cluster.tier("cpu")
    each = update_bytes(workload.optimizer, engine.optimizer_bytes_per_parameter)
    wide = workload.precision == "fp32"
    up = MASTER_BYTES if fsdp else COMPUTE_BYTES[workload.precision]
    down = MASTER_BYTES if fsdp or wide else GRAD_BYTES[d.grad_dtype]
    link = _once(engine, d) * (
        host_s(cluster, state.updated * down, up=False)
        + host_s(cluster, state.updated * up, up=True, tier=d.tiers.get("params", "cpu"))
    )
    total = link + each * state.updated * cluster.sharers(host) / host.read_bytes_per_s
    for name, read, written in (
        (d.tiers["optimizer"], apart := _apart_bytes(workload, fsdp), apart),
        # FSDP2 updates its fp32 shards where they lie; others' 16-bit copies are written anew
        (d.tiers.get("params", "cpu"), up * fsdp, up),
    ):
        if name != "cpu":
            disk = cluster.tier(name)
            size = state.updated * cluster.sharers(disk)
            total += size * (read / disk.read_bytes_per_s + written / disk.write_bytes_per_s)
    return total


def update_kernels(engine: Engine, d: Decisions, state: State) -> int:
    """What an update off the GPU does one after the other: gradients go down and parameters up, if
    not each micro-batch, and between them it is done, which takes a kernel's gap at least."""
    return (1 + 2 * _once(engine, d)) * (state.updated > 0)


def _once(engine: Engine, d: Decisions) -> bool:
    """Whether an update's gradients and parameters take the link, once a step."""
    return not ("params" in d.tiers and mode_of(d, engine).gather_per_microbatch)


def _apart_bytes(workload: Workload, fsdp: bool) -> float:
    """Bytes a parameter on the optimizer's own tier, where that is not the host's memory: FSDP2
    keeps fp32 parameters in memory, the moments alone are on the disk."""
    return MOMENT_BYTES.get(workload.optimizer, 0.0) + (0 if fsdp else MASTER_BYTES)


def layers_below(chain: Chain, d: Decisions) -> frozenset[int]:
    """Positions in the chain of the layers whose state lies below, where that is counted: the first
    of each stage. The stages are cut, or one."""
    stages = d.stages or (len(chain.layers),)
    return frozenset(
        place for start, count in zip(starts_of(stages), d.below_of(stages))
        for place in chain.layers[start : start + count]
    )  # fmt: skip


def below_bytes(
    engine: Engine, workload: Workload, d: Decisions, state: State
) -> tuple[tuple[str, int], ...]:
    """Bytes of a unit's state that one GPU lays on each tier: what `state_of` leaves out, and the
    gradients on their way."""
    offload, found = d.tiers, dict.fromkeys(d.tiers.values(), 0.0)
    if "optimizer" not in offload:
        return ()
    fsdp, tier = in_torch(mode_of(d, engine)), offload["optimizer"]
    apart = _apart_bytes(workload, fsdp) * state.updated
    found.setdefault("cpu", 0.0)
    if fsdp:  # fp32 shards lie where they are updated, their gradients in the host's memory
        found[offload.get("params", "cpu")] += MASTER_BYTES * state.shard
        found["cpu"] += MASTER_BYTES * state.updated
        found[tier] += apart
    else:
        wide = workload.precision == "fp32"
        found["cpu"] += (MASTER_BYTES if wide else GRAD_BYTES[d.grad_dtype]) * state.updated
        found[tier] += apart
        if "params" in offload:
            found[offload["params"]] += COMPUTE_BYTES[workload.precision] * state.shard
    return tuple((name, int(size)) for name, size in found.items())
