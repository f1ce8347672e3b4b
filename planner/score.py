"""What plans are ordered by: the step, and what each axis must earn of it."""

from __future__ import annotations

from cost_models.decisions import Decisions
from planner.mesh import Mesh

AXIS_MUST_EARN = 50  # each axis beside data parallelism must earn 1/50 of the step: the model's
# error is several times that, and a plan with fewer axes is simpler to run and to trust


def axes_used(mesh: Mesh | Decisions) -> int:
    """How many axes there are beside data parallelism: pp, tp, cp, experts."""
    return sum((mesh.pp > 1, mesh.tp > 1, mesh.cp > 1, max(mesh.ep, mesh.etp) > 1))


def score_of(objective_ps: int, mesh: Mesh | Decisions) -> int:
    """What plans are ordered by: the step, with what its axes must earn."""
    return objective_ps * (AXIS_MUST_EARN + axes_used(mesh)) // AXIS_MUST_EARN


def objective_below(score: int, mesh: Mesh | Decisions) -> int:
    """The least objective whose score is not below `score`."""
    weight = AXIS_MUST_EARN + axes_used(mesh)
    return -(-AXIS_MUST_EARN * score // weight)
