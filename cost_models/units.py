"""Parse and print quantities: the one place where SI base units meet words."""

from __future__ import annotations

import re

from ir.errors import UsageError

_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COUNT = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_BYTES = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([kKMGTP]?)(i?)[bB]?\s*")
_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)([kKMBGT]?)")
_THOUSANDS = {"": 0, "k": 1, "K": 1, "M": 2, "B": 3, "G": 3, "T": 4}
_POWER = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def _scaled(value: float, steps: tuple[tuple[float, str], ...], unit: str, digits: int) -> str:
    """`value` in the first step whose next smaller one would print 1000 or more."""
    for scale, prefix in steps:
        smaller = scale / 1000
        if round(abs(value) / smaller, digits if smaller > 1 else 0) >= 1000:
            return f"{value / scale:.{digits}f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def format_bytes(value: float) -> str:
    """Print bytes with an SI prefix: 85.0 GB."""
    return _scaled(value, _SI, "B", 1)


def format_bytes_per_s(value: float) -> str:
    """Print a bandwidth with an SI prefix: 450.0 GB/s."""
    return _scaled(value, _SI, "B/s", 1)


def format_flop_per_s(value: float) -> str:
    """Print a rate of floating-point operations: 989.4 TFLOP/s."""
    return _scaled(value, _SI, "FLOP/s", 1)


def format_flop(value: float) -> str:
    """Print a number of floating-point operations: 54.2 TFLOP."""
    return _scaled(value, _SI, "FLOP", 1)


def format_count(value: float) -> str:
    """Print a count of parameters or tokens, in thousands, millions, billions: 8.03 B."""
    return _scaled(value, _COUNT, "", 2).rstrip()


def format_rate(value: float) -> str:
    """Print things a second, those that are few with three significant digits: 9,701, 0.311."""
    if not value or round(abs(value)) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1e-4 else f"{value:#.3g}".rstrip(".")


def format_short_rate(value: float) -> str:
    """The same, in thousands, millions: 9.70 k, 0.311."""
    return format_count(value) if round(abs(value)) >= 100 else format_rate(value)


def format_seconds(value: float) -> str:
    """Print a duration with three significant digits: 18.4 s, 3.20 ms, 412 us."""
    if value == 0:
        return "0 s"
    for scale, unit in _SECONDS:
        size = abs(value) / scale
        if float(f"{size:.3g}") >= 1:
            digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
            return f"{value / scale:.{digits}f} {unit}"
    return f"{value / 1e-9:.2g} ns"


def parse_bytes(text: str | int | float) -> int:
    """Read bytes from a number or from "80GB" (SI) or "80GiB" (binary).

    Raises UsageError where the text is no size or is negative.
    """
    if isinstance(text, int | float) and not isinstance(text, bool) and 0 <= text < float("inf"):
        return round(text)
    match = _BYTES.fullmatch(text) if isinstance(text, str) else None
    if match is None or (match[3] and not match[2]):
        raise UsageError(
            f"{text!r} is no size in bytes",
            why="expected a number with an optional prefix and unit",
            hints=("write 80GB (80e9 bytes), 80GiB (80 * 2**30 bytes) or a plain number",),
        )
    base = 1024 if match[3] else 1000
    found = float(match[1].replace("_", "")) * base ** _POWER[match[2]]
    if found == float("inf"):
        raise UsageError(f"{str(text)[:60]!r} is no size in bytes", why="no number is so large")
    return round(found)


def parse_count(text: str, said: str = "") -> float:
    """Read a count as people write it: 15T, 1e6, 2.5M. Raises UsageError where it is none. said:
    the whole of what the user wrote."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        what = f"{said or repr(text)} is no count"
        raise UsageError(what, why="expected a number: 15T, 2.5M or 1e6")
    return float(match[1].replace("_", "")) * 1000.0 ** _THOUSANDS[match[2]]
