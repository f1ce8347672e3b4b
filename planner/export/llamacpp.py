"""llama.cpp: the command of `llama-server` that serves a plan."""

from __future__ import annotations

import math

from cost_models.serving_reading import served_model
from cost_models.serving_tiers import layers_of
from planner.export.header import comment, header
from planner.export.pinned import checked
from planner.export.serving import (
    SERVING,
    Flags,
    alone,
    formats_note,
    keeps_formats,
    script,
    serving,
    share,
    tokens,
)
from planner.export.target import APPROXIMATE, UNSUPPORTED, Exported, judge
from planner.serving.plan import ServingPlan

ALL_LAYERS = 999  # --n-gpu-layers: more than any model has
TAKES = ("tp=1", "ep=1", "attention_dp=1", "pools=none")
CACHES = {"bf16": "bf16", "fp16": "f16", "int8": "q8_0"}


def export(plan: object, source: str) -> Exported:
    """A script `llama_server.sh`."""
    del source
    p = serving(plan, "llamacpp")
    lost = judge("llamacpp", SERVING, _rows(p), TAKES)
    said = (*header(p, "llamacpp", checked("llamacpp")), *(f"lost: {row}" for row in lost))
    words = ["llama-server", '--model "${MODEL:?a GGUF file}"']
    notes: tuple[str, ...] = ()
    if p.serving.replicas > 1:
        notes = (alone(p),)
    text = script(words, _flags(p), comment(said))
    return Exported(files=(("llama_server.sh", text),), lost=lost, notes=notes)


def _flags(p: ServingPlan) -> Flags:
    s, slots = p.serving, share(p)
    made: Flags = [
        ("--parallel", str(slots)), ("--ctx-size", str(slots * tokens(p))), ("--fit", "off"),
        ("--n-gpu-layers", str(_layers_on_gpu(p))),
        ("--split-mode", "none" if s.ranks * s.pp == 1 else "row" if s.tp > 1 else "layer"),
        *_experts(p),
    ]  # fmt: skip
    if s.prefill_chunk:
        made += [(f"--{word}-size", str(s.prefill_chunk)) for word in ("batch", "ubatch")]
    if s.kv in CACHES:
        made += [(f"--cache-type-{word}", CACHES[s.kv]) for word in "kv"]
    if s.kv_tier == "cpu":
        made.append(("--no-kv-offload",))
    return made


def _experts(p: ServingPlan) -> Flags:
    """Experts by the CPU: of all layers, or of as many layers as hold as many bytes."""
    held = p.serving.held("routed_experts")
    if held is None:
        return []
    if held.resident == 0:
        return [("--cpu-moe",)]
    model = served_model(p.graph, p.asked.engine)
    experts, layers = layers_of(model, "routed_experts"), sum(
        layer.count for layer in model.layers if layer.experts
    )
    below = 1 - min(held.resident * p.serving.ep, experts) / experts
    return [("--n-cpu-moe", str(math.ceil(layers * below)))]


def _layers_on_gpu(p: ServingPlan) -> int:
    """Layers that are whole on the GPU: the fewest that any block of layers has there."""
    found = [h.resident for h in p.serving.tiers if h.block not in ("routed_experts", "head",
                                                                     "embeddings")]
    return min(found, default=ALL_LAYERS)


def _rows(p: ServingPlan) -> tuple[tuple[str, bool, str, str], ...]:
    """Every decision: whether llama.cpp does it, else how far and why not."""
    s = p.serving
    experts = s.held("routed_experts")
    alone = len(s.tiers) == 1 and experts is not None
    exact = not s.tiers or (alone and experts is not None and experts.place == "compute"
                            and experts.tier == "cpu" and experts.resident == 0)  # fmt: skip
    computed = all(h.tier == "cpu" and h.place == "compute" for h in s.tiers)
    return (
        ("tp", s.tp == 1 or s.pp == 1, UNSUPPORTED, "layers or rows are split, not both"),
        ("tp", s.tp == 1, APPROXIMATE, "rows of matrices are split; attention runs on one GPU"),
        ("pp", s.pp == 1, APPROXIMATE, "layers are split, and GPUs run one after the other"),
        ("ep", s.ep == 1, UNSUPPORTED, "experts lie with their layer"),
        ("etp", True, "", ""),
        ("attention_dp", s.attention_dp == 1, UNSUPPORTED, "no replicas of attention alone"),
        ("replicas", True, "", ""), ("batch", True, "", ""), ("prefill_chunk", True, "", ""),
        ("default", True, "", ""),
        ("weights", keeps_formats(p), UNSUPPORTED,
         f"{formats_note(p)} (llama-quantize makes it)"),
        ("kv", s.kv in CACHES, UNSUPPORTED, f"no cache in {s.kv}"),
        ("tiers", exact, APPROXIMATE if computed else UNSUPPORTED,
         "whole layers, or all experts of whole layers, lie on the host, where the CPU multiplies"
         " them; what is streamed, and other tiers, it has not"),
        ("kv_tier", s.kv_tier in ("gpu", "cpu"), UNSUPPORTED, f"no cache on {s.kv_tier}"),
        ("kv_window", s.kv_window == 0, UNSUPPORTED, "the cache forgets nothing"),
        ("kv_policy", not s.kv_policy, UNSUPPORTED, "the cache keeps and reads every token"),
        ("prefill", s.prefill is None, UNSUPPORTED, "pools are servers of their own"),
    )  # fmt: skip
