"""What is at a path: a file, or something that only passes bytes on."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OPENED = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")  # what a shell opened for us, as `<(...)`


def is_stream(path: str | Path) -> bool:
    """Whether a pipe, a terminal or another device is there: written to, never replaced."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # nothing is there, or nothing that we may see
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def may_wait(path: str | Path) -> bool:
    """Whether reading could wait for ever: a stream that was not handed to this process open."""
    return is_stream(path) and not os.path.abspath(path).startswith(_OPENED)
