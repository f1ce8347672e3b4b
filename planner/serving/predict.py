"""One set of decisions under a load: what requests see, what a rank holds, what binds."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

from cost_models.hardware import Cluster
from cost_models.op_models import peak_of
from cost_models.serving import Memory, Served, admitted, memory_of, serve, step_parts
from cost_models.serving_decisions import WEIGHT_BYTES, ServeLoad, Serving
from cost_models.serving_engines import ServingEngine
from cost_models.serving_ops import Costs, step_of
from cost_models.serving_shapes import ServedModel
from cost_models.serving_tiers import below_bytes, sharers

RELIEF = {
    "compute": "more GPUs, or a narrower format that the tensor cores multiply",
    "memory bandwidth": "fewer bits a weight, or tp over more GPUs",
    "interconnect": "a smaller tp, or GPUs that share NVLink",
    "host link": "more of the weights on the GPU: fewer bits, or a GPU more",
    "disk": "more host memory, or fewer bits a weight",
    "host CPU": "more of the weights on the GPU, or faster host memory",
    "host launches": "an engine with CUDA graphs, or a larger batch",
    "capacity": "fewer bits in the cache or the weights, or more GPUs",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds and bytes of a plan. parts: a decode step's seconds, which sum to decode_s.

    running: sequences that decode at once, of those asked for. gpu, cpu and disks: bytes of the
    fullest rank by tier, its cache included. missing: why it cannot be, "" where it can.
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

    @property
    def fits(self) -> bool:
        return not self.missing

    def latency_s(self, load: ServeLoad) -> float:
        """Of one request, all its tokens."""
        return self.ttft_s + (load.output - 1) * self.tpot_s


@functools.lru_cache(maxsize=64)
def windowed(model: ServedModel, window: int) -> ServedModel:
    """The model with a cache that forgets what is older than so many tokens; 0 forgets none."""
    if not window:
        return model
    layers = tuple(
        replace(layer, attention=tuple(
            replace(a, window=min(a.window or window, window)) for a in layer.attention
        )) for layer in model.layers
    )  # fmt: skip
    return replace(model, layers=layers)


def predict(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, load: ServeLoad
) -> Prediction:
    """What a plan does under the load: a closed loop of `s.batch` requests."""
    model = windowed(model, s.kv_window)
    costs = Costs(cluster=cluster, engine=engine, serving=s)
    room = admitted(model, cluster, engine, s, load)
    memory = memory_of(model, cluster, engine, s, load)
    one = np.ones(1)
    found = serve(costs, model, load.prompt * one, load.output * one, s.batch * one,
                  max(room, 1.0) * one)
    running = min(float(found.running[0]) * s.replicas, s.batch)
    share = 1 / s.attention_dp
    prefill = step_parts(costs, model, step_of(0.0, 0.0, one * share, load.prompt * one))
    tiers = _tier_bytes(model, s, memory, running)
    return Prediction(
        serving=s, ttft_s=float(found.ttft_s[0]), tpot_s=float(found.tpot_s[0]),
        tokens_per_s=float(found.tokens_per_s[0]), decode_s=float(found.decode_s[0]),
        running=running, batch=s.batch,
        parts=tuple((name, float(np.ravel(v)[0])) for name, v in found.parts.items()),
        prefill_parts=tuple((name, float(np.ravel(v)[0])) for name, v in prefill.items()),
        memory=memory, tiers=tiers, bottleneck=_bottleneck(costs, model, found, running, s),
        missing=_missing(cluster, s, room, memory, tiers),
    )  # fmt: skip


def _tier_bytes(
    model: ServedModel, s: Serving, memory: Memory, running: float
) -> tuple[tuple[str, float], ...]:
    """Bytes of the fullest rank on the GPU and on every tier below it that is used."""
    each = running / s.replicas / s.attention_dp
    gpu = memory.weights_bytes + memory.workspace_bytes + memory.context_bytes
    gpu += each * memory.kv_bytes_per_sequence
    found = {"gpu": gpu, **dict(below_bytes(model, s).tiers)}
    if s.kv_tier != "gpu":
        whole = memory.kv_bytes_per_sequence * max(1.0, model.layer_count / (2 * s.pp))
        found[s.kv_tier] = found.get(s.kv_tier, 0.0) + each * whole
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
    costs: Costs, model: ServedModel, found: Served, running: float, s: Serving
) -> str:
    """What most of a decode step's time goes to."""
    parts = {name: float(np.ravel(v)[0]) for name, v in found.parts.items()}
    read_s, multiply_s = _bounds_s(costs, model, running / s.replicas / s.pp)
    kernels = parts["gemm"] + parts["moe"] + parts["attention"] + parts["elementwise"]
    below = parts.get("stream", 0.0)
    tiers = {h.tier for h in s.tiers} | ({s.kv_tier} - {"gpu"})
    causes = {
        "compute" if multiply_s > read_s else "memory bandwidth": kernels,
        "interconnect": parts["tp_comm"] + parts["ep_comm"] + parts["pp_comm"],
        "disk" if tiers - {"cpu"} else "host link": below,
        "host CPU": parts.get("cpu", 0.0), "host launches": parts["host"],
    }  # fmt: skip
    if running < s.batch:
        return "capacity"
    return max(causes, key=lambda name: causes[name])


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
