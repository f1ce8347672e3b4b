"""What a change between two plans of serving does, as a value and in words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cost_models.units import format_bytes, format_seconds, format_short_rate

TITLE = "What each change does, made one after another in this order"
HEADS = ("first token", "then a token", "tokens/s", "peak memory")
_WIDTH = 80
_COLUMN = 13


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingEffect:
    """What some changes do to what the plan is after those of the rows before; new less old.

    groups: the changes; several where none of them can be served without the others. fits: whether
    the plan does, with these and all before. within_error: whether every figure moves by less than
    the serving engine's error of what it was.
    """

    groups: tuple[tuple[str, ...], ...]
    ttft_ps: int
    tpot_ps: int
    microtokens_per_s: int
    peak_memory_bytes: int
    fits: bool
    within_error: bool

    @property
    def keys(self) -> tuple[str, ...]:
        return sum(self.groups, ())

    @property
    def what(self) -> str:
        return " together with ".join(map(", ".join, self.groups))

    @property
    def note(self) -> str:
        """What else is to be said of the row."""
        moved = self.ttft_ps or self.tpot_ps or self.microtokens_per_s or self.peak_memory_bytes
        notes = ["within model error"] if moved and self.within_error else []
        return "; ".join([*notes, *([] if self.fits else ["does not fit so far"])])

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The figures as people read them, in the order of HEADS."""
        return (
            _signed(self.ttft_ps, format_seconds(abs(self.ttft_ps) / 1e12)),
            _signed(self.tpot_ps, format_seconds(abs(self.tpot_ps) / 1e12)),
            _signed(self.microtokens_per_s, format_short_rate(abs(self.microtokens_per_s) / 1e6)),
            _signed(self.peak_memory_bytes, format_bytes(abs(self.peak_memory_bytes))),
        )


def effects_text(rows: Sequence[ServingEffect]) -> list[str]:
    """A table of the rows, 80 columns wide; what changed is wrapped, figures never."""
    indent = _COLUMN * len(HEADS) + 2
    lines = [TITLE[0].lower() + TITLE[1:], "".join(f"{head:>{_COLUMN}}" for head in HEADS)]
    for row in rows:
        said = row.what + (f" ({row.note})" if row.note else "")
        first, *more = textwrap.wrap(said, _WIDTH - indent, break_on_hyphens=False)
        lines.append("".join(f"{cell:>{_COLUMN}}" for cell in row.cells) + f"  {first}")
        lines += [" " * indent + line for line in more]
    return lines


def effects_json(rows: Sequence[ServingEffect]) -> list[dict[str, Any]]:
    """The rows with stable keys, base units."""
    return [
        {"changes": list(row.keys), "ttft_s": row.ttft_ps / 1e12, "tpot_s": row.tpot_ps / 1e12,
         "tokens_per_s": row.microtokens_per_s / 1e6, "peak_memory_bytes": row.peak_memory_bytes,
         "fits": row.fits, "within_error": row.within_error}
        for row in rows
    ]  # fmt: skip


def _signed(value: int, said: str) -> str:
    return ("+" if value > 0 else "-") + said if value else "="
