"""What each of the two processes of a search does, with what it learned itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from planner.expanding import Expander
from planner.mesh import Mesh
from planner.outcome import Outcome, Unsettled, bare
from planner.proving import Ask, Prover, Told
from planner.twin import Pair

APART = 256  # meshes from which on two sides pay


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """candidates: every mesh in a space of every choice of formats."""

    candidates: Sequence[tuple[Expander, Mesh]]
    prover: Prover

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


def answers(pair: Pair[Side], asked: Sequence[Ask]) -> list[Told]:
    """What both sides say, asked in turn."""
    own, other = pair.both("prove", [(asked[::2],), (asked[1::2],)])
    return [told for both in itertools.zip_longest(own, other) for told in both if told]

