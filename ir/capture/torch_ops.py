"""Composite torch operators: one node in a traced graph where eager PyTorch has dozens.

Each operator of namespace `meshwright` has a schema, a shape rule (its fake kernel) and a plain
reference, which is its CPU kernel. Its gradient is one more operator, `NAME_backward`, which runs
the reference again, so a joint graph also keeps one node each way. The references are for
correctness, not for speed: a kernel library runs the real thing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ir.capture import scans

Reference = Callable[..., Any]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    causal: bool,
    dropout: float,
) -> Tensor:
    """Softmax attention, grouped when n_q > n_kv. -> [b, s, n_q, d_v].

    q: [b, n_q, s, d]; k: [b, n_kv, t, d]; v: [b, n_kv, t, d_v]; mask: broadcastable to
    [b, n_q, s, t], added, or False where forbidden; sinks: [n_q], one more logit per head.
    window: a causal query sees this many keys, itself included; otherwise |i - j| <= window.
    chunk: a query sees keys of its own chunk of this length alone. softcap: c * tanh(logit / c).
    """
    if dropout:
        raise NotImplementedError("meshwright::attention with dropout is for tracing only")
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).float() for x in (k, v))
    logits = q.float() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~_visible(q, k, window, chunk, causal), float("-inf"))
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        logits = logits + mask
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2).to(q.dtype).contiguous()


def _visible(q: Tensor, k: Tensor, window: int | None, chunk: int | None, causal: bool) -> Tensor:
    """Which key each query sees, the last query aligned with the last key: [s, t] bool."""
    s, t = q.shape[2], k.shape[2]
    i = torch.arange(t - s, t, device=q.device)[:, None]
    j = torch.arange(t, device=q.device)[None, :]
    seen = j <= i if causal else torch.ones(s, t, dtype=torch.bool, device=q.device)
    if window is not None:
        seen = seen & ((i - j < window) if causal else ((i - j).abs() <= window))
    if chunk is not None:
        seen = seen & (i // chunk == j // chunk)
    return seen


def moe_experts_dispatch(hidden: Tensor, index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Copy each token once per chosen expert, ordered by expert.

    hidden: [t, h]; index: [t, k] experts -> rows [t * k, h] and offsets [num_experts] int32, the
    end of each expert's rows. An expert without tokens has an empty range.
    """
    order = torch.argsort(index.reshape(-1), stable=True)
    counts = torch.bincount(index.reshape(-1), minlength=num_experts)
    return hidden[order // index.shape[1]], counts.cumsum(0).to(torch.int32)


def moe_experts_bias(rows: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    """Add each expert's bias to its rows. rows: [n, f]; bias: [e, f]; offsets: [e] -> [n, f]."""
    position = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    return rows + bias[torch.searchsorted(offsets, position, right=True)]


def moe_experts_combine(rows: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Put rows back in token order and sum them with their router weights.

    rows: [t * k, h] by expert; weights: [t, k]; index: [t, k] as dispatched -> [t, h].
    """
    order = torch.argsort(index.reshape(-1), stable=True)
    by_token = torch.zeros_like(rows).index_copy(0, order, rows)
    shaped = by_token.reshape(*index.shape, rows.shape[-1])
    return (shaped * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Depthwise convolution over the past, with its activation ("" or "silu").

    x: [b, d, s]; weight: [d, width]; bias: [d] -> [b, d, s].
    """
    width = weight.shape[-1]
    padded = F.pad(x.to(weight.dtype), (width - 1, 0))
    out = F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1])
    return (F.silu(out) if activation == "silu" else out * 1).to(x.dtype)


def _dispatch_shape(hidden: Tensor, index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    rows = hidden.new_empty(index.numel(), hidden.shape[1])
    return rows, index.new_empty(num_experts, dtype=torch.int32)


def _attention_shape(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_third(_q: Tensor, _k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


_ONE = "Tensor"
_QKV = "Tensor q, Tensor k, Tensor v"
_SELECTIVE = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D"
# name: (arguments, results, reference, shape rule). The schema is the contract with the lowering.
_OPERATORS: dict[str, tuple[str, str, Reference, Reference]] = {
    "attention": (
        f"{_QKV}, Tensor? mask, Tensor? sinks, float scale, int? window, int? chunk, "
        "float? softcap, bool causal, float dropout",
        _ONE,
        attention,
        _attention_shape,
    ),
    "moe_experts_dispatch": (
        "Tensor hidden, Tensor index, int num_experts",
        "(Tensor rows, Tensor offsets)",
        moe_experts_dispatch,
        _dispatch_shape,
    ),
    "moe_experts_bias": (
        "Tensor rows, Tensor bias, Tensor offsets",
        _ONE,
        moe_experts_bias,
        _like_first,
    ),
    "moe_experts_combine": (
        "Tensor rows, Tensor weights, Tensor index",
        _ONE,
        moe_experts_combine,
        lambda rows, weights, index: rows.new_empty(index.shape[0], rows.shape[1]),
    ),
    "causal_conv1d": (
        "Tensor x, Tensor weight, Tensor? bias, str activation",
        _ONE,
        causal_conv1d,
        _like_first,
    ),
    "selective_scan": (
        f"{_SELECTIVE}, Tensor? z, Tensor? dt_bias, bool softplus",
        _ONE,
        scans.selective_scan,
        _like_first,
    ),
    "ssd_scan": (
        f"{_SELECTIVE}, Tensor? dt_bias, int chunk, bool softplus, float dt_min, float dt_max",
        _ONE,
        scans.ssd_scan,
        _like_first,
    ),
    "delta_rule": (
        f"{_QKV}, Tensor g, Tensor beta, int chunk, bool l2norm",
        _ONE,
        scans.delta_rule,
        _like_third,
    ),
    "linear_attention": (
        f"{_QKV}, Tensor? decay, int chunk",
        _ONE,
        scans.linear_attention,
        _like_third,
    ),
    "linear_scan": (
        "Tensor x, Tensor decay",
        _ONE,
        scans.linear_scan,
        _like_first,
    ),
    "mlstm": (
        f"{_QKV}, Tensor igate, Tensor fgate, int chunk",
        _ONE,
        scans.mlstm,
        _like_third,
    ),
    "wkv": (
        "Tensor time_decay, Tensor time_first, Tensor key, Tensor value",
        _ONE,
        scans.wkv,
        lambda time_decay, time_first, key, value: torch.empty_like(value),
    ),
}
NAMES = tuple(f"meshwright::{name}" for name in _OPERATORS)


def _differentiable(args: tuple[Any, ...]) -> list[int]:
    """Positions of the arguments that have a gradient."""
    return [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]


@contextlib.contextmanager
def _autograd_inside_kernel() -> Iterator[None]:
    """Record gradients in an operator's kernel, which the dispatcher runs below autograd."""
    keys = torch._C.DispatchKey
    hidden = (keys.AutogradFunctionality, keys.AutogradCPU, keys.AutogradCUDA, keys.ADInplaceOrView)
    with contextlib.ExitStack() as stack:
        for key in hidden:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def _define(name: str, arguments: str, results: str, reference: Reference, fake: Reference) -> None:
    """Register one operator, its shape rule and its gradient."""

    def backward_kernel(grad: Tensor, *args: Any) -> list[Tensor]:
        with _autograd_inside_kernel():
            inputs = list(args)
            for i in _differentiable(args):
                inputs[i] = args[i].detach().requires_grad_()
            out = reference(*inputs)
            wanted = [inputs[i] for i in _differentiable(args)]
            grads = torch.autograd.grad(out[0] if isinstance(out, tuple) else out, wanted, grad)
        return [g.detach().clone() for g in grads]

    def backward_fake(grad: Tensor, *args: Any) -> list[Tensor]:
        return [torch.empty_like(args[i]) for i in _differentiable(args)]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
        ctx.rest = [None if isinstance(a, Tensor) else (a,) for a in inputs]

    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        args = tuple(next(saved) if boxed is None else boxed[0] for boxed in ctx.rest)
        found = dict(zip(_differentiable(args), gradient(grad, *args)))
        return tuple(found.get(i) for i in range(len(args)))

    qualified = f"meshwright::{name}"
    operator = torch.library.custom_op(
        qualified, reference, mutates_args=(), schema=f"({arguments}) -> {results}"
    )
    gradient = torch.library.custom_op(
        f"{qualified}_backward",
        backward_kernel,
        mutates_args=(),
        schema=f"(Tensor grad, {arguments}) -> Tensor[]",
    )
    operator.register_fake(fake)
    gradient.register_fake(backward_fake)
    operator.register_autograd(backward, setup_context=setup_context)


for _name, _definition in _OPERATORS.items():
    _define(_name, *_definition)
