"""The plan file of serving: canonical JSON, one record a line; and back, checked."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from cost_models.serving_decisions import Held, Pool, Serving
from ir.check import check_sizes
from ir.errors import PlanError, UsageError, known_words
from ir.graph import Graph
from planner.placements import edge_rules, parameter_rules, parse_placements
from planner.plan import PLANNER_VERSION
from planner.plan_json import (
    object_at,
    records_at,
    section,
    solver_at,
    solver_json,
    typed,
)
from planner.serving.asked import MOST, ServeAsked, check_steps
from planner.serving.plan import ServingPlan

SCHEMA = "plan/1"
_APART = ("weights", "tiers", "default")  # of the decisions: they are said by block
# said where they are not so
_UNSAID = (("kv_tier", "gpu"), ("kv_window", 0), ("kv_policy", ""), ("prefill", None))
_ESTIMATE = ("ttft_us", "tpot_us", "peak_memory_bytes")


def to_text(plan: ServingPlan, *, embed: bool = False) -> str:
    """The plan as canonical JSON."""
    sections: dict[str, Any] = {
        "inputs": {
            "graph": plan.graph_hash,
            "hardware": f"{plan.hardware} {plan.hardware_hash}",
            "constants": plan.constants_hash,
        },
        "workload": workload_json(plan.asked),
        "decisions": decisions_json(plan),
        "blocks": block_records(plan.serving),
        "parameters": parameter_rules(plan.sharding_by_unit, plan.graph) if plan.shardings else [],
        "edges": edge_rules(plan.sharding_by_unit, plan.graph) if plan.shardings else [],
        "estimate": {name: getattr(plan, name) for name in _ESTIMATE},
        "solver": solver_json(plan.solver),
    }
    if embed:
        from ir.text import format_graph

        sections["graph"] = format_graph(plan.graph).splitlines()
    lines = [f'"schema": "{SCHEMA}", "planner": "{PLANNER_VERSION}"']
    lines += [f'"{key}": {section(value)}' for key, value in sections.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def workload_json(asked: ServeAsked) -> dict[str, Any]:
    """The load; what is at its default, but the load itself, is not said."""
    default = ServeAsked()
    found: dict[str, Any] = {"task": "serve"}
    for f in fields(asked):
        value = getattr(asked, f.name)
        if f.name in ("prompt", "output", "batch", "engine", "precision", "objective") or (
            value != getattr(default, f.name)
        ):
            found[f.name] = dict(value) if f.name == "keep" else value
    return found


def decisions_json(plan: ServingPlan) -> dict[str, Any]:
    """Decisions but those of blocks; tiers and windows of the cache, and pools, only where there
    are."""
    found = {f.name: getattr(plan.serving, f.name) for f in fields(Serving) if f.name not in _APART}
    for name, none in _UNSAID:
        if found[name] == none:
            del found[name]
    if plan.serving.prefill is not None:
        found["prefill"] = asdict(plan.serving.prefill)
    if plan.rows_on_host:
        found["rows_on_host"] = plan.rows_on_host
    return found


def block_records(s: Serving) -> list[dict[str, Any]]:
    """Format and place of every block that is not on the GPU in the model's own format."""
    held = {h.block: h for h in s.tiers}
    rows: list[dict[str, Any]] = [{"block": "all", "format": s.default}]
    for block in dict.fromkeys([*dict(s.weights), *held]):
        row: dict[str, Any] = {"block": block, "format": s.format_of(block)}
        if block in held:
            h = held[block]
            row |= {"tier": h.tier, "place": h.place, "resident": h.resident}
        rows.append(row)
    return rows


