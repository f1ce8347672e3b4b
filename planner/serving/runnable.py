"""What our own runtime cannot serve: one table; other engines run their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cost_models.layout import expert_parameters
from cost_models.serving_decisions import Serving, policy_of
from cost_models.serving_engines import NATIVE, engines_with_pools
from ir.graph import Graph
from planner.routed import (
    no_expert_chain,
    no_expert_slices,
    no_expert_sum,
    no_expert_tensor_axis,
    no_whole_experts,
    weights_of,
)

# formats of weights that it packs, and as which
PACKED = {"int8": "int8", "int4": "int4", "fp8": "fp8", "fp8_block": "fp8", "fp4": "fp4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsOf:
    """A model's routed experts. undivided: why ranks cannot share them; uncut: why they cannot
    share each of them; "" where they can. inner: what ranks that share one divide. latent: whether
    attention caches latents, which is of no expert."""

    routed: bool
    undivided: str = ""
    uncut: str = ""
    inner: tuple[int, ...] = ()
    latent: bool = False


def experts_of(graph: Graph) -> ExpertsOf:
    return ExpertsOf(
        routed=any(expert_parameters(unit) for unit in graph.units),
        undivided=no_whole_experts(graph) or no_expert_sum(graph) or "",
        uncut=no_expert_slices(graph) or no_expert_tensor_axis(graph) or no_expert_chain(graph)
        or "",
        inner=tuple(dict.fromkeys(
            unit.values[w.name].sizes(1, 1)[w.inner] // w.parts
            for unit in graph.units for w in weights_of(unit) if w.inner is not None
        )),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Decisions that are refused, and why; behind it what the model's experts say of themselves."""

    refused: Callable[[Serving, ExpertsOf], bool]
    reason: str
    said: Callable[[ExpertsOf], str] = lambda e: ""


RULES = (
    Rule(refused=lambda s, e: any(word not in (*PACKED, s.default) for _, word in s.weights),
         reason=f"native packs weights in {', '.join(PACKED)}, the others stay in the model's own"
         " format"),
    Rule(refused=lambda s, e: s.attention_dp > 1 and not e.routed,
         reason="native replicas of attention share experts, and the model has none: whole"
         " replicas are jobs of their own"),
    Rule(refused=lambda s, e: e.routed and s.ranks > 1 and bool(e.undivided),
         reason="native ranks cannot share these experts: ", said=lambda e: e.undivided),
    Rule(refused=lambda s, e: e.routed and s.ranks > 1 and s.expert_tp > 1 and bool(e.uncut),
         reason="native experts lie whole on their ranks, etp is 1: ", said=lambda e: e.uncut),
    Rule(refused=lambda s, e: s.ranks > 1 and any(n % s.expert_tp for n in e.inner),
         reason="native etp divides the experts' inner sizes: ",
         said=lambda e: ", ".join(map(str, e.inner))),
    Rule(refused=lambda s, e: bool(s.kv_policy) and s.kv not in ("bf16", "fp16"),
         reason="native means of blocks are kept in 16 bits"),
    Rule(refused=lambda s, e: e.latent and policy_of(s.kv_policy)[1] > 0,
         reason="native queries pick no blocks of latents: attention makes other keys of them"),
    Rule(refused=lambda s, e: s.prefill is not None,
         reason="native GPUs read prompts and decode; pools of their own have"
         f" {', '.join(engines_with_pools())}"),
    Rule(refused=lambda s, e: s.prefill_chunk > 0, reason="native prompts are read whole"),
)  # fmt: skip


def unservable(engine: str, s: Serving, experts: ExpertsOf) -> str:
    """Why the runtime cannot serve so; "" where it can."""
    if engine != NATIVE:
        return ""
    found = (r.reason + r.said(experts) for r in RULES if r.refused(s, experts))
    return next(found, "")
