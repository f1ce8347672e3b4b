"""The terminal: words and faults on stderr, exit codes, progress."""

from __future__ import annotations

import functools
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

import typer

from ir.errors import PlanError
from planner.plain import Plain, plain

INTERNAL, USAGE, INTERRUPTED = 1, 64, 130
QUIET_S = 1.0  # progress is shown after this
LONGEST = 78  # of its line


def say(text: str) -> None:
    """Print words that are not the result."""
    print(plain(text), file=sys.stderr)


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run a command; print its faults once, on stderr; return the exit code. What it prints on
    stdout is `plain`."""
    before = sys.stdout
    ours = sys.stdout = cast(TextIO, Plain(before))
    try:
        return _run(app, arguments)
    finally:
        if sys.stdout is ours:  # else the library met a closed pipe, and put what is quiet there
            sys.stdout = before


def _run(app: typer.Typer, arguments: Sequence[str]) -> int:
    traceback = any(re.fullmatch("-v{2,}", word) for word in arguments)
    try:
        command = typer.main.get_command(app)
        found = command.main(args=list(arguments), prog_name="plan", standalone_mode=False)
        return found if isinstance(found, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except PlanError as fault:
        _explain(traceback)
        say("\n".join(fault.lines()))
        return fault.exit_code
    except OSError as fault:  # of a path of the user's that no command asked about
        if fault.filename is None:
            return _internal(fault, traceback)
        _explain(traceback)
        say(f"error: cannot use {str(fault.filename)[:LONGEST]}: {fault.strerror}")
        return INTERNAL
    except Exception as fault:
        if hasattr(fault, "format_message"):
            return _usage(fault)
        return _internal(fault, traceback)


def _internal(fault: Exception, traceback: bool) -> int:
    """A fault of ours."""
    _explain(traceback)
    say(f"error: internal: {type(fault).__name__}: {fault}")
    if not traceback:
        say("hint: -vv shows where; please report it with the command")
    return INTERNAL


def heard(command: Callable[..., int]) -> Callable[..., int]:
    """The command, whose Ctrl-C is told: typer returns its code without a word."""

    @functools.wraps(command)
    def run_it(*given: Any, **named: Any) -> int:
        try:
            return command(*given, **named)
        except KeyboardInterrupt as stop:
            raise typer.Abort from stop

    return run_it


@contextmanager
def progress() -> Iterator[Callable[[str], None] | None]:
    """A function that shows one line on a terminal, once a second has passed; None elsewhere.

    What was said before that is shown when it has: a long step says its name once, as it begins.
    """
    if not sys.stderr.isatty():
        yield None
        return
    width = min(LONGEST, shutil.get_terminal_size().columns - 1)  # a wrapped line is not wiped
    latest = [""]
    loud = threading.Event()

    def write() -> None:
        print("\r" + plain(latest[0])[:width].ljust(width), end="", file=sys.stderr, flush=True)

    def begin() -> None:
        loud.set()
        write()

    def show(line: str) -> None:
        latest[0] = line
        if loud.is_set():
            write()

    timer = threading.Timer(QUIET_S, begin)
    timer.daemon = True
    timer.start()
    try:
        yield show
    finally:
        timer.cancel()
        timer.join()
        if loud.is_set():
            show("")
            print("\r", end="", file=sys.stderr, flush=True)


def _usage(fault: Any) -> int:
    """A fault of the command line itself, as the library words it, under our code."""
    context = getattr(fault, "ctx", None)
    message = fault.format_message().strip()
    if type(fault).__name__ == "NoArgsIsHelpError" or not message:
        say(context.get_help() if context is not None else message)
        return USAGE
    say("error: " + message[:1].lower() + message[1:])
    if context is not None:
        say(f"hint: {context.command_path} --help")
    return USAGE


def _explain(traceback: bool) -> None:
    """Where the fault is that is met: in the process that met it first."""
    if traceback:
        from traceback import format_exc

        say((getattr(sys.exception(), "there", "") or format_exc()).rstrip())
