"""GPT-2 and larger: learned positions, fused qkv, layer norm, GELU, tied embedding and head.

plan trace examples/gpt.py --arg size=1.3b --hardware a100x16
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# size: width, layers, heads, positions, vocabulary
SIZES = {
    "tiny": (64, 2, 4, 128, 256),
    "124m": (768, 12, 12, 1024, 50257),
    "355m": (1024, 24, 16, 1024, 50257),
    "774m": (1280, 36, 20, 1024, 50257),
    "1.5b": (1600, 48, 25, 1024, 50257),
    "1.3b": (2048, 24, 16, 2048, 50304),
    "7b": (4096, 32, 32, 2048, 50304),
    "13b": (5120, 40, 40, 2048, 50304),
    "175b": (12288, 96, 96, 2048, 50304),
}


class Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int, dropout: float):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.c_attn = nn.Linear(dim, 3 * dim)
        self.c_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, dim = x.shape
        q, k, v = (
            part.view(batch, seq, self.n_heads, dim // self.n_heads).transpose(1, 2)
            for part in self.c_attn(x).split(dim, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        out = self.c_proj(out.transpose(1, 2).reshape(batch, seq, dim))
        return F.dropout(out, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.c_proj = nn.Linear(4 * dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, dim: int, n_heads: int, dropout: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, n_heads, dropout)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(
        self, dim: int, n_layers: int, n_heads: int, positions: int, vocab: int, dropout: float
    ):
        super().__init__()
        self.max_seq_len, self.dropout = positions, dropout
        self.wte = nn.Embedding(vocab, dim)
        self.wpe = nn.Embedding(positions, dim)
        self.layers = nn.ModuleList(Block(dim, n_heads, dropout) for _ in range(n_layers))
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(position)
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.ln_f(x))


def build(size: str = "124m", n_layers: int | None = None, dropout: float = 0.0) -> nn.Module:
    dim, layers, n_heads, positions, vocab = SIZES[size]
    return GPT(dim, n_layers or layers, n_heads, positions, vocab, dropout)


def inputs(batch: int, seq_len: int) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


# what `plan verify` builds on a laptop: arguments of `build`, the same structure
TWIN = {"size": "tiny", "n_layers": 5}
