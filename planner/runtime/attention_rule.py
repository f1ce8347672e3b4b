"""Attention of DTensors: each tp rank its own heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from planner.runtime.reshard import gradient_as, reshard

HEADS = 1
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend(
    function: Callable[..., Tensor], query: DTensor, key: DTensor, value: DTensor,
    attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> DTensor:  # fmt: skip
    """F.scaled_dot_product_attention on this rank's heads, [batch, heads, seq, d] each.

    On all heads where they are not split, or cannot be. Key heads fewer than ranks are whole on
    every rank, which takes those that its query heads belong to.
    """
    mesh, rank = query.device_mesh, query.device_mesh.get_local_rank()
    ways, heads = mesh.size(), query.shape[HEADS] if query.dim() == 4 else 0
    split = (
        heads % ways == 0 and heads > 0
        and any(x.placements == (Shard(HEADS),) for x in (query, key, value))
    )  # fmt: skip
    at = Shard(HEADS) if split else Replicate()

    def own(x: DTensor) -> Tensor:
        if not split or x.shape[HEADS] % ways == 0:
            return _moved(x, at).to_local(grad_placements=(at,))
        whole = _moved(x, Replicate()).to_local(grad_placements=(Partial(),))
        return _heads_of(whole, heads, ways, rank)

    q, k, v = own(query), own(key), own(value)
    mask = attn_mask
    if isinstance(mask, DTensor):
        mask = _moved(mask, Replicate()).to_local(grad_placements=(Partial() if split else at,))
    if mask is not None and split and mask.dim() == 4 and mask.shape[HEADS] > 1:
        mask = mask.chunk(ways, HEADS)[rank]
    grouped = q.dim() == 4 and q.shape[HEADS] != k.shape[HEADS]
    out = function(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped)
    return DTensor.from_local(out, mesh, (at,), run_check=False)


def _moved(x: DTensor, at: Any) -> DTensor:
    return x if x.placements == (at,) else reshard(x, at, gradient_as(x.placements[0]))


def _heads_of(whole: Tensor, heads: int, ways: int, rank: int) -> Tensor:
    """The key heads that belong to this rank's query heads, each once where that will do."""
    group, each = heads // whole.shape[HEADS], heads // ways
    wanted = [head // group for head in range(rank * each, (rank + 1) * each)]
    first, last = wanted[0], wanted[-1]
    if first == last or each % group == 0:
        return whole[:, first : last + 1]
    return whole[:, wanted]


def register_rule() -> None:
    """Tell DTensor how CPU flash attention is split: on samples or on heads (it has rules for
    CUDA's kernels). For calls inside functions that no torch-function mode sees."""

    @register_sharding(_FLASH)
    def forward(query: Any, key: Any, value: Any, *rest: Any, attn_mask: Any = None, **_: Any):  # type: ignore[no-untyped-def]
        some = attn_mask is not None
        return [
            ([at, at], [at, at, at, *([None] * len(rest)), *([mask] if some else [])])
            for at, mask in _choices(attn_mask)
        ]

    @register_sharding(_FLASH_BACKWARD)
    def backward(*given: Any, attn_mask: Any = None, **_: Any):  # type: ignore[no-untyped-def]
        some = attn_mask is not None
        return [
            ([at] * 3, [*([at] * 6), *([None] * (len(given) - 6)), *([mask] if some else [])])
            for at, mask in _choices(attn_mask)
        ]


def _choices(mask: Any) -> list[tuple[Any, Any]]:
    """(placement of queries, keys and values, placement of the mask)."""
    shape = tuple(mask.shape) if mask is not None else ()

    def of(dim: int) -> Any:
        at = dim - 4 + len(shape)
        return Shard(at) if at >= 0 and shape[at] > 1 else Replicate()

    return [(Replicate(), Replicate()), (Shard(0), of(0)), (Shard(HEADS), of(HEADS))]
