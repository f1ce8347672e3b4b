"""One set of decisions under a load: what requests see, what a rank holds, what binds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cost_models.hardware import Cluster
from cost_models.op_models import peak_of
from cost_models.serving import (
    Memory,
    admitted,
    memory_of,
    prompt_parts,
    request_host_s,
    serve,
)
from cost_models.serving_decisions import WEIGHT_BYTES, ServeLoad, Serving
from cost_models.serving_engines import ServingEngine
from cost_models.serving_kv import forgetful
from cost_models.serving_ops import Costs, FloatArray
from cost_models.serving_pools import Decodes, Pooled, Reads, decodes, moves, pooled, reads
from cost_models.serving_shapes import ServedModel
from cost_models.serving_tiers import below_bytes, sharers


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds and bytes of a plan. parts: a decode step's seconds, which sum to decode_s.
    prefill_parts: the first token's, which sum to ttft_s: a prompt read alone, by part; "request",
    the host's before it; "moving", between pools; "waiting", for other requests and their steps.

    running: sequences that decode at once, of those asked for. gpu, cpu and disks: bytes of the
    fullest rank by tier, its cache included. missing: why it cannot be, "" where it can. pools:
    where some GPUs read prompts alone; the memory is then of those that decode.
    """

    serving: Serving
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    decode_s: float
    running: float
    batch: int
    parts: tuple[tuple[str, float], ...]
    prefill_parts: tuple[tuple[str, float], ...]
    memory: Memory
    tiers: tuple[tuple[str, float], ...]
    bottleneck: str
    missing: str = ""
    pools: Pooled | None = None

    @property
    def fits(self) -> bool:
        return not self.missing

    def latency_s(self, load: ServeLoad) -> float:
        """Of one request, all its tokens."""
        return self.ttft_s + (load.output - 1) * self.tpot_s


def predict(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, load: ServeLoad
) -> Prediction:
    """What a plan does under the load: a closed loop of `s.batch` requests."""
    model = forgetful(model, s.kv_window, s.kv_policy)
    if s.prefill is not None:
        return _predict_pools(model, cluster, engine, s, load)
    costs = Costs(cluster=cluster, engine=engine, serving=s)
    room = admitted(model, cluster, engine, s, load)
    memory = memory_of(model, cluster, engine, s, load)
    one = np.ones(1)
    found = serve(costs, model, load.prompt * one, load.output * one, s.batch * one,
                  max(room, 1.0) * one)
    running = min(float(found.running[0]) * s.replicas, s.batch)
    ttft_s = float(found.ttft_s[0])
    prefill = prompt_parts(costs, model, load.prompt) | {"request": request_host_s(costs)}
    tiers = _tier_bytes(model, s, memory, running)
    return Prediction(
        serving=s, ttft_s=ttft_s, tpot_s=float(found.tpot_s[0]),
        tokens_per_s=float(found.tokens_per_s[0]), decode_s=float(found.decode_s[0]),
        running=running, batch=s.batch,
        parts=tuple((name, float(np.ravel(v)[0])) for name, v in found.parts.items()),
        prefill_parts=_to_first_token(prefill, ttft_s),
        memory=memory, tiers=tiers, bottleneck="capacity" if running < s.batch else _bottleneck(
            costs, model, found.parts, running / s.replicas / s.pp),
        missing=_missing(cluster, s, room, memory, tiers),
    )  # fmt: skip


def _predict_pools(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, load: ServeLoad
) -> Prediction:
    """What pools do. Where room binds, `running` are those that decode; else all are on their way.
    """
    d, p = s.decoding, s.reading
    assert p is not None
    read, decode, found = pooled_of(model, cluster, engine, s, load)
    memory = memory_of(model, cluster, engine, d, load)
    each = found.decoding / d.replicas
    costs = Costs(cluster=cluster, engine=engine, serving=p, prompts_alone=True)
    prefill = prompt_parts(costs, model, load.prompt, p.attention_dp)
    parts = decode.parts_at(max(each, 1.0))
    tiers = _tier_bytes(model, d, memory, found.decoding)
    fullest = max(dict(tiers)["gpu"], read.held_bytes)
    missing = _missing(cluster, d, decode.room, memory, tiers)
    if not missing and read.held_bytes > memory.capacity_bytes:
        missing = f"a GPU holds {memory.capacity_bytes / 1e9:.1f} GB, one that reads prompts" \
                  f" needs {read.held_bytes / 1e9:.1f} GB"
    if found.binds == "prompts":
        read_parts = {name: np.asarray(v) for name, v in prefill.items()}
        bottleneck = _bottleneck(costs, model, read_parts, load.prompt * p.attention_dp)
    elif found.binds:
        bottleneck = "capacity" if found.binds == "room" else "interconnect"
    else:
        costs = Costs(cluster=cluster, engine=engine, serving=d)
        shown = {name: np.asarray(v) for name, v in parts}
        bottleneck = _bottleneck(costs, model, shown, each / d.pp)
    return Prediction(
        serving=s, ttft_s=found.ttft_s, tpot_s=found.tpot_s, tokens_per_s=found.tokens_per_s,
        decode_s=found.tpot_s, running=found.decoding if found.binds == "room" else float(s.batch),
        batch=s.batch, parts=parts,
        prefill_parts=_to_first_token(
            prefill | {"request": engine.request_host_s, "moving": found.moves.exposed_s},
            found.ttft_s,
        ),
        memory=memory, tiers=(("gpu", fullest),), bottleneck=bottleneck, missing=missing,
        pools=found,
    )  # fmt: skip


