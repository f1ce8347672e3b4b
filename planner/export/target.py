"""What an export is: files, and how much of the plan is in them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Files by name. fidelity: "exact" or "approximate"; notes: what is done elsewhere or lost."""

    files: tuple[tuple[str, str], ...]
    fidelity: str
    notes: tuple[str, ...] = ()
