"""The plan file: canonical JSON, one record a line, layers folded; and back, checked.

`to_text` gives the same bytes for the same plan; `parse_text` accepts any JSON that says the same
and raises PlanError with the path of what is wrong.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from cost_models.decisions import Decisions, Workload
from cost_models.engines import engine_names
from cost_models.formats import NARROW
from cost_models.forward import forward_of
from cost_models.schedule import rank_of
from ir.check import check_sizes
from ir.errors import PlanError, known_words
from ir.graph import Graph
from ir.stacks import as_written
from planner.decisions_json import decisions_from_json, decisions_json
from planner.formats import fault, settled
from planner.keep_checks import check_keep
from planner.legality import illegal, inconsistent
from planner.names import MOST_NAMES, expand_text, fold_text
from planner.placements import edge_rules, parameter_rules, parse_placements
from planner.plan import PLANNER_VERSION, Plan
from planner.plan_json import (
    check_numbers,
    is_list,
    no_duplicates,
    object_at,
    record_at,
    records_at,
    section,
    solver_at,
    solver_json,
    typed,
)
from planner.workload import OPTIMIZERS, PRECISIONS

if TYPE_CHECKING:
    from planner.serving.plan import ServingPlan

SCHEMA = "plan/1"
SERVING_SECTIONS = ("schema", "planner", "inputs", "workload", "decisions", "blocks", "parameters",
                    "edges", "estimate", "solver")  # fmt: skip
MODES = ("full", "selective", "none")
SECTIONS = ("schema", "planner", "inputs", "workload", "decisions", "stages", "units",
            "parameters", "edges", "estimate", "solver")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What can be read before the graph: its hash, and its text where the plan embeds it."""

    graph_hash: str
    graph: str | None


