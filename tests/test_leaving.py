"""A process ends after gloo's workers have come to rest."""

import hashlib
import threading
import time
from pathlib import Path

import pytest

from planner.runtime import leaving

pytestmark = pytest.mark.skipif(not leaving.THREADS.is_dir(), reason="threads are not shown here")


def worker(name: str, done: threading.Event) -> threading.Thread:
    """A thread of that name that computes without the interpreter's lock until it is done."""
    named = threading.Event()

    def work() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
        named.set()
        while not done.is_set():
            hashlib.sha256(bytes(1 << 22))

    thread = threading.Thread(target=work)
    thread.start()
    named.wait()
    return thread


def test_a_working_worker_is_waited_for():
    done = threading.Event()
    thread = worker(leaving.WORKER, done)
    threading.Timer(0.3, done.set).start()
    begun = time.monotonic()
    assert leaving.settle()
    assert done.is_set() and time.monotonic() - begun > 0.2
    thread.join()


def test_it_is_waited_for_no_longer_than_said(monkeypatch):
    monkeypatch.setattr(leaving, "AT_MOST_S", 0.1)
    done = threading.Event()
    thread = worker(leaving.WORKER, done)
    assert not leaving.settle()
    done.set()
    thread.join()


def test_other_threads_are_not_waited_for():
    done = threading.Event()
    thread = worker("another", done)
    assert leaving.settle() and not done.is_set()
    done.set()
    thread.join()
