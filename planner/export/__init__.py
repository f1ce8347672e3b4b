"""Plans in the words of what runs them: one file a target, one row here."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from ir.errors import UsageError
from planner.export import pytorch
from planner.export.target import Exported
from planner.plan import Plan

TARGETS: dict[str, Callable[[Plan, str], Exported]] = {"pytorch": pytorch.export}


def export(plan: Plan, target: str, source: str) -> Exported:
    """The plan for one target. source: the plan's path, as the files name it.

    Raises UsageError for a target that there is not.
    """
    if target not in TARGETS:
        near = get_close_matches(target, TARGETS, n=1)
        raise UsageError(
            f"--to {target} is no target of this version", why=f"known: {', '.join(TARGETS)}",
            hints=tuple(f"--to {name}" for name in near),
        )  # fmt: skip
    return TARGETS[target](plan, source)
