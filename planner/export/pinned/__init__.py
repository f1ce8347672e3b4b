"""Flags and keys of engines, as their own parsers declare them: a file an engine, with the version
that it was read from. Exporters write nothing else; importers know by it what is real."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """plan: names that say what a plan says, with what they take; other: real names besides."""

    engine: str
    version: str
    source: str
    plan: Mapping[str, str]
    other: frozenset[str]


@functools.cache
def pinned(name: str) -> Pinned:
    """The list of one engine."""
    path = Path(__file__).with_name(f"{name}.toml")
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    return Pinned(
        engine=raw["engine"], version=raw["version"], source=raw["source"], plan=raw["plan"],
        other=frozenset(raw.get("other", ())),
    )  # fmt: skip


def checked(name: str) -> str:
    """An engine and its version, as headers say it."""
    found = pinned(name)
    return f"{found.engine} {found.version}"
