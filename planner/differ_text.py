"""A diff as text, as markdown for a pull request's comment, and as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from cost_models.units import format_bytes, format_seconds, format_short_rate
from planner.attribution import TOGETHER, Effect
from planner.differ import Change, Diff, Number
from planner.serving.effects import HEADS, TITLE, ServingEffect, effects_json, effects_text
from planner.wrapping import wrapped

SCHEMA = "diff/1"
MOST_CHARACTERS = 60_000  # GitHub takes 65,536 in a comment
TAG = "meshwright-plan-diff"  # in a hidden comment: what updates a comment in place looks for


def diff_text(d: Diff) -> str:
    """The diff as text: the verdict first."""
    lines = [d.verdict, ""]
    if d.drift:
        lines[1:1] = [f"({_drift(d.drift)})"]
    for n in d.numbers:
        noise = "  within model error" if n.within_error and n.moved else ""
        change = f"{n.change:+.1%}" if n.moved else "="
        lines.append(
            f"  {n.name:14}{amount(n, n.old):>12} -> {amount(n, n.new):<12}{change:>8}{noise}"
        )
    lines += _section("decisions", d.decisions)
    if told_apart(d.effects, d):
        lines += ["", "what each change does alone, the old plan otherwise as it is"]
        lines += [f"{_seconds(row):>12}{_bytes(row):>12}  {_what(row)}" for row in d.effects]
    if told_apart(d.serving_effects, d):
        lines += ["", *effects_text(d.serving_effects)]
    lines += _section("stages", d.stages)
    lines += _section("blocks: format and place", d.blocks)
    lines += _section("placements on tp", d.placements)
    if d.renamed:
        lines += ["", "renamed", *(f"  {a} -> {b}" for a, b in d.renamed)]
    lines += _section("inputs", d.inputs)
    return "\n".join(map(wrapped, lines))


def told_apart(rows: Sequence[Effect] | Sequence[ServingEffect], d: Diff) -> bool:
    """Whether rows say more than the figures: of several changes, or of a lone input, which no list
    of decisions names."""
    return len(rows) > 1 or (bool(rows) and not (d.decisions or d.blocks))


def diff_json(d: Diff) -> dict[str, Any]:
    """The diff as one document with stable keys, base units."""
    return {
        "schema": SCHEMA,
        "verdict": d.verdict,
        "differs": d.differs,
        "numbers": [_number_json(n) for n in d.numbers],
        "drift": None if d.drift is None else _number_json(d.drift),
        "effects": [
            {"changes": list(row.keys), "step_time_s": row.step_time_ps / 1e12,
             "peak_memory_bytes": row.peak_memory_bytes}
            for row in d.effects
        ],
        **({"serving_effects": effects_json(d.serving_effects)} if d.serving_effects else {}),
        **{
            key: [{"what": c.what, "old": c.old, "new": c.new} for c in getattr(d, key)]
            for key in ("decisions", "stages", "blocks", "placements", "inputs")
        },
        "renamed": [{"old": a, "new": b} for a, b in d.renamed],
    }  # fmt: skip


def diff_markdown(d: Diff, plan: str = "plan.json") -> str:
    """The diff for a pull request's comment, under MOST_CHARACTERS: a hidden tag that names the
    plan, a headline, the figures, and the rest folded. Words of the plans are code, never markup.
    """
    lines = [f"<!-- {tag(plan)} -->", f"### {_code(plan)}: {d.verdict}", ""]
    if d.differs or any(n.moved for n in d.numbers):
        lines += ["| | before | after | change |", "|---|---:|---:|---:|"]
        for n in d.numbers:
            noise = " (within model error)" if n.within_error and n.moved else ""
            change = f"{n.change:+.1%}{noise}" if n.moved else "="
            lines.append(f"| {n.name} | {amount(n, n.old)} | {amount(n, n.new)} | {change} |")
        lines.append("")
    if d.drift:
        lines += [f"{_drift(d.drift)[:1].upper()}{_drift(d.drift)[1:]}.", ""]
    effects = [
        f"| {_code(_what(row)) if row.keys != (TOGETHER,) else _what(row)} | {_seconds(row)}"
        f" | {_bytes(row)} |"
        for row in d.effects
    ]
    served = [
        f"| {_code(row.what)}{f' ({row.note})' if row.note else ''} | {' | '.join(row.cells)} |"
        for row in d.serving_effects
    ]
    tables = [
        ("Decisions", ("what", "before", "after", "meaning"), _rows(d.decisions, meaning=True)),
        ("What each change does alone, the old plan otherwise as it is",
         ("what", "step time", "peak memory"), effects if told_apart(d.effects, d) else []),
        (TITLE, ("what", *HEADS), served if told_apart(d.serving_effects, d) else []),
        ("Stages", ("what", "before", "after"), _rows(d.stages)),
        ("Blocks: format and place", ("what", "before", "after"), _rows(d.blocks)),
        ("Placements on tp", ("what", "before", "after"), _rows(d.placements)),
        ("Renamed", ("before", "after"),
         [f"| {_code(a)} | {_code(b)} |" for a, b in d.renamed]),
        ("Inputs", ("what", "before", "after"), _rows(d.inputs)),
    ]  # fmt: skip
    tables = [table for table in tables if table[2]]
    room = MOST_CHARACTERS - len("\n".join(lines)) - 500 * len(tables)
    for place, (title, heads, rows) in enumerate(tables):
        table = _folded(title, heads, rows, room // (len(tables) - place), opened=place == 0)
        room -= len("\n".join(table))
        lines += table
    return "\n".join(lines).rstrip()


def tag(plan: str) -> str:
    """What marks the comment about a plan: the file's path, with nothing that ends a comment."""
    return f"{TAG} {re.sub('-+', '-', re.sub('[^A-Za-z0-9._/-]', '_', plan))[:200]}"


