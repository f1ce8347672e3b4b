"""What may lie below the device, and which formats of gradients are searched: of the pins."""

from __future__ import annotations

from collections.abc import Sequence

from cost_models.decisions import STATE_BELOW, Decisions
from cost_models.engines import Engine
from cost_models.hardware import Cluster
from planner.decisions import ANY, Pins
from planner.runnable import NATIVE

Offload = tuple[tuple[str, str], ...]
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
    that open, as our own runtime does it. A pin that no layer is computed again leaves it open."""
    host = any(t.name == "cpu" for t in cluster.tiers)
    again = pins.recompute is not None and any((*pins.recompute.full, *pins.recompute.selective))
    return pins.offload is None and not again and host and engine in NATIVE


def counts_state(pins: Pins, cluster: Cluster, engine: str) -> bool:
    """Whether the optimizer is searched to lie on the host by count of layers: without a pipeline,
    where the pins leave that open, as our own runtime does it."""
    host = any(t.name == "cpu" for t in cluster.tiers)
    return pins.offload is None and host and engine in NATIVE


def lower(d: Decisions, pins: Pins, cluster: Cluster) -> Decisions | None:
    """The same with the optimizer on the next slower tier, for where a tier is full. On one with
    room a slower one gains nothing: what lies there leaves the GPU alike."""
    if pins.offload is not None or "optimizer" not in d.tiers or d.parts:
        return None
    seconds = {
        t.name: (1 / t.read_bytes_per_s + 1 / t.write_bytes_per_s) * cluster.sharers(t)
        for t in cluster.tiers
    }
    order = ["cpu", *sorted(seconds.keys() - {"cpu"}, key=lambda name: (seconds[name], name))]
    at = order.index(d.tiers["optimizer"]) + 1
    return d.on(order[at]) if at < len(order) else None


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
