"""Time whole commands, from a new process to its exit, and their peak memory.

    python benchmarks/plan_speed.py [--data DIR] [--runs N]

Cold: the traced graph is not cached (a fresh XDG_CACHE_HOME every run). Cached: it is. Each row
has the least of N runs, the first of which compiles our modules, as installing them does; nothing
fails where a target is missed. --data is a folder of Hugging Face configs, OWNER--NAME.json; rows
whose config is not there are left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LLAMA = str(ROOT / "examples" / "llama.py")
DEEP = '''"""As many layers of one small Llama as asked for."""
import importlib.util
spec = importlib.util.spec_from_file_location("llama", {path!r})
llama = importlib.util.module_from_spec(spec)
spec.loader.exec_module(llama)
llama.SIZES["deep"] = (4096, {layers}, 32, 8, 14336, 128256)
build = lambda: llama.build(size="deep")
'''


class Run(NamedTuple):
    """Seconds of the wall clock, and the process's own peak of resident bytes."""

    seconds: float
    peak_bytes: int


class Row(NamedTuple):
    """What is measured, the most it may be, and what it was (None: no such config)."""

    name: str
    target: str
    measured: str
    peak_bytes: int | None = None


def plan(folder: Path, cache: Path, *words: str) -> Run:
    """Run one command in `folder`. Raises SystemExit with its message where it fails."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        child = subprocess.Popen(
            (sys.executable, "-m", "planner.cli", *words), cwd=folder, env=env,
            stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        _, status, usage = os.wait4(child.pid, 0)  # the usage of this child alone
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"plan {' '.join(words)} failed:\n{errors.read().decode()}")
    return Run(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def best(runs: int, folder: Path, *words: str, cache: Path | None = None) -> Run:
    """The least time and the most memory of `runs`; each with a cache of its own if none given."""
    found = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as fresh:
            found.append(plan(folder, cache or Path(fresh), *words))
    return Run(min(r.seconds for r in found), max(r.peak_bytes for r in found))


def rows(folder: Path, data: Path, runs: int) -> Iterator[Row]:
    """Every measurement, as it is made."""

    def trace(model: str, hardware: str, *more: str, cache: Path | None = None) -> Run:
        return best(runs, folder, "trace", model, "--hardware", hardware, *more, cache=cache)

    def timed(name: str, most_s: float, run: Run) -> Row:
        return Row(name, f"{most_s:g} s", f"{run.seconds:.2f} s", run.peak_bytes)

    def ratio(name: str, most: float, run: Run, of: Run) -> Row:
        return Row(name, f"{most:g}x", f"{run.seconds / of.seconds:.2f}x")

    example = trace(LLAMA, "h100x64")
    yield timed("8B from a file, h100x64, cold", 5, example)
    warm = folder / "warm"
    trace(LLAMA, "h100x64", cache=warm)
    yield timed("8B from a file, h100x64, cached", 3, trace(LLAMA, "h100x64", cache=warm))
    mixed = trace(LLAMA, "h100x64+a100x64")
    yield timed("8B from a file, h100x64+a100x64, cold", 15, mixed)
    for name, config, hardware, most_s in (
        ("8B config, h100x64, cold", "meta-llama--Meta-Llama-3.1-8B", "h100x64", 9),
        ("405B config, h100x16384, cold", "meta-llama--Meta-Llama-3.1-405B", "h100x16384", 15),
        ("405B config, 100,000 GPUs, cold", "meta-llama--Meta-Llama-3.1-405B", "h100x100000", 30),
        ("Kimi-K2 (1T) config, h100x2048, cold", "moonshotai--Kimi-K2-Instruct", "h100x2048", 15),
    ):
        path = data / f"{config}.json"
        if path.exists():
            yield timed(name, most_s, trace(str(path), hardware))
    deep = []
    for layers in (2, 126):
        model = folder / f"layers{layers}.py"
        model.write_text(DEEP.format(path=LLAMA, layers=layers))
        deep.append(trace(str(model), "h100x64"))
    yield ratio("126 layers of the 8B against 2", 1.2, deep[1], deep[0])
    small, large = (trace(LLAMA, f"h100x{n}", "--arg", "size=405b") for n in (1024, 16384))
    yield ratio("405B on 16,384 GPUs against 1,024", 2, large, small)
    trace(LLAMA, "h100x64", "-o", "old.json", "--fix", "zero=3")
    trace(LLAMA, "h100x64")
    for words in (("show",), ("diff", "old.json", "plan.json"), ("check",)):
        yield timed(f"plan {words[0]}", 0.5, best(runs, folder, *words))


def main() -> None:
    """Print the table row by row; then the peak of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/model_configs")
    parser.add_argument("--runs", type=int, default=3, help="the least of so many counts")
    asked = parser.parse_args()
    peak = 0
    print(f"| {'command':40} | at most | measured | peak memory |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder), asked.data, asked.runs):
            memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"
            cells = f"{row.name:40} | {row.target:>7} | {row.measured:>8} | {memory:>11}"
            print(f"| {cells} |", flush=True)
            peak = max(peak, row.peak_bytes or 0)
    print(f"| {'peak memory of all':40} | 1.5 GiB |          | {peak / 2**20:>7.0f} MiB |")


if __name__ == "__main__":
    main()
