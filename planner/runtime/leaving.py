"""The end of a process that has talked gloo: the interpreter's end overtakes none of its workers.

A worker of gloo drops the tensors of a collective after it has told that the collective is done.
To drop what Python has held takes the interpreter's lock. A thread that asks for the lock while the
interpreter ends is unwound by `pthread_exit`, through destructors that may not throw: the process
aborts ("terminate called without an active exception") with all of its work done. Seen at 2 of
some 60 ends of four ranks on a busy machine with torch 2.13. `destroy_process_group` does not
end the workers: DTensor's caches hold the meshes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import time
from pathlib import Path

WORKER = "pt_gloo_runloop"  # what torch's ProcessGroupGloo calls its threads
THREADS = Path("/proc/self/task")
AT_MOST_S = 2.0


@functools.cache
def settle_at_exit() -> None:
    """Before the interpreter ends, let gloo's workers come to rest. Asked for once a process."""
    atexit.register(settle)


def settle() -> bool:
    """Wait until no worker runs or waits for a core, at most AT_MOST_S; whether it came to that.

    True at once where the system does not show its threads.
    """
    end = time.monotonic() + AT_MOST_S
    quiet = 0
    while quiet < 2:  # once is not enough: one may have waited for the lock that we held
        time.sleep(0.001)  # gives up the lock
        quiet = 0 if _working() else quiet + 1
        if time.monotonic() > end:
            return False
    return True


def _working() -> bool:
    if not THREADS.is_dir():
        return False
    for thread in THREADS.iterdir():
        with contextlib.suppress(OSError):  # it has ended
            told = (thread / "stat").read_text()
            name, state = told[told.index("(") + 1 : told.rindex(")")], told[told.rindex(")") + 2]
            if name == WORKER and state != "S":
                return True
    return False
