"""Meshwright in Python: make plans (`trace`, `load`, `cost`, `diff`), run them (`meta`,
`parallelize`, `serve`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.api import cost, diff, load, meta, parallelize, serve, trace, trace_serving

__all__ = ["cost", "diff", "load", "meta", "parallelize", "serve", "trace", "trace_serving"]


def __getattr__(name: str) -> Any:
    """Import on first use: reading a plan needs neither torch nor a solver."""
    if name in __all__:
        from planner import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
