"""Fitted constants: numbers with their source, read from `constants/*.toml`.

A device's file overrides its `base` (a device it is transferred from, or several, the last one
counting), which overrides `common.toml`; each number keeps the source of the file that it came
from. A hardware file may bring its own over those of a device: what `plan calibrate` measured.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
import tomllib
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ir.errors import UsageError, known_words

_FOLDER = Path(__file__).with_name("constants")
_COMMON = "common"
_FORMATS = ("fp32", "tf32", "fp8", "int8", "nvfp4", "int4")  # a file may bring a GEMM table of each
# What `plan calibrate` measures of a host; nothing is shipped of them but what is assumed where a
# file has none (`serving_host.py`).
_HOST = (
    *(f"host.{dtype}.{key}" for dtype in ("fp32", "bf16")
      for key in ("row_bytes_per_s", "read_bytes_per_s", "column_s", "flop_per_s", "smoothness",
                  "cached_bytes_per_s")),
    "host.disk_bytes_per_s",
    *(f"host.{key}_s" for key in ("fetch", "piece", "op", "token", "request")),
)  # fmt: skip
# Words that say how well a table was fitted; they may stand in any of them.
FIT_WORDS = ("samples", "median_error", "p90_error", "held_out_median_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """One constant: its dotted name, its number (or one per group size) and where it is from."""

    name: str
    value: float | tuple[float, ...]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnConstants:
    """Constants that a hardware file carries: `items` over those named `base`.

    A flag among them, measured or runs, is the file's own word; else the base's holds.
    """

    base: str
    items: tuple[Constant, ...]


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
        return self._get(name) is not None

    def find(self, name: str) -> Constant:
        """The constant of that dotted name, there by construction."""
        item = self._get(name)
        if item is None:
            raise KeyError(f"constants/{self.name}.toml has no {name}")
        return item

    def _get(self, name: str) -> Constant | None:
        at = bisect_left(self.items, name, key=lambda item: item.name)
        found = self.items[at] if at < len(self.items) else None
        return found if found is not None and found.name == name else None

    def number(self, name: str) -> float:
        value = self.find(name).value
        assert not isinstance(value, tuple), f"{name} is a list"
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.find(name).value
        return value if isinstance(value, tuple) else (value,)

    @property
    def digest(self) -> str:
        """sha256 of names and numbers; prose and errors are left out: no cost depends on them."""
        used = [c for c in self.items if c.name.rpartition(".")[2] not in FIT_WORDS]
        text = json.dumps([(c.name, c.value) for c in used], separators=(",", ":"))
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


def _known_names() -> tuple[str, ...]:
    return tuple(sorted(p.stem for p in _FOLDER.glob("*.toml") if p.stem != _COMMON))


@functools.cache
def _collect(name: str) -> dict[str, Constant]:
    """Constants of `name` over those of its bases, over the common ones; shared, never changed."""
    known = _known_names()
    if name not in (*known, _COMMON):  # a hardware file's word, which is no path
        raise UsageError(f"no constants named {name!r}",
                         why=f"device.constants is one of {', '.join(known)}")  # fmt: skip
    table = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    base = table.pop("base", [])
    reason = table.pop("transferred", "")
    if name == _COMMON:
        return _flat(table, "", "")
    common = _collect(_COMMON)
    moved = {
        key: Constant(name=key, value=item.value, source=f"{reason}: {item.source}")
        for source in ([base] if isinstance(base, str) else base)
        for key, item in _collect(source).items()
        if item != common.get(key)
    }
    return common | moved | _flat(table, "", "")


@functools.cache
def load_constants(name: str | OwnConstants) -> Constants:
    """The constants named `name`, or a hardware file's own over those that it names.

    Raises UsageError listing those there are.
    """
    own = () if isinstance(name, str) else name.items
    base = name if isinstance(name, str) else name.base
    items = _collect(base) | {item.name: item for item in own}
    measured, runs = items.pop("measured").value == 1, items.pop("runs").value == 1
    ordered = tuple(items[key] for key in sorted(items))
    title = f"{base}, calibrated" if own else base
    return Constants(name=title, measured=measured, runs=runs, items=ordered)


def own_constants(raw: Any, base: str, where: str) -> OwnConstants:
    """A hardware file's `[constants]` table over those named `base`, checked.

    Every number has a name that one of the shipped files has. Raises UsageError.
    """
    if not isinstance(raw, dict):
        raise UsageError("constants is not a table", where=where)
    if base not in _known_names():
        raise UsageError(
            f"device.constants is {base!r}", where=where, why=f"one of {', '.join(_known_names())}"
        )
    found = _flat(raw, "", "")
    known = {key for name in _known_names() for key in _collect(name)} | set(_HOST)
    formats = {key.split(".")[2] for key in known if re.match(r"gemm\.[^.]+\.", key)}
    known |= {f"gemm.{dtype}.{key}" for dtype in _FORMATS for key in formats}
    for key, item in found.items():
        if key not in known and key.rsplit(".", 1)[-1] not in FIT_WORDS:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hints = tuple(f"did you mean constants.{name}?" for name in near)
            raise UsageError(f"unknown key constants.{key}", where=where,
                             why=known_words(key, sorted(known), most=8), hints=hints)  # fmt: skip
        values = item.value if isinstance(item.value, tuple) else (item.value,)
        if key in _HOST and not item.value:
            raise UsageError(f"constants.{key} is 0", where=where, why="expected more than 0")
        if not all(0 <= value < float("inf") for value in values):
            raise UsageError(
                f"constants.{key} is {item.value}", where=where, why="expected 0 or more"
            )
    return OwnConstants(base=base, items=tuple(found[key] for key in sorted(found)))
