"""The command line: the table of commands, and how one is run.

stdout has the result and nothing else. Everything heavy is imported by the command that needs it,
so that show, diff and check answer at once.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, NoReturn

import typer

from planner import completing
from planner.console import INTERRUPTED, heard, run, say

COMMANDS: tuple[tuple[str, str, str, str], ...] = (  # word, module, function, help
    ("trace", "commands.trace", "trace", "trace, cost, solve, write the plan"),
    ("show", "commands.reading", "show", "what a plan says, in a screenful"),
    ("diff", "commands.reading", "diff", "what changed between two plans"),
    ("why", "commands.why", "why", "what binds; the best plan without a decision"),
    ("check", "commands.reading", "check", "is a plan valid, fresh, and does it fit; for CI"),
    ("verify", "commands.verify", "verify", "does a small twin compute what the model does"),
    ("report", "commands.report", "report", "one static HTML page; the step as a trace"),
    ("export", "exporting", "export", "another engine's own configuration"),
    ("import", "commands.importing", "import_", "an existing configuration as a fully pinned plan"),
    ("size", "commands.size", "size", "which hardware, and how much of it; the Pareto front"),
    ("calibrate", "calibrating", "calibrate", "measure this machine; write a hardware file of it"),
    ("validate", "validating", "validate", "the cost models against measurements: error by class"),
)
SELDOM = 100_000, 20, 20  # searches for cycles, of which a search leaves few: by objects made


def app(first: str = "") -> typer.Typer:
    """The commands and their help; where `first` is a command's word, that one alone: to read all
    of their flags takes as long as `plan show` does."""
    plain: dict[str, Any] = {
        "no_args_is_help": True, "rich_markup_mode": None,
    }  # fmt: skip
    top = typer.Typer(**plain)
    top.callback()(_any)
    asked = [row for row in COMMANDS if row[0] == first]
    for name, module, function, words in asked or COMMANDS:
        found = getattr(importlib.import_module(f"planner.{module}"), function)
        top.command(name, short_help=words)(heard(found))
    from planner.commands.hardware import hardware_list, hardware_show

    names = typer.Typer(help="What the hardware names mean.", **plain)
    names.command("list", short_help="the devices there are")(hardware_list)
    names.command("show", short_help="one of them, with sources")(hardware_show)
    top.add_typer(names, name="hardware")
    return top


def _version(asked: bool) -> None:
    """Say the version and leave, where it is asked for."""
    if asked:
        from planner.plan import PLANNER_VERSION

        print(f"meshwright {PLANNER_VERSION}")
        raise typer.Exit()


def _any(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="say it and leave")
    ] = False,
) -> None:
    """Plan how a PyTorch model is spread over hardware."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; quiet where the reader of stdout has gone.

    argv: the words; None for those of this process, which is then left at once (`_leave`).
    """
    if os.environ.get(completing.ASKED) == "complete_bash":
        completing.in_bash(partial(run, app()))
        sys.exit(0)
    if argv is None:
        gc.set_threshold(*SELDOM)
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        code = run(app(words[0] if words else ""), words)
        sys.stdout.flush()
    except KeyboardInterrupt:  # before there is a command that would have it
        say("interrupted")
        code = INTERRUPTED
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
    with suppress(OSError):
        sys.stdout.flush()
        os.dup2(2, 1)  # what a model left to be done prints, which is not the result
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
