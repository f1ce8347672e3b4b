"""Outcomes scored: errors by class, memory by framework, out-of-memory verdicts, ranking."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from cost_models.validation.metrics import Pair, Scores, kendall_tau, scores
from planner.validation.running import LeftOut, Outcome, Row

DIMENSIONS = ("model", "hardware", "framework", "precision", "recompute")
NEAR = 0.05  # of capacity: a run that went out of memory is predicted to need more than 1 - this
SLACK = 0.02  # of capacity: a run that fitted is predicted to need no more than 1 + this


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Scores of one class of runs. dimension: what it is a class of; empty for all runs."""

    dimension: str
    name: str
    scores: Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Out-of-memory outcomes against predictions, by id. oom: runs that went out of memory;
    caught: those predicted beyond capacity, near: at least within NEAR of it. ran: the number of
    runs that fitted; refused: those predicted beyond capacity, wrong: beyond it by SLACK."""

    oom: tuple[str, ...]
    caught: tuple[str, ...]
    near: tuple[str, ...]
    ran: int
    refused: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Do predictions order configurations as measurements do? tau: Kendall's, None where no pair
    compares; pairs, groups: what it is of."""

    tau: float | None
    pairs: int
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that is said of a file of runs. defaults: what was assumed, with the number of runs."""

    rows: int
    used: tuple[Row, ...]
    skipped: tuple[LeftOut, ...]
    classes: tuple[Scored, ...]
    memory: tuple[Scored, ...]
    verdicts: Verdicts
    ranking: Ranking
    same_workload: Ranking
    defaults: tuple[tuple[str, int], ...]

    @property
    def timed(self) -> list[Row]:
        return [row for row in self.used if row.measured_s]


def report_of(outcomes: Sequence[Outcome]) -> Report:
    """Score outcomes; classes in the order of DIMENSIONS, then of first appearance by name."""
    used = tuple(o for o in outcomes if isinstance(o, Row))
    timed = [row for row in used if row.measured_s]
    counts = Counter(text for row in used for text in row.defaults)
    return Report(
        rows=len(outcomes), used=used,
        skipped=tuple(o for o in outcomes if isinstance(o, LeftOut)),
        classes=tuple(_by_class(timed)), memory=tuple(_memory(used)), verdicts=_verdicts(used),
        ranking=_ranking(timed, [row.subject for row in timed]),
        same_workload=_ranking(timed, [f"{row.subject} {row.workload}" for row in timed]),
        defaults=tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
    )  # fmt: skip


def _by_class(timed: Sequence[Row]) -> list[Scored]:
    pairs: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for row in timed:
        assert row.measured_s
        for key in (("", "all"), *row.classes):
            pairs[key].append((row.predicted_s, row.measured_s))
    order = ("", *DIMENSIONS)
    keys = sorted(pairs, key=lambda key: (order.index(key[0]), key[1]))
    return [Scored(dimension=d, name=name, scores=scores(pairs[d, name])) for d, name in keys]


def _memory(used: Sequence[Row]) -> list[Scored]:
    pairs: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for row in used:
        if row.measured_bytes:
            for key in (("", "all"), ("framework", dict(row.classes)["framework"])):
                pairs[key].append((row.predicted_bytes, row.measured_bytes))
    return [Scored(dimension=d, name=name, scores=scores(pairs[d, name]))
            for d, name in sorted(pairs)]  # fmt: skip


def _verdicts(used: Sequence[Row]) -> Verdicts:
    def beyond(rows: Sequence[Row], share: float) -> tuple[str, ...]:
        return tuple(row.id for row in rows if row.predicted_bytes > share * row.capacity_bytes)

    oom = [row for row in used if row.oom]
    ran = [row for row in used if not row.oom]
    return Verdicts(
        oom=tuple(row.id for row in oom), caught=beyond(oom, 1), near=beyond(oom, 1 - NEAR),
        ran=len(ran), refused=beyond(ran, 1), wrong=beyond(ran, 1 + SLACK),
    )  # fmt: skip


def _ranking(timed: Sequence[Row], subjects: Sequence[str]) -> Ranking:
    """Seconds a token of the configurations of each subject. Runs of one configuration (releases,
    repetitions) count once, by the median: nothing that a prediction reads tells them apart."""
    groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row, subject in zip(timed, subjects):
        groups[subject][row.configuration].append(row)
    points: list[list[Pair]] = []
    for configurations in groups.values():
        if len(configurations) > 1:
            points.append([
                (rows[0].predicted_s / rows[0].tokens,
                 median((row.measured_s or 0) / row.tokens for row in rows))
                for rows in configurations.values()
            ])  # fmt: skip
    tau, pairs = kendall_tau(points)
    return Ranking(tau=tau if pairs else None, pairs=pairs, groups=len(points))
