"""Where a plan fits by less than what predictions of memory err by."""

from __future__ import annotations

from cost_models.ledger import Estimate
from cost_models.validation.accuracy import memory_error


def tight(e: Estimate) -> bool:
    """Whether it fits, and some rank would not if it held as much more as memory's mean error."""
    more = 1 + memory_error()
    return e.fits and any(rank.peak_bytes * more > e.capacity_of(rank) for rank in e.ranks)


def tight_words() -> str:
    """What to make of a plan that is tight."""
    return f"fits by prediction, by less than its error ({memory_error():.0%})"
