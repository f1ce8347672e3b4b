"""What an engine does with weights and caches beside the kernels that read them.

Where no kernel multiplies a format as it lies, its bits are written out in 16 bits first, by ops
that each pass through the GPU's memory; a cache may be copied together, permuted or written once
for each query head before attention reads it. What lies below the GPU may come ahead of its use or
not, from pages that the host has to copy to pinned ones, and attention of it may be the CPU's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from cost_models.serving_decisions import KV_BYTES, WEIGHT_BYTES
from cost_models.serving_shapes import BLOCKS, Attend, Matrix
from ir.errors import UsageError

PAGEABLE = ("weights", "cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """The default: kernels read all as it lies; what is below the GPU is pinned and comes ahead.

    unpack_bytes: by format, GPU memory traffic of a weight until it is written out in 16 bits, from
    which a 16-bit product reads it; formats not named are multiplied as they lie.
    cache_bytes: traffic of an element of the cache in a decode step beside attention's own reading.
    cache_unpack_bytes: more of it, until an element that is kept in fewer bits is written out; 0:
    attention reads it as it lies.
    mask_bytes: memory of each pair of tokens of prompts that are read together: those of several
    lengths are told apart by a mask, which attention reads as numbers.
    repeats_heads: keys and values are written out for each query head, then read.
    splits: parts that a batch is computed in, layer by layer: each reads all weights, which come
    once, beside the first of them.
    attends: attention of a cache below the GPU is the CPU's, attends_bytes_per_s of its values.
    pageable: of PAGEABLE, what below the GPU is not pinned: the host copies it to what is, at
    pageable_bytes_per_s, before it can come, and launches nothing meanwhile.
    host_tokens: up to so many tokens cold experts are the CPU's, even if copying is quicker.
    fetches_layers: cold experts come a layer at a time, not each by itself.
    whole_head: every rank multiplies the whole head.
    separate: blocks whose matrices of one input (q, k and v; gate and up) are kernels each.
    """

    unpack_bytes: tuple[tuple[str, float], ...] = ()
    cache_bytes: float = 0.0
    cache_unpack_bytes: float = 0.0
    mask_bytes: float = 0.0
    repeats_heads: bool = False
    splits: int = 1
    attends: bool = False
    attends_bytes_per_s: float = 0.0
    pageable: tuple[str, ...] = ()
    pageable_bytes_per_s: float = 0.0
    host_tokens: int = 0
    fetches_layers: bool = False
    whole_head: bool = False
    separate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        odd = [f for f, _ in self.unpack_bytes if f not in WEIGHT_BYTES]
        odd += [word for word in self.pageable if word not in PAGEABLE]
        odd += [word for word in self.separate if word not in BLOCKS]
        if odd:
            known = ", ".join((*WEIGHT_BYTES, *PAGEABLE, *BLOCKS))
            raise UsageError(f"an engine's handling names {', '.join(odd)}", why=f"known: {known}")
        if self.pageable and not self.pageable_bytes_per_s:
            raise UsageError("what is not pinned, without the rate that the host copies it at")
        if self.attends and not self.attends_bytes_per_s:
            raise UsageError("attention on the CPU, without its rate")
        if self.splits < 1:
            raise UsageError(f"a batch in {self.splits} parts")

    def kernels_of(self, matrix: Matrix) -> tuple[Matrix, ...]:
        """What a matrix of several parts is multiplied as."""
        if matrix.block not in self.separate:
            return (matrix,)
        return tuple(replace(matrix, parts=(part,)) for part in matrix.parts)

    def unpacks(self, name: str) -> float:
        """Bytes a weight of a format, 0 where kernels read it as it lies."""
        return dict(self.unpack_bytes).get(name, 0.0)

    def unpacks_cache(self, kv: str) -> bool:
        return KV_BYTES[kv] < 2 and self.cache_unpack_bytes > 0

    def cache_moved_bytes(self, attend: Attend, kv: str, tp: int) -> float:
        """Traffic of one token of one sequence's cache beside attention's own reading."""
        each = self.cache_bytes + (self.cache_unpack_bytes if self.unpacks_cache(kv) else 0.0)
        groups = attend.heads / attend.kv_heads
        if self.repeats_heads and groups > 1 and not attend.latent:
            each += 2 + 2 * groups  # read once, written for each
        return each * attend.cached(tp)


def told(handling: Handling, raw: dict[str, Any]) -> Handling:
    """As a table of an engine's or of a run's has it otherwise. Raises UsageError naming unknown
    keys."""
    known = [f.name for f in fields(Handling)]
    if odd := sorted(raw.keys() - set(known)):
        raise UsageError(f"unknown handling: {', '.join(odd)}", why=f"one of {', '.join(known)}")
    values: dict[str, Any] = {
        key: tuple(value.items()) if isinstance(value, dict)
        else tuple(value) if isinstance(value, list) else value
        for key, value in raw.items()
    }  # fmt: skip
    return replace(handling, **values)
