"""One block of attention with its log-sum-exp, so that blocks over other keys can be added to it.

q: [b, h, s, d], k: [b, h_kv, t, d], v: [b, h_kv, t, d_v]; h_kv divides h. The kernels are the
ones that F.scaled_dot_product_attention calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
HIDDEN = {torch.float16: -6e4}  # what a mask adds to a hidden score; -1e30 in wider formats
LSE_PAD = 32  # the efficient kernel pads its statistics to as many rows
ALIGN = 8  # and its masks, and flash the head's size


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Attention of one block: which kernel, and how it is called."""

    causal: bool
    scale: float

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(out [b, h, s, d_v], log-sum-exp [b, h, s] fp32)."""
        width = v.shape[-1]
        q, k, v = _equal(q, k, v)
        if q.device.type == "cpu":
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, self.causal, attn_mask=mask, scale=self.scale
            )
        elif _flash(q, mask):
            out, lse = aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, self.causal, False, scale=self.scale
            )[:2]
        else:
            out, lse = aten._scaled_dot_product_efficient_attention(
                q, _grouped(k, q), _grouped(v, q), _bias(mask, q, k), True, 0.0, self.causal,
                scale=self.scale,
            )[:2]  # fmt: skip
        return out[..., :width], lse[..., : q.shape[2]]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v from this block; out and lse are of all the blocks together."""
        wide, width, ways = q.shape[-1], v.shape[-1], q.shape[1] // k.shape[1]
        q, k, v = _equal(q, k, v)
        grad, out = (F.pad(x, (0, v.shape[-1] - width)) for x in (grad, out))
        if q.device.type == "cpu":
            dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, self.causal, attn_mask=mask, scale=self.scale
            )
        elif _flash(q, mask):
            state = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout: there is none
            dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0,
                self.causal, state, state, scale=self.scale,
            )  # fmt: skip
        else:
            state = torch.zeros((), dtype=torch.int64, device=q.device)
            bias = _bias(mask, q, k)
            padded = F.pad(lse, (0, -lse.shape[-1] % LSE_PAD), value=float("inf"))
            dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
                grad, q, _grouped(k, q), _grouped(v, q), bias, out, padded, state, state, 0.0,
                (True, True, True, False), self.causal, scale=self.scale,
            )  # fmt: skip
            dk, dv = (x.unflatten(1, (-1, ways)).sum(2) for x in (dk, dv))
        return dq[..., :wide], dk[..., :wide], dv[..., :width]


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask [.., s, t], True where a key is seen or added to scores, as what is added to them.

    What is hidden is finite: a row of a block may be hidden whole, and must not be 0/0.
    """
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    least = HIDDEN.get(like.dtype, -1e30)
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, least)
    return mask.to(like.dtype).clamp(min=least)


def add_block(
    out: Tensor | None, lse: Tensor, rows: tuple[int, int], block: Tensor, block_lse: Tensor
) -> None:
    """Add a block to the rows of what earlier blocks gave, in place; out fp32, lse from -inf."""
    assert out is not None
    mine, held = out[:, :, slice(*rows)], lse[:, :, slice(*rows)]
    total = torch.logaddexp(held, block_lse)
    mine.mul_((held - total).exp().unsqueeze(-1))
    mine.add_(block * (block_lse - total).exp().unsqueeze(-1))
    held.copy_(total)


def empty_result(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Where blocks are added: (out fp32 [b, h, s, width] of zeros, lse of -inf)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros((*q.shape[:3], width), dtype=wide, device=q.device)
    return out, torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)


def _equal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads padded with zeros to one size, which leaves scores and results as they are."""
    size = max(q.shape[-1], v.shape[-1])
    if q.device.type != "cpu":
        size += -size % ALIGN
    if q.shape[-1] == v.shape[-1] == size:
        return q, k, v
    return cast(
        tuple[Tensor, Tensor, Tensor], tuple(F.pad(x, (0, size - x.shape[-1])) for x in (q, k, v))
    )


def _flash(q: Tensor, mask: Tensor | None) -> bool:
    """Whether CUDA's flash kernel takes it: 16 bit, no mask, heads up to 256."""
    return q.element_size() == 2 and mask is None and q.shape[-1] <= 256


def _grouped(x: Tensor, q: Tensor) -> Tensor:
    """A key head for every query head; the efficient kernel knows no groups."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask at every head, its rows aligned in memory as the efficient kernel wants them."""
    if mask is None:
        return None
    padded = F.pad(mask, (0, -mask.shape[-1] % ALIGN))[..., : mask.shape[-1]]
    return padded.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
