"""Weights and caches below the GPU: what streams, what the CPU multiplies, what a step then takes.

Blocks of layers that are streamed come in a ring, ahead of their use: the link is busy beside the
kernels, and a step takes the longer of the two. Cold experts are known only when their router has
run: they are fetched, or multiplied by the CPU, while the GPU waits. What the CPU would multiply
for many tokens is brought to the GPU instead, where that is quicker. A host's memory and disks are
shared by the GPUs that use them; each GPU's link is its own.

Source: formulas of FlexGen (arXiv:2303.06865) for streams; the CPU's rates are `serving_host.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.hardware import Cluster
from cost_models.serving_cpu import CPU, copied_s, shared_s
from cost_models.serving_decisions import KV_BYTES, WEIGHT_BYTES, Held, Serving
from cost_models.serving_host import Products, host_of
from cost_models.serving_kv import picked, seen
from cost_models.serving_ops import Costs, FloatArray, Step
from cost_models.serving_shapes import Experts, LayerShape, Matrix, ServedModel

RING_SLOTS = 2  # blocks of a layer on the GPU: one in use, one on its way


@dataclass(frozen=True, slots=True, kw_only=True)
class Below:
    """Seconds a step that what lies below the GPU takes. stream: of the link, in the background,
    for weights; cached: for the cache. fetched: of what the GPU waits for: experts on demand, what
    the host first copies to pinned pages, what copies take from kernels of the same memory.
    on_host: of the CPU. saved: of kernels that the GPU does not run for it, or sooner."""

    stream_s: FloatArray
    cached_s: FloatArray
    fetched_s: FloatArray
    on_host_s: FloatArray
    saved_s: FloatArray


def rows_on_host(cluster: Cluster, serving: Serving, width_bytes: float) -> int:
    """Rows up to which the CPU multiplies a matrix (width_bytes an element) sooner than it comes to
    the GPU."""
    flop_per_s = _products(cluster, serving).flop_per_s / sharers(cluster, serving)
    arrives_s = width_bytes / rate_bytes_per_s(cluster, serving, "cpu")
    return max(1, int(arrives_s * flop_per_s / 2))


def _products(cluster: Cluster, serving: Serving) -> Products:
    """Of the whole host, in the format that unpacked weights are multiplied in."""
    wide = "fp32" if serving.default == "fp32" else "bf16"
    return host_of(cluster.device).products_of(wide, cluster.tier("cpu").read_bytes_per_s)


def sharers(cluster: Cluster, serving: Serving) -> int:
    """GPUs of a node that share its memory and disks."""
    return min(cluster.node_size, serving.devices)


def rate_bytes_per_s(cluster: Cluster, serving: Serving, tier: str) -> float:
    """At which one GPU is given what lies on a tier, all of its node being given alike."""
    held = cluster.tier(tier)
    share = held.read_bytes_per_s / sharers(cluster, serving)
    return min(cluster.uplink_bytes_per_s(sharers(cluster, serving)), share)


def below(costs: Costs, model: ServedModel, step: Step) -> Below:
    """What one pass through all stages waits for, and what it is spared; `step` of one rank."""
    s, cluster, handling = costs.serving, costs.cluster, costs.engine.handling
    zero = np.zeros(np.shape(step.sequences))
    stream = cached = fetched = on_host = saved = beside_bytes = zero
    tokens = step.tokens
    for held in s.tiers:
        rate = rate_bytes_per_s(cluster, s, held.tier)
        if held.block == "routed_experts":
            some = _experts(costs, model, held, step.of_all(s.attention_dp))
            fetched = fetched + some.fetched_s
            on_host, saved = on_host + some.on_host_s, saved + some.saved_s
            continue
        share = 1 - min(held.resident / layers_of(model, held.block), 1.0)
        size = block_bytes(model, s, held.block) * s.pp * share
        if held.block == "embeddings":  # rows that are looked up there
            fetched = fetched + np.minimum(tokens / model.vocab, 1.0) * size / s.pp / rate
        elif held.place == "stream":
            stream = stream + (tokens > 0) * size / rate
            beside_bytes = beside_bytes + (tokens > 0) * size
            if "weights" in handling.pageable and held.tier == "cpu":
                fetched = fetched + (tokens > 0) * size / handling.pageable_bytes_per_s
        else:
            found = [(count * share, m) for count, m in _matrices(model, held.block)]
            kernels = sum((count * costs.matrix_s(m, tokens) for count, m in found), zero)
            flop = 2 * tokens * sum(count * m.held(s.tp) for count, m in found)
            columns = sum(count * m.columns(s.tp) for count, m in found)
            written = sum(_written_bytes(costs, s.format_of(m.part), count * m.held(s.tp))
                          for count, m in found)  # fmt: skip
            here = _host_s(costs, size + written, flop, tokens, columns)
            brought = (tokens > 0) * size / rate
            fetched = fetched + np.where(brought + kernels < here, brought, 0.0)
            on_host = on_host + np.where(brought + kernels < here, 0.0, here)
            saved = saved + np.where(brought + kernels < here, 0.0, kernels)
    if s.kv_tier != "gpu":
        rate = rate_bytes_per_s(cluster, s, s.kv_tier)
        ahead, asked, times = _cached_bytes(model, s, step.context + zero)
        if handling.attends:  # what lies on a disk comes to the CPU, what it has stays
            on_host = on_host + step.sequences * ahead / handling.attends_bytes_per_s
            rate = cluster.tier(s.kv_tier).read_bytes_per_s / sharers(cluster, s)
            ahead = ahead * (s.kv_tier != "cpu")
        elif "cache" in handling.pageable and s.kv_tier == "cpu":
            fetched = fetched + step.sequences * ahead / handling.pageable_bytes_per_s
        cached = cached + step.sequences * ahead / rate
        beside_bytes = beside_bytes + step.sequences * ahead
        waits_s = times * host_of(costs.device).fetch_s
        fetched = fetched + step.sequences * asked / rate + (step.sequences > 0) * waits_s
    if costs.device.family == CPU:
        fetched = fetched + shared_s(costs.device, beside_bytes)
    return Below(stream_s=stream, cached_s=cached, fetched_s=fetched, on_host_s=on_host,
                 saved_s=saved)  # fmt: skip


def _cached_bytes(
    model: ServedModel, s: Serving, tokens: FloatArray
) -> tuple[FloatArray, FloatArray, int]:
    """What attention of one sequence reads of a cache below the GPU, on one rank: bytes that come
    ahead of it, bytes that are known when it runs, and in how many layers."""
    ahead, asked, times = np.zeros(np.shape(tokens)), np.zeros(np.shape(tokens)), 0
    for layer in model.layers:
        for attend in layer.attention:
            each = layer.count * attend.cached(s.tp) * KV_BYTES[s.kv]
            if attend.top:
                asked, times = asked + picked(attend, tokens) * each, times + layer.count
            else:
                ahead = ahead + seen(attend, tokens) * each
    return ahead, asked, times


def _host_s(
    costs: Costs, size_bytes: FloatArray | float, flop: FloatArray, rows: FloatArray,
    columns: FloatArray | float,
) -> FloatArray:  # fmt: skip
    """A GPU's share of the CPU, reading so many bytes once and multiplying so many rows by so many
    columns."""
    share = sharers(costs.cluster, costs.serving)
    found = _products(costs.cluster, costs.serving)
    spent = found.seconds(size_bytes * share, flop * share, rows, columns * share)
    return np.where(flop > 0, spent, 0.0)


def _written_bytes(costs: Costs, name: str, elements: FloatArray | float) -> FloatArray | float:
    """Of weights that the CPU writes out and reads again, for want of a kernel: as on a CPU that
    stands for a device (`serving_cpu.py`), int8 has one."""
    kernel = name == "int8" or not costs.engine.handling.unpacks(name)
    wide = WEIGHT_BYTES["fp32" if costs.serving.default == "fp32" else "bf16"]
    return 0.0 if kernel else 2 * wide * elements


def _experts(costs: Costs, model: ServedModel, held: Held, tokens: FloatArray) -> Below:
    """Experts that are not on the GPU, `tokens` being of all ranks that share them."""
    s = costs.serving
    zero = np.zeros(np.shape(tokens))
    fetched = on_host = saved = zero
    rate = rate_bytes_per_s(costs.cluster, s, held.tier)
    apart = host_of(costs.device).disk_bytes_per_s if held.tier != "cpu" else None
    apart = min(rate, apart / sharers(costs.cluster, s)) if apart else rate
    width = WEIGHT_BYTES[s.format_of("routed_experts")]
    fetch_s, handling = host_of(costs.device).fetch_s, costs.engine.handling
    for layer in model.layers:
        for one in layer.experts:
            picked = load_of(one, costs.engine.skew)
            local = min(held.resident * s.ep, one.experts)
            cold = picked[local:]
            each = one.elements / one.experts / s.expert_tp
            chosen = 1 - (1 - cold) ** np.asarray(tokens)[..., None]
            hit = chosen.sum(-1) / s.ep
            fetches = np.minimum(hit, 1.0) if handling.fetches_layers else hit
            # Read ahead are those whose neighbour in the file is wanted too.
            together = chosen.mean(-1) if len(cold) else zero
            each_s = each * width * (together / rate + (1 - together) / apart)
            brought = hit * each_s + fetches * fetch_s
            if held.place == "stream":
                fetched = fetched + layer.count * brought
                if costs.device.family == CPU:
                    copied = copied_s(costs.device, s, one, each * width)
                    saved = saved + layer.count * hit * copied
                continue
            flop = 2 * tokens * cold.sum() / s.ep * each
            kernels = cold.sum() / one.topk * costs.experts_s(one, tokens)
            moved = hit * each * width
            moved = moved + _written_bytes(costs, s.format_of("routed_experts"), hit * each)
            rows, columns = tokens * cold.sum() / s.ep / hit, hit * each / one.hidden
            here = _host_s(costs, moved, flop, rows, columns)
            quicker = (brought + kernels < here) & (np.asarray(tokens) > handling.host_tokens)
            fetched = fetched + layer.count * np.where(quicker, brought, 0.0)
            on_host = on_host + layer.count * np.where(quicker, 0.0, here)
            saved = saved + layer.count * np.where(quicker, 0.0, kernels)
    return Below(stream_s=zero, cached_s=zero, fetched_s=fetched, on_host_s=on_host, saved_s=saved)


def load_of(experts: Experts, skew: float) -> FloatArray:
    """How probably a token picks each expert, the most wanted first; they sum to top-k.

    A power law; what would be more than certain falls to the others.
    """
    picked = np.arange(1, experts.experts + 1, dtype=np.float64) ** -skew
    for sure in range(experts.topk + 1):  # so many are picked by every token
        rest = picked[sure:] / picked[sure:].sum() * (experts.topk - sure)
        if not len(rest) or rest[0] <= 1:
            break
    return np.concatenate([np.ones(sure), rest])


def streamed_units(model: ServedModel, s: Serving) -> int:
    """Units of a step whose weights, or a part of them, stream to the GPU ahead of their use."""
    layers, ends = 0, 0
    for held in s.tiers:
        if held.place != "stream" or held.block in ("routed_experts", "embeddings"):
            continue  # experts are fetched on demand, rows of embeddings looked up
        units = max(layers_of(model, held.block) - held.resident, 0)
        ends += units if held.block == "head" else 0
        layers = max(layers, 0 if held.block == "head" else units)
    return layers + ends


def _matrices(model: ServedModel, block: str) -> list[tuple[float, Matrix]]:
    """(layers, matrix) of a block."""
    if block == "head":
        return [(1, m) for m in model.head]
    return [(layer.count, m) for layer in model.layers for m in layer.matrices if m.block == block]


def layers_of(model: ServedModel, block: str) -> int:
    """What a block is counted in: layers that have it, experts of a layer, or 1."""
    if block == "routed_experts":
        return max((e.experts for layer in model.layers for e in layer.experts), default=0)
    if block in ("embeddings", "head"):
        return 1
    return sum(layer.count for layer in model.layers if _has(layer, block))


def _has(layer: LayerShape, block: str) -> bool:
    return any(m.block == block for m in layer.matrices)


def block_bytes(model: ServedModel, s: Serving, block: str) -> float:
    """Bytes of a block class on the fullest rank, wherever it lies."""
    width = WEIGHT_BYTES[s.format_of(block)]
    if block == "embeddings":
        return model.embedding_elements / s.tp * width
    if block == "routed_experts":
        elements = sum(layer.count * e.elements for layer in model.layers for e in layer.experts)
        return elements / (s.ep * s.expert_tp) / s.pp * width
    found = sum(count * m.held(s.tp) * WEIGHT_BYTES[s.format_of(m.part)]
                for count, m in _matrices(model, block))  # fmt: skip
    return found if block == "head" else found / s.pp


@dataclass(frozen=True, slots=True, kw_only=True)
class BelowBytes:
    """Bytes of one rank that its tiers hold, by name, and what moving them takes on the GPU."""

    tiers: tuple[tuple[str, float], ...]
    buffers: float

    @property
    def total(self) -> float:
        return sum(size for _, size in self.tiers)


def below_bytes(model: ServedModel, s: Serving) -> BelowBytes:
    """What lies below the GPU of one rank, without the cache."""
    tiers: dict[str, float] = {}
    layer_bytes, fetched = 0.0, 0.0
    for held in s.tiers:
        total, whole = layers_of(model, held.block), block_bytes(model, s, held.block)
        routed = held.block == "routed_experts"
        share = 1 - min(held.resident * (s.ep if routed else 1), total) / total
        tiers[held.tier] = tiers.get(held.tier, 0.0) + share * whole
        if held.place != "stream" or not share:
            continue
        if routed:
            for layer in model.layers:
                for e in layer.experts:
                    width = WEIGHT_BYTES[s.format_of("routed_experts")]
                    fetched = max(fetched, e.elements / e.experts / s.expert_tp * width)
        elif held.block == "head":
            layer_bytes = max(layer_bytes, whole)
        else:
            layer_bytes += whole * s.pp / total
    return BelowBytes(tiers=tuple(tiers.items()), buffers=RING_SLOTS * layer_bytes + fetched)
