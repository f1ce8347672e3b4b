"""What the commands share: arguments that mean the same everywhere, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir.errors import UsageError
from planner import completing

if TYPE_CHECKING:
    from cost_models.hardware import Cluster
    from cost_models.prices import Price
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
    str | None,
    typer.Option(
        autocompletion=completing.optimizers,
        help="adamw (default), sgd, adafactor, adamw8bit, muon",
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing.engines,
        help="native, native-compiled (default), torchtitan, megatron, deepspeed",
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="model.py, model.py:factory, config.json or its folder",
        show_default=False,
        autocompletion=completing.model,
    ),
]
Task = Annotated[str, typer.Option(autocompletion=completing.tasks, help="train or serve")]
Embed = Annotated[
    bool, typer.Option("--embed", help="put the graph inside the plan, not beside it")
]
Written = Annotated[str, typer.Option("-o", metavar="PATH", help="the plan; '-' is stdout")]
MaxMemory = Annotated[
    str, typer.Option(metavar="SIZE", show_default=False, help="of a GPU's at most: 70GB")
]
MaxCost = Annotated[
    float | None,
    typer.Option(metavar="USD", min=0, help="for a million tokens at the lesser price"),
]
Prices = Annotated[
    str,
    typer.Option(metavar="FILE", show_default=False, help="USD a GPU hour: docs/size.md"),
]
Assume = Annotated[
    list[str],
    typer.Option(
        metavar="K=V",
        help="pue, restart_s, failures_per_gpu_hour, preemptions_per_gpu_hour, tier, sample_bytes",
    ),
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


def check_objective(objective: str, prices: str, max_cost: float | None) -> None:
    """Raise UsageError for an objective that is none, or a limit of cost without prices."""
    from planner.limits import OBJECTIVES

    if objective and objective not in OBJECTIVES:
        raise UsageError(
            f"--objective {objective} is not known", why=f"known: {', '.join(OBJECTIVES)}"
        )
    if max_cost is not None and not prices:
        raise UsageError(
            "--max-cost needs prices", hints=("--prices FILE", "docs/size.md has the format")
        )


def prices_of(path: str, parts: Sequence[Cluster]) -> dict[str, Price]:
    """What the devices of these parts cost; nothing without a file. Raises UsageError where the
    file has no price of one."""
    from cost_models.prices import load_prices

    if not path:
        return {}
    names = [*dict.fromkeys(part.kind for part in parts)]
    found = load_prices(path, names)
    for name in names:
        if name not in found:
            raise UsageError(f"{path} has no price of {name}", hints=(f"[{name}]",))
    return {name: found[name] for name in names}


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
