"""JSON Schemas of plan files and hardware files, for editors and other tools.

They are made of the tables that the readers use, so that they say what the readers take; what goes
with what is the readers' alone. `python -m planner.schemas FOLDER` writes them.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cost_models.decisions import Decisions, Workload
from cost_models.engines import engine_names
from cost_models.hardware import CLUSTER_KEYS, DEVICE_KEYS, DTYPES, LINK_KEYS, catalogue
from cost_models.levels import LEVEL_KEYS, LEVEL_KINDS
from cost_models.serving_decisions import Held, Pool, Serving
from cost_models.serving_engines import serving_engines
from cost_models.serving_shapes import BLOCKS
from cost_models.tiers import TIER_KEYS
from planner.decisions import VOCABULARY
from planner.decisions_json import decisions_json
from planner.plan import Solver
from planner.plan_json import SOLVED_FOR
from planner.plan_text import MODES, SCHEMA
from planner.serving.asked import ServeAsked

Json = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
WORD: Json = {"type": "string"}
WHOLE: Json = {"type": "integer", "minimum": 0}
HASH: Json = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
SIZE: Json = {
    "anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}],
    "description": 'bytes, or a text with a unit: "80GiB"',
}
PLAIN: dict[type, Json] = {
    str: WORD, int: {"type": "integer"}, float: {"type": "number"}, bool: {"type": "boolean"},
    list: {"type": "array"}, dict: {"type": "object"},
}  # fmt: skip


def plan_schema() -> Json:
    """Of plan.json: a plan of training or one of serving."""
    return {
        "$schema": DIALECT, "title": "Meshwright plan", "type": "object",
        "if": {"properties": {"workload": {"properties": {"task": {"const": "serve"}}}}},
        "then": _serving(), "else": _training(),
    }  # fmt: skip


def hardware_schema() -> Json:
    """Of a hardware file: hardware of one kind, or a list of parts."""
    link = _numbers(LINK_KEYS) | {"kind": _one_of(("nvlink", "pcie", "network"))}
    device = _numbers(DEVICE_KEYS) | {
        "peak_flop_per_s": _object(
            dict.fromkeys(DTYPES, PLAIN[float]), said="dense, FLOP/s; a format left out is refused"
        ),
        "constants": WORD,
    }
    level = _numbers(LEVEL_KEYS) | {"kind": _one_of(tuple(LEVEL_KINDS)), "ranks": WHOLE}
    cluster = _numbers(CLUSTER_KEYS) | {
        "intra": _object(link), "inter": _object(link),
        "tiers": _list(_object(_numbers(TIER_KEYS) | {"gpus": WHOLE})),
        "levels": _list(_object(level)),
    }  # fmt: skip
    prose = {"type": "object", "additionalProperties": WORD}
    one = {
        "name": WORD,
        "base": WORD | {"description": "a device of the catalogue, by any name of it; only what"
                        " differs is said", "examples": list(catalogue())},
        "count": {"type": "integer", "minimum": 1, "description": "GPUs"},
        "device": _object(device), "cluster": _object(cluster), "sources": prose,
        "constants": {"type": "object", "description": "constants of its own, by op and format"},
    }  # fmt: skip
    parts = {"name": WORD, "parts": _list(WORD), "between": _object(link), "sources": prose}
    return {
        "$schema": DIALECT, "title": "Meshwright hardware file", "type": "object",
        "if": {"required": ["parts"]}, "then": _object(parts, needed=("parts",)),
        "else": _object(one, needed=("count",)),
    }  # fmt: skip


def _training() -> Json:
    """Sections of a plan of training."""
    workload = _fields(Workload) | {
        "task": {"const": "train"}, "engine": _one_of(engine_names()), "allowed_formats": WORD,
    }  # fmt: skip
    optional = ("expert_imbalance", "allowed_formats")
    estimate = {"step_time_us": WHOLE, "peak_memory_bytes": WHOLE}
    stage = {"stage": WHOLE, "pp_rank": WHOLE, "part": WORD, "units": WORD}
    unit = {"units": WORD, "recompute": _one_of(MODES)}
    return _sections(
        _object(workload, needed=tuple(k for k in workload if k not in optional)),
        _decisions(),
        {"stages": _list(_object(stage, needed=("stage", "pp_rank", "units"))),
         "units": _list(_object(unit, needed=tuple(unit)))},
        _object(estimate, needed=tuple(estimate)),
    )  # fmt: skip


def _serving() -> Json:
    """Sections of a plan of serving."""
    load = _fields(ServeAsked) | {
        "task": {"const": "serve"}, "engine": _one_of(serving_engines()),
        "keep": {"type": "object", "additionalProperties": WORD},
    }  # fmt: skip
    pool = _fields(Pool)
    decided = _fields(Serving, but=("weights", "tiers", "default", "prefill")) | {
        "prefill": _object(pool, needed=tuple(pool)),
    }
    block = {"format": WORD} | _fields(Held) | {"block": _one_of((*BLOCKS, "all"))}
    estimate = {"ttft_us": WHOLE, "tpot_us": WHOLE, "peak_memory_bytes": WHOLE}
    return _sections(
        _object(load, needed=("task", "prompt", "output", "batch", "engine")),
        _object(decided | {"rows_on_host": WHOLE}, needed=("tp", "pp", "ep", "batch")),
        {"blocks": _list(_object(block, needed=("block", "format")))},
        _object(estimate, needed=tuple(estimate)),
    )


def _sections(workload: Json, decisions: Json, own: Json, estimate: Json) -> Json:
    """A plan's sections, in the file's order."""
    inputs = {"graph": HASH, "hardware": WORD, "constants": HASH}
    rule = {"match": WORD, "tp": WORD}
    edge = {"at": WORD, "forward": WORD, "backward": WORD}
    solver = _fields(Solver, but=("pins", "objective", "axis_gain_ppm"))
    beyond = "of training beyond what an axis more must earn of the step"
    for key, said in (("gap_ppm", "what can be gained at most"), ("bound_us", "no step is below")):
        solver[key] = solver[key] | {"description": f"{said}, {beyond}"}
    more = {"pins": _list(WORD), "objective": _one_of(SOLVED_FOR),
            "axis_gain_ppm": WHOLE}
    ended = _object(solver | more, needed=tuple(solver))
    sections = {
        "schema": {"const": SCHEMA}, "planner": WORD,
        "inputs": _object(inputs, needed=tuple(inputs)), "workload": workload,
        "decisions": decisions, **own,
        "parameters": _list(_object(rule, needed=tuple(rule))),
        "edges": _list(_object(edge, needed=tuple(edge))),
        "estimate": estimate, "solver": ended,
        "graph": _list(WORD) | {"description": "the model's graph, with --embed"},
    }  # fmt: skip
    return _object(sections, needed=tuple(k for k in sections if k != "graph"))


def _decisions() -> Json:
    """The decisions of training: types of the record, words and meanings of the vocabulary."""
    meanings = {key.name: key.meaning for key in VOCABULARY}
    words = {key.name: key.words.split() for key in VOCABULARY}
    always = decisions_json(Decisions())
    kinds = _fields(Decisions)
    found: Json = {}
    for name in (*always, "dp_outer", "formats", "keep", "shares", "tp_by_part"):
        kind = kinds[name]
        if isinstance(always.get(name), str):
            kind = _one_of(tuple(word for word in words[name] if word != "any"))
        if name in ("offload", "formats"):
            kind = {"type": "object", "additionalProperties": WORD}
        if name == "keep":
            kind = {"type": "object", "additionalProperties": _list(WORD)}
        if name == "shares":
            share = {"dp": WHOLE, "microbatches": WHOLE, "recompute": _list(_list(WHOLE))}
            kind = {"type": "object", "additionalProperties": _object(share, needed=(*share,)[:2])}
        if name == "tp_by_part":
            kind = {"type": "object", "additionalProperties": WHOLE}
        found[name] = kind | ({"description": meanings[name]} if name in meanings else {})
    return _object(found, needed=tuple(always))


def _fields(record: type, but: tuple[str, ...] = ()) -> Json:
    """The fields of a record by the types they are annotated with."""
    hints = typing.get_type_hints(record)
    return {field.name: _kind(hints[field.name]) for field in fields(record)
            if field.name not in but}  # fmt: skip


def _kind(hint: Any) -> Json:
    if isinstance(hint, types.UnionType):
        return {"anyOf": [_kind(of) for of in typing.get_args(hint)]}
    if hint is type(None):
        return {"type": "null"}
    if typing.get_origin(hint) is tuple:
        return {"type": "array"}
    return WHOLE if hint is int else PLAIN[hint]


def _numbers(keys: Mapping[str, type]) -> Json:
    """Keys of a TOML table; sizes may have a unit, numbers are positive."""
    found: Json = {}
    for name, kind in keys.items():
        number: Json = {"exclusiveMinimum": 0} if kind in (int, float) else {}
        if name.endswith("efficiency"):
            number |= {"maximum": 1}
        found[name] = SIZE if kind is int and "bytes" in name else PLAIN[kind] | number
    return found


def _object(properties: Json, *, needed: tuple[str, ...] = (), said: str = "") -> Json:
    made: Json = {"type": "object", "properties": properties, "additionalProperties": False}
    made |= {"required": list(needed)} if needed else {}
    return made | ({"description": said} if said else {})


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _one_of(words: tuple[str, ...]) -> Json:
    return {"enum": list(words)}


def texts() -> dict[str, str]:
    """File name -> text of each schema."""
    made = {"plan.schema.json": plan_schema(), "hardware.schema.json": hardware_schema()}
    return {name: json.dumps(value, indent=1) + "\n" for name, value in made.items()}


if __name__ == "__main__":
    for name, text in texts().items():
        (Path(sys.argv[1]) / name).write_text(text, encoding="utf-8")
