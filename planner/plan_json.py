"""Reading and writing the parts of a plan file: every fault says which key it is about."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from ir.errors import PlanError, known_words
from planner.limits import MOST_COUNT
from planner.plan import Solver
from planner.score import AXIS_GAIN_PPM

MOST_NUMBER = 2**53 - 1  # an integer that every reader of JSON has exactly (RFC 8259, 6)
SOLVED_FOR = ("time", "cost", "energy")
COUNTS = ("workload", "decisions", "stages", "blocks")  # sections whose integers are counts


def section(value: Any) -> str:
    """An object on one line; a list one record a line."""
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    return "[\n" + ",\n".join(json.dumps(record) for record in value) + "\n]"


def object_at(raw: dict[str, Any], key: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The object at `key`, with these keys and no other."""
    value: Any = raw[key]
    if not isinstance(value, dict):
        raise PlanError(f"{key} is not an object")
    for name in [*keys, *value] if keys else ():
        if name not in keys:
            raise PlanError(f"unknown key {key}.{name}", why=known_words(name, keys))
        if name not in value:
            raise PlanError(f"missing key {key}.{name}")
    return dict(value)


def typed(raw: dict[str, Any], key: str, kind: type, path: str) -> Any:
    value: Any = raw[key]
    right = isinstance(value, kind) and not isinstance(value, bool)
    if not right or (kind is int and value < 0):
        expected = "a whole number, 0 or more" if kind is int else "a word"
        raise PlanError(f"{path}{key} is {json.dumps(value)}", why=f"expected {expected}")
    return value


def record_at(raw: dict[str, Any], key: str, kind: Any, but: tuple[str, ...] = ()) -> Any:
    """A flat dataclass of words and numbers, without some of its fields."""
    names = [field.name for field in fields(kind) if field.name not in but]
    table = object_at(raw, key, names)
    kinds = {f.name: int if "int" in str(f.type) else str for f in fields(kind)}
    return kind(**{name: typed(table, name, kinds[name], f"{key}.") for name in names})


_USUAL = ("pins", "objective", "axis_gain_ppm")  # written where they are not as by default


def solver_json(solver: Solver) -> dict[str, Any]:
    """How the search ended; pins where there are any, others of `_USUAL` where they are not."""
    usual = [key for key in _USUAL if getattr(solver, key) == getattr(Solver(), key)]
    return {key: value for key, value in asdict(solver).items() if key not in usual}


def solver_at(raw: dict[str, Any]) -> Solver:
    """The same, read."""
    table = object_at(raw, "solver")
    pins = table.pop("pins", [])
    if not is_list(pins, str) or not all(pin.isprintable() for pin in pins):
        raise PlanError("solver.pins is not a list of words")
    objective = table.pop("objective", "time")
    if objective not in SOLVED_FOR:
        raise PlanError(f"solver.objective is {json.dumps(objective)}",
                        why=f"known: {', '.join(SOLVED_FOR)}")  # fmt: skip
    gain = typed({"axis_gain_ppm": AXIS_GAIN_PPM} | table, "axis_gain_ppm", int, "solver.")
    table.pop("axis_gain_ppm", None)
    found: Solver = record_at(raw | {"solver": table}, "solver", Solver, but=_USUAL)
    return replace(found, pins=tuple(pins), objective=objective, axis_gain_ppm=gain)


def records_at(raw: dict[str, Any], key: str, names: tuple[str, ...]) -> list[dict[str, str]]:
    """A list of records of words."""
    rows: list[dict[str, str]] = raw[key]
    if not is_list(rows, dict):
        raise PlanError(f"{key} is not a list of objects")
    for index, row in enumerate(rows):
        if sorted(row) != sorted(names) or not all(isinstance(v, str) for v in row.values()):
            raise PlanError(f"{key}[{index}] is {json.dumps(row)}",
                            why=f"expected words for {', '.join(names)}")  # fmt: skip
    return rows


def is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    raw = dict(pairs)
    if len(raw) < len(pairs):
        keys = [key for key, _ in pairs]
        raise PlanError(f"key {next(k for k in keys if keys.count(k) > 1)} is there twice")
    return raw


def check_numbers(raw: dict[str, Any]) -> None:
    """Raises PlanError for a number that no plan has, by its key: of any section, of any depth."""
    for section_key, value in raw.items():
        most = MOST_COUNT if section_key in COUNTS else MOST_NUMBER
        for key, number in _numbers(value, section_key):
            if isinstance(number, float) and not math.isfinite(number):
                raise PlanError(f"{key} is {json.dumps(number)}", why="expected a finite number")
            if abs(number) > most:
                raise PlanError(f"{key} is {str(number)[:40]}", why=f"expected at most {most:,}")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int | float]]:
    """(key, number) of every number in a value."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{key}[{index}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value