def parse(raw: dict[str, Any], graph: Graph) -> ServingPlan:
    """Read what `to_text` writes. Raises PlanError naming the key at fault."""
    inputs = object_at(raw, "inputs", ("graph", "hardware", "constants"))
    hardware, _, digest = typed(inputs, "hardware", str, "inputs.").rpartition(" ")
    asked = _asked(object_at(raw, "workload"))
    decisions = object_at(raw, "decisions")
    rows_on_host = decisions.pop("rows_on_host", 0)
    serving = _serving(decisions, raw["blocks"])
    if asked.batch and serving.batch != asked.batch:
        raise PlanError(f"decisions.batch is {serving.batch}, workload.batch {asked.batch}")
    try:
        check_steps(asked, serving.prefill_chunk)
    except UsageError as fault:
        raise PlanError(f"decisions: {fault.what}", why=fault.why) from fault
    check_sizes(graph, 1, asked.prompt + asked.output)
    estimate = object_at(raw, "estimate", _ESTIMATE)
    shardings: tuple[Any, ...] = ()
    if serving.tp > 1:
        shardings = parse_placements(
            records_at(raw, "parameters", ("match", "tp")),
            records_at(raw, "edges", ("at", "forward", "backward")), graph, tp=serving.tp,
        )  # fmt: skip
    return ServingPlan(
        graph=graph, graph_hash=typed(inputs, "graph", str, "inputs."), hardware=hardware,
        hardware_hash=digest, constants_hash=typed(inputs, "constants", str, "inputs."),
        asked=asked, serving=serving, shardings=shardings,
        rows_on_host=_whole(rows_on_host, "decisions.rows_on_host"),
        **{name: typed(estimate, name, int, "estimate.") for name in _ESTIMATE},
        solver=solver_at(raw),
    )  # fmt: skip


def _asked(given: dict[str, Any]) -> ServeAsked:
    given = dict(given)
    given.pop("task", None)
    keys = {f.name: f for f in fields(ServeAsked)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in keys:
            raise PlanError(f"unknown key workload.{name}", why=known_words(name, keys))
        kind = str(keys[name].type)
        if name == "keep":
            if not isinstance(value, dict):
                raise _odd(f"workload.{name}", value, "an object of blocks and formats")
            values[name] = tuple((str(k), str(v)) for k, v in value.items())
        elif kind.startswith("tuple"):
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise _odd(f"workload.{name}", value, "a list of words")
            values[name] = tuple(value)
        elif kind.startswith("float"):
            if value is not None and (not isinstance(value, int | float) or value <= 0
                                      or isinstance(value, bool)):  # fmt: skip
                raise _odd(f"workload.{name}", value, "seconds")
            values[name] = value
        elif kind == "int":
            values[name] = _whole(value, f"workload.{name}")
        else:
            if not isinstance(value, str):
                raise _odd(f"workload.{name}", value, "a word")
            values[name] = value
    made: ServeAsked = _made(ServeAsked, values, "workload")
    return made


def _serving(given: dict[str, Any], blocks: Any) -> Serving:
    asked = {f.name: f for f in fields(Serving) if f.name not in _APART}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in asked:
            raise PlanError(f"unknown key decisions.{name}", why=known_words(name, asked))
        if name == "prefill":
            sizes = object_at(given, name, tuple(f.name for f in fields(Pool)))
            values[name] = Pool(**{k: _whole(v, f"decisions.prefill.{k}")
                                   for k, v in sizes.items()})  # fmt: skip
            continue
        word = str(asked[name].type) == "str"
        if word and not isinstance(value, str):
            raise _odd(f"decisions.{name}", value, "a word")
        values[name] = value if word else _whole(value, f"decisions.{name}")
    if not isinstance(blocks, list) or not all(isinstance(row, dict) for row in blocks):
        raise PlanError("blocks is not a list of objects")
    weights, tiers = [], []
    for at, row in enumerate(blocks):
        keys = set(row)
        if keys not in ({"block", "format"}, {"block", "format", "tier", "place", "resident"}):
            raise PlanError(f"blocks[{at}] is {json.dumps(row)}",
                            why="expected block, format, and tier, place, resident or none of them")
        if not all(isinstance(row[k], str) for k in keys - {"resident"}):
            raise _odd(f"blocks[{at}]", row, "words")
        if row["block"] == "all":
            values["default"] = row["format"]
        elif row["format"] != values.get("default"):
            weights.append((row["block"], row["format"]))
        if "tier" in row:
            resident = _whole(row["resident"], f"blocks[{at}].resident")
            place = {k: row[k] for k in ("block", "tier", "place")} | {"resident": resident}
            tiers.append(_made(Held, place, f"blocks[{at}]"))
    values |= {"weights": tuple(weights), "tiers": tuple(tiers)}
    made: Serving = _made(Serving, values, "decisions")
    return made


def _made(kind: Any, values: dict[str, Any], where: str) -> Any:
    """A record whose own checks' words are the file's fault."""
    try:
        return kind(**values)
    except UsageError as fault:
        raise PlanError(f"{where}: {fault.what}", why=fault.why, hints=fault.hints) from fault


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        raise _odd(where, value, f"a whole number, 0 to {MOST:,}")
    return value


def _odd(where: str, value: Any, expected: str) -> PlanError:
    return PlanError(f"{where} is {json.dumps(value)[:40]}", why=f"expected {expected}")
