"""The published JSON Schemas say what the readers take."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator as Validator
from toy_plan import DECISIONS, toy_plan

from cost_models.hardware import catalogue
from planner.plan_text import to_text
from planner.schemas import hardware_schema, plan_schema, texts

ROOT = Path(__file__).parent.parent
PLAN, HARDWARE = Validator(plan_schema()), Validator(hardware_schema())
HASH = "sha256:" + "0" * 64


def faults(validator, value):
    return [e.message for e in validator.iter_errors(value)]


def test_the_published_files_are_those_of_the_code():
    """`python -m planner.schemas docs/schemas` writes them."""
    for name, text in texts().items():
        assert (ROOT / "docs" / "schemas" / name).read_text() == text
    Validator.check_schema(plan_schema())
    Validator.check_schema(hardware_schema())


def test_every_hardware_file_is_valid():
    files = sorted((ROOT / "examples").rglob("*.toml"))
    for path in files:
        assert not faults(HARDWARE, tomllib.loads(path.read_text())), path
    for name in catalogue():
        raw = tomllib.loads((ROOT / "cost_models" / "hardware" / f"{name}.toml").read_text())
        assert not faults(HARDWARE, raw | {"count": 8}), name
    assert len(files) >= 3


@pytest.mark.parametrize(
    "given",
    [
        {"count": 8, "bse": "h100"}, {"base": "h100"}, {"base": "h100", "count": 0},
        {"base": "h100", "count": 8, "device": {"power_w": -1}},
        {"base": "h100", "count": 8, "cluster": {"inter": {"kind": "ethernet"}}},
        {"base": "h100", "count": 8, "cluster": {"intra": {"efficiency": 80}}},
        {"parts": ["h100x8"], "cluster": {}},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_reader_refuses_is_marked(given):
    assert faults(HARDWARE, given)


def test_plans_of_training_are_valid_and_odd_keys_are_not():
    decided = replace(
        DECISIONS, offload=(("optimizer", "cpu"),), formats=(("mlp", "fp8"),),
        keep=(("Layer", ("linear",)),), dp_outer=2,
    )  # fmt: skip
    for plan in (toy_plan(), toy_plan(decisions=decided)):
        plan = replace(plan, graph_hash=HASH, constants_hash=HASH)
        raw = json.loads(to_text(plan, embed=True))
        assert not faults(PLAN, raw)
        for section in ("decisions", "workload", "estimate", "inputs", "solver"):
            assert faults(PLAN, raw | {section: raw[section] | {"speed": 1}}), section
        assert faults(PLAN, raw | {"decisions": raw["decisions"] | {"zero": "three"}})
        assert faults(PLAN, {key: value for key, value in raw.items() if key != "stages"})
