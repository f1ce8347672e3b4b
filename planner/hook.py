"""`plan-check FILES`: the pre-commit hook. Every plan among the files, or beside a graph, is
checked as `plan check` does; other files are none of its business."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def plans_of(files: Sequence[str]) -> list[str]:
    """The plans that files are or belong to, each once, in order."""
    named = [str(Path(file).with_suffix(".json")) for file in files]
    return [path for path in dict.fromkeys(named) if _is_plan(Path(path))]


def _is_plan(path: Path) -> bool:
    """Whether a file says that it is one, or a graph of ours beside it does: a plan that is broken
    or gone is one that fails."""
    graph = _start(path.with_suffix(".graph")).startswith("graph/")
    return graph or '"schema": "plan/' in _start(path)


def _start(path: Path) -> str:
    """Of a file's text; empty where there is none to read."""
    try:
        if not path.is_file():
            return ""
        with open(path, encoding="utf-8") as file:
            return file.read(200)
    except (OSError, UnicodeDecodeError):
        return ""


def main() -> None:
    """Check each; the exit code is the gravest."""
    from planner import cli, console

    found = plans_of(sys.argv[1:])
    sys.exit(max((console.run(cli.app(), ["check", path]) for path in found), default=0))
