"""What runs left out of fits show: parts of the file of accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cost_models.validation.accuracy import Part, Table
from cost_models.validation.metrics import Pair, Scores, scores
from planner.validation.scoring import Ranking, report_of

if TYPE_CHECKING:
    from planner.validation.fit import Fact
    from planner.validation.fit_memory import Held

Floats = NDArray[np.float64]
IN_SAMPLE = "in sample"
HELD_OUT = "cross-validated by group"
SOURCE_OUT = "one source left out"
GENERATION_OUT = "one GPU generation left out"
_SHORT = {HELD_OUT: "", SOURCE_OUT: "source out, ", GENERATION_OUT: "GPU generation out, "}


def classes_of(fact: Fact) -> tuple[str, ...]:
    """The classes a run is reported in."""
    case = fact.prepared.case
    kind = "hybrid" if case.run.model.get("hybrid") else "moe" if case.run.is_moe else "dense"
    return "all", kind, case.cluster.name, case.engine.name, case.workload.precision


def by_class(facts: Sequence[Fact], predicted: Floats) -> dict[str, list[Pair]]:
    """(predicted, measured) seconds of each class."""
    pairs: dict[str, list[Pair]] = defaultdict(list)
    for fact, seconds in zip(facts, predicted):
        for name in classes_of(fact):
            pairs[name].append((float(seconds), fact.measured_s))
    return pairs


def step_parts(facts: Sequence[Fact], found: Mapping[str, Floats]) -> dict[str, Part | str]:
    """Errors of step times by class, for every way of leaving runs out; and how those left out by
    group are ranked."""
    groups: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        for name in classes_of(fact):
            groups[name].add(fact.prepared.case.run.group)
    classes: dict[str, Table] = {}
    for how, short in _SHORT.items():
        for name, pairs in by_class(facts, found[how]).items():
            classes[short + name] = {**_row(scores(pairs)), "groups": len(groups[name])}
    rows = [replace(f.row, predicted_s=float(s)) for f, s in zip(facts, found[HELD_OUT])]
    left, seen = report_of(rows), report_of([f.row for f in facts])
    return {
        "note": f"fitted without them: {HELD_OUT}; then {SOURCE_OUT}, {GENERATION_OUT}",
        "classes": classes,
        "ranking": {
            "any workload": _ranked(left.ranking, seen.ranking),
            "same workload": _ranked(left.same_workload, seen.same_workload),
        },
    }  # fmt: skip


def memory_parts(facts: Sequence[Fact], held: Sequence[Held]) -> dict[str, Part]:
    """Errors of peaks by engine, and verdicts: runs of fitted engines by constants that saw no
    run alike, others by those that no peak has moved."""
    peaks = {name: peak for one in held for name, peak in one.left_out.items()}
    found = report_of([
        replace(f.row, predicted_bytes=peaks.get(f.row.id, f.row.predicted_bytes)) for f in facts
    ])  # fmt: skip
    v = found.verdicts
    missed = tuple(name for name in v.oom if name not in v.near)
    return {
        "memory": {c.name: _row(c.scores) for c in found.memory},
        "verdicts": {
            "out of memory": {"n": len(v.oom), "beyond": len(v.caught), "near": len(v.near),
                              "missed": missed},
            "ran": {"n": v.ran, "beyond": len(v.refused), "wrong": v.wrong},
        },
    }  # fmt: skip


def memory_text(held: Sequence[Held], parts: Mapping[str, Part]) -> str:
    """What was fitted, and the parts."""
    lines = [f"\n{'peaks, left out':28s} {'n':>4} {'MAPE':>6} {'median':>7} {'bias':>7} {'p90':>6}"]
    for name, row in parts["memory"].items():
        errors = [float(str(row[key])) for key in ("mape", "median", "bias", "p90")]
        words = "{:6.1%} {:7.1%} {:+7.1%} {:6.1%}".format(*errors)
        lines.append(f"  {name:26s} {row['n']:4d} {words}")
    for name, row in parts["verdicts"].items():
        lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    for one in held:
        lines.append(
            f"{'+'.join(one.reserve.tables)}: fragmentation {one.fragmentation:g},"
            f" cached_bytes {one.cached_bytes:g}; {one.scores.n} peaks"
        )
    return "\n".join(lines)


def _row(s: Scores) -> Table:
    return {"n": s.n, "mape": s.mape, "median": s.median, "bias": s.bias, "p90": s.p90}


def _ranked(left: Ranking, seen: Ranking) -> Table:
    return {"pairs": left.pairs, "groups": left.groups, "tau": left.tau or 0.0,
            "in_sample_tau": seen.tau or 0.0}  # fmt: skip
