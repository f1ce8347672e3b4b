"""What each part of the hardware does of a step, where parts have replicas of their own: as a pin
says it and as a plan file has it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cost_models.decisions import Decisions, Share
from ir.errors import PlanError

_KEYS = ("dp", "microbatches")


def read_shares(value: str) -> tuple[tuple[str, int], ...] | None:
    """A pin's words: `none`, or micro-batches a step by part, `h100:11,a100:5`. None where it says
    nothing."""
    found: dict[str, int] = {}
    for item in value.split(",") if value != "none" else ():
        name, _, count = item.rpartition(":")
        if not name or name in found or not re.fullmatch(r"[1-9][0-9]{0,8}", count):
            return None
        found[name] = int(count)
    return tuple(found.items())


def share_words(shares: Sequence[Share]) -> str:
    """As a pin says it."""
    return ",".join(f"{share.part}:{share.microbatches}" for share in shares) or "none"


def microbatch_words(d: Decisions) -> str:
    """The micro-batches of a data rank, of each part where these differ."""
    return share_words(d.shares) if d.shares else str(d.microbatches)


def tp_words(d: Decisions) -> str:
    """The tp of all stages, `8`, or of each part in the order of ranks, `4/8`."""
    return "/".join(str(tp) for _, tp in d.tp_by_part) or str(d.tp)


def shares_json(shares: Sequence[Share]) -> dict[str, dict[str, Any]]:
    """As a plan file has it: recompute is pairs (full, selective) a stage, where a part has others
    than the plan."""
    return {
        share.part: {"dp": share.dp, "microbatches": share.microbatches}
        | ({"recompute": [list(pair) for pair in share.recompute]} if share.recompute else {})
        for share in shares
    }


def shares_from_json(raw: Mapping[str, Any]) -> tuple[Share, ...]:
    """Read what `shares_json` writes. Raises PlanError with the path of the bad key."""
    found = []
    for part, row in raw.items():
        pairs = row.get("recompute", []) if isinstance(row, dict) else None
        if (
            not isinstance(row, dict) or {*row} - {"recompute"} != {*_KEYS}
            or not all(_count(row[key], 1) for key in _KEYS)
            or not isinstance(pairs, list) or not all(map(_pair, pairs))
        ):  # fmt: skip
            raise PlanError(
                f"decisions.shares.{part} is {row!r}",
                why='expected {"dp": 64, "microbatches": 11}, and "recompute" pairs if other than'
                " the plan's",
            )
        found.append(Share(
            part=part, dp=row["dp"], microbatches=row["microbatches"],
            recompute=tuple((full, some) for full, some in pairs),
        ))  # fmt: skip
    return tuple(found)


def _pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_count(n, 0) for n in value)


def _count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
