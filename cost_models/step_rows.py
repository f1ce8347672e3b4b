"""What a mesh comes to: a row a link of the chain, in integer picoseconds and bytes, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cost_models.chain import Chain
from cost_models.decisions import Decisions
from cost_models.state import State
from cost_models.traffic import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One link, per micro-batch unless said otherwise.

    forward, backward: picoseconds by PARTS. weight_ps: of backward, weight gradients alone.
    again_ps: added by recomputation, selective and full. moved: added by activations that lie on
    the host, (forward, backward) by level. kept, working: bytes by level (none, selective, full).
    tail_*: per step, of gradient reduction and optimizer: communication, what may hide it, and
    what nothing hides by name. copied: fp32 gradient bytes of each parameter that an earlier stage
    holds as well, summed with that one's once a step. below: bytes of state on each tier; aside: of
    a micro-batch's activations that lie on the host, by level.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    weight_ps: int
    again_ps: tuple[int, int]
    moved: tuple[tuple[int, int], ...]
    kept: tuple[int, int, int]
    working: tuple[int, int, int]
    state: State
    tail_comm_ps: int
    tail_hide_ps: int
    optimizer_ps: int
    offload_ps: int
    floor_ps: int
    is_loss: bool
    flop: tuple[int, int]  # forward, backward
    model_flop: int
    traffic: tuple[Traffic, ...] = ()
    copied: tuple[tuple[str, int], ...] = ()
    below: tuple[tuple[str, int], ...] = ()
    aside: tuple[int, int, int] = (0, 0, 0)

    @property
    def forward_ps(self) -> int:
        return sum(self.forward)

    @property
    def backward_ps(self) -> int:
        return sum(self.backward)


@dataclass(frozen=True, kw_only=True)
class Step:
    """All rows of one mesh: `rows` by kind of link, `kinds` the row of each link in order.

    beside: where the pipeline goes over several kinds of GPUs, the mesh's steps on the others.
    """

    chain: Chain
    decisions: Decisions
    rows: tuple[Row, ...]
    kinds: tuple[int, ...]
    glue: Row
    p2p_ps: int
    p2p_bytes: tuple[int, ...]  # of each value that goes on
    slow_sends: tuple[tuple[int, int], ...] = ()  # StageProblem's
    reserved: tuple[tuple[str, int], ...]  # context, workspace, comm_buffers, buffers: bytes
    fragmentation: float
    beside: tuple[Step, ...] = ()

    def wide(self, size_bytes: int) -> int:
        """Bytes with what the allocator loses around them."""
        return math.ceil(size_bytes * (1 + self.fragmentation))

    def row(self, link: int) -> Row:
        return self.rows[self.kinds[link]]
