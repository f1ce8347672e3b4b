"""Which meshes of several kinds of GPUs fit none of their memory, many at once.

The bounds of meshes on one kind say it (`bounds.NEVER_PS`), and nothing else of theirs is used: its
kernels and links are not the others'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.formats import Formats
from cost_models.step import Assignments, Costs
from planner.bound_state import Floats, States, Way
from planner.bounds import NEVER_PS, mesh_bounds_ps
from planner.decisions import Pins
from planner.mesh import Mesh
from planner.offloads import offloads


class FleetStates(States):
    """Those of several kinds of GPUs: no more than all optimizers lie below. zeros: the stages of
    ZeRO that are looked at."""

    by_layer = False
    moves = False

    def __init__(self, costs: Costs, pins: Pins, zeros: Collection[int]) -> None:
        super().__init__(costs, pins)
        self.zeros = zeros

    def ways(self, pipeline: bool, every_tier: bool = False) -> tuple[Way, ...]:
        places = offloads(self.pins, self.costs.cluster, self.costs.cluster)
        return tuple(
            way for way in super().ways(pipeline)
            if way.offload in places and way.zero in self.zeros
        )

    def room_bytes(self, meshes: Sequence[Mesh], name: str) -> tuple[Floats, Floats]:
        """No limit: hosts are each part's own, and another's may have more."""
        return np.full(len(meshes), np.inf), np.full(len(meshes), np.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fits:
    """What fits is asked under: how units lie, by (tp, sequence parallel), and what is searched."""

    assign: Callable[[int, bool], Assignments]
    pins: Pins
    formats: Formats
    schedules: Sequence[str] = ("1f1b",)

    def on(
        self, costs: Costs, candidates: Sequence[Mesh], zeros: Collection[int] = (0, 1, 2, 3)
    ) -> NDArray[np.bool_]:
        """Of each mesh, whether it may fit if all its ranks have the memory of these costs'."""
        every = _of_all(costs, max(m.pp * m.dp * m.cp * m.tp for m in candidates))
        found = mesh_bounds_ps(
            every, candidates, self.assign, most_virtual=1, schedules=self.schedules,
            pins=self.pins, formats=self.formats, states=FleetStates(every, self.pins, zeros),
        )  # fmt: skip
        fits: NDArray[np.bool_] = found.lower_ps < NEVER_PS
        return fits


def _of_all(costs: Costs, gpus: int) -> Costs:
    """Costs of so many of a part's GPUs at least, in whole domains."""
    cluster = costs.cluster
    whole = math.lcm(cluster.count, cluster.domain_size)
    return Costs(
        graph=costs.graph, cluster=replace(cluster, count=whole * -(-gpus // whole)),
        workload=costs.workload, points=costs.points, compiled=costs.compiled,
    )  # fmt: skip