def _folded(
    title: str, heads: Sequence[str], rows: Sequence[str], most: int, *, opened: bool
) -> list[str]:
    """A table inside <details>, as many rows as `most` characters hold."""
    shown: list[str] = []
    for row in rows:
        most -= len(row) + 1
        if most < 0:
            break
        shown.append(row)
    left = len(rows) - len(shown)
    more = ["", f"and {left} more: `plan diff` lists them"] if left else []
    return [
        f"<details{' open' * opened}><summary>{title} ({len(rows)})</summary>", "",
        f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *shown, *more, "", "</details>", "",
    ]  # fmt: skip


def _rows(changes: Iterable[Change], *, meaning: bool = False) -> list[str]:
    return [
        f"| {_code(c.what)} | {_code(c.old)} | {_code(c.new)} |"
        + (f" {_plain(c.meaning)} |" if meaning else "")
        for c in changes
    ]


def _code(text: str) -> str:
    """A word of a plan as code in a table: no markup, link, mention or new column comes of it."""
    clean = "".join(c if c.isprintable() else " " for c in text).replace("`", "'").strip()
    return "`" + (clean.replace("|", "\\|") or " ") + "`"


def _plain(text: str) -> str:
    """Words of ours in a table."""
    return text.replace("|", "\\|").replace("*", "\\*")


def _drift(n: Number) -> str:
    return (
        f"the old plan said {n.name} {amount(n, n.old)}; with today's inputs it is "
        f"{amount(n, n.new)}: drift {n.change:+.1%}, not counted below"
    )


def _number_json(n: Number) -> dict[str, Any]:
    return {"name": n.key, "old": n.old, "new": n.new, "change": n.change,
            "within_error": n.within_error}  # fmt: skip


def _section(title: str, changes: Iterable[Change]) -> list[str]:
    lines = [
        f"  {c.what}: {c.old} -> {c.new}" + (f"   ({c.meaning})" if c.meaning else "")
        for c in changes
    ]
    return ["", title, *lines] if lines else []


def effect_words(row: Effect) -> tuple[str, str, str]:
    """What changed, and what that does to the step and to the peak memory."""
    return _what(row), _seconds(row), _bytes(row)


def _what(row: Effect) -> str:
    return "all of them at once, beyond that" if row.keys == (TOGETHER,) else ", ".join(row.keys)


def _seconds(row: Effect) -> str:
    return _signed(row.step_time_ps, format_seconds(abs(row.step_time_ps) / 1e12))


def _bytes(row: Effect) -> str:
    return _signed(row.peak_memory_bytes, format_bytes(abs(row.peak_memory_bytes)))


def _signed(value: float, said: str) -> str:
    return ("+" if value > 0 else "-") + said if value else "="


def amount(n: Number, value: float) -> str:
    """A figure as people read it."""
    if n.unit == "s":
        return format_seconds(value)
    if n.unit == "B":
        return format_bytes(value)
    return f"{value:.1%}" if n.unit == "%" else format_short_rate(value)
