"""A unit with its experts and context at one work point, as integer picoseconds and bytes."""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.traffic import Traffic
from cost_models.unit_costs import UnitCost

PARTS = ("compute", "tp_comm", "ep_comm", "cp_comm", "host", "offload", "dp_comm")
AXIS_PART = {"tp": "tp_comm", "ep": "ep_comm", "etp": "ep_comm", "cp": "cp_comm"}


def ps(seconds: float) -> int:
    """Integer picoseconds."""
    return round(float(seconds) * 1e12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A unit with its experts at one work point, before data parallelism: as `Row` has it."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    weight_ps: int
    again_ps: tuple[int, int]
    kept: tuple[int, int, int]
    working: tuple[int, int, int]
    kernels_s: tuple[float, float]
    flop: tuple[int, int]
    model_flop: int
    traffic: tuple[Traffic, ...]


def at_point(costs: tuple[UnitCost, ...], at: int) -> Point:
    """Integers of one point, the last parts (offload, dp_comm) zero: they are not the unit's
    own."""
    alone = costs[0]

    def total(name: str) -> float:
        return float(sum(getattr(c, name)[at] for c in costs))

    def parts(direction: str) -> tuple[int, ...]:
        found = dict.fromkeys(PARTS, 0.0)
        found["compute"] = total(f"{direction}_s")
        found["host"] = total(f"host_{direction}_s")
        for row in (t for c in costs for t in c.traffic):
            if row.backward == (direction == "backward"):
                found[AXIS_PART[row.axis]] += float(row.seconds[at] - row.hidden_s[at])
        return tuple(ps(found[p]) for p in PARTS)

    def three(name: str) -> tuple[int, int, int]:
        none, some, full = (int(sum(getattr(c, name)[k][at] for c in costs)) for k in range(3))
        return none, some, full

    def flop(direction: int) -> int:
        return int(sum(c.flop[direction][at] for c in costs))

    forward = parts("forward")
    comm = sum(p for name, p in zip(PARTS, forward) if name.endswith("_comm"))
    once = (t for c in costs for t in c.traffic if not (t.again or t.backward))
    comm -= min(comm, ps(sum(float(t.seconds[at] - t.hidden_s[at]) for t in once)))
    return Point(
        forward=forward, backward=parts("backward"), weight_ps=ps(total("weight_s")),
        again_ps=(ps(total("light_s")), ps(total("forward_s")) + comm),
        kept=three("kept_bytes"), working=three("working_bytes"),
        kernels_s=(total("forward_s"), total("backward_s")),
        flop=(flop(0), flop(1)),
        model_flop=int(alone.model_flop[at]), traffic=tuple(t for c in costs for t in c.traffic),
    )  # fmt: skip
