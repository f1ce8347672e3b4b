"""What `plan size` compared, as text at 80 columns or as one JSON document."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cost_models.fleet import Fleet, used_parts
from cost_models.operations import SOURCES, Operations
from cost_models.units import (
    format_bytes,
    format_bytes_per_s,
    format_count,
    format_seconds,
    format_short_rate,
)
from planner.decisions import summarise_recompute
from planner.decisions_json import decisions_json
from planner.plan_text import workload_json
from planner.sizing import PAST, Left, Sized, Sizing
from planner.sizing_options import Question

WIDTH = 80
DAY_S = 86_400
BEST = {
    "time": "fastest", "cost": "cheapest", "spot": "cheapest on spot", "energy": "least energy",
    "gpus": "fewest GPUs", "memory": "most memory free",
}  # fmt: skip
LEFT = {
    "slow": "too slow", "memory": "do not fit", "cost": "too expensive",
    "unpriced": "have no price",
    "dominated": "cannot beat a row in anything", "gpus": "have more GPUs than may be",
}  # fmt: skip
Column = tuple[str, int, Callable[[Sized], str]]
Without = Sequence[tuple[str, tuple[str, ...]]]  # (why, names) of devices that cannot take part


def size_text(found: Sizing, asked: Question, *, every: bool = False) -> str:
    """The front, best first; every: also the rows that are not on it."""
    rows = ordered(found, asked.objective)
    shown = [row for row, on in rows if on or every]
    columns = _columns(found, asked)
    lines = [*_head(found, asked), "", in_columns([(name, width) for name, width, _ in columns])]
    lines += [in_columns([(cell(row), width) for _, width, cell in columns]) for row in shown]
    searched = f"{found.searched} searched, {len(found.rows)} reach the target"
    sums = [row.hardware.spec for row, on in rows if not on and isinstance(row.hardware, Fleet)]
    left = left_out(found.left, asked.without, LEFT, searched, found.on_front, sums)
    return "\n".join([*lines, "", *_best(found), *left, *_assumed(found, asked)])


def ordered(found: Sizing, objective: str) -> list[tuple[Sized, bool]]:
    """Rows with their place on the front, best first by one axis, then by all in order."""
    axes = (objective, *found.axes)

    def key(row: Sized) -> tuple[object, ...]:
        return (*(row.value(axis) for axis in axes), row.hardware.spec)

    return sorted(zip(found.rows, found.on_front), key=lambda pair: key(pair[0]))


def _head(found: Sizing, asked: Question) -> list[str]:
    w, g = asked.workload, asked.graph
    length = f"{w.global_batch} x {w.seq_len} tokens" if g.seq_in_input else str(w.global_batch)
    limits = ", ".join(asked.limits_said) or "none but the hardware's"
    most = f"{PAST:g} times the target"
    return [
        f"{g.name}, {format_count(g.parameter_count)} parameters",
        *named("workload", f"batch {length}, {w.precision}, {w.optimizer}, {w.engine}"),
        *named("target", ", ".join(asked.targets_said)),
        *named("limits", limits),
        *named("front", f"{', '.join(found.axes)}; rates beyond {most} count as alike"),
    ]


def _columns(found: Sizing, asked: Question) -> list[Column]:
    """What there is to tell of a row; prices where the user gave some."""
    unit = asked.unit
    name = 1 + max(len(row.hardware.spec) for row in found.rows)
    columns: list[Column] = [
        ("hardware", -max(name, 9), lambda r: r.hardware.spec),
        ("step", 8, lambda r: format_seconds(r.estimate.step_time_s)),
        (f"{unit}/s", 2 + len(unit) + 1, lambda r: format_short_rate(r.expected_tokens_per_s)),
        ("useful", 7, lambda r: f"{r.expected_tokens_per_s / r.tokens_per_s:.1%}"),
    ]
    if asked.tokens:
        columns.append(("days", 6, lambda r: _days_text(_days(r, asked))))
    if "cost" in found.axes:
        columns.append(("$/M", 9, lambda r: usd_text(r.usd_per_million_tokens)))
    if "spot" in found.axes:
        columns.append(("spot", 9, lambda r: usd_text(r.spot_usd_per_million_tokens)))
    columns += [
        (f"J/{unit[:-1]}", len(unit) + 3, lambda r: f"{r.joules_per_token:.3g}"),
        ("free", 9, lambda r: format_bytes(r.headroom_bytes)),
    ]
    taken = sum(abs(width) for _, width, _ in columns)
    if taken + 18 <= WIDTH:
        columns.append(("", -(WIDTH - taken), lambda r: "  " + _mesh(r)))
    return columns


def _days_text(days: float) -> str:
    return f"{days:.1f}" if days < 1000 else f"{days:.0f}"


def _mesh(row: Sized) -> str:
    d = row.decisions
    if isinstance(row.hardware, Fleet) and d.gpus < row.hardware.count:
        return f"{used_parts(row.hardware, d)[0].name} alone"
    sizes = {"pp": d.pp, "dp": d.dp, "cp": d.cp, "tp": d.tp, "ep": d.ep, "etp": d.etp}
    return " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)


def _days(row: Sized, asked: Question) -> float:
    return (asked.tokens or 0) / row.expected_tokens_per_s / DAY_S


def usd_text(usd: float | None) -> str:
    """A price; "-" where none is known."""
    return "-" if usd is None else f"{usd:.3g}"


def in_columns(cells: Sequence[tuple[str, int]]) -> str:
    """Cells of so many letters each, to the left where that is negative."""
    return "".join(
        text.ljust(-width) if width < 0 else text.rjust(width) for text, width in cells
    ).rstrip()


def _best(found: Sizing) -> list[str]:
    """The first of the front by each axis."""
    words = []
    for axis in (a for a in BEST if a in (*found.axes, "memory")):
        first = next(row for row, on in ordered(found, axis) if on)
        words.append(f"{BEST[axis]} {first.hardware.spec}")
    return named("best", "; ".join(words))


def left_out(
    left: Sequence[Left], without: Without, words: Mapping[str, str], searched: str,
    on_front: Sequence[bool], sums: Sequence[str] = (),
) -> list[str]:
    """How many were searched, and why the others were not. words: of each reason. sums: of several
    kinds, which were asked for by name, those that are beaten; those that are left out are named
    too."""
    reasons = Counter(one.reason for one in left)
    joint = {reason: [one.hardware for one in left if one.reason == reason and "+" in one.hardware]
             for reason in reasons}  # fmt: skip
    said = [
        f"{count} {words[reason]}" + (f" ({', '.join(joint[reason])})" if joint[reason] else "")
        for reason, count in sorted(reasons.items())
    ]
    said += [f"{len(names)} {why}: {', '.join(names)}" for why, names in without if names]
    off = len(on_front) - sum(on_front)
    searched += f", {off} of them beaten in everything (--all)" if off else ""
    searched += f": {', '.join(sums)}" if sums else ""
    return [*named("searched", searched), *(named("left out", "; ".join(said)) if said else [])]


def _assumed(found: Sizing, asked: Question) -> list[str]:
    o = asked.operations
    errors = [row.estimate.error for row in found.rows]
    apart = dict.fromkeys(f"+-{error:.0%}" for error in (min(errors), max(errors)))
    reads = max(row.inputs.node_bytes_per_s for row in found.rows)
    lines = [
        *named("columns", f"{asked.unit}/s: expected; free: memory of the fullest GPU"
              + ("; $/M, spot: USD a million" if asked.prices else "")),
        *named("error", f"steps {' to '.join(apart)}; gaps up to "
              f"{max(row.gap for row in found.rows):.0%}: plan trace searches one in full"),
        *named("input", f"a node reads {format_bytes_per_s(reads)} at most"),
        *named("assumed", f"energy: device power x PUE {o.pue:g}{_of(o, 'pue')}; no hosts or"
              " switches"),
        *named("", f"{o.failures_per_gpu_hour:.3g} failures a GPU hour"
              f"{_of(o, 'failures_per_gpu_hour')}"),
        *named("", f"restart {o.restart_s:g} s{_of(o, 'restart_s')}, then the checkpoint is read"),
        *named("", f"checkpoints on {o.tier or 'the last tier'}{_of(o, 'tier')}"),
    ]  # fmt: skip
    if not {"cost", "spot"} & set(found.axes):
        lines += named("prices", "none given, so no cost: --prices FILE")
    return lines


def _of(o: Operations, name: str) -> str:
    """Where a default is from; nothing of what the user set."""
    return f" ({SOURCES[name]})" if getattr(o, name) == getattr(Operations(), name) else ""


def named(name: str, text: str) -> list[str]:
    """A row of words behind its name, wrapped."""
    wrapped = textwrap.wrap(text, WIDTH - 12, break_on_hyphens=False)
    return [f"  {name if not i else '':10}{line}" for i, line in enumerate(wrapped)]


# --- JSON ---------------------------------------------------------------------------------------


def size_json(found: Sizing, asked: Question) -> dict[str, Any]:
    """All candidates with a plan that reaches the target, base units; best first."""
    rows = ordered(found, asked.objective)
    return {
        "schema": "size/1",
        "model": {"name": asked.graph.name, "parameters": asked.graph.parameter_count},
        "workload": workload_json(asked.workload),
        "target": {
            "tokens_per_s": asked.target.tokens_per_s,
            "step_time_s": _finite(asked.target.step_time_s),
            "tokens": asked.tokens,
        },
        "limits": asdict(asked.limits),
        "objective": asked.objective,
        "axes": list(found.axes),
        "rate_counts_up_to_target_times": PAST,
        "assumed": {
            name: {"value": value, "source": SOURCES[name] if _of(asked.operations, name) else None}
            for name, value in asdict(asked.operations).items()
        },
        "candidates": [_candidate(row, on, asked) for row, on in rows],
        "searched": found.searched,
        "left_out": left_json(found.left, asked.without),
    }


def left_json(left: Sequence[Left], without: Without) -> list[dict[str, Any]]:
    """What was not compared, and why."""
    apart = ({"hardware": name, "reason": why} for why, names in without for name in names)
    return [*map(asdict, left), *apart]


def _candidate(row: Sized, on_front: bool, asked: Question) -> dict[str, Any]:
    e, d = row.estimate, row.decisions
    kept = None if row.goodput is None else {
        key: _finite(value) for key, value in asdict(row.goodput).items()
    }  # fmt: skip
    return {
        "hardware": row.hardware.spec,
        "gpus": row.gpus,
        "on_front": on_front,
        "step_time_s": e.step_time_s,
        "error": e.error,
        "mfu": e.mfu,
        "tokens_per_s": row.tokens_per_s,
        "expected_tokens_per_s": row.expected_tokens_per_s,
        "days": _days(row, asked) if asked.tokens else None,
        "usd_per_million_tokens": row.usd_per_million_tokens,
        "spot_expected_tokens_per_s": row.spot_expected_tokens_per_s,
        "spot_usd_per_million_tokens": row.spot_usd_per_million_tokens,
        "joules_per_token": row.joules_per_token,
        "peak_memory_bytes": e.peak_memory_bytes,
        "capacity_bytes": e.capacity_bytes,
        "headroom_bytes": row.headroom_bytes,
        "gap": row.gap,
        "decisions": decisions_json(d) | {"recompute": str(summarise_recompute(d))},
        "goodput": kept,
        "input": asdict(row.inputs),
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and math.isinf(value) else value
