"""Streamed weights: the next blocks come to the device while one is used.

Blocks are used in a cycle, unit after unit and token after token. A few slots on the device hold
them in turn: before a unit runs its block is waited for, and those behind it are asked for. One
thread reads; on an accelerator a stream of its own copies, and events order it with the compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from planner.runtime.serve.bytes import Block


@dataclass(slots=True, eq=False)
class Slot:
    """Memory on the device for one block. coming: its copy. used: how many units run on it now.
    free: when what ran on it last has ended, on an accelerator."""

    memory: Tensor
    staging: Tensor | None
    block: int = -1
    coming: Future[Any] | None = None
    used: int = 0
    free: Any = None


@dataclass(slots=True)
class Streamed:
    """What the ring moved so far: bytes, copies, and seconds that units waited for theirs."""

    moved_bytes: int = 0
    copies: int = 0
    waited_s: float = 0.0


@dataclass(slots=True, eq=False)
class Ring:
    """Blocks in the order of their use, `count` slots of them on the device."""

    blocks: Sequence[Block]
    device: torch.device
    count: int = 2
    report: Streamed = field(default_factory=Streamed)
    _slots: list[Slot] = field(default_factory=list)
    _reader: ThreadPoolExecutor = field(init=False)
    _copies: Any = None

    def __post_init__(self) -> None:
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        accelerator = self.device.type != "cpu"
        if accelerator:
            self._copies = torch.get_device_module(self.device).Stream(self.device)
        most = max(b.size_bytes for b in self.blocks)
        on_disk = any(b.host is None for b in self.blocks)
        for _ in range(min(self.count, len(self.blocks))):
            memory = torch.empty(most, dtype=torch.uint8, device=self.device)
            staging = (
                torch.empty(most, dtype=torch.uint8, pin_memory=True)
                if accelerator and on_disk else None
            )  # fmt: skip
            self._slots.append(Slot(memory, staging))

    @property
    def held_bytes(self) -> int:
        """On the device."""
        return sum(slot.memory.numel() for slot in self._slots)

    @contextmanager
    def use(self, index: int) -> Iterator[int]:
        """The slot that holds block `index` while a unit runs on it. Raises what reading it did."""
        slot = self._slot_with(index)
        slot.used += 1
        try:
            self._ask_for_those_behind(index)
            self._wait_for(slot)
            yield self._slots.index(slot)
        finally:
            slot.used -= 1
            if self._copies is not None:
                slot.free = torch.get_device_module(self.device).current_stream().record_event()

    def memory(self, slot: int) -> Tensor:
        return self._slots[slot].memory

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _slot_with(self, index: int) -> Slot:
        for slot in self._slots:
            if slot.block == index:
                return slot
        found = self._bring(index, keep=())
        if found is None:  # units inside one another use all: one more
            first = self._slots[0]
            staging = None if first.staging is None else torch.empty_like(first.staging)
            self._slots.append(Slot(torch.empty_like(first.memory), staging))
            found = self._bring(index, keep=())
            assert found is not None
        return found

    def _ask_for_those_behind(self, index: int) -> None:
        soon = [(index + k) % len(self.blocks) for k in range(1, len(self._slots))]
        for later in soon:
            if all(slot.block != later for slot in self._slots):
                self._bring(later, keep=soon)

    def _bring(self, index: int, keep: Sequence[int]) -> Slot | None:
        """Start a copy into the slot whose block is wanted last; None where units run on all that
        need not be kept."""
        idle = [s for s in self._slots if not s.used and s.block not in keep]
        if not idle:
            return None
        cycle = len(self.blocks)
        slot = max(idle, key=lambda s: (s.block - index) % cycle if s.block >= 0 else cycle)
        if slot.coming is not None:
            slot.coming.exception()  # whatever came of it, the reader has left the slot
        slot.block = index
        slot.coming = self._reader.submit(self._copy, self.blocks[index], slot)
        return slot

    def _wait_for(self, slot: Slot) -> None:
        if slot.coming is None:
            return
        start = perf_counter()
        try:
            arrived = slot.coming.result()
        except BaseException:
            slot.block, slot.coming = -1, None  # asked for anew, the fault is met anew
            raise
        slot.coming = None
        if arrived is not None:
            torch.get_device_module(self.device).current_stream().wait_event(arrived)
        self.report.waited_s += perf_counter() - start

    def _copy(self, block: Block, slot: Slot) -> Any:
        """In the reader's thread: host memory or file to the slot. What says that it arrived."""
        size = block.size_bytes
        self.report.moved_bytes += size
        self.report.copies += 1
        if self._copies is None:
            block.read(slot.memory[:size])
            return None
        host = block.host
        if host is None:
            assert slot.staging is not None
            if slot.free is not None:
                slot.free.synchronize()  # the copy out of the staging memory ended before it
            host = slot.staging[:size]
            block.read(host)
        with torch.get_device_module(self.device).stream(self._copies):
            if slot.free is not None:
                self._copies.wait_event(slot.free)
            slot.memory[:size].copy_(host, non_blocking=True)
            return self._copies.record_event()
