"""What each change between two plans of serving does: made one after another, each predicted.

From the old plan to the new one, what differs is changed group by group in the order of `GROUPS`.
A group that nothing can serve yet (fewer GPUs than the plan divides) waits for those that make it
possible; what is possible only at once is one row. Each row is less the row before it, so that the
rows sum to the whole difference. Nothing is searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from cost_models.hardware import Cluster
from cost_models.serving_decisions import Pool, Serving
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_reading import served_model
from cost_models.serving_shapes import BLOCKS, PARTS_OF, ServedModel
from ir.errors import PlanError
from planner.serving.check import CheckedServing, require_possible
from planner.serving.effects import ServingEffect
from planner.serving.plan import ServingPlan
from planner.serving.predict import Prediction
from planner.serving.runnable import experts_of, unservable
from planner.serving.tracing import recosted

_BLOCKS = (*BLOCKS, *PARTS_OF)
_LOAD = ("engine", "prompt", "output")  # of what is asked, what is predicted with
GROUPS: tuple[tuple[str, ...], ...] = (  # inputs, then decisions; those that are one choice at once
    ("model",), ("hardware",), *((name,) for name in _LOAD),
    ("tp", "pp", "ep", "etp", "attention_dp", "replicas", "prefill"),
    ("batch",), ("prefill_chunk",),
    ("default",), *((f"format of {block}",) for block in _BLOCKS),
    ("kv",), ("kv_window", "kv_policy"),
    *((f"tier of {block}",) for block in _BLOCKS), ("kv_tier",),
)  # fmt: skip
_PLAIN = tuple(f.name for f in fields(Serving) if f.name not in ("weights", "tiers"))
_SAID = {"default": "format of all"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """What a row is a difference of, in whole units: sums of them are exact."""

    ttft_ps: int
    tpot_ps: int
    microtokens_per_s: int
    peak_memory_bytes: int


def serving_effects(
    old: CheckedServing, new: CheckedServing, error: float
) -> tuple[ServingEffect, ...]:
    """The effect of each change in its order; none without changes. error: relative, of figures."""
    before, after = _facts(old), _facts(new)
    differ = {key for key in before if _of(before[key]) != _of(after[key])}
    groups = [tuple(key for key in group if key in differ) for group in GROUPS]
    left = [group for group in groups if group]
    rows: list[ServingEffect] = []
    now, figures = before, _figures(old.found)
    waiting: list[tuple[str, ...]] = []
    while left:
        waiting.append(left.pop(0))
        while waiting:
            last = not left  # all at once is the new plan, whether it can be served or not
            taken, found = _next(old, now, after, waiting, new.found if last else None)
            if found is None:
                break
            now = now | {key: after[key] for group in taken for key in group}
            waiting = [group for group in waiting if group not in taken]
            reached = _figures(found)
            rows.append(_effect(taken, figures, reached, error, fits=found.fits))
            figures = reached
    return tuple(rows)


def _next(
    old: CheckedServing, now: Mapping[str, Any], after: Mapping[str, Any],
    waiting: list[tuple[str, ...]], whole: Prediction | None,
) -> tuple[tuple[tuple[str, ...], ...], Prediction | None]:  # fmt: skip
    """The first of those that wait that can be served by itself, else all of them, and what is
    predicted; None where that cannot be served either. whole: what all of them come to."""
    for group in waiting if len(waiting) > 1 else ():
        found = _predicted(old, {**now, **{key: after[key] for key in group}})
        if found is not None:
            return (group,), found
    taken = tuple(waiting)
    changed = {key: after[key] for group in taken for key in group}
    return taken, whole or _predicted(old, {**now, **changed})


def _effect(
    groups: tuple[tuple[str, ...], ...], old: _Figures, new: _Figures, error: float, *, fits: bool
) -> ServingEffect:
    pairs = {f.name: (getattr(old, f.name), getattr(new, f.name)) for f in fields(_Figures)}
    return ServingEffect(
        groups=tuple(tuple(_SAID.get(key, key) for key in group) for group in groups),
        **{name: b - a for name, (a, b) in pairs.items()}, fits=fits,
        within_error=all(abs(b - a) <= error * a for a, b in pairs.values()),
    )  # fmt: skip


def _figures(p: Prediction) -> _Figures:
    return _Figures(
        ttft_ps=round(p.ttft_s * 1e12), tpot_ps=round(p.tpot_s * 1e12),
        microtokens_per_s=round(p.tokens_per_s * 1e6),
        peak_memory_bytes=round(dict(p.tiers)["gpu"]),
    )  # fmt: skip


def _facts(c: CheckedServing) -> dict[str, Any]:
    """All that a prediction is made of, by the keys of GROUPS."""
    s = c.plan.serving
    found = {"model": c.plan, "hardware": c.cluster}
    found |= {name: getattr(c.plan.asked, name) for name in _LOAD}
    found |= {name: getattr(s, name) for name in _PLAIN}
    model = served_model(c.plan.graph, c.plan.asked.engine)
    if not any(layer.experts for layer in model.layers):
        found |= {"ep": 1, "etp": 0}  # of no experts: they say nothing
        if s.prefill:
            found["prefill"] = replace(s.prefill, ep=1, etp=0)
    for block in _BLOCKS:
        found[f"format of {block}"] = dict(s.weights).get(block)
        found[f"tier of {block}"] = s.held(block)
    return found


def _of(value: Any) -> Any:
    """What tells two values apart: of a graph and of hardware, their hashes."""
    if isinstance(value, ServingPlan):
        return value.graph_hash
    return value.digest if isinstance(value, Cluster) else value


def _predicted(old: CheckedServing, facts: Mapping[str, Any]) -> Prediction | None:
    """What is predicted with these facts; None where no engine can serve so."""
    try:
        s = Serving(
            **{name: facts[name] for name in _PLAIN},
            weights=tuple((block, facts[f"format of {block}"]) for block in _BLOCKS
                          if facts[f"format of {block}"]),
            tiers=tuple(facts[f"tier of {block}"] for block in _BLOCKS
                        if facts[f"tier of {block}"]),
        )  # fmt: skip
        plan = replace(
            old.plan, graph=facts["model"].graph, graph_hash=facts["model"].graph_hash, serving=s,
            hardware=facts["hardware"].spec,
            asked=replace(old.plan.asked, **{name: facts[name] for name in _LOAD}),
        )
        require_possible(plan, facts["hardware"])
    except PlanError:
        return None
    model = served_model(plan.graph, plan.asked.engine)
    pools = [Pool(**{f.name: getattr(s, f.name) for f in fields(Pool)}), s.prefill]
    if not all(_divides(model, pool) for pool in pools if pool):
        return None
    engine = load_serving_engine(plan.asked.engine)
    if unservable(engine.name, s, experts_of(plan.graph)):
        return None
    return recosted(plan, facts["hardware"])


def _divides(model: ServedModel, pool: Pool) -> bool:
    """Whether the degrees divide the model, as those that are searched do."""
    heads = [a.heads for layer in model.layers for a in layer.attention]
    experts = [e.experts for layer in model.layers for e in layer.experts]
    return (
        pool.pp <= model.layer_count
        and not any(h % pool.tp for h in heads) and not any(e % pool.ep for e in experts)
    )  # fmt: skip
