"""Fit the engines' constants on a table of serving runs.

`python -m planner.validation.serving_fit serving_runs.csv configs/ [--write]`: a few numbers an
engine, on log errors, robustly. TPOT gives what a step takes, TTFT what a request waits. Errors are
cross-validated: each (model, device) group is predicted with constants that were fitted without it.
The constants that are printed go into `cost_models/serving_engines.toml`; --write, with those in
place, writes `cost_models/validation/accuracy.toml`, of which the tables of the documents
are made (`python -m planner.validation.tables`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cost_models.serving_engines import ServingEngine, load_serving_engine, serving_engines
from cost_models.serving_shapes import ServedModel
from cost_models.validation.accuracy import write_accuracy
from cost_models.validation.metrics import scores
from planner.validation.serving import (
    ServedPrediction,
    capped,
    drafted,
    models_of,
    predict,
    report_of,
    stalled,
)
from planner.validation.serving_rows import ServedRow, read_serving

FloatArray = NDArray[np.float64]
# (constant, least, most, step of its derivative): a step's, then a request's.
STEP = (("start_share", 0.0, 1.5, 0.02), ("step_host_s", 0.0, 5e-3, 5e-5),
        ("sequence_host_s", 0.0, 2e-4, 2e-6))  # fmt: skip
# A request takes 2 ms of its server and its tokenizer at the least.
REQUEST = (("request_host_s", 2e-3, 0.5, 2e-3), ("wait_prompts", 0.0, 6.0, 0.05),
           ("arrival_host_s", 0.0, 0.1, 5e-4), ("routed_op_host_s", 0.0, 1e-4, 1e-6))  # fmt: skip
_TAIL = 0.15, 0.3  # errors beyond count by their size, not their square: of TPOT, of TTFT
_ALL = 1e9  # prompts: as many as there are
_ROUNDS = 40
# Where a request's constants are looked for from, beside what they are.
_STARTS = ((0.02, 0.3, 5e-3, 1e-6), (0.05, 1.5, 1e-3, 1e-5), (0.01, 0.05, 15e-3, 3e-5))
_EARLY = ("trtllm-2025", "vllm-2025")  # of rows that say no version
_AGAIN = 2  # times that what a step's constants add is costed anew
Free = Sequence[tuple[str, float, float, float]]
Models = Mapping[Path, ServedModel]
Errors = Callable[[FloatArray], FloatArray]


def _lines(
    rows: Sequence[ServedRow], models: Models, engine: ServingEngine, free: Free, name: str
) -> Callable[[FloatArray], Errors]:
    """Log errors of a time by constants, for those of `rows` that a mask picks. What each constant
    adds is costed once: a request's enter its time linearly (others' prompts up to half of those
    there are), a step's nearly so."""
    request = free is REQUEST

    def seconds(**changed: float) -> tuple[list[ServedPrediction], FloatArray]:
        engines = {row.engine: replace(engine, **changed) for row in rows}  # type: ignore[arg-type]
        found, _ = predict(rows, models, engines)
        return found, np.array([getattr(one, name) for one in found])

    start = {key: 0.0 if request else float(getattr(engine, key)) for key, *_ in free}
    found, none = seconds(**start)
    most = np.array([max(one.running - 1, 0.0) / 2 for one in found])
    measured = np.array([getattr(one.row, name) for one in found])
    slopes = {}
    for key, _, _, step in free:
        by = _ALL if key == "wait_prompts" else step
        more = seconds(**{**start, key: start[key] + by})[1] - none
        slopes[key] = more / (np.maximum(most, 1e-9) if key == "wait_prompts" else by)

    def some(mask: FloatArray) -> Errors:
        def at(values: FloatArray) -> FloatArray:
            total = none[mask]
            for key, value in zip(slopes, values, strict=True):
                by = np.minimum(value, most[mask]) if key == "wait_prompts" else value - start[key]
                total = total + slopes[key][mask] * by
            return np.asarray(np.log(np.maximum(total, 1e-9) / measured[mask]))

        return at

    return some


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """What constants are held to: a value each, and what is far from it: so far off costs as much
    as one more run whose first token is wrong by a factor of e**.65."""

    mean: tuple[float, ...]
    spread: tuple[float, ...]


