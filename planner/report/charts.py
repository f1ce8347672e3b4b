"""What charts share: a frame that asks for a table, rows of bars, legends.

Widths are percentages of the page's, so that no text is ever scaled; names of colours are classes,
whose values are in `report.css` for light, dark and print.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.report.markup import Children, Html, el, join

BAR_PX = 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A piece of a bar, from and to as shares of its width. kind: names its colour."""

    start: float
    end: float
    kind: str
    tip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the page. lede: what to see in it, in a sentence or two."""

    key: str
    title: str
    lede: Children
    body: Html


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[Children]], *, words: int = 1,
    last_words: int = 0, total: bool = False,
) -> Html:  # fmt: skip
    """A table whose first `words` columns and `last_words` last ones are words, which wrap, and
    the rest numbers, which do not. total: the last row is."""
    body = [list(row) for row in rows]

    def kind(at: int) -> str:
        return "words" if at < words or at >= len(head) - last_words else "number"

    def cell(at: int, value: Children, last: bool) -> Html:
        return el("th" if at == 0 else "td", value, class_=kind(at) + " total" * last,
                  scope="row" if at == 0 else None)  # fmt: skip

    return el(
        "div",
        el(
            "table", el("caption", caption),
            el("thead", el("tr", [
                el("th", name, scope="col", class_=kind(at))
                for at, name in enumerate(head)
            ])),
            el("tbody", [
                el("tr", [cell(at, value, total and n == len(body) - 1)
                          for at, value in enumerate(row)])
                for n, row in enumerate(body)
            ]),
        ),
        class_="scroll", tabindex=0, role="region", aria_label=caption,
    )  # fmt: skip


def figure(label: str, chart: Children, behind: Html, *, note: Children = None) -> Html:
    """A chart with the table of its numbers behind it. label: what the chart says, for a reader
    who does not see it."""
    return el(
        "figure",
        el("div", chart, class_="chart", role="group", aria_roledescription="chart",
           aria_label=f"{label} The table below has the numbers.", tabindex=0),
        el("figcaption", note) if note else None,
        el("details", el("summary", "Numbers as a table"), behind),
    )  # fmt: skip


def bar(marks: Iterable[Mark], *, lines: Iterable[tuple[float, str]] = (), height: int = BAR_PX,
        kind: str = "bar") -> Html:  # fmt: skip
    """One bar of marks; lines: (where, what) across it."""
    drawn = [
        el("rect", x=_percent(m.start), width=_percent(max(0.0, m.end - m.start)), y=0,
           height=height, class_=f"k-{m.kind}", data_tip=m.tip or None)
        for m in marks if m.end > m.start
    ]  # fmt: skip
    ruled = [
        el("line", x1=_percent(x), x2=_percent(x), y1=0, y2=height, class_="limit", data_tip=what)
        for x, what in lines
    ]
    return el("svg", drawn, ruled, class_=kind, width="100%", height=height, aria_hidden="true",
              focusable="false")  # fmt: skip


def row(name: Children, drawn: Children, amount: Children, kind: str = "row") -> Html:
    """A line of a chart: what, its bar, how much."""
    return el("div", el("div", name, class_="what"), el("div", drawn, class_="drawn"),
              el("div", amount, class_="amount"), class_=kind)  # fmt: skip


def legend(entries: Iterable[tuple[str, str]]) -> Html:
    """What the colours mean: (kind, name) each."""
    return el("ul", [
        el("li", el("svg", el("rect", width=12, height=12, class_=f"k-{kind}"), width=12,
                    height=12, aria_hidden="true"), name)
        for kind, name in entries
    ], class_="legend")  # fmt: skip


def stacked(parts: Iterable[tuple[str, float, str]], scale: float) -> list[Mark]:
    """Parts (kind, size, tip) end to end on a bar as wide as `scale`."""
    found, at = [], 0.0
    for kind, size, tip in parts:
        found.append(Mark(start=at / scale, end=(at + size) / scale, kind=kind, tip=tip))
        at += size
    return found


def strong(text: Children) -> Html:
    """A number that a sentence is about."""
    return el("strong", text)


def sentences(*parts: Children) -> Html:
    """Sentences with a space between them; empty ones left out."""
    return join([p for p in parts if p], " ")


def spread(count: int, most: int, *, always: Iterable[int] = ()) -> list[int]:
    """Which of so many rows are drawn: all, or the first, the last, evenly many between, and
    these."""
    if count <= most:
        return list(range(count))
    even = {round(i * (count - 1) / (most - 1)) for i in range(most)}
    return sorted(even | {*always})


def breakable(name: str) -> list[Html | str]:
    """A key or a pin, which a narrow page may break behind its signs."""
    parts = re.split(r"(?<=[_=,:])", name)
    return [x for part in parts for x in (part, el("wbr"))][:-1]


def title_of(name: str) -> str:
    """A key of the ledger as words: tp_comm -> tp comm."""
    return name.replace("_", " ")


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"
