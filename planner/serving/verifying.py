"""`plan verify` of a plan of serving: does a twin answer what the unsharded model does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cost_models.units import format_count
from ir.errors import GateError
from planner.console import progress
from planner.options import Progress
from planner.serving.plan import ServingPlan
from planner.verifying import VerifyOptions, explained, require_same_model

if TYPE_CHECKING:
    from planner.runtime.serve.twin import ServingTwin
    from planner.runtime.serve.verify import ServedCompared


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingVerified:
    """A plan, its twin, and what its ranks answered."""

    plan: ServingPlan
    twin: ServingTwin
    compared: ServedCompared


def run_serving(plan: ServingPlan, options: VerifyOptions) -> ServingVerified:
    """`verify_serving`, saying what it does on a terminal."""
    with progress() as say:
        return verify_serving(plan, options, say)


def verify_serving(
    plan: ServingPlan, options: VerifyOptions, report: Progress | None = None
) -> ServingVerified:
    """Serve a twin of the plan on local processes, and compare it with the unsharded one.

    Raises GateError where the plan is another model's; PlanError where no twin can be made or a
    rank failed; UsageError where the model says no way to cut it.
    """
    say = report or (lambda line: None)
    require_same_model(plan, options, plan.asked.precision)
    from planner.runtime.serve.twin import make_serving_twin
    from planner.runtime.serve.verify import verify_served
    from planner.runtime.world import PRELOAD_HF, RankFailure, local_world

    say("making the twin")
    twin = make_serving_twin(plan, options.model, options.args, options.changes, options.processes)
    say(f"the twin: {twin.ranks} processes")
    with local_world(PRELOAD_HF if twin.recipe.config else ()) as world:
        try:
            found = verify_served(world, twin)
        except RankFailure as failure:
            raise explained(failure) from failure
    return ServingVerified(plan=plan, twin=twin, compared=found)


def text(found: ServingVerified) -> str:
    """The result at 80 columns."""
    c, small = found.compared, found.twin.plan
    verdict = "holds: the twin answers" if c.holds else "differs: the twin does not answer"
    against = "the unsharded model in the plan's formats" if c.lossy else "the unsharded model"
    s = small.serving
    more = f", etp {s.expert_tp}" if s.ep > 1 and s.expert_tp > 1 else ""
    more += f", attention_dp {s.attention_dp}" if s.attention_dp > 1 else ""
    lines = [
        f"{found.plan.graph.name} on {found.plan.hardware}",
        f"{verdict} what {against} does",
        "",
        _row("twin", f"tp {s.tp}, pp {s.pp}, ep {s.ep}{more} = {c.ranks} ranks,"
             f" {format_count(small.graph.parameter_count)} parameters, fp32"),
        _row("asked", f"{s.batch} prompts of {small.asked.prompt} tokens,"
             f" {small.asked.output} tokens each, greedy"),
        *(_row("below", f"{h.block} on {h.tier}, {h.place}, {h.resident} stay") for h in s.tiers),
        *(_row("not kept", note) for note in found.twin.notes),
        _row("tokens", f"{c.same_tokens:.1%} of {c.tokens} as {against}"),
        _row("logits", f"relative error {c.error:.1e}, {c.allowed:.0e} allowed"),
        *([] if c.alike else [_row("ranks", "do not answer alike")]),
    ]  # fmt: skip
    if c.lossy:
        lines += [
            _row("lossy", ", ".join(c.lossy)),
            _row("", f"logits {c.lossy_error:.2%} (relative L2) from the unquantized model's"),
            _row("", f"{c.lossy_same_choices:.1%} of next tokens the same behind the same text,"
                 f" {c.lossy_same_tokens:.1%} in free answers"),
        ]  # fmt: skip
    return "\n".join(lines)


def _row(name: str, words: str) -> str:
    return f"  {name:11}{words}"


def document(found: ServingVerified, source: str, model: str) -> dict[str, Any]:
    """The result as one JSON document."""
    s, c = found.twin.plan.serving, found.compared
    row = asdict(c)
    return {
        "schema": "verify-serving/1",
        "plan": source,
        "model": model,
        "holds": c.holds,
        "twin": {
            "tp": s.tp, "pp": s.pp, "ep": s.ep,
            **({"attention_dp": s.attention_dp} if s.attention_dp > 1 else {}),
            "weights": dict(s.weights), "kv": s.kv,
            "kv_window": s.kv_window, "tiers": [asdict(h) for h in s.tiers],
            **({"kv_policy": s.kv_policy} if s.kv_policy else {}),
            "parameters": found.twin.plan.graph.parameter_count,
            "not_kept": list(found.twin.notes),
        },
        **{key: row[key] for key in ("ranks", "seed", "tokens", "error", "allowed", "same_tokens",
                                     "alike")},
        "lossy": None if not c.lossy else {
            "what": list(c.lossy), "error": c.lossy_error, "same_tokens": c.lossy_same_tokens,
            "same_choices": c.lossy_same_choices,
        },
    }  # fmt: skip


def require_answers(found: ServingVerified, source: str) -> None:
    """Raise GateError where the twin answered something else."""
    c = found.compared
    if not c.holds:
        raise GateError(
            f"the plan does not answer what the model does: {c.same_tokens:.1%} of the tokens,"
            f" logits off by {c.error:.1e}", where=source,
            hints=("plan verify --json has the figures",),
        )  # fmt: skip
