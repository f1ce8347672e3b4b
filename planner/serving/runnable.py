"""What our own runtime cannot serve: one table; other engines run their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cost_models.serving_decisions import Serving, policy_of
from cost_models.serving_engines import engines_with_pools

NATIVE = "native"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Decisions that are refused, and why."""

    refused: Callable[[Serving], bool]
    reason: str


RULES = (
    Rule(refused=lambda s: s.attention_dp > 1,
         reason="native ranks answer one batch together: attention_dp is 1, replicas are jobs"),
    Rule(refused=lambda s: s.expert_tp > 1 and s.ranks > 1,
         reason="native experts lie whole on their ranks: ep is tp, etp is 1"),
    Rule(refused=lambda s: s.ranks > 1 and any(h.block == "routed_experts" for h in s.tiers),
         reason="native experts that are split over ranks stay on the GPU"),
    Rule(refused=lambda s: s.ranks * s.pp > 1 and s.kv not in ("bf16", "fp16"),
         reason="a native cache that is split over ranks is kept in 16 bits"),
    Rule(refused=lambda s: bool(s.kv_policy) and s.kv not in ("bf16", "fp16"),
         reason="native means of blocks are kept in 16 bits"),
    Rule(refused=lambda s: s.prefill is not None,
         reason="native GPUs read prompts and decode; pools of their own have"
         f" {', '.join(engines_with_pools())}"),
    Rule(refused=lambda s: s.prefill_chunk > 0, reason="native prompts are read whole"),
)  # fmt: skip


def unservable(engine: str, s: Serving, routed: bool) -> str:
    """Why the runtime cannot serve so; "" where it can. routed: the model has routed experts."""
    if engine != NATIVE:
        return ""
    rules = RULES if routed else tuple(r for r in RULES if "expert" not in r.reason)
    return next((r.reason for r in rules if r.refused(s)), "")


def unrun(s: Serving) -> str:
    """Why a plan, whose cost holds for whoever runs it so, is not run by us; "" where it is."""
    if policy_of(s.kv_policy)[1]:
        return "the query picks the blocks that are retrieved, and a model's cache does not see it"
    return ""
