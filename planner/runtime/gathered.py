"""All-gathered attention: every context-parallel rank has all keys and values while it attends.

They are gathered again in backward, so that only a rank's own are kept; their gradients are
reduced and scattered. One operator each way, as the ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from planner.runtime.flash import Block, add_block, empty_result
from planner.runtime.ring import flat_pair, ranks_of, register, ring, ring_backward
from planner.runtime.shares import Shares

c10d = torch.ops._c10d_functional
TOKENS = 2  # the dimension of tokens: [b, h, s, d]


@torch.library.custom_op("meshwright_cp::gathered", mutates_args=())
def gathered(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: str, causal: bool, zigzag: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k, v: this rank's tokens; mask: its rows, every column. -> (out, log-sum-exp)."""
    ranks = ranks_of(group)
    shares = Shares(ways=ranks.size(), zigzag=zigzag)
    keys, values = _gather(k, v, ranks, shares)
    out, lse = empty_result(q, v.shape[-1])
    for piece in shares.pieces(ranks.rank(), q.shape[TOKENS], causal):
        columns = slice(*piece.columns)
        block = Block(causal=piece.causal, scale=scale).forward(
            q[:, :, slice(*piece.rows)], keys[:, :, columns], values[:, :, columns], mask
        )
        add_block(out, lse, piece.rows, *block)
    return out.to(q.dtype), lse


@torch.library.custom_op("meshwright_cp::gathered_backward", mutates_args=())
def gathered_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, group: str, causal: bool, zigzag: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    ranks = ranks_of(group)
    shares = Shares(ways=ranks.size(), zigzag=zigzag)
    keys, values = _gather(k, v, ranks, shares)
    dq, dkeys, dvalues = (
        torch.zeros_like(x, dtype=lse.dtype, memory_format=torch.contiguous_format)
        for x in (q, keys, values)
    )
    for piece in shares.pieces(ranks.rank(), q.shape[TOKENS], causal):
        rows, columns = slice(*piece.rows), slice(*piece.columns)
        found = Block(causal=piece.causal, scale=scale).backward(
            grad[:, :, rows], q[:, :, rows], keys[:, :, columns], values[:, :, columns],
            out[:, :, rows], lse[:, :, rows], mask,
        )  # fmt: skip
        for whole, part, where in zip((dq, dkeys, dvalues), found, (rows, columns, columns)):
            whole[:, :, where] += part
    dk, dv = _scatter(dkeys.to(k.dtype), dvalues.to(v.dtype), k, v, ranks, shares)
    return dq.to(q.dtype), dk, dv


def _gather(k: Tensor, v: Tensor, ranks: ProcessGroup, shares: Shares) -> tuple[Tensor, Tensor]:
    """All keys and values in the order of the sequence, in one collective."""
    own = flat_pair(k, v)
    every = c10d.wait_tensor(c10d.all_gather_into_tensor(own, shares.ways, ranks.group_name))
    every = every.view(shares.ways, -1)
    keys = every[:, : k.numel()].unflatten(1, k.shape)
    values = every[:, k.numel() :].unflatten(1, v.shape)
    return shares.join(keys, TOKENS), shares.join(values, TOKENS)


def _scatter(
    dkeys: Tensor, dvalues: Tensor, k: Tensor, v: Tensor, ranks: ProcessGroup, shares: Shares
) -> tuple[Tensor, Tensor]:
    """The sum over ranks of all keys' and values' gradients, each rank its own tokens'."""
    parts = [shares.part(x, TOKENS).flatten(1) for x in (dkeys, dvalues)]
    every = torch.cat(parts, 1)
    own = c10d.wait_tensor(
        c10d.reduce_scatter_tensor(every.view(-1), "sum", shares.ways, ranks.group_name)
    )
    dk, dv = own.split([k.numel(), v.numel()])
    return dk.clone().view(k.shape), dv.clone().view(v.shape)


def traffic_of(operator: Any, args: Sequence[Any]) -> tuple[tuple[str, int, int], ...]:
    """(kind, how many, bytes of one) of what an attention operator of ours sends: who watches
    operations sees the operator alone. Bytes as the ledger has them; `args` are the operator's."""
    backward = operator in (ring_backward._opoverload, gathered_backward._opoverload)
    k, v = args[2:4] if backward else args[1:3]
    size = k.numel() * k.element_size() + v.numel() * v.element_size()
    ways = ranks_of(next(x for x in args if isinstance(x, str))).size()
    if operator in (ring._opoverload, ring_backward._opoverload):
        return (("p2p", ways - 1, size),) * (2 if backward else 1)
    gather = ("all_gather", 1, size * ways)
    return (gather, ("reduce_scatter", 1, size * ways)) if backward else (gather,)


register(gathered, gathered_backward)
