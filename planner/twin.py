"""A second process that works beside this one.

It is forked, so that it begins with all that this one knows; then each learns by itself, and only
questions and answers go between them. Who is asked what depends on nothing but the questions, so
the answers are the same where there is no second core, and one process does the work of both.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NoReturn, TypeVar

W = TypeVar("W")
A = TypeVar("A")
LEAVES_S = 1.0  # what a process that answered may take to end by itself
PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process is sent when its parent ends


def forks() -> bool:
    """Whether a second process may be forked, and has a core."""
    if sys.platform != "linux":  # elsewhere libraries' threads do not outlive it, or there is none
        return False
    if multiprocessing.current_process().daemon:  # it may have no children
        return False
    main = threading.current_thread() is threading.main_thread()
    return main and len(os.sched_getaffinity(0)) > 1


class Pair(Generic[W]):
    """Two workers of one kind: `own` in this process, `other` in a second one if that is asked for.
    What they are asked by name must go through pickle, and so must what they answer."""

    def __init__(self, own: W, other: W, *, apart: bool) -> None:
        self.own, self.other = own, other
        self._there: tuple[BaseProcess, Connection] | None = _fork(other) if apart else None

    def __enter__(self) -> Pair[W]:
        return self

    def __exit__(self, *fault: object) -> None:
        self._end()

    def both(self, name: str, asked: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What the method of that name answers to these arguments: `own` to the first, `other` to
        the second if there is one."""
        sent = len(asked) > 1 and self._send(name, asked[1])
        answers = [getattr(self.own, name)(*one) for one in asked[:1]]
        if len(asked) > 1:
            found, answer = self._received() if sent else (False, None)
            answers.append(answer if found else getattr(self.other, name)(*asked[1]))
        return answers

    def _send(self, name: str, asked: tuple[Any, ...]) -> bool:
        if self._there is None:
            return False
        try:
            self._there[1].send((name, asked))
        except OSError:
            self._end()
        return self._there is not None

    def _received(self) -> tuple[bool, Any]:
        """An answer. A process that failed or was killed (out of memory) has none: it is asked for
        nothing more, and this one does its work, and meets its fault if there is one."""
        assert self._there is not None
        try:
            return True, self._there[1].recv()
        except (EOFError, OSError):
            self._end()
            return False, None

    def _end(self) -> None:
        if self._there is None:
            return
        process, line = self._there
        self._there = None
        line.close()
        process.kill()
        process.join()


def _fork(worker: object) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(worker, here, there), daemon=True)
    with warnings.catch_warnings():
        # it uses nothing that a thread of this process may hold: Python's locks and the memory's
        # are taken over by fork, and it solves in one thread
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    there.close()
    return process, here


def _serve(worker: object, here: Connection, there: Connection) -> None:
    """Answer until nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's
    here.close()  # or its end would never be seen
    while True:
        try:
            name, asked = there.recv()
            there.send(getattr(worker, name)(*asked))
        except (EOFError, OSError):
            return
        except Exception:  # the first process asks itself, and says what the fault is
            return


class Later(Generic[A]):
    """One answer, of a second process that may run the user's own code: it has the terminal, hears
    Ctrl-C, and ends with this process however that ends. On Linux."""

    def __init__(self, asked: Callable[[], A]) -> None:
        self._line, there = multiprocessing.Pipe(duplex=False)
        sys.stdout.flush()  # or it would be printed by both
        sys.stderr.flush()
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # as in `_fork`
            self._pid = os.fork()
        if not self._pid:
            _tell(asked, self._line, there, parent)
        there.close()
        self._answered = False
        self.ended: int | None = None  # with which exit status, or -signal, if without an answer

    def answer(self) -> A | None:
        """What it answers, once. None where it failed: this process then does its work, and meets
        its fault if there is one; or where it `ended`."""
        try:
            found: A | None = self._line.recv()
        except (EOFError, OSError):
            _, status = os.waitpid(self._pid, 0)
            self.ended = os.waitstatus_to_exitcode(status)
            return None
        self._answered = True
        return found

    def end(self) -> None:
        """End the process; one that answered may tidy up before."""
        if self._answered:
            self._line.poll(LEAVES_S)  # it is closed there as the process ends
        self._line.close()
        if self.ended is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


@contextmanager
def beside(work: Callable[[], A]) -> Iterator[Callable[[], A | None]]:
    """Begin to work in a second process if there may be one, which is ended at the end; its answer,
    or None where it has none."""
    later = Later(work) if forks() and threading.active_count() == 1 else None
    try:
        yield later.answer if later is not None else lambda: None
    finally:
        if later is not None:
            later.end()


def _tell(
    asked: Callable[[], A], here: Connection, there: Connection, parent: int
) -> NoReturn:
    """Answer, and end."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        here.close()
        atexit._clear()  # what the first process does at its end
        with suppress(OSError):  # nowhere to print to
            os.dup2(2, 1)  # stdout is for the first process's result
        if os.getppid() == parent:  # else it ended before that was heard of
            answer = _answered(asked)
            sys.stdout.flush()  # before the first process prints
            sys.stderr.flush()
            there.send(answer)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
    except KeyboardInterrupt:  # it ends by that, as the first process hears
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        pass
    finally:
        os._exit(0)


def _answered(asked: Callable[[], A]) -> A | None:
    """None of what fails: the first process does it itself, and says what the fault is."""
    try:
        return asked()
    except (Exception, SystemExit):
        return None


__all__ = ["Later", "Pair", "beside", "forks"]
