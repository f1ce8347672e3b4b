"""What a fit of published runs came to: text, and the files that it writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import cost_models
from cost_models.fit.tables import renumbered
from cost_models.hardware import load_hardware
from cost_models.validation.metrics import Scores, scores

if TYPE_CHECKING:
    from planner.validation.fit import Problem
    from planner.validation.fit_parameters import Parameter

Floats = NDArray[np.float64]
LINK_EFFICIENCY = load_hardware("h100x16").inter.efficiency  # the catalogue's, between nodes
IN_SAMPLE = "in sample"
HELD_OUT = "cross-validated by group"
SOURCE_OUT = "one source left out"
FAMILY_OUT = "one hardware family left out"


def classes_of(problem: Problem, row: int) -> list[str]:
    """The classes a row is reported in."""
    case = problem.facts[row].prepared.case
    run = case.run
    kind = "hybrid" if run.model.get("hybrid") else "moe" if run.is_moe else "dense"
    device = case.cluster.name
    return ["all", kind, device, case.engine.name, case.workload.precision]


def scored(problem: Problem, predicted: Floats) -> dict[str, Scores]:
    """Errors by class."""
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row, seconds in enumerate(predicted):
        for name in classes_of(problem, row):
            pairs[name].append((float(seconds), problem.facts[row].measured_s))
    return {name: scores(found) for name, found in pairs.items()}


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
_FILES = {  # a family's constants, and of one file alone
    "ampere": ("a100",), "hopper": ("h100", "h200"), "blackwell": ("b200",), "*": ("common",),
    "b200": ("b200",), "gb300": ("gb300",),
}  # fmt: skip
_OWN = ("clock", "scan", "gemm.fp8", "gemm.nvfp4")  # tables that runs alone say


def write(problem: Problem, x: Floats, found: Mapping[str, Floats]) -> None:
    """Constants into their files, and the errors of rows left out beside the published runs."""
    files: dict[Path, dict[tuple[str, str], float]] = defaultdict(dict)
    for parameter, value in zip(problem.parameters, problem.values(x).values()):
        where, _, name = parameter.place.partition("/")
        if where.startswith("engine:"):
            names = where[7:].split("+")
            tables = ["defaults"] if len(names) > 5 else [f"engine.{engine}" for engine in names]
            for table in tables:
                files[_FOLDER / "engines.toml"][table, name] = value
        elif where.startswith("switch:"):
            files[_FOLDER / "engines.toml"][f"switch.{where[7:]}", name] = value
        elif where == "link":
            for path in (_FOLDER / "hardware").glob("*.toml"):
                if f"\nefficiency = {LINK_EFFICIENCY}\n" in path.read_text(encoding="utf-8"):
                    files[path]["cluster.inter", "efficiency"] = value
        else:
            table, _, key = name.rpartition(".")
            for stem in _FILES[where]:
                rows = [n for n in range(len(problem.facts)) if _uses(problem, n, parameter)]
                path = _FOLDER / "constants" / f"{stem}.toml"
                files[path][table, key] = value
                if table in _OWN and rows:
                    s = scores([
                        (float(found[HELD_OUT][n]), problem.facts[n].measured_s) for n in rows
                    ])  # fmt: skip
                    files[path] |= {(table, "samples"): s.n, (table, "median_error"): s.median,
                                    (table, "p90_error"): s.p90}  # fmt: skip
    source = scored(problem, found[SOURCE_OUT])
    family = scored(problem, found[FAMILY_OUT])
    files[_FOLDER / "constants" / "common.toml"] |= {
        ("step_error", "dense"): source["dense"].mape, ("step_error", "moe"): source["moe"].mape,
        ("step_error", "unmeasured"): family["all"].mape,
    }
    for path, numbers in sorted(files.items()):
        path.write_text(renumbered(path.read_text(encoding="utf-8"), numbers), encoding="utf-8")
    _write_accuracy(problem, found)


def _uses(problem: Problem, row: int, parameter: Parameter) -> bool:
    from planner.validation.fit import relevant

    return relevant(parameter, problem.facts[row].prepared)


def _write_accuracy(problem: Problem, found: Mapping[str, Floats]) -> None:
    lines = [
        "# Errors of published runs that the constants were not fitted to; written by the fit.",
        f'note = "fitted without them: {HELD_OUT}; then {SOURCE_OUT}, {FAMILY_OUT}"',
    ]
    for how, short in ((HELD_OUT, ""), (SOURCE_OUT, "source out, "), (FAMILY_OUT, "family out, ")):
        for name, s in scored(problem, found[how]).items():
            lines += [
                "", f'[classes."{short}{name}"]', f"n = {s.n}", f"mape = {s.mape:.4f}",
                f"median = {s.median:.4f}", f"bias = {s.bias:.4f}", f"p90 = {s.p90:.4f}",
            ]  # fmt: skip
    path = _FOLDER / "validation" / "accuracy.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
