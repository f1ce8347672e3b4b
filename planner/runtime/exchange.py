"""Rows to the ranks that hold their experts, and back: one all-to-all each way.

Experts lie over ep in blocks of consecutive numbers, so rows sorted by expert are sorted by rank.
With etp, the ranks of an etp group hold slices of the same experts: each sees the rows of all
(all-gather), and what a row-split matmul gives is summed to the rank that the row came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh

from ir.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """How one layer's rows travel. kept: rows that have an expert; sent, received: rows to and
    from each ep rank; blocks: received rows of each etp rank; order: for each row, by local
    expert, where it arrived; ends: offsets of the local experts; given: those of all experts, of
    this rank's own rows."""

    given: Tensor
    kept: int
    sent: tuple[int, ...]
    received: tuple[int, ...]
    blocks: tuple[int, ...]
    order: Tensor
    ends: Tensor
    ep: dist.ProcessGroup
    etp: dist.ProcessGroup

    def each(self, table: Tensor, experts: Tensor) -> Tensor:
        """For each row that is here, its expert's row of a local table [experts / ep, f].

        experts: the expert of each row as the model says it; they are those of the offsets.
        """
        if not isinstance(experts, FakeTensor):
            own = _owners(self.given, self.kept)
            if not torch.equal(own, experts[: self.kept].to(own.dtype)):
                raise PlanError("a bias of experts is read in another order than their rows")
        return table[_owners(self.ends, self.order.shape[0])]

    def there(self, rows: Tensor) -> Tensor:
        """rows: [n, f] by expert -> [m, f] by local expert, on the ranks that hold them."""
        rows = _all_to_all(rows[: self.kept], self.received, self.sent, self.ep)
        if len(self.blocks) > 1:
            rows = _OverEtp.apply(rows, True, self.blocks, self.etp)
        return _Permute.apply(rows, self.order)

    def back(self, rows: Tensor, count: int) -> Tensor:
        """The inverse of `there`, to `count` rows; those of no expert are zero. With etp, rows
        are partial sums."""
        rows = _Permute.apply(rows, _inverse(self.order))
        if len(self.blocks) > 1:
            rows = _OverEtp.apply(rows, False, self.blocks, self.etp)
        rows = _all_to_all(rows, self.sent, self.received, self.ep)
        if count == self.kept:
            return rows
        return torch.cat((rows, rows.new_zeros(count - self.kept, rows.shape[1])))


def plan_exchange(ends: Tensor, count: int, ep: DeviceMesh, etp: DeviceMesh) -> Exchange:
    """Tell every rank what it gets. ends: [experts] where each expert's rows end; count: rows.

    The one place where the host waits for the device. Fake tensors, which have no values, are
    taken as routed evenly.
    """
    counts = torch.diff(ends.detach().long(), prepend=ends.new_zeros(1, dtype=torch.long))
    local = ends.shape[0] // ep.size()
    arriving = counts.view(ep.size(), local)
    if ep.size() > 1:
        arriving = fc.all_to_all_single(counts, None, None, ep.get_group()).view(-1, local)
    arriving = fc.wait_tensor(arriving)[None]
    if etp.size() > 1:
        arriving = fc.wait_tensor(fc.all_gather_single(arriving, 0, etp.get_group()))
    if isinstance(counts, FakeTensor):
        each = count // ends.shape[0]
        sent = [[each] * local] * ep.size()
        table = [sent] * etp.size()
    else:
        sent = counts.view(ep.size(), local).tolist()
        table = arriving.tolist()
    mine = table[etp.get_local_rank()]
    by_expert = [[block[e] for rank in table for block in rank] for e in range(local)]
    device = ends.device
    expert = torch.arange(local, device=device).repeat(etp.size() * ep.size())
    lengths = torch.tensor([n for rank in table for block in rank for n in block], device=device)
    total = int(sum(map(sum, by_expert)))
    owner = torch.repeat_interleave(expert, lengths, output_size=total)
    return Exchange(
        given=ends,
        kept=sum(map(sum, sent)),
        sent=tuple(map(sum, sent)),
        received=tuple(map(sum, mine)),
        blocks=tuple(sum(map(sum, rank)) for rank in table),
        order=owner.argsort(stable=True),
        ends=torch.tensor(list(accumulate(map(sum, by_expert))), dtype=ends.dtype, device=device),
        ep=ep.get_group(),
        etp=etp.get_group(),
    )


def _owners(ends: Tensor, count: int) -> Tensor:
    """The expert of each row, by where the rows of each end."""
    lengths = torch.diff(ends.long(), prepend=ends.new_zeros(1, dtype=torch.long))
    experts = torch.arange(ends.shape[0], device=ends.device)
    return torch.repeat_interleave(experts, lengths, output_size=count)


def _all_to_all(
    rows: Tensor, out: tuple[int, ...], given: tuple[int, ...], group: dist.ProcessGroup
) -> Tensor:
    if len(out) == 1:
        return rows
    moved = fc.all_to_all_single_autograd(rows.contiguous(), list(out), list(given), group)
    return fc.wait_tensor(moved)


def _inverse(order: Tensor) -> Tensor:
    places = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


class _Permute(torch.autograd.Function):
    """Rows in another order; indexing's own backward would add where there is nothing to add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[_inverse(ctx.saved_tensors[0])], None


def _gather(rows: Tensor, blocks: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """Blocks of rows of all ranks, padded to the longest on the way."""
    longest = max(1, *blocks)
    padded = rows.new_zeros(longest, rows.shape[1])
    padded[: rows.shape[0]] = rows
    whole = fc.wait_tensor(fc.all_gather_single(padded, 0, group))
    return torch.cat([part[:n] for part, n in zip(whole.split(longest), blocks)])


def _sum(rows: Tensor, blocks: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """Each rank's block, summed over the ranks."""
    padded = rows.new_zeros(len(blocks), max(1, *blocks), rows.shape[1])
    for place, part in zip(padded, rows.split(blocks)):
        place[: part.shape[0]] = part
    own = fc.reduce_scatter_single(padded.flatten(0, 1), "sum", 0, group)
    return fc.wait_tensor(own)[: blocks[dist.get_rank(group)]]


class _OverEtp(torch.autograd.Function):
    """Every rank's rows to all, or the sum of all to each: either is the other's gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gather: bool, blocks: tuple[int, ...], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.gather, ctx.blocks, ctx.group = gather, blocks, group
        return (_gather if gather else _sum)(rows, blocks, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return (_sum if ctx.gather else _gather)(grad, ctx.blocks, ctx.group), None, None, None
