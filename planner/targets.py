"""Where a plan may be written: what a user wrote is never lost to a mistaken `-o` or `save`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ir.errors import PlanError, UsageError
from ir.files import is_stream

_HEAD_BYTES = 4096  # of a file: a plan and a graph say what they are in their first lines
_PLAN = re.compile(rb'\A\s*\{.*?"schema"\s*:\s*"plan/', re.DOTALL)
_GRAPH = re.compile(rb"^graph/", re.MULTILINE)  # of any line: a merge may have left marks above
_SHOWN = re.compile(rb"\A(?:<!DOCTYPE html>|\{\"displayTimeUnit\")")  # what `plan report` writes


def require_target(target: str, *, embed: bool, flag: str = "-o ") -> None:
    """Refuse a target before anything is searched: a plan may be written over, what is no plan not.

    The inputs are covered, by whatever path they are named: none of them is a plan, but that of
    `--base`, which may be planned again. embed: no graph is written beside. flag: how the target
    was given, "" in Python. Raises UsageError, and PlanError where the system refuses the path.
    """
    if target == "-":
        return
    path = Path(target)
    with _told(target, flag):
        _require_place(target, flag, "plan.json")
        if is_stream(path):
            return
        _require_ours(path, flag, _PLAN, "plan")
        if not embed:
            _require_graph_place(path, flag)


def require_shown(target: str, *, flag: str, name: str) -> None:
    """Refuse a page's or a trace's target before anything is computed; name: an example of one.

    Raises UsageError, and PlanError where the system refuses the path.
    """
    if target == "-":
        return
    with _told(target, flag):
        _require_place(target, flag, name)
        _require_ours(Path(target), flag, _SHOWN, "report or trace", lost="a plan", name=name)


@contextmanager
def _told(target: str, flag: str) -> Iterator[None]:
    try:
        yield
    except OSError as fault:  # a name that is too long, a folder that may not be entered
        reason = fault.strerror or type(fault).__name__
        raise PlanError(f"{flag}{target} cannot be written", why=reason) from fault


def _require_place(target: str, flag: str, name: str) -> None:
    """Raise UsageError for what is no file's name, or is in no folder."""
    path = Path(target)
    if not target:
        raise UsageError(f"{flag}\"\" is no file's name", hints=(f"{flag}{name}",))
    if path.is_dir():
        raise UsageError(f"{flag}{path} is a folder", hints=(f"{flag}{path}/{name}",))
    if target.endswith(("/", os.sep)):
        raise UsageError(f"{flag}{target} names a folder, and there is none",
                         hints=(f"{flag}{path}",))  # fmt: skip
    if not path.parent.is_dir():
        raise UsageError(f"{flag}{path}: there is no folder {path.parent}")


def _require_graph_place(path: Path, flag: str) -> None:
    """Raise UsageError where the graph that goes beside a plan would take another file's place."""
    beside = path.with_suffix(".graph")
    if beside == path:
        raise UsageError(f"{flag}{path} is where the plan's graph goes",
                         hints=(f"{flag}plan.json", _embed(flag)))  # fmt: skip
    if beside.is_dir() or is_stream(beside):
        raise UsageError(f"{flag}{path}: its graph goes to {beside}, which is no file",
                         hints=(f"{flag}another name", _embed(flag)))  # fmt: skip
    _require_ours(beside, flag, _GRAPH, "graph of a plan")


def _embed(flag: str) -> str:
    return "--embed" if flag else "embed=True"


def _require_ours(path: Path, flag: str, mark: re.Pattern[bytes], what: str,
                  lost: str = "a model", name: str = "another name") -> None:  # fmt: skip
    """Raise UsageError where a file is in the way that does not say that it is one of ours."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        start = file.read(_HEAD_BYTES)
    if start and not mark.search(start):
        free = "remove it first if it may go" if flag else "overwrite=True if it may go"
        raise UsageError(f"{path} is there, and is no {what}",
                         why=f"{lost} or another file of yours would be lost",
                         hints=(f"{flag}{name}", free))  # fmt: skip
