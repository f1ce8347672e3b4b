"""Checkpoints on local ranks: saved, and taken over by other plans."""

import os
from dataclasses import replace

import pytest
import runtime_cases_checkpoint as cases
import torch
from runtime_cases_weights import assert_parts_of, built, planned


def test_an_optimizer_may_be_made_before_the_weights(world):
    plan = planned("llama", dp=2)
    expected, _ = world.run(2, cases.trained, "llama", plan, range(3), None, None)[0]
    assert world.run(2, cases.optimizer_first, plan, "")[0] == expected
    on_host = replace(plan, decisions=replace(plan.decisions, offload=(("params", "cpu"),)))
    assert world.run(2, cases.optimizer_first, on_host, "")[0] == pytest.approx(expected, rel=1e-6)


def test_a_job_goes_on_under_other_plans(world, tmp_path):
    """tp2 x fsdp2 -> fsdp4 -> pp2 x tp2 -> three processes -> one -> tp2 x fsdp2; a model with a
    tie across the stages and a fused projection."""
    name = "gpt"
    expected, _ = world.run(1, cases.trained, name, planned(name), range(7), None, None)[0]
    route = [
        (planned(name, tp=2, dp=2), range(0, 1)),
        (planned(name, dp=4), range(1, 2)),
        (planned(name, pp=2, tp=2), range(2, 3)),
        (planned(name, dp=3), range(3, 4)),
        (planned(name), range(4, 5)),
        (planned(name, tp=2, dp=2), range(5, 7)),
    ]
    folder, losses, start = str(tmp_path / "checkpoint"), [], None
    for i, (plan, steps) in enumerate(route):
        case = (cases.trained, name, plan, steps, start, folder, i % 2 == 1)
        found = world.run(plan.decisions.gpus, *case)
        losses += found[0][0]
        assert os.listdir(tmp_path) == ["checkpoint"]
        start = folder
    assert losses == pytest.approx(expected, rel=1e-6)

    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt")
    model, _ = built(name)
    model.load_state_dict(plain["model"], strict=False)  # a tie is there once
    assert_parts_of([pieces for _, pieces in found], dict(model.named_parameters()))


def test_four_processes_become_three(world, tmp_path):
    """What a job does that loses a node: plan for what is left, restore, go on."""
    four, three = (planned("llama", dp=n) for n in (4, 3))
    folder = str(tmp_path / "checkpoint")
    expected, _ = world.run(4, cases.trained, "llama", four, range(4), None, None)[0]
    before, _ = world.run(4, cases.trained, "llama", four, range(2), None, folder)[0]
    after, _ = world.run(3, cases.trained, "llama", three, range(2, 4), folder, None)[0]
    assert before + after == pytest.approx(expected, rel=1e-6)


def test_experts_go_on_under_other_plans(world, tmp_path):
    folder = str(tmp_path / "checkpoint")
    plans = [planned("moe", dp=4, ep=2), planned("moe"), planned("moe", dp=2, tp=2, ep=4)]
    start, wholes = None, []
    for plan in plans:
        found = world.run(plan.decisions.gpus, cases.resaved, "moe", plan, start, folder)
        start = folder
        if plan.decisions.gpus == 1:
            whole = {name: x for name, _, x in found[0]}
        wholes.append(found)
    for found in wholes:
        assert_parts_of(found, whole)


def test_a_failed_save_leaves_the_earlier_checkpoint(world, tmp_path):
    folder = tmp_path / "checkpoint"
    plan = planned("llama", dp=2)
    found = world.run(2, cases.failing, "llama", plan, str(folder))
    assert len({seed for *_, seed in found}) == 2  # data ranks go on with numbers of their own
    for full, later, bad, foreign, state, changed, _ in found:
        for said in (full, later):
            assert said[:2] == [
                "PlanError", f"error: the checkpoint {folder} cannot be saved: No space left on"
                " device",
            ]  # fmt: skip
            assert said[2].strip() == "rank 1" and "the earlier one is as it was" in said[-1]
        assert bad[1] == "error: the state to save is not JSON" and "rank 1" in bad[2]
        assert "none of the model's" in foreign[1]
        assert state == {"step": 1} and changed == []
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_what_cannot_be_restored_is_said_on_every_rank(world, tmp_path):
    empty = tmp_path / "other"
    empty.mkdir()
    (empty / "thesis.txt").write_text("years of work")
    plans = {name: planned(name, dp=2) for name in ("llama", "wide", "deep", "gelu")}
    for found in world.run(2, cases.refused, plans, str(tmp_path / "c"), str(empty)):
        first = {name: said and said[:2] for name, said in found.items()}
        where = tmp_path / "c"
        other = f"error: {where} is a checkpoint of another model: "
        assert "39 parameters have no values, the first embed_tokens" in first["no values"][1]
        assert "has no values to save" in first["nothing to save"][1]
        assert first["no checkpoint"][1] == f"error: there is no checkpoint at {where}-none"
        assert first["a folder"][1] == f"error: {empty} is no checkpoint of ours"
        assert "holds other files" in first["replace"][1]
        assert first["sgd"][1] == f"error: {where} holds the state of AdamW, not of SGD"
        assert "of 1 optimizers, not of 2" in first["two"][1]
        w1 = "layers.0.feed_forward.w1.weight"
        assert first["wide"] == [
            "GateError", f"{other}{w1} is [128, 64] in the checkpoint, [192, 64] in the model",
        ]  # fmt: skip
        assert first["deep"][0] == "GateError" and "layers.4." in first["deep"][1]
        assert first["gelu"][0] == "GateError" and "silu" in first["gelu"][1]
        assert found["all the same"] is None
    assert (empty / "thesis.txt").exists()
