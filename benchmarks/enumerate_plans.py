"""The search beside exhaustive enumeration, on random tiny problems.

    python benchmarks/enumerate_plans.py [--problems 50] [--seed 0] [--gpus 8] [--layers 6]

Every plan of the documented space is simulated: no bound, no order. A line for each problem of
which the search found another best score, or proved it not. Exit 1 where there is one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from enumerated import difference, least_by_mesh  # noqa: E402
from random_problems import random_tiny  # noqa: E402


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next has the next")
    parser.add_argument("--gpus", type=int, default=8, help="of a problem at most")
    parser.add_argument("--layers", type=int, default=6, help="of a problem at most")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each problem")
    asked = parser.parse_args(arguments)
    fits = nothing = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(asked.seed, asked.seed + asked.problems):
            start = time.process_time()
            p = random_tiny(seed, Path(folder), most_gpus=asked.gpus, most_layers=asked.layers)
            least = least_by_mesh(p)
            said = difference(p, least, p.searcher.run())
            fits += any(step is not None for step in least.values())
            nothing += all(step is None for step in least.values())
            wrong += bool(said)
            if said or asked.verbose:
                name = f"{p.costs.graph.name} {p.layers} layers, {p.gpus} GPUs, {p.costs.workload}"
                seconds = time.process_time() - start
                print(f"{seed}: {said or 'alike'} ({seconds:.1f} s; {name})", flush=True)
    print(f"{asked.problems} problems, {fits} with a plan that fits, {nothing} with none:"
          f" {wrong} differ")  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
