"""The page: one plan's sections in a column, or two plans' side by side."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from planner.plan import PLANNER_VERSION
from planner.report.charts import Section
from planner.report.markup import Children, Html, el, join

OLD_NEW = ("Old", "New")
Row = tuple[Section, ...]  # one section, or the same one of two plans


def document(title: str, about: Sequence[str], verdicts: Html, rows: Sequence[Row]) -> str:
    """The whole document. Nothing but itself is loaded, and no script but its own runs.

    about: what the plan, or each of two, is for.
    """
    style, script = (_file(f"report.{kind}") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}';"
        " base-uri 'none'; form-action 'none'"
    )
    head = el(
        "head", el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="generator", content=f"Meshwright {PLANNER_VERSION}"),
        el("title", f"{title}: plan report"), el("style", Html(style)),
    )  # fmt: skip
    links = [el("li", el("a", row[0].title, href=f"#{row[0].key}")) for row in rows]
    body = el(
        "body",
        el("a", "Skip to the report", href="#main", class_="skip"),
        el(
            "header",
            el("div", el("p", "Meshwright plan report", class_="eyebrow"),
               el("button", "Theme: system", type="button", id="theme", class_="quiet",
                  aria_live="polite"), class_="masthead"),
            el("h1", title),
            [el("p", words, class_="subtitle") for words in _named(about)],
        ),
        el("nav", el("ul", links), aria_label="Sections"),
        el("main", verdicts, [_section(row, len(about)) for row in rows], id="main", tabindex=-1),
        el("footer", el("p", f"Meshwright {PLANNER_VERSION}. Predicted, not measured. The same"
                        " plan gives the same page, byte for byte; it loads nothing.")),
        el("div", id="tip", role="status", aria_live="polite", hidden=True),
        el("script", Html(script)),
    )  # fmt: skip
    return "<!DOCTYPE html>\n" + el("html", head, body, lang="en") + "\n"


def pair(parts: Sequence[Children]) -> Html:
    """The same of the old plan and of the new one, beside each other; of one plan, alone."""
    if len(parts) == 1:
        return join(parts)
    return el("div", [el("div", el("h3", word), part) for word, part in zip(OLD_NEW, parts)],
              class_="pair")  # fmt: skip


def _named(parts: Sequence[Children]) -> list[Children]:
    if len(parts) == 1:
        return list(parts)
    return [[el("b", f"{word}: "), part] for word, part in zip(OLD_NEW, parts)]


def _section(row: Row, plans: int) -> Html:
    """plans: of the page. What two have one section for is of the new one, but what changed."""
    first, title = row[0], f"{row[0].key}-title"
    new = el("h3", OLD_NEW[-1]) if len(row) < plans and first.key != "changes" else None
    parts = [join([el("p", one.lede, class_="lede"), one.body]) for one in row]
    return el("section", el("h2", first.title, id=title), new, pair(parts), id=first.key,
              aria_labelledby=title)  # fmt: skip


def _file(name: str) -> str:
    return (files("planner.report") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """How a content policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
