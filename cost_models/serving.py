"""Serving, whole: a step's seconds by part, then what requests see at a concurrency, and memory.

A closed loop keeps `batch` requests in flight. Each is answered in `output` decode steps, between
which the prompts of the others are read, so TPOT is a decode step and its share of those; TTFT is
a prompt's own steps behind what is queued before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.collectives import collective_s
from cost_models.hardware import Cluster
from cost_models.serving_cpu import CPU
from cost_models.serving_decisions import WEIGHT_BYTES, ServeLoad, Serving
from cost_models.serving_engines import ServingEngine
from cost_models.serving_host import host_of
from cost_models.serving_kv import kv_bytes, kv_here_bytes
from cost_models.serving_ops import PARTS, Costs, FloatArray, Step, layer_s, step_of
from cost_models.serving_queue import STEADY, Arrivals, gathered, mixed_s, prior_s, shared
from cost_models.serving_shapes import LayerShape, ServedModel
from cost_models.serving_tiers import Below, below, below_bytes, sharers, streamed_units

# assumed, both: no run of the data prints what a serving engine holds
CONTEXT_BYTES = 1.5e9  # CUDA context, NCCL and graphs of a process, as serving engines report it
WORKSPACE_BYTES = 2.0e9
STEPS_AT_ONCE = 1024  # of a prompt that is read in chunks: costed as one array


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of the fullest rank. kv_bytes_per_sequence, at the load's full length: what of its
    cache is on the GPU; below: of its cache, where that is not on the GPU; per_token: of all of the
    cache, wherever it lies. below_room_bytes: what a cache below the GPU may take of its tier."""

    weights_bytes: float
    kv_bytes_per_sequence: float
    kv_bytes_per_token: float
    workspace_bytes: float
    context_bytes: float
    capacity_bytes: float
    kv_below_bytes_per_sequence: float = 0.0
    below_room_bytes: float = math.inf

    @property
    def reserved_bytes(self) -> float:
        """What is not counted from the model: assumed, and measured by no run."""
        return self.workspace_bytes + self.context_bytes

    @property
    def room_bytes(self) -> float:
        """What the cache may take."""
        return self.capacity_bytes - self.weights_bytes - self.reserved_bytes

    @property
    def sequences(self) -> int | None:
        """Those of the load's full length that there is room for; None where they take none."""
        if not self.kv_bytes_per_sequence:
            return None
        found = max(0.0, self.room_bytes) // self.kv_bytes_per_sequence
        if self.kv_below_bytes_per_sequence:
            found = min(found, max(0.0, self.below_room_bytes) // self.kv_below_bytes_per_sequence)
        return int(found)


def step_parts(costs: Costs, model: ServedModel, step: Step) -> dict[str, FloatArray]:
    """Seconds of one step of one replica, all stages passed, by part; they sum to the step.

    step: of the whole replica; attention replicas and pipeline stages have equal shares.
    """
    total = busy_parts(costs, model, step)
    # Ahead of the kernels, as far as it can.
    beside = 0.0 if costs.device.family == CPU else sum(total.values())  # a CPU is its own host
    total["host"] = total["host"] + np.maximum(launched_s(costs, model) - beside, 0.0)
    return total


def busy_parts(costs: Costs, model: ServedModel, step: Step) -> dict[str, FloatArray]:
    """The same without what launching the kernels takes longer than they."""
    s, engine = costs.serving, costs.engine
    whole, splits = step.of_fullest(s.attention_dp, s.pp), engine.handling.splits
    mine = whole.part(splits)
    total = {part: np.zeros(np.shape(step.sequences)) for part in PARTS}
    for layer in model.layers:
        for part, seconds in layer_s(costs, layer, model.hidden, mine).items():
            total[part] = total[part] + layer.count * seconds
    rows = mine.sequences + mine.prompts  # the last token of each
    for matrix in model.head:
        if engine.handling.whole_head:
            matrix = replace(matrix, split="whole")
        total["gemm"] = total["gemm"] + costs.matrix_s(matrix, rows)
        if s.tp > 1 and not engine.handling.whole_head:
            size = rows * matrix.n * 2
            gathered = collective_s(costs.cluster, "all_gather", size, s.tp)
            total["tp_comm"] = total["tp_comm"] + gathered
    tokens = mine.tokens
    if s.tp > 1:  # a table of tokens split over the vocabulary
        total["tp_comm"] = total["tp_comm"] + costs.all_reduce_s(tokens * model.hidden * 2)
    if s.pp > 1:
        sent = collective_s(costs.cluster, "p2p", tokens * model.hidden * 2, 2)
        total["pp_comm"] = (s.pp - 1) * sent
    total = {part: splits * seconds for part, seconds in total.items()}
    # What an engine's own host does is its table's to say.
    own_s = host_of(costs.device).token_s if engine.kernel_host_s > 0 else None
    step_host_s = engine.step_host_s if own_s is None else own_s
    # Each replica of attention has a scheduler of its own.
    total["host"] = step_host_s + engine.sequence_host_s * step.sequences / s.attention_dp
    if s.tiers or s.kv_tier != "gpu":
        _add_below(total, below(costs, model, whole), costs)
    return total


def launched_s(costs: Costs, model: ServedModel) -> float:
    """What the host takes to launch a step's kernels, and the pieces that stream."""
    engine, host = costs.engine, host_of(costs.device)
    found = engine.handling.splits * engine.kernel_host_s * _launches(model)
    if engine.kernel_host_s > 0 and host.op_s is not None:
        found = host.op_s * model.eager_ops
    if host.piece_s is not None:
        found += host.piece_s * streamed_units(model, costs.serving)
    return found


def _add_below(total: dict[str, FloatArray], found: Below, costs: Costs) -> None:
    """What streams is exposed where it takes longer than all that runs beside it: weights beside
    the first part of a batch that is computed in parts, of the cache a part beside each."""
    tiers, splits = costs.serving.tiers, costs.engine.handling.splits
    on_cpu = costs.device.family == CPU
    routed = any(h.block == "routed_experts" and (on_cpu or h.place == "compute") for h in tiers)
    part = "moe" if routed else "gemm"
    spared = np.minimum(found.saved_s, total[part])
    total[part] = total[part] - spared
    total["cpu"] = found.on_host_s
    beside, cached = sum(total.values()) / splits, found.cached_s / splits
    first = np.maximum(found.stream_s + cached - beside, 0.0)
    others = (splits - 1) * np.maximum(cached - beside, 0.0)
    total["stream"] = found.fetched_s + first + others


def _launches(model: ServedModel) -> float:
    """Kernels of a step, an expert's or a block's chain counted once."""
    return float(sum(
        layer.count * (len(layer.matrices) + len(layer.attention) + len(layer.recurrences)
                       + 4 * len(layer.experts) + layer.light.kernels)
        for layer in model.layers
    ))  # fmt: skip


def step_s(costs: Costs, model: ServedModel, step: Step) -> FloatArray:
    """Seconds of one step."""
    return np.asarray(sum(step_parts(costs, model, step).values()))


def weight_bytes(model: ServedModel, s: Serving) -> float:
    """Bytes of weights on the fullest rank: the first stage has the embeddings, the last the
    head."""

    def size(block: str) -> float:
        return WEIGHT_BYTES[s.format_of(block)]

    def layer_bytes(layer: LayerShape) -> float:
        found = sum(m.held(s.tp) * size(m.part) for m in layer.matrices)
        experts = sum(e.elements for e in layer.experts)
        return found + experts / (s.ep * s.expert_tp) * size("routed_experts")

    each, stages = [layer_bytes(layer) for layer in model.layers], model.stages(s.pp)
    held = [sum(n * own for n, own in zip(counts, each, strict=True)) for counts in stages]
    table = model.embedding_elements / s.tp * size("embeddings")
    held[0] += table
    if not model.tied:
        held[-1] += sum(m.held(s.tp) for m in model.head) * size("head")
    elif s.pp > 1:  # a copy of what it is tied to
        held[-1] += table
    return max(held) + 2.0 * model.other_elements


def memory_of(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, load: ServeLoad
) -> Memory:
    """The fullest rank's memory."""
    length = load.prompt + load.output
    tokens = np.asarray(length)
    here, whole = (float(f(model, s, tokens)) for f in (kv_here_bytes, kv_bytes))
    lower = below_bytes(model, s)
    weights = weight_bytes(model, s) - lower.total + lower.buffers
    capacity = cluster.device.memory_bytes * engine.memory_share
    rows = -(-s.batch // (s.replicas * s.attention_dp))
    if cluster.device.family == CPU:  # no driver's context, no graphs, no pools of kernels
        context, workspace = 0.0, values_bytes(model, engine, s, load, rows, WEIGHT_BYTES["fp32"])
    else:
        context = CONTEXT_BYTES
        running = _running(model, engine, s, load, capacity - weights - context, here, rows)
        workspace = workspace_bytes(model, engine, s, load, running)
    return Memory(
        weights_bytes=weights, kv_bytes_per_sequence=here, kv_bytes_per_token=whole / length,
        workspace_bytes=workspace, context_bytes=context, capacity_bytes=capacity,
        kv_below_bytes_per_sequence=whole * (s.kv_tier != "gpu"),
        below_room_bytes=_below_room_bytes(cluster, s, dict(lower.tiers)),
    )  # fmt: skip


def _below_room_bytes(cluster: Cluster, s: Serving, taken: Mapping[str, float]) -> float:
    """What the cache of a rank may take below its GPU, beside the weights there."""
    if s.kv_tier == "gpu":
        return math.inf
    return cluster.tier(s.kv_tier).bytes / sharers(cluster, s) - taken.get(s.kv_tier, 0.0)


def _running(
    model: ServedModel, engine: ServingEngine, s: Serving, load: ServeLoad, free_bytes: float,
    kv_bytes_each: float, rows: int,
) -> float:  # fmt: skip
    """Of so many sequences those that there is room for with the values of their prompts."""
    one, every = (workspace_bytes(model, engine, s, load, n) for n in (1, rows))
    if every == WORKSPACE_BYTES or not kv_bytes_each:
        return rows
    values = every / rows  # of each: they are beyond what is reserved
    fit = max(free_bytes / (kv_bytes_each + values), (free_bytes - every) / kv_bytes_each)
    return min(max(min(fit, (free_bytes - one) / kv_bytes_each), 1.0), rows)


def workspace_bytes(
    model: ServedModel, engine: ServingEngine, s: Serving, load: ServeLoad, sequences: float
) -> float:
    """What an engine reserves on a GPU or, where it reads the prompts of so many sequences at once
    and their values are more, these."""
    if not engine.static:
        return WORKSPACE_BYTES
    width = WEIGHT_BYTES["fp32" if s.default == "fp32" else "bf16"]
    return max(WORKSPACE_BYTES, values_bytes(model, engine, s, load, sequences, width))


def values_bytes(
    model: ServedModel, engine: ServingEngine, s: Serving, load: ServeLoad, sequences: float,
    width_bytes: float,
) -> float:  # fmt: skip
    """Values of the pass that reads the prompts of so many sequences: the residual stream twice,
    what the widest matrix reads and writes, in fp32 the logits of each, and of several the mask."""
    matrices = [m for layer in model.layers for m in layer.matrices]
    widest = max((m.columns(s.tp) + m.inner(s.tp) for m in matrices), default=0.0)
    experts = [e.topk * (e.hidden + 2 * e.inter) for layer in model.layers for e in layer.experts]
    tokens = load.prompt * sequences / engine.handling.splits
    tokens = min(tokens, s.prefill_chunk or engine.chunk_tokens)
    each = 2 * model.hidden + max([widest, *experts])
    mask = engine.handling.mask_bytes * load.prompt**2 * sequences * (sequences > 1)
    return tokens * each * width_bytes + sequences * model.vocab * WEIGHT_BYTES["fp32"] + mask


def admitted(
    model: ServedModel, cluster: Cluster, engine: ServingEngine, s: Serving, load: ServeLoad
) -> float:
    """Sequences of one replica that the cache has room for at once; 0 where weights do not fit."""
    memory = memory_of(model, cluster, engine, s, load)
    room = memory.room_bytes
    written = load.output if engine.reserves else load.output / 2
    tokens = np.asarray(load.prompt + written)
    each = float(kv_bytes(model, s, tokens))
    if not each:  # nothing is kept of a sequence
        return float("inf") if room >= 0 else 0.0
    most = room / float(kv_here_bytes(model, s, tokens))
    if s.kv_tier != "gpu":
        most = min(most, memory.below_room_bytes / each)
    return max(np.floor(most), 0.0) * s.attention_dp


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What requests see, arrays over the concurrencies asked for.

    running: sequences of a replica that decode at once. tokens_per_s: of all replicas.
    """

    ttft_s: FloatArray
    tpot_s: FloatArray
    tokens_per_s: FloatArray
    running: FloatArray
    decode_s: FloatArray
    prefill_s: FloatArray
    parts: dict[str, FloatArray]


def _step_tokens(costs: Costs) -> int:
    """Tokens of prompts that a step of one replica of attention takes."""
    return costs.serving.prefill_chunk or costs.engine.chunk_tokens


def prompt_steps(
    costs: Costs, model: ServedModel, running: FloatArray, context: FloatArray,
    prompt: FloatArray, prompts: FloatArray,
) -> FloatArray:  # fmt: skip
    """Seconds of the steps that read `prompts` prompts at once while `running` sequences decode;
    of replicas of attention each reads prompts of its own."""
    costs, host_s = _reading(costs), costs.routed_host_s(model)
    found = np.zeros(np.shape(running))
    for reads, step in _prompt_steps(costs, running, context, prompt, prompts):
        for seconds in np.where(reads, step_s(costs, model, step) + host_s, 0.0):
            found = found + seconds
    return found


def prompt_parts(
    costs: Costs, model: ServedModel, prompt: float, prompts: float = 1.0
) -> dict[str, float]:
    """`prompt_steps` of so many prompts and nothing beside them, by part."""
    costs, host_s = _reading(costs), costs.routed_host_s(model)
    found: dict[str, float] = {}
    none = np.zeros(1)
    at = none + prompt
    for reads, step in _prompt_steps(costs, none, at, at, none + prompts):
        for part, seconds in step_parts(costs, model, step).items():
            found[part] = found.get(part, 0.0) + float(np.where(reads, seconds, 0.0).sum())
        found["host"] += float(np.where(reads, host_s, 0.0).sum())
    return found


def _reading(costs: Costs) -> Costs:
    """An engine that takes its requests as one batch reads all of them back to back, at the clock
    of a steady load."""
    return replace(costs, prompts_alone=True) if costs.engine.static else costs


def _prompt_steps(
    costs: Costs, running: FloatArray, context: FloatArray, prompt: FloatArray, prompts: FloatArray
) -> Iterator[tuple[NDArray[np.bool_], Step]]:
    """The steps that read prompts, STEPS_AT_ONCE as one: (where they read anything, step)."""
    chunk, fullest = _step_tokens(costs), np.maximum(prompts / costs.serving.attention_dp, 1.0)
    most = int(np.max(np.ceil(fullest * prompt / chunk)))
    room, left = np.maximum(chunk / fullest, 1.0), prompt * 1.0
    for first in range(0, most, STEPS_AT_ONCE):
        rows = []  # (tokens, tokens before) of each step
        for _ in range(min(STEPS_AT_ONCE, most - first)):
            new = np.minimum(left, room)
            rows.append((new, prompt - left))
            left = np.maximum(left - new, 0.0)
        new, past = (np.stack(column) for column in zip(*rows, strict=True))
        shape = np.shape(new)
        yield new > 0, step_of(
            np.broadcast_to(running, shape), np.broadcast_to(context, shape),
            np.where(new > 0, prompts, 0.0), new, past,
        )  # fmt: skip


def request_host_s(costs: Costs) -> float:
    """What the host takes for a request before its first step."""
    own_s = host_of(costs.device).request_s if costs.engine.kernel_host_s > 0 else None
    return costs.engine.request_host_s if own_s is None else own_s


def serve(
    costs: Costs, model: ServedModel, prompt: FloatArray, output: FloatArray,
    batch: FloatArray, room: FloatArray, arrivals: Arrivals = STEADY,
) -> Served:  # fmt: skip
    """A closed loop at each of the loads, arrays of one shape. room: sequences a replica admits."""
    s, engine = costs.serving, costs.engine
    each = np.maximum(batch / s.replicas, 1.0)
    running = np.minimum(each, np.maximum(room, 1.0))
    context = prompt + output / 2
    parts = step_parts(costs, model, step_of(running, context))
    decode_s = np.asarray(sum(parts.values()))
    others, none, one = np.maximum(running - 1, 0.0), 0.0 * running, np.ones(np.shape(running))
    chunk = _step_tokens(costs)
    steps = np.ceil(prompt / chunk)
    fit = np.floor(chunk / prompt)  # whole prompts of a step
    alone_s = prompt_steps(costs, model, none, context, prompt, one)
    if engine.mixes:
        own_s = prompt_steps(costs, model, others, context, prompt, one)
        delay_s = (own_s - steps * decode_s) / s.pp
    else:
        own_s, delay_s = alone_s, alone_s / s.pp
    at_once = one
    if s.attention_dp > 1:  # each replica of attention reads a prompt of its own beside the others
        a_prompt_s = (decode_s * output + others * np.maximum(delay_s, 0.0)) / running
        more = gathered(arrivals, others / output * arrivals.bunched)[1]
        together = np.maximum(own_s / a_prompt_s, 1 + more)
        at_once = np.clip(together, one, np.minimum(s.attention_dp, running))
        beside = others if engine.mixes else none
        own_s = prompt_steps(costs, model, beside, context, prompt, at_once)
        passed_s = steps * decode_s if engine.mixes else none
        delay_s = (own_s - passed_s) / at_once / s.pp
    group = np.where(fit >= 1, fit, chunk / prompt) * s.attention_dp
    # Prompts that are read together wait for the host together.
    a_step, host_s = others / output * arrivals.bunched, costs.routed_host_s(model)
    share = shared(arrivals, a_step, group, 1.0 if engine.mixes else arrivals.looked_every)
    delay_s = np.maximum(delay_s - steps * host_s * (1 - share) / at_once / s.pp, 0.0)
    # Stages read different prompts at once: those behind wait for one stage's share of each.
    # A request of the first wave waits for those behind it alone, half of the others.
    first = 1 / np.asarray(arrivals.waves, dtype=np.float64)
    behind = others * (1 - first / 2)
    tpot_s = decode_s + behind / output * delay_s
    if engine.mixes:
        steady_s = mixed_s(
            arrivals, others, output, decode_s, own_s, steps, group, at_once, host_s
        )
    else:
        steady_s = prior_s(
            arrivals, others, output, decode_s, own_s, steps, group, at_once, host_s
        )
    met = np.minimum(engine.wait_prompts, others / 2) / s.attention_dp  # of one's own replica
    steady_s = steady_s + met * (own_s - steps * host_s)
    # The first wave arrives at once: in groups of as many prompts as a step takes.
    together = np.minimum(np.maximum(fit, 1.0) * s.attention_dp, running)
    batch_s = prompt_steps(costs, model, none, context, prompt, together)
    if engine.mixes:  # those that were read decode meanwhile
        batch_s = batch_s + np.where(running > together, decode_s, 0.0)
    burst_s = (np.ceil(running / together) + 1) / 2 * batch_s
    burst_s = burst_s + (running + 1) / 2 * engine.arrival_host_s
    request_s = request_host_s(costs)
    ttft_s = request_s + first * burst_s + (1 - first) * steady_s
    if engine.static:
        tpot_s, ttft_s = decode_s, request_s + batch_s
    residence_s = ttft_s + (output - 1) * tpot_s
    ttft_s = ttft_s + (each - running) / running * residence_s
    rate = s.replicas * running * output / residence_s
    return Served(
        ttft_s=ttft_s, tpot_s=tpot_s, tokens_per_s=rate, running=running, decode_s=decode_s,
        prefill_s=alone_s, parts=parts,
    )  # fmt: skip
