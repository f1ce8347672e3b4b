"""Experts over ranks: layouts against the whole model, what travels, and what is reported."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import sqrt

import pytest
import runtime_cases_experts as cases

from ir.errors import UsageError
from planner import trace
from planner.runtime.health import ExpertLoad

SEQ, BATCH = 16, 8


@cache
def base(name: str, *fixed: str, engine: str = "native"):
    """A plan of the model on four GPUs; one pipeline stage and cp rank where nothing is said."""
    model, loss = cases.built(name)
    free = {"pp": "pp=1", "cp": "cp=1", "tp": "tp=1", "zero": "zero=0",
            "recompute": "recompute=none"}  # fmt: skip
    for pin in fixed:
        free.pop(pin.partition("=")[0], None)
    return trace(
        model, cases.inputs, loss=loss, hardware="h100x4", seq_len=SEQ, global_batch=BATCH,
        precision="fp32", engine=engine,
        fix=("micro_batch=2", *free.values(), *fixed),
    )  # fmt: skip


def planned(name: str, *fixed: str, **decided: int):
    """That plan with other decisions, on as many ranks as they say."""
    plan = base(name, *fixed)
    d = replace(plan.decisions, **decided)
    if d.zero:
        d = replace(d, shard=decided.get("shard", d.dp * d.cp))
    d = replace(d, microbatches=BATCH // (d.dp * d.micro_batch))
    return replace(plan, decisions=d)


def check(world, ranks: int, *plans):
    """Run them on one world; what rank 0 found, each right on every rank."""
    found = world.run(ranks, cases.compare, list(plans))
    for results in found:
        for (name, plan), result in zip(plans, results):
            assert result["loss"] < 1e-6, (name, plan.decisions, result)
            assert result["gradient"] < 1e-5, (name, plan.decisions, result)
    return found[0]


def test_experts_over_ep_under_every_zero_stage(world):
    plans = [("moe", planned("moe", dp=2, ep=2, zero=z, micro_batch=2)) for z in range(4)]
    for found in check(world, 2, *plans):
        # rows go once and come back once a layer: 2 layers, forward and backward, 2 micro-batches
        assert found["sent"] == 2 * 2 * 2 * 2
        assert found["held"]["layers.0.experts.w1"] == (4, 64, 128)
        for load in found["loads"]:
            assert sum(load.counts) == 2 * BATCH * SEQ  # top 2
            halves = sum(load.counts[:4]), sum(load.counts[4:])
            assert load.imbalance == pytest.approx(max(halves) / (BATCH * SEQ))


def test_experts_over_ep_and_etp_and_groups(world):
    found = check(
        world, 4,
        ("moe", planned("moe", dp=4, ep=2, etp=2, zero=1)),
        ("moe", planned("moe", dp=4, ep=1, etp=4, zero=0)),
        ("moe", planned("moe", dp=4, ep=2, zero=3)),
        ("moe", planned("moe", dp=4, ep=2, zero=2, shard=2, micro_batch=1)),
        ("shared", planned("shared", dp=4, ep=2, etp=2, zero=2)),
        ("biased", planned("biased", dp=4, ep=4, zero=1)),
    )  # fmt: skip
    assert found[0]["held"]["layers.0.experts.w1"] == (4, 64, 64)
    assert found[0]["held"]["layers.0.experts.w2"] == (4, 64, 64)
    assert found[1]["held"]["layers.0.experts.w2"] == (8, 32, 64)
    assert found[2]["held"]["layers.0.experts.w1"] == (2, 64, 128)
    assert found[4]["held"]["layers.0.mixture.gate_up"] == (2, 48, 32)


@pytest.mark.parametrize("sp", ["on", "off"])
def test_under_tensor_parallelism_each_rank_routes_its_tokens(world, sp):
    pins = ("tp=2", "ep=2", f"sequence_parallel={sp}")
    split = "place:layers.*.mixture.shared.up.weight=S(0)"
    check(
        world, 4,
        ("moe", planned("moe", *pins, dp=2, zero=1)),
        ("moe", planned("moe", *pins, dp=2, etp=2, zero=0)),
        ("moe", planned("moe", *pins, dp=2, ep=1, zero=3)),
        ("shared", planned("shared", *pins, split, dp=2, zero=2)),
    )  # fmt: skip


def test_with_context_parallelism_and_pipelines(world):
    check(
        world, 4,
        ("moe", base("moe", "cp=2", "dp=2", "ep=4", "cp_kind=ulysses")),
        ("moe", base("moe", "cp=2", "tp=2", "ep=2", "cp_kind=ring")),
        ("moe", base("moe", "pp=2", "dp=2", "ep=2")),
        ("moe", base("moe", "pp=2", "tp=2", "ep=2")),
    )  # fmt: skip


def test_transformers_models_from_a_configuration(world):
    check(
        world, 2,
        ("Mixtral", planned("Mixtral", dp=2, ep=2, zero=3)),
        ("Qwen3Moe", planned("Qwen3Moe", dp=2, ep=2, zero=1)),
        ("Qwen3Moe", planned("Qwen3Moe", dp=2, ep=1, zero=2)),
    )  # fmt: skip


def test_full_recomputation_routes_again_and_counts_once(world):
    plan = planned("moe", dp=2, ep=2, zero=1)
    plan = replace(plan, decisions=replace(plan.decisions, recompute=((2, 0),)))
    (found,) = check(world, 2, ("moe", plan))
    assert sum(found["loads"][0].counts) == 2 * BATCH * SEQ


def test_experts_that_are_modules_run_whole_and_are_never_split(world):
    (found,) = check(world, 2, ("list", planned("list", dp=2, zero=2)))
    assert [sum(load.counts) for load in found["loads"]] == [BATCH * SEQ] * 2
    with pytest.raises(UsageError, match="cannot be run of this model"):
        base("list", "ep=2")


def test_compiled_experts_under_tp_are_not_computed_again_whole():
    """torch 2.13 repeats them on all tokens: the runtime would run them eager."""
    with pytest.raises(UsageError, match=r"recompute=.* cannot be run of this model"):
        base("moe", "tp=2", "recompute=full", engine="native-compiled")


def test_a_router_that_is_not_finite_is_reported(world):
    first, second = world.run(2, cases.broken_router, planned("moe", dp=2, ep=2))[0]
    assert not first.not_finite and second.not_finite and second.collapsed


def test_load_statistics():
    load = ExpertLoad(layer="a", counts=(6, 0, 2, 0), dropped=0, not_finite=0, ep=2)
    assert load.std == pytest.approx(sqrt((16 + 4 + 0 + 4) / 4))
    assert load.dead == (1, 3)
    assert load.imbalance == pytest.approx(6 / 4)
    assert load.imbalance_over(4) == pytest.approx(6 / 2)
    assert load.collapsed  # one of four experts has most of the tokens
    even = replace(load, counts=(2, 2, 2, 2))
    assert (even.imbalance, even.dead, even.collapsed) == (1, (), False)
    assert replace(even, counts=(0, 0, 0, 0)).imbalance == 1
