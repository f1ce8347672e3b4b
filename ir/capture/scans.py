"""Recurrences over the sequence, written step by step: the meaning of the scan operators.

Each takes the tensors that the published kernels take, computes in fp32 and starts from an empty
state. `chunk` is the block length of a kernel's matrix form: it sets a cost, never a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    """Mamba's scan: state_t = exp(dt A) state_{t-1} + dt B x, y = C state + D x, times silu(z).

    x, dt, z: [b, d, s]; A: [d, n]; B, C: [b, n, s]; D, dt_bias: [d] -> [b, d, s].
    """
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()[:, None]
    step = F.softplus(step) if softplus else step
    decay = torch.exp(step.unsqueeze(-1) * A.float()[:, None, :])
    drive = (step * x.float()).unsqueeze(-1) * B.float().transpose(1, 2).unsqueeze(1)
    y = torch.einsum("bdsn,bns->bds", _recurrence(decay, drive, dim=2), C.float())
    y = y if D is None else y + x.float() * D.float()[:, None]
    return (y if z is None else y * F.silu(z.float())).to(x.dtype).contiguous()


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    chunk: int,
    softplus: bool,
    dt_min: float,
    dt_max: float,
) -> Tensor:
    """Mamba-2's scan: as `selective_scan`, with one decay per head.

    x: [b, s, h, p]; dt: [b, s, h]; A, D, dt_bias: [h]; B, C: [b, s, groups, n] -> [b, s, h, p].
    chunk: the block length of the matrix form, for its cost alone.
    """
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = (F.softplus(step) if softplus else step).clamp(dt_min, dt_max)
    per_group = x.shape[2] // B.shape[2]
    B, C = (m.float().repeat_interleave(per_group, dim=2) for m in (B, C))
    decay = torch.exp(step * A.float())[..., None, None]
    drive = (step.unsqueeze(-1) * x.float()).unsqueeze(-1) * B.unsqueeze(-2)
    y = torch.einsum("bshpn,bshn->bshp", _recurrence(decay, drive, dim=1), C)
    return (y if D is None else y + x.float() * D.float()[:, None]).to(x.dtype).contiguous()


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int, l2norm: bool
) -> Tensor:
    """Gated delta rule: decay the state by exp(g), then correct what it predicts for k by beta.

    q, k: [b, s, h_k, d_k]; v: [b, s, h_v, d_v]; g: [b, s, h_v], or [b, s, h_v, d_k] with a decay
    per channel; beta: [b, s, h_v] -> [b, s, h_v, d_v]. q is scaled by d_k ** -0.5.
    """
    heads, k_dim = v.shape[2], k.shape[3]
    normal = [x.float() for x in (q, k)]
    if l2norm:
        normal = [x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in normal]
    query, key = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in normal)
    decay = torch.exp(g.float()).reshape(*g.shape[:3], -1, 1)
    state = v.new_zeros(v.shape[0], heads, k_dim, v.shape[3], dtype=torch.float32)
    out = []
    for t in range(v.shape[1]):
        state = state * decay[:, t]
        known = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        delta = (v[:, t].float() - known) * beta[:, t].float().unsqueeze(-1)
        state = state + key[:, t].unsqueeze(-1) * delta.unsqueeze(-2)
        out.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return (torch.stack(out, dim=1) * k_dim**-0.5).to(v.dtype)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, chunk: int) -> Tensor:
    """Attention without softmax: state_t = exp(-decay) state_{t-1} + k v, out = q state.

    q, k: [b, h, s, d]; v: [b, h, s, d_v]; decay: [h], a rate per head -> [b, h, s, d_v].
    """
    rate = torch.ones_like(q[0, :, 0, 0]) if decay is None else torch.exp(-decay.float())
    drive = k.float().unsqueeze(-1) * v.float().unsqueeze(-2)
    states = _recurrence(rate.float()[:, None, None, None], drive, dim=2)
    return torch.einsum("bhsk,bhskv->bhsv", q.float(), states).to(v.dtype).contiguous()


def linear_scan(x: Tensor, decay: Tensor) -> Tensor:
    """Elementwise recurrence h_t = decay_t h_{t-1} + x_t. x, decay: [b, s, d] -> [b, s, d]."""
    return _recurrence(decay.float(), x.float(), dim=1).to(x.dtype)


def mlstm(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, chunk: int) -> Tensor:
    """xLSTM's matrix memory: linear attention with gates per step and a running normaliser.

    q, k: [b, h, s, d]; v: [b, h, s, d_v]; igate (log), fgate (before sigmoid): [b, h, s]
    -> [b, h, s, d_v]. q is scaled by d ** -0.5.
    """
    query, key, value = q.float() * q.shape[-1] ** -0.5, k.float(), v.float()
    memory = torch.zeros_like(key[:, :, 0].unsqueeze(-1) * value[:, :, 0].unsqueeze(-2))
    total, peak = torch.zeros_like(key[:, :, 0]), torch.zeros_like(igate[:, :, 0].float())
    out = []
    for t in range(v.shape[2]):
        decay, drive = F.logsigmoid(fgate[:, :, t].float()) + peak, igate[:, :, t].float()
        peak = torch.maximum(decay, drive)
        old, new = (torch.exp(x - peak).unsqueeze(-1) for x in (decay, drive))
        update = key[:, :, t].unsqueeze(-1) * value[:, :, t].unsqueeze(-2)
        memory = old.unsqueeze(-1) * memory + new.unsqueeze(-1) * update
        total = old * total + new * key[:, :, t]
        bound = torch.maximum((total * query[:, :, t]).sum(-1).abs(), torch.exp(-peak)) + 1e-6
        out.append(torch.einsum("bhkv,bhk->bhv", memory, query[:, :, t]) / bound.unsqueeze(-1))
    return torch.stack(out, dim=2).to(v.dtype)


def wkv(time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """RWKV's average of values, weighted by exp(key) and an exponential decay per channel.

    time_decay (log of the rate), time_first: [d]; key, value: [b, s, d] -> [b, s, d].
    """
    rate = -torch.exp(time_decay.float())
    top = bottom = torch.zeros_like(key[:, 0], dtype=torch.float32)
    peak = torch.full_like(top, -1e38)
    out = []
    for t in range(key.shape[1]):
        k, v = key[:, t].float(), value[:, t].float()
        high = torch.maximum(peak, k + time_first)
        old, new = torch.exp(peak - high), torch.exp(k + time_first - high)
        out.append((old * top + new * v) / (old * bottom + new))
        high = torch.maximum(peak + rate, k)
        old, new = torch.exp(peak + rate - high), torch.exp(k - high)
        top, bottom, peak = old * top + new * v, old * bottom + new, high
    return torch.stack(out, dim=1).to(value.dtype)


def _recurrence(decay: Tensor, drive: Tensor, dim: int) -> Tensor:
    """All states of state_t = decay_t state_{t-1} + drive_t along `dim`, from zero."""
    decay = decay.expand_as(drive)
    state, states = torch.zeros_like(drive.select(dim, 0)), []
    for t in range(drive.shape[dim]):
        state = decay.select(dim, t) * state + drive.select(dim, t)
        states.append(state)
    return torch.stack(states, dim=dim)
