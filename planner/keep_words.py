"""What layers keep that are computed again in part, as a pin says it and as a plan file has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cost_models.decisions import Keep
from ir.errors import PlanError

EVERY = "*"  # in a pin, every class of layers


def read_keep(value: str) -> Keep | None:
    """A pin's words: `default`, `none`, or operations, of every class of layers or of some:
    `attention/attention+attention.wq`, `u1:attention.wq,u2:none`. None where it says nothing."""
    found: dict[str, tuple[str, ...]] = {}
    for item in value.split(",") if value != "default" else ():
        name, _, names = item.rpartition(":")
        if not re.fullmatch(r"[^\s+:]+(\+[^\s+:]+)*", names) or (name or EVERY) in found:
            return None
        found[name or EVERY] = () if names == "none" else tuple(names.split("+"))
    return tuple(found.items())


def keep_words(keep: Keep) -> str:
    """As a pin says it."""
    rows = (
        ("" if name == EVERY else f"{name}:") + ("+".join(words) or "none") for name, words in keep
    )
    return ",".join(rows) or "default"


def keep_json(keep: Keep) -> dict[str, list[str]]:
    """As a plan file has it."""
    return {name: list(words) for name, words in keep}


def keep_from_json(raw: Mapping[str, Any]) -> Keep:
    """Read what `keep_json` writes. Raises PlanError with the path of the bad key."""
    for name, words in raw.items():
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            raise PlanError(f"decisions.keep.{name} is {words!r}", why="expected a list of words")
    return tuple((name, tuple(words)) for name, words in raw.items())
