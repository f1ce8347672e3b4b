"""What `plan size --task serve` compared, as text at 80 columns or as one JSON document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cost_models.serving_shapes import ServedModel
from cost_models.units import format_count, format_rate, format_seconds
from planner.serving.asked import ServeAsked
from planner.serving.show import division, estimate_json
from planner.serving.sizing import ServeSized, ServeSizing
from planner.serving.text import workload_json
from planner.show_size import WIDTH, in_columns, left_json, left_out, named, usd_text
from planner.sizing import PAST

LEFT = {
    "slow": "too slow", "memory": "do not fit", "room": "run fewer requests at once",
    "divided": "cannot be divided", "dominated": "cannot beat a row in anything",
}  # fmt: skip
AXIS = {"cost": "USD an hour", "energy": "power of the boards", "gpus": "GPUs",
        "time": "time"}  # fmt: skip
Column = tuple[str, int, Callable[[ServeSized], str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the comparison was of. without: (why, names) of devices that cannot take part."""

    model: ServedModel
    parameters: int
    asked: ServeAsked
    most_gpus: int
    objective: str
    without: tuple[tuple[str, tuple[str, ...]], ...] = ()


def ordered(found: ServeSizing, objective: str) -> list[tuple[ServeSized, bool]]:
    """Rows with their place on the front, best first by one axis, then as they are."""
    def key(row: ServeSized) -> float:
        known = {"gpus": float(row.cluster.count), "time": row.limits_used, "energy": row.watts}
        return known.get(objective, 0.0)  # rows come by cost where that is an axis

    return sorted(zip(found.rows, found.on_front), key=lambda pair: key(pair[0]))


def size_text(found: ServeSizing, of: Served, *, every: bool = False) -> str:
    """The front, best first; every: also the rows that are not on it."""
    asked = of.asked
    shown = [row for row, on in ordered(found, of.objective) if on or every]
    columns = _columns(found, shown)
    pairs = (("first token", asked.max_ttft_s), ("between tokens", asked.max_tpot_s))
    limits = [f"{name} {format_seconds(most)} at most" for name, most in pairs if most]
    formats = ", ".join((*asked.formats, *(f"kv:{word}" for word in asked.allow_kv)))
    lines = [
        f"{of.model.name}, {format_count(of.parameters)} parameters",
        *named("load", f"{asked.batch} requests at once, {asked.prompt} tokens in,"
              f" {asked.output} out, {asked.engine}, {formats}"),
        *named("limits", ", ".join([*limits, f"{of.most_gpus} GPUs"])),
        *named("front", ", ".join(AXIS[axis] for axis in found.axes)
              + f"; below 1/{PAST:g} of the limits all times count as alike"),
        "", in_columns([(name, width) for name, width, _ in columns]),
        *(in_columns([(cell(row), width) for _, width, cell in columns]) for row in shown),
        "", *left_out(found.left, of.without, LEFT,
                      f"{found.searched} searched, {len(found.rows)} meet the limits",
                      found.on_front),
    ]  # fmt: skip
    if "cost" in found.axes:
        lines += named("columns", "$/h: on demand; $/M: a million tokens that are written, at this"
                      " load; J/token: power of the boards, no hosts or switches")  # fmt: skip
    else:
        lines += named("columns", "power: of the boards, no hosts or switches")
        lines += named("prices", "none given: rows are by the power of the boards; --prices FILE")
    return "\n".join(lines)


def _columns(found: ServeSizing, shown: Sequence[ServeSized]) -> list[Column]:
    name = 1 + max(len(row.cluster.spec) for row in shown)
    columns: list[Column] = [("hardware", -max(name, 9), lambda r: r.cluster.spec)]
    if "cost" in found.axes:
        columns += [("$/h", 7, lambda r: usd_text(r.usd_per_hour)),
                    ("$/M", 7, lambda r: usd_text(r.usd_per_million_tokens))]  # fmt: skip
    columns += [
        ("power", 8, lambda r: f"{r.watts / 1e3:.3g} kW"),
        ("J/token", 9, lambda r: f"{r.joules_per_token:.3g}"),
        ("first", 9, lambda r: format_seconds(r.found.ttft_s)),
        ("each", 9, lambda r: format_seconds(r.found.tpot_s)),
        ("tokens/s", 9, lambda r: format_rate(r.found.tokens_per_s)),
    ]
    taken = sum(abs(width) for _, width, _ in columns)
    return [*columns, ("", -(WIDTH - taken), lambda r: ("  " + _plan(r))[:WIDTH - taken])]


def _plan(row: ServeSized) -> str:
    sizes = division(row.found)
    found = _short(sizes)
    if "prefill" in sizes:  # prompts > tokens
        found = [*(_short(sizes["prefill"]) or ["x1"]), ">", *(found or ["x1"])]
    tiers = dict.fromkeys(held.tier for held in row.found.serving.tiers)
    return " ".join([*found, *(f"+{tier}" for tier in tiers)])


def _short(sizes: dict[str, int]) -> list[str]:
    words = {"tp": "tp", "pp": "pp", "ep": "ep", "attention_dp": "dp", "replicas": "x"}
    return [f"{short}{sizes[name]}" for name, short in words.items() if sizes.get(name, 1) > 1]


def _decisions(row: ServeSized) -> dict[str, Any]:
    found = asdict(row.found.serving)
    if found["prefill"] is None:
        del found["prefill"]
    return found


def size_json(found: ServeSizing, of: Served) -> dict[str, Any]:
    """All candidates that meet the limits, base units; best first."""
    return {
        "schema": "size/1",
        "model": {"name": of.model.name, "parameters": of.parameters},
        "workload": workload_json(of.asked),
        "limits": {"gpus": of.most_gpus},
        "objective": of.objective,
        "axes": list(found.axes),
        "times_count_down_to_limits_over": PAST,
        "candidates": [
            {
                "hardware": row.cluster.spec, "gpus": row.cluster.count, "on_front": on,
                "power_w": row.watts, "limits_used": row.limits_used,
                "usd_per_hour": row.usd_per_hour,
                "usd_per_million_tokens": row.usd_per_million_tokens,
                "joules_per_token": row.joules_per_token,
                "estimate": estimate_json(row.found, of.asked),
                "decisions": _decisions(row),
            }
            for row, on in ordered(found, of.objective)
        ],
        "searched": found.searched,
        "left_out": left_json(found.left, of.without),
    }  # fmt: skip
