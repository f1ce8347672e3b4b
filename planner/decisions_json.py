"""Decisions as a plan file has them, and back, with the path of whatever is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cost_models.decisions import Decisions
from cost_models.formats import GROUPS
from cost_models.schedule import SCHEDULES
from ir.errors import PlanError, known_words
from planner.decisions import (
    COUNTED,
    COUNTED_TIER,
    CP_KINDS,
    FORMATS,
    GRAD_DTYPES,
    OFFLOADED,
    WHOLE,
    read_formats,
)
from planner.keep_words import keep_from_json, keep_json
from planner.share_words import shares_from_json, shares_json


def decisions_json(decisions: Decisions) -> dict[str, Any]:
    """Decisions as JSON keys in the contract's order; stages and recompute are told apart, and a
    dp_outer of 1 is not said, nor are formats where all is in the precision, nor a keep of all
    operations, nor shares where there are none, nor tp_by_part where all parts have one."""
    d = decisions
    head = ("pp", "dp", "cp", "tp", "ep", "etp", "zero", "shard", "reshard", "micro_batch",
            "microbatches", "schedule", "virtual_stages")  # fmt: skip
    tail = ("sequence_parallel", "compile", "cp_kind", "grad_dtype")
    return {
        **{key: getattr(d, key) for key in head},
        "offload": dict(d.offload),
        **{key: getattr(d, key) for key in tail},
        **({"dp_outer": d.dp_outer} if d.dp_outer > 1 else {}),
        **({"formats": dict(d.formats)} if d.formats else {}),
        **({"keep": keep_json(d.keep)} if d.keep else {}),
        **({"shares": shares_json(d.shares)} if d.shares else {}),
        **({"tp_by_part": dict(d.tp_by_part)} if d.tp_by_part else {}),
    }


def decisions_from_json(
    raw: Mapping[str, Any], stages: tuple[int, ...], recompute: tuple[tuple[int, int], ...]
) -> Decisions:
    """Read what `decisions_json` writes. Raises PlanError with the path of the bad key."""
    left_out: dict[str, Any] = {
        "dp_outer": 1, "formats": {}, "keep": {}, "shares": {}, "tp_by_part": {},
    }  # fmt: skip
    template = decisions_json(Decisions()) | left_out
    raw = {**left_out, **raw}
    for key in [*template, *raw]:
        where = f"decisions.{key}"
        if key not in template:
            raise PlanError(f"unknown key {where}", why=known_words(key, template))
        if key not in raw:
            raise PlanError(f"missing key {where}")
        expected, value = template[key], raw[key]
        if type(value) is not type(expected):
            raise PlanError(f"{where} is {value!r}", why=f"expected {_described(expected)}")
        if isinstance(value, int) and value < (0 if key == "zero" else 1) and value is not False:
            raise PlanError(f"{where} is {value}", why="expected 1 or more")
        words = {"schedule": SCHEDULES, "cp_kind": CP_KINDS, "grad_dtype": GRAD_DTYPES,
                 "zero": (0, 1, 2, 3)}.get(key)  # fmt: skip
        if words and value not in words:
            known = ",".join(map(str, words))
            raise PlanError(f"{where} is {value!r}", why=f"expected one of {known}")
    for what, tier in raw["offload"].items():
        word = tier if isinstance(tier, str) else ""
        counted = what in COUNTED and COUNTED_TIER.fullmatch(word)
        alone = word.partition(":")[0] if counted else word
        if what not in OFFLOADED or not alone or ":" in alone:
            raise PlanError(f"decisions.offload.{what} is {tier!r}",
                            why='expected {"optimizer": TIER or "TIER:4/3", "params": TIER, '
                                '"activations": TIER or "TIER:4/3"}, or some of them')  # fmt: skip
    if "params" in raw["offload"] and "optimizer" not in raw["offload"]:
        raise PlanError("decisions.offload has params and no optimizer",
                        why="parameters are updated where they lie")  # fmt: skip
    formats = read_formats([*raw["formats"].items()])
    if formats is None or WHOLE in raw["formats"] or any(w not in FORMATS for _, w in formats):
        raise PlanError(f"decisions.formats is {raw['formats']!r}",
                        why=f"expected a format of {', '.join(FORMATS)} for some of"
                            f" {', '.join(GROUPS)}")  # fmt: skip
    for part, tp in raw["tp_by_part"].items():
        if type(tp) is not int or tp < 1:
            raise PlanError(f"decisions.tp_by_part.{part} is {tp!r}",
                            why="expected a whole number, 1 or more")  # fmt: skip
    values = {**raw, "tp_by_part": tuple(raw["tp_by_part"].items()), "formats": formats,
              "keep": keep_from_json(raw["keep"]),
              "shares": shares_from_json(raw["shares"]),
              "offload": tuple(
        (what, raw["offload"][what]) for what in OFFLOADED if what in raw["offload"]
    )}
    return Decisions(**values, stages=stages, recompute=recompute)


def _described(value: object) -> str:
    names = {bool: "true or false", int: "a whole number", str: "a word", dict: "an object"}
    return names[type(value)]
