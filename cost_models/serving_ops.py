"""Seconds of a served model's kernels at one step: decoding sequences, and prompts beside them.

Each kernel is costed by the models that were fitted on single kernels (`gemm.py`, `attention.py`,
`moe.py`, `links.py`, `collectives.py`), with two differences: nothing that a layer reads is in the
cache still, for all other layers ran since; and of a kernel's start a step pays the engine's share.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models import serving_cpu as cpu
from cost_models.attention import decode_seconds, prefill_seconds
from cost_models.collectives import collective_s
from cost_models.compute import load_kernels
from cost_models.constants_table import load_constants
from cost_models.gemm import gemm_seconds
from cost_models.hardware import Cluster, Device
from cost_models.links import custom_all_reduce_seconds
from cost_models.moe import moe_seconds, rows_of_experts
from cost_models.op_models import constant, peak_of
from cost_models.op_rows import constants_name
from cost_models.serving_cpu import CPU
from cost_models.serving_decisions import KV_BYTES, WEIGHT_BYTES, Serving
from cost_models.serving_engines import ServingEngine
from cost_models.serving_kv import beside_bytes, seen
from cost_models.serving_shapes import (
    Attend,
    Experts,
    LayerShape,
    Light,
    Matrix,
    Recurrence,
    ServedModel,
)  # fmt: skip

FloatArray: TypeAlias = NDArray[np.float64]

PARTS = ("gemm", "attention", "moe", "elementwise", "tp_comm", "ep_comm", "pp_comm", "host")
_CUSTOM_BYTES = 8 << 20  # engines give larger sums to the library (vLLM's and SGLang's limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step's work, arrays of one shape: `sequences` that decode a token each, with `context`
    keys in the cache; `prompts` of `new` tokens each, behind `past` ones. Of one model replica; of
    one of its replicas of attention, whose fellows read `elsewhere` prompts (`of_fullest`)."""

    sequences: FloatArray
    context: FloatArray
    prompts: FloatArray
    new: FloatArray
    past: FloatArray
    elsewhere: FloatArray | float = 0.0

    @property
    def tokens(self) -> FloatArray:
        return np.asarray(self.sequences + self.prompts * self.new)

    def of_fullest(self, replicas: int, stages: int) -> Step:
        """What the fullest of so many replicas of attention does, in one of so many stages at once.
        Sequences are spread evenly; a prompt is one replica's, which reads all of it."""
        most = np.maximum(self.prompts / replicas, np.minimum(self.prompts, 1.0))
        return replace(self, sequences=self.sequences / (replicas * stages), prompts=most,
                       elsewhere=self.prompts - most)  # fmt: skip

    def part(self, splits: int) -> Step:
        """One of so many parts of it."""
        return replace(self, sequences=self.sequences / splits, prompts=self.prompts / splits)

    def of_all(self, replicas: int) -> FloatArray:
        """Tokens of all replicas of attention, which their experts share."""
        read = (self.prompts + self.elsewhere) * self.new
        return np.asarray(self.sequences * replicas + read)


def step_of(
    sequences: object, context: object, prompts: object = 0.0, new: object = 0.0,
    past: object = 0.0,
) -> Step:  # fmt: skip
    """A step of numbers or arrays, broadcast."""
    values = (np.asarray(x, dtype=np.float64) for x in (sequences, context, prompts, new, past))
    s, c, p, n, o = np.broadcast_arrays(*values)
    return Step(sequences=s, context=c, prompts=p, new=n, past=o)


# Kernels of a format where the tensor cores have it: constants, bytes an activation, its type.
_NATIVE = {
    "fp8": ("fp8_cutlass", 1.0, "fp8"), "fp8_block": ("fp8_block", 1.0, "fp8"),
    "fp4": ("fp4_flashinfer", 0.5625, "nvfp4"),
}  # fmt: skip
# Elsewhere weights are unpacked to 16 bits; 8-bit ones alike, 4-bit ones alike.
_UNPACKED = {"fp8": "int8_weight", "fp8_block": "int8_weight", "int8": "int8_weight",
             "int4": "int4_weight", "int4_64": "int4_weight", "int4_32": "int4_weight",
             "fp4": "int4_weight", "mxfp4": "int4_weight"}  # fmt: skip


def _gemm_family(device: Device, name: str) -> tuple[str, float, str]:
    """(constants, bytes an activation, type that the tensor cores multiply) of a format."""
    native = _NATIVE.get(name)
    if native and device.has(native[2]):
        return native
    return _UNPACKED.get(name, "bf16"), 2.0, "bf16"


