"""What a search proved, in words: of the whole space, of what its pins left, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cost_models.chain import chain_of
from planner.decisions import Pins
from planner.mesh import facts_of
from planner.plan import Plan, Solver
from planner.score import AXIS_GAIN_PPM, PPM

if TYPE_CHECKING:
    from planner.serving.plan import ServingPlan

AN_AXIS = f"{AXIS_GAIN_PPM / PPM:.0%} an axis"  # what bounds of plans with more axes are less
MOST_PINS = 6  # told by name
SEARCHED = ("pp", "cp", "tp", "zero", "micro_batch", "recompute")  # for every model; dp follows


def gain_words(s: Solver) -> str:
    """What a search that ended before it had proved its plan left open. Its gap is of the order of
    plans, in which an axis must earn something: a plan with one more may be quicker by that too."""
    of = f" of {s.objective}" if s.objective != "time" else ""
    return f"at most {s.gap_ppm / 1e4:.2f}%{of} can be gained, beyond {AN_AXIS}"


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
