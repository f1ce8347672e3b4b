"""A twin of a plan of serving: its model at a size for this machine, under its own decisions.

Nothing is searched anew: formats, tiers and placements are the plan's, an axis of 8 ranks becomes
2, of a block's layers as large a share stays on the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cost_models.chain import chain_of
from cost_models.layout import expert_parameters
from cost_models.serving_decisions import Held, Serving, policy_of
from cost_models.serving_engines import NATIVE
from cost_models.serving_reading import served_model
from cost_models.serving_shapes import BLOCKS, ServedModel
from cost_models.serving_tiers import layers_of
from ir.capture.real import Recipe
from ir.errors import PlanError
from ir.graph import Graph
from ir.text import format_graph, graph_hash
from planner.runtime.verify.twin import capture_twin, cut_models, misplaced, words_for
from planner.serving.plan import ServingPlan
from planner.serving.runnable import PACKED, experts_of, unservable

BATCH, PROMPT, OUTPUT = 2, 12, 16  # sequences, and tokens of each: more than a twin's window
ROWS = 8  # tokens that the twin's host multiplies at most: a step's 2, not a prompt's 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingTwin:
    """A plan that is served here, and how any process builds its model. notes: what it does not
    keep of the whole plan."""

    plan: ServingPlan
    recipe: Recipe
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return self.plan.serving.ranks * self.plan.serving.pp


def make_serving_twin(
    plan: ServingPlan, model: str, args: Mapping[str, str], changes: Mapping[str, str],
    most_ranks: int,
) -> ServingTwin:  # fmt: skip
    """The twin of one replica. model, args: as the plan was traced. changes: `--twin k=v`.

    Raises PlanError where our runtime does not serve the plan, where no cut of the model holds its
    decisions, or where it needs more processes; UsageError where the model says no way to cut it.
    """
    s = plan.serving
    routed = any(expert_parameters(unit) for unit in plan.graph.units)
    if reason := unservable(NATIVE, s, experts_of(plan.graph)):
        raise PlanError(f"the plan runs on {plan.asked.engine}, not on our runtime: {reason}",
                        hints=("plan verify runs what planner.serve does",))  # fmt: skip
    small = _smaller(plan, routed)
    ranks = small.ranks * small.pp
    if ranks > most_ranks:
        raise PlanError(f"the twin runs on {ranks} processes, --processes allows {most_ranks}",
                        hints=(f"--processes {ranks}",))  # fmt: skip
    uneven = s.pp > 1 and len(chain_of(plan.graph).layers) % s.pp > 0
    reasons: list[str] = []
    for recipe in cut_models(plan.graph, 2 + uneven, model, args, changes):
        graph = capture_twin(recipe, plan.asked.precision)
        words, notes = words_for(plan.graph, plan.sharding_by_unit, graph)
        if found := _contradicts(graph, small) or misplaced(graph, words, small.tp, False):
            reasons.append(found)
            continue
        made = _twin_plan(plan, graph, small)
        if small.tp > 1:
            made = replace(made, shardings=tuple(words.items()))
        return ServingTwin(plan=made, recipe=recipe, notes=(*notes, *_lost(plan, made)))
    raise PlanError(f"no twin of the model holds the plan's decisions: {reasons[0]}",
                    hints=("--twin k=v: sizes that divide as the whole model's do",))  # fmt: skip


def _smaller(plan: ServingPlan, routed: bool) -> Serving:
    """The plan's decisions on two ranks an axis, in fp32 but for what is packed; four of tp where
    those share experts by ep and by etp."""
    s = plan.serving
    both = routed and s.ep > 1 and s.expert_tp > 1
    replicas = 2 if s.attention_dp > 1 else 1
    tp = (4 if both and replicas == 1 else 2) if s.tp > 1 else 1
    ranks = tp * replicas
    packed = tuple((b, s.format_of(b)) for b in BLOCKS if s.format_of(b) in PACKED)
    return replace(
        s, tp=tp, pp=2 if s.pp > 1 else 1, attention_dp=replicas, etp=0,
        ep=(ranks // 2 if both else ranks) if routed and s.ep > 1 else 1, replicas=1, batch=BATCH,
        default="fp32", weights=packed,
        kv_window=min(s.kv_window, PROMPT // 2),
        kv_policy=_small_policy(*policy_of(s.kv_policy)),
    )  # fmt: skip


def _small_policy(block: int, top: int) -> str:
    """The policy in blocks that the twin has several of; of those one is retrieved."""
    small = min(block, PROMPT // 4)
    return "" if not block else f"retrieve:1x{small}" if top else f"summary:{small}"


def _contradicts(graph: Graph, s: Serving) -> str:
    """Why the twin's graph does not hold the decisions; "" where it does."""
    layers = len(chain_of(graph).layers)
    if layers < s.pp:
        return f"the twin has {layers} layers for {s.pp} stages"
    odd = [e.experts for layer in served_model(graph, NATIVE).layers for e in layer.experts
           if e.experts % s.ep]  # fmt: skip
    return f"{odd[0]} experts of the twin do not divide by {s.ep}" if odd else ""


def _twin_plan(plan: ServingPlan, graph: Graph, small: Serving) -> ServingPlan:
    whole, mine = (served_model(g, NATIVE) for g in (plan.graph, graph))
    tiers = tuple(_held(h, whole, mine) for h in small.tiers if layers_of(mine, h.block))
    return replace(
        plan, graph=graph, graph_hash=graph_hash(format_graph(graph)), shardings=(),
        serving=replace(small, tiers=tiers), rows_on_host=min(plan.rows_on_host, ROWS),
        asked=replace(plan.asked, prompt=PROMPT, output=OUTPUT, batch=BATCH, precision="fp32",
                      max_ttft_s=None, max_tpot_s=None),
    )  # fmt: skip


def _held(held: Held, whole: ServedModel, mine: ServedModel) -> Held:
    """As large a share of the twin's layers (or experts) on the GPU, some where some are."""
    total, count = layers_of(whole, held.block), layers_of(mine, held.block)
    if 0 < held.resident < total and count > 1:
        share = round(held.resident / total * count)
        return replace(held, resident=min(max(share, 1), count - 1))
    return replace(held, resident=0 if not held.resident else count)


def _lost(plan: ServingPlan, made: ServingPlan) -> tuple[str, ...]:
    """What the twin does not keep, in words."""
    found = []
    if plan.serving.kv_tier != "gpu":
        found.append(f"the cache on {plan.serving.kv_tier}: the twin's device is the CPU")
    kept = {h.block for h in made.serving.tiers}
    found += [f"{h.block} on {h.tier}: the twin has none" for h in plan.serving.tiers
              if h.block not in kept]  # fmt: skip
    if plan.serving.replicas > 1:
        found.append(f"{plan.serving.replicas} replicas: each is a job of its own")
    return tuple(found)
