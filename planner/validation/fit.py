"""Fit the constants of a training step on published runs.

    python -m planner.validation.fit --data DIR [--keep] [--memory] [--write]

Every constant is a named physical thing with a prior; groups of rows weigh by the square root of
their number, so that many releases of one configuration count little more than one. Reported are
errors of rows that were not fitted: cross-validated by group, with one source left out, and with
one GPU generation left out. Those fits start from the whole one's slopes: only the rows that
stay move the constants. --keep moves none: the shipped ones are scored so. What allocators hold is
fitted to peaks after that (`fit_memory.py`), --memory: that alone.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cost_models.compute import kernels_of
from cost_models.constants_table import Constants, load_constants
from cost_models.engines import load_engine
from cost_models.fit.least_squares import fit
from cost_models.validation.accuracy import write_accuracy
from planner.validation.fit_accuracy import (
    GENERATION_OUT,
    HELD_OUT,
    IN_SAMPLE,
    SOURCE_OUT,
    memory_parts,
    memory_text,
    step_parts,
)
from planner.validation.fit_memory import RESERVES, fit_reserve
from planner.validation.fit_parameters import PARAMETERS, Parameter
from planner.validation.fit_report import (
    FILES,
    LINK_EFFICIENCY,
    report,
    write_reserves,
    write_steps,
)
from planner.validation.predict import Prepared, step_s
from planner.validation.running import Row

Floats = NDArray[np.float64]
Values = Mapping[str, float]
SCALE = 0.12  # residual at which a row begins to count as an outlier
STEP = 0.02  # of a logarithm, for slopes


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A case with its recomputation settled, its measured seconds (nan where it has none), and
    what the shipped constants predict."""

    prepared: Prepared
    measured_s: float
    row: Row


def changed(prepared: Prepared, values: Values) -> Prepared:
    """A case under other constants."""
    case = prepared.case
    engine, cluster = case.engine, case.cluster
    fields: dict[str, float] = {}
    numbers: dict[str, float] = {}
    factors: dict[str, dict[str, float]] = {}
    for place, value in values.items():
        where, _, name = place.partition("/")
        if where.startswith("engine:"):
            if engine.name in where[7:].split("+"):
                fields[name] = value
        elif where.startswith("switch:"):
            factors.setdefault(where[7:], {})[name] = value
        elif where == "link":
            inter = cluster.inter
            share = min(1.0, value * inter.efficiency / LINK_EFFICIENCY)
            cluster = replace(cluster, inter=replace(inter, efficiency=share))
        elif where in ("*", cluster.device.family, cluster.device.constants):
            numbers[name] = value
    table = overlay(load_constants(cluster.device.constants), numbers)
    switches = tuple(
        (name, tuple({**dict(row), **factors.get(name, {})}.items()))
        for name, row in engine.switches
    )
    engine = replace(engine, switches=switches, **fields)  # type: ignore[arg-type]
    made = replace(case, engine=engine, cluster=cluster)
    kernels = kernels_of(cluster.device, table, engine.attention)
    return replace(prepared, case=made, kernels=kernels)


def overlay(table: Constants, numbers: Mapping[str, float]) -> Constants:
    """A table with some numbers changed; what it does not have is not added."""
    return replace(table, items=tuple(
        replace(c, value=numbers[c.name]) if c.name in numbers else c for c in table.items
    ))  # fmt: skip


def relevant(parameter: Parameter, prepared: Prepared) -> bool:
    """Whether a constant can move a case's step."""
    where, _, name = parameter.place.partition("/")
    case = prepared.case
    if where.startswith("engine:"):
        return case.engine.name in where[7:].split("+")
    if where.startswith("switch:"):
        return where[7:] in case.switches
    if where == "link":
        return case.cluster.nodes > 1
    if name.startswith("scan."):
        return bool(case.run.model.get("hybrid"))
    if name.startswith("grouped_gemm."):
        return case.run.is_moe
    if name.startswith(("gemm.fp8", "gemm.nvfp4")) and name.split(".")[1] != (
        case.workload.precision
    ):
        return False
    if name.endswith(("flash2_ratio", "triton_ratio")) and case.engine.attention == "best":
        return False
    return where in ("*", case.cluster.device.family, case.cluster.device.constants)


