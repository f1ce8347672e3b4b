"""This rank's part of a tensor as torch.distributed.checkpoint writes and reads it.

DCP knows one offset a DTensor; a fused matrix lies in several places. So it is given boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from planner.runtime.parts import Box, boxes_of, local_of


class Held:
    """A tensor's local memory and which boxes of the whole it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.whole, self.boxes = torch.Size(tensor.shape), boxes_of(tensor)
        self.local = local_of(tensor.detach())

    def size(self) -> torch.Size:
        return self.whole

    def copied(self) -> Held:
        """The same with memory of its own, on the CPU."""
        twin = object.__new__(Held)
        twin.whole, twin.boxes = self.whole, self.boxes
        twin.local = self.local.to("cpu", copy=True)
        return twin

    def piece(self, index: MetadataIndex) -> Tensor:
        return next(b for b in self.boxes if b.offsets == tuple(index.offset or ())).of_local(
            self.local
        )

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(name, box.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box), properties=properties, size=self.whole
                ),
            )
            for box in self.boxes
        ]


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))


class SavePlanner(DefaultSavePlanner):
    """Finds boxes."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.piece(index) if isinstance(found, Held) else super().lookup_object(index)


class _LoadPlanner(DefaultLoadPlanner):
    """Finds boxes."""

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found: Held = self.state_dict[index.fqn]
        return found.piece(index)


def _items(name: str, stored: Any, held: Held) -> list[ReadItem]:
    chunks = [_chunk(box) for box in held.boxes]
    return create_read_items_for_chunk_list(name, stored, chunks)


def read(folder: Path, metadata: Metadata, wanted: Sequence[tuple[str, Held]]) -> None:
    """Fill tensors from a checkpoint. A name may be wanted twice, for two stages of a pipeline.

    Each rank reads for itself: there is no collective that another's fault could leave waiting.
    """
    rest = [(name, held) for name, held in wanted if held.boxes]
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    while rest:
        planner = _LoadPlanner()
        planner.state_dict = now = dict(reversed(rest))
        rest = [(name, held) for name, held in rest if now[name] is not held]
        items = [
            item
            for name, held in now.items()
            for item in _items(name, metadata.state_dict_metadata[name], held)
        ]
        reader.read_data(LoadPlan(items), planner).wait()
