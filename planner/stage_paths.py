"""The paths through schedules that cutting planes are made of, by shape: what one program of a
schedule needed the next of the same shape begins with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cost_models.schedule_paths import Paths, critical_path, rank_paths
from cost_models.stage_problem import StageProblem
from planner.stage_arcs import Array

Shape = tuple[str, int, int, int]  # schedule, pp, micro-batches, virtual stages

USEFUL = 200  # paths that a program begins with, at most


def shape_of(p: StageProblem) -> Shape:
    return p.schedule, p.pp, p.microbatches, p.virtual_stages


def longest(p: StageProblem, times: Array, latency: Array) -> tuple[int, Paths]:
    """The makespan in ps, and a path that takes it: times by [kind * stage], latency by boundary,
    both rounded to whole picoseconds."""
    forward, back, weight = np.rint(times).astype(np.int64).reshape(3, -1).tolist()
    return critical_path(
        p.schedule, forward, back, weight, np.rint(latency).astype(np.int64).tolist(),
        p.microbatches, p.pp, p.virtual_stages,
    )  # fmt: skip


@dataclass(slots=True)
class Known:
    """The paths known of one shape of schedule, a row each: those of one rank, and critical ones
    as they were met."""

    runs: Array  # [path, kind * stage]
    sends: Array
    useful: list[int] = field(default_factory=list)  # those that programs needed, the latest last

    @classmethod
    def of(cls, p: StageProblem) -> Known:
        some = rank_paths(p.schedule, p.pp, p.microbatches, p.virtual_stages)
        runs = some.runs.reshape(len(some.runs), -1).astype(float)
        return cls(runs, some.sends.astype(float))

    def add(self, more: Paths) -> None:
        self.runs = np.concatenate([self.runs, more.runs.reshape(1, -1)])
        self.sends = np.concatenate([self.sends, more.sends])

    def used(self, paths: set[int]) -> None:
        """A program needed these, and the next of the shape begins with them."""
        fresh = sorted(paths.difference(self.useful))
        self.useful = [*self.useful, *fresh][-USEFUL:]


@dataclass(slots=True)
class Shapes:
    """Paths by shape of schedule, shared by the programs of one search."""

    found: dict[Shape, Known] = field(default_factory=dict)

    def of(self, p: StageProblem) -> Known:
        key = shape_of(p)
        if key not in self.found:
            self.found[key] = Known.of(p)
        return self.found[key]
