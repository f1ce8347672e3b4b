"""`plan why` as text of 80 columns and as one JSON document."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from cost_models.decisions import Decisions
from cost_models.ledger import Estimate
from cost_models.units import format_bytes, format_seconds
from planner.check import Checked
from planner.decisions import recompute_words
from planner.decisions_json import decisions_json
from planner.keep_words import keep_words
from planner.offloads import offload_words
from planner.proved import an_axis, gain_words, pins_words
from planner.refused import refused_words
from planner.score import PPM, axes_used, score_of
from planner.why import Alternative, Binding
from planner.wrapping import wrapped

SCHEMA = "why/1"
WIDTH = 80
TERMS = 5  # parts of the step that are told, the largest first
UNSEARCHED = ("compile", "grad_dtype")  # left as the engine has them, or as they are pinned
LEAST_SHARE = 0.001  # of the step: a smaller difference of a part is not told


def alternative_text(base: Checked, found: Alternative) -> str:
    """One alternative, whole."""
    without = f"without {refused_words(found.refused)}"
    if found.estimate is None or found.decisions is None:
        what = "nothing legal is left" if found.binding.kind == "rule" else "nothing fits"
        return "\n".join([f"{without}: {what}", *_row("binding", told(found, base))])
    old, new = base.estimate, found.estimate
    lines = [
        f"{without}: step {format_seconds(old.step_time_s)} -> "
        f"{format_seconds(new.step_time_s)}, {_change(old, new):+.1%}"
        + (f", within error of {new.error:.0%}" * _within(old, new)),
        *_row("instead", decided(found.decisions)),
        *_row("memory", f"{format_bytes(old.peak_memory_bytes)} -> "
              f"{format_bytes(new.peak_memory_bytes)} of {format_bytes(new.capacity_bytes)}"),
        *_row("binding", told(found, base)),
    ]  # fmt: skip
    parts = _parts(old, new)
    if parts:
        lines.append("  where the step differs")
    lines += [
        f"    {name:12}{_signed(now - then):>10}   {format_seconds(then):>8} ->"
        f" {format_seconds(now)}"
        for name, then, now in parts[:TERMS]
    ]
    proof = gain_words(found.solver)
    if found.solver.status == "OPTIMAL":
        proof = f"no other of the space is better{an_axis(found.solver, ' by')}"
    return "\n".join([*lines, *_row("proof", f"{found.solver.status}: {proof}")])


def table_text(base: Checked, rows: Sequence[Alternative]) -> str:
    """What binds in the plan, then a line for each decision that has an alternative."""
    lines = [*_head(base), "", f"{'without':22}{'step':>9}{'change':>9}  first binding constraint"]
    for row in rows:
        word = refused_words(row.refused)
        if row.estimate is None:
            lines += _table_row(word, "none", "", _short(row, base))
        else:
            step, change = row.estimate.step_time_s, _change(base.estimate, row.estimate)
            lines += _table_row(word, format_seconds(step), f"{change:+.1%}", _short(row, base))
    return "\n".join(lines)


def _table_row(word: str, step: str, change: str, why: str) -> list[str]:
    """A row, a long word on lines above its figures, a long reason on lines below."""
    first, *more = textwrap.wrap(why, WIDTH - 42, break_on_hyphens=False)
    head = wrapped(word, 2).split("\n")
    if len(head[-1]) > 21:
        head.append("")
    line = f"{head[-1]:22}{step:>9}{change:>9}  {first}"
    return [*head[:-1], line, *(" " * 42 + rest for rest in more)]


def document(base: Checked, rows: Sequence[Alternative]) -> dict[str, Any]:
    """The same with stable keys, base units."""
    e = base.estimate
    return {
        "schema": SCHEMA,
        "plan": {
            "decisions": decided_json(base.plan.decisions), "step_time_s": e.step_time_s,
            "error": e.error, "peak_memory_bytes": e.peak_memory_bytes,
            "capacity_bytes": e.capacity_bytes,
        },
        "alternatives": [_alternative_json(base.estimate, row) for row in rows],
    }  # fmt: skip


def _alternative_json(old: Estimate, row: Alternative) -> dict[str, Any]:
    found: dict[str, Any] = {
        "not": refused_words(row.refused).split(", "), "fits": row.estimate is not None,
        "binding": _binding_json(row.binding),
    }  # fmt: skip
    if row.estimate is None or row.decisions is None:
        return found
    new, then = row.estimate, dict(old.breakdown_ps)
    return found | {
        "decisions": decided_json(row.decisions),
        "step_time_s": new.step_time_s,
        "change": _change(old, new),
        "within_error": _within(old, new),
        "breakdown_change_s": {k: (ps - then[k]) / 1e12 for k, ps in new.breakdown_ps},
        "peak_memory_bytes": new.peak_memory_bytes,
        "solver": {"status": row.solver.status, "gap": row.solver.gap_ppm / 1e6},
    }


def _binding_json(b: Binding) -> dict[str, Any]:
    if b.kind == "rule":
        return {"kind": "rule", "reason": b.reason}
    if b.kind == "time":
        return {"kind": "time", "component": b.component, "more_s": b.more_s}
    return {
        "kind": "memory", "pp_rank": b.pp_rank, "stage": b.stage, "over_bytes": b.over_bytes,
        "component": b.component, "component_bytes": b.component_bytes, "step_time_s": b.step_s,
        **({"part": b.part} if b.part else {}),
    }  # fmt: skip


def decided_json(d: Decisions) -> dict[str, Any]:
    """A plan's decisions as JSON, stages and recomputation with them."""
    return {**decisions_json(d), "recompute": recompute_words(d),
            "stages": list(d.stages)}  # fmt: skip


