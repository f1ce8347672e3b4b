"""What changed between two plans of serving, as the same value that training's have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cost_models.serving_engines import error_of
from cost_models.serving_reading import served_model
from planner.differ import (
    Apart,
    Change,
    Diff,
    Number,
    by_name,
    other_model,
    placed,
    renamed_of,
    same_names,
    verdict_of,
)
from planner.serving.attribution import serving_effects
from planner.serving.check import CheckedServing
from planner.serving.plan import ServingPlan
from planner.serving.text import block_records, decisions_json, workload_json

MEANINGS = {
    "batch": "requests at once", "tp": "ranks that split a layer's tensors", "pp": "pipeline ranks",
    "ep": "ranks that share experts", "etp": "ranks that split an expert's tensors",
    "attention_dp": "ranks that each attend for their own requests", "replicas": "of the model",
    "prefill_chunk": "tokens of a prompt at once; 0: whole", "kv": "format of the cache",
    "kv_tier": "where the cache lies", "kv_window": "tokens that the cache keeps; 0: all",
    "kv_policy": "what is kept, or read, of older tokens",
    "prefill": "GPUs that read prompts alone, by degree",
    "rows_on_host": "tokens up to which the CPU multiplies what it holds",
}  # fmt: skip


def diff_serving(old: CheckedServing, new: CheckedServing) -> Diff:
    """Compare two plans of serving, each predicted anew (`check.examine_serving`)."""
    a, b = old.plan, new.plan
    renamed = renamed_of(a.graph, b.graph)
    numbers = _numbers(old, new)
    decisions = _changes(_decided(a), _decided(b))
    blocks = _changes(*_filled(_blocks(a), _blocks(b)))
    placements = by_name(placed(a), placed(b), renamed)
    inputs = _changes(_given(a), _given(b))
    return Diff(
        verdict=verdict_of(
            Apart(decided=bool(decisions or blocks or placements), renamed=bool(renamed),
                  inputs=bool(inputs), work=_work(a, b, renamed)),
            numbers, fits=new.found.fits,
        ),
        numbers=numbers,
        decisions=decisions, stages=(), blocks=blocks, placements=placements, inputs=inputs,
        renamed=same_names(renamed), drift=_drift(old),
        serving_effects=serving_effects(old, new, _error(old, new)),
    )  # fmt: skip


def _work(a: ServingPlan, b: ServingPlan, renamed: Mapping[str, str]) -> tuple[str, ...]:
    """What makes a request, or what serves it, not the other plan's."""
    pairs = (("prompt", a.asked.prompt, b.asked.prompt), ("output", a.asked.output, b.asked.output),
             *((("requests at once", a.serving.batch, b.serving.batch),)
               if a.asked.batch or b.asked.batch else ()),  # else it is the search's
             ("GPUs", a.serving.devices, b.serving.devices))  # fmt: skip
    return (*other_model(a.graph, b.graph, renamed),
            *(f"{name} {x:,} -> {y:,}" for name, x, y in pairs if x != y))  # fmt: skip


def _numbers(old: CheckedServing, new: CheckedServing) -> tuple[Number, ...]:
    a, b = old.found, new.found
    error = _error(old, new)
    rows = (
        ("first token", "ttft_s", "s", a.ttft_s, b.ttft_s, -1),
        ("then a token", "tpot_s", "s", a.tpot_s, b.tpot_s, -1),
        ("tokens/s", "tokens_per_s", "", a.tokens_per_s, b.tokens_per_s, 1),
        ("peak memory", "peak_memory_bytes", "B", dict(a.tiers)["gpu"], dict(b.tiers)["gpu"], -1),
    )
    return tuple(
        Number(name=name, key=key, unit=unit, old=x, new=y, error=error, better=better)
        for name, key, unit, x, y, better in rows
    )


def _error(old: CheckedServing, new: CheckedServing) -> float:
    return max(error_of(c.plan.asked.engine) for c in (old, new))


def _decided(plan: ServingPlan) -> dict[str, str]:
    """In words; of experts where the model has some: else etp goes with tp, and says nothing."""
    model = served_model(plan.graph, plan.asked.engine)
    experts = any(layer.experts for layer in model.layers)
    return {key: _plain(value) for key, value in decisions_json(plan).items()
            if experts or key not in ("ep", "etp")}  # fmt: skip


def _blocks(plan: ServingPlan) -> dict[str, str]:
    """Format and place of each block that the plan names, and of all others."""
    rows: dict[str, dict[str, Any]] = {row["block"]: row for row in block_records(plan.serving)}
    return {
        block: row["format"]
        + (f", {row['place']} {row['tier']}, {row['resident']} on the GPU" if "tier" in row else "")
        for block, row in rows.items()
    }


def _filled(old: dict[str, str], new: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """A block that one plan does not name is as `all` in it."""
    names = dict.fromkeys([*old, *new])
    first, second = ({n: rows.get(n, rows["all"]) for n in names} for rows in (old, new))
    return first, second


def _given(plan: ServingPlan) -> dict[str, str]:
    return {
        "model": f"{plan.graph.name} {plan.graph_hash[:15]}",
        "hardware": f"{plan.hardware} {plan.hardware_hash[:15]}",
        "constants": plan.constants_hash[:15],
        **{key: _plain(value) for key, value in workload_json(plan.asked).items()},
    }


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{block}:{word}" for block, word in value.items())
    return ",".join(value) if isinstance(value, tuple | list) else str(value)


def _changes(old: dict[str, str], new: dict[str, str]) -> tuple[Change, ...]:
    return tuple(
        Change(what=key, old=old.get(key, "default"), new=new.get(key, "default"),
               meaning=MEANINGS.get(key, ""))
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    )  # fmt: skip


def _drift(old: CheckedServing) -> Number | None:
    """The old plan's own time between tokens against the same plan predicted today."""
    before, after = old.plan.tpot_us, round(old.found.tpot_s * 1e6)
    if before == after:
        return None
    return Number(name="a token every", key="tpot_s", unit="s", old=before / 1e6, new=after / 1e6,
                  error=0.0, better=-1)  # fmt: skip
