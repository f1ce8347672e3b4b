"""Fitted constants: numbers with their source, read from `constants/*.toml`.

A device's file overrides its `base` (another device it is transferred from), which overrides
`common.toml`; each number keeps the source of the file that it came from.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ir.errors import UsageError

_FOLDER = Path(__file__).with_name("constants")
_COMMON = "common"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """One constant: its dotted name, its number (or one per group size) and where it is from."""

    name: str
    value: float | tuple[float, ...]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """All constants of one device, ordered by name.

    measured: kernels and collectives fitted on that very device. runs: whole steps as well.
    """

    name: str
    measured: bool
    runs: bool
    items: tuple[Constant, ...]

    def has(self, name: str) -> bool:
        return any(item.name == name for item in self.items)

    def find(self, name: str) -> Constant:
        """The constant of that dotted name, there by construction."""
        for item in self.items:
            if item.name == name:
                return item
        raise KeyError(f"constants/{self.name}.toml has no {name}")

    def number(self, name: str) -> float:
        value = self.find(name).value
        assert not isinstance(value, tuple), f"{name} is a list"
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.find(name).value
        return value if isinstance(value, tuple) else (value,)

    @property
    def digest(self) -> str:
        """sha256 of names and numbers; prose is left out."""
        text = json.dumps([(c.name, c.value) for c in self.items], separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _flat(table: dict[str, Any], prefix: str, note: str) -> dict[str, Constant]:
    """Every number of a TOML table under its dotted name, with the table's own source."""
    source = str(table.get("source", ""))
    found: dict[str, Constant] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= _flat(value, name + ".", note)
        elif isinstance(value, list):
            numbers = tuple(float(v) for v in value)
            found[name] = Constant(name=name, value=numbers, source=note + source)
        elif not isinstance(value, str):
            found[name] = Constant(name=name, value=float(value), source=note + source)
    return found


def _collect(name: str) -> dict[str, Constant]:
    """Constants of `name` over those of its base, over the common ones."""
    path = _FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.toml") if p.stem != _COMMON))
        raise UsageError(f"no constants named {name!r}", why=f"device.constants is one of {known}")
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    base = table.pop("base", None)
    reason = table.pop("transferred", "")
    if base is None:
        below = {} if name == _COMMON else _collect(_COMMON)
        return below | _flat(table, "", "")
    common = _collect(_COMMON)
    moved = {
        key: Constant(name=key, value=item.value, source=f"{reason}: {item.source}")
        for key, item in _collect(base).items()
        if item != common.get(key)
    }
    return common | moved | _flat(table, "", "")


@functools.cache
def load_constants(name: str) -> Constants:
    """The constants named `name`. Raises UsageError listing those there are."""
    items = _collect(name)
    measured, runs = items.pop("measured").value == 1, items.pop("runs").value == 1
    ordered = tuple(items[key] for key in sorted(items))
    return Constants(name=name, measured=measured, runs=runs, items=ordered)
