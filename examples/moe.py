"""A mixture of experts: top-2 of 8, dropless, with a load-balancing loss and a router z-loss.

Rows are sorted by expert and multiplied in groups, so an expert may have any number of tokens,
none included, and no token is dropped. `8b-a1b` has 8 experts of 0.94B each, 7.9B in all.

    plan trace examples/moe.py --arg size=8b-a1b --hardware h100x8
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# size: width, layers, heads, kv heads, an expert's hidden width, vocabulary
SIZES = {
    "tiny": (64, 2, 4, 2, 128, 256),
    "small": (64, 2, 8, 4, 128, 256),
    "8b-a1b": (2048, 24, 16, 4, 6400, 32000),
    "8x7b": (4096, 32, 32, 8, 14336, 32000),
}
BALANCE, Z = 0.01, 0.001  # weights of the auxiliary losses


class Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int):
        super().__init__()
        self.head_dim = dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    def __init__(self, dim: int, hidden: int, n_experts: int, top_k: int):
        super().__init__()
        self.n_experts, self.top_k = n_experts, top_k
        self.router = nn.Linear(dim, n_experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(n_experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(n_experts, hidden, dim))
        self.w3 = nn.Parameter(torch.empty(n_experts, dim, hidden))
        for weight in (self.w1, self.w2, self.w3):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [batch, seq, dim] -> the same, and [balance, z]: this layer's auxiliary losses."""
        tokens = x.flatten(0, 1)
        logits = self.router(tokens).float()
        probs = logits.softmax(dim=-1)
        weights, chosen = probs.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)

        expert = chosen.flatten()
        order = expert.argsort(stable=True)
        token = order // self.top_k
        counts = (expert[:, None] == torch.arange(self.n_experts, device=x.device)).sum(0)
        ends = counts.cumsum(0).to(torch.int32)

        rows = tokens[token]
        hidden = F.silu(F.grouped_mm(rows, self.w1, offs=ends))
        hidden = hidden * F.grouped_mm(rows, self.w3, offs=ends)
        rows = F.grouped_mm(hidden, self.w2, offs=ends)
        rows = rows * weights.flatten()[order, None].to(rows.dtype)
        out = torch.zeros_like(tokens).index_add(0, token, rows)

        share = counts / expert.numel()
        balance = self.n_experts * (share * probs.mean(0)).sum()
        z = logits.logsumexp(dim=-1).square().mean()
        return out.view_as(x), torch.stack([balance, z])


class Block(nn.Module):
    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int, hidden: int, n_experts: int, top_k: int
    ):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.attention = Attention(dim, n_heads, n_kv_heads)
        self.experts_norm = nn.RMSNorm(dim, eps=1e-5)
        self.experts = Experts(dim, hidden, n_experts, top_k)

    def forward(
        self, x: Tensor, auxiliary: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out, losses = self.experts(self.experts_norm(x))
        return x + out, auxiliary + losses


class MoE(nn.Module):
    def __init__(self, size: str, n_layers: int | None, n_experts: int, top_k: int, length: int):
        super().__init__()
        dim, layers, n_heads, n_kv_heads, hidden, vocab = SIZES[size]
        self.max_seq_len = length
        self.embed_tokens = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(
            Block(dim, n_heads, n_kv_heads, hidden, n_experts, top_k)
            for _ in range(n_layers or layers)
        )
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        rate = 1e6 ** (-torch.arange(0, dim // n_heads, 2).float() / (dim // n_heads))
        angle = torch.outer(torch.arange(length).float(), rate).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [batch, seq] -> logits and the mean auxiliary losses of the layers."""
        x = self.embed_tokens(input_ids)
        cos, sin = self.cos[: input_ids.shape[1]], self.sin[: input_ids.shape[1]]
        auxiliary = torch.zeros(2, device=x.device)
        for layer in self.layers:
            x, auxiliary = layer(x, auxiliary, cos, sin)
        return self.lm_head(self.norm(x)), auxiliary / len(self.layers)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + half) of x: [batch, heads, seq, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def build(
    size: str = "8b-a1b",
    n_layers: int | None = None,
    n_experts: int = 8,
    top_k: int = 2,
    max_seq_len: int = 8192,
) -> nn.Module:
    return MoE(size, n_layers, n_experts, top_k, max_seq_len)


def inputs(batch: int, seq_len: int) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}


def loss(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    logits, (balance, z) = outputs
    prediction = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    return prediction + BALANCE * balance + Z * z


# what `plan verify` builds on a laptop: arguments of `build`, the same structure; the second has
# heads enough for tp times cp
TWIN = ({"size": "tiny", "n_layers": 5}, {"size": "small", "n_layers": 5})
