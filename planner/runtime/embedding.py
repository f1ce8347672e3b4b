"""Embeddings whose rows are split over tp: each rank looks up its own, and learns its own.

DTensor makes the gradient of the whole table on every rank before it takes a share of it.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from planner.runtime.reshard import reshard


def embed(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """F.embedding; of a table [rows, features] split on its rows the result is a partial sum."""
    if not _by_rows(weight) or max_norm is not None or scale_grad_by_freq or sparse:
        return F.embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    table = cast(DTensor, weight)
    mesh, rows = table.device_mesh, table.shape[0] // table.device_mesh.size()
    if isinstance(input, DTensor):
        input = reshard(input, Replicate(), Replicate()).to_local()
    first = rows * mesh.get_local_rank()
    at = input - first
    ours = (at >= 0) & (at < rows)
    skipped = None if padding_idx is None else padding_idx % table.shape[0] - first
    if skipped is not None and not 0 <= skipped < rows:
        skipped = None  # another rank's row, which learns nothing there
    local = table.to_local(grad_placements=(Shard(0),))
    found = F.embedding(at.where(ours, 0), local, skipped)
    found = found.where(ours.unsqueeze(-1), 0.0)
    return DTensor.from_local(found, mesh, (Partial(),), run_check=False)


def _by_rows(weight: Tensor) -> bool:
    """Whether every rank of one axis has as many rows of the table."""
    return (
        isinstance(weight, DTensor)
        and weight.device_mesh.ndim == 1
        and weight.placements == (Shard(0),)
        and weight.shape[0] % weight.device_mesh.size() == 0
    )