def decided(d: Decisions) -> str:
    """A plan's decisions in a line."""
    words = [f"{axis} {getattr(d, axis)}" for axis in ("pp", "dp", "cp", "tp")]
    words += [f"{axis} {getattr(d, axis)}" for axis in ("ep", "etp") if getattr(d, axis) > 1]
    if d.parts:
        lies = ",".join(f"{name}:{ranks}" if len(d.parts) > 1 else name for name, ranks in d.parts)
        words.append(f"stages on {lies}" if d.pp > 1 else f"on {lies}")
    if d.tp_by_part:
        words.append("tp_by_part " + ",".join(f"{name}:{tp}" for name, tp in d.tp_by_part))
    counts = ",".join(f"{s.part}:{s.microbatches}" for s in d.shares) or d.microbatches
    words.append(f"micro-batches {counts} x {d.micro_batch}")
    if d.pp > 1:
        virtual = f" x {d.virtual_stages}" if d.virtual_stages > 1 else ""
        words.append(f"{d.schedule}{virtual}")
    shard = "" if d.shard in (1, d.dp * d.cp) else f" in groups of {d.shard}"
    words.append(f"ZeRO-{d.zero}{shard}{' resharding' * d.reshard}")
    if d.sequence_parallel:
        words.append("sequence parallel")
    full, selective = (sum(n) for n in zip(*(d.recompute or ((0, 0),))))
    words += [f"{n} layers recomputed {how}" for n, how in
              ((full, "in full"), (selective, "in part")) if n]  # fmt: skip
    words += [f"on {s.part} {sum(n)} recomputed {how}" for s in d.shares if s.recompute
              for n, how in zip(zip(*s.recompute), ("in full", "in part")) if sum(n)]  # fmt: skip
    words += [f"keep {keep_words(d.keep)}"] if d.keep else []
    words += offload_words(d)
    words += [f"{group} in {word}" for group, word in d.formats]
    return ", ".join(words)


def told(found: Alternative, base: Checked) -> str:
    """What first stands in the way, in words; of what is no slower, what does beside that."""
    b = found.binding
    if b.kind == "rule":
        return f"a rule: {b.reason}"
    if not _slower(found, base):
        beside = f"; then {_memory(found, base)}" if b.kind == "memory" else ""
        return f"none: {_no_slower(found, base)}{beside}"
    if b.kind == "memory":
        return _memory(found, base)
    return f"time: memory and rules allow it, {b.component} takes {_signed(b.more_s)}"


def _memory(found: Alternative, base: Checked) -> str:
    """By how much a rank is over, and what the step would be with room for that."""
    b = found.binding
    where = f"pp rank {b.pp_rank}{f' of {b.part}' * bool(b.part)} (stage {b.stage})"
    where += f" is {format_bytes(b.over_bytes)} over"
    capacity = format_bytes(b.capacity_bytes)
    most = f"{b.component} {format_bytes(b.component_bytes)} of it"
    step = format_seconds(b.step_s)
    change = b.step_s / base.estimate.step_time_s - 1
    if found.estimate is not None:
        return f"memory: with more it would take {step}; {where} {capacity}, {most}"
    quicker = f", quicker by {-change:.1%}" * (-change >= LEAST_SHARE)
    return f"memory: {where} {capacity}, {most}; the nearest would take {step}{quicker}"


