"""What a model is. `leaf` is for model files; importing this package imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Cost = float | Callable[..., Any] | None  # a row of the first input, or a function of shapes


def leaf(
    cls: type,
    *,
    flop: Cost,
    bytes: Cost = None,
    saved: Cost = None,
    factors: str = "",
    output: Callable[..., Any] | None = None,
) -> type:
    """Declare that modules of `cls` are one operation, not to be traced into.

    flop: forward FLOPs, a number for each row of the first input (all dimensions but the last) or
    a function of the input tensors' shapes. bytes: memory traffic beyond inputs, parameters and
    result. saved: bytes kept for backward; None: the inputs. factors: letters of each input and
    result as in "b s h;b s h", equal letters for a dimension that may be split; none: nothing may.
    output: the result from the module's arguments (only its shape and dtype count); None: like
    the first input. Returns `cls`.
    """
    from ir.capture.leaf import Declared

    cls.__meshwright_leaf__ = Declared(  # type: ignore[attr-defined]
        flop=flop, bytes=bytes, saved=saved, factors=factors, output=output
    )
    return cls
