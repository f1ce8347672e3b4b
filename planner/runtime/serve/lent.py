"""Weights as they lie in bytes, and parameters made of bytes: the one layout of all tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from planner.runtime.serve.bytes import aligned
from planner.runtime.serve.packed import FORMATS, Packed, pack_into


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a weight is: its shape and dtype as the model sees it, and its format, "" where its
    bytes are those. parts: (shape, dtype) of each tensor that it is held as."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    word: str
    parts: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype, word: str) -> Spec:
        """Raises UsageError where its columns do not divide into the format's groups."""
        whole = torch.empty(tuple(shape), dtype=dtype, device="meta")
        parts = FORMATS[word].pack(whole) if word else (whole,)
        return cls(shape=tuple(shape), dtype=dtype, word=word,
                   parts=tuple((tuple(p.shape), p.dtype) for p in parts))  # fmt: skip

    @property
    def sizes_bytes(self) -> tuple[int, ...]:
        return tuple(
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.parts
        )

    @property
    def row(self) -> Spec:
        """One of a stack: of an expert."""
        return Spec.of(self.shape[1:], self.dtype, self.word)

    def parts_of(self, value: Tensor) -> tuple[Tensor, ...]:
        """A value as the tensors that it is held as."""
        value = value.to(self.dtype)
        if not self.word:
            return (value.contiguous(),)
        parts = tuple(value.new_empty(shape, dtype=dtype) for shape, dtype in self.parts)
        pack_into(parts, value.detach(), self.word)
        return parts

    def made_of(self, parts: Sequence[Tensor]) -> Tensor:
        """The weight that the user's forward reads."""
        if not self.word:
            return parts[0]
        return Packed(tuple(parts), self.word, self.shape, self.dtype)

    def placeholder(self) -> Tensor:
        """What stands in the module while the weight is elsewhere: its shape, no values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def views(specs: Sequence[Spec], memory: Tensor) -> list[Tensor]:
    """Weights whose bytes lie behind one another in memory (uint8), as `Block` lays them."""
    found, at = [], 0
    for spec in specs:
        parts = []
        for (shape, dtype), size in zip(spec.parts, spec.sizes_bytes):
            parts.append(memory[at : at + size].view(dtype).view(shape))
            at += aligned(size)
        found.append(spec.made_of(parts))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a module reads a parameter."""

    module: nn.Module
    name: str

    def put(self, parameter: nn.Parameter) -> None:
        self.module._parameters[self.name] = parameter


def parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


@contextmanager
def lent(
    places: Sequence[Place], given: Sequence[nn.Parameter], after: Sequence[nn.Parameter]
) -> Iterator[None]:
    """Put parameters in their modules while something runs."""
    for place, one in zip(places, given, strict=True):
        place.put(one)
    try:
        yield
    finally:
        for place, one in zip(places, after, strict=True):
            place.put(one)
