"""One unit class laid over the tp axis: where each parameter lies, and what changes at an edge."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """At a place in a unit ("self_attn:in", "o_proj:out") a value changes placement.

    forward: (from, to); backward: the same for its gradient. Words are DTensor's: R, P, S(dim).
    """

    at: str
    forward: tuple[str, str]
    backward: tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """Placements on tp of a unit class's parameters (relative names), and its edges."""

    parameters: tuple[tuple[str, str], ...] = ()
    edges: tuple[Edge, ...] = ()
