"""What each of the two processes of a search does, with what it learned itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.expanding import Expander
from planner.mesh import Mesh
from planner.outcome import Outcome, Unsettled, bare
from planner.proving import Ask, Prover, Told
from planner.turns import by_space
from planner.twin import Pair

Ints = NDArray[np.int64]
APART = 256  # meshes from which on two sides pay
CHAIN = 40  # meshes are bounded in the time in which another chain is added up


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """candidates: every mesh in a space of every choice of formats."""

    candidates: Sequence[tuple[Expander, Mesh]]
    prover: Prover

    def bound(self, some: Sequence[int], below: Sequence[int] | None) -> tuple[Ints, Ints]:
        """Lower bounds of some candidates, and guesses at them. below: as `Expander.bounds` has
        it, of each of these."""
        lower, guess = np.empty((2, len(some)), dtype=np.int64)
        at = {i: place for place, i in enumerate(some)}
        for space, mine in by_space(some, self.candidates):
            places = [at[i] for i in mine]
            limits = None if below is None else [below[k] for k in places]
            found = space.bounds([self.candidates[i][1] for i in mine], limits)
            lower[places], guess[places] = found.lower_ps, found.guess_ps
        return lower, guess

    def expand(self, candidate: int, out: Outcome) -> tuple[Outcome, list[Unsettled]]:
        """A part of an outcome with what a candidate adds to it; how units lie is left out, which
        the mesh says."""
        unsettled: list[Unsettled] = []
        space, mesh = self.candidates[candidate]
        space.expand(mesh, out, unsettled)
        out.best = out.best and bare(out.best)
        out.misfit = out.misfit and bare(out.misfit)
        return out, list(map(bare, unsettled))

    def prove(self, asked: Sequence[Ask]) -> list[Told]:
        return list(map(self.prover.told, asked))


def bounds(pair: Pair[Side], below: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """Lower bounds of all candidates, and guesses at them, most of those that lie alike over tp on
    one side."""
    meshes = [mesh for _, mesh in pair.own.candidates]
    halves = [half for half in _halves(meshes) if half]
    found: list[tuple[Ints, Ints]] = pair.both("bound", [
        (half, None if below is None else [below[i] for i in half]) for half in halves
    ])  # fmt: skip
    lower, guess = np.empty((2, len(meshes)), dtype=np.int64)
    for half, (low, at) in zip(halves, found):
        lower[half], guess[half] = low, at
    return lower.tolist(), guess.tolist()


def _halves(meshes: Sequence[Mesh]) -> tuple[list[int], list[int]]:
    """Places of meshes: what takes the longest goes where there is less, and of the shortest, which
    is left to even that out, each chain by itself. Few are all on one."""
    if len(meshes) < APART:
        return [*range(len(meshes))], []
    alike: dict[tuple[int, bool], dict[tuple[str, int, int], list[int]]] = {}
    for i, m in enumerate(meshes):
        chains = alike.setdefault((m.tp, m.sequence_parallel), {})
        chains.setdefault((m.cp_kind, m.ep, m.etp), []).append(i)

    def work(chains: Iterable[Sequence[int]]) -> int:
        return sum(CHAIN + len(chain) for chain in chains)

    *longer, last = sorted(alike, key=lambda key: (-work(alike[key].values()), key))
    parts = [[*alike[key].values()] for key in longer]
    parts += [[chain] for _, chain in sorted(alike[last].items())]
    halves: tuple[list[int], list[int]] = [], []
    taken = [0, 0]
    for part in parts:
        to = taken.index(min(taken))
        taken[to] += work(part)
        for chain in part:
            halves[to].extend(chain)
    return sorted(halves[0]), sorted(halves[1])


def answers(pair: Pair[Side], asked: Sequence[Ask]) -> list[Told]:
    """What both sides say, each of what it is asked."""
    shares = [[ask for ask in asked if ask.side == side] for side in (0, 1)]
    told = [iter(found) for found in pair.both("prove", [(share,) for share in shares])]
    return [next(told[ask.side]) for ask in asked]
