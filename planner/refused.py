"""What an alternative may not have: its words, and the searches that go without it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cost_models.decisions import Decisions, Keep, Workload
from cost_models.formats import Formats
from cost_models.mixed import MixedCosts
from cost_models.schedule import SPLIT_BACKWARD
from cost_models.shares import SharedCosts
from cost_models.stage_problem import PairPin, StageProblem
from cost_models.step import Step
from ir.errors import UsageError
from ir.graph import Graph
from planner.decisions import ALL_LAYERS, Pins, Recompute, parse_pins, read_offload
from planner.fleet_space import FleetSearcher
from planner.formats import settled
from planner.keep_checks import pinned_keep
from planner.mesh import Mesh
from planner.search import Searcher
from planner.share_space import ShareSearcher
from planner.share_splits import Division

Refused = tuple[tuple[str, Any], ...]  # (key, value): what the alternative may not have
NOT_REFUSED = ("stages", "weights", "place", "kv")
PIPELINED = ("schedule", "virtual_stages")


@dataclass(kw_only=True)
class Without(Searcher):
    """A search of what has none of the refused values."""

    refused: Refused = ()

    def runs(self, mesh: Mesh | Decisions) -> bool:
        """Also whether the mesh has no refused axis."""
        away = any(self._has(mesh, key, value) for key, value in self.refused)
        return not away and super().runs(mesh)

    def _has(self, mesh: Mesh | Decisions, key: str, value: object) -> bool:
        """Whether a mesh has a value; how cp is shared matters under cp alone, and a tp is that of
        any part."""
        if key == "tp" and value in dict(mesh.tp_by_part).values():
            return True
        said = mesh.cp > 1 if key == "cp_kind" else hasattr(mesh, key)
        return said and bool(getattr(mesh, key) == value)

    def format_ways(self) -> tuple[Formats, ...]:
        """Also without the refused formats."""
        costs = self.costs
        away = [
            settled(value, costs.graph, costs.workload)
            for key, value in self.refused if key == "formats"
        ]  # fmt: skip
        return tuple(way for way in super().format_ways()
                     if not any(_includes(way, some) for some in away))  # fmt: skip

    def variants(self, mesh: Mesh) -> Iterator[Decisions]:
        """Also without the refused ways to hold state: what a tier is refused to lies on others."""
        keys = ("zero", "shard", "reshard", "dp_outer")
        away = [(key, value) for key, value in self.refused if key in keys]
        for d in super().variants(mesh):
            if not any(getattr(d, key) == value for key, value in away):
                yield from self._allowed([d])

    def off_host(self, d: Decisions) -> Iterator[Decisions]:
        """Also not on a refused tier."""
        return self._allowed(super().off_host(d))

    def _allowed(self, rows: Iterable[Decisions]) -> Iterator[Decisions]:
        """Of these, what may lie as it does; of others what still does, less of it on the host."""
        for d in rows:
            if self._lies_below(d):
                yield from self.off_host(d)
            else:
                yield d

    def by_count(self, d: Decisions) -> Iterator[Decisions]:
        """Also not where activations are refused a place below beside what else lies there, or a
        kind of recomputation is: the program by count has another kind in its place."""
        if not self._levels:
            yield from (made for made in super().by_count(d) if not self._lies_below(made))

    def schedules(self, d: Decisions) -> Iterator[Decisions]:
        """Also without the refused schedules, which are a formality without a pipeline; one that
        cannot recompute goes where a layer that does not is refused."""
        away = [(key, value) for key, value in self.refused if key in PIPELINED and d.pp > 1]
        for made in super().schedules(d):
            still = made.schedule in SPLIT_BACKWARD or "activations" in dict(made.offload)
            if still and "none" in self._levels:
                continue
            if not any(getattr(made, key) == value for key, value in away):
                yield made

    def recomputed(self, d: Decisions) -> tuple[tuple[PairPin, ...] | None, tuple[str, ...]]:
        """Also without the refused levels of recomputation."""
        fixed, levels = super().recomputed(d)
        left = tuple(level for level in levels if level not in self._levels)
        if d.keep in self._not_kept:
            left = tuple(level for level in left if level != "selective")
        return fixed, left

    def kept_otherwise(
        self, step: Step, d: Decisions, problem: StageProblem
    ) -> Iterator[tuple[Decisions, StageProblem]]:
        """Also without all layers computed again, where some may not be."""
        if not ("activations" in d.tiers and "full" in self._levels):
            yield from super().kept_otherwise(step, d, problem)

    def keeps(self, tp: int, split: bool) -> tuple[Keep, ...]:
        """Also without what may not be kept."""
        return tuple(k for k in super().keeps(tp, split) if k not in self._not_kept)

    def _lies_below(self, d: Decisions) -> bool:
        """Whether refused things lie below the device, alone or with others."""
        return any(_includes(_tiers(d.offload), _tiers(value))
                   for key, value in self.refused if key == "offload")  # fmt: skip

    @property
    def _not_kept(self) -> tuple[Keep, ...]:
        return tuple(
            pinned_keep(value, self.costs.graph) for key, value in self.refused if key == "keep"
        )

    @property
    def _levels(self) -> tuple[str, ...]:
        return tuple(name for key, value in self.refused if key == "recompute" for name in value)


@dataclass(kw_only=True)
class FleetWithout(Without, FleetSearcher):
    """The same of pipelines over several kinds of GPUs."""

    costs: MixedCosts


@dataclass(kw_only=True)
class ShareWithout(Without, ShareSearcher):
    """The same of replicas on several kinds of GPUs. Of a mesh, `microbatches` is a mean: what is
    refused is that the data ranks that run the most have so many."""

    costs: SharedCosts

    def _has(self, mesh: Mesh | Decisions, key: str, value: object) -> bool:
        return key != "microbatches" and super()._has(mesh, key, value)

    def division(
        self, mesh: Mesh, paces: Sequence[Callable[[int], int]], floors: Sequence[int]
    ) -> Division:
        """Also without the refused numbers of micro-batches."""
        away = {value for key, value in self.refused if key == "microbatches"}
        made = super().division(mesh, paces, floors)
        return replace(made, allowed=lambda some: made.allowed(some) and max(some) not in away)


def _includes(has: Collection[tuple[str, str]], some: Collection[tuple[str, str]]) -> bool:
    """Whether all pairs are there; none of them is what has none."""
    return set(some) <= set(has) if some else not has


def _tiers(offload: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple(Decisions(offload=offload).tiers.items())


def parse_refused(texts: Sequence[str]) -> Refused:
    """Read `--not k=v`. Recomputation is refused by its kinds: full:12 refuses full.

    Raises UsageError for a decision that cannot be refused, or refused in every way.
    """
    found: list[tuple[str, Any]] = []
    for text in texts:
        key = text.partition("=")[0]
        if key in NOT_REFUSED or text.startswith("place:"):
            raise UsageError(f"--not {text}: {key.partition(':')[0]} cannot be refused",
                             why="its alternatives are too many to name one by one",
                             hints=("--not tp=8, --not recompute=full",))  # fmt: skip
        try:
            pins = parse_pins([text])
        except UsageError as fault:
            what, why = (t.replace("--fix", "--not") for t in (fault.what, fault.why))
            hints = tuple(h.replace("--fix", "--not") for h in fault.hints)
            raise UsageError(what, why=why, hints=hints) from None
        found += [(k, _refused_value(k, v, text)) for k, v in pins.items()]
    levels = {name for key, value in found if key == "recompute" for name in value}
    if len(levels) == 3:
        raise UsageError("--not recompute: every kind is refused")
    return tuple(dict.fromkeys(found))


def _refused_value(key: str, pinned: Any, text: str) -> Any:
    """What is refused, where as a pin it says more: of an offload what is written and no more."""
    if key == "offload":
        return read_offload(text, text.partition("=")[2])
    return _kinds(pinned) if key == "recompute" else pinned


def require_held(refused: Refused, d: Decisions, graph: Graph, workload: Workload) -> None:
    """Raise UsageError where a plan has nothing of what is refused: it would be its own
    alternative. Of several values of a key, one it has is enough."""

    if refused and not any(_held(key, value, d, graph, workload) for key, value in refused):
        said = refused_words(refused)
        keys = dict.fromkeys(key for key, _ in refused)
        idle = [f"{key} says nothing of a plan without {what}"
                for key in keys if (what := _formality(key, d))]  # fmt: skip
        own = tuple(f"--not {_own(key, d)}" for key in keys if not _formality(key, d))
        raise UsageError(f"the plan has no {said}",
                         why="; ".join(idle) or "without it the plan would be as it is",
                         hints=(*own, "plan why: what it has, and the best plan without"))


def lacks(d: Decisions, refused: Refused, graph: Graph, workload: Workload) -> bool:
    """Whether a plan has none of what is refused, as the searches without it mean that."""

    def away(key: str, value: Any) -> bool:
        if key in ("shares", "tp_by_part") and value:  # refused by kind
            return not getattr(d, key)
        return not _held(key, value, d, graph, workload)

    return all(away(key, value) for key, value in refused)


def _formality(key: str, d: Decisions) -> str:
    """What a plan is without, if a decision of it is a formality for that; else nothing."""
    if key in PIPELINED and d.pp == 1:
        return "a pipeline"
    if key == "cp_kind" and d.cp == 1:
        return "cp"
    if key == "keep" and not any(some for _, some in _recomputed(d)):
        return "layers recomputed in part"
    return ""


def _recomputed(d: Decisions) -> list[tuple[int, int]]:
    """(full, selective) of each stage, on each part of the hardware."""
    return [*d.recompute, *(row for share in d.shares for row in share.recompute)]


def _held(key: str, value: Any, d: Decisions, graph: Graph, workload: Workload) -> bool:
    """Whether a plan has a value, and not as a formality; of kinds of recomputation, any."""
    if _formality(key, d):
        return False
    if key == "recompute":
        rows = _recomputed(d)
        full, selective = (any(n) for n in zip(*(rows or [(0, 0)])))
        there = {"full": full, "selective": selective}
        less = sum(map(sum, rows)) < sum(d.stages) * max(1, len(d.shares))
        return any(there.get(kind, less) for kind in value)
    if key == "tp":
        return value == d.tp or value in dict(d.tp_by_part).values()
    if key == "keep":
        return pinned_keep(value, graph) == d.keep
    if key == "formats":
        return _includes(settled(d.formats, graph, workload), settled(value, graph, workload))
    if key == "shares":
        return bool(value == tuple((s.part, s.microbatches) for s in d.shares))
    if key == "offload":
        return _includes(_tiers(d.offload), _tiers(value))
    return bool(getattr(d, key) == value)


def _own(key: str, d: Decisions) -> str:
    """What a plan has of a decision, as `--not` takes it."""
    value = getattr(d, key)
    if key == "recompute":
        rows = _recomputed(d)
        full, selective = (tuple(n) for n in zip(*(rows or [(0, 0)])))
        return refused_words(((key, _kinds(Recompute(full=full, selective=selective))),))
    if key == "shares":
        value = tuple((share.part, share.microbatches) for share in value)
    return replace(Pins(), **{key: value}).said(key)


def _kinds(value: Recompute) -> tuple[str, ...]:
    kinds = [k for k, n in (("full", value.full), ("selective", value.selective)) if any(n)]
    return tuple(kinds) or ("none",)


def refused_words(refused: Refused) -> str:
    """As the user wrote them."""
    words = []
    for key, value in refused:
        if key == "recompute":
            kinds = {k: (ALL_LAYERS,) for k in value if k != "none"}
            value = Recompute(**kinds)
        words.append(replace(Pins(), **{key: value}).said(key))
    return ", ".join(words)
