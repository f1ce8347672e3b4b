"""Which part of a whole tensor this rank holds, as boxes; for loading, saving and initialising.

DTensor says one offset; a fused matrix whose parts are split apart (`_StridedShard` over tp or
etp) lies in several places. `fully_shard` cuts what the other axes left, so its mesh dimensions,
which come first, count last.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard

DATA = frozenset({"replicate", "shard", "expert_replicate", "expert_shard"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A part of the whole tensor, and where in the local one it lies. One entry a dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local: tuple[int, ...]

    def of_whole(self, whole: Tensor) -> Tensor:
        return whole[tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes))]

    def of_local(self, local: Tensor) -> Tensor:
        return local[tuple(slice(o, o + n) for o, n in zip(self.local, self.sizes))]


def local_of(tensor: Tensor) -> Tensor:
    """This rank's own memory of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def boxes_of(tensor: Tensor) -> tuple[Box, ...]:
    """The parts of the whole tensor that this rank holds, none where it holds nothing."""
    if not isinstance(tensor, DTensor):
        return _boxes([[(0, n)] for n in tensor.shape])
    kept = [torch.arange(n) for n in tensor.shape]
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    order = sorted(range(mesh.ndim), key=lambda i: names[i] in DATA)  # stable
    for i in order:
        place = tensor.placements[i]
        dim = getattr(place, "dim", None)
        if dim is not None:
            joined = names[i] not in DATA
            kept[dim] = _cut(kept[dim], place, mesh.size(i), mesh.get_local_rank(i), joined)
    local = tuple(tensor._local_tensor.shape)
    held = tuple(len(rows) for rows in kept)
    assert held == local or (0 in held and 0 in local), f"{tensor._spec}: {held} is not {local}"
    return _boxes([_runs(rows) for rows in kept])


def _cut(rows: Tensor, place: Placement, ways: int, rank: int, joined: bool) -> Tensor:
    """What a rank keeps of rows: a chunk, or the same chunk of each of several parts."""
    assert isinstance(place, (Shard, _StridedShard))
    factor = int(place.split_factor) if joined and isinstance(place, _StridedShard) else 1
    return torch.cat([_chunk(part, ways, rank) for part in rows.chunk(factor)])


def _chunk(rows: Tensor, ways: int, rank: int) -> Tensor:
    """As torch.chunk, which leaves out empty ones."""
    chunks = rows.chunk(ways)
    return chunks[rank] if rank < len(chunks) else rows[:0]


def _runs(rows: Tensor) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, count)."""
    if not len(rows):
        return []
    breaks = (torch.nonzero(rows.diff() != 1).flatten() + 1).tolist()
    edges = [0, *breaks, len(rows)]
    return [(int(rows[a]), b - a) for a, b in itertools.pairwise(edges)]


def _boxes(runs: list[list[tuple[int, int]]]) -> tuple[Box, ...]:
    located = []
    for dim in runs:
        starts = itertools.accumulate((n for _, n in dim), initial=0)
        located.append([(first, n, at) for (first, n), at in zip(dim, starts)])
    return tuple(
        Box(offsets=tuple(x[0] for x in p), sizes=tuple(x[1] for x in p),
            local=tuple(x[2] for x in p))
        for p in itertools.product(*located)
        if all(x[1] for x in p)
    )  # fmt: skip
