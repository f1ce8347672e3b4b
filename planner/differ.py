"""What changed between two plans, and what it does: one value; `differ_text` renders it.

Both plans are costed with today's constants; what the old plan's own estimate drifted by is told
apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ir.errors import GateError, UsageError
from ir.graph import Graph
from ir.stacks import as_written
from ir.text import format_graph
from planner.attribution import Coster, Effect, effects
from planner.check import Checked
from planner.decisions import VOCABULARY, recompute_words
from planner.decisions_json import decisions_json
from planner.keep_words import keep_words
from planner.names import expand_text, fold_text
from planner.placements import placements
from planner.plan import Plan, recost, step_time_us
from planner.plan_text import recompute_records, stage_records
from planner.share_words import share_words

if TYPE_CHECKING:
    from planner.serving.effects import ServingEffect
    from planner.serving.plan import ServingPlan

VERDICT = {  # figures that the verdict names: more, less
    "step_time_s": ("slower", "faster"),
    "ttft_s": ("later at the first token", "sooner at the first token"),
    "tpot_s": ("slower a token", "faster a token"),
    "peak_memory_bytes": ("more memory", "less memory"),
}
VERDICT_OF_RATE = {  # of different work, whose seconds do not compare
    "tokens_per_s_per_gpu": ("more tokens/s/GPU", "fewer tokens/s/GPU"),
    "tokens_per_s": ("more tokens/s", "fewer tokens/s"),
    "peak_memory_bytes": VERDICT["peak_memory_bytes"],
}
LIMITS = {  # of --fail-on
    "step-time": "step_time_s", "memory": "peak_memory_bytes", "ttft": "ttft_s", "tpot": "tpot_s",
}  # fmt: skip
SAME_RELATIVE = 1e-6  # below the microsecond and byte that plans are stored in


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One figure of both plans. key: its name in JSON, with its unit. unit: s, B, % or none.
    error: relative, of the estimates; better: -1 less, +1 more."""

    name: str
    key: str
    unit: str
    old: float
    new: float
    error: float
    better: int

    @property
    def change(self) -> float:
        """Relative to the old plan."""
        return self.new / self.old - 1 if self.old else 0.0

    @property
    def within_error(self) -> bool:
        return abs(self.change) <= self.error

    @property
    def moved(self) -> bool:
        """Whether it differs beyond the grain of what is stored."""
        return abs(self.change) > SAME_RELATIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """In what two plans differ. work: in what their steps, or requests, are of different work, or
    on a different number of GPUs."""

    decided: bool
    renamed: bool
    inputs: bool
    work: tuple[str, ...]

    @property
    def other_work(self) -> bool:
        return any(not word.startswith("GPUs ") for word in self.work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something decided or given differently: what, from, to, and what it means."""

    what: str
    old: str
    new: str
    meaning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """The difference of two plans.

    effects: what each change does alone, and all together beyond that: they sum to the whole.
    drift: the old plan's stored step against the same plan costed today. renamed: modules paired
    by shape and order, (old, new) folded. decisions: those of the greatest effect first. blocks:
    of serving, formats and tiers. serving_effects: of serving, what each change does when they are
    made one after another: they too sum to the whole.
    """

    verdict: str
    numbers: tuple[Number, ...]
    decisions: tuple[Change, ...]
    stages: tuple[Change, ...]
    placements: tuple[Change, ...]
    inputs: tuple[Change, ...]
    renamed: tuple[tuple[str, str], ...]
    drift: Number | None
    effects: tuple[Effect, ...] = ()
    blocks: tuple[Change, ...] = ()
    serving_effects: tuple[ServingEffect, ...] = ()

    def __repr__(self) -> str:
        from planner.differ_text import diff_text

        return diff_text(self)

    def _repr_html_(self) -> str:
        from planner.displays import diff_html

        return diff_html(self)

    @property
    def differs(self) -> bool:
        """Whether anything but the estimate's drift is different."""
        changes = (self.decisions, self.stages, self.blocks, self.placements, self.inputs)
        return any(changes) or bool(self.renamed)


def diff(old: Checked, new: Checked, cost: Coster = recost) -> Diff:
    """Compare two plans, each costed anew (`check.examine`), by the same `cost`."""
    renamed = renamed_of(old.plan.graph, new.plan.graph)
    numbers = _numbers(old, new)
    rows = effects(old, new, cost)
    changes = _by_effect(_decisions(old.plan, new.plan), rows)
    stages = by_name(_stage_words(old.plan), _stage_words(new.plan), renamed)
    laid = by_name(placed(old.plan), placed(new.plan), renamed)
    inputs = _inputs(old, new)
    return Diff(
        verdict=verdict_of(
            Apart(decided=bool(changes or stages or laid), renamed=bool(renamed),
                  inputs=bool(inputs), work=_work(old, new, renamed)),
            numbers, fits=new.estimate.fits,
        ),
        numbers=numbers,
        decisions=changes,
        stages=stages,
        placements=laid,
        inputs=inputs,
        renamed=same_names(renamed),
        drift=_drift(old),
        effects=rows,
    )


def _numbers(old: Checked, new: Checked) -> tuple[Number, ...]:
    a, b = old.estimate, new.estimate
    error = max(a.error, b.error)
    rows = (
        ("step time", "step_time_s", "s", a.step_time_s, b.step_time_s, -1),
        ("peak memory", "peak_memory_bytes", "B", a.peak_memory_bytes, b.peak_memory_bytes, -1),
        ("tokens/s/GPU", "tokens_per_s_per_gpu", "", _rate(old), _rate(new), 1),
        ("MFU", "mfu", "%", a.mfu, b.mfu, 1),
    )
    return tuple(
        Number(name=name, key=key, unit=unit, old=x, new=y, error=error, better=better)
        for name, key, unit, x, y, better in rows
    )


def _rate(c: Checked) -> float:
    return c.estimate.tokens / c.estimate.step_time_s / c.estimate.gpus


def _work(old: Checked, new: Checked, renamed: Mapping[str, str]) -> tuple[str, ...]:
    """What makes a step of one plan other work than one of the other."""
    a, b = old.plan, new.plan
    pairs = (("global_batch", a.workload.global_batch, b.workload.global_batch),
             ("seq_len", a.workload.seq_len, b.workload.seq_len),
             ("GPUs", old.estimate.gpus, new.estimate.gpus))  # fmt: skip
    return (*other_model(a.graph, b.graph, renamed),
            *(f"{name} {x:,} -> {y:,}" for name, x, y in pairs if x != y))  # fmt: skip


def other_model(old: Graph, new: Graph, renamed: Mapping[str, str]) -> tuple[str, ...]:
    """A word where two models compute different things: neither names nor lines of a file do."""
    from planner.check import unplaced

    old, new = as_written(old), as_written(new)
    if renamed or unplaced(format_graph(replace(old, name=new.name))) == unplaced(
        format_graph(new)
    ):  # fmt: skip
        return ()
    return ("model",)


def verdict_of(apart: Apart, numbers: Sequence[Number], *, fits: bool) -> str:
    """The difference in a line: of seconds and of memory; of different work, of its rate."""
    if not (apart.decided or apart.renamed or apart.inputs):
        return "the plans are the same" + ("" if fits else ", and do not fit")
    if not fits:
        return "the new plan does not fit"
    by_key = {number.key: number for number in numbers}
    words, told = [], VERDICT if not apart.work else VERDICT_OF_RATE
    if apart.work and not apart.other_work:  # a step of the same work on more GPUs is quicker
        told = VERDICT_OF_RATE | VERDICT
    for key, (more, less) in told.items():
        if key not in by_key:
            continue
        number = by_key[key]
        if number.moved:
            size = abs(number.change)
            noise = " (within model error)" if number.within_error else ""
            words.append(f"{size:.1%} {more if number.change > 0 else less}{noise}")
    if apart.work:
        said = ", ".join(words) or "the same rate, in the same memory"
        what = "different work" if apart.other_work else "different clusters"
        return f"{what} ({', '.join(apart.work)}): the new plan: {said}"
    if words:
        return "the new plan: " + ", ".join(words)
    if apart.decided:
        return "decided differently, costs the same"
    return f"{'renamed' if apart.renamed else 'other inputs'}, decided the same, costs the same"


def _decisions(old: Plan, new: Plan) -> tuple[Change, ...]:
    """Decisions and workload that differ, in the vocabulary's order."""
    meanings = {key.name: key.meaning for key in VOCABULARY}
    before, after = _decided(old), _decided(new)
    return tuple(
        Change(what=key, old=before[key], new=after[key], meaning=meanings.get(key, ""))
        for key in before
        if before[key] != after[key]
    )


def _by_effect(changes: Sequence[Change], rows: Sequence[Effect]) -> tuple[Change, ...]:
    """Those of the greatest effect first; what follows from others last."""
    order = {key: place for place, row in enumerate(rows) for key in row.keys}
    return tuple(sorted(changes, key=lambda change: order.get(change.what, len(rows))))


def _decided(plan: Plan) -> dict[str, str]:
    words = {key: _plain(value) for key, value in decisions_json(plan.decisions).items()}
    words["keep"] = keep_words(plan.decisions.keep)
    words["recompute"] = recompute_words(plan.decisions)
    words["shares"] = share_words(plan.decisions.shares)
    words.setdefault("dp_outer", "1")
    words.setdefault("tp_by_part", "none")
    words.setdefault("formats", "none")
    order = [key.name for key in VOCABULARY if key.name in words]
    return {key: words[key] for key in order}


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        return ",".join(f"{what}:{tier}" for what, tier in value.items()) or "none"
    return str(value)


def _inputs(old: Checked, new: Checked) -> tuple[Change, ...]:
    """What the plans were made for: model, hardware, workload. Constants are today's for both."""
    a, b = old.plan, new.plan
    return tuple(
        Change(what=what, old=then, new=now)
        for (what, then), now in zip(_given(a).items(), _given(b).values())
        if then != now
    )


def _given(plan: Plan) -> dict[str, str]:
    return {
        "model": f"{plan.graph.name} {plan.graph_hash[:15]}",
        "hardware": f"{plan.hardware} {plan.hardware_hash[:15]}",
        "constants": plan.constants_hash[:15],
        **{
            key: ",".join(value) or "none" if isinstance(value, tuple) else str(value)
            for key, value in asdict(plan.workload).items()
        },
    }


def _stage_words(plan: Plan) -> dict[str, str]:
    """Where each unit runs and what is computed again, by module path."""
    words = {
        path: f"pp rank {record['pp_rank']}, stage {record['stage']}"
        + (f" on {record['part']}" if "part" in record else "")
        for record in stage_records(plan.decisions, plan.graph)
        for path in expand_text(record["units"])
    }
    for record in recompute_records(plan.decisions, plan.graph):
        if record["recompute"] != "none":
            for path in expand_text(record["units"]):
                words[path] += f", recompute {record['recompute']}"
    return words


def placed(plan: Plan | ServingPlan) -> dict[str, str]:
    """How every parameter lies on tp, by its full name."""
    return placements(plan.sharding_by_unit, plan.graph)


def by_name(
    old: Mapping[str, str], new: Mapping[str, str], renamed: Mapping[str, str]
) -> tuple[Change, ...]:
    """Names whose word differs, folded by (old word, new word); renamed ones are the same."""
    moved = {renamed.get(name, name): word for name, word in old.items()}
    groups: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys([*moved, *new]):
        pair = (moved.get(name, "absent"), new.get(name, "absent"))
        if pair[0] != pair[1]:
            groups.setdefault(pair, []).append(name)
    return tuple(Change(what=fold_text(names), old=a, new=b) for (a, b), names in groups.items())


def renamed_of(old: Graph, new: Graph) -> dict[str, str]:
    """Old name -> new name of parameters and units, where all that went pairs with all new."""
    if old.parameters.keys() == new.parameters.keys():
        return {}
    gone = [name for name in old.parameters if name not in new.parameters]
    come = [name for name in new.parameters if name not in old.parameters]
    shapes = [[g.parameters[n].tensor for n in names] for g, names in ((old, gone), (new, come))]
    if not gone or shapes[0] != shapes[1]:
        return {}
    units = [[path for _, path, _ in graph.calls()] for graph in (old, new)]
    paths = zip(*units) if len(units[0]) == len(units[1]) else ()
    return dict(zip(gone, come)) | {a: b for a, b in paths if a != b}


def same_names(renamed: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Names that moved, folded: one (old, new), or none."""
    return ((fold_text(list(renamed)), fold_text(list(renamed.values()))),) if renamed else ()


def _drift(old: Checked) -> Number | None:
    """The old plan's own estimate against the same plan costed today, where they differ."""
    before, after = old.plan.step_time_us, step_time_us(old.estimate)
    if before == after:
        return None
    return Number(name="step time", key="step_time_s", unit="s", old=before / 1e6, new=after / 1e6,
                  error=old.estimate.error, better=-1)  # fmt: skip


def gate(found: Diff, limits: str) -> None:
    """Raise GateError where a figure worsened beyond `step-time=+3%,memory=+5%`."""
    broken = []
    for number, percent in limits_of(found, limits):
        if number.change > float(percent) / 100 + SAME_RELATIVE:
            broken.append(f"{number.name} {number.change:+.1%}, allowed +{percent}%")
    if broken:
        raise GateError("the new plan fails the gate", why="\n".join(broken))


def limits_of(found: Diff, limits: str) -> list[tuple[Number, str]]:
    """Figures with the percentages they may worsen by. Raises UsageError for what is no limit."""
    by_key = {number.key: number for number in found.numbers}
    known = [word for word, key in LIMITS.items() if key in by_key]
    rows = []
    for limit in limits.split(","):
        read = re.fullmatch(r"([a-z-]+)=\+?([0-9]+(?:\.[0-9]+)?)%", limit)
        if read is None or read[1] not in known:
            raise UsageError(f"--fail-on {limit} is no limit",
                             why=f"expected {'=+3%,'.join(known)}=+5%")  # fmt: skip
        rows.append((by_key[LIMITS[read[1]]], read[2]))
    return rows
