"""Nothing fits: which constraints bind, a least set of them by name, and hints solved again.

The pins that bind are found by deletion: one after the other is left out, and stays out where
nothing fits without it either; what is left is minimal: without any one of them something fits.
A limit (GPUs, one domain for tp) binds where a plan fits beyond it. Every answer is a search of
small effort, counted, not timed: the same question has the same answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cost_models.decisions import Decisions, Workload
from cost_models.estimate import estimate_step
from cost_models.fleet import Fleet, Hardware, parts_of
from cost_models.hardware import Cluster
from cost_models.ledger import Estimate, RankLedger
from cost_models.units import format_bytes, format_seconds
from ir.errors import InfeasibleError, PlanError
from planner.asking import Answer, Asking
from planner.decisions import Pins, summarise_recompute
from planner.mesh import divisors, splits_something, widest_tp
from planner.names import many
from planner.outcome import Misfit, Outcome
from planner.search import Searcher
from planner.share_words import share_words

if TYPE_CHECKING:  # it plans a part as `tracing` does, which asks here
    from planner.fleet_asking import FleetAsking

Memory = tuple[int | None, int]
EFFORT = 100  # of one question: a hint is a plan that fits, not the best one
MORE_EFFORT = 800  # where that found none, and did not see all that may fit
LEGAL_TIMES = 10  # where no plan is legal, a mesh is seen through at once
MOST_TIMES = 16  # so many times the GPUs are asked for at most
MORE_ROOM = (1.25, 1.5, 2, 4, 8, 64)  # times what a tier has; the last is as good as no limit
MOST_DOMAINS = 4  # that tp is asked to cross
MOST_NEAR = 50  # batches on either side, of each number of data ranks, that are asked about
LEAST_SEQ_LEN = 1024  # tokens; no shorter sequence is hinted at
OFFLOAD = (("optimizer", "cpu"), ("params", "cpu"), ("activations", "cpu"))  # not searched: of all


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """One that may be relaxed: a pin by its key, or a placement by its pattern."""

    key: str
    pattern: str = ""

    def said(self, pins: Pins) -> str:
        """As the user writes it."""
        if self.pattern:
            return f"place:{self.pattern}={dict(pins.place)[self.pattern]}"
        return pins.said(self.key)

    def without(self, pins: Pins) -> Pins:
        """The pins without it."""
        if self.pattern:
            return replace(pins, place=tuple(p for p in pins.place if p[0] != self.pattern))
        return replace(pins, **{self.key: None})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """What binds. pins: a minimal set that leaves nothing that fits; limits: words for others.

    proved: whether a search saw that nothing fits under them.
    """

    pins: tuple[Constraint, ...]
    limits: tuple[str, ...]
    hints: tuple[str, ...]
    proved: bool


def infeasible(searcher: Searcher, out: Outcome, memory: Memory = (None, 0)) -> InfeasibleError:
    """Why no plan fits hardware of one kind, by name, and hints that were solved again. memory:
    as in `explained`."""
    costs, (limit, has) = searcher.costs, memory
    worst = _fullest(searcher, out.misfit) if out.misfit else None
    nearest = f"nearest needs {_holds(worst)}" if worst else ""
    least = math.ceil(worst.peak_bytes / 1e8) / 10 if worst else 0.0
    known = limit is not None and worst is not None and not out.full and least * 1e9 <= has
    return explained(
        Asking(searcher=searcher), searcher.pins, out, nearest,
        f"pp*dp*cp*tp = {costs.cluster.count}, dp divides the global batch of"
        f" {costs.workload.global_batch}",
        memory, (f"--max-memory {least:.1f}GB holds the nearest",) if known else (),
    )  # fmt: skip


def explained(
    asked: Asking | FleetAsking, pins: Pins, out: Outcome, nearest: str, rule: str,
    memory: Memory = (None, 0), hints: tuple[str, ...] = (),
) -> InfeasibleError:  # fmt: skip
    """Why no plan of what is asked fits. nearest: what the nearest misfit needs, rule: what a legal
    mesh keeps, in words. memory: bytes that the user lets a plan use of each GPU, if so, and what
    it has. hints: that are known already."""
    legal = out.misfit is None and out.full is None
    questions = Questions(asked=asked, pins=pins, legal=legal)
    core, spec, tier, roomier = questions.core(), asked.hardware.spec, [], []
    if out.full:
        roomier = questions.roomier(out.full.name)
        binds = roomier or isinstance(asked.hardware, Fleet)  # of these it is not asked
        tier = [f"tier {out.full.said}"] if binds else []
    core = replace(core, hints=(*roomier, *core.hints))
    limit, has = memory
    lent = f" (--max-memory {format_bytes(limit)})" if limit is not None and limit < has else ""
    limits = [word + lent * (word == "memory") for word in core.limits]
    core = replace(core, hints=(*hints, *core.hints))
    words = [*limits, *tier, *(f"{c.said(pins)} (--fix)" for c in core.pins)]
    found = "; ".join(words) or "none of the limits and pins alone"
    binding = f"binding{'' if core.proved else ', as far as searched'}: {found}"
    if legal:
        return InfeasibleError(
            f"no mesh of {spec} suits the model, the batch and the pins",
            why=f"{rule}\n{binding}",
            hints=core.hints or ("another --global-batch, or fewer pins",),
        )
    proved = out.seen
    sizes = dict.fromkeys(
        f"{part.device.memory_bytes / 1e9:.1f}" for part in parts_of(asked.hardware)
    )
    return InfeasibleError(
        f"no plan {'fits' if proved else 'was found that fits'} {spec}"
        f" ({' or '.join(sizes)} GB a GPU)",
        why=(f"{nearest}\n" if nearest else "") + binding,
        hints=core.hints or ("a device with more memory, or a smaller model",),
    )


def _fullest(searcher: Searcher, misfit: Misfit) -> RankLedger:
    costs = searcher.costs
    step = costs.step(misfit.decisions, misfit.assignments)
    made = estimate_step(costs, step, misfit.decisions)
    return max(made.ranks, key=lambda r: r.peak_bytes)


def needs(searcher: Searcher, misfit: Misfit) -> str:
    """What the fullest rank of a plan that does not fit holds, in GB by name."""
    return _holds(_fullest(searcher, misfit))


def _holds(worst: RankLedger) -> str:
    total = worst.peak_bytes
    named = sorted(worst.memory_bytes, key=lambda row: -row[1])
    parts = [f"{name} {size / 1e9:.1f}" for name, size in named[:4]]
    parts.append(f"other {sum(size for _, size in named[4:]) / 1e9:.1f}")
    return f"{total / 1e9:.1f} GB on pp rank {worst.pp_rank}: {', '.join(parts)}"


@dataclass(kw_only=True)
class Questions:
    """The questions asked of one infeasible problem. legal: whether plans are sought that are
    legal at all, where memory is not what is in the way."""

    asked: Asking | FleetAsking
    pins: Pins
    legal: bool = False
    _answers: dict[tuple[Pins, int, Workload], Answer | None] = field(default_factory=dict)

    def answer(
        self, pins: Pins, hardware: Hardware | None = None, workload: Workload | None = None
    ) -> Answer | None:
        """What is found under these, or None."""
        hardware, workload = hardware or self.asked.hardware, workload or self.asked.workload
        key = (pins, hardware.count, workload)
        if key not in self._answers:
            self._answers[key] = None
            if self.legal or self.asked.can_fit(pins, hardware=hardware, workload=workload):
                self._answers[key] = self._searched(pins, hardware, workload)
        found = self._answers[key]
        if found is None:
            return None
        legal = self.legal and found.outcome.misfit is not None
        return found if found.outcome.best is not None or legal else None

    def _searched(self, pins: Pins, hardware: Hardware, workload: Workload) -> Answer | None:
        """What is found with little effort, or with more where something may yet fit."""
        for effort in (self._effort, MORE_EFFORT):
            found = self.asked.ask(pins, hardware=hardware, workload=workload, effort=effort)
            if self.legal or not isinstance(self.asked, Asking) or found is None:
                break  # bounds of several kinds say little of what may fit
            if found.outcome.best or found.outcome.seen:
                break
        return found

    @property
    def _effort(self) -> int:
        return EFFORT * (LEGAL_TIMES if self.legal else 1)

    def core(self) -> Core:
        """What binds, and what would help."""
        hardware, kept = self.asked.hardware, self._minimal()
        pins = _without(self.pins, [c for c in constraints(self.pins) if c not in kept])
        limits = ["memory"] if not self.legal else []
        hints = [hint for c in kept for hint in self._dropped(c, kept)]
        wider = None if self.pins.tp else self._wider_tp(pins)
        if wider:
            widest = min(widest_tp(part.domain_ranks) for part in parts_of(hardware))
            limits.append(f"tp<={widest} (one NVLink domain)")
            hints.append(wider)
        if not hints and not self.legal:
            hints += self._offloaded()
        more = self._more_gpus()
        if more is not None:
            limits.append(many(hardware.count, "GPU"))
            hints.append(more)
        if not hints or self.legal:
            for word, hint in self._smaller():
                limits.append(word)
                hints.append(hint)
        self.answer(pins)
        seen = self._answers[pins, hardware.count, self.asked.workload]
        return Core(
            pins=kept, limits=tuple(limits), hints=tuple(hints),
            proved=seen is None or seen.outcome.seen,
        )  # fmt: skip

    def _minimal(self) -> tuple[Constraint, ...]:
        """The pins left by deletion, in the vocabulary's order."""
        kept = constraints(self.pins)
        if not kept or self.answer(Pins()) is None:
            return ()
        for one in kept:
            fewer = [c for c in kept if c is not one]
            dropped = [c for c in constraints(self.pins) if c not in fewer]
            if self.answer(_without(self.pins, dropped)) is None:
                kept = tuple(fewer)
        return kept

    def _dropped(self, one: Constraint, core: Sequence[Constraint]) -> list[str]:
        """A plan without that pin; and without as few of the pins outside the core as there must
        be, should those bind as well."""
        away = [one]
        found = self.answer(_without(self.pins, away))
        if found is None:
            away = [one, *(c for c in constraints(self.pins) if c not in core)]
            for back in away[1:]:
                fewer = [c for c in away if c is not back]
                if self.answer(_without(self.pins, fewer)) is not None:
                    away = fewer
            found = self.answer(_without(self.pins, away))
        if found is None:
            return []
        if any(c.key == "shares" for c in away):
            found = self._replicas(_without(self.pins, away)) or found
        words = " and ".join(c.said(self.pins) for c in away)
        return [f"without {words} {self._told(found, tuple(c.key for c in away))}"]

    def _replicas(self, pins: Pins) -> Answer | None:
        """Where replicas on several parts were asked for: those of other counts that fit, before
        plans of another kind."""
        if not self.pins.shares or isinstance(self.asked, Asking):
            return None
        found = self.asked.ask(pins, effort=self._effort, refused=(("shares", ()),))
        return found if found is not None and found.outcome.best is not None else None

    def _wider_tp(self, pins: Pins) -> str:
        """The least tp beyond one domain with which something fits."""
        parts = parts_of(self.asked.hardware)
        for tp in sorted({n for part in parts for n in divisors(part.count)}):
            crosses = any(widest_tp(part.domain_ranks) < tp <= MOST_DOMAINS * part.domain_ranks
                          for part in parts)  # fmt: skip
            if not crosses or not splits_something(self.asked.chain, tp):
                continue
            found = self.answer(replace(pins, tp=tp))
            if found:
                return f"with --fix tp={tp}, across domains, {self._told(found, ())}"
        return ""

    def _offloaded(self) -> list[str]:
        """What is not searched: with parameters all layers' activations on the CPU."""
        parts = parts_of(self.asked.hardware)
        if not all(any(tier.name == "cpu" for tier in part.tiers) for part in parts):
            return []
        pins = replace(self.pins, offload=OFFLOAD)
        found = self.answer(pins)
        return [f"with --fix {pins.said('offload')} {self._told(found, ())}"] if found else []

    def _more_gpus(self) -> str | None:
        """The least of 2, 3, 4, 6, 8 .. times the GPUs on which something fits."""
        most = 1
        while most < MOST_TIMES:
            most *= 2
            found = self._on(most)
            if found is None:
                continue
            return (self._on(most * 3 // 4) if most > 2 else None) or found
        return None

    def _on(self, times: int) -> str | None:
        """What is found under all pins on so many times the GPUs, of each part."""
        hardware = self.asked.hardware
        parts = [replace(part, count=times * part.count) for part in parts_of(hardware)]
        bigger = replace(hardware, parts=tuple(parts)) if isinstance(hardware, Fleet) else parts[0]
        try:
            found = self.answer(self.pins, bigger) if all(map(_whole, parts)) else None
        except PlanError:  # the pins or the hardware's levels do not go with that count
            return None
        return None if found is None else f"{bigger.spec} {self._told(found, (), 'holds it')}"

    def roomier(self, name: str) -> list[str]:
        """What fits if a tier below had more room, as little more as is asked about."""
        hardware = self.asked.hardware
        if isinstance(hardware, Fleet) or self.legal:
            return []
        for times in MORE_ROOM:
            bigger = replace(hardware, tiers=tuple(
                replace(t, bytes=int(t.bytes * times)) if t.name == name else t
                for t in hardware.tiers
            ))  # fmt: skip
            if not self.asked.can_fit(self.pins, hardware=bigger):
                continue
            found = self.asked.ask(self.pins, hardware=bigger, effort=self._effort)
            if found is not None and found.outcome.best is not None:
                return [
                    f"{use.used_bytes / 1e9:,.1f} GB of tier {name} for {many(use.gpus, 'GPU')}"
                    f" {self._told(found, ('offload',), 'hold it')}"
                    for use in found.estimate().tiers if use.name == name
                ]  # fmt: skip
        return []

    def _smaller(self) -> Iterator[tuple[str, str]]:
        """The nearest smaller batch, and the nearest shorter sequence, where something fits."""
        workload = self.asked.workload
        batches = [workload.global_batch // 2**n for n in range(1, 5)]
        if self.legal:
            batches = [*itertools.islice(filter(self._suits, self._near()), 1)]
        for batch in batches:
            found = self._with(global_batch=batch) if batch else None
            if found:
                told = self._told(found, ())
                yield f"global batch {workload.global_batch}", f"with --global-batch {batch} {told}"
                break
        length = workload.seq_len // 2
        while length >= LEAST_SEQ_LEN and not self.legal:
            found = self._with(seq_len=length)
            if found:
                yield f"{workload.seq_len} tokens a sample", (
                    f"with --seq-len {length} {self._told(found, ())}"
                )
                return
            length //= 2

    def _near(self) -> list[int]:
        """Batches that some number of data ranks divides beside the pins, the nearest first."""
        pins, batch = self.pins, self.asked.workload.global_batch
        pinned = math.prod(n or 1 for n in (pins.dp, pins.micro_batch, pins.microbatches))
        hardware = self.asked.hardware
        counts = (hardware.count, *(part.count for part in parts_of(hardware)))
        found = {batch}
        for unit in {pinned * ranks for count in counts for ranks in divisors(count)}:
            first = batch // unit - MOST_NEAR
            found.update(unit * n for n in range(max(1, first), first + 2 * MOST_NEAR + 2))
        return sorted((b for b in found if b <= 2 * batch), key=lambda b: (abs(b - batch), b))

    def _suits(self, batch: int) -> bool:
        """Whether any mesh divides such a batch."""
        workload = replace(self.asked.workload, global_batch=batch)
        return self.asked.suits(self.pins, workload)

    def _with(self, **changed: int) -> Answer | None:
        changes: dict[str, Any] = {**changed}
        return self.answer(self.pins, workload=replace(self.asked.workload, **changes))

    def _told(self, found: Answer, keys: Iterable[str], fits: str = "it fits") -> str:
        """Memory and step of the plan that was found, and what it has for the keys."""
        if found.outcome.best is None:
            return "there are plans, but none was found that fits"
        made: Estimate = found.estimate()
        if "offload" in keys and found.decisions.below is not None:  # of layers that stages count
            keys = dict.fromkeys((*keys, "pp", *(["stages"] if found.decisions.pp > 1 else [])))
        chosen = ", ".join(chosen_words(found.decisions, key) for key in keys if key != "place")
        return (
            f"{fits}: " + f"{chosen}, " * bool(chosen)
            + f"{made.peak_memory_bytes / 1e9:.1f} GB a GPU,"
            f" {format_seconds(made.step_time_s)} a step"
        )  # fmt: skip


def constraints(pins: Pins) -> tuple[Constraint, ...]:
    """Every pin, in the vocabulary's order, and every placement."""
    return (
        *(Constraint(key=key) for key, _ in pins.items()),
        *(Constraint(key="place", pattern=pattern) for pattern, _ in pins.place),
    )


def chosen_words(d: Decisions, key: str) -> str:
    """What a plan decides for a key, as a pin says it."""
    if key == "shares":
        return f"shares={share_words(d.shares)}"
    value = summarise_recompute(d) if key == "recompute" else getattr(d, key, None)
    if value is None:
        return key
    return replace(Pins(), **{key: value}).said(key)  # type: ignore[arg-type]


def _without(pins: Pins, dropped: Sequence[Constraint]) -> Pins:
    for one in dropped:
        pins = one.without(pins)
    return pins


def _whole(cluster: Cluster) -> bool:
    """Whether the count is part of one node or whole nodes."""
    return cluster.count <= cluster.node_size or cluster.count % cluster.node_size == 0
