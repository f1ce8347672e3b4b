"""`plan report`: a plan as a page to look at, and its step as a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ir.errors import UsageError
from planner.commands.shared import Plan_, Verbose, examine
from planner.console import say


def report(
    plan: Plan_ = "plan.json",
    path: Annotated[
        str, typer.Option("-o", metavar="PATH", help="the page; '-' is stdout")
    ] = "report.html",
    trace: Annotated[
        str,
        typer.Option(
            metavar="PATH", show_default=False,
            help="also the simulated step as Chrome trace events, for Perfetto",
        ),
    ] = "",
    why: Annotated[
        bool,
        typer.Option("--why/--no-why", help="search for what else there is: seconds"),
    ] = True,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan report
    plan report plan.json -o report.html --trace step.json

    Write a plan as one static HTML page: the verdict, memory by rank, the simulated timeline, where
    the time goes, where everything lies, why not otherwise, what would change the decision, and
    what all that rests on. It loads nothing.
    """
    from planner.report.trace_events import trace_text
    from planner.report.training import one_page, simulate

    for target in (path, trace):
        _require_place(target)
    checked = examine(plan)
    _write(path, one_page(checked, ask=why))
    if trace:
        title = f"{checked.plan.graph.name} on {checked.plan.hardware}"
        _write(trace, trace_text(simulate(checked), checked.plan.decisions, title))
    return 0


def _require_place(target: str) -> None:
    """Raise UsageError for a path that cannot be written, before anything is computed."""
    if target not in ("", "-") and Path(target).is_dir():
        raise UsageError(f"{target} is a folder", hints=(f"{target}/report.html",))
    if target not in ("", "-") and not Path(target).parent.is_dir():
        raise UsageError(f"{target}: there is no folder {Path(target).parent}")


def _write(target: str, text: str) -> None:
    from planner.plan import write_whole

    if target == "-":
        print(text, end="")
        return
    write_whole(Path(target), text)
    say(f"wrote {target}")
