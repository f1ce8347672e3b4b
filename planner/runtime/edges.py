"""Where a unit's changes of placement happen in its module: found from the plan's assignment.

A value whose readers all want it in one other place is moved once, where the unit or one of its
modules gets or gives it. Else it is moved where the module that reads it gets it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from cost_models.layout import (
    PARTIAL,
    WHOLE,
    Assignment,
    boundary,
    collective,
    dual,
    produced,
)
from ir.backward import differentiable
from ir.graph import AFTER, Tensor, Unit
from ir.ops import rule
from planner.runtime.site import returned


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A value at the border of a module: where it lies beyond it. learns: carries a gradient."""

    ref: str
    spec: Tensor
    to: int
    learns: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """entry: placement of the unit's inputs where not the boundary's. into, out_of: what modules
    of the unit, by path, are given and give elsewhere than it lies. results: what the unit's
    module returns. loose: places of collectives at no border, which DTensor finds itself."""

    entry: dict[str, int]
    into: dict[str, tuple[Crossing, ...]]
    out_of: dict[str, tuple[Crossing, ...]]
    results: tuple[Crossing, ...]
    loose: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Reader:
    place: str  # "name[i]", for people
    module: str  # path in the unit; AFTER for the unit's results
    target: int
    grad: int


@functools.lru_cache(maxsize=256)
def edges_of(unit: Unit, assignment: Assignment) -> Edges:
    """Find the border that each planned change of placement can be made at."""
    made, learns = produced(unit, assignment), differentiable(unit)
    readers = _readers(unit, assignment, learns)
    entry: dict[str, int] = {}
    into: dict[str, list[Crossing]] = {}
    out_of: dict[str, list[Crossing]] = {}
    leaving: dict[str, int] = {}
    loose: list[str] = []
    inputs = {name for name, _ in unit.inputs}
    for ref, found in readers.items():
        back = dual(made[ref])
        moved = [r for r in found if r.target != made[ref] or (learns[ref] and r.grad != back)]
        if not moved or (ref in unit.producers and unit.producers[ref].module == AFTER):
            continue
        alike = len(moved) == len(found) and len({(r.target, r.grad) for r in found}) == 1
        target = moved[0].target
        home = _gives(unit, ref, found)
        spec = unit.values[ref]
        if alike and ref in inputs:
            entry[ref] = target
        elif alike and home:
            out_of.setdefault(home, []).append(
                Crossing(ref=ref, spec=spec, to=target, learns=learns[ref])
            )
            leaving[ref] = target
        else:
            for reader in _each_reader(unit, ref, found, moved, into, leaving, learns[ref]):
                if not (
                    collective(made[ref], reader.target)
                    or (learns[ref] and collective(reader.grad, back))
                ):
                    continue
                if not _earlier(unit, ref, reader, into) and not _later(
                    unit, made, ref, reader, out_of
                ):
                    loose.append(reader.place)
    return Edges(
        entry=entry,
        into={path: tuple(found) for path, found in into.items()},
        out_of={path: tuple(found) for path, found in out_of.items()},
        results=_results(unit, made, leaving, learns, assignment),
        loose=tuple(loose),
    )


def _readers(
    unit: Unit, assignment: Assignment, learns: dict[str, bool]
) -> dict[str, list[_Reader]]:
    """Who reads each value that is no parameter, in order; the unit's results come last."""
    table: dict[str, list[_Reader]] = {}
    for node, option in zip(unit.nodes, assignment.chosen):
        for i, (ref, target, grad) in enumerate(zip(node.inputs, option.ins, option.grads)):
            if ref not in unit.parameter_names:
                table.setdefault(ref, []).append(
                    _Reader(f"{node.name}[{i}]", node.module, target, grad)
                )
    for i, ref in enumerate(unit.outputs):
        if ref not in unit.parameter_names:
            at = boundary(unit.values[ref], assignment.sequence_parallel and learns[ref])
            table.setdefault(ref, []).append(_Reader(f"return[{i}]", AFTER, at, at))
    return table


def _within(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")


def _gives(unit: Unit, ref: str, readers: list[_Reader]) -> str:
    """The innermost module that returns this value, and reads it no more; else nothing."""
    node = unit.producers.get(ref)
    if node is None or not node.module or ref != node.name:
        return ""
    last = [n for n in unit.nodes if _within(n.module, node.module)][-1]
    inside = any(_within(r.module, node.module) for r in readers)
    return node.module if last is node and not inside else ""


def _each_reader(
    unit: Unit, ref: str, readers: list[_Reader], moved: list[_Reader],
    into: dict[str, list[Crossing]], leaving: dict[str, int], learns: bool,
) -> list[_Reader]:  # fmt: skip
    """Move a value where it is read: at the outermost module whose readers agree. Gives back
    those that no border is before."""
    node = unit.producers.get(ref)
    source = node.module if node is not None else ""
    done: set[str] = set()
    left = []
    for reader in moved:
        if reader.module == AFTER:
            leaving.setdefault(ref, reader.target)
            continue
        path = next(
            (
                p for p in _prefixes(reader.module)
                if not _within(source, p)
                and len({(r.target, r.grad) for r in readers if _within(r.module, p)}) == 1
            ),
            None,
        )  # fmt: skip
        if path is None or not learns:
            left.append(reader)
        elif path not in done:
            done.add(path)
            into.setdefault(path, []).append(
                Crossing(ref=ref, spec=unit.values[ref], to=reader.target, learns=learns)
            )
    return left


def _earlier(
    unit: Unit, ref: str, reader: _Reader, into: dict[str, list[Crossing]]
) -> bool:
    """Gather a value before its views in the module that reads it, not behind them."""
    if reader.target != WHOLE or not reader.module:
        return False
    while (node := unit.producers.get(ref)) is not None and _within(node.module, reader.module):
        if not rule(node).view or len(unit.consumers[ref]) > 1 or ref in unit.outputs:
            return False
        ref = node.inputs[0]
    if ref in unit.parameter_names:
        return False
    found = Crossing(ref=ref, spec=unit.values[ref], to=WHOLE, learns=True)
    into.setdefault(reader.module, []).append(found)
    return True


def _later(
    unit: Unit, made: Mapping[str, int], ref: str, reader: _Reader,
    out_of: dict[str, list[Crossing]],
) -> bool:
    """Reduce a partial sum where its module gives it: views and a bias may come before."""
    if made[ref] != PARTIAL or not reader.module:
        return False
    last = [n for n in unit.nodes if _within(n.module, reader.module)][-1]
    if made[last.name] == PARTIAL:
        return False
    found = Crossing(ref=last.name, spec=unit.values[last.name], to=made[last.name], learns=True)
    out_of.setdefault(reader.module, []).append(found)
    return True


def _prefixes(module: str) -> list[str]:
    parts = module.split(".") if module else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _results(
    unit: Unit, made: Mapping[str, int], leaving: dict[str, int], learns: dict[str, bool],
    assignment: Assignment,
) -> tuple[Crossing, ...]:  # fmt: skip
    """What the module returns, and where it is to lie."""
    found = []
    for ref in returned(unit):
        limit = boundary(unit.values[ref], assignment.sequence_parallel and learns[ref])
        to = leaving.get(ref, made.get(ref, WHOLE))
        to = limit if ref in unit.outputs else to
        found.append(Crossing(ref=ref, spec=unit.values[ref], to=to, learns=learns[ref]))
    return tuple(found)
