"""Where `plan` starts: Ctrl-C is answered before the command line is there to answer it."""

from __future__ import annotations

import sys
from typing import NoReturn

INTERRUPTED = 130  # as `planner.console` has it, which is not imported yet


def main() -> NoReturn:
    """Import the command line, and run it."""
    try:
        from planner import cli
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    cli.main()
