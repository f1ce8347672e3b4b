"""Markup that is safe by construction: whatever is not `Html` is escaped on its way in."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

from planner.plain import STEERING

VOID = ("meta", "br", "input", "rect", "line", "path", "col", "wbr")
_ODD = re.compile(f"[{STEERING}\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Text that is markup already; made by `el` and `join` alone."""

    __slots__ = ()


Child = Html | str | int | float | None
Children: TypeAlias = "Child | Iterable[Children]"


def escape(text: object) -> str:
    """Any text for an element or a quoted attribute; what no page may hold becomes U+FFFD."""
    return html.escape(_ODD.sub("\ufffd", str(text)), quote=True)


def join(children: Iterable[Children], between: str = "") -> Html:
    """Markup one after the other; plain text is escaped."""
    return Html(escape(between).join(_inner(child) for child in children))


def el(tag: str, *children: Children, **attributes: object) -> Html:
    """An element. An attribute that is None or False is left out, True stands alone; `class_` is
    class, `data_tip` data-tip."""
    said = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
        for name, value in attributes.items() if value is not None and value is not False
    )  # fmt: skip
    if tag in VOID:
        return Html(f"<{tag}{said}/>")
    return Html(f"<{tag}{said}>{join(children)}</{tag}>")


def _inner(child: Children) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str | int | float):
        return escape(child)
    return join(child)
