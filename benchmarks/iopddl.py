"""Solve an instance of the ASPLOS / EuroSys 2025 contest on intra-operator parallelism.

    python benchmarks/iopddl.py FILE.json.gz [--seconds N] [--effort E]

Words go to stderr: each better cost; at the end cost, lower bound and gap. The last line on stdout
is the contest's: the strategy of each node, [0, 3, ...]. Ctrl-C and SIGTERM print the best so far.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ir.errors import PlanError  # noqa: E402
from planner.choice.problem import Problem  # noqa: E402
from planner.choice.solve import Solution, solve  # noqa: E402

MARGIN_S = 3.0  # kept of --seconds for what cannot be cut off: the solver's last step, printing


def read(path: Path) -> Problem:
    """Read an instance. Raises PlanError where the file is none."""
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        found = json.loads(text)["problem"]
        nodes, edges = found["nodes"], found["edges"]
        sizes = [len(costs) for costs in nodes["costs"]]
        return Problem(
            costs=tuple(np.array(c, dtype=np.int64) for c in nodes["costs"]),
            usages=tuple(np.array(u, dtype=np.int64) for u in nodes["usages"]),
            intervals=tuple((i[0], i[1]) if i else (0, 0) for i in nodes["intervals"]),
            edges=tuple((u, v) for u, v in edges["nodes"]),
            tables=tuple(
                np.array(c, dtype=np.int64).reshape(sizes[u], sizes[v])
                for (u, v), c in zip(edges["nodes"], edges["costs"])
            ),
            limit=found.get("usage_limit"),
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as e:
        raise PlanError("not an instance of the contest", where=str(path), why=repr(e)) from e


class Search(threading.Thread):
    """The solver in a thread of its own: HiGHS answers no signal."""

    def __init__(self, path: Path, seconds: float | None, effort: float) -> None:
        super().__init__(daemon=True)
        self.path, self.effort = path, effort
        self.ends = None if seconds is None else time.monotonic() + seconds - MARGIN_S
        self.best: Solution | None = None
        self.fault: PlanError | None = None
        self.done = threading.Event()

    def run(self) -> None:
        """Read and solve; `best` is replaced whole, so that it may be read at any time."""
        try:
            problem = read(self.path)
            left = None if self.ends is None else self.ends - time.monotonic()
            self.best = solve(problem, effort=self.effort, seconds=left, better=self.note)
        except PlanError as e:
            self.fault = e
        finally:
            self.done.set()

    def note(self, found: Solution) -> None:
        """Keep a better solution, and say so."""
        self.best = found
        print(f"cost {found.cost} bound {found.bound}", file=sys.stderr, flush=True)


def main() -> int:
    """Print the chosen strategies; the exit code."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, help="a limit of wall clock, reading included")
    parser.add_argument("--effort", type=float, default=1.0, help="work, in multiples of usual")
    asked = parser.parse_args()
    search = Search(asked.file, asked.seconds, asked.effort)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: search.done.set())
    search.start()
    left = None if asked.seconds is None else asked.seconds - MARGIN_S / 2
    search.done.wait(left)
    best = search.best
    if best is None:
        fault = search.fault or PlanError("no solution was found in time")
        print("\n".join(fault.lines()), file=sys.stderr, flush=True)
        return fault.exit_code
    status = "OPTIMAL" if best.optimal else "FEASIBLE"
    print(
        f"{status} cost {best.cost} bound {best.bound} gap {best.gap:.3%} "
        f"{time.monotonic() - start:.1f} s",
        file=sys.stderr,
    )
    print(list(best.picks), flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a solver that is cut off is not waited for