# Runs of few models do not tell a request's constants apart: without it the fit gives some engines
# all of one and nothing of another. Mean and standard deviation over the five engines fitted each
# by itself; of request_host_s the median, for one of them had taken what its ops wait. They are of
# costs in which the host held up no other request.
POOLED = Prior(mean=(0.012, 0.7, 6.3e-3, 8e-6), spread=(0.012, 0.7, 4.3e-3, 1e-5))


def fitted(
    errors_of: Errors, start: FloatArray, free: Free, tail: float, prior: Prior | None = None
) -> tuple[FloatArray, float]:
    """(constants of the least robust error, that error): Levenberg-Marquardt with weights that fall
    with the error."""
    low, high, step = (np.array([f[i] for f in free], dtype=np.float64) for i in (1, 2, 3))
    mean = np.array(prior.mean) if prior else np.zeros(len(step))
    held = 1 / np.array(prior.spread) if prior else np.zeros(len(step))

    def loss(errors: FloatArray, at: FloatArray) -> float:
        far = np.abs(errors)
        runs = np.where(far < tail, far**2 / (2 * tail), far - tail / 2).mean()
        return float(runs + ((held * (at - mean)) ** 2).sum() / 2 / len(errors))

    values = np.clip(start, low, high)
    errors, damping = errors_of(values), 1e-2
    for _ in range(_ROUNDS):
        weight = 1 / np.maximum(np.abs(errors), tail)
        sides = np.where(values + step <= high, step, -step)
        slopes = np.stack([(errors_of(values + np.eye(len(step))[i] * sides[i]) - errors)
                           / sides[i] * step[i] for i in range(len(step))], axis=1)  # fmt: skip
        normal, pull = (slopes * weight[:, None]).T @ slopes, (slopes * weight[:, None]).T @ errors
        normal = normal + np.diag((held * step) ** 2)
        pull = pull + held**2 * (values - mean) * step
        for _ in range(5):
            move = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -pull)
            tried = np.clip(values + move * step, low, high)
            found = errors_of(tried)
            if loss(found, tried) < loss(errors, values):
                values, errors, damping = tried, found, damping / 5
                break
            damping *= 6
        else:
            break
    return values, loss(errors, values)


def _best(
    errors_of: Errors, engine: ServingEngine, free: Free, tail: float, prior: Prior | None = None
) -> ServingEngine:
    """The engine with the best constants from its own and from other starts."""
    keys = [key for key, *_ in free]
    starts = [[getattr(engine, key) for key in keys], *(_STARTS if free is REQUEST else ())]
    tried = [fitted(errors_of, np.array(at), free, tail, prior) for at in starts]
    values = min(tried, key=lambda one: one[1])[0]
    return replace(engine, **dict(zip(keys, (float(v) for v in values))))  # type: ignore[arg-type]


def fit_engine(
    rows: Sequence[ServedRow], models: Models, engine: ServingEngine, prior: Prior | None = POOLED
) -> tuple[ServingEngine, Callable[[FloatArray], ServingEngine]]:
    """The engine with all its constants fitted, those of a step first; and the fit of the rows that
    a mask picks, from there."""
    every = np.ones(len(rows), dtype=bool)
    for _ in range(_AGAIN):
        steps = _lines(rows, models, engine, STEP, "tpot_s")
        engine = _best(steps(every), engine, STEP, _TAIL[0])
        requests = _lines(rows, models, engine, REQUEST, "ttft_s")
        engine = _best(requests(every), engine, REQUEST, _TAIL[1], prior)
    steps = _lines(rows, models, engine, STEP, "tpot_s")

    def of(mask: FloatArray) -> ServingEngine:
        part = _best(steps(mask), engine, STEP, _TAIL[0])
        return _best(requests(mask), part, REQUEST, _TAIL[1], prior)

    return engine, of


