"""What plans are ordered by: the step, and what each axis must earn of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cost_models.decisions import Decisions
    from planner.mesh import Mesh

PPM = 1_000_000
AXIS_GAIN_PPM = 20_000  # of the step that each axis beside data parallelism must earn: the model's
# error is several times that, and a plan with fewer axes is simpler to run and to trust


def axes_used(mesh: Mesh | Decisions) -> int:
    """How many axes there are beside data parallelism: pp, tp, cp, experts; another tp on each part
    of the hardware is one more."""
    axes = (mesh.pp > 1, mesh.tp > 1, mesh.cp > 1, max(mesh.ep, mesh.etp) > 1, mesh.tp_by_part)
    return sum(map(bool, axes))


def score_of(objective_ps: int, mesh: Mesh | Decisions, gain_ppm: int = AXIS_GAIN_PPM) -> int:
    """What plans are ordered by: the step, with what its axes must earn."""
    return objective_ps * (PPM + gain_ppm * axes_used(mesh)) // PPM


def objective_below(score: int, mesh: Mesh | Decisions, gain_ppm: int = AXIS_GAIN_PPM) -> int:
    """The least objective whose score is not below `score`."""
    return -(-PPM * score // (PPM + gain_ppm * axes_used(mesh)))
