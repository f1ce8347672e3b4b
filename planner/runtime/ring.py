"""Ring attention: keys and values travel around the context-parallel ranks.

Each of ways-1 steps sends what came last to the next rank while the block that is here is
computed (Liu, Zaharia and Abbeel 2023); blocks are added by their log-sum-exp. Backward sends keys
and values around again, and their gradients behind them, which arrive where they belong after
ways-1 sends: a rank adds its own block's without sending it. One operator each way, so that
selective recomputation keeps its result and a compiler leaves it as it is.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch._library.custom_ops import CustomOpDef

from planner.runtime.flash import Block, add_block, empty_result
from planner.runtime.shares import Piece, Shares


def ranks_of(group: str) -> dist.ProcessGroup:
    """The group of a name: operators take names."""
    return _resolve_process_group(cast(Any, group))


class Ring:
    """A group's ranks in a circle: a tensor goes to the next, the previous one's comes."""

    def __init__(self, group: str) -> None:
        self.group = ranks_of(group)
        self.ways, self.rank = self.group.size(), self.group.rank()
        self.next = dist.get_global_rank(self.group, (self.rank + 1) % self.ways)
        self.previous = dist.get_global_rank(self.group, (self.rank - 1) % self.ways)

    def pass_on(self, flat: Tensor) -> tuple[Tensor, list[Any]]:
        """Start to send; what will have come when all of the works are waited for."""
        coming = torch.empty_like(flat)
        return coming, dist.batch_isend_irecv([
            dist.P2POp(dist.isend, flat, self.next, self.group),
            dist.P2POp(dist.irecv, coming, self.previous, self.group),
        ])  # fmt: skip

    def sources(self) -> list[int]:
        """Whose keys are here at each step, our own first."""
        return [(self.rank - step) % self.ways for step in range(self.ways)]


def flat_pair(a: Tensor, b: Tensor) -> Tensor:
    """Two tensors as one message."""
    return torch.cat([a.reshape(-1), b.reshape(-1)])


def pair_like(flat: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A message as two tensors of these shapes."""
    return flat[: a.numel()].view(a.shape), flat[a.numel() :].view(b.shape)


def register(attention: CustomOpDef, backward: CustomOpDef) -> None:
    """Tell autograd and fake tensors of an attention operator and of its gradients'.

    attention: (q, k, v, mask, *how) -> (out, log-sum-exp). backward: (grad, q, k, v, out,
    log-sum-exp, mask, *how) -> gradients of q, k and v.
    """

    def result(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty((*q.shape[:3], v.shape[-1]))
        return out, q.new_empty(q.shape[:3], dtype=wide)

    def gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, mask, *ctx.how = inputs
        ctx.save_for_backward(q, k, v, *output, mask)

    def differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
        found = backward(grad.contiguous(), *ctx.saved_tensors, *ctx.how)
        return (*found, None, *(None,) * len(ctx.how))  # none of the mask, nor of how

    attention.register_fake(result)
    backward.register_fake(gradients)
    attention.register_autograd(differentiate, setup_context=keep)


@torch.library.custom_op("meshwright_cp::ring", mutates_args=())
def ring(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: str, causal: bool, zigzag: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k, v: this rank's tokens; mask: its rows, every column in the order of the ranks.

    -> (out, log-sum-exp).
    """
    around = Ring(group)
    shares = Shares(ways=around.ways, zigzag=zigzag)
    out, lse = empty_result(q, v.shape[-1])
    here, coming = flat_pair(k, v), None
    works: list[Any] = []
    for step, source in enumerate(around.sources()):
        if step < around.ways - 1:
            coming, works = around.pass_on(here)
        piece = shares.step(around.rank, source, q.shape[2], causal)
        if piece is not None:
            keys, values = _columns(piece, *pair_like(here, k, v))
            block = Block(causal=piece.causal, scale=scale).forward(
                q[:, :, slice(*piece.rows)], keys, values, _masked(mask, source, k.shape[2])
            )
            add_block(out, lse, piece.rows, *block)
        for work in works:
            work.wait()
        here, works = (here if coming is None else coming), []
    return out.to(q.dtype), lse


@torch.library.custom_op("meshwright_cp::ring_backward", mutates_args=())
def ring_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, group: str, causal: bool, zigzag: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    around = Ring(group)
    shares = Shares(ways=around.ways, zigzag=zigzag)
    dq = torch.zeros_like(q, dtype=lse.dtype, memory_format=torch.contiguous_format)
    own = torch.zeros(k.numel() + v.numel(), dtype=k.dtype, device=k.device)
    here, coming = flat_pair(k, v), None
    travelling = torch.zeros_like(own)  # gradients of the keys that are here
    works: list[Any] = []
    travels: list[Any] = []
    for step, source in enumerate(around.sources()):
        if step < around.ways - 1:
            coming, works = around.pass_on(here)
        piece = shares.step(around.rank, source, q.shape[2], causal)
        found = None
        if piece is not None:
            rows = slice(*piece.rows)
            keys, values = _columns(piece, *pair_like(here, k, v))
            found = Block(causal=piece.causal, scale=scale).backward(
                grad[:, :, rows], q[:, :, rows], keys, values, out[:, :, rows], lse[:, :, rows],
                _masked(mask, source, k.shape[2]),
            )  # fmt: skip
            dq[:, :, rows] += found[0]
        for work in (*works, *travels):
            work.wait()
        into = own if step == 0 else travelling
        if piece is not None and found is not None:
            for whole, part in zip(_columns(piece, *pair_like(into, k, v)), found[1:]):
                whole += part
        if step > 0:
            travelling, travels = around.pass_on(into)
        here, works = (here if coming is None else coming), []
    for work in travels:
        work.wait()
    dk, dv = pair_like(own + travelling, k, v)
    return dq.to(q.dtype), dk.clone(), dv.clone()


def _columns(piece: Piece, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    columns = slice(*piece.columns)
    return k[:, :, columns], v[:, :, columns]


def _masked(mask: Tensor | None, source: int, length: int) -> Tensor | None:
    return None if mask is None else mask.narrow(-1, source * length, length)


register(ring, ring_backward)
