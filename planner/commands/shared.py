"""What the commands share: arguments that mean the same everywhere, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir.errors import UsageError

if TYPE_CHECKING:
    from planner.check import Checked

Plan_ = Annotated[str, typer.Argument(metavar="PLAN", help="a path, '-' (stdin), or REV:path")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document, base units")]
Verbose = Annotated[
    int, typer.Option("-v", "--verbose", count=True, help="-v: timing; -vv: also tracebacks")
]
Args = Annotated[
    list[str], typer.Option("--arg", metavar="K=V", help="argument of the model's factory")
]
Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="use the traced graph if nothing changed")
]
Optimizer = Annotated[
    str | None, typer.Option(help="adamw (default), sgd, adafactor, adamw8bit, muon")
]
Engine = Annotated[
    str | None,
    typer.Option(help="native, native-compiled (default), torchtitan, megatron, deepspeed"),
]


def parse_args(texts: Sequence[str], flag: str = "--arg") -> tuple[tuple[str, str], ...]:
    """Read `--arg k=v`. Raises UsageError for one without a name or given twice."""
    pairs = tuple(text.partition("=")[::2] for text in texts)
    for text, (name, _) in zip(texts, pairs):
        if not name.isidentifier() or "=" not in text:
            raise UsageError(f"{flag} {text} is no argument", why="expected NAME=VALUE")
        if [n for n, _ in pairs].count(name) > 1:
            raise UsageError(f"{flag} {name} is given twice")
    return pairs


def examine(source: str) -> Checked:
    """The plan at `source`, costed anew with today's constants."""
    from planner.check import examine
    from planner.plan import load

    return examine(load(source), folder_of(source))


def folder_of(source: str) -> Path:
    """Where a plan's own hardware file may lie beside it."""
    inside = Path(source).exists() or source == "-" or ":" not in source
    return Path(source).parent if inside and source != "-" else Path()


def print_json(value: Any) -> None:
    """Print one document, keys in their own order."""
    print(json.dumps(value, indent=1))
