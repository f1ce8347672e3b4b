"""What may lie below the device, and which formats of gradients are searched: of the pins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cost_models.decisions import STATE_BELOW, Decisions
from cost_models.engines import Engine
from cost_models.hardware import Cluster
from planner.decisions import ALL_LAYERS, ANY, Pins
from planner.runnable import NATIVE

if TYPE_CHECKING:  # it has arrays, and what reads plans starts without
    from cost_models.stage_problem import StageProblem

TIERED = (*NATIVE, "deepspeed")  # whose parameters may lie on another tier than the host's memory

Offload = tuple[tuple[str, str], ...]
HOST = "cpu"  # the tier that all others are reached through
SEARCHED: tuple[Offload, ...] = (
    (), (("optimizer", "cpu"),), (("optimizer", "cpu"), ("params", "cpu")),
)  # fmt: skip


def offloads(pins: Pins, *clusters: Cluster) -> tuple[Offload, ...]:
    """How state may lie on all parts alike; counts of layers whose activations lie below are left
    to the stages. Over several parts no more than the optimizer is searched."""
    if pins.offload is not None:
        return (tuple(
            (w, t.partition(":")[0] + ":" if w == "activations" and ":" in t else t)
            for w, t in pins.offload
        ),)  # fmt: skip
    host = all(any(t.name == "cpu" for t in cluster.tiers) for cluster in clusters)
    return SEARCHED[: 2 if len(clusters) > 1 else 3] if host else SEARCHED[:1]


def counts_layers(pins: Pins, cluster: Cluster, engine: str) -> bool:
    """Whether activations are searched to lie on the host by count of layers: where the pins leave
    that open, as our own runtime does it. Beside layers computed again in part none do, and of
    those computed again in full nothing is left."""
    again = pins.recompute
    left = again is None or not (any(again.selective) or set(again.full) == {ALL_LAYERS})
    return left and counts_state(pins, cluster, engine)


def counts_state(pins: Pins, cluster: Cluster, engine: str) -> bool:
    """Whether the optimizer is searched to lie on the host by count of layers: without a pipeline,
    where the pins leave that open, as our own runtime does it."""
    host = any(t.name == HOST for t in cluster.tiers)
    return pins.offload is None and host and engine in NATIVE


def beside_host(cluster: Cluster) -> tuple[str, ...]:
    """The tiers behind the host's memory, the quickest first."""
    seconds = {
        t.name: (1 / t.read_bytes_per_s + 1 / t.write_bytes_per_s) * cluster.sharers(t)
        for t in cluster.tiers
    }
    return tuple(sorted(seconds.keys() - {HOST}, key=lambda name: (seconds[name], name)))


def off_host(d: Decisions, pins: Pins, engine: str, cluster: Cluster) -> Iterator[Decisions]:
    """The same with the optimizer, or the parameters, on another tier than the host's memory, for
    where that may be full. What goes to another tier goes through it, so nothing is quicker there;
    and what lies there leaves the GPU alike: where the host has room, no other tier is better."""
    if pins.offload is not None or d.parts:
        return
    for what in STATE_BELOW if engine in TIERED else STATE_BELOW[:1]:
        if d.tiers.get(what) == HOST:
            for tier in beside_host(cluster):
                yield d.on(tier, what)


def fills_host(problem: StageProblem) -> bool:
    """Whether the host's memory may be too full for a plan of this program."""
    return any(room.tier == HOST for room in problem.rooms)


def grad_dtypes(pins: Pins, engine: Engine, *clusters: Cluster) -> tuple[str, ...]:
    """The formats of gradients that are searched: one, unless any is allowed; fp32 first, and no
    other where a device has none."""
    if pins.grad_dtype == ANY:
        return ("fp32", *(["bf16"] if all(c.device.has("bf16") for c in clusters) else []))
    return (pins.grad_dtype or engine.grad_dtype,)


def offload_words(d: Decisions) -> list[str]:
    """What lies where: `activations of 24 layers on cpu`."""
    below = {"activations": f" of {sum(d.moved)} layers"} if d.moved else {}
    if d.below is not None:
        below |= dict.fromkeys(STATE_BELOW, f" of {sum(d.below)} layers")
    return [f"{what}{below.get(what, '')} on {tier}" for what, tier in d.tiers.items()]


def keeps_offload(pinned: tuple[tuple[str, str], ...], d: Decisions) -> bool:
    """Whether a plan offloads what is pinned; one count of layers stands for every stage."""
    asked = Decisions(offload=pinned)
    if asked.tiers != d.tiers or (asked.moved is None) != (d.moved is None):
        return False
    if (asked.below is None) != (d.below is None) or (
        asked.below is not None and d.below != asked.below_of(d.stages)
    ):
        return False
    return asked.moved is None or d.moved == moved_layers(asked.moved, d)


def moved_layers(counts: Sequence[int], d: Decisions) -> tuple[int, ...]:
    """Layers that each stage offloads by such counts: no more than are not computed again."""
    rows = zip(d.stages, d.recompute or ((0, 0),) * len(d.stages))
    return tuple(
        min(counts[k % len(counts)], layers - full) for k, (layers, (full, _)) in enumerate(rows)
    )
