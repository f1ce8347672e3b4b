"""Read TOML whose every key is known and typed; a fault names the file and the key's path."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cost_models.units import parse_bytes
from ir.errors import UsageError, known_words
from ir.files import may_wait

MOST = 10**18  # of a whole number: an exabyte, an exaflop a second
MOST_BYTES = 4 << 20  # of a file
MOST_DEPTH = 64  # of tables in tables; tomllib's work and memory grow with the square of a key's
_TOKEN = re.compile(  # one that has no end goes on to where it must: no text is read twice
    r'"""(?:[^"\\]+|\\.?|"(?!""))*"{0,5}' r"|'''(?:[^']+|'(?!''))*'{0,5}"
    r'|"(?:[^"\\\n]+|\\[^\n])*"?' r"|'[^'\n]*'?"
    r"|#[^\n]*|[A-Za-z0-9_+-]+|[ \t]+|.",
    re.DOTALL,
)  # fmt: skip


def read_toml(path: Path, what: str = "hardware file") -> dict[str, Any]:
    """The file's tables. Raises UsageError where it cannot be read, or is no TOML."""
    if may_wait(path):
        raise UsageError(f"cannot read {what} {path}", why="it is no file")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(f"{what} {path} is larger than {MOST_BYTES >> 20} MiB")
        return parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(f"cannot read {what} {path}", why=reason) from None
    except ValueError as error:
        raise UsageError("not a TOML file", where=str(path), why=str(error)) from None


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of another's TOML. Raises ValueError where it is none, and where keys or values
    lie deeper than MOST_DEPTH: keys are counted before tomllib reads them."""
    if any(line.count(".") > MOST_DEPTH for line in text.split("\n")):
        dots = 0
        for found in _TOKEN.finditer(text):
            token = found[0]
            part = token[0] in " \t\"'_+-" or token[0].isalnum()
            dots = dots + 1 if token == "." else dots if part else 0
            if dots > MOST_DEPTH:
                raise ValueError(f"a key has more than {MOST_DEPTH} parts")
    try:
        raw = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level: list[Any] = [raw]
    for _ in range(MOST_DEPTH):
        level = [
            inner for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]  # fmt: skip
    if level:
        raise ValueError("nested too deeply")
    return raw


def typed(value: Any, kind: type, where: str, key: str) -> Any:
    """`value` as `kind`; numbers are positive, sizes may be written "80GiB"."""
    if kind is int and isinstance(value, str) and "bytes" in key:
        return parse_bytes(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and kind in (int, float) and abs(value) > MOST:
        raise UsageError(f"{key} is too large", where=where, why=f"expected at most {MOST:.0e}")
    if kind is float and whole:
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = type(value).__name__
        raise UsageError(f"{key} is a {found}, not a {kind.__name__}", where=where)
    if kind not in (int, float):
        return value
    number: Any = value
    if not 0 < number < float("inf"):
        raise UsageError(f"{key} is {value}", where=where, why="expected a positive number")
    if key.endswith("efficiency") and number > 1:
        raise UsageError(f"{key} is {value}", where=where, why="expected a share of 1 at most")
    return value


def table(
    raw: Any, keys: Mapping[str, type], where: str, path: str, also: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The table `raw` checked against `keys`: all of them, none else. Names the bad key. also:
    further keys that may stand there, and were taken out."""
    if not isinstance(raw, dict):
        raise UsageError(f"{path} is not a table", where=where)
    for key in raw:
        if key not in keys:
            near = difflib.get_close_matches(str(key), [*keys, *also], n=1)
            raise UsageError(
                f"unknown key {path}{key}",
                where=where,
                why=known_words(str(key), [*keys, *also]),
                hints=tuple(f"did you mean {path}{name}?" for name in near),
            )
    missing = [key for key in keys if key not in raw]
    if missing:
        raise UsageError(f"missing key {path}{missing[0]}", where=where)
    return {key: typed(raw[key], kind, where, path + key) for key, kind in keys.items()}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, table by table."""
    found = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found
