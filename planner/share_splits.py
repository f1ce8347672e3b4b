"""Micro-batches divided among parts of several speeds: the best division, exactly.

Part p has n_p data ranks, each of which runs m_p micro-batches, at least one; sum n_p m_p is the
step's. What a part takes grows with m_p, so the divisions in which no part takes longer than a
given time are those with m_p up to some count each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Paces = Sequence[Callable[[int], int]]  # of each part: picoseconds of so many micro-batches
ROUNDING = 1e-9  # of sums as floats, relative
Allowed = Callable[[tuple[int, ...]], bool]


def divisions(total: int, ranks: Sequence[int], most: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every division of `total` micro-batches, no part's ranks with more than its `most`."""
    n, rest = ranks[0], ranks[1:]
    if not rest:
        if total % n == 0 and 1 <= total // n <= most[0]:
            yield (total // n,)
        return
    room = sum(r * k for r, k in zip(rest, most[1:]))  # that the others can take
    for m in range(max(1, -(-(total - room) // n)), min(most[0], (total - sum(rest)) // n) + 1):
        for others in divisions(total - n * m, rest, most[1:]):
            yield (m, *others)


def longest_within(pace: Callable[[int], int], limit_ps: int, most: int) -> int:
    """How many micro-batches a part runs in that time, `most` at most."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if pace(middle) <= limit_ps:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """`total` micro-batches for parts of so many data `ranks` each, of which one runs no more than
    its part's `most`. paces: of each part, what so many take. floors: and what one takes at least.
    allowed: by what the user pinned."""

    total: int
    ranks: tuple[int, ...]
    paces: Paces
    floors: tuple[int, ...]
    allowed: Allowed = lambda division: True

    @property
    def most(self) -> tuple[int, ...]:
        """What a part's ranks run where all others have one."""
        free = self.total - sum(self.ranks)
        return tuple(1 + free // n for n in self.ranks)

    def within(self, limit_ps: int) -> Iterator[tuple[int, ...]]:
        """The divisions in which no part takes longer."""
        if self.total < sum(self.ranks):
            return iter(())
        counts: list[int] = []
        for pace, most in zip(self.paces, self.most):
            counts.append(longest_within(pace, limit_ps, most))
            if not counts[-1]:  # nothing fits there: the others need not be known
                return iter(())
        return filter(self.allowed, divisions(self.total, self.ranks, counts))

    def makespan_ps(self, division: tuple[int, ...]) -> int:
        return max(pace(m) for pace, m in zip(self.paces, division))

    @property
    def floor_ps(self) -> int:
        """No division is quicker: all parts run as long, at no less than their floors."""
        rates = [n / floor for n, floor in zip(self.ranks, self.floors)]
        return int(self.total / sum(rates) * (1 - ROUNDING)) - 1

    def least_ps(self, below_ps: int) -> int | None:
        """The least makespan, None where there is no division, or none below that."""
        low, best = self.floor_ps, below_ps
        division = next(self.within(best - 1), None) if low < best else None
        while division is not None:  # one within best; none within low
            best = self.makespan_ps(division)
            division = None
            while division is None and low + 1 < best:
                middle = (low + best) // 2
                division = next(self.within(middle), None)
                low = low if division is not None else middle
        return None if best == below_ps else best

    def best(self, tails: Paces, below_ps: int) -> tuple[int, tuple[int, ...]] | None:
        """(step, division) of the least makespan plus longest tail, the first of equals; None
        where none is below `below_ps`. A part's tail is least after one micro-batch or two."""
        least = self.least_ps(below_ps)
        if least is None:
            return None
        tail = max(min(t(m) for m in (1, 2) if m <= k) for t, k in zip(tails, self.most))
        best: tuple[int, tuple[int, ...]] | None = None
        for limit in (least, None):  # the shortest makespans first, then all that may be better
            if limit is None:
                limit = (best[0] if best else below_ps) - tail - (best is None)
            for division in self.within(min(limit, below_ps - tail - 1)):
                after = max(t(m) for t, m in zip(tails, division))
                step = self.makespan_ps(division) + after
                if step < below_ps and (best is None or (step, division) < best):
                    best = step, division
        return best
