"""What the native runtime cannot run of a model: rules on its graph, for planning time.

`legality.py` says which decisions go together; here is which decisions a model allows, so that no
plan is made that `parallelize` refuses. Rules hold for the engines that are our own runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cost_models.decisions import Decisions
from ir.graph import Graph


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRule:
    """Decisions that a model may not allow: the pins it is about, when, and why (None: fine)."""

    keys: tuple[str, ...]
    applies: Callable[[Decisions], bool]
    reason: Callable[[Graph], str | None]
    fix: str


RULES: tuple[GraphRule, ...] = ()