def fit_rows(rows: Sequence[ServedRow], models: Models) -> list[ServedRow]:
    """Runs to fit on: those that the report scores, each configuration and load once; but not those
    that say no version of an engine whose constants are another release's."""
    engines = {name: load_serving_engine(name) for name in serving_engines()}
    found, _ = predict(rows, models, engines)
    fast = drafted(found)
    once: dict[object, ServedPrediction] = {}
    for one in found:
        early = one.row.engine not in _EARLY and not one.row.version
        if one.row.id not in fast and not capped(one) and not stalled(one) and not early:
            load = (one.row.prompt, one.row.output, one.row.serving.batch)
            once.setdefault((one.row.series, load, one.row.tpot_s), one)
    return [one.row for one in once.values()]


def _group(row: ServedRow) -> tuple[str, str]:
    return row.model.replace("deepseek-r1", "deepseek-v3"), row.cluster.device.name


def _scores(found: Sequence[ServedPrediction]) -> dict[str, float]:
    """Of both times, as the file of errors has them."""
    pairs = {key: [(getattr(o, f"{key}_s"), getattr(o.row, f"{key}_s")) for o in found]
             for key in ("tpot", "ttft")}  # fmt: skip
    made: dict[str, float] = {"n": len(found)}
    for key, both in pairs.items():
        s = scores(both)
        made |= {f"{key}_mape": s.mape, f"{key}_median": s.median}
    return made


def without_group(
    rows: Sequence[ServedRow], models: Models, of: Callable[[FloatArray], ServingEngine]
) -> list[ServedPrediction]:
    """Each (model, device) by constants that were fitted without it; none where that is all."""
    left: list[ServedPrediction] = []
    groups = [_group(row) for row in rows]
    for group in sorted(set(groups)):
        kept = np.array([other != group for other in groups])
        if kept.any():
            tested = [row for row, keep in zip(rows, kept, strict=True) if not keep]
            left += predict(tested, models, {row.engine: of(kept) for row in tested[:1]})[0]
    return left


def main(say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("configs", type=Path)
    parser.add_argument("--write", action="store_true", help="errors, for the documents")
    asked = parser.parse_args()
    table = read_serving(asked.table, asked.configs)
    models, faults = models_of(table.rows)
    rows = fit_rows([row for row in table.rows if row.config in models], models)
    out: dict[str, dict[str, float]] = {}
    everything: list[ServedPrediction] = []
    for name in sorted({row.engine for row in rows}):
        mine = [row for row in rows if row.engine == name]
        engine, of = fit_engine(mine, models, load_serving_engine(name))
        say(f"[{name}] {len(mine)} runs")
        for key, *_ in (*STEP, *REQUEST):
            say(f"{key} = {getattr(engine, key):.4g}")
        fit, left = predict(mine, models, {name: engine})[0], without_group(mine, models, of)
        everything += left
        out[name] = _scores(left) if left else {}
        for what, one in (("in sample", _scores(fit)), ("left out", out[name])):
            say(f"{what}: " + ", ".join(f"{key} {value:.4g}" for key, value in one.items()))
    if asked.write:
        engines = {name: load_serving_engine(name) for name in serving_engines()}
        report = report_of(table, models, engines, faults)
        out["all"] = _scores(everything)
        whole = [c for c in (*report.classes, report.everything) if c]
        write_accuracy({
            "serving": {
                f"{c.dimension} {c.name}".strip(): {
                    "n": c.tpot.n, "tpot_mape": c.tpot.mape, "tpot_median": c.tpot.median,
                    "ttft_mape": c.ttft.mape, "ttft_median": c.ttft.median,
                } for c in whole if c.dimension in ("", "kind", "engine")
            },
            "serving-left-out": {name: one for name, one in out.items() if one},
        })  # fmt: skip


if __name__ == "__main__":
    main()
