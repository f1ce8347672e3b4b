"""What a plan is asked for: an objective, sizes left open, and what it may not exceed."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal

from cost_models.hardware import Cluster
from cost_models.ledger import Estimate
from cost_models.units import format_bytes, parse_bytes
from ir.errors import UsageError

OBJECTIVES = ("time", "cost", "energy", "memory", "gpus")
LEAST_MEMORY_BYTES = 1_000_000  # less is a number that lacks its unit
MOST_COUNT = 999_999_999  # of GPUs, samples and tokens, in a plan and on the command line


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """memory_bytes: of a GPU's. usd_per_million_tokens: at the least price. None: no limit."""

    memory_bytes: int | None = None
    usd_per_million_tokens: float | None = None
    gpus: int | None = None

    @property
    def usd(self) -> float:
        """USD for a million tokens at most; infinite without a limit."""
        limit = self.usd_per_million_tokens
        return math.inf if limit is None else limit


def capped(cluster: Cluster, memory_bytes: int | None) -> Cluster:
    """The cluster as a search sees it that may use so much of each GPU's memory."""
    device = cluster.device
    if memory_bytes is None or memory_bytes >= device.memory_bytes:
        return cluster
    return replace(cluster, device=replace(device, memory_bytes=memory_bytes))


def uncapped(estimate: Estimate, cluster: Cluster) -> Estimate:
    """An estimate of the capped cluster, with the capacity that the GPU has."""
    return replace(estimate, capacity_bytes=cluster.device.memory_bytes)


def parse_memory(text: str) -> int | None:
    """Read a limit of memory, "70GB"; None where none is said. Raises UsageError for no memory."""
    if not text:
        return None
    size = parse_bytes(text)
    if size < LEAST_MEMORY_BYTES:  # a number alone is bytes
        raise UsageError(f"--max-memory {text} leaves a plan no memory", why=format_bytes(size),
                         hints=("--max-memory 70GB: of each GPU's at most",))  # fmt: skip
    return size


def usd_at_least(usd: float) -> str:
    """USD in four digits, rounded up: as --max-cost a plan of that cost keeps it."""
    if usd <= 0:
        return "0"
    step = Decimal(1).scaleb(Decimal(usd).adjusted() - 3)
    up = Decimal(usd).quantize(step, rounding=ROUND_CEILING)
    return f"{up.normalize():f}"


def parse_share(text: str, flag: str) -> float:
    """Read a share, "5%". Raises UsageError where it is none."""
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not 0 <= share < 1e6:
        raise UsageError(f"{flag} {text} is no share", why="expected per cent: 5%")
    return share


def parse_sizes(text: str | None, flag: str) -> tuple[int, ...]:
    """Read "512", or "256..1024": the low end, doubled while it is below the high end, that, and
    of the powers of two between them, which divide in the most ways, the same number.

    Raises UsageError where it is neither.
    """
    if text is None:
        return ()
    low, dots, high = text.partition("..")
    ends = (low, high) if dots else (low, low)
    told = all(re.fullmatch("[0-9]{1,9}", end) for end in ends)  # up to MOST_COUNT
    if not told or int(low) > int(ends[1]) or int(low) < 1:
        raise UsageError(f"{flag} {text[:60]} is no size", why="expected 512, or a range:"
                         f" 256..1024, of whole numbers up to {MOST_COUNT:,}")  # fmt: skip
    first, last = map(int, ends)
    doubled = itertools.takewhile(lambda n: n < last, (first << k for k in itertools.count()))
    powers = (1 << k for k in range(first.bit_length(), last.bit_length()))
    return tuple(sorted({*doubled, *powers, last}))
