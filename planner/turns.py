"""Which mesh is tried next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

from planner.mesh import Mesh
from planner.outcome import Outcome

S = TypeVar("S")


def in_turn(
    guess: Sequence[int], lower: Sequence[int], kinds: Sequence[Hashable], out: Outcome,
    effort: int, sharpen: Callable[[Sequence[int]], None],
) -> Iterator[int]:  # fmt: skip
    """The best guess first; once that much effort is spent, what holds the bound down. Before
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
        kind = min(rest, key=lambda k: (guess[rest[k][0]] * errs.get(k, 1.0), rest[k][0]))
        i = rest[kind].popleft()
        if not rest[kind]:
            del rest[kind]
        if out.best is None or lower[i] < out.best.score:
            yield i
            if out.best is not None:
                came_to = out.best.score / max(1, guess[i])
                errs[kind] = min(errs.get(kind, came_to), came_to)
    left = [i for row in rest.values() for i in row]
    if left:
        sharpen(left)
    yield from sorted(left, key=lambda i: (lower[i], i))


def by_space(
    some: Sequence[int], candidates: Sequence[tuple[S, Mesh]]
) -> Iterator[tuple[S, list[int]]]:
    """Some of the candidates by the space that they are of."""
    for key in dict.fromkeys(id(candidates[i][0]) for i in some):
        mine = [i for i in some if id(candidates[i][0]) == key]
        yield candidates[mine[0]][0], mine
