"""DiT: a diffusion transformer over image latents, conditioned by adaptive layer norm.

plan trace examples/dit.py --arg size=xl/2 --hardware a100x8
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# size: width, layers, heads, patch
SIZES = {
    "tiny": (64, 2, 4, 4),
    "s/2": (384, 12, 6, 2),
    "b/2": (768, 12, 12, 2),
    "l/2": (1024, 24, 16, 2),
    "xl/2": (1152, 28, 16, 2),
}
CHANNELS, LATENT, CLASSES = 4, 32, 1000  # 256 x 256 images, 8 times smaller in the latent space


class Block(nn.Module):
    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        )
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        h = F.gelu(self.fc1(self.norm2(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.fc2(h)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Head(nn.Module):
    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, patch * patch * 2 * CHANNELS)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class DiT(nn.Module):
    def __init__(self, dim: int, n_layers: int, n_heads: int, patch: int):
        super().__init__()
        self.patch, self.side = patch, LATENT // patch
        self.patches = nn.Conv2d(CHANNELS, dim, kernel_size=patch, stride=patch)
        self.time1 = nn.Linear(256, dim)
        self.time2 = nn.Linear(dim, dim)
        self.labels = nn.Embedding(CLASSES + 1, dim)  # the last one: no label
        self.layers = nn.ModuleList(Block(dim, n_heads) for _ in range(n_layers))
        self.head = Head(dim, patch)
        place = waves(torch.arange(self.side), dim // 2)
        rows = place[:, None].expand(-1, self.side, -1)
        columns = place[None].expand(self.side, -1, -1)
        position = torch.cat([rows, columns], dim=-1).reshape(1, self.side**2, dim)
        self.register_buffer("position", position, persistent=False)

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Noisy latents [batch, 4, 32, 32] -> predicted noise and its variance, 8 channels."""
        x = self.patches(latents)
        x = x.flatten(2).transpose(1, 2) + self.position.to(x.dtype)
        time = waves(timesteps, 256).to(x.dtype)
        condition = self.time2(F.silu(self.time1(time))) + self.labels(labels)
        for layer in self.layers:
            x = layer(x, condition)
        x = self.head(x, condition).unflatten(-1, (self.patch, self.patch, 2 * CHANNELS))
        x = x.unflatten(1, (self.side, self.side))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 2 * CHANNELS, LATENT, LATENT)


def waves(position: Tensor, dim: int) -> Tensor:
    """Sines and cosines of positions: [n] -> [n, dim]."""
    rate = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=position.device) * 2 / dim)
    angle = position.float()[:, None] * rate
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def build(size: str = "xl/2", n_layers: int | None = None) -> nn.Module:
    dim, layers, n_heads, patch = SIZES[size]
    return DiT(dim, n_layers or layers, n_heads, patch)


def inputs(batch: int, seq_len: int) -> dict[str, Tensor]:
    return {
        "latents": torch.zeros(batch, CHANNELS, LATENT, LATENT),
        "timesteps": torch.zeros(batch, dtype=torch.long),
        "labels": torch.zeros(batch, dtype=torch.long),
    }


def targets(batch: int, seq_len: int) -> Tensor:
    return torch.zeros(batch, CHANNELS, LATENT, LATENT)


def loss(outputs: Tensor, noise: Tensor) -> Tensor:
    return F.mse_loss(outputs[:, :CHANNELS].float(), noise)


# what `plan verify` builds on a laptop: arguments of `build`, the same structure
TWIN = {"size": "tiny", "n_layers": 4}
