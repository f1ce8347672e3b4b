"""What a fit of published runs came to: text, and the files that it writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import cost_models
from cost_models.fit.tables import renumbered
from cost_models.hardware import load_hardware
from cost_models.validation.metrics import Scores, scores
from planner.validation.fit_accuracy import GENERATION_OUT, HELD_OUT, SOURCE_OUT, by_class

if TYPE_CHECKING:
    from planner.validation.fit import Problem, Whole
    from planner.validation.fit_memory import Held
    from planner.validation.fit_parameters import Parameter

Floats = NDArray[np.float64]
LINK_EFFICIENCY = load_hardware("h100x16").inter.efficiency  # the catalogue's, between nodes


def scored(problem: Problem, predicted: Floats) -> dict[str, Scores]:
    """Errors by class."""
    return {name: scores(pairs) for name, pairs in by_class(problem.facts, predicted).items()}


def report(problem: Problem, x: Floats, found: Mapping[str, Floats]) -> str:
    """Constants with their priors, then errors by class for every way of leaving rows out."""
    lines = [f"{len(problem.facts)} runs, {len(problem.parameters)} constants", ""]
    for parameter, value in zip(problem.parameters, problem.values(x).values()):
        lines.append(f"{parameter.place:58s} {parameter.prior:9.4g} -> {value:9.4g}")
    for name, predicted in found.items():
        lines += ["", f"{name:28s} {'n':>4} {'MAPE':>6} {'median':>7} {'bias':>7} {'p90':>6}"]
        for cls, s in scored(problem, predicted).items():
            lines.append(
                f"  {cls:26s} {s.n:4d} {s.mape:6.1%} {s.median:7.1%} {s.bias:+7.1%} {s.p90:6.1%}"
            )
    return "\n".join(lines)


_FOLDER = Path(str(cost_models.__file__)).parent
_ENGINES = _FOLDER / "engines.toml"
FILES = {  # a family's constants, and of one file alone
    "ampere": ("a100",), "hopper": ("h100", "h200"), "blackwell": ("b200",), "*": ("common",),
    "b200": ("b200",), "gb300": ("gb300",),
}  # fmt: skip
MOVES = 0.01  # share of a step that goes with a constant, where a run is a sample of it
Numbers = dict[Path, dict[tuple[str, str], float | Mapping[str, float]]]  # by file; table and key


def write_steps(
    problem: Problem, whole: Whole, found: Mapping[str, Floats], keep: bool
) -> None:
    """Constants (unless kept) into their files; beside them how many runs they move and how far
    off these are where they were left out."""
    files: Numbers = defaultdict(dict)
    samples: dict[tuple[Path, str], set[int]] = defaultdict(set)
    values = problem.values(whole.x).values()
    for k, (parameter, value) in enumerate(zip(problem.parameters, values)):
        moved = {int(n) for n in np.flatnonzero(np.abs(whole.slopes[:, k]) > MOVES)}
        for path, table, key in _places(parameter):
            if not keep:
                files[path][table, key] = value
            if path == _ENGINES and not table.startswith("switch."):
                files[path][f"{table}.fits", key] = _errors(problem, found, moved)
            elif path.parent.name != "hardware":
                samples[path, table] |= moved
    for (path, table), moved in samples.items():
        files[path] |= {(table, k): v for k, v in _errors(problem, found, moved).items()}
    source, family = (scored(problem, found[how]) for how in (SOURCE_OUT, GENERATION_OUT))
    files[_FOLDER / "constants" / "common.toml"] |= {
        ("step_error", "dense"): source["dense"].mape, ("step_error", "moe"): source["moe"].mape,
        ("step_error", "unmeasured"): family["all"].mape,
    }
    _write(files)


def write_reserves(held: Sequence[Held], keep: bool) -> None:
    """What allocators hold (unless kept) into engines.toml, with its samples and errors."""
    files: Numbers = defaultdict(dict)
    for one in held:
        fields = {"fragmentation": one.fragmentation}
        if len(one.reserve.cached_bytes) > 1:
            fields["cached_bytes"] = one.cached_bytes
        for table, (key, value) in product(one.reserve.tables, fields.items()):
            if not keep:
                files[_ENGINES][f"engine.{table}", key] = value
            files[_ENGINES][f"engine.{table}.fits", key] = _fit_words(one.scores)
    _write(files)


def _places(parameter: Parameter) -> Iterator[tuple[Path, str, str]]:
    """(file, table, key) of everywhere that a constant is written."""
    where, _, name = parameter.place.partition("/")
    table, _, key = name.rpartition(".")
    if where.startswith("engine:"):
        names = where[7:].split("+")
        for engine in ["defaults"] if len(names) > 5 else [f"engine.{name}" for name in names]:
            yield _ENGINES, engine, name
    elif where.startswith("switch:"):
        yield _ENGINES, f"switch.{where[7:]}", name
    elif where == "link":
        for path in sorted((_FOLDER / "hardware").glob("*.toml")):
            if f"\nefficiency = {LINK_EFFICIENCY}\n" in path.read_text(encoding="utf-8"):
                yield path, "cluster.inter", "efficiency"
    else:
        for stem in FILES[where]:
            yield _FOLDER / "constants" / f"{stem}.toml", table, key


def _errors(problem: Problem, found: Mapping[str, Floats], rows: set[int]) -> dict[str, float]:
    """How many runs, and their errors where their group was left out."""
    pairs = [(float(found[HELD_OUT][n]), problem.facts[n].measured_s) for n in sorted(rows)]
    return _fit_words(scores(pairs)) if pairs else {"samples": 0}


def _fit_words(s: Scores) -> dict[str, float]:
    return {"samples": s.n, "median_error": s.median, "p90_error": s.p90}


def _write(files: Numbers) -> None:
    for path, numbers in sorted(files.items()):
        path.write_text(renumbered(path.read_text(encoding="utf-8"), numbers), encoding="utf-8")
