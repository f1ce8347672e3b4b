"""Weights as safetensors files under the model's own names, for whoever has no plan.

Written as a checkpoint beside first: then each rank reads whole tensors, its share of them, so
that none ever holds the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ir.errors import PlanError
from planner.runtime.checkpoint import MODEL, Parts, store
from planner.runtime.checkpoint_files import SAVING, abandon, begin, beside, commit
from planner.runtime.held import Held, read
from planner.runtime.sources import INDEX
from planner.runtime.together import together


def export(parts: Parts, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a folder that `load` and transformers read. Raises PlanError on every rank."""
    path, rank, ranks = Path(folder).absolute(), dist.get_rank(), dist.get_world_size()
    fresh, what = beside(path, SAVING), f"the weights {path} cannot be written"
    try:
        together(what, lambda: begin(path, INDEX) if rank == 0 else None)
        tensors = together(what, parts.written)
        store(what, fresh / "parts", {MODEL: tensors}, None)
        metadata = together(what, FileSystemReader(fresh / "parts").read_metadata)
        shares = _shares(metadata, ranks)
        together(what, lambda: _write(fresh, metadata, shares, rank, dtype))
        together(what, lambda: _finish(fresh, path, shares) if rank == 0 else None)
    except PlanError:
        if rank == 0:
            abandon(fresh)
        raise


def _shares(metadata: Metadata, ranks: int) -> dict[str, int]:
    """Which rank writes a tensor: consecutive ones, about as many bytes each."""
    sizes = {
        name: x.size.numel() * x.properties.dtype.itemsize
        for name, x in sorted(metadata.state_dict_metadata.items())
        if isinstance(x, TensorStorageMetadata)
    }
    total, before, found = max(1, sum(sizes.values())), 0, {}
    for name, size in sizes.items():
        found[name] = min(ranks - 1, (before + size // 2) * ranks // total)
        before += size
    return found


def _file(rank: int, shares: Mapping[str, int]) -> str:
    used = sorted(set(shares.values()))
    return f"model-{used.index(rank) + 1:05d}-of-{len(used):05d}.safetensors"


def _write(
    fresh: Path, metadata: Metadata, shares: Mapping[str, int], rank: int, dtype: torch.dtype | None
) -> None:
    wanted = {}
    for name, owner in shares.items():
        if owner == rank:
            stored = metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            wanted[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    if wanted:
        read(fresh / "parts", metadata, [(name, Held(x)) for name, x in wanted.items()])
        found = {
            name.removeprefix(f"{MODEL}."): x.to(dtype) if dtype and x.is_floating_point() else x
            for name, x in wanted.items()
        }
        save_file(found, fresh / _file(rank, shares), metadata={"format": "pt"})


def _finish(fresh: Path, path: Path, shares: Mapping[str, int]) -> None:
    shutil.rmtree(fresh / "parts")
    total = sum(file.stat().st_size for file in fresh.iterdir())
    table = {name.removeprefix(f"{MODEL}."): _file(r, shares) for name, r in shares.items()}
    index = {"metadata": {"total_size": total}, "weight_map": table}
    (fresh / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    commit(fresh, path)
