"""The command line: the table of commands, and how one is run.

stdout has the result and nothing else. Everything heavy is imported by the command that needs it,
so that show, diff and check answer at once.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import typer

from planner import completing
from planner.calibrating import calibrate
from planner.commands.hardware import hardware_list, hardware_show
from planner.commands.importing import import_
from planner.commands.reading import check, diff, show
from planner.commands.report import report
from planner.commands.size import size
from planner.commands.trace import trace
from planner.commands.verify import verify
from planner.commands.why import why
from planner.console import run
from planner.exporting import export
from planner.validating import validate

COMMANDS: tuple[tuple[str, Callable[..., int], str], ...] = (
    ("trace", trace, "trace, cost, solve, write the plan"),
    ("show", show, "what a plan says, in a screenful"),
    ("diff", diff, "what changed between two plans"),
    ("why", why, "what binds; the best plan without a decision"),
    ("check", check, "is a plan valid, fresh, and does it fit; for CI"),
    ("verify", verify, "does a small twin compute what the model does"),
    ("report", report, "one static HTML page; the step as a trace"),
    ("export", export, "another engine's own configuration"),
    ("import", import_, "an existing configuration as a fully pinned plan"),
    ("size", size, "which hardware, and how much of it; the Pareto front"),
    ("calibrate", calibrate, "measure this machine; write a hardware file of it"),
    ("validate", validate, "the cost models against measurements: error by class"),
)


def app() -> typer.Typer:
    """The commands and their help."""
    plain: dict[str, Any] = {
        "no_args_is_help": True, "rich_markup_mode": None,
    }  # fmt: skip
    top = typer.Typer(help="Plan how a PyTorch model is spread over hardware.", **plain)
    for name, function, words in COMMANDS:
        top.command(name, short_help=words)(function)
    names = typer.Typer(help="What the hardware names mean.", **plain)
    names.command("list", short_help="the devices there are")(hardware_list)
    names.command("show", short_help="one of them, with sources")(hardware_show)
    top.add_typer(names, name="hardware")
    return top


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; quiet where the reader of stdout has gone.

    argv: the words; None for those of this process, which is then left at once (`_leave`).
    """
    if os.environ.get(completing.ASKED) == "complete_bash":
        completing.in_bash(partial(run, app()))
        sys.exit(0)
    try:
        code = run(app(), list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1  # as the library has it, where it meets the closed pipe first
    if argv is None:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End this process without taking its modules apart one by one: with torch loaded that costs a
    second and more, and the system frees them anyway. Threads still at work are Python's to end.
    """
    if threading.active_count() > 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
