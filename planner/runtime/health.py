"""What the experts of a model had to do: tokens of each, in each routed layer, in training.

A router that sends everything to few experts wastes the plan and the model. Counts are kept on
the device and summed over ranks only when somebody asks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from planner.runtime.meshes import Meshes

LOG = logging.getLogger("meshwright")
COLLAPSED = 0.5  # of the experts without a token, or of the tokens at one of more than two experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """One routed layer in the last step, all ranks together.

    counts: tokens of each expert. dropped: choices of an expert that no expert computed (0 where
    a model drops none). not_finite: NaN and inf among the router's scores. ep: ranks that share
    the experts under this plan.
    """

    layer: str
    counts: tuple[int, ...]
    dropped: int
    not_finite: int
    ep: int

    @property
    def std(self) -> float:
        """Standard deviation of the counts."""
        mean = sum(self.counts) / len(self.counts)
        return float((sum((n - mean) ** 2 for n in self.counts) / len(self.counts)) ** 0.5)

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts without a token."""
        return tuple(i for i, n in enumerate(self.counts) if not n)

    @property
    def imbalance(self) -> float:
        """Load of the busiest ep rank over the mean: what `--expert-imbalance` takes."""
        return self.imbalance_over(self.ep)

    def imbalance_over(self, ranks: int) -> float:
        """The same, were the experts shared by that many ranks."""
        total, each = sum(self.counts), len(self.counts) // ranks
        loads = [sum(self.counts[i * each : (i + 1) * each]) for i in range(ranks)]
        return max(loads) * ranks / total if total else 1.0

    @property
    def collapsed(self) -> bool:
        """Whether the router is broken: scores are not finite, or few experts do the work."""
        total, many = sum(self.counts), len(self.counts)
        return bool(
            self.not_finite
            or len(self.dead) > COLLAPSED * many
            or (many > 2 and total and max(self.counts) > COLLAPSED * total)
        )

    def __str__(self) -> str:
        mean = sum(self.counts) / len(self.counts)
        return (
            f"{self.layer}: {mean:.0f} +- {self.std:.0f} tokens an expert, "
            f"{len(self.dead)} dead, {self.dropped} dropped, {self.not_finite} not finite, "
            f"imbalance {self.imbalance:.2f}"
        )


OnLoad = Callable[[tuple[ExpertLoad, ...]], None]


class Layer:
    """One routed layer's sums on this rank since the last step began.

    sums: tokens that each expert computed, choices of each expert, bad scores: [2 * experts + 1].
    """

    def __init__(self, path: str, experts: int) -> None:
        self.path, self.experts = path, experts
        self.sums: Tensor | None = None
        self._ends: Tensor | None = None

    def routed(self, scores: Tensor, chosen: Tensor) -> None:
        """After a top-k over the experts. scores: [.., experts]; chosen: [.., k]."""
        if scores.shape[-1] != self.experts or _recomputing():
            return
        with torch.no_grad():
            sums, chosen = self._held(scores), chosen.flatten()
            sums[self.experts : -1].scatter_add_(0, chosen, torch.ones_like(chosen))
            sums[-1] += (scores.isnan() | (scores == float("inf"))).sum()

    def grouped(self, ends: Tensor) -> None:
        """At a grouped matmul; those of the same offsets count once. ends: [experts]."""
        if self._ends is ends or _recomputing():
            return
        self._ends = ends
        with torch.no_grad():
            self._held(ends)[: self.experts] += torch.diff(
                ends.long(), prepend=ends.new_zeros(1, dtype=torch.long)
            )

    def _held(self, like: Tensor) -> Tensor:
        if self.sums is None:
            self.sums = torch.zeros(2 * self.experts + 1, dtype=torch.long, device=like.device)
        return self.sums


def _recomputing() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


class Health:
    """The routed layers of this rank, and who wants to know. routed: whether the model has any."""

    def __init__(self, log_every_steps: int = 100) -> None:
        self.layers: list[Layer] = []
        self.routed = False
        self.log_every_steps = log_every_steps
        self._callbacks: list[OnLoad] = []
        self._steps = 0

    def on_load(self, callback: OnLoad) -> None:
        self._callbacks.append(callback)

    def before_step(self) -> None:
        for layer in self.layers:
            layer.sums = None

    def after_step(self, meshes: Meshes) -> None:
        """Tell callbacks; log every so many steps, and whenever a known router is broken."""
        self._steps += 1
        due = self._steps % self.log_every_steps == 0
        if not self.routed or not (due or self._callbacks):
            return
        loads = self.load(meshes)
        for callback in self._callbacks:
            callback(loads)
        if dist.get_rank():
            return
        for load in loads:
            if load.collapsed:
                LOG.warning("step %d: router collapsed: %s", self._steps, load)
            elif due:
                LOG.info("step %d: %s", self._steps, load)

    def load(self, meshes: Meshes) -> tuple[ExpertLoad, ...]:
        """Every routed layer of the model in the last step; all ranks call it."""
        mine = []
        for layer in self.layers:
            sums = layer.sums
            if sums is None:
                sums = torch.zeros(
                    2 * layer.experts + 1, dtype=torch.long, device=meshes.device_type
                )
            total = sums.clone()
            for mesh in (meshes.tp, meshes.cp, meshes.dp):
                if mesh.size() > 1:
                    dist.all_reduce(total, group=mesh.get_group())
            mine.append(_load(layer, total.tolist(), meshes.decisions.ep))
        stages: list[list[ExpertLoad]] = [mine]
        if meshes.pp.size() > 1:
            stages = [[] for _ in range(meshes.pp.size())]
            dist.all_gather_object(stages, mine, group=meshes.pp.get_group())
        return tuple(sorted((x for some in stages for x in some), key=_in_order))


def _load(layer: Layer, sums: list[int], ep: int) -> ExpertLoad:
    computed, chosen = sums[: layer.experts], sums[layer.experts : -1]
    return ExpertLoad(
        layer=layer.path,
        counts=tuple(computed if any(computed) else chosen),
        dropped=max(0, sum(chosen) - sum(computed)) if any(computed) else 0,
        not_finite=sums[-1],
        ep=ep,
    )


def _in_order(load: ExpertLoad) -> list[tuple[int, str]]:
    return [(int(x), "") if x.isdigit() else (-1, x) for x in load.layer.split(".")]
