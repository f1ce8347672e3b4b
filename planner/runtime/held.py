"""This rank's part of a tensor as torch.distributed.checkpoint writes and reads it.

DCP knows one offset a DTensor; a fused matrix lies in several places. So it is given boxes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

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

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box in self.boxes]


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))


class SavePlanner(DefaultSavePlanner):
    """Finds boxes."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.piece(index) if isinstance(found, Held) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """Finds boxes."""

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.piece(index) if isinstance(found, Held) else super().lookup_tensor(index)
