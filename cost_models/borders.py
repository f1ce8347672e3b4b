"""What goes from a pipeline stage to the next where the two have another tp: which rank gives which
piece of a value to which, and how many bytes that is.

A value that is split over tp goes as the pieces that two ranks have in common; one that is whole
on every tp rank comes to each taker from one giver. Gradients go the same way back, the takers
giving. The runtime sends by `pieces`, costs count them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cost_models.chain import Chain
from cost_models.decisions import Decisions
from cost_models.layout import boundary
from cost_models.unit_costs import learns_of

Piece = tuple[int, int]  # first index and length, along the dimension that is split


@dataclass(frozen=True, slots=True)
class Sent:
    """One piece. of: where it is in the giver's part; into: where in the taker's; None: all."""

    giver: int
    taker: int
    of: Piece | None = None
    into: Piece | None = None


def pieces(givers: int, takers: int, size: int | None) -> tuple[Sent, ...]:
    """What each of so many ranks gives to each of so many others.

    size: of the dimension that the value is split on, whole, which both counts divide; None: the
    value is whole on every rank.
    """
    if size is None:
        return tuple(Sent(taker * givers // takers, taker) for taker in range(takers))
    own, theirs, found = size // givers, size // takers, []
    for giver in range(givers):
        for taker in range(giver * own // theirs, takers):
            low = max(giver * own, taker * theirs)
            high = min((giver + 1) * own, (taker + 1) * theirs)
            if low >= high:
                break
            of, into = (low - giver * own, high - low), (low - taker * theirs, high - low)
            found.append(Sent(giver, taker, of, into))
    return tuple(found)


def messages(givers: int, takers: int, size_bytes: int, split: bool) -> tuple[int, int]:
    """(bytes of each message, how many the rank sends that sends most) of a value of so many bytes
    whole. One of the counts divides the other, so messages are alike."""
    parts = max(givers, takers) if split else 1
    sent = Counter(one.giver for one in pieces(givers, takers, parts if split else None))
    return size_bytes // parts, max(sent.values())


def busiest_bytes(givers: int, takers: int, size_bytes: int, split: bool) -> int:
    """Most bytes that one rank sends or receives of such a value."""
    each, most = messages(givers, takers, size_bytes, split)
    return max(each * most, size_bytes // takers if split else size_bytes)


def values_between(chain: Chain, d: Decisions, seq_len: int) -> tuple[tuple[int, bool], ...]:
    """(bytes on all tp ranks together, whether tp splits it) of each value that one micro-batch
    sends from a stage to the next: the widest layer's results."""
    found: list[tuple[tuple[int, bool], ...]] = [()]
    for unit in dict.fromkeys(link.unit for link in chain.links if link.is_layer):
        learns = learns_of(unit)
        found.append(tuple(
            (int(unit.values[r].nbytes(d.micro_batch, seq_len // d.cp)),
             boundary(unit.values[r], d.sequence_parallel and learns[r]) >= 0)
            for r in unit.outputs
        ))  # fmt: skip
    return max(found, key=lambda values: sum(size for size, _ in values))


def most_bytes(values: tuple[tuple[int, bool], ...], before: int, after: int) -> int:
    """What the busiest rank sends or receives of these values between stages of these tps, there
    or back, whichever is more: a boundary has one time for both ways."""
    return max(
        sum(busiest_bytes(*ways, size, split) for size, split in values)
        for ways in ((before, after), (after, before))
    )
