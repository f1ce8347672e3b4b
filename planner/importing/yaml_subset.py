"""The part of YAML that launchers' configurations are written in: mappings by indentation, scalars,
quotes, comments. No anchors, tags or flow collections beyond empty ones: what is not read is an
error with its line."""

from __future__ import annotations

import re

from ir.errors import PlanError
from planner.importing.settings import Setting

_ROW = re.compile(r"( *)([A-Za-z_][A-Za-z0-9_.-]*)\s*:(?:\s+(.*))?")
_MOST_LINES = 5_000


def parse(text: str, source: str) -> dict[str, Setting]:
    """Scalars by the dotted path of their keys. Raises PlanError for a line that is not read."""
    found: dict[str, Setting] = {}
    open_: list[tuple[int, str]] = []  # (indentation of what is inside, its dotted prefix)
    pending = ""
    lines = text.splitlines()
    if len(lines) > _MOST_LINES:
        raise PlanError(f"{source} has more than {_MOST_LINES:,} lines")
    for number, raw in enumerate(lines, 1):
        line = raw.rstrip()
        if not line.strip() or line.lstrip().startswith("#") or line.strip() in ("---", "..."):
            continue
        if line.lstrip().startswith("- ") and pending:  # a list of words: told as one value
            known = found.get(pending, Setting(value="", line=number)).value
            found[pending] = Setting(value=f"{known} {line.strip()[2:]}".strip(), line=number)
            continue
        match = _ROW.fullmatch(line)
        if match is None:
            raise PlanError(f"line {number} is not read: {line.strip()[:60]!r}",
                            where=f"{source}:{number}",
                            why="expected KEY: VALUE, by two spaces inside a section")  # fmt: skip
        depth = len(match[1])
        while open_ and depth < open_[-1][0]:
            open_.pop()
        if pending and depth > (open_[-1][0] if open_ else 0) and pending not in found:
            open_.append((depth, f"{pending}."))
        if depth != (open_[-1][0] if open_ else 0):
            raise PlanError(f"line {number} is indented unlike its section",
                            where=f"{source}:{number}")  # fmt: skip
        name = (open_[-1][1] if open_ else "") + match[2]
        if name in found:
            raise PlanError(f"{name} is given twice", where=f"{source}:{number}")
        value = _scalar(match[3] or "", source, number)
        pending = name
        if value is not _SECTION:
            found[name] = Setting(value=value, line=number)
    return found


_SECTION = object()


def _scalar(text: str, source: str, line: int) -> object:
    """A value: text, true, false, null; _SECTION where a mapping follows."""
    text = re.sub(r"(^|\s)#.*$", "", text).strip()
    if text == "":
        return _SECTION
    if text[0] in "'\"" and len(text) > 1 and text[-1] == text[0]:
        return text[1:-1]
    if text in ("{}", "[]", "null", "~"):
        return None
    if text[0] in "&*!|>{[%@`":
        raise PlanError(f"line {line} is not read: {text[:60]!r}", where=f"{source}:{line}",
                        why="anchors, tags and flow collections are not")  # fmt: skip
    return {"true": True, "false": False, "True": True, "False": False}.get(text, text)