def shipped(parameter: Parameter) -> float:
    """The constant as the files have it."""
    where, _, name = parameter.place.partition("/")
    if where.startswith("engine:"):
        return float(getattr(load_engine(where[7:].partition("+")[0]), name))
    if where.startswith("switch:"):
        return float(dict(dict(load_engine("native").switches)[where[7:]])[name])
    return LINK_EFFICIENCY if where == "link" else load_constants(FILES[where][0]).number(name)


# --- the fit ------------------------------------------------------------------------------------

_FACTS: list[Fact] = []  # of a worker: forked after these are set, so that no job carries them


def _one(job: tuple[int, Values]) -> float:
    index, values = job
    return step_s(changed(_FACTS[index].prepared, values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A fit of all rows: parameters, residuals there, their slopes."""

    x: Floats
    residuals: Floats
    slopes: Floats


@dataclass(kw_only=True)
class Problem:
    """Rows to fit and the processes that predict them."""

    facts: Sequence[Fact]
    parameters: Sequence[Parameter]
    pool: Pool

    def values(self, x: Floats) -> Values:
        return {
            p.place: min(p.most, p.prior * math.exp(float(v)))
            for p, v in zip(self.parameters, x)
        }

    def predicted(self, x: Floats, rows: Sequence[int]) -> Floats:
        values = self.values(x)
        return np.array(self.pool.map(_one, [(i, values) for i in rows], chunksize=8))

    def residuals(self, x: Floats, rows: Sequence[int]) -> Floats:
        measured = np.array([self.facts[i].measured_s for i in rows])
        return np.asarray(np.log(self.predicted(x, rows) / measured))

    def slopes(self, x: Floats, rows: Sequence[int]) -> Floats:
        """d residual / d parameter, [rows, parameters]; nothing where a constant is not used."""
        start = self.predicted(x, rows)
        jobs, where = [], []
        for k, parameter in enumerate(self.parameters):
            moved = x.copy()
            moved[k] += STEP if parameter.prior * math.exp(x[k] + STEP) < parameter.most else -STEP
            values = self.values(moved)
            for n, i in enumerate(rows):
                if relevant(parameter, self.facts[i].prepared):
                    jobs.append((i, values))
                    where.append((n, k, moved[k] - x[k]))
        found = np.zeros((len(rows), len(self.parameters)))
        for (n, k, step), seconds in zip(where, self.pool.map(_one, jobs, chunksize=16)):
            found[n, k] = math.log(seconds / start[n]) / step
        return found

    def weights(self, rows: Sequence[int]) -> Floats:
        """A group of n rows counts as sqrt(n)."""
        counts = Counter(self.facts[i].prepared.case.run.group for i in rows)
        return np.array([counts[self.facts[i].prepared.case.run.group] ** -0.5 for i in rows])

    @property
    def prior_sd(self) -> Floats:
        return np.array([p.sd for p in self.parameters])

    def solve(self, rows: Sequence[int], most_steps: int) -> Floats:
        """Parameters (logarithms over their priors) fitted to some rows, exactly."""
        return fit(
            lambda x: self.residuals(x, rows), np.zeros(len(self.parameters)), self.prior_sd,
            scale=SCALE, weights=self.weights(rows), most_steps=most_steps, tolerance=1e-3,
            jacobian=lambda x: self.slopes(x, rows),
        ).x  # fmt: skip

    def without(self, left: Sequence[int], rows: Sequence[int], whole: Whole) -> Floats:
        """Parameters of a fit to all rows but those left out, residuals taken as linear in x."""
        gone = set(left)
        keep = [n for n, i in enumerate(rows) if i not in gone]
        here = [rows[n] for n in keep]

        def linear(y: Floats) -> Floats:
            return np.asarray(whole.residuals[keep] + whole.slopes[keep] @ (y - whole.x))

        return fit(
            linear, np.zeros(len(whole.x)), self.prior_sd, scale=SCALE,
            weights=self.weights(here), jacobian=lambda y: whole.slopes[keep], most_steps=60,
        ).x  # fmt: skip


def held_out(
    problem: Problem, rows: Sequence[int], whole: Whole, key: Callable[[Fact], str], folds: int = 0
) -> Floats:
    """Predicted seconds of each row by a fit that did not see its key; folds: so many parts of
    the keys at a time, in turn by size, or each key alone."""
    keys = [key(problem.facts[i]) for i in rows]
    counted = Counter(keys)
    order = sorted(counted, key=lambda k: (-counted[k], k))
    part = {k: (n % folds if folds else n) for n, k in enumerate(order)}
    found = np.zeros(len(rows))
    for fold in sorted(set(part.values())):
        here = [n for n, k in enumerate(keys) if part[k] == fold]
        left = [rows[n] for n in here]
        found[here] = problem.predicted(problem.without(left, rows, whole), left)
    return found


def _group(fact: Fact) -> str:
    return fact.prepared.case.run.group


def _source(fact: Fact) -> str:
    return fact.prepared.case.run.source


def _generation(fact: Fact) -> str:
    return fact.prepared.case.cluster.device.family


# --- the program --------------------------------------------------------------------------------


def collect(data: Path) -> list[Fact]:
    """Every run of the data directory, its graph traced and recomputation settled."""
    from planner.validation.configure import configure
    from planner.validation.predict import predict, prepare, settled
    from planner.validation.rows import Skipped, read_runs
    from planner.validation.running import row_of

    facts = []
    for run in read_runs(data / "training_runs.yaml"):
        try:
            prepared = prepare(configure(run))
        except Skipped as reason:
            print(f"{run.id} is left out: {reason}", file=sys.stderr)
            continue
        row = row_of(prepared.case, predict(prepared))
        facts.append(Fact(
            prepared=settled(prepared), measured_s=row.measured_s or math.nan, row=row
        ))  # fmt: skip
    return facts


def fit_steps(facts: Sequence[Fact], most_steps: int, keep: bool, save: bool) -> str:
    """Fit constants of a step to runs that have a time, or keep them; the report."""
    _FACTS[:] = [fact for fact in facts if math.isfinite(fact.measured_s)]
    rows = list(range(len(_FACTS)))
    with get_context("fork").Pool(os.cpu_count()) as pool:
        problem = Problem(facts=_FACTS, parameters=PARAMETERS, pool=pool)
        x = np.array([math.log(shipped(p) / p.prior) for p in PARAMETERS])
        x = x if keep else problem.solve(rows, most_steps)
        whole = Whole(x=x, residuals=problem.residuals(x, rows), slopes=problem.slopes(x, rows))
        found = {
            IN_SAMPLE: problem.predicted(x, rows),
            HELD_OUT: held_out(problem, rows, whole, _group, folds=5),
            SOURCE_OUT: held_out(problem, rows, whole, _source),
            GENERATION_OUT: held_out(problem, rows, whole, _generation),
        }
    if save:
        write_steps(problem, whole, found, keep)
        write_accuracy(step_parts(problem.facts, found))
    return report(problem, x, found)


def fit_memory(facts: Sequence[Fact], keep: bool, save: bool) -> str:
    """Fit what allocators hold to runs that print a peak, or keep it; the report."""
    held = [fit_reserve(reserve, facts) for reserve in RESERVES]
    parts = memory_parts(facts, held)
    if save:
        write_reserves(held, keep)
        write_accuracy(parts)
    return memory_text(held, parts)


def main(arguments: list[str] | None = None) -> int:
    """Fit, print errors of rows left out, and write the constants if told to."""
    parser = argparse.ArgumentParser(prog="python -m planner.validation.fit", description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("MESHWRIGHT_DATA"), metavar="DIR",
        help="the data directory; MESHWRIGHT_DATA by default",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=8, help="at most so many steps of the fit")
    parser.add_argument("--keep", action="store_true", help="move no constant: errors alone")
    parser.add_argument("--memory", action="store_true", help="peaks alone, without step times")
    parser.add_argument("--write", action="store_true", help="rewrite constants, errors in place")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("no data directory: --data DIR, or MESHWRIGHT_DATA")
    facts = collect(options.data)
    if not options.memory:
        print(fit_steps(facts, options.steps, options.keep, options.write))
    print(fit_memory(facts, options.keep, options.write))
    return 0


if __name__ == "__main__":
    sys.exit(main())
