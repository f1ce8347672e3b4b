"""Bytes between places: host to device and back, host memory, a disk past the page cache."""

from __future__ import annotations

import contextlib
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
REPEATS, READS, PAUSE_S = 3, 7, 2e-3
FETCHED_BYTES = 1 << 22  # about an expert


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
    """Write a file, and read it again as the runtime reads its files: through the page cache, which
    was asked to drop it; the check of the rate has the last word. Writes end with fsync.
    "disk_fetch": pieces of it as experts are that are wanted at once, which nothing reads ahead."""
    size = max(int(DISK_BYTES * large * large) // BLOCK_BYTES, 4) * BLOCK_BYTES
    block = memoryview(bytearray(os.urandom(BLOCK_BYTES)))
    try:
        handle, name = tempfile.mkstemp(prefix=".plan-calibrate-", dir=folder)
    except OSError as fault:
        left_out.append(f"disk: no file can be written in {folder.name or '.'} ({fault.strerror})")
        return
    os.close(handle)
    path = Path(name)
    try:
        writes = tuple(_write_s(path, block, size) for _ in range(REPEATS))
        reads = tuple(_read_s(path, block) for _ in range(READS))
        fetches = _fetches_s(path, block[:FETCHED_BYTES], size)
    except OSError as fault:
        left_out.append(f"disk: {fault.strerror}")
        return
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    yield Probe(op="disk_write", moved_bytes=float(size), seconds=writes)
    yield Probe(op="disk_read", moved_bytes=float(size), seconds=reads)
    yield Probe(op="disk_fetch", moved_bytes=float(FETCHED_BYTES), seconds=fetches)


def _write_s(path: Path, block: memoryview, size: int) -> float:
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // BLOCK_BYTES):
            file.write(block)
        os.fsync(file.fileno())
    return time.perf_counter() - start


def _read_s(path: Path, block: memoryview) -> float:
    with _dropped(path) as handle:
        start = time.perf_counter()
        while os.readv(handle, [block]):
            pass
        return time.perf_counter() - start


def _fetches_s(path: Path, block: memoryview, size: int) -> tuple[float, ...]:
    """From the file's end to its start, so that no system takes them for a stream; the disk idles
    before each, as it does while layers run."""
    found = []
    with _dropped(path) as handle:
        for at in reversed(range(0, size, 2 * len(block))):
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            os.preadv(handle, [block], at)
            found.append(time.perf_counter() - start)
    return tuple(found)


@contextlib.contextmanager
def _dropped(path: Path) -> Iterator[int]:
    """A file, open, of which the page cache holds nothing."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):  # on Linux
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        yield handle
    finally:
        os.close(handle)
