"""What a device costs an hour: the user's own file, never ours.

    [h100]
    usd_per_gpu_hour = 2.50                  # on demand
    spot_usd_per_gpu_hour = 1.20             # may be taken away at any time
    spot_preemptions_per_gpu_hour = 0.002    # how often one is; 0 says never

A device has either price or both; a spot price comes with its preemptions.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost_models.checked_toml import read_toml
from cost_models.hardware import aliases, catalogue
from ir.errors import UsageError, known_words

KEYS = ("usd_per_gpu_hour", "spot_usd_per_gpu_hour", "spot_preemptions_per_gpu_hour")


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """One device: USD a GPU hour on demand and as spot, None where it has no such price."""

    device: str
    usd_per_gpu_hour: float | None = None
    spot_usd_per_gpu_hour: float | None = None
    spot_preemptions_per_gpu_hour: float | None = None


def load_prices(path: str, others: Collection[str] = ()) -> dict[str, Price]:
    """The file's prices by device. others: hardware files' own names, beside the catalogue's.

    Raises UsageError naming the table and key: an unknown device, a price that is none, a spot
    price without its preemptions.
    """
    found: dict[str, Price] = {}
    for table, values in read_toml(Path(path), "price file").items():
        device = _device(table, others, path)
        if device in found:
            raise UsageError(f"[{table}] is priced twice", where=path, why=f"it is {device}")
        if not isinstance(values, dict):
            raise UsageError(f"{table} is no table", where=path, hints=(f"[{table}]",))
        found[device] = _price(device, table, values, path)
    return found


def _device(table: str, others: Collection[str], path: str) -> str:
    name = dict(aliases()).get(table, table)
    if name in catalogue() or name in others:
        return name
    near = difflib.get_close_matches(table, [*catalogue(), *others], n=1)
    raise UsageError(f"[{table}] is no device", where=path,
                     why=f"the catalogue has {', '.join(catalogue())}",
                     hints=tuple(f"[{match}]" for match in near))  # fmt: skip


def _price(device: str, table: str, values: dict[str, Any], path: str) -> Price:
    for key, value in values.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            raise UsageError(f"unknown key {table}.{key}", where=path,
                             why=known_words(key, KEYS),
                             hints=tuple(f"did you mean {name}?" for name in near))  # fmt: skip
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise UsageError(f"{table}.{key} is {value!r}", where=path,
                             why="expected a number, 0 or more")  # fmt: skip
    price = Price(device=device, **{key: float(value) for key, value in values.items()})
    spot = (price.spot_usd_per_gpu_hour, price.spot_preemptions_per_gpu_hour)
    if (spot[0] is None) != (spot[1] is None):
        missing = KEYS[1] if spot[0] is None else KEYS[2]
        raise UsageError(f"missing key {table}.{missing}", where=path,
                         why="a spot price comes with its preemptions; 0 is none")  # fmt: skip
    if price.usd_per_gpu_hour is None and spot[0] is None:
        raise UsageError(f"[{table}] has no price", where=path, hints=(KEYS[0],))
    return price
