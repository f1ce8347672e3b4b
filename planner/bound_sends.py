"""What the sends of pipelines take at least, of many meshes at once: by how much of the data
parallelism lies outside the pipeline, as that says which boundary crosses what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.decisions import Decisions
from cost_models.step import Costs
from planner.decisions import Pins
from planner.mesh import Mesh, outside

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Row = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sends:
    """By mesh, seconds of one micro-batch at least. each_s: of any send; slower_s: [mesh, boundary]
    how much longer those from a rank to the next take, and wrap_s from the last to the first;
    busy_s: how long the slowest of them keeps its links."""

    each_s: Floats
    slower_s: Floats
    wrap_s: Floats
    busy_s: Floats

    def before(self, ranks: int) -> Floats:
        """[mesh, rank]: from the first rank to each of so many."""
        slower = np.pad(self.slower_s, ((0, 0), (1, ranks)))[:, :ranks].cumsum(axis=1)
        found: Floats = self.each_s[:, None] * np.arange(ranks) + slower
        return found

    def before_chunk_s(self, chunk: float, pp: Ints, awaited: float) -> Floats:
        """From the first rank to a stage of a chunk, in the mean of all ranks; awaited: the share
        of a send that takes no rank's own time."""
        ranks = np.arange(self.slower_s.shape[1])
        behind = np.maximum(0, pp[:, None] - 1 - ranks) / pp[:, None]  # of ranks, a boundary
        found: Floats = (
            awaited * self.each_s * (chunk * pp + (pp - 1) / 2)
            + chunk * (self.slower_s.sum(axis=1) + self.wrap_s)
            + (self.slower_s * behind).sum(axis=1)
        )
        return found

    def chain_slower_s(self, chunks: int, folded: bool) -> Floats:
        """How much longer all sends of one pass take than as many of `each_s`."""
        wraps = 0 if folded else chunks - 1
        found: Floats = chunks * self.slower_s.sum(axis=1) + wraps * self.wrap_s
        return found


class Sending:
    """The sends of one model on one cluster."""

    def __init__(self, costs: Costs, pins: Pins) -> None:
        self.costs, self.pins = costs, pins
        self._bytes: dict[tuple[int, int, int, bool], int] = {}
        self._rows: dict[tuple[int, ...], Row] = {}

    def bytes(self, m: Mesh) -> int:
        """What a stage sends to the next, of a micro-batch."""
        key = (m.tp, m.cp, m.micro_batch, m.sequence_parallel)
        if m.pp > 1 and key not in self._bytes:
            self._bytes[key] = sum(self.costs.boundary_bytes(axes_of(m)))
        return self._bytes[key] if m.pp > 1 else 0

    def of(self, meshes: Sequence[Mesh], outers: Sequence[int | None]) -> Sends:
        """outers: how much of dp lies outside the pipeline; None: any, which is no less."""
        rows = [self._row(m, outer) for m, outer in zip(meshes, outers)]
        most = max((len(row) for row in rows), default=3)
        table = np.array([(*row, *[0.0] * (most - len(row))) for row in rows]).reshape(-1, most)
        return Sends(
            each_s=table[:, 0], wrap_s=table[:, 1], busy_s=table[:, 2], slower_s=table[:, 3:]
        )

    def _row(self, m: Mesh, outer: int | None) -> Row:
        """(any send, how much longer from the last rank to the first, how long the slowest keeps
        its links, how much longer from each rank to the next)."""
        if m.pp == 1:
            return 0.0, 0.0, 0.0
        sent = self.bytes(m)
        key = (m.pp, m.dp, m.cp * m.tp, m.ep * m.etp, sent, outer or 0)
        if key not in self._rows:
            every = outside(m, self.costs.cluster, self.pins.dp_outer)
            rows = [self._made(replace(axes_of(m), dp_outer=one), sent)
                    for one in (every if outer is None else (outer,))]  # fmt: skip
            none = (0.0,) * (2 + m.pp)
            self._rows[key] = tuple(map(min, *rows)) if len(rows) > 1 else (*rows, none)[0]
        return self._rows[key]

    def _made(self, d: Decisions, sent: int) -> Row:
        slow = self.costs.slow_sends(d, sent) or ((0, 0),) * d.pp
        (*between, wrap), busy = (more / 1e12 for more, _ in slow), max(t for _, t in slow) / 1e12
        return self.costs.send_s(d, sent), wrap, busy, *between


def axes_of(m: Mesh) -> Decisions:
    return Decisions(
        pp=m.pp, dp=m.dp, cp=m.cp, tp=m.tp, ep=m.ep, etp=m.etp, micro_batch=m.micro_batch,
        microbatches=m.microbatches, sequence_parallel=m.sequence_parallel,
    )  # fmt: skip