_NATIVE_MOE = {
    "fp8": (("cutlass_fp8",), "fp8"), "fp8_block": (("deepgemm_fp8_block",), "fp8"),
    "fp4": (("cutlass_nvfp4", "min_latency_nvfp4"), "nvfp4"),
}  # fmt: skip
_UNPACKED_MOE = {
    "fp4": "triton_oai_w4a16_mxfp4", "mxfp4": "triton_oai_w4a16_mxfp4",
    "int4": "marlin_int4_wo", "int4_64": "marlin_int4_wo", "int4_32": "marlin_int4_wo",
    "bf16": "triton_vllm_bfloat16", "fp16": "triton_vllm_bfloat16",
}  # fmt: skip


def _moe_families(device: Device, name: str) -> tuple[tuple[str, ...], str]:
    """(kernel families, the quickest being taken; type that the tensor cores multiply)."""
    native = _NATIVE_MOE.get(name)
    if native and device.has(native[1]):
        return native
    return (_UNPACKED_MOE.get(name, "triton_vllm_bfloat16"),), "bf16"


_ATTENTION = {"hopper": "fa3", "blackwell": "trtllm"}
_STARTS = ("overhead_s",)


@functools.lru_cache(maxsize=1024)
def _constants(
    device: Device, model: str, family: str, start_share: float
) -> dict[str, FloatArray]:
    """The constants of an op class by name; starts are paid in part."""
    prefix = model + "."
    meta = ("samples", "median_error", "p90_error", "held_out_median_error", "held_out_p90_error")
    names = [c.name.removeprefix(prefix) for c in load_constants("common").items
             if c.name.startswith(prefix)]  # fmt: skip
    table = constants_name(device)
    return {
        name: np.asarray(
            constant(table, model, family, name) * (start_share if name in _STARTS else 1.0)
        )
        for name in names if "." not in name and name not in meta
    }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What kernels take for one engine on one cluster under one set of decisions. prompts_alone:
    nothing is decoded on these GPUs."""

    cluster: Cluster
    engine: ServingEngine
    serving: Serving
    prompts_alone: bool = False

    @property
    def device(self) -> Device:
        return self.cluster.device

    @property
    def clock(self) -> float:
        """Of the rated clock: what a steady load of large matrices keeps, where prompts follow one
        another; all of it where they come between decode steps, which draw less than the board
        may."""
        return load_kernels(self.device).clock if self.prompts_alone else 1.0

    def _facts(self, peak: str) -> dict[str, FloatArray]:
        return _facts(self.device, peak, self.clock)

    def _known(self, model: str, family: str) -> dict[str, FloatArray]:
        return _constants(self.device, model, family, self.engine.start_share)

    def matrix_s(self, matrix: Matrix, tokens: FloatArray, beside: bool = False) -> FloatArray:
        """One kernel of matrices for `tokens` tokens. beside: it starts while others run."""
        name = self.serving.format_of(matrix.part)
        if self.device.family == CPU:
            rows = np.maximum(tokens * matrix.rows, 1.0)
            columns, inner = matrix.columns(self.serving.tp), matrix.inner(self.serving.tp)
            return cpu.product_s(self.device, self.serving, name, rows, columns, inner)
        tp = self.serving.tp
        written_s = self.written_s(name, matrix.held(tp))
        name = "bf16" if self.engine.handling.unpacks(name) else name
        m = np.maximum(tokens * matrix.rows, 1.0)
        shape, each = np.shape(m), tuple(np.ravel(m).tolist())
        product_s = _one_product_s if len(each) == 1 else _product_s
        size, share = (matrix.columns(tp), matrix.inner(tp)), self.engine.start_share
        found: FloatArray = written_s + product_s(
            self.device, self.clock, share, name, each, shape, size, beside
        )
        return found

    def written_s(self, name: str, elements: FloatArray | float) -> FloatArray | float:
        """Of so many weights that are written out in 16 bits, 0 where a kernel has the format."""
        each = self.engine.handling.unpacks(name)
        return load_kernels(self.device).memory_bound_s(each * elements, 0) if each else 0.0

    def rows_of(self, matrix: Matrix, attention: tuple[Attend, ...], step: Step) -> FloatArray:
        """Tokens of a step that a matrix multiplies. What expands latents does so for prompts and
        what came before them; for sequences that decode where the engine expands their cache."""
        if not matrix.expands:
            return step.tokens
        rows = step.prompts * (step.new + step.past)
        if self.engine.expands_latents:
            rows = rows + step.sequences * seen(attention[0], step.context)
        return np.asarray(rows)

    def _expanded_s(self, attend: Attend, step: Step) -> FloatArray:
        """Heads' keys copied together of what a matrix made and the key that heads share."""
        heads = max(attend.heads / self.serving.tp, 1.0)
        tokens = step.sequences * seen(attend, step.context)
        moved = tokens * heads * (2 * attend.dim_qk - attend.rope) * 2
        return load_kernels(self.device).memory_bound_s(moved, 2)

    def attention_s(self, attend: Attend, step: Step) -> FloatArray:
        """Attention of a step: the sequences that decode, and the prompts."""
        if attend.latent and self.engine.expands_latents:
            heads_own = replace(attend, latent=0, rope=0, kv_heads=attend.heads)
            copied = np.where(step.sequences > 0, self._expanded_s(attend, step), 0.0)
            return copied + self.attention_s(heads_own, step)
        tp, device = self.serving.tp, self.device
        context = seen(attend, step.context) if attend.block else step.context
        if device.family == CPU:
            ours = (device, self.serving, attend)
            decoded = cpu.decode_s(*ours, step.sequences, context)
            read = cpu.prefill_s(*ours, step.prompts, step.new, step.past)
            return decoded + read + (self._policy_s(attend, step) if attend.block else 0.0)
        facts, handling, kv = self._facts("bf16"), self.engine.handling, self.serving.kv
        width = 2.0 if handling.unpacks_cache(kv) else KV_BYTES[kv]
        facts["kv_bytes"] = np.asarray(width)
        heads = np.asarray(max(attend.heads / tp, 1.0))
        own = attend.heads if handling.repeats_heads else attend.kv_heads
        kv_heads = np.asarray(max(own / tp, 1.0))
        qk, v = np.asarray(float(attend.dim_qk)), np.asarray(float(attend.dim_v))
        window, none = np.asarray(float(attend.window)), np.asarray(0.0)
        one = np.asarray(1.0)
        family = _ATTENTION.get(device.family, "fa2")
        family += "_fp8" if width == 1 else ""
        if attend.latent:
            latent = np.asarray(float(attend.latent))
            known = self._known("mla_decode", "absorbed")
            decode = decode_seconds(
                known, facts, step.sequences, context, heads, one,
                latent + attend.rope, latent, none, latent,
            )  # fmt: skip
            decode = decode + self._absorb_s(attend, heads, step.sequences)
            known, many = self._known("mla_prefill", "separate"), heads
        else:
            decode = decode_seconds(
                self._known("decode", family), facts, step.sequences, context, heads,
                kv_heads, qk, v, window, none,
            )  # fmt: skip
            known, many = self._known("prefill", family), kv_heads

        sees = np.asarray(float(attend.read_window))

        def prompts(queries: FloatArray) -> FloatArray:
            return prefill_seconds(
                known, facts, step.prompts, np.maximum(queries, 1.0), heads, many, qk, v, sees,
                steady=True,
            )  # fmt: skip

        behind = np.where(step.past > 0, prompts(step.past) - known["overhead_s"], 0.0)
        fresh = prompts(step.new + step.past) - behind
        each = handling.cache_moved_bytes(attend, kv, tp)
        if each:  # copied, permuted or written out before attention reads it
            moved = step.sequences * seen(attend, context) * each
            decode = decode + load_kernels(device).memory_bound_s(moved, 0)
        here = not (handling.attends and self.serving.kv_tier != "gpu")
        found = np.where((step.sequences > 0) & here, decode, 0.0)
        found = found + (self._policy_s(attend, step) if attend.block else 0.0)
        return np.asarray(found + np.where(step.new > 0, fresh, 0.0))

    def _policy_s(self, attend: Attend, step: Step) -> FloatArray:
        """What a lossy policy adds: mean keys scored, blocks picked and gathered, or a mean that
        grows; prompts' keys and values read once more for the means of their blocks."""
        kernels, s = load_kernels(self.device), self.serving
        decode = kernels.memory_bound_s(step.sequences * beside_bytes(attend, s, step.context), 1)
        decode = decode + (2 * kernels.gap_s if attend.top else 0.0)
        read = step.prompts * step.new * attend.cached(s.tp) * KV_BYTES[s.kv]
        found = np.where(step.sequences > 0, decode, 0.0)
        return found + np.where(step.new > 0, kernels.memory_bound_s(read, 1), 0.0)

    def _absorb_s(self, attend: Attend, heads: FloatArray, tokens: FloatArray) -> FloatArray:
        """Queries into the latent space and results out of it: a product a head each (MLA)."""
        facts = self._facts("bf16")
        facts |= {k: np.asarray(2.0) for k in ("weight_bytes", "in_bytes", "out_bytes")}
        known = self._known("gemm.bf16", "bf16")
        inner = np.asarray(float(attend.dim_qk - attend.rope))
        latent, m = np.asarray(float(attend.latent)), np.maximum(tokens, 1.0)
        into = gemm_seconds(known, facts, m, latent, inner, heads, copies=1.0, steady=True)
        back = np.asarray(float(attend.dim_v))
        out = gemm_seconds(known, facts, m, back, latent, heads, copies=1.0, steady=True)
        return into + out

    def experts_s(self, experts: Experts, tokens: FloatArray) -> FloatArray:
        """The routed experts of one rank, `tokens` being of all ranks that share them."""
        s = self.serving
        name = s.format_of("routed_experts")
        if self.device.family == CPU:
            return cpu.experts_s(self.device, s, name, experts, tokens)
        missed = (1 - experts.topk / experts.experts) ** np.asarray(tokens)
        hit = experts.elements / s.expert_tp * (1 - missed) / s.ep
        written_s = self.written_s(name, hit)
        name = "bf16" if self.engine.handling.unpacks(name) else name
        families, peak = _moe_families(self.device, name)
        flat = np.maximum(np.round(np.ravel(tokens)), 1.0)
        unique, back = np.unique(flat, return_inverse=True)
        loads = [self._rows(int(t), experts) for t in unique]
        facts = self._facts(peak)
        facts["weight_bytes"] = np.asarray(WEIGHT_BYTES[name])
        shape = np.ones(len(unique))

        def seconds(family: str) -> FloatArray:
            known = self._known("moe", family) | {"elsewhere": np.asarray(0.0)}
            return moe_seconds(
                known, facts, loads, unique, shape * experts.topk, shape * experts.hidden,
                shape * (experts.inter / s.expert_tp), shape > 0,
                np.full((2, len(unique)), 64, dtype=np.int64), steady=True,
            )  # fmt: skip

        found = functools.reduce(np.minimum, map(seconds, families))
        return np.asarray(written_s + found[back].reshape(np.shape(tokens)))

    def routed_host_s(self, model: ServedModel) -> float:
        """Host time of a step that reads prompts, in the routed layers: a chain of kernels that are
        launched one by one. But 4-bit experts on tensor cores that have them are one call, from the
        router's logits to the sum (FlashInfer's trtllm_fp4_block_scale_moe)."""
        _, peak = _moe_families(self.device, self.serving.format_of("routed_experts"))
        return 0.0 if peak == "nvfp4" else self.engine.routed_op_host_s * model.routed_ops

    def _rows(self, tokens: int, experts: Experts) -> tuple[float, ...]:
        """Rows of each expert of the busiest rank that is given any."""
        ep, skew = self.serving.ep, self.engine.skew
        if skew:
            return rows_of_experts(tokens, experts.experts, experts.topk, ep, skew)
        local = experts.experts / ep
        hit = local * (1 - (1 - experts.topk / experts.experts) ** tokens)
        count = max(1, round(hit))
        return (tokens * experts.topk / ep / count,) * count

    def light_s(self, light: Light, tokens: FloatArray) -> FloatArray:
        """Norms, rotations, activations: kernels that stream."""
        if self.device.family == CPU:
            return cpu.light_s(self.device, self.serving, light, tokens)
        kernels = load_kernels(self.device)
        moved = tokens * (light.whole_bytes + light.split_bytes / self.serving.tp)
        start_s = self.engine.start_share * kernels.gap_s
        return np.asarray(kernels.memory_bound_s(moved, 0) + light.kernels * start_s)

    def recurrence_s(self, one: Recurrence, step: Step) -> FloatArray:
        """Decode reads and writes each sequence's state; prompts run in chunks."""
        kernels, tp = load_kernels(self.device), self.serving.tp
        state = 2 * one.state_bytes / tp * step.sequences
        decode = kernels.memory_bound_s(state, 1)
        tokens = step.prompts * step.new
        scan = kernels.scan_s("bf16", tokens * one.flop / tp, tokens * one.moved_bytes / tp)
        found = np.where(step.sequences > 0, decode, 0.0)
        return np.asarray(found + np.where(tokens > 0, scan, 0.0))

    def all_reduce_s(self, size_bytes: FloatArray) -> FloatArray:
        """Sum over the tp ranks."""
        tp, cluster = self.serving.tp, self.cluster
        library = collective_s(cluster, "all_reduce", size_bytes, tp)
        if self.engine.all_reduce == "library" or tp > cluster.domain_ranks:
            return library
        known = _constants(self.device, "custom_all_reduce", self.engine.all_reduce, 1.0)
        line = np.asarray(cluster.intra.bytes_per_s)
        ranks = np.asarray(float(tp))
        custom = custom_all_reduce_seconds(known, size_bytes, ranks, line, library)
        return np.where(size_bytes <= _CUSTOM_BYTES, custom, library)

    def exchange_s(self, size_bytes: FloatArray) -> FloatArray:
        """Tokens of all attention replicas to the experts' ranks and back: gathered, reduced.
        size_bytes: of them in 16 bits, which 4-bit tensor cores' are quantized from before they
        are sent (vLLM's pull request 30014, SGLang's 7667)."""
        ranks = self.serving.ranks
        _, width, peak = _gemm_family(self.device, self.serving.format_of("routed_experts"))
        sent = size_bytes * (width / 2 if peak == "nvfp4" else 1.0)
        gathered = collective_s(self.cluster, "all_gather", sent, ranks)
        return gathered + collective_s(self.cluster, "reduce_scatter", size_bytes, ranks)


