"""Constants of collectives inside one node, from what was timed under torchrun.

The model's own form (`links.library_seconds`): a protocol of low latency that gives way to one of
full rate. A device whose like was never measured has the latter alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cost_models.calibrate import (
    COLLECTIVES,
    MOST_ERROR,
    FittedTable,
    FloatArray,
    Measured,
    Probe,
)
from cost_models.constants_table import Constants, load_constants
from cost_models.fit.least_squares import fit
from cost_models.links import PASSES, library_seconds

# Spread (natural logarithm) within which the nearest device's constants are believed: protocols
# are the library's, starts and rates the host's.
_SPREAD = {"overhead_s": 1.0, "sqrt_s": 1.0, "bytes_per_s": 0.7}
_SMALL_SPREAD = {"low_sqrt_s": 0.7, "start_s": 0.7, "switch_bytes": 0.5}
Form = dict[str, float]


def fit_collectives(run: Measured, base: str, line_bytes_per_s: float) -> tuple[FittedTable, ...]:
    """A table for each kind of collective; none without torchrun.

    A single size of group gets a size of one beside it, which sends nothing: sizes between and
    beyond are interpolated, and two make a line. line_bytes_per_s: what the rates are relative to;
    where a kind is refused, and so stays the base's, they are relative to what the base's are.
    """
    kinds = [kind for kind in COLLECTIVES if run.of(kind)]
    if not kinds:
        return ()
    table = load_constants(base)
    made = [_fit_kind(run, table, kind) for kind in kinds]
    if any(one.refused for one in made):
        share = table.number("collective.link_bytes_per_s") / line_bytes_per_s
        return tuple(_scaled(one, share) for one in made)
    link = FittedTable(
        name="collective", values=(("link_bytes_per_s", line_bytes_per_s),),
        samples=sum(len(run.of(kind)) for kind in kinds),
    )  # fmt: skip
    return (link, *made)


def _scaled(table: FittedTable, share: float) -> FittedTable:
    """Its rates times `share`."""
    values = tuple(
        (key, tuple(v * share for v in value) if isinstance(value, tuple) else value)
        if key == "bytes_per_s"
        else (key, value)
        for key, value in table.values
    )
    return replace(table, values=values)


def _fit_kind(run: Measured, table: Constants, kind: str) -> FittedTable:
    """One kind of collective over all sizes of groups."""
    groups = [
        [p for p in run.of(kind) if p.shape[0] == n]
        for n in sorted({p.shape[0] for p in run.of(kind)})
    ]
    starts = [_start(table, probes) for probes in groups]
    off = [e for start, probes in zip(starts, groups) for e in _held_out(start, probes)]
    error = float(np.median(off))
    name = f"collective.{kind}"
    forms = [_solve(start, probes) for start, probes in zip(starts, groups)]
    if error > MOST_ERROR:
        return FittedTable(
            name=name, values=(), samples=len(off), median_error=error, refused=tuple(forms[0]),
            base_error=_base_error(table, groups),
        )  # fmt: skip
    ranks = [float(probes[0].shape[0]) for probes in groups]
    if len(forms) == 1:
        ranks, forms = [1.0, *ranks], [{**forms[0], "overhead_s": 0.0}, *forms]
    columns = [(key, tuple(form[key] for form in forms)) for key in forms[0]]
    return FittedTable(
        name=name, values=(("ranks", tuple(ranks)), *columns), samples=len(off), median_error=error
    )


def _base_error(table: Constants, groups: Sequence[Sequence[Probe]]) -> float:
    """Median error of the base's own form, at the link that it was measured on."""
    off = []
    for probes in groups:
        name, ranks = f"collective.{probes[0].op}", probes[0].shape[0]
        at = np.log2(table.numbers(f"{name}.ranks"))
        form = {
            key: float(np.interp(np.log2(ranks), at, table.numbers(f"{name}.{key}")))
            for key in (*_SPREAD, *_SMALL_SPREAD)
            if table.has(f"{name}.{key}")
        }
        off += [abs(float(_seconds(form, [p])[0]) / p.median_s - 1) for p in probes]
    return float(np.median(off))


def _start(table: Constants, probes: Sequence[Probe]) -> Form:
    """The base's form at that many ranks; latency and rate as seen, which any host has its own."""
    kind, ranks = probes[0].op, probes[0].shape[0]
    name, share = f"collective.{kind}", PASSES[kind] * (ranks - 1) / ranks
    at = np.log2(table.numbers(f"{name}.ranks"))

    def between(key: str) -> float:
        return float(np.interp(np.log2(ranks), at, table.numbers(f"{name}.{key}")))

    least = min(p.median_s for p in probes)
    start = {"overhead_s": 0.8 * least, "sqrt_s": max(between("sqrt_s"), 1e-10),
             "bytes_per_s": max(p.bytes_per_s for p in probes) * share}  # fmt: skip
    if table.has(f"{name}.switch_bytes"):
        start |= {key: max(between(key), 1e-10) for key in _SMALL_SPREAD}
    return start


def _seconds(form: Form, probes: Sequence[Probe]) -> FloatArray:
    size = np.array([p.moved_bytes for p in probes])
    ranks = np.full_like(size, probes[0].shape[0])
    small = {"low_sqrt_s": 0.0, "start_s": 0.0, "switch_bytes": 1e-9}  # the large protocol alone
    c = {key: np.asarray(value) for key, value in {**small, **form, "efficiency": 1.0}.items()}
    passes, line = np.asarray(PASSES[probes[0].op]), np.asarray(form["bytes_per_s"])
    return library_seconds(c, size, ranks, passes, line)


def _solve(start: Form, probes: Sequence[Probe]) -> Form:
    measured = np.log([p.median_s for p in probes])

    def form_of(x: FloatArray) -> Form:
        return dict(zip(start, np.exp(x).tolist()))

    def residuals(x: FloatArray) -> FloatArray:
        return np.asarray(np.log(_seconds(form_of(x), probes)) - measured)

    spread = {**_SPREAD, **_SMALL_SPREAD}
    sd = np.array([spread[key] for key in start])
    return form_of(fit(residuals, np.log(list(start.values())), sd, scale=0.1).x)


def _held_out(start: Form, probes: list[Probe]) -> list[float]:
    """Relative errors, each sample predicted by a fit to the others where there are four."""

    def error(form: Form, p: Probe) -> float:
        return abs(float(_seconds(form, [p])[0]) / p.median_s - 1)

    if len(probes) < 4:
        return [error(_solve(start, probes), p) for p in probes]
    return [error(_solve(start, probes[:i] + probes[i + 1 :]), p) for i, p in enumerate(probes)]
