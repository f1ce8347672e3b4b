"""Stand-ins for functions of transformers, so that a trace shows the graph which trains.

Exported as they are, its models build an explicit mask, repeat key and value heads, and unroll
scans over the sequence; eager training on a GPU does none of this. Here each of them is one
operator of `torch_ops`. The registrations are by our own name and change no other model; the
table replaces functions only inside `scans_as_operators`.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir.capture import torch_ops

NAME = "meshwright"
MASKED = "meshwright-masked"  # for models that read the mask outside their attention
assert torch_ops.NAMES  # imported for its registrations
ops = torch.ops.meshwright


def register() -> None:
    """Register attention, masks and experts under our name, in transformers' own interfaces."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    for name, mask in ((NAME, no_mask), (MASKED, sdpa_mask)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    with contextlib.suppress(ImportError):  # before 5.0 experts are loops in each model
        from transformers.integrations.moe import ExpertsInterface

        ExpertsInterface.register(NAME, experts)


def no_mask(*_: Any, **__: Any) -> None:
    """Causality and windows are arguments of the operator; without padding nothing else masks."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An AttentionInterface function: [b, heads, seq, d] each -> [b, seq, heads, d_v]."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = attention_mask
    if position_bias is not None:
        mask = position_bias if mask is None else position_bias + mask
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = ops.attention(
        query,
        key,
        value,
        mask,
        s_aux,
        scale,
        sliding_window or None,
        _chunk(module),
        softcap or None,
        bool(causal) and attention_mask is None and query.shape[2] > 1,
        float(dropout or 0.0),
    )
    return out, None


def _chunk(module: nn.Module) -> int | None:
    """Llama 4's rotary layers attend inside chunks, which only its mask says."""
    chunk = getattr(getattr(module, "config", None), "attention_chunk_size", None)
    return int(chunk) if chunk and getattr(module, "use_rope", False) else None


