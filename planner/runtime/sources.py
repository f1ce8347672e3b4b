"""Stored tensors of which any part can be read: safetensors files, and what is made of several."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ir.errors import PlanError

INDEX = "model.safetensors.index.json"
Span = tuple[int, int]  # (first, count)


class Source(Protocol):
    """A stored tensor. read: the part [first, first + count) of each dimension."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, part: Sequence[Span]) -> Tensor: ...


class Files:
    """Open safetensors files; `key in where` says which file holds a tensor."""

    def __init__(self, path: Path) -> None:
        """path: a file, a folder with an index, or a folder of files.

        Raises PlanError where that is not what is there.
        """
        self._open = contextlib.ExitStack()
        self._handles: dict[Path, Any] = {}
        try:
            self.where = self._listed(path)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def handle(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                made = self._open.enter_context(safe_open(str(file), framework="pt"))
            except (OSError, SafetensorError) as fault:
                raise PlanError(
                    f"cannot read weights from {file}", why=str(fault).splitlines()[0],
                    hints=("an incomplete download or copy?",),
                ) from fault  # fmt: skip
            self._handles[file] = made
        return self._handles[file]

    def stored(self) -> dict[str, Source]:
        """Every tensor by its name in the files."""
        return {key: Stored(files=self, file=file, key=key) for key, file in self.where.items()}

    def _listed(self, path: Path) -> dict[str, Path]:
        if path.is_file() and path.name.endswith(".index.json"):
            return _indexed(path)
        if path.is_file():
            if path.suffix != ".safetensors":
                raise PlanError(f"{path} is no safetensors file", hints=FORMATS)
            return dict.fromkeys(self.handle(path).keys(), path)
        if not path.is_dir():
            raise PlanError(f"there are no weights at {path}", hints=FORMATS)
        if (path / INDEX).is_file():
            return _indexed(path / INDEX)
        found: dict[str, Path] = {}
        for file in sorted(path.glob("*.safetensors")):
            for key in self.handle(file).keys():  # noqa: SIM118  (no mapping)
                if key in found:
                    raise PlanError(f"{key} is in {found[key].name} and in {file.name}",
                                    where=str(path))  # fmt: skip
                found[key] = file
        if not found:
            raise PlanError(f"there are no safetensors files in {path}", hints=FORMATS)
        return found


FORMATS = (
    f"a .safetensors file, or a folder with {INDEX} or several such files",
    "parallel.restore(folder) reads what parallel.save wrote",
)


def _indexed(index: Path) -> dict[str, Path]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): index.parent / str(file) for key, file in table.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as fault:
        raise PlanError(f"{index} is no index of weights", why=str(fault)) from fault


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file."""

    files: Files
    file: Path
    key: str

    @cached_property
    def _slice(self) -> Any:
        try:
            return self.files.handle(self.file).get_slice(self.key)
        except SafetensorError as fault:
            raise PlanError(
                f"{self.key} is in the index, not in {self.file.name}", where=str(self.file)
            ) from fault

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._slice.get_shape())

    def read(self, part: Sequence[Span]) -> Tensor:
        if not part:
            whole: Tensor = self.files.handle(self.file).get_tensor(self.key)
            return whole
        found: Tensor = self._slice[tuple(slice(o, o + n) for o, n in part)]
        return found


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """Tensors of one shape as one, along a new first dimension: experts."""

    parts: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    def read(self, part: Sequence[Span]) -> Tensor:
        (first, count), *rest = part
        return torch.stack([p.read(rest) for p in self.parts[first : first + count]])


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Tensors behind one another along a dimension."""

    parts: tuple[Source, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.parts[0].shape)
        sizes[self.dim] = sum(p.shape[self.dim] for p in self.parts)
        return tuple(sizes)

    def read(self, part: Sequence[Span]) -> Tensor:
        first, count = part[self.dim]
        start, found = 0, []
        for one in self.parts:
            size = one.shape[self.dim]
            a, b = max(first, start), min(first + count, start + size)
            if a < b:
                inside = list(part)
                inside[self.dim] = (a - start, b - a)
                found.append(one.read(inside))
            start += size
        return torch.cat(found, self.dim)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tensor that a function makes whole; what is asked for is cut from it."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def read(self, part: Sequence[Span]) -> Tensor:
        return self.make()[tuple(slice(o, o + n) for o, n in part)]


def whole(source: Source) -> Tensor:
    return source.read([(0, n) for n in source.shape])