def _facts(device: Device, peak: str, clock: float) -> dict[str, FloatArray]:
    numbers = {
        "flop_per_s": peak_of(device, peak) * clock, "sm": float(device.sm_count),
        "bytes_per_s": device.memory_bandwidth_bytes_per_s, "l2_bytes": 1.0,
    }  # fmt: skip
    return {name: np.asarray(value) for name, value in numbers.items()}


def _product_s(
    device: Device, clock: float, start_share: float, name: str, rows: tuple[float, ...],
    shape: tuple[int, ...], size: tuple[float, float], beside: bool,
) -> FloatArray:  # fmt: skip
    """Of so many rows, of that shape, with [inner, columns] weights in a format."""
    family, width, peak = _gemm_family(device, name)
    facts = _facts(device, peak, clock)
    sizes = {"weight_bytes": WEIGHT_BYTES[name], "in_bytes": width, "out_bytes": 2.0}
    facts |= {key: np.asarray(value) for key, value in sizes.items()}
    known = _constants(device, f"gemm.{family}", family, start_share)
    known = known | {"overhead_s": np.asarray(0.0)} if beside else known
    m, (n, k) = np.asarray(rows).reshape(shape), map(np.asarray, size)
    found = gemm_seconds(known, facts, m, n, k, np.asarray(1.0), copies=1.0, steady=True,
                         narrow=family != "bf16")  # fmt: skip
    found.setflags(write=False)  # it may be kept
    return found