def experts(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """An ExpertsInterface function. hidden: [t, h]; index, weights: [t, k] -> [t, h]."""
    rows, offsets = ops.moe_experts_dispatch(hidden, index, self.num_experts)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    rows = _grouped_linear(self, name, rows, offsets)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = _grouped_linear(self, "down_proj", rows, offsets)
    if getattr(self, "has_post_expert_norm", False):
        rows = self.post_expert_norm(rows)
    return ops.moe_experts_combine(rows, weights, index).to(hidden.dtype)


def _grouped_linear(experts: Any, name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    weight = getattr(experts, name)
    matrix = weight if experts.is_transposed else weight.transpose(-2, -1)
    out = F.grouped_mm(rows.to(weight.dtype), matrix, offs=offsets)
    if experts.has_bias:
        out = ops.moe_experts_bias(out, getattr(experts, name + "_bias"), offsets)
    return out


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    if activation in (None, "silu", "swish"):
        return ops.causal_conv1d(hidden_states, weight, bias, "silu" if activation else "")
    from transformers.activations import ACT2FN

    return ACT2FN[activation](ops.causal_conv1d(hidden_states, weight, bias, ""))


def mamba_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    out = ops.selective_scan(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus)
    return (out, None) if return_last_state else out


def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    low, high = (float(limit) for limit in dt_limit)
    out = ops.ssd_scan(hidden_states, dt, A, B, C, D, dt_bias, chunk_size, dt_softplus, low, high)
    return (out, None) if return_final_states else out


def chunk_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    return ops.delta_rule(query, key, value, g, beta, chunk_size, use_qk_l2norm_in_kernel), None


def rwkv_linear_attention(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Any = None,
    return_state: bool = False,
) -> tuple[Tensor, Any]:
    return ops.wkv(time_decay, time_first, key, value), state


def rnn_scan(
    self: nn.Module,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, None]:
    return ops.linear_scan(hidden_states, recurrent_gate * ~reset), None


def mlstm(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, None]:
    return ops.mlstm(query, key, value, igate, fgate, self.config.chunk_size), None


def lightning_attention(
    self: Any, hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    batch, seq, _width = hidden_states.shape
    qkv = self.act_fn(self.qkv_proj(hidden_states))
    qkv = qkv.reshape(batch, seq, self.num_attention_heads, 3 * self.head_dim)
    query, key, value = (x.transpose(1, 2) for x in torch.split(qkv, self.head_dim, dim=3))
    decay = self.slope_rate.reshape(-1)
    out = ops.linear_attention(query, key, value, decay, self.block_size)
    out = self.norm(out.transpose(1, 2).reshape(batch, seq, -1))
    return self.out_proj(F.sigmoid(self.output_gate(hidden_states)) * out), None


def dbrx_experts(self: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weights of all experts are rows of one matrix: [experts * ffn, hidden]."""
    tokens = hidden_states.reshape(-1, self.hidden_size)
    rows, offsets = ops.moe_experts_dispatch(tokens, index, self.num_experts)
    shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    w1, v1, w2 = (w.view(shape) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
    gate = self.mlp.activation_fn(F.grouped_mm(rows, w1.transpose(1, 2), offs=offsets))
    rows = gate * F.grouped_mm(rows, v1.transpose(1, 2), offs=offsets)
    rows = F.grouped_mm(rows, w2, offs=offsets)
    return ops.moe_experts_combine(rows, weights, index).view(hidden_states.shape)


def longcat_experts(self: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The last experts are the identity: their rows pass by the matrices."""
    rows, offsets = ops.moe_experts_dispatch(hidden_states, index, self.total_experts)
    real = offsets[: self.num_routed_experts]
    up = self.gate_up_proj[: self.num_routed_experts].transpose(1, 2)
    gate, value = F.grouped_mm(rows, up, offs=real).chunk(2, dim=-1)
    out = F.grouped_mm(self.act_fn(gate) * value, self.down_proj.transpose(1, 2), offs=real)
    position = torch.arange(rows.shape[0], device=rows.device)
    rows = torch.where((position < real[-1]).unsqueeze(-1), out, rows)
    return ops.moe_experts_combine(rows, weights, index)


def gaussian_topk(self: Any, inputs: Tensor) -> Tensor:
    """Gemma 3n's cutoff, its normal quantile a number instead of a traced distribution."""
    quantile = statistics.NormalDist().inv_cdf(self.activation_sparsity)
    mean = inputs.mean(dim=-1, keepdim=True)
    return F.relu(inputs - (mean + inputs.std(dim=-1, keepdim=True, unbiased=False) * quantile))


# a function of a modelling file -> what stands in for it
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "mamba_selective_scan": mamba_selective_scan,
    "mamba2_chunk_scan": mamba2_chunk_scan,
    "torch_chunk_gated_delta_rule": chunk_delta_rule,
    "chunk_kimi_delta_attention": chunk_delta_rule,
    "rwkv_linear_attention": rwkv_linear_attention,
}
# (class, method) -> what stands in for it
METHODS: dict[tuple[str, str], Callable[..., Any]] = {
    ("RecurrentGemmaRglru", "_rnn_scan"): rnn_scan,
    ("MiniMaxLightningAttention", "forward"): lightning_attention,
    ("xLSTMBackend", "forward"): mlstm,
    ("Gemma3nTextMLP", "_gaussian_topk"): gaussian_topk,
    ("DbrxExperts", "forward"): dbrx_experts,
    ("LongcatFlashExperts", "forward"): longcat_experts,
}
# key of a configuration -> its value in a trace: Gemma 3n clamps small weights through `.data`
# at each training step, which export cannot record
SETTINGS: dict[str, Any] = {"altup_coef_clip": None}


@contextlib.contextmanager
def scans_as_operators(model: nn.Module) -> Iterator[None]:
    """Inside, the files and classes that the model is made of call the tables' functions."""
    classes = {type(module).__name__: type(module) for module in model.modules()}
    files = sorted({cls.__module__ for cls in classes.values()})
    with contextlib.ExitStack() as stack:
        for file in files:
            if file.startswith("transformers."):
                for name, function in FUNCTIONS.items():
                    stack.enter_context(_replaced(sys.modules[file], name, function))
        for config in (getattr(module, "config", None) for module in model.modules()):
            keys = vars(config) if hasattr(config, "__dict__") else {}
            known = {name: value for name, value in SETTINGS.items() if name in keys}
            stack.enter_context(mock.patch.dict(keys, known))  # past the configuration's checks
        for (cls, method), function in METHODS.items():
            if cls in classes:
                stack.enter_context(_replaced(classes[cls], method, function))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Set an attribute that exists, and put it back."""
    if name not in vars(owner):
        yield
        return
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