def _slower(found: Alternative, base: Checked) -> bool:
    made = found.estimate
    return made is None or made.step_time_s > base.estimate.step_time_s


def _no_slower(found: Alternative, base: Checked) -> str:
    """Why a plan that is as quick or quicker was not chosen."""
    assert found.decisions is not None and found.estimate is not None
    more = axes_used(found.decisions) - axes_used(base.plan.decisions)
    gain = -_change(base.estimate, found.estimate)
    each = base.plan.solver.axis_gain_ppm
    scores = [score_of(e.step_time_ps, d, each) for e, d in
              ((base.estimate, base.plan.decisions), (found.estimate, found.decisions))]
    if more > 0 and scores[0] <= scores[1] * (1 + LEAST_SHARE):
        axes = "axis" if more == 1 else "axes"
        return f"quicker by less than {more} more {axes} must earn ({each * 100 / PPM:g}% each)"
    pace = f"quicker by {gain:.1%}" if gain >= LEAST_SHARE else "as quick"
    if base.plan.solver.objective != "time":
        return f"{pace}; the plan was chosen for {base.plan.solver.objective}, this is not"
    unasked = [key for key, _ in found.refused if key in UNSEARCHED]
    if unasked and not base.plan.solver.pins:
        return f"{pace}; {' and '.join(unasked)} is not searched unless a pin says so"
    pinned = f"pinned to {pins_words(base.plan)}" if base.plan.solver.pins else "pinned"
    return f"{pace}; the plan was {pinned}, or made with other constants or effort"


def _short(found: Alternative, base: Checked) -> str:
    b = found.binding
    if b.kind == "rule":
        return f"rule: {b.reason}"
    of = f" of {b.part}" * bool(b.part)
    memory = f"memory: rank {b.pp_rank}{of} +{format_bytes(b.over_bytes)} ({b.component})"
    if not _slower(found, base):
        return _no_slower(found, base) + f"; {memory}" * (b.kind == "memory")
    if b.kind == "memory":
        return memory
    return f"time: {b.component} {_signed(b.more_s)}"


def _head(base: Checked) -> list[str]:
    """The plan in two lines: what fills its memory, what fills its step."""
    e = base.estimate
    worst = e.fullest
    name, most = max(worst.memory_bytes, key=lambda row: row[1])
    parts = sorted(e.breakdown_ps, key=lambda row: -row[1])[:3]
    return [
        f"step {format_seconds(e.step_time_s)} +-{e.error:.0%}: "
        + ", ".join(f"{part} {ps / e.step_time_ps:.0%}" for part, ps in parts),
        f"memory of {worst.name}: {format_bytes(e.peak_memory_bytes)} of "
        f"{format_bytes(e.capacity_bytes)}, {name} {format_bytes(most)}",
    ]


def _parts(old: Estimate, new: Estimate) -> list[tuple[str, float, float]]:
    then = dict(old.breakdown_ps)
    least = LEAST_SHARE * old.step_time_ps
    rows = [(k, then[k], ps) for k, ps in new.breakdown_ps if abs(ps - then[k]) >= least]
    return [(k, a / 1e12, b / 1e12) for k, a, b in sorted(rows, key=lambda r: -abs(r[2] - r[1]))]


def _change(old: Estimate, new: Estimate) -> float:
    return new.step_time_s / old.step_time_s - 1


def _within(old: Estimate, new: Estimate) -> bool:
    return abs(_change(old, new)) <= max(old.error, new.error)


def _signed(seconds: float) -> str:
    return ("-" if seconds < 0 else "+") + format_seconds(abs(seconds))


def _row(name: str, text: str) -> list[str]:
    """A named row, its words folded to the width."""
    lines, room = [f"  {name:9}"], WIDTH
    for word in text.split(" "):
        if len(lines[-1]) + len(word) + 1 > room:
            lines.append(" " * 11)
        lines[-1] += word if lines[-1].endswith(" " * 2) or lines[-1].isspace() else f" {word}"
    return lines
