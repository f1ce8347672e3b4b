"""Stages where a rank runs several chunks (interleaved, ZB-V, DualPipeV): what a cut costs.

Memory couples a rank's chunks: which recompute is chosen for the rank as a whole.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cost_models.schedule import SPLIT_BACKWARD, global_stage, order
from cost_models.stage_problem import (
    Pair,
    StageProblem,
    starts_of,
    tail_ps,
)  # fmt: skip
from planner.stage_arcs import Windows

ALL_PAIRS = 512  # so many combinations of a rank's pairs are all looked at
Array = Any
# of one chunk: (time added, bytes kept, bytes used, bytes laid in rooms below, pair)
Choice = tuple[int, int, int, tuple[int, ...], Pair]
Key = tuple[int, tuple[tuple[int, ...], ...]]  # a rank, and the layers of its stages by class


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Recomputation of one rank's chunks: what each has, the time each adds, bytes at the peak."""

    rows: tuple[Choice, ...]
    extra_ps: tuple[int, ...]
    bytes: int

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return tuple(row[4] for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What each rank does before its first backward and up to its last forward.

    stage: [rank, chunk]. Of the first backward: its stage, and forwards done before, by chunk.
    Of the last forward: its stage; forwards, input and weight gradients up to it, by chunk.
    """

    stage: Array
    first_stage: Array
    first_done: Array
    last_stage: Array
    last_done: Array


@functools.lru_cache(maxsize=256)
def profile(schedule: str, pp: int, m: int, v: int) -> Profile:
    firsts, lasts, first_done, last_done = [], [], [], []
    for rank in range(pp):
        ops = order(schedule, pp, m, v, rank)
        first = next(i for i, (op, _, _) in enumerate(ops) if op in ("B", "BW"))
        last = max(i for i, (op, _, _) in enumerate(ops) if op == "F")
        firsts.append(global_stage(schedule, pp, rank, ops[first][2]))
        lasts.append(global_stage(schedule, pp, rank, ops[last][2]))
        first_done.append([sum(c == k for _, _, k in ops[:first]) for c in range(v)])
        done = np.zeros((3, v), dtype=np.int64)
        for op, _, chunk in ops[: last + 1]:
            for kind, words in enumerate((("F",), ("B", "BW"), ("W", "BW"))):
                done[kind, chunk] += op in words
        last_done.append(done)
    return Profile(
        stage=np.array([[global_stage(schedule, pp, r, c) for c in range(v)] for r in range(pp)]),
        first_stage=np.array(firsts), first_done=np.array(first_done),
        last_stage=np.array(lasts), last_done=np.array(last_done),
    )  # fmt: skip


class Chunks:
    """Costs of cuts: times by stage, the recomputation a rank needs, and a bound of each."""

    def __init__(self, p: StageProblem) -> None:
        self.p, self.windows = p, Windows(p)
        self.profile = profile(p.schedule, p.pp, p.microbatches, p.virtual_stages)
        kinds = (p.forward_ps, p.input_grad_ps, p.weight_grad_ps, p.state_bytes)
        self.sums = np.concatenate(
            (np.zeros((4, 1), dtype=np.int64), np.cumsum(np.array(kinds), axis=1)), axis=1
        )
        tails = np.subtract(p.tail_comm_ps, p.tail_hide_ps), p.tail_own_ps
        self.tails = np.concatenate(
            (np.zeros((2, 1), dtype=np.int64), np.cumsum(np.array(tails), axis=1)), axis=1
        )
        self.split = p.schedule in SPLIT_BACKWARD
        self.of_rank = [p.stages_of(rank) for rank in range(p.pp)]
        crossing = [p.rank_of(k) != p.rank_of(k + 1) for k in range(p.count - 1)]
        self.cross = np.concatenate(([0], np.cumsum(crossing))) * p.p2p_ps
        more = [p.extras(k) for k in range(p.count)]
        self.beside = [
            (sum(e.activation_bytes for e in m), sum(e.state_bytes for e in m),
             max((e.working_bytes for e in m), default=0),
             max((e.gathered_bytes for e in m), default=0))
            for m in more
        ]  # by stage: (kept, state, working, gathered) bytes beside its layers
        self.tails_beside = np.array([
            [sum(e.tail_comm_ps - e.tail_hide_ps for e in m) for m in more],
            [sum(e.tail_own_ps for e in m) for m in more],
        ])  # fmt: skip
        self.moments = [np.array(p.in_flight(rank)).T for rank in range(p.pp)]
        self._kept: dict[int, list[Choice]] = {}
        self.exact = True  # whether every combination of pairs asked for was looked at
        self._pairs: dict[Key, tuple[Pairs, ...]] = {}
        self._least: dict[Key, Pairs] = {}
        rows = list(zip(
            *p.recompute_ps, *p.activation_bytes, *p.working_bytes, p.state_bytes, p.gathered_bytes,
            *(row for room in p.rooms for row in (room.state_bytes, *room.aside_bytes)),
        ))  # fmt: skip
        names: dict[tuple[int, ...], int] = {}
        self._class = tuple(names.setdefault(row, len(names)) for row in rows)
        self._names: dict[tuple[int, int], tuple[int, ...]] = {}

    def times(self, stages: Sequence[int] | Array) -> Array:
        """[forward, backward, weight; ..., stage], without recomputation, of one cut or of many."""
        p, ends = self.p, _ends(stages)
        t = self.sums[:3, ends[..., 1:]] - self.sums[:3, ends[..., :-1]]
        t[0] += p.rank_glue_forward_ps
        t[1] += p.rank_glue_backward_ps
        for k, e in ((0, p.first), (p.count - 1, p.last)):
            t[0, ..., k] += e.forward_ps
            t[1, ..., k] += e.input_grad_ps
            t[2, ..., k] += e.weight_grad_ps
        return t

    def bound(self, stages: Sequence[int], extra: Sequence[int]) -> int:
        """The step of a cut is at least this, `extra` being the time added to each stage."""
        return int(self.bounds(np.array(stages), np.array(extra)))

    def bounds(self, stages: Array, extra: Array) -> Array:
        """`bound` of cuts in rows. extra: of each, or 0."""
        f, b, w = self.times(stages)
        b = b + extra
        q, m, cross = self.profile, self.p.microbatches, self.cross
        back = b if self.split else b + w  # before a gradient is passed on
        before, behind = _running(f), _running(back)
        load = m * (f + b + w)[..., q.stage].sum(axis=-1)
        rank = np.arange(self.p.pp)
        head = before[..., rank] + cross[rank]
        home = np.zeros_like(head) if self.split else behind[..., rank] + cross[rank]
        whole = before[..., -1:] + 2 * cross[-1]
        returned = whole - cross[q.first_stage] + behind[..., -1:] - behind[..., q.first_stage + 1]
        forwards = (q.first_done * f[..., q.stage]).sum(axis=-1)
        after_first = returned + load - forwards + home
        done = sum((q.last_done[:, i] * t[..., q.stage]).sum(axis=-1)
                   for i, t in enumerate((f, b, w)))  # fmt: skip
        to_last = head + done + whole - before[..., q.last_stage + 1] - cross[q.last_stage]
        to_last = to_last + behind[..., -1:]
        once = whole[..., 0] + behind[..., -1]
        found = np.maximum(np.maximum(head + load + home, after_first), to_last).max(axis=-1)
        return np.maximum(once, found) + self.tails_of(stages)

    def tails_of(self, stages: Array) -> Array:
        """`tail_ps` of cuts in rows, of all ranks at once where they are alike."""
        if self.p.ranks:
            rows = stages.reshape(-1, self.p.count).tolist()
            tails = np.array([tail_ps(self.p, row) for row in rows], dtype=np.int64)
            return tails.reshape(stages.shape[:-1])
        ends = _ends(stages)
        each = self.tails[:, ends[..., 1:]] - self.tails[:, ends[..., :-1]]
        for place, row in enumerate(self.tails_beside):
            each[place] += row
        comm, own = each[..., self.profile.stage].sum(axis=-1)
        return (np.maximum(comm, 0) + own).max(axis=-1)

    def choices(self, stages: Sequence[int]) -> list[tuple[Pairs, ...]]:
        """By rank the recomputations that fit and are not worse in every chunk, up to one that has
        none."""
        starts, found = starts_of(stages), []
        for rank in range(self.p.pp):
            key, spans = self._key(rank, stages, starts)
            if key not in self._pairs:
                self._pairs[key] = self._fitting(rank, spans)
            found.append(self._pairs[key])
            if not found[-1]:
                break
        return found

    def _key(
        self, rank: int, stages: Sequence[int], starts: Sequence[int]
    ) -> tuple[Key, tuple[tuple[int, int], ...]]:
        """What memory depends on of a rank's stages, and where these lie: their layers by class,
        so that stages of like layers are weighed once wherever they begin."""
        spans = tuple([(starts[k], stages[k]) for k in self.of_rank[rank]])
        if self.p.ranks:  # what is alike in the least of all ranks may not be on one of them
            return (rank, spans), spans
        names = self._names
        for span in spans:
            if span not in names:
                names[span] = self._class[span[0] : span[0] + span[1]]
        return (rank, tuple([names[span] for span in spans])), spans

    def _fitting(self, rank: int, spans: tuple[tuple[int, int], ...]) -> tuple[Pairs, ...]:
        lists = self._lists(rank, spans)
        if math.prod(map(len, lists)) > ALL_PAIRS:
            self.exact = False
            chosen = self._filled(rank, spans, lists)
            if not self._leaves_room(rank, spans, chosen.rows):
                lists = [[row for row in rows if not any(row[3])] for rows in lists]
                if not all(lists):
                    return ()
                chosen = self._filled(rank, spans, lists)
            small = chosen.bytes <= self.p.capacity_bytes
            return (chosen,) if small and self._leaves_room(rank, spans, chosen.rows) else ()
        rows = list(itertools.product(*lists))
        table = np.array([[row[:3] for row in one] for one in rows], dtype=np.int64)
        table = table.transpose(2, 0, 1)
        memory = self._bytes(rank, spans, table[1], table[2])
        fits = np.nonzero(memory <= self.p.capacity_bytes)[0]
        if self.p.rooms:
            room = [self._leaves_room(rank, spans, rows[i]) for i in fits.tolist()]
            fits = fits[np.array(room, dtype=bool)]
        fits = fits[np.argsort(table[0][fits].sum(axis=1), kind="stable")]
        kept: list[Pairs] = []
        while len(fits):
            best, extra = int(fits[0]), table[0][fits[0]]
            kept.append(_chosen(rows[best], int(memory[best])))
            fits = fits[np.any(table[0][fits] < extra, axis=1)]
        return tuple(kept)

    def _lists(
        self, rank: int, spans: tuple[tuple[int, int], ...]
    ) -> list[list[Choice]]:
        """Per chunk: (time added, bytes kept, bytes used, pair), the dominated left out."""
        lists = []
        for k, (start, count) in zip(self.of_rank[rank], spans):
            o = self.windows.options(k, start, count)
            if id(o) not in self._kept:
                kept: list[Choice] = []
                columns = (o.extra_ps.tolist(), o.act_bytes.tolist(), o.work_bytes.tolist(),
                           map(tuple, o.aside_bytes.T.tolist()))  # fmt: skip
                for row in sorted(zip(*columns, o.pairs)):
                    if not any(a[1] <= row[1] and a[2] <= row[2]
                               and all(map(operator.le, a[3], row[3])) for a in kept):  # fmt: skip
                        kept.append(row)
                self._kept[id(o)] = kept
            lists.append(self._kept[id(o)])
        return lists

    def _bytes(
        self, rank: int, spans: tuple[tuple[int, int], ...], act: Array, work: Array
    ) -> Array:
        """Bytes at the peak, by row of act and work: [row, chunk], what layers keep and use."""
        p, state, working, gathered = self.p, self.p.constant_bytes, 0, 0
        beside = []
        for k, (start, count) in zip(self.of_rank[rank], spans):
            kept, fixed, used, copies = self.beside[k]
            beside.append(kept)
            state += int(self.sums[3, start + count] - self.sums[3, start]) + fixed
            working = max(working, used)
            gathered = max(gathered, copies, *p.gathered_bytes[start : start + count])
        stash = ((act + np.array(beside)) @ self.moments[rank]).max(axis=1)
        return stash + np.maximum(work.max(axis=1), working) + state + 2 * gathered

    def _leaves_room(
        self, rank: int, spans: tuple[tuple[int, int], ...], rows: Sequence[Choice]
    ) -> bool:
        """Whether what a rank lays below leaves every room there enough."""
        for place, room in enumerate(self.p.rooms):
            laid = 0
            for k, (start, count) in zip(self.of_rank[rank], spans):
                laid += sum(room.state_bytes[start : start + count])
                laid += room.beside_bytes(k, self.p.count)
            aside = np.array([row[3][place] for row in rows])
            if laid + int((aside @ self.moments[rank]).max()) > room.of_rank(rank):
                return False
        return True

    def _weighed(
        self, rank: int, spans: tuple[tuple[int, int], ...],
        rows: Sequence[Choice],
    ) -> Pairs:  # fmt: skip
        table = np.array([row[:3] for row in rows], dtype=np.int64)
        return _chosen(rows, int(self._bytes(rank, spans, table[None, :, 1], table[None, :, 2])[0]))

    def _filled(
        self, rank: int, spans: tuple[tuple[int, int], ...],
        lists: list[list[Choice]],
    ) -> Pairs:  # fmt: skip
        """Recompute where a second saves the most bytes, until the rank fits or nothing is left.

        Along each chunk's lower hull of time added by bytes kept, all chunks' steps merged.
        """
        flight = [max(counts) for counts in zip(*self.p.in_flight(rank))]
        steps = []
        for chunk, options in enumerate(lists):
            hull = _hull(options)
            for place, (a, b) in enumerate(itertools.pairwise(hull)):
                slope = (b[0] - a[0]) / ((a[1] - b[1]) * flight[chunk])
                steps.append((slope, chunk, place, b))
        steps.sort(key=lambda step: step[:3])
        low, high = 0, len(steps)
        rows = [options[0] for options in lists]

        def after(count: int) -> Pairs:
            then = list(rows)
            for _, chunk, _, row in steps[:count]:
                then[chunk] = row
            return self._weighed(rank, spans, then)

        while low < high:
            middle = (low + high) // 2
            if after(middle).bytes <= self.p.capacity_bytes:
                high = middle
            else:
                low = middle + 1
        filled, chunk = after(low), steps[low - 1][1] if low else -1
        then = list(rows)
        for _, at, _, row in steps[:low]:
            then[at] = row
        for row in lists[chunk] if low else ():
            one = self._weighed(rank, spans, [*then[:chunk], row, *then[chunk + 1 :]])
            if row[0] < then[chunk][0] and one.bytes <= self.p.capacity_bytes:
                return one
        return filled

    def least(self, rank: int, stages: Sequence[int]) -> Pairs:
        """Where nothing fits: the pairs that need the fewest bytes, or of many keep the least."""
        return self._fewest(rank, stages, starts_of(stages))

    def least_bytes(self, stages: Sequence[int]) -> list[int]:
        """The fewest bytes that each rank needs."""
        starts = starts_of(stages)
        return [self._fewest(rank, stages, starts).bytes for rank in range(self.p.pp)]

    def _fewest(self, rank: int, stages: Sequence[int], starts: Sequence[int]) -> Pairs:
        key, spans = self._key(rank, stages, starts)
        if key not in self._least:
            self._least[key] = self._weigh_least(rank, spans)
        return self._least[key]

    def _weigh_least(self, rank: int, spans: tuple[tuple[int, int], ...]) -> Pairs:
        lists = self._lists(rank, spans)
        if math.prod(map(len, lists)) > ALL_PAIRS:
            lists = [[min(rows, key=lambda row: (row[1], row[2]))] for rows in lists]
        rows = list(itertools.product(*lists))
        table = np.array([[row[1:3] for row in one] for one in rows], dtype=np.int64)
        memory = self._bytes(rank, spans, table[..., 0], table[..., 1])
        best = int(memory.argmin())
        return _chosen(rows[best], int(memory[best]))

    def spread(self, chosen: Sequence[Pairs]) -> tuple[tuple[Pair, ...], tuple[int, ...]]:
        """Pairs and times added by global stage, from those by rank."""
        at = {k: row for one, mine in zip(chosen, self.of_rank) for k, row in zip(mine, one.rows)}
        rows = [at[k] for k in range(self.p.count)]
        return tuple([row[4] for row in rows]), tuple([row[0] for row in rows])


def _running(each: Array) -> Array:
    """Of [..., n] numbers the sums of the first 0, 1, .. n: [..., n + 1]."""
    found = np.zeros((*each.shape[:-1], each.shape[-1] + 1), dtype=np.int64)
    np.cumsum(each, axis=-1, out=found[..., 1:])
    return found


def _ends(stages: Sequence[int] | Array) -> Array:
    """Where stages begin and the last ends, in layers."""
    return _running(np.asarray(stages))


def _chosen(rows: Sequence[Choice], needed: int) -> Pairs:
    """rows: by chunk."""
    return Pairs(rows=tuple(rows), extra_ps=tuple(r[0] for r in rows), bytes=needed)


def _hull(options: list[Choice]) -> list[Choice]:
    """Options on the lower hull of time added by bytes kept, the least time first."""
    hull: list[Choice] = []
    for row in options:
        if hull and row[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and (row[0] - hull[-2][0]) * (hull[-2][1] - hull[-1][1]) <= (
            hull[-1][0] - hull[-2][0]
        ) * (hull[-2][1] - row[1]):
            hull.pop()
        hull.append(row)
    return hull
