"""Where the bytes of a weight lie when they are not on the device: host memory, or a file.

A file is read, not mapped: a map of a file that is cut short kills the process at the first touch,
a short read is an error that names the file. What is read goes straight into the buffer it is
wanted in; the page cache serves what is read again.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ir.errors import PlanError

ALIGN_BYTES = 64  # of each tensor in a buffer: whole cache lines, and what kernels want
_HEADER_BYTES = 100_000_000  # safetensors' own limit


def aligned(size_bytes: int) -> int:
    """Rounded up to a whole number of ALIGN_BYTES."""
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as uint8 of one dimension."""
    return tensor.reshape(-1).view(torch.uint8)


def give_back() -> None:
    """Give the system what was freed of host memory: between weights that stay, glibc keeps what
    they were read and packed in, up to the model's size again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


class Extent(Protocol):
    """Bytes somewhere. read: fill host memory of as many bytes with them."""

    @property
    def size_bytes(self) -> int: ...

    def read(self, into: Tensor) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class InMemory:
    """Bytes of a host tensor."""

    held: Tensor

    @property
    def size_bytes(self) -> int:
        return self.held.numel()

    def read(self, into: Tensor) -> None:
        into.copy_(self.held)


@dataclass(slots=True, eq=False)
class File:
    """A file of weights, opened once. Raises PlanError where it is not what it was when opened."""

    path: Path
    _fd: int = field(init=False)
    _stat: os.stat_result = field(init=False)

    def __post_init__(self) -> None:
        try:
            self._fd = os.open(self.path, os.O_RDONLY)
        except OSError as fault:
            raise self._fault("cannot be opened", str(fault)) from fault
        self._stat = os.fstat(self._fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read(self, offset: int, into: Tensor) -> None:
        """Fill host memory (uint8) from an offset in bytes."""
        self._check()
        view, done = memoryview(cast(Any, into.numpy())), 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as fault:
                raise self._fault("cannot be read", str(fault)) from fault
            if count == 0:
                raise self._fault("ends early", f"{len(view) - done} bytes at {offset} are missing")
            done += count
        self._check()

    def _check(self) -> None:
        """The file under the path is still the one that was opened, unchanged."""
        try:
            now = os.stat(self.path)
        except OSError as fault:
            raise self._fault("is gone", str(fault)) from fault
        was = self._stat
        same = (now.st_ino, now.st_dev, now.st_size, now.st_mtime_ns) == (
            was.st_ino, was.st_dev, was.st_size, was.st_mtime_ns)  # fmt: skip
        if not same:
            raise self._fault("has changed", f"{was.st_size} bytes before, {now.st_size} now")

    def _fault(self, what: str, why: str) -> PlanError:
        return PlanError(
            f"the file of weights {self.path} {what}", why=why,
            hints=("weights are read from it as the model runs: restore it, and serve again",),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class OnDisk:
    """Bytes of a file from an offset."""

    file: File
    offset: int
    size_bytes: int

    def read(self, into: Tensor) -> None:
        self.file.read(self.offset, into)


def offsets_of(path: Path) -> dict[str, tuple[int, int, str]]:
    """(offset, bytes, word of its dtype) in a safetensors file of every tensor it has.

    Raises PlanError where the file is none, or shorter than its header says.
    """
    try:
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 0 < length <= _HEADER_BYTES:
                raise ValueError(f"its header would be {length} bytes")
            header = json.loads(f.read(length))
        found = {
            name: (8 + length + int(row["data_offsets"][0]),
                   int(row["data_offsets"][1]) - int(row["data_offsets"][0]), str(row["dtype"]))
            for name, row in header.items() if name != "__metadata__"
        }  # fmt: skip
        size = path.stat().st_size
        short = [n for n, (at, count, _) in found.items() if count < 0 or at + count > size]
        if short:
            raise ValueError(f"{short[0]} lies behind its end at {size} bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise PlanError(f"cannot read weights from {path}", why=str(fault),
                        hints=("an incomplete download or copy?",)) from fault  # fmt: skip
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Bytes that move together: extents behind one another, each aligned.

    host: one piece of host memory that has them in that layout already, or None.
    """

    extents: tuple[Extent, ...]
    host: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        return sum(aligned(e.size_bytes) for e in self.extents)

    def read(self, into: Tensor) -> None:
        """Fill host memory of `size_bytes`."""
        at = 0
        for extent in self.extents:
            extent.read(into[at : at + extent.size_bytes])
            at += aligned(extent.size_bytes)


def block_of(extents: Sequence[Extent], *, pinned: bool) -> Block:
    """A block; what lies in host memory alone is gathered there in its layout, pinned for copies
    to a device."""
    if not all(isinstance(e, InMemory) for e in extents):
        return Block(tuple(extents))
    block = Block(tuple(extents))
    host = torch.empty(block.size_bytes, dtype=torch.uint8, pin_memory=pinned)
    block.read(host)
    at, kept = 0, []
    for e in extents:
        kept.append(InMemory(host[at : at + e.size_bytes]))
        at += aligned(e.size_bytes)
    return Block(tuple(kept), host)
