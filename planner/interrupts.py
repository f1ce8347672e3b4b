"""Ctrl-C as a question that a long search asks now and then."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Note:
    """A handler that notes the first Ctrl-C; the second stops the program."""

    asked = False

    def __call__(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the search to stop; a second one stops the program. Searches inside of one that
    has something to keep are asked with it, and so is what comes between them."""
    before = signal.getsignal(signal.SIGINT)
    note = before if isinstance(before, _Note) else _Note()
    try:
        signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: nothing to catch there
        yield lambda: False
        return
    try:
        yield lambda: note.asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def held() -> Iterator[None]:
    """Ctrl-C waits until the end: around solvers that answer it themselves, and forget it.

    Some (CLP) have a handler while they solve: they give up that program, and nobody else hears.
    This thread does not take the signal; another of the process may, as libraries start some, and
    then the solver's answer says that it was stopped.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
