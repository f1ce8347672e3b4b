"""Weights for a disk tier: read where the user's files have them as they are wanted, else written
once, packed and cut for this rank, as a safetensors file of our own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ir.errors import PlanError
from planner.runtime.serve.bytes import Extent, File, OnDisk, as_bytes, offsets_of
from planner.runtime.serve.lent import Spec
from planner.runtime.sources import Joined, Source, Stacked, Stored

_WORDS = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8",
    torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.int32: "I32",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class InARow:
    """Extents behind one another as one, without space between."""

    parts: tuple[Extent, ...]

    @property
    def size_bytes(self) -> int:
        return sum(p.size_bytes for p in self.parts)

    def read(self, into: Tensor) -> None:
        at = 0
        for part in self.parts:
            part.read(into[at : at + part.size_bytes])
            at += part.size_bytes


@dataclass(slots=True)
class Originals:
    """The user's files, opened once, and where their tensors lie."""

    _files: dict[Path, File] = field(default_factory=dict)
    _offsets: dict[Path, dict[str, tuple[int, int, str]]] = field(default_factory=dict)

    def extent(self, source: Source, spec: Spec, row: int | None = None) -> Extent | None:
        """Where the bytes of a tensor (row: of one along its first dimension) lie in the files, if
        they are there as the model wants them."""
        if spec.word:
            return None
        if isinstance(source, Stored):
            return self._stored(source, _WORDS.get(spec.dtype, ""), row)
        if isinstance(source, Stacked) and row is not None:
            return self.extent(source.parts[row], spec)
        if isinstance(source, Joined) and row is not None and source.dim == 1:
            parts = [self.extent(p, spec, row) for p in source.parts]
            return InARow(tuple(p for p in parts if p)) if all(parts) else None
        return None

    def _stored(self, source: Stored, word: str, row: int | None) -> Extent | None:
        path = source.file
        if path not in self._files:
            self._offsets[path] = offsets_of(path)
            self._files[path] = File(path)
        at, size, held = self._offsets[path][source.key]
        if held != word:
            return None
        if row is not None:
            size //= source.shape[0]
            at += row * size
        return OnDisk(self._files[path], at, size)


class Spool:
    """A file of weights being written: sizes first, then values in any order."""

    def __init__(self, path: Path, specs: Mapping[str, Sequence[Spec]]) -> None:
        """specs: of each name, one entry, or one for each of a stack."""
        self.path, self._where = path, dict[tuple[str, int, int], tuple[int, int]]()
        header: dict[str, object] = {}
        at = 0
        for name, rows in specs.items():
            for row, spec in enumerate(rows):
                for part, ((shape, dtype), size) in enumerate(zip(spec.parts, spec.sizes_bytes)):
                    key = f"{name}.{row}.{part}"
                    header[key] = {"dtype": _WORDS[dtype], "shape": list(shape),
                                   "data_offsets": [at, at + size]}  # fmt: skip
                    self._where[name, row, part] = at, size
                    at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.posix_fallocate(self._fd, 0, max(1, self._start + at))
            os.pwrite(self._fd, len(text).to_bytes(8, "little") + text, 0)
        except OSError as fault:
            raise PlanError(
                f"cannot write {self._start + at} bytes of weights to {path}", why=str(fault),
                hints=("planner.serve(.., folder=DIR) on the disk that the plan means",),
            ) from fault  # fmt: skip

    def write(self, name: str, row: int, parts: Sequence[Tensor]) -> None:
        for part, tensor in enumerate(parts):
            at, size = self._where[name, row, part]
            data = memoryview(cast(Any, as_bytes(tensor.cpu().contiguous()).numpy()))
            done = 0
            try:
                while done < size:
                    done += os.pwrite(self._fd, data[done:], self._start + at + done)
            except OSError as fault:
                raise PlanError(f"cannot write weights to {self.path}", why=str(fault)) from fault

    def finish(self) -> dict[tuple[str, int], tuple[Extent, ...]]:
        """The extents of every (name, row)."""
        os.fsync(self._fd)
        os.close(self._fd)
        file, found = File(self.path), dict[tuple[str, int], tuple[Extent, ...]]()
        for (name, row, _), (at, size) in self._where.items():
            here = OnDisk(file, self._start + at, size)
            found[name, row] = (*found.get((name, row), ()), here)
        return found
