"""Which tokens of a sequence a context-parallel rank holds, and what part of attention it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ir.errors import PlanError
from planner.plan import Plan
from planner.token_flow import flow_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A block of attention: queries [rows] of a rank's own with keys [columns] of some others.

    causal: the block is the diagonal of the triangle, rows and columns the same tokens.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    causal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """How `ways` ranks share a sequence, evenly.

    In a zigzag rank r holds the chunks r and 2*ways-1-r of 2*ways: an early one, of which few
    keys are visible, and a late one, so that causal attention is the same work on every rank.
    Otherwise rank r holds the r-th part.
    """

    ways: int
    zigzag: bool

    def chunks(self, rank: int) -> tuple[int, ...]:
        """The chunks of a rank in the order it holds them."""
        return (rank, 2 * self.ways - 1 - rank) if self.zigzag else (rank,)

    def take(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """A rank's share of a whole tensor. Raises PlanError where the shares would be uneven."""
        count = self.ways * len(self.chunks(rank))
        if x.shape[dim] % count:
            raise PlanError(
                f"{x.shape[dim]} tokens cannot be shared by {self.ways} cp ranks",
                why=f"each has {len(self.chunks(rank))} chunks of one size",
            )
        size = x.shape[dim] // count
        parts = [x.narrow(dim, chunk * size, size) for chunk in self.chunks(rank)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, parts: Tensor, dim: int) -> Tensor:
        """The whole of every rank's share, in the order of the sequence. parts: [ways, ...]."""
        found: dict[int, Tensor] = {}
        for rank in range(self.ways):
            held = self.chunks(rank)
            found.update(zip(held, parts[rank].chunk(len(held), dim)))
        return torch.cat([found[i] for i in sorted(found)], dim)

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """Every rank's share of a whole, [ways, ...]; the inverse of `join`."""
        return torch.stack([self.take(whole, dim, rank) for rank in range(self.ways)])

    def step(self, rank: int, source: int, length: int, causal: bool) -> Piece | None:
        """What a rank sees of the keys that another holds; None where they are all later.

        length: tokens a rank. Columns count from the first that `source` holds.
        """
        whole = (0, length)
        if not causal or rank == source:
            return Piece(rows=whole, columns=whole, causal=causal)
        if not self.zigzag:
            return Piece(rows=whole, columns=whole, causal=False) if source < rank else None
        half = length // 2
        if source < rank:  # its early chunk is before both of ours, its late one behind both
            return Piece(rows=whole, columns=(0, half), causal=False)
        return Piece(rows=(half, length), columns=whole, causal=False)

    def pieces(self, rank: int, length: int, causal: bool) -> tuple[Piece, ...]:
        """What a rank sees of the whole sequence, columns in the sequence's order.

        Without overlap, the fewest blocks: for zigzag our own two chunks are not beside each
        other, so the diagonal is two blocks.
        """
        whole = (0, length)
        if not causal:
            return (Piece(rows=whole, columns=(0, length * self.ways), causal=False),)
        size = length // len(self.chunks(rank))
        found = []
        for place, chunk in enumerate(self.chunks(rank)):
            rows = (place * size, (place + 1) * size)
            if chunk:
                found.append(Piece(rows=rows, columns=(0, chunk * size), causal=False))
            found.append(Piece(rows=rows, columns=(chunk * size, (chunk + 1) * size), causal=True))
        return tuple(found)


def shares_of(plan: Plan) -> Shares:
    """How the plan's cp ranks share a sequence: in a zigzag where attention is causal and nothing
    else minds the order. Ulysses joins the ranks' parts into the sequence as they are."""
    d, flow = plan.decisions, flow_of(plan.graph)
    even = plan.workload.seq_len % (2 * d.cp) == 0
    zigzag = d.cp_kind != "ulysses" and flow.causal and not flow.ordered and even
    return Shares(ways=d.cp, zigzag=zigzag)
