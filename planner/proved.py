"""What a search proved, in words: of the whole space, of what its pins left, or nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cost_models.chain import chain_of
from planner.decisions import Pins
from planner.mesh import facts_of
from planner.plan import Plan, Solver
from planner.score import PPM

if TYPE_CHECKING:
    from planner.serving.plan import ServingPlan

MOST_PINS = 6  # told by name
SEARCHED = ("pp", "cp", "tp", "zero", "micro_batch", "recompute")  # for every model; dp follows


def an_axis(s: Solver, word: str) -> str:
    """What each axis more had to earn, after words: ` by 2% an axis`; "" where that is nothing.
    Bounds of plans with more axes are less by it."""
    return f"{word} {s.axis_gain_ppm * 100 / PPM:g}% an axis" if s.axis_gain_ppm else ""


def gain_words(s: Solver) -> str:
    """What a search that ended before it had proved its plan left open. Its gap is of the order of
    plans, in which an axis must earn something: a plan with one more may be quicker by that too."""
    of = f" of {s.objective}" if s.objective != "time" else ""
    percent = max(math.ceil(s.gap_ppm / 100), 1) / 100  # what is open is not said to be nothing
    return f"at most {percent:.2f}%{of} can be gained{an_axis(s, ', beyond')}"


def pins_said(pins: Pins) -> tuple[str, ...]:
    """Pins as the user writes them, for the plan's file."""
    places = (f"place:{pattern}={placement}" for pattern, placement in pins.place)
    return (*(pins.said(key) for key, _ in pins.items()), *places)


def pins_words(plan: Plan | ServingPlan) -> str:
    """What was pinned, in a few words; "" where the search decided all."""
    pins = plan.solver.pins
    if len(pins) <= MOST_PINS:
        return ", ".join(pins)
    return f"{', '.join(pins[:MOST_PINS])} and {len(pins) - MOST_PINS} more"


def all_pinned(plan: Plan | ServingPlan) -> bool:
    """Whether the pins left the search nothing to choose of mesh, steps, memory and layout; of
    serving, one plan alone, of which no block was placed."""
    if not isinstance(plan, Plan):
        return bool(plan.solver.pins) and plan.solver.meshes == 1 and not plan.serving.tiers
    given = {pin.partition("=")[0].partition(":")[0] for pin in plan.solver.pins}
    if not given.issuperset(SEARCHED):
        return False
    d = plan.decisions
    asked = [("schedule", d.pp > 1), ("place", d.tp > 1),
             ("formats", plan.workload.allowed_formats),
             ("ep", facts_of(chain_of(plan.graph)).experts)]  # fmt: skip
    return all(key in given for key, there in asked if there)


def status_words(plan: Plan | ServingPlan) -> str:
    """How the search ended, and under which pins."""
    if not plan.solver.pins:
        return plan.solver.status
    if all_pinned(plan):
        return "pinned, not searched"
    return f"{plan.solver.status} under its pins: {pins_words(plan)}"
