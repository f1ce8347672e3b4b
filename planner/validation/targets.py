"""What we set out to reach beside what rows left out of the fits show: a row a target.

Figures are compared as the file has them, and printed with as many digits as tell on which side of
the target they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cost_models.engines import engine_names
from cost_models.hardware import catalogue

Figures = Mapping[str, Any]  # the file of accuracy: parts, tables by name, numbers
Line = tuple[str, str, str, str]  # what, target, reached, met or missed
NEEDED = ("classes", "ranking", "memory", "verdicts", "kernels")

_STEPS = (  # what, class, its figure, the most that it may be
    ("step, dense, MAPE", "dense", "mape", 0.07),
    ("step, median", "all", "median", 0.055),
    ("step, bias", "all", "bias", 0.03),
    ("step, one source left out, MAPE", "source out, all", "mape", 0.10),
    ("step, one GPU generation left out, MAPE", "GPU generation out, all", "mape", 0.12),
)
_KERNELS = (  # kinds of kernels -> the most that their median may be
    ("gemm bf16", 0.05), ("gemm quantized", 0.10), ("prefill", 0.08), ("mla prefill", 0.08),
    ("decode", 0.12), ("mla decode", 0.12), ("moe", 0.10), ("collectives", 0.05),
)  # fmt: skip
_MOE, _CLASS, _KERNEL_P90, _TAU, _MEMORY = 0.11, 0.15, 0.20, 0.8, 0.08
_CLASS_ROWS, _CLASS_GROUPS = 10, 3


def lines(figures: Figures) -> list[Line]:
    """Every target with what was reached."""
    return [
        *_steps(figures["classes"]), *_ranking(figures["ranking"]),
        *_memory(figures["memory"], figures["verdicts"]), *_kernels(figures["kernels"]),
    ]  # fmt: skip


def _line(words: str, most: float, value: float, beside: str = "", sign: str = "") -> Line:
    met = _met(_within(value, most))
    return words, f"{most * 100:g}%", f"{_percent(value, most, sign)}{beside}", met


def _within(value: float, most: float) -> bool:
    return abs(value) <= most + 1e-9  # sums of decimals


def _percent(value: float, most: float, sign: str = "") -> str:
    """Rounded to a tenth of a percent, or as far as is still on its side of the target."""
    digits = (n for n in (1, 2, 3) if _within(round(value, n + 2), most) == _within(value, most))
    return f"{value:{sign}.{next(digits, 4)}%}"


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _steps(classes: Figures) -> Iterator[Line]:
    kinds = [classes[name] for name in ("moe", "hybrid") if name in classes]
    for words, name, key, most in _STEPS:
        yield _line(words, most, classes[name][key], sign="+" if key == "bias" else "")
    rows = sum(one["n"] for one in kinds)
    if rows:
        mape = sum(one["n"] * one["mape"] for one in kinds) / rows
        beside = f"; without hybrids {classes['moe']['mape']:.1%}" if "moe" in classes else ""
        yield _line("step, mixtures of experts and hybrids, MAPE", _MOE, mape, beside)
    wide = {
        name: one["mape"] for name, one in classes.items()
        if name in (*engine_names(), *catalogue())
        and one["n"] >= _CLASS_ROWS and one["groups"] >= _CLASS_GROUPS
    }  # fmt: skip
    worst = max(wide, key=lambda name: wide[name])
    words = f"step, each device and engine class of {_CLASS_ROWS} rows in {_CLASS_GROUPS} groups"
    yield _line(f"{words}, MAPE", _CLASS, wide[worst], f" at most, `{worst}`")


def _ranking(ranking: Figures) -> Iterator[Line]:
    for name, one in ranking.items():
        short = (one["tau"] >= _TAU) == (round(one["tau"], 2) >= _TAU)
        reached = f"{one['tau']:.{2 if short else 4}f}; in-sample {one['in_sample_tau']:.2f}"
        met = _met(one["tau"] >= _TAU)
        yield f"ranking, {name}, Kendall tau", f"{_TAU:g}", reached, met


def _memory(memory: Figures, verdicts: Figures) -> Iterator[Line]:
    yield _line("peak memory, MAPE", _MEMORY, memory["all"]["mape"])
    oom, ran = verdicts["out of memory"], verdicts["ran"]
    n, near, wrong = oom["n"], oom["near"], len(ran["wrong"])
    words = "out of memory: predicted not to fit, or within 5% of capacity"
    yield words, f"{n} of {n}", f"{near} of {n}", _met(near == n)
    words = "ran: predicted beyond capacity by over 2%"
    yield words, "0", f"{wrong} of {ran['n']}", _met(not wrong)


def _kernels(kernels: Figures) -> Iterator[Line]:
    for kind, most in _KERNELS:
        yield _line(f"kernels, {kind}, median", most, kernels[kind]["median"])
    above = [kind for kind, one in kernels.items() if not _within(one["p90"], _KERNEL_P90)]
    least, most = (end(one["p90"] for one in kernels.values()) for end in (min, max))
    beside = f": above in {', '.join(above)}" if above else ""
    yield ("kernels, p90 of each kind", f"{_KERNEL_P90 * 100:g}%",
           f"{least:.1%} to {_percent(most, _KERNEL_P90)}{beside}", _met(not above))  # fmt: skip
