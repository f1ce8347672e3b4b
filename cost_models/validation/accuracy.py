"""The file of errors that rows left out of the fits had: one part a fit, each written alone."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

Value: TypeAlias = str | int | float | tuple[str, ...]
Table: TypeAlias = Mapping[str, Value]
Part: TypeAlias = Mapping[str, Table]  # tables by name: [part."name"]

ACCURACY = Path(__file__).with_name("accuracy.toml")
_HEAD = "# Errors of rows that the constants were not fitted to. Written by the fits, a part each."


@cache
def memory_error() -> float:
    """Expected relative error of a step's peak memory: the mean of runs that print theirs, which
    the constants were not fitted to."""
    raw: dict[str, Any] = tomllib.loads(ACCURACY.read_text(encoding="utf-8"))
    return float(raw["memory"]["all"]["mape"])


def _text(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(v) for v in value)}]"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def rewritten(text: str, parts: Mapping[str, Part | str]) -> str:
    """The file with those parts in place of theirs, others as they are; a string is a line."""
    found: dict[str, Any] = {**tomllib.loads(text), **parts}
    lines = [_HEAD]
    lines += [f"{key} = {_text(value)}" for key, value in found.items() if isinstance(value, str)]
    for part, tables in found.items():
        for name, table in tables.items() if not isinstance(tables, str) else ():
            lines += ["", f"[{part}.{_text(name)}]"]
            lines += [f"{key} = {_text(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def write_accuracy(parts: Mapping[str, Part | str], path: Path = ACCURACY) -> None:
    """Replace those parts of the shipped file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(rewritten(text, parts), encoding="utf-8")
