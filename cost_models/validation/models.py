"""The models of published runs, by their printed dimensions: GPT, Llama, MoE, MLA, Mamba-2 hybrid.

A run of a validation file becomes a graph by tracing `build` at its dimensions, as `plan trace`
traces any model; nothing here is trained. Dimensions that tables leave out (low ranks of MLA, the
state of Mamba-2) are those of the public model of that kind.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir.capture import torch_ops as _operators  # registers the operators used below

ops = torch.ops.meshwright
assert _operators


class Norm(nn.Module):
    """RMS norm, or layer norm with a bias."""

    def __new__(cls, kind: str, dim: int) -> nn.Module:  # type: ignore[misc]
        return nn.LayerNorm(dim) if kind == "layer" else nn.RMSNorm(dim, eps=1e-5)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + half) of x: [batch, heads, seq, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, flash: bool) -> Tensor:
    """Causal attention, [b, heads, s, d] each -> [b, s, heads * d]; not flash: scores in memory."""
    scale = q.shape[-1] ** -0.5
    if flash:
        out = ops.attention(q, k, v, None, None, scale, window, None, None, True, 0.0)
        return out.flatten(2)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    weights = F.softmax(scores, dim=-1)  # fused with its mask, as Megatron's kernel is
    return torch.matmul(weights, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, bias: bool, rope: bool,
        window: int, flash: bool, qk_norm: bool,
    ):  # fmt: skip
        super().__init__()
        self.head_dim, self.rope, self.window, self.flash = head_dim, rope, window or None, flash
        self.wq = nn.Linear(dim, heads * head_dim, bias=bias)
        self.wk = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.wv = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.wo = nn.Linear(heads * head_dim, dim, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.wo(attend(q, k, v, self.window, self.flash))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), expanded as training does."""

    def __init__(
        self, dim: int, heads: int, q_rank: int, kv_rank: int, nope: int, rope: int, v_dim: int
    ):
        super().__init__()
        self.heads, self.nope, self.rope, self.kv_rank = heads, nope, rope, kv_rank
        self.wq_a = nn.Linear(dim, q_rank, bias=False) if q_rank else nn.Identity()
        self.q_norm = nn.RMSNorm(q_rank) if q_rank else nn.Identity()
        self.wq_b = nn.Linear(q_rank or dim, heads * (nope + rope), bias=False)
        self.wkv_a = nn.Linear(dim, kv_rank, bias=False)
        self.wk_rope = nn.Linear(dim, rope, bias=False)
        self.kv_norm = nn.RMSNorm(kv_rank)
        self.wk_b = nn.Linear(kv_rank, heads * nope, bias=False)
        self.wv_b = nn.Linear(kv_rank, heads * v_dim, bias=False)
        self.wo = nn.Linear(heads * v_dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos[:, : self.rope], sin[:, : self.rope]
        q = self.wq_b(self.q_norm(self.wq_a(x))).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q = torch.cat((q[..., : self.nope], rotate(q[..., self.nope :], cos, sin)), dim=-1)
        low = self.kv_norm(self.wkv_a(x))
        k = self.wk_b(low).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        shared = rotate(self.wk_rope(x).unsqueeze(1), cos, sin)
        k = torch.cat((k, shared.expand(-1, self.heads, -1, -1)), dim=-1)
        v = self.wv_b(low).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.wo(attend(q, k, v, None, True))


class SharedKeyAttention(nn.Module):
    """One key-value head that all heads share, queries and results of low rank, a short window
    beside compressed keys: DeepSeek-V4-Flash, its sparse attention taken as one window."""

    def __init__(self, dim: int, heads: int, head_dim: int, rank: int, groups: int, window: int):
        super().__init__()
        self.head_dim, self.groups, self.window = head_dim, groups, window
        self.wq_a = nn.Linear(dim, rank, bias=False)
        self.q_norm = nn.RMSNorm(rank)
        self.wq_b = nn.Linear(rank, heads * head_dim, bias=False)
        self.wkv = nn.Linear(dim, head_dim, bias=False)
        self.kv_norm = nn.RMSNorm(head_dim)
        wide = heads * head_dim // groups
        self.wo_a = nn.ModuleList(nn.Linear(wide, rank, bias=False) for _ in range(groups))
        self.wo_b = nn.Linear(groups * rank, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.wq_b(self.q_norm(self.wq_a(x))).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        kv = self.kv_norm(self.wkv(x)).unsqueeze(1)
        out = attend(q, kv, kv, self.window, True).chunk(self.groups, dim=-1)
        return self.wo_b(torch.cat([w(o) for w, o in zip(self.wo_a, out)], dim=-1))


class Mamba2(nn.Module):
    """A Mamba-2 mixer (arXiv:2405.21060)."""

    def __init__(self, dim: int, heads: int, head_dim: int, groups: int, state: int):
        super().__init__()
        self.head_dim, self.groups, self.state = head_dim, groups, state
        inner = heads * head_dim
        self.wz = nn.Linear(dim, inner, bias=False)
        self.wx = nn.Linear(dim, inner, bias=False)
        self.wbc = nn.Linear(dim, 2 * groups * state, bias=False)
        self.wdt = nn.Linear(dim, heads, bias=False)
        self.conv = nn.Parameter(torch.empty(inner, 4))
        self.conv_bc = nn.Parameter(torch.empty(2 * groups * state, 4))
        self.log_a = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.d = nn.Parameter(torch.empty(heads))
        self.norm = nn.RMSNorm(inner)
        self.wo = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.wz(x)
        mixed = ops.causal_conv1d(self.wx(x).transpose(1, 2), self.conv, None, "silu")
        other = ops.causal_conv1d(self.wbc(x).transpose(1, 2), self.conv_bc, None, "silu")
        b, c = other.transpose(1, 2).unflatten(-1, (-1, self.state)).chunk(2, dim=2)
        out = ops.ssd_scan(
            mixed.transpose(1, 2).unflatten(-1, (-1, self.head_dim)), self.wdt(x),
            -self.log_a.exp(), b, c, self.d, self.dt_bias, 128, True, 0.0, float("inf"),
        )  # fmt: skip
        return self.wo(self.norm(out.flatten(2) * F.silu(z)))


def activate(kind: str, x: Tensor, gate: Tensor | None) -> Tensor:
    if kind == "swiglu":
        assert gate is not None
        return F.silu(gate) * x
    return F.gelu(x) if kind == "gelu" else F.relu(x).square()


class FeedForward(nn.Module):
    """Two matmuls, or three where it is gated."""

    def __init__(self, dim: int, hidden: int, kind: str, bias: bool):
        super().__init__()
        self.kind = kind
        self.w1 = nn.Linear(dim, hidden, bias=bias)
        self.w3 = nn.Linear(dim, hidden, bias=bias) if kind == "swiglu" else None
        self.w2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(activate(self.kind, self.w1(x), self.w3(x) if self.w3 else None))


class Experts(nn.Module):
    """Routed experts, dropless, beside shared ones; latent: experts work at a smaller width."""

    def __init__(
        self, dim: int, hidden: int, n_experts: int, top_k: int, shared: int, kind: str, latent: int
    ):
        super().__init__()
        self.n_experts, self.top_k, self.kind = n_experts, top_k, kind
        self.router = nn.Linear(dim, n_experts, bias=False)
        self.shared = FeedForward(dim, shared, kind, False) if shared else None
        self.down = nn.Linear(dim, latent, bias=False) if latent else nn.Identity()
        self.up = nn.Linear(latent, dim, bias=False) if latent else nn.Identity()
        width = latent or dim
        self.w1 = nn.Parameter(torch.empty(n_experts, width, hidden))
        self.w2 = nn.Parameter(torch.empty(n_experts, hidden, width))
        self.w3 = nn.Parameter(torch.empty(n_experts, width, hidden)) if kind == "swiglu" else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).float().softmax(-1).topk(self.top_k, dim=-1)
        rows, ends = ops.moe_experts_dispatch(self.down(tokens), chosen, self.n_experts)
        gate = F.grouped_mm(rows, self.w3, offs=ends) if self.w3 is not None else None
        rows = activate(self.kind, F.grouped_mm(rows, self.w1, offs=ends), gate)
        rows = F.grouped_mm(rows, self.w2, offs=ends)
        out = self.up(ops.moe_experts_combine(rows, weights, chosen).to(x.dtype)).view_as(x)
        return out if self.shared is None else out + self.shared(x)


class Block(nn.Module):
    """Norm, mixer, residual; norm, feed-forward, residual: either may be absent."""

    def __init__(self, dim: int, norm: str, mixer: nn.Module | None, mlp: nn.Module | None):
        super().__init__()
        self.rotary = not isinstance(mixer, Mamba2)
        self.mixer_norm = Norm(norm, dim) if mixer is not None else None
        self.mixer = mixer
        self.mlp_norm = Norm(norm, dim) if mlp is not None else None
        self.mlp = mlp

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.mixer is not None and self.mixer_norm is not None:
            y = self.mixer_norm(x)
            x = x + (self.mixer(y, cos, sin) if self.rotary else self.mixer(y))
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x


class Decoder(nn.Module):
    """Embedding, blocks, norm, head; further: one more block predicts the token after the next
    (DeepSeek-V3, arXiv:2412.19437, section 2.2) through the same head."""

    def __init__(
        self, blocks: list[nn.Module], further: nn.Module | None, dim: int, vocab: int, norm: str,
        length: int, rope_dim: int, tied: bool,
    ):  # fmt: skip
        super().__init__()
        self.max_seq_len = length
        self.embed_tokens = nn.Embedding(vocab, dim)
        self.positions = None if rope_dim else nn.Embedding(length, dim)
        self.layers = nn.ModuleList(blocks)
        self.further = further
        self.norm = Norm(norm, dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        width = rope_dim or 2
        rate = 1e4 ** (-torch.arange(0, width, 2).float() / width)
        angle = torch.outer(torch.arange(length).float(), rate).repeat(1, 2)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(input_ids.shape[1], device=x.device))
        cos, sin = self.cos[: input_ids.shape[1]], self.sin[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        if self.further is not None:
            x = torch.cat((x, self.further(x, cos, sin)), dim=1)
        return self.lm_head(self.norm(x))


def build(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    seq_len: int,
    family: str = "llama",
    attention: str = "gqa",
    activation: str = "swiglu",
    flash: int = 1,
    qk_norm: int = 0,
    window: int = 0,
    tied: int = 0,
    experts: int = 0,
    top_k: int = 0,
    expert_ffn: int = 0,
    shared_ffn: int = 0,
    latent: int = 0,
    dense_layers: int = 0,
    further: int = 0,
    pattern: str = "",
    q_rank: int = 0,
    kv_rank: int = 512,
    mamba_heads: int = 0,
) -> nn.Module:
    """A decoder of those dimensions, tokens and elements.

    family: "llama" (RMS norm, rotary, no bias) or "gpt" (layer norm, learned positions, bias).
    attention: "gqa", "mla" or "shared" (one key-value head). activation: "swiglu", "gelu",
    "relu2". flash 0: scores are written to memory. window: of every second layer's attention.
    shared_ffn: width of all shared experts. pattern: a letter a layer, M Mamba-2, * attention,
    E experts, - feed-forward; empty: every layer has attention and a feed-forward.
    """
    gpt = family == "gpt"
    norm, bias = ("layer", True) if gpt else ("rms", False)

    def attend_(layer: int) -> nn.Module:
        if attention == "mla":
            return LatentAttention(hidden, heads, q_rank, kv_rank, 128, 64, 128)
        if attention == "shared":
            return SharedKeyAttention(hidden, heads, head_dim, 1024, 8, window)
        near = window if layer % 2 == 0 else 0
        return Attention(
            hidden, heads, kv_heads, head_dim, bias, not gpt, near, bool(flash), bool(qk_norm)
        )

    def routed() -> nn.Module:
        return Experts(hidden, expert_ffn, experts, top_k, shared_ffn, activation, latent)

    def dense() -> nn.Module:
        return FeedForward(hidden, ffn, activation, bias)

    def block(layer: int) -> nn.Module:
        kind = pattern[layer] if pattern else ""
        if kind == "M":
            return Block(hidden, norm, Mamba2(hidden, mamba_heads, 64, 8, 128), None)
        if kind == "*":
            return Block(hidden, norm, attend_(layer), None)
        if kind:
            return Block(hidden, norm, None, routed() if kind == "E" else dense())
        mlp = routed() if experts and layer >= dense_layers else dense()
        return Block(hidden, norm, attend_(layer), mlp)

    rope_dim = 0 if gpt else 64 if attention == "mla" else head_dim
    return Decoder(
        [block(i) for i in range(layers)], Block(hidden, norm, attend_(0), routed()) if further
        else None, hidden, vocab, norm, seq_len, rope_dim, bool(tied),
    )  # fmt: skip


def inputs(batch: int, seq_len: int) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}


def targets(batch: int, seq_len: int) -> Tensor:
    return torch.zeros(batch, seq_len, dtype=torch.long)


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    times = logits.shape[1] // targets.shape[1]  # tokens predicted at each position
    wanted = targets.repeat(1, times).flatten()
    return F.cross_entropy(logits.float().flatten(0, 1), wanted)
