"""A pipeline whose parts have another tp each: which rank sends what to which of the next stage.

A value that is split over tp goes as the pieces that two ranks have in common, one that is whole
from the one rank of several that are alike. Gradients come back the same way. So every rank gets
exactly its own part, and nothing is gathered at the border of two parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from cost_models.borders import Piece, pieces
from cost_models.decisions import Decisions

Peers = tuple[tuple[int, Piece | None], ...]  # (global rank, its piece of the own part, or all)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """All ranks of one pipeline. ranks: of every stage its tp ranks, as the job numbers them.

    stage, rank: this process's place, pipeline stage and tp rank. split: whether values between
    units are split over tp. group: of all these ranks.
    """

    ranks: tuple[tuple[int, ...], ...]
    stage: int
    rank: int
    split: bool
    group: dist.ProcessGroup

    def givers(self, stage: int, size: int | None) -> Peers:
        """Whom of another stage this rank gets its part from, and where each piece goes.

        size: of the dimension that the value is split on, whole; None: it is whole everywhere.
        """
        theirs, ours = self.ranks[stage], self.ranks[self.stage]
        sent = pieces(len(theirs), len(ours), size)
        return tuple((theirs[x.giver], x.into) for x in sent if x.taker == self.rank)

    def takers(self, stage: int, size: int | None) -> Peers:
        """Whom of another stage this rank gives its part to, and which piece of it each."""
        theirs, ours = self.ranks[stage], self.ranks[self.stage]
        sent = pieces(len(ours), len(theirs), size)
        return tuple((theirs[x.taker], x.of) for x in sent if x.giver == self.rank)


def blocks(d: Decisions) -> tuple[tuple[Decisions, tuple[int, ...]], ...]:
    """Of each part of the hardware its own decisions, as a pipeline of its stages alone, and the
    job's ranks that lie on it."""
    found: list[tuple[Decisions, tuple[int, ...]]] = []
    start = 0
    for name, _ in d.parts:
        own = d.alone(name)
        found.append((own, tuple(range(start, start + own.gpus))))
        start += own.gpus
    return tuple(found)


def lines(d: Decisions) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Of every data rank the ranks of its pipeline, stage by stage; tp innermost, then dp."""
    found: list[list[tuple[int, ...]]] = [[] for _ in range(d.dp)]
    for own, ranks in blocks(d):
        for stage in range(own.pp):
            for data, line in enumerate(found):
                at = (stage * own.dp + data) * own.tp
                line.append(ranks[at : at + own.tp])
    return tuple(map(tuple, found))
