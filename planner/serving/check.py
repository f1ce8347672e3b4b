"""A plan of serving against today: predicted anew, and what moved since it was written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cost_models.hardware import Cluster
from cost_models.serving_engines import engines_with_pools, load_serving_engine
from ir.errors import InfeasibleError, PlanError
from planner.plan import constants_hash, load_cluster
from planner.serving.plan import ServingPlan, require_blocks
from planner.serving.predict import Prediction
from planner.serving.relief import NOTHING, relief
from planner.serving.tracing import recosted


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedServing:
    """moved: a line for each input, and for the estimate, that is not what was written."""

    plan: ServingPlan
    cluster: Cluster
    found: Prediction
    moved: tuple[str, ...]

    def __repr__(self) -> str:
        from planner.displays import text

        return text(self)

    def _repr_html_(self) -> str:
        from planner.displays import checked_html

        return checked_html(self)


def examine_serving(plan: ServingPlan, folder: Path) -> CheckedServing:
    """Predict a plan anew. Raises PlanError where its decisions contradict its hardware."""
    cluster = load_cluster(plan, folder)
    if not isinstance(cluster, Cluster):
        raise PlanError(f"{plan.hardware} is of several kinds", why="a server has GPUs of one")
    require_possible(plan, cluster)
    found = recosted(plan, cluster)
    now = (round(found.ttft_s * 1e6), round(found.tpot_s * 1e6))
    pairs = (
        (f"hardware {plan.hardware}", plan.hardware_hash, cluster.digest),
        ("cost constants", plan.constants_hash, constants_hash(cluster)),
    )
    moved = [f"{name} moved" for name, old, new in pairs if old != new]
    if now != (plan.ttft_us, plan.tpot_us):
        moved.append(f"the estimate was {plan.ttft_us} us to the first token and {plan.tpot_us} us"
                     f" between tokens, it is {now[0]} and {now[1]}")  # fmt: skip
    return CheckedServing(plan=plan, cluster=cluster, found=found, moved=tuple(moved))


def require_possible(plan: ServingPlan, cluster: Cluster) -> None:
    """Raise PlanError where the decisions contradict the hardware, the engine or the model."""
    if plan.serving.devices > cluster.count:
        raise PlanError(f"the plan contradicts its hardware {plan.hardware}:"
                        f" it divides {plan.serving.devices} GPUs, there are {cluster.count}")
    if plan.serving.prefill and not load_serving_engine(plan.asked.engine).kv_sent:
        raise PlanError(f"{plan.asked.engine} has no pools of prefill and decode",
                        why=f"{', '.join(engines_with_pools())} have")  # fmt: skip
    if plan.serving.kv_tier != "gpu":
        cluster.tier(plan.serving.kv_tier)
    require_blocks(plan)
    for held in plan.serving.tiers:
        cluster.tier(held.tier)


def require_fit(checked: CheckedServing) -> None:
    """Raise InfeasibleError where the plan does not fit, or misses its limits."""
    p, asked = checked.found, checked.plan.asked
    if not p.fits:
        raise InfeasibleError(f"the plan does not fit {checked.plan.hardware}: {p.missing}",
                              hints=("plan trace --task serve anew finds one, if there is one",))
    for flag, value, most in (("--max-ttft", p.ttft_s, asked.max_ttft_s),
                              ("--max-tpot", p.tpot_s, asked.max_tpot_s)):  # fmt: skip
        if most is not None and value > most:
            raise InfeasibleError(f"the plan misses {flag} {most:g}s: {value:.4f} s",
                                  why=f"{p.bottleneck} binds", hints=_hints(p, checked.plan))


def _hints(p: Prediction, plan: ServingPlan) -> tuple[str, ...]:
    found = relief(p, plan.asked, plan.solver.pins)
    return () if found == NOTHING else (found,)


def updated(checked: CheckedServing) -> ServingPlan:
    """The plan with today's hashes and estimate."""
    return replace(
        checked.plan, hardware_hash=checked.cluster.digest,
        constants_hash=constants_hash(checked.cluster),
        ttft_us=round(checked.found.ttft_s * 1e6), tpot_us=round(checked.found.tpot_s * 1e6),
        peak_memory_bytes=round(dict(checked.found.tiers)["gpu"]),
    )  # fmt: skip
