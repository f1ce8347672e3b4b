"""Writing fitted tables into `constants/*.toml`, in place; every other line stays as it is."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

Value = float | int | tuple[float, ...] | str


def number_text(value: float) -> str:
    """Four significant digits, more than any fit knows; a count or bytes, whole, as they are."""
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 10**6 else str(value)
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    text = f"{value:.4g}".replace("e-0", "e-").replace("e+", "e")
    return text if any(mark in text for mark in ".en") else text + ".0"


def _value_text(key: str, value: Value) -> str:
    if isinstance(value, str):
        body = "\n".join(
            line + " \\" for line in textwrap.wrap(value, 92, break_on_hyphens=False)
        ).removesuffix(" \\")
        return f'{key} = """\\\n' + textwrap.indent(body, "  ") + '"""'
    if isinstance(value, tuple):
        return f"{key} = [{', '.join(number_text(v) for v in value)}]"
    if isinstance(value, int):
        return f"{key} = {value}"
    return f"{key} = {number_text(value)}"


def table_text(header: str, values: Mapping[str, Value]) -> str:
    """One TOML table."""
    return "\n".join([f"[{header}]", *(_value_text(k, v) for k, v in values.items())]) + "\n"


def replaced(text: str, tables: Mapping[str, Mapping[str, Value]]) -> str:
    """`text` with those tables in place of theirs, and new ones at its end; others untouched."""
    parts = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
    left = dict(tables)
    for i, part in enumerate(parts):
        match = re.match(r"\[([^\]\[]+)\]", part)
        if match and match[1] in left:
            parts[i] = table_text(match[1], left.pop(match[1])) + "\n"
    body = "".join(parts).rstrip("\n") + "\n"
    return body + "".join("\n" + table_text(name, values) for name, values in left.items())


def write_tables(path: Path, tables: Mapping[str, Mapping[str, Value]]) -> None:
    """Replace those tables in the file at `path`."""
    path.write_text(replaced(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


def _number_line(key: str, value: float | Mapping[str, float]) -> str:
    if isinstance(value, Mapping):
        items = ", ".join(f"{k} = {number_text(v)}" for k, v in value.items())
        return f"{key} = {{ {items} }}"
    return f"{key} = {number_text(value)}"


def renumbered(
    text: str, numbers: Mapping[tuple[str, str], float | Mapping[str, float]]
) -> str:
    """`text` with those (table, key) set, comments and other lines as they are.

    Raises KeyError for a table that is not there; a key that is not there is put first in it.
    """
    parts = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
    heads = [match[1] if (match := re.match(r"\[([^\]\[]+)\]", part)) else "" for part in parts]
    for (table, key), value in numbers.items():
        at = heads.index(table) if table in heads else -1
        if at < 0:
            raise KeyError(table)
        line = _number_line(key, value)
        found, count = re.subn(rf"^{re.escape(key)} = .*$", line, parts[at], flags=re.MULTILINE)
        if not count:
            head, _, rest = parts[at].partition("\n")
            found = f"{head}\n{line}\n{rest}"
        parts[at] = found
    return "".join(parts)
