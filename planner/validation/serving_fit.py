"""Fit the engines' constants on a table of serving runs.

`python -m planner.validation.serving_fit serving_runs.csv configs/`: a few numbers an engine, on
log errors, robustly. TPOT gives what a step takes, TTFT what a request waits. Errors are cross-
validated: each (model, device) group is predicted with constants that were fitted without it. What
is printed goes into `cost_models/serving_engines.toml` and docs/serving.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cost_models.serving_engines import ServingEngine, load_serving_engine, serving_engines
from cost_models.serving_shapes import ServedModel
from cost_models.validation.metrics import scores
from planner.validation.serving import (
    ServedPrediction,
    capped,
    drafted,
    models_of,
    predict,
)
from planner.validation.serving_rows import ServedRow, read_serving

FloatArray = NDArray[np.float64]
# (constant, least, most, step of its derivative): a step's, then a request's.
STEP = (("start_share", 0.0, 1.5, 0.02), ("step_host_s", 0.0, 5e-3, 5e-5),
        ("sequence_host_s", 0.0, 2e-4, 2e-6))  # fmt: skip
# A request takes 2 ms of its server and its tokenizer at the least.
REQUEST = (("request_host_s", 2e-3, 0.5, 2e-3), ("wait_prompts", 0.0, 6.0, 0.05),
           ("arrival_host_s", 0.0, 0.1, 5e-4))  # fmt: skip
_TAIL = 0.15, 0.3  # errors beyond count by their size, not their square: of TPOT, of TTFT
_AGAIN = 3  # rounds of a fit that starts from one with a group more
Free = Sequence[tuple[str, float, float, float]]
Models = Mapping[Path, ServedModel]


def _errors(
    rows: Sequence[ServedRow], models: Models, engine: ServingEngine, name: str
) -> FloatArray:
    """Log of predicted over measured."""
    engines = {row.engine: engine for row in rows}
    found, _ = predict(rows, models, engines)
    return np.array([np.log(getattr(o, name) / getattr(o.row, name)) for o in found])


def fitted(
    rows: Sequence[ServedRow], models: Models, engine: ServingEngine, free: Free, name: str,
    tail: float, rounds: int = 8,
) -> ServingEngine:  # fmt: skip
    """The engine with its free constants at the least robust error: Levenberg-Marquardt with
    weights that fall with the error."""
    keys = [key for key, *_ in free]
    low, high, step = (np.array([f[i] for f in free], dtype=np.float64) for i in (1, 2, 3))

    def at(values: FloatArray) -> FloatArray:
        changed = dict(zip(keys, (float(v) for v in values), strict=True))
        return _errors(rows, models, replace(engine, **changed), name)  # type: ignore[arg-type]

    def loss(errors: FloatArray) -> float:
        far = np.abs(errors)
        return float(np.where(far < tail, far**2 / (2 * tail), far - tail / 2).mean())

    values = np.array([getattr(engine, key) for key in keys], dtype=np.float64)
    errors, damping = at(values), 1e-2
    for _ in range(rounds):
        weight = 1 / np.maximum(np.abs(errors), tail)
        sides = np.where(values + step <= high, step, -step)
        slopes = np.stack([(at(values + np.eye(len(step))[i] * sides[i]) - errors) / sides[i]
                           * step[i] for i in range(len(step))], axis=1)  # fmt: skip
        normal, pull = (slopes * weight[:, None]).T @ slopes, (slopes * weight[:, None]).T @ errors
        for _ in range(5):
            move = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -pull)
            tried = np.clip(values + move * step, low, high)
            found = at(tried)
            if loss(found) < loss(errors):
                values, errors, damping = tried, found, damping / 5
                break
            damping *= 6
        else:
            break
    return replace(engine, **dict(zip(keys, (float(v) for v in values))))  # type: ignore[arg-type]


def fit_engine(
    rows: Sequence[ServedRow], models: Models, engine: ServingEngine, rounds: int = 8
) -> ServingEngine:
    """All constants of an engine, those of a step first."""
    engine = fitted(rows, models, engine, STEP, "tpot_s", _TAIL[0], rounds)
    return fitted(rows, models, engine, REQUEST, "ttft_s", _TAIL[1], rounds)


def fit_rows(rows: Sequence[ServedRow], models: Models) -> list[ServedRow]:
    """Runs to fit on: those that the report scores, each configuration and load once."""
    engines = {name: load_serving_engine(name) for name in serving_engines()}
    found, _ = predict(rows, models, engines)
    fast = drafted(found)
    once: dict[object, ServedPrediction] = {}
    for one in found:
        if one.row.id not in fast and not capped(one):
            load = (one.row.prompt, one.row.output, one.row.serving.batch)
            once.setdefault((one.row.series, load, one.row.tpot_s), one)
    return [one.row for one in once.values()]


def _group(row: ServedRow) -> tuple[str, str]:
    return row.model.replace("deepseek-r1", "deepseek-v3"), row.cluster.device.name


def main(say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("configs", type=Path)
    parser.add_argument("--engine", default="")
    asked = parser.parse_args()
    table = read_serving(asked.table, asked.configs)
    models, _ = models_of(table.rows)
    rows = fit_rows([row for row in table.rows if row.config in models], models)
    for name in sorted({row.engine for row in rows}):
        if asked.engine and name != asked.engine:
            continue
        mine = [row for row in rows if row.engine == name]
        engine = fit_engine(mine, models, load_serving_engine(name))
        say(f"[{name}] {len(mine)} runs")
        for key, *_ in (*STEP, *REQUEST):
            say(f"{key} = {getattr(engine, key):.4g}")
        left: list[ServedPrediction] = []
        for group in sorted({_group(row) for row in mine}):
            kept = [row for row in mine if _group(row) != group]
            tested = [row for row in mine if _group(row) == group]
            if kept:
                without = fit_engine(kept, models, engine, _AGAIN)
                left += predict(tested, models, {name: without})[0]
        for what, found in (("in sample", predict(mine, models, {name: engine})[0]),
                            ("left out", left)):  # fmt: skip
            for key in ("tpot_s", "ttft_s"):
                if found:
                    s = scores([(getattr(o, key), getattr(o.row, key)) for o in found])
                    say(f"{what} {key}: n {s.n} MAPE {s.mape:.3f} median {s.median:.3f}"
                        f" p90 {s.p90:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