def _to_first_token(parts: Mapping[str, float], ttft_s: float) -> tuple[tuple[str, float], ...]:
    """All of the first token's seconds: what these parts leave is waited."""
    return (*parts.items(), ("waiting", ttft_s - sum(parts.values())))


def pooled_of(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, load: ServeLoad
) -> tuple[Reads, Decodes, Pooled]:
    """A replica of either pool, and what requests see of all of them."""
    d, p = s.decoding, s.reading
    assert p is not None
    read = reads(model, cluster, engine, replace(p, replicas=1, batch=1), load.prompt)
    decode = decodes(model, cluster, engine, replace(d, replicas=1), load)
    moved = moves(model, cluster, engine, s, load.prompt, read.alone_s)
    return read, decode, pooled(engine, s, load, read, decode, moved)


def _tier_bytes(
    model: ServedModel, s: Serving, memory: Memory, running: float
) -> tuple[tuple[str, float], ...]:
    """Bytes of the fullest rank on the GPU and on every tier below it that is used."""
    each = running / s.replicas / s.attention_dp
    gpu = memory.weights_bytes + memory.workspace_bytes + memory.context_bytes
    gpu += each * memory.kv_bytes_per_sequence
    found = {"gpu": gpu, **dict(below_bytes(model, s).tiers)}
    if s.kv_tier != "gpu":
        found[s.kv_tier] = found.get(s.kv_tier, 0.0) + each * memory.kv_below_bytes_per_sequence
    return tuple(found.items())


def _missing(
    cluster: Cluster, s: Serving, room: float, memory: Memory, tiers: tuple[tuple[str, float], ...]
) -> str:
    """What the plan has too little of."""
    if room < 1:
        need = memory.weights_bytes + memory.workspace_bytes + memory.context_bytes
        need += memory.kv_bytes_per_sequence
        return f"a GPU holds {memory.capacity_bytes / 1e9:.1f} GB, one sequence needs" \
               f" {need / 1e9:.1f} GB"
    for name, size in tiers:
        if name == "gpu":
            continue
        held = cluster.tier(name)
        if size * sharers(cluster, s) > held.bytes:
            return f"{name} holds {held.bytes / 1e9:.1f} GB a node, the plan needs" \
                   f" {size * sharers(cluster, s) / 1e9:.1f} GB"
    return ""


def _bottleneck(
    costs: Costs, model: ServedModel, seconds: Mapping[str, FloatArray], tokens: float
) -> str:
    """What the largest part of a step's time goes to; so many tokens pass a stage at once.
    """
    s = costs.serving
    parts = {name: float(np.ravel(v)[0]) for name, v in seconds.items()}
    read_s, multiply_s = _bounds_s(costs, model, tokens)
    kernels = "compute" if multiply_s > read_s else "memory bandwidth"
    tiers = {h.tier for h in s.tiers} | ({s.kv_tier} - {"gpu"})
    causes = {
        "stream": "disk" if tiers - {"cpu"} else "host link", "cpu": "host CPU",
        "host": "host launches", "tp_comm": "interconnect", "ep_comm": "interconnect",
        "pp_comm": "interconnect", "gemm": kernels, "moe": kernels, "attention": kernels,
        "elementwise": "memory bandwidth",
    }  # fmt: skip
    return causes[max(causes, key=lambda name: parts.get(name, 0.0))]


def _bounds_s(costs: Costs, model: ServedModel, tokens: float) -> tuple[float, float]:
    """Seconds that one rank's weights take to be read in a decode step of so many tokens, experts
    where they are hit, and to be multiplied."""
    s, device = costs.serving, costs.device
    read = multiplied = 0.0
    for layer in model.layers:
        for m in layer.matrices:
            read += layer.count * m.held(s.tp) * WEIGHT_BYTES[s.format_of(m.block)]
            multiplied += layer.count * m.held(s.tp) * tokens / s.attention_dp
        for e in layer.experts:
            each = e.elements / e.experts / s.expert_tp
            hit = e.experts / s.ep * (1 - (1 - e.topk / e.experts) ** tokens)
            read += layer.count * hit * each * WEIGHT_BYTES[s.format_of("routed_experts")]
            multiplied += layer.count * e.topk / s.ep * each * tokens
    peak = max(peak_of(device, word) for word in ("bf16", *dict(s.weights).values())
               if word in ("bf16", "fp8"))  # fmt: skip
    return read / device.memory_bandwidth_bytes_per_s, 2 * multiplied / peak
