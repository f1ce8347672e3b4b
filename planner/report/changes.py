"""What changed between two plans: the verdict, the figures, what each change does alone."""

from __future__ import annotations

from collections.abc import Sequence

from planner.differ import Change, Diff, Number
from planner.differ_text import amount, effect_words
from planner.report.charts import Mark, Section, bar, breakable, figure, row, sentences, table
from planner.report.markup import Html, el, join
from planner.serving.effects import HEADS, TITLE


def section(d: Diff) -> Section:
    """The difference of two plans, of training or of serving."""
    drift = d.drift
    lede = sentences(
        f"{d.verdict[:1].upper()}{d.verdict[1:]}.",
        "Both plans are costed with today's inputs.",
        f"The old plan said {amount(drift, drift.old)} when it was written; with today's inputs it"
        f" is {amount(drift, drift.new)}." if drift else None,
    )
    lists = [
        _changes("Decisions that changed", d.decisions, "decision"),
        _changes("Stages", d.stages, "units", folded=True),
        _changes("Blocks: format and place", d.blocks, "block"),
        _changes("Placements on tp", d.placements, "parameters", folded=True),
        _changes("What they were made for", d.inputs, "input"),
        table("Renamed modules, paired by shape and order", ["old", "new"], d.renamed, words=2)
        if d.renamed else None,
    ]
    return Section(
        key="changes", title="What changed", lede=lede,
        body=join([_numbers(d.numbers), _effects(d), _serving_effects(d), *lists]),
    )  # fmt: skip


def _numbers(numbers: Sequence[Number]) -> Html:
    """Each figure of both plans as two bars."""
    rows = []
    for n in numbers:
        most = max(n.old, n.new) or 1.0
        for word, value, kind in (("old", n.old, "old"), ("new", n.new, "new")):
            tip = f"{n.name}, {word}: {amount(n, value)}"
            rows.append(row(f"{n.name}, {word}",
                            bar([Mark(start=0, end=value / most, kind=kind, tip=tip)], height=16),
                            amount(n, value) + ("" if word == "old" else f" {_change(n):>7}"),
                            "row pairs"))  # fmt: skip
    behind = table(
        "Figures of both plans", ["figure", "old", "new", "change", "told apart?"],
        [[n.name, amount(n, n.old), amount(n, n.new), _change(n), _said(n)] for n in numbers],
    )  # fmt: skip
    return figure("Figures of the old and the new plan.", el("div", rows, class_="rows"), behind)


def _change(n: Number) -> str:
    return f"{n.change:+.1%}" if n.moved else "="


def _said(n: Number) -> str:
    if not n.moved:
        return "the same"
    return f"no: within the model's error of {n.error:.0%}" if n.within_error else "yes"


def _effects(d: Diff) -> Html | None:
    """What each change does to the step alone, and all at once beyond that."""
    if len(d.effects) < 2:
        return None
    words = [effect_words(e) for e in d.effects]
    rows = _bars([(what, said, e.step_time_ps, f"{said}, {size}")
                  for (what, said, size), e in zip(words, d.effects)], "the old plan")  # fmt: skip
    behind = table("What each change does alone, the old plan otherwise as it is",
                   ["change", "step", "peak memory"], words)
    return join([
        el("h3", "What each change does alone"),
        figure("The step with one change at a time; the rows sum to the whole.",
               el("div", rows, class_="rows"), behind),
    ])  # fmt: skip


def _serving_effects(d: Diff) -> Html | None:
    """What each change does to a token's time, on top of those before it; the rest in a table."""
    if len(d.serving_effects) < 2:
        return None
    rows = _bars([(e.what, e.cells[1], e.tpot_ps, ", ".join(e.cells)) for e in d.serving_effects],
                 "as before")  # fmt: skip
    behind = table(f"{TITLE}, old to new", ["change", *HEADS, "note"],
                   [[e.what, *e.cells, e.note] for e in d.serving_effects])  # fmt: skip
    return join([
        el("h3", f"{TITLE}: the time between tokens"),
        figure("Time between tokens, changed by each on top of those before it; the rows sum to the"
               " whole.", el("div", rows, class_="rows"), behind),
    ])  # fmt: skip


def _bars(effects: Sequence[tuple[str, str, int, str]], line: str) -> list[Html]:
    """A bar for each (what, its words, picoseconds, tip): right of the line what takes longer."""
    most = max(abs(ps) for _, _, ps, _ in effects) or 1
    rows = []
    for what, seconds, ps, tip in effects:
        share = 0.5 * ps / most
        mark = Mark(start=min(0.5, 0.5 + share), end=max(0.5, 0.5 + share),
                    kind="worse" if share > 0 else "better", tip=f"{what}: {tip}")
        rows.append(row(breakable(what), bar([mark], lines=[(0.5, line)]), seconds))
    return rows


def _changes(
    title: str, changes: Sequence[Change], what: str, *, folded: bool = False
) -> Html | None:
    if not changes:
        return None
    made = table(
        title, [what, "old", "new"],
        [[[c.what, el("span", c.meaning, class_="about") if c.meaning else None], c.old, c.new]
         for c in changes], words=3,
    )  # fmt: skip
    if not folded:
        return made
    count = el("span", f"{len(changes)}", class_="count")
    return el("details", el("summary", title, count), made)
