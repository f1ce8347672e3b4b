"""Bytes between places: host to device and back, host memory, a disk past the page cache."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import torch

from cost_models.calibrate import Probe
from planner.runtime.probe_timer import Timer

COPY_BYTES = 1 << 28  # 256 MiB: far beyond what a copy's start costs, and beyond caches
PIECE_BYTES = 1 << 24  # of a copy within the host: about what a layer streams
DISK_BYTES = 1 << 30
BLOCK_BYTES = 1 << 24  # 16 MiB a read: what an NVMe disk streams at
REPEATS = 3


def copies(timer: Timer, large: float, left_out: list[str]) -> Iterator[Probe]:
    """Over the host link, pinned both ways and unpinned; and within the host's memory."""
    size = max(int(COPY_BYTES * large) // PIECE_BYTES, 4) * PIECE_BYTES
    host = torch.ones(size, dtype=torch.uint8)
    if timer.device.type == "cuda":
        pinned = host.pin_memory()
        there = torch.empty(size, dtype=torch.uint8, device=timer.device)
        for op, call in (
            ("host_to_device", lambda: there.copy_(pinned, non_blocking=True)),
            ("device_to_host", lambda: pinned.copy_(there, non_blocking=True)),
            ("unpinned", lambda: there.copy_(host)),
        ):
            yield Probe(op=op, moved_bytes=float(size), seconds=timer.repeats(call))
    else:
        left_out.append("host link, pinned and not: a CPU has none; memory copies stand for it")
    # In pieces, all of the memory in turn: as many bytes past the caches, and times so short that
    # few of them are interrupted.
    pieces = cycle(zip(torch.empty_like(host).split(PIECE_BYTES), host.split(PIECE_BYTES)))

    def piece() -> None:
        there, here = next(pieces)
        there.copy_(here)

    seconds = timer.on_host.repeats(piece)
    yield Probe(op="host_copy", moved_bytes=float(PIECE_BYTES), seconds=seconds)


def disk(folder: Path, large: float, left_out: list[str]) -> Iterator[Probe]:
    """Write a file, read it again, past the page cache; both to the disk itself.

    Writes end with fsync. Reads open with O_DIRECT; where the file system refuses that, what the
    page cache holds of the file is dropped first, and the check of the rate has the last word.
    """
    size = max(int(DISK_BYTES * large * large) // BLOCK_BYTES, 4) * BLOCK_BYTES
    block = mmap.mmap(-1, BLOCK_BYTES)  # aligned to pages, as O_DIRECT asks
    block.write(os.urandom(BLOCK_BYTES))
    try:
        handle, name = tempfile.mkstemp(prefix=".plan-calibrate-", dir=folder)
    except OSError as fault:
        left_out.append(f"disk: no file can be written in {folder.name or '.'} ({fault.strerror})")
        return
    os.close(handle)
    path = Path(name)
    try:
        writes = tuple(_write_s(path, block, size) for _ in range(REPEATS))
        reads = tuple(_read_s(path, block, left_out) for _ in range(REPEATS))
    except OSError as fault:
        left_out.append(f"disk: {fault.strerror}")
        return
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    yield Probe(op="disk_write", moved_bytes=float(size), seconds=writes)
    yield Probe(op="disk_read", moved_bytes=float(size), seconds=reads)


def _write_s(path: Path, block: mmap.mmap, size: int) -> float:
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // BLOCK_BYTES):
            file.write(block)
        os.fsync(file.fileno())
    return time.perf_counter() - start


def _read_s(path: Path, block: mmap.mmap, left_out: list[str]) -> float:
    handle = _open_direct(path, left_out)
    try:
        start = time.perf_counter()
        while os.readv(handle, [block]):
            pass
        return time.perf_counter() - start
    finally:
        os.close(handle)


def _open_direct(path: Path, left_out: list[str]) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        handle = os.open(path, os.O_RDONLY)
        words = "disk: this file system refuses O_DIRECT; the page cache was asked to drop the file"
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        if words not in left_out:
            left_out.append(words)
        return handle