def to_text(plan: Plan, *, embed: bool = False) -> str:
    """The plan as canonical JSON."""
    graph = plan.graph
    sections: dict[str, Any] = {
        "inputs": {
            "graph": plan.graph_hash,
            "hardware": f"{plan.hardware} {plan.hardware_hash}",
            "constants": plan.constants_hash,
        },
        "workload": workload_json(plan.workload),
        "decisions": decisions_json(plan.decisions),
        "stages": stage_records(plan.decisions, graph),
        "units": recompute_records(plan.decisions, graph),
        "parameters": parameter_rules(plan.sharding_by_unit, graph),
        "edges": edge_rules(plan.sharding_by_unit, graph),
        "estimate": {
            "step_time_us": plan.step_time_us,
            "peak_memory_bytes": plan.peak_memory_bytes,
        },
        "solver": solver_json(plan.solver),
    }
    if embed:
        from ir.text import format_graph

        sections["graph"] = format_graph(as_written(graph)).splitlines()
    lines = [f'"schema": "{SCHEMA}", "planner": "{PLANNER_VERSION}"']
    lines += [f'"{key}": {section(value)}' for key, value in sections.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def workload_json(workload: Workload) -> dict[str, Any]:
    """The workload, without the expert imbalance and the allowed formats where there are none."""
    found = asdict(workload)
    if workload.expert_imbalance == 1:
        del found["expert_imbalance"]
    allowed = found.pop("allowed_formats")
    if allowed:
        found["allowed_formats"] = ",".join(allowed)
    return found


def stage_records(decisions: Decisions, graph: Graph) -> list[dict[str, Any]]:
    """Which units each global stage runs."""
    from planner.chain import stage_units

    found, parts = [], decisions.part_of_rank
    for stage, units in enumerate(stage_units(graph, decisions.stages)):
        rank = rank_of(decisions.schedule, decisions.pp, stage)
        part = {"part": parts[rank]} if parts else {}
        found.append({"stage": stage, "pp_rank": rank, **part, "units": fold_text(units)})
    return found


def recompute_records(decisions: Decisions, graph: Graph) -> list[dict[str, Any]]:
    """Which layers are computed again, by mode, in order of first appearance."""
    from planner.chain import layer_paths

    layers = iter(layer_paths(graph))
    modes: dict[str, list[str]] = {}
    counts = decisions.recompute or ((0, 0),) * len(decisions.stages)
    for total, (full, selective) in zip(decisions.stages, counts):
        for index in range(total):
            mode = MODES[(index >= full) + (index >= full + selective)]
            modes.setdefault(mode, []).append(next(layers))
    return [{"units": fold_text(paths), "recompute": mode} for mode, paths in modes.items()]


def parse_header(text: str, source: str) -> Header:
    """Read what needs no graph. Raises PlanError for truncated JSON and a newer schema."""
    raw = _document(text, source)
    inputs = object_at(raw, "inputs", ("graph", "hardware", "constants"))
    lines = raw.get("graph")
    if lines is not None and not is_list(lines, str):
        raise PlanError("graph is not a list of lines", where=source)
    return Header(
        graph_hash=typed(inputs, "graph", str, "inputs."),
        graph=None if lines is None else "\n".join(lines) + "\n",
    )


def parse_text(text: str, graph: Graph, source: str = "plan") -> Plan | ServingPlan:
    """Read a plan for `graph`. Raises PlanError naming the key, unit or parameter at fault."""
    try:
        raw = _document(text, source)
        if _of_serving(raw):
            from planner.serving.text import parse

            return parse(raw, graph)
        return _parse(raw, graph)
    except PlanError as fault:
        if not fault.where:
            fault.where = source
        raise


def _parse(raw: dict[str, Any], graph: Graph) -> Plan:
    inputs = object_at(raw, "inputs", ("graph", "hardware", "constants"))
    hardware, _, digest = typed(inputs, "hardware", str, "inputs.").rpartition(" ")
    workload = _workload(raw)
    graph = forward_of(graph, workload.engine)
    stages = _stages(raw, graph)
    decisions = decisions_from_json(
        object_at(raw, "decisions"), stages, _recompute(raw, graph, stages)
    )
    decisions = replace(decisions, parts=_parts(raw))
    _check_decisions(decisions, workload, raw)
    check_sizes(graph, decisions.micro_batch, workload.seq_len)
    _check_formats(decisions, workload, graph)
    check_keep(decisions.keep, graph)
    estimate = object_at(raw, "estimate", ("step_time_us", "peak_memory_bytes"))
    return Plan(
        graph=graph,
        graph_hash=typed(inputs, "graph", str, "inputs."),
        hardware=hardware,
        hardware_hash=digest,
        constants_hash=typed(inputs, "constants", str, "inputs."),
        workload=workload,
        decisions=decisions,
        shardings=parse_placements(
            records_at(raw, "parameters", ("match", "tp")),
            records_at(raw, "edges", ("at", "forward", "backward")),
            graph,
            tp=decisions.tp,
        ),
        step_time_us=typed(estimate, "step_time_us", int, "estimate."),
        peak_memory_bytes=typed(estimate, "peak_memory_bytes", int, "estimate."),
        solver=solver_at(raw),
    )


def _document(text: str, source: str) -> dict[str, Any]:
    """The JSON object of a plan whose schema this version reads."""
    try:
        raw = json.loads(text, object_pairs_hook=no_duplicates)
    except (RecursionError, ValueError) as fault:
        if not isinstance(fault, json.JSONDecodeError):  # too deep, or a number without end
            raise PlanError("not a plan: it cannot be read", where=source,
                            why=str(fault).partition(";")[0],
                            hints=("restore it from git, or plan trace again",)) from fault
        end = "the file ends too early" if fault.pos >= len(text.rstrip()) else fault.msg
        raise PlanError(
            f"not a whole plan: {end}",
            where=f"{source}:{fault.lineno}:{fault.colno}",
            hints=("restore it from git, or plan trace again",),
        ) from fault
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if not isinstance(schema, str) or not schema.startswith("plan/"):
        raise PlanError("not a plan", where=source, why=f'expected "schema": "{SCHEMA}"')
    if schema != SCHEMA:
        raise PlanError(
            f"schema {schema!r} is not known", where=source,
            why=f"this is version {PLANNER_VERSION}, which reads {SCHEMA}",
            hints=("upgrade meshwright to read it",),
        )  # fmt: skip
    sections = SERVING_SECTIONS if _of_serving(raw) else SECTIONS
    for key in [*sections, *raw]:
        if key not in sections and key != "graph":
            raise PlanError(f"unknown key {key}", where=source,
                            why=known_words(key, [*sections, "graph"]))  # fmt: skip
        if key not in raw:
            raise PlanError(f"missing key {key}", where=source)
    try:
        check_numbers(raw)
    except PlanError as fault:
        fault.where = source
        raise
    return dict(raw)


def _of_serving(raw: dict[str, Any]) -> bool:
    workload = raw.get("workload")
    return isinstance(workload, dict) and workload.get("task") == "serve"


def _workload(raw: dict[str, Any]) -> Workload:
    """The workload, its expert imbalance 1 and no format allowed where that is not said."""
    given = {"expert_imbalance": 1.0, "allowed_formats": ""} | object_at(raw, "workload")
    skew, allowed = given.pop("expert_imbalance"), given.pop("allowed_formats")
    if not isinstance(skew, (int, float)) or isinstance(skew, bool) or not skew >= 1:
        raise PlanError(f"workload.expert_imbalance is {json.dumps(skew)}",
                        why="expected a number, 1 or more")  # fmt: skip
    words = tuple(word for word in allowed.split(",") if word) if isinstance(allowed, str) else None
    if words is None or any(word not in NARROW for word in words):
        raise PlanError(f"workload.allowed_formats is {json.dumps(allowed)}",
                        why=f"expected some of {', '.join(NARROW)}, as in \"fp8\"")  # fmt: skip
    apart = ("expert_imbalance", "allowed_formats")
    workload: Workload = record_at({"workload": given}, "workload", Workload, apart)
    workload = replace(workload, expert_imbalance=float(skew), allowed_formats=words)
    _check_workload(workload)
    return workload


def _stages(raw: dict[str, Any], graph: Graph) -> tuple[int, ...]:
    """Layers per stage; every unit on one stage, in the model's order."""
    from planner.chain import layer_paths, stage_units

    rows = raw["stages"]
    if not is_list(rows, dict) or not rows:
        raise PlanError("stages is not a list of objects")
    layers, units = frozenset(layer_paths(graph)), []
    for index, row in enumerate(rows):
        words = [value for key, value in row.items() if key in ("part", "units")]
        if (
            sorted(row.keys() - {"part"}) != ["pp_rank", "stage", "units"]
            or not all(isinstance(word, str) for word in words)
            or ("part" in row) != ("part" in rows[0])
        ):
            raise PlanError(f"stages[{index}] is {json.dumps(row)}",
                            why="expected stage, pp_rank and units; on hardware with parts, the"
                            " part of each")  # fmt: skip
        units.append(expand_text(row["units"]))
        _require_few(sum(map(len, units)), "stages")
    counts = tuple(sum(path in layers for path in paths) for paths in units)
    known = [path for paths in stage_units(graph, (len(layers),)) for path in paths]
    placed = Counter(path for paths in units for path in paths)
    for path in dict.fromkeys([*known, *placed]):
        if path not in known:
            raise PlanError(f"stages name {path!r}, which is no unit of {graph.name}")
        if placed[path] != 1:
            raise PlanError(f"{path} is on {placed[path] or 'no'} stage"
                            + ("s" if placed[path] else ""),
                            why="every unit is on exactly one stage")  # fmt: skip
    if 0 in counts and len(counts) > 1:
        index = counts.index(0)
        raise PlanError(f"stages[{index}] holds {rows[index]['units']}, and no layer",
                        why=f"every stage has some of the {len(layers)} layers of {graph.name}")
    for index, (found, expected) in enumerate(zip(units, stage_units(graph, counts))):
        if sorted(found) != sorted(expected):
            raise PlanError(
                f"stages[{index}] holds {fold_text(found)}",
                why=f"in the model's order it would hold {fold_text(expected)}",
            )
    return counts


def _require_few(count: int, key: str) -> None:
    """Raise PlanError where all rows together name more units than any model has."""
    if count > MOST_NAMES:
        raise PlanError(f"{key} name more than {MOST_NAMES:,} units")


def _parts(raw: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """The parts that the stages lie on and their pp ranks; none where the hardware has none."""
    of_rank: dict[int, str] = {}
    for index, row in enumerate(raw["stages"]):
        rank, part = row["pp_rank"], row.get("part")
        if not isinstance(rank, int):
            return ()  # `_check_decisions` says so
        if part is not None and of_rank.setdefault(rank, part) != part:
            raise PlanError(f"stages[{index}] puts pp_rank {rank} on {part}",
                            why=f"an earlier stage puts it on {of_rank[rank]}")  # fmt: skip
    names = [of_rank[rank] for rank in sorted(of_rank)]
    runs = [(name, sum(1 for _ in run)) for name, run in itertools.groupby(names)]
    if len({name for name, _ in runs}) < len(runs):
        raise PlanError("stages go back to a part that they left", why=" ".join(names))
    return tuple(runs)


def _recompute(
    raw: dict[str, Any], graph: Graph, stages: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """(full, selective) of each stage from the ranges of layers."""
    from planner.chain import layer_paths

    modes: dict[str, str] = {}
    for index, row in enumerate(records_at(raw, "units", ("units", "recompute"))):
        if row["recompute"] not in MODES:
            raise PlanError(f"units[{index}].recompute is {row['recompute']!r}",
                            why=f"expected one of {' '.join(MODES)}")  # fmt: skip
        for path in expand_text(row["units"]):
            if path in modes:
                raise PlanError(f"{path} is in two rules of units")
            modes[path] = row["recompute"]
        _require_few(len(modes), "units")
    layers = layer_paths(graph)
    for path in dict.fromkeys([*layers, *modes]):
        if (path in modes) != (path in layers):
            where = "in no rule of units" if path in layers else "no layer of the model"
            raise PlanError(f"{path} is {where}")
    rows, start = [], 0
    for stage, total in enumerate(stages):
        found = [MODES.index(modes[path]) for path in layers[start : start + total]]
        if found != sorted(found):
            raise PlanError(f"recompute of stage {stage} changes back and forth",
                            why="layers are full first, then selective, then none")  # fmt: skip
        rows.append((found.count(0), found.count(1)))
        start += total
    return tuple(rows)


def _check_workload(workload: Workload) -> None:
    words = {"task": ("train",), "engine": engine_names(), "precision": PRECISIONS,
             "optimizer": OPTIMIZERS}  # fmt: skip
    for key, known in words.items():
        if getattr(workload, key) not in known:
            raise PlanError(f"workload.{key} is {getattr(workload, key)!r}",
                            why=f"expected one of {' '.join(known)}")  # fmt: skip


def _check_formats(decisions: Decisions, workload: Workload, graph: Graph) -> None:
    own = settled(decisions.formats, graph, workload)
    if own != decisions.formats:
        raise PlanError(f"decisions.formats is {dict(decisions.formats)}",
                        why=f"of this model, beside {workload.precision}, it is {dict(own)}")
    found = fault(own, graph, workload)
    if found:
        raise PlanError(f"decisions.formats is {dict(own)}", why=found[0], hints=(found[1],))


def _check_decisions(decisions: Decisions, workload: Workload, raw: dict[str, Any]) -> None:
    reason = inconsistent(decisions, workload) or illegal(decisions, workload)
    if reason:
        raise PlanError(f"decisions contradict each other: {reason}")
    for index, row in enumerate(raw["stages"]):
        rank = rank_of(decisions.schedule, decisions.pp, index)
        if row["stage"] != index or row["pp_rank"] != rank:
            raise PlanError(
                f"stages[{index}] is stage {row['stage']} on pp_rank {row['pp_rank']}",
                why=f"expected stage {index} on pp_rank {rank}",
            )
