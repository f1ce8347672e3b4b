"""Memory below the device: a row of the hardware file each, and how much of it GPUs fill."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from cost_models.checked_toml import table
from cost_models.decisions import Decisions
from ir.errors import UsageError

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
TIER_KEYS = {"name": str, "bytes": int, "read_bytes_per_s": float, "write_bytes_per_s": float}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """What a tier holds and how fast it is read and written, for so many GPUs together that share
    it; None: those of a node."""

    name: str
    bytes: int
    read_bytes_per_s: float
    write_bytes_per_s: float
    gpus: int | None = None


def read_tier(raw: Any, where: str, path: str) -> Tier:
    """A row of `cluster.tiers`. Raises UsageError with the key's path."""
    pool = isinstance(raw, dict) and "gpus" in raw
    keys = {**TIER_KEYS, "gpus": int} if pool else TIER_KEYS
    found = Tier(**table(raw, keys, where, path, () if pool else ("gpus",)))
    if not NAME.fullmatch(found.name):
        raise UsageError(f"{path}name is {found.name!r}", where=where,
                         why="expected a word of letters, digits, _ and -")  # fmt: skip
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUse:
    """The fullest one of a tier: what the GPUs that share it lay there, and what it holds."""

    name: str
    used_bytes: int
    bytes: int
    gpus: int

    @property
    def fits(self) -> bool:
        return self.used_bytes <= self.bytes

    @property
    def said(self) -> str:
        """In words: `cpu 1,103.2 of 1,024.0 GB, for 8 GPUs`."""
        shared = f"for {self.gpus} GPUs" if self.gpus > 1 else "for one GPU"
        return f"{self.name} {self.used_bytes / 1e9:,.1f} of {self.bytes / 1e9:,.1f} GB, {shared}"


@functools.lru_cache(maxsize=1024)
def together(each: int, pipeline: int, gpus: int) -> int:
    """Of so many GPUs that share a tier, those of one pp rank where it has the most, at least.

    each: GPUs in a row that are one pp rank; pipeline: in a row that are all ranks."""
    if gpus % each == 0 or each % gpus == 0:
        windows = -(-each // gpus)
    else:
        windows = (each - 1) // gpus + 2
    return max(-(-each // windows), gpus // pipeline * each)


def sharing(d: Decisions, gpus: int) -> Iterator[dict[int, int]]:
    """Of every so many GPUs in a row, how many each pp rank has there; alike ones are left out
    where ranks lie as before."""
    each = d.pipeline // d.pp  # GPUs in a row that are one pp rank
    period = d.pipeline * gpus // gcd(d.pipeline, gpus)
    for start in range(0, min(d.gpus, period), gpus):
        found: dict[int, int] = {}
        at, end = start, min(start + gpus, d.gpus)
        while at < end:
            more, rank = min(each - at % each, end - at), at % d.pipeline // each
            found[rank] = found.get(rank, 0) + more
            at += more
        yield found


def fullest(d: Decisions, rank_bytes: Sequence[int], gpus: int) -> int:
    """Bytes of the fullest so many GPUs in a row, of what each pp rank's GPUs lay below."""
    return max(
        sum(count * rank_bytes[rank] for rank, count in some.items()) for some in sharing(d, gpus)
    )
