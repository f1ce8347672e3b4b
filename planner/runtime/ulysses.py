"""Ulysses attention: two exchanges turn tokens split over ranks into heads split over ranks.

Every rank has whole sequences of its heads, so attention is what it was (Jacobs et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

TOKENS, HEADS = 2, 1  # [b, h, s, d]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def ulysses(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: ProcessGroup, attend: Attend
) -> Tensor:
    """q, k, v: this rank's tokens; mask: every row and column. attend: attention of some heads."""
    (queries,) = _exchange((q,), group, HEADS, TOKENS)
    keys, values = _exchange((k, v), group, HEADS, TOKENS)
    if mask is not None and mask.dim() == 4 and mask.shape[HEADS] == q.shape[HEADS]:
        mask = mask.chunk(group.size(), HEADS)[group.rank()]
    (out,) = _exchange((attend(queries, keys, values, mask),), group, TOKENS, HEADS)
    return out


def _exchange(
    given: tuple[Tensor, ...], group: ProcessGroup, cut: int, join: int
) -> tuple[Tensor, ...]:
    """Cut a dimension of each tensor over the ranks and join another, all in one exchange."""
    ways = group.size()
    parts = [torch.stack(x.chunk(ways, cut)) for x in given]  # [ways, ...]: what each rank gets
    flat = torch.cat([part.flatten(1) for part in parts], 1)
    rows = [1] * ways
    came = wait_tensor(all_to_all_single_autograd(flat, rows, rows, group))
    pieces = came.split([part[0].numel() for part in parts], 1)
    return tuple(
        torch.cat(tuple(piece.view(part.shape)), join) for piece, part in zip(pieces, parts)
    )
