"""Which meshes are tried next, two at once."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

from planner.mesh import Mesh
from planner.outcome import Outcome

AT_ONCE = 2
PROMISES = 1.02  # times its guess: where the best is worse, it is waited for, and cuts others short
S = TypeVar("S")


def in_turn(
    guess: Sequence[int], lower: Sequence[int], kinds: Sequence[Hashable], out: Outcome,
    effort: int, sharpen: Callable[[Sequence[int]], None],
) -> Iterator[tuple[int, ...]]:  # fmt: skip
    """Two at once, the best guess first; after that much effort what holds the bound down. Before
    that, `sharpen` is told of all that are left, and may raise their bounds in `lower`.

    guess, lower: scores of every mesh. kinds: meshes whose guesses err alike. What the meshes of a
    kind came to, over their guesses, is known once one was tried: at least that, where it came to
    nothing better than the best. The least of it corrects the kind's guesses, so that no kind is
    looked at for long that promises more than it keeps.
    """
    rest: dict[Hashable, deque[int]] = {}
    for i in sorted(range(len(guess)), key=lambda i: (guess[i], lower[i], i)):
        rest.setdefault(kinds[i], deque()).append(i)
    errs: dict[Hashable, float] = {}
    while rest and (out.best is None or out.spent < effort):
        some: list[tuple[Hashable, int]] = []
        while rest and len(some) < (AT_ONCE if _near(out, guess, some) else 1):
            kind = min(rest, key=lambda k: (guess[rest[k][0]] * errs.get(k, 1.0), rest[k][0]))
            i = rest[kind].popleft()
            if not rest[kind]:
                del rest[kind]
            if out.best is None or lower[i] < out.best.score:
                some.append((kind, i))
        if some:
            yield tuple(i for _, i in some)
        for kind, i in some:
            if out.best is not None:
                came_to = out.best.score / max(1, guess[i])
                errs[kind] = min(errs.get(kind, came_to), came_to)
    left = [i for row in rest.values() for i in row]
    if left:
        sharpen(left)
    by_bound = iter(sorted(left, key=lambda i: (lower[i], i)))
    ahead = (i for i in by_bound if out.best is None or lower[i] < out.best.score)
    while pair := tuple(itertools.islice(ahead, AT_ONCE)):
        yield pair


def _near(out: Outcome, guess: Sequence[int], some: Sequence[tuple[Hashable, int]]) -> bool:
    """Whether the best is about as good as what these promise."""
    return out.best is not None and all(out.best.score < PROMISES * guess[i] for _, i in some)


def by_space(
    some: Sequence[int], candidates: Sequence[tuple[S, Mesh]]
) -> Iterator[tuple[S, list[int]]]:
    """Some of the candidates by the space that they are of."""
    for key in dict.fromkeys(id(candidates[i][0]) for i in some):
        mine = [i for i in some if id(candidates[i][0]) == key]
        yield candidates[mine[0]][0], mine