# a search asks for the same few products thousands of times, as blocks lie elsewhere
_one_product_s = functools.lru_cache(maxsize=1 << 14)(_product_s)


def layer_s(costs: Costs, layer: LayerShape, hidden: int, step: Step) -> dict[str, FloatArray]:
    """Seconds of one layer by part; `step` is of one attention replica."""
    s = costs.serving
    tokens = step.tokens
    shared = step.of_all(s.attention_dp)  # what the experts' ranks see
    parts = {part: np.zeros(np.shape(tokens)) for part in PARTS}
    for matrix in layer.matrices:  # shared experts run on a stream beside the routed ones
        beside = matrix.block == "shared_experts"
        rows = costs.rows_of(matrix, layer.attention, step)
        for one in costs.engine.handling.kernels_of(matrix):
            spent = costs.matrix_s(one, rows, beside)
            parts["gemm"] = parts["gemm"] + np.where(rows > 0, spent, 0.0)
    for attend in layer.attention:
        parts["attention"] = parts["attention"] + costs.attention_s(attend, step)
    for state in layer.recurrences:
        parts["attention"] = parts["attention"] + costs.recurrence_s(state, step)
    for experts in layer.experts:
        parts["moe"] = parts["moe"] + costs.experts_s(experts, shared)
    parts["elementwise"] = costs.light_s(layer.light, tokens)
    if s.tp > 1:
        size = tokens * hidden * 2
        sums = len(layer.reductions) - (bool(layer.experts) and s.attention_dp > 1)
        parts["tp_comm"] = sums * costs.all_reduce_s(size)
        if layer.norm_reductions:
            parts["tp_comm"] = parts["tp_comm"] + costs.all_reduce_s(tokens * 8)
    if layer.experts and s.attention_dp > 1:
        parts["ep_comm"] = costs.exchange_s(shared * hidden * 2)
    return parts
