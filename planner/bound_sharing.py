"""How many ranks may share a mesh's state, and what each then has of its parameters.

FSDP2 shares whole rows: where a parameter has fewer than there are ranks (a few experts a rank,
say, stacked) each rank that has any has a row, and what is gathered or reduced has one for each of
the others too. So bytes fall with the ranks up to there, and seconds grow.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cost_models.collectives import collective_s
from cost_models.decisions import Decisions
from cost_models.state import COMPUTE_BYTES, Held, Layout, Ranks, ranks_of
from cost_models.step import Costs
from planner.decisions import Pins
from planner.mesh import Mesh, outside, shard_sizes

Floats = NDArray[np.float64]
Number = TypeVar("Number", bound=np.generic)
NO_WAY_S = 1e9  # thirty years: of a mesh whose state cannot be shared as it is pinned


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sizes:
    """One mesh's local parameters. held, learnt: elements, [part, (dense, expert)]. rows: [(rows,
    elements a row), kind of parameter], with how many of these each part has: [(held, learnt),
    part, kind]; experts: which kinds they are. units: [unit, kind], how many a unit has that is
    moved at once; times: how many such units there are."""

    held: Floats
    learnt: Floats
    rows: Floats
    counts: Floats
    experts: NDArray[np.bool_]
    units: Floats
    times: Floats

    @property
    def same(self) -> tuple[bytes, ...]:
        """Equal of equal ones."""
        arrays = self.rows, self.counts, self.experts, self.units, self.times
        return tuple(one.tobytes() for one in arrays)

    def moved(self, ranks: int, expert: bool, by_rows: bool) -> Floats:
        """[unit]: elements that are gathered or reduced at once, of so many ranks: with what is
        added where rows are shared whole."""
        number, each = self.rows
        whole = np.ceil(number / ranks) * ranks if by_rows else number
        mine = self.experts == expert
        found: Floats = self.units[:, mine] @ (whole * each)[mine]
        return found

    def shared(self, dense: int, expert: int, by_rows: bool) -> Floats:
        """Elements of the fullest of so many ranks, [(held, learnt), part, (dense, expert)]."""
        ranks = np.where(self.experts, expert, dense)
        number, each = self.rows
        one = np.ceil(number / ranks) * each if by_rows else number * each / ranks
        all_of = self.counts * one
        split = all_of[..., ~self.experts].sum(axis=-1), all_of[..., self.experts].sum(axis=-1)
        return np.stack(split, axis=-1)


def sizes_of(
    units: Sequence[tuple[Iterable[Held], Collection[str]]], parts: Sequence[Counter[int]],
    layers: Collection[int],
) -> Sizes:
    """units: what a rank holds of each kind, and the names that are aliases there, left out. parts:
    how many of each kind lie in a part, the whole first. layers: kinds; one part more is what each
    of them has."""
    found: dict[tuple[int, int, bool], int] = {}
    numbers: list[Counter[tuple[int, bool]]] = []  # of each unit, by kind and whether it learns
    for some, aliases in units:
        mine: Counter[tuple[int, bool]] = Counter()
        for h in some:
            if h.name not in aliases:
                kind = found.setdefault((h.rows, h.row_elements, h.expert), len(found))
                mine[kind, not h.frozen] += 1
        numbers.append(mine)
    counts = np.zeros((2, len(parts) + 1, len(found)))
    for kind in range(len(found)):
        counts[0, -1, kind] = min(numbers[k][kind, True] + numbers[k][kind, False] for k in layers)
        counts[1, -1, kind] = min(numbers[k][kind, True] for k in layers)
    for at, part in enumerate(parts):
        for unit, times in part.items():
            for (kind, learns), number in numbers[unit].items():
                counts[: 1 + learns, at, kind] += times * number
    rows = np.array([(number, each) for number, each, _ in found], dtype=float).reshape(-1, 2).T
    units_of = np.zeros((len(parts[0]), len(found)))
    for at, unit in enumerate(parts[0]):
        for (kind, _), number in numbers[unit].items():
            units_of[at, kind] += number
    sizes = functools.partial(
        Sizes, rows=rows, counts=counts, experts=np.array([e for *_, e in found], dtype=bool),
        units=units_of, times=np.array([*parts[0].values()], dtype=float),
    )  # fmt: skip
    held, learnt = sizes(held=rows, learnt=rows).shared(1, 1, by_rows=False)
    return sizes(held=held, learnt=learnt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharings:
    """The ways to share a mesh's state. ranks: [sharing, (dense, expert)] that share it, the most
    first; outer: of each, how much of dp lies outside the pipeline; of_way: which of these each way
    has."""

    ranks: NDArray[np.int64]
    outer: NDArray[np.int64]
    of_way: NDArray[np.int64]

    def nth(self, n: int) -> int:
        """The nth of these, or the last."""
        return min(n, len(self.ranks) - 1)


def sharings(ways: Sequence[Decisions]) -> Sharings:
    """Where there is no way, as a pinned shard may leave none, one that nobody asks about."""
    rows = [
        (ranks_of(d, False).shard, ranks_of(d, True).shard, d.dp_outer) for d in ways
    ] or [(1, 1, 1)]  # fmt: skip
    ordered = sorted(set(rows), reverse=True)
    found = np.array(ordered)
    return Sharings(
        ranks=found[:, :2], outer=found[:, 2], of_way=np.array([ordered.index(row) for row in rows])
    )


def in_table(rows: Sequence[NDArray[Number]]) -> NDArray[Number]:
    """[row, place, ...] of rows of different lengths: where there are fewer, the last again."""
    most = max(len(row) for row in rows)
    return np.stack([row[np.minimum(np.arange(most), len(row) - 1)] for row in rows])


class Shared:
    """How meshes share their state, and what that moves at least."""

    def __init__(self, costs: Costs, pins: Pins) -> None:
        self.costs, self.pins = costs, pins
        self._traffic: dict[tuple[int | Sizes, ...], Floats] = {}
        self._once: dict[tuple[Sizes, Ranks, bool, int, bool], Floats] = {}
        self._firsts: dict[tuple[Sizes, bool], Sizes] = {}
        self._by_bytes: dict[tuple[bool, tuple[bytes, ...]], Sizes] = {}
        self._sharings: dict[tuple[int, ...], Sharings] = {}
        self._pieces: dict[tuple[Sizes, int, int, bool], Floats] = {}

    def of(self, m: Mesh, zero: int) -> Sharings:
        """How a mesh may share its state."""
        key = (m.pp, m.tp, m.cp, m.dp, m.ep, m.etp, zero)
        if key not in self._sharings:
            self._sharings[key] = sharings(self._shared(m, zero))
        return self._sharings[key]

    def pieces(self, sizes: Sizes, dense: int, expert: int, fsdp: bool) -> Floats:
        """`Sizes.shared`, once."""
        key = sizes, dense, expert, fsdp
        if key not in self._pieces:
            self._pieces[key] = sizes.shared(dense, expert, fsdp)
        return self._pieces[key]

    def moved_s(self, m: Mesh, sizes: Sizes, grad: int, zero: int, fsdp: bool) -> Floats:
        """Seconds of (an all-reduce, one gather, one reduction) of the whole chain, unit by unit,
        for each way to share the state, [way, 3]. Where a pinned shard leaves no way there is no
        plan, and no time that it could take."""
        key = (m.pp, m.tp, m.cp, m.dp, m.ep, m.etp, grad, min(zero, 1), fsdp, sizes)
        if key not in self._traffic:
            found = [self._each_s(sizes, d, grad, fsdp) for d in self._shared(m, zero)]
            self._traffic[key] = np.array(found) if found else np.full((1, 3), NO_WAY_S)
        return self._traffic[key]

    def _each_s(self, sizes: Sizes, d: Decisions, grad: int, fsdp: bool) -> Floats:
        found = np.zeros(3)
        for expert in (False, True):
            key = self._alike(sizes, expert), ranks_of(d, expert), expert, grad, fsdp
            if key not in self._once:
                self._once[key] = self._once_s(*key)
            found = found + self._once[key]
        return found

    def _alike(self, sizes: Sizes, expert: bool) -> Sizes:
        """The first whose dense, or expert, parameters are the same."""
        if (sizes, expert) not in self._firsts:
            mine = sizes.experts == expert
            arrays = sizes.rows[:, mine], sizes.units[:, mine], sizes.times
            key = expert, tuple(one.tobytes() for one in arrays)
            self._firsts[sizes, expert] = self._by_bytes.setdefault(key, sizes)
        return self._firsts[sizes, expert]

    def _shared(self, m: Mesh, zero: int) -> list[Decisions]:
        """A mesh with its state shared in every way that the search tries."""
        cluster = self.costs.cluster
        return [
            Decisions(
                pp=m.pp, dp=m.dp, cp=m.cp, tp=m.tp, ep=m.ep, etp=m.etp, zero=zero, shard=shard,
                dp_outer=outer,
            )
            for outer in outside(m, cluster, self.pins.dp_outer)
            for shard in shard_sizes(m, (cluster,), self.pins, zero, outer)
        ]  # fmt: skip

    def _once_s(
        self, sizes: Sizes, ranks: Ranks, expert: bool, grad: int, fsdp: bool
    ) -> Floats:
        elements = sizes.moved(ranks.shard, expert, fsdp)

        def total_s(kind: str, size_bytes: Floats, layout: Layout) -> float:
            each = collective_s(self.costs.network, kind, size_bytes, *layout)
            return float(sizes.times @ each)

        reduce = total_s("reduce_scatter", elements * grad, ranks.sharing)
        reduce += total_s("all_reduce", elements / ranks.shard * grad, ranks.replicating)
        compute = COMPUTE_BYTES[self.costs.workload.precision]
        return np.array([
            total_s("all_reduce", elements * grad, ranks.all),
            total_s("all_gather", elements * compute, ranks.sharing), reduce,
        ])  # fmt: skip
