"""`plan size` with sums of several kinds of GPUs among what is compared."""

import json

import pytest
from test_fleet import LLAMA
from test_size import PRICES, WORKLOAD, sizer
from tiny_models import graph_of

from cost_models.fleet import load_any, used_parts
from cost_models.hardware import describe
from cost_models.operations import Operations
from cost_models.pareto import dominates
from ir.errors import UsageError
from planner.charges import charges
from planner.decisions import Pins
from planner.fleet_asking import FleetAsking
from planner.limits import Limits
from planner.show_size import LEFT, left_out
from planner.sizing import Left, Target
from planner.sizing_options import parse_devices

AXES = ("time", "cost", "energy", "gpus")


def test_a_sum_is_a_candidate_as_it_is():
    fleet = load_any("h100x2+a100x2")
    operations = Operations(failures_per_gpu_hour=0.02)
    found = sizer(
        Target(), operations=operations, prices=PRICES, axes=AXES,
        limits=Limits(gpus=4), every=True,
    ).run((fleet, describe("h100"), describe("a100")))  # fmt: skip
    *alone, row = found.rows  # the sum after the devices
    assert row.hardware == fleet and len(alone) >= 2
    asking = FleetAsking(graph=graph_of("llama"), fleet=fleet, workload=WORKLOAD)
    best = asking.without((), Pins(), effort=60)
    assert row.decisions == best.decisions
    assert row.estimate.step_time_ps == best.estimate().step_time_ps
    again = charges(
        graph_of("llama"), fleet, WORKLOAD, row.decisions, row.estimate, operations, PRICES
    )
    assert row.usd_per_million_tokens == again.usd_per_million_tokens
    assert row.gpus == sum(part.count for part in used_parts(fleet, row.decisions))
    points = [[r.value(axis) for axis in AXES] for r in found.rows]
    assert found.on_front == tuple(not any(dominates(q, p) for q in points) for p in points)


def test_a_sum_may_have_too_many_gpus_or_too_little_memory():
    fleet = load_any("h100x2+a100x2")
    few = sizer(Target(tokens_per_s=1.0), limits=Limits(gpus=3))
    assert [left.reason for left in few.run((describe("h100"), fleet)).left
            if left.hardware == fleet.spec] == ["gpus"]  # fmt: skip
    small = sizer(Target(tokens_per_s=1.0), limits=Limits(gpus=4, memory_bytes=1000))
    small._join(fleet)
    assert [left.reason for left in small.left] == ["memory"]


def test_the_command_compares_a_sum(plan, tmp_path):
    assert [one.name for one in parse_devices("h100,h100x2+a100x2")] == ["h100", "h100x2+a100x2"]
    with pytest.raises(UsageError):
        parse_devices("h100+a100")  # how many of each is not sought
    asked = ("size", LLAMA, "--arg", "size=tiny", "--global-batch", "64", "--seq-len", "128",
             "--target", "tokens_per_s=1", "--max-gpus", "4")  # fmt: skip
    code, out, err = plan(*asked, "--hardware", "a100,h100x2+a100x2", "--all")
    assert code == 0 and "h100x2+a100x2" in out, err
    assert max(map(len, out.split("\n"))) <= 80
    code, out, err = plan(*asked, "--hardware", "h100x2+a100x2", "--json")
    (row,) = json.loads(out)["candidates"]
    assert code == 0 and row["hardware"] == "h100x2+a100x2" and row["gpus"] in (2, 4)
    code, out, err = plan(*asked, "--hardware", "h100x2+a100x2")
    assert "to plan it: plan trace" in err and "--hardware h100x2+a100x2" in err
    code, out, _ = plan(*asked[:-1], 3, "--hardware", "a100,h100x2+a100x2")
    said = " ".join(out.split())
    assert code == 0 and "have more GPUs than may be (h100x2+a100x2)" in said
    (tmp_path / "prices.toml").write_text("[h100]\nusd_per_gpu_hour = 4.0\n")
    priced = ("--hardware", "h100,h100x2+a100x2", "--prices", "prices.toml")
    code, out, err = plan(*asked, *priced)  # the sum has no price, and is there for other numbers
    assert code == 0, err
    code, _, err = plan("size", LLAMA, "--task", "serve", "--batch", "4", "--hardware",
                        "h100x2+a100x2")  # fmt: skip
    assert code == 64 and "--hardware h100,a100" in err


def test_a_sum_that_is_beaten_is_named():
    """It was asked for by name, as a device is that has a row."""
    beaten = left_out((), (), LEFT, "5 searched", (True, False, False), ["h100x2+a100x2"])
    assert " ".join("".join(beaten).split()) == (
        "searched 5 searched, 2 of them beaten in everything (--all): h100x2+a100x2"
    )
    slow = [Left(hardware=name, reason="slow") for name in ("h100x8", "a100x4+h100x4", "a100x8")]
    (words,) = left_out(slow, (), LEFT, "1 searched", (True,))[1:]
    assert words.split(maxsplit=2)[2] == "3 too slow (a100x4+h100x4)"
