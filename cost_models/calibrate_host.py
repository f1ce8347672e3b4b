"""What serving asks of a host, from its probes: `[constants.host]` of the hardware file."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.calibrate import MOST_ERROR, FittedTable, Measured, Probe
from cost_models.fit.least_squares import fit
from cost_models.serving_host import FITTED_KEYS, Products, assumed_products

FloatArray: TypeAlias = NDArray[np.float64]

_LEAST_PRODUCTS = 6  # of five constants
# Spread (natural logarithm) of what is started from: the best rates of all products; 50 ns, half
# of what memory answers in; and 1.5, between limits that add and limits that overlap.
_SD = np.array([0.5, 0.5, 1.0, 0.5, 0.5])
_COLUMN_S, _SMOOTHNESS = 5e-8, 1.5


def fit_host(run: Measured) -> tuple[FittedTable, ...]:
    """Products of the CPU in each format, a piece fetched, a call, a token."""
    found = {dtype: _products(run, dtype) for dtype in ("fp32", "bf16")}
    tables = [one[0] for one in found.values() if one]
    wide = found["fp32"]
    return (*tables, *_host(run, wide[1] if wide and not wide[0].refused else None))


def _host(run: Measured, fp32: Products | None) -> tuple[FittedTable, ...]:
    samples = list(run.of("fetch", "piece"))
    values = [(f"{p.op}_s", p.median_s) for p in samples]
    fetched = run.of("disk_fetch")
    values += [("disk_bytes_per_s", p.bytes_per_s) for p in fetched]
    samples += fetched
    tokens = sorted(run.of("token"), key=lambda p: p.shape)
    if len(tokens) == 2 and (not any(p.moved_bytes for p in tokens) or fp32):
        few, many = tokens
        # On a CPU products are a part of a token, not on a GPU, which is behind its host.
        few_s, many_s = (
            p.median_s
            - (float(fp32.seconds(p.moved_bytes, p.flop, 1, p.shape[2])) if fp32 else 0.0)
            for p in tokens
        )
        op_s = (many_s - few_s) / (many.shape[1] - few.shape[1])
        token_s = few_s - op_s * few.shape[1]
        if op_s > 0 and token_s > 0:  # else they were disturbed, and say nothing
            values += [("op_s", op_s), ("token_s", token_s)]
            samples += tokens
            started = sorted(run.of("request"), key=lambda p: p.shape)
            if started and started[0].median_s > 0:
                values.append(("request_s", started[0].median_s))
                samples.append(started[0])
    if not values:
        return ()
    spread = float(np.median([p.spread for p in samples]))
    return (FittedTable(name="host", values=tuple(values), samples=len(samples),
                        median_error=spread),)  # fmt: skip


def _products(run: Measured, dtype: str) -> tuple[FittedTable, Products] | None:
    """The table and the products it describes; None of too few samples."""
    probes = tuple(p for p in run.of("product") if p.dtype == dtype and not p.noisy)
    left = sum(p.dtype == dtype for p in run.of("product")) - len(probes)
    if len(probes) < _LEAST_PRODUCTS:
        return None
    best = _solve(probes)
    off = [
        float(_errors(_solve(probes[:i] + probes[i + 1 :]), probes[i : i + 1])[0])
        for i in range(len(probes))
    ]
    cached = [("cached_bytes_per_s", p.bytes_per_s) for p in run.of("cached") if p.dtype == dtype]
    made = FittedTable(
        name=f"host.{dtype}", samples=len(probes), median_error=float(np.median(off)),
        left_out=left,
        values=(*((key, getattr(best, key)) for key in FITTED_KEYS), *cached),
    )  # fmt: skip
    if made.median_error <= MOST_ERROR:
        return made, best
    before = assumed_products(run.rate("host_copy") or best.read_bytes_per_s)
    kept = float(np.median(_errors(before, probes)))
    return replace(made, values=(), refused=FITTED_KEYS, base_error=kept), best


def _solve(probes: tuple[Probe, ...]) -> Products:
    measured = np.log([p.median_s for p in probes])
    read, multiplied = (max(getattr(p, rate) for p in probes)
                        for rate in ("bytes_per_s", "flop_per_s"))  # fmt: skip
    start = np.log([read, read, _COLUMN_S, multiplied, _SMOOTHNESS])

    def residuals(x: FloatArray) -> FloatArray:
        return np.asarray(np.log(_seconds(_made(x), probes)) - measured)

    return _made(fit(residuals, start, _SD, scale=0.1).x)


def _made(x: FloatArray) -> Products:
    row, read, column, flop, smooth = (float(v) for v in np.exp(x))
    return Products(row_bytes_per_s=row, read_bytes_per_s=read, column_s=column, flop_per_s=flop,
                    smoothness=max(smooth, 1.0))  # fmt: skip


def _seconds(products: Products, probes: tuple[Probe, ...]) -> FloatArray:
    moved, flop = (np.array([getattr(p, key) for p in probes]) for key in ("moved_bytes", "flop"))
    rows, columns = (np.array([p.shape[i] for p in probes]) for i in (0, 1))
    return products.seconds(moved, flop, rows, columns)


def _errors(products: Products, probes: tuple[Probe, ...]) -> FloatArray:
    return np.abs(_seconds(products, probes) / [p.median_s for p in probes] - 1)
