"""A plan on a screen and as JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from toy_plan import DECISIONS, SHARDED, WORKLOAD, toy_estimate, toy_graph, toy_plan

from cost_models.hardware import load_hardware
from ir.errors import UsageError
from planner.offloads import offload_words
from planner.options import Baseline, Timing
from planner.plan_text import workload_json
from planner.show import document, layers_text, stage_text, summary

GOLDEN = Path(__file__).parent / "golden"
CLUSTER = load_hardware("h100x8")
BASELINES = (Baseline(name="fsdp", step_time_s=0.002, fits=True),
             Baseline(name="ddp", step_time_s=0.0018, fits=False))  # fmt: skip


def estimated(plan):
    return toy_estimate(plan.graph, CLUSTER, plan.workload, plan.decisions, {})


def test_summary(update_golden):
    plan = toy_plan()
    text = summary(plan, estimated(plan), notes=("--seq-len 2048 (default)",), baselines=BASELINES)
    update_golden(GOLDEN / "show.txt", text + "\n")


def test_a_tp_that_splits_nothing_is_said():
    def says(**changes):
        plan = toy_plan(**changes)
        return "splits nothing" in summary(plan, estimated(toy_plan()))

    whole = replace(SHARDED, edges=(), parameters=tuple((n, "R") for n, _ in SHARDED.parameters))
    alone = replace(DECISIONS, sequence_parallel=False)
    assert not says() and not says(decisions=alone)
    assert says(decisions=alone, shardings=(("Layer", whole),))
    assert says(decisions=alone, shardings=())
    assert not says(decisions=replace(alone, ep=2), shardings=())  # they share experts
    assert not says(decisions=replace(alone, tp=1, dp=4), shardings=())


def test_layers(update_golden):
    update_golden(GOLDEN / "show_layers.txt", layers_text(toy_plan()) + "\n")


@pytest.mark.parametrize(
    ("schedule", "virtual", "rows"),
    [
        ("1f1b", 1, ["stage 0 (pp rank 0): embed_tokens, layers.0",
                     "stages 1 to 6 (pp ranks 1 to 6): layers.{1..6}, 1 on each",
                     "stage 7 (pp rank 7): layers.7, norm, lm_head"]),
        ("interleaved", 2, ["stage 0 (pp rank 0): embed_tokens, layers.0",
                            "stages 1 to 3 (pp ranks 1 to 3): layers.{1..3}, 1 on each",
                            "stages 4 to 6 (pp ranks 0 to 2): layers.{4..6}, 1 on each",
                            "stage 7 (pp rank 3): layers.7, norm, lm_head"]),
        ("zbv", 2, ["stage 0 (pp rank 0): embed_tokens, layers.0",
                    "stages 1 to 3 (pp ranks 1 to 3): layers.{1..3}, 1 on each",
                    "stages 4 to 6 (pp ranks 3 to 1): layers.{4..6}, 1 on each",
                    "stage 7 (pp rank 0): layers.7, norm, lm_head"]),
    ],
)  # fmt: skip
def test_stages_that_are_alike_are_told_in_one(schedule, virtual, rows):
    d = replace(DECISIONS, pp=8 // virtual, virtual_stages=virtual, schedule=schedule,
                stages=(1,) * 8, recompute=((0, 0),) * 8, tp=1, dp=virtual)  # fmt: skip
    lines = layers_text(toy_plan(decisions=d, shardings=())).splitlines()
    assert lines[: len(rows)] == rows and not lines[len(rows)].startswith("stage")
    uneven = replace(d, stages=(1, 1, 1, 1, 1, 1, 0, 2))
    assert "stages 6" not in layers_text(toy_plan(decisions=uneven, shardings=()))


def test_stage(update_golden):
    plan = toy_plan()
    update_golden(GOLDEN / "show_stage.txt", stage_text(plan, estimated(plan), 1) + "\n")
    with pytest.raises(UsageError, match="stages 0 to 1"):
        stage_text(plan, estimated(plan), 2)


def test_the_largest_plan_is_one_screen():
    decisions = replace(
        DECISIONS, pp=16, dp=2, cp=2, tp=4, ep=4, etp=2, schedule="interleaved", virtual_stages=8,
        stages=(1,) * 128, recompute=((1, 0), (0, 1)) * 64, microbatches=16,
        offload=(("optimizer", "cpu"),), shard=2,
    )  # fmt: skip
    plan = toy_plan(toy_graph(128), decisions=decisions)
    e = estimated(plan)
    full = replace(
        e,
        breakdown_ps=tuple((name, 10**9 + i) for i, (name, _) in enumerate(e.breakdown_ps)),
        ranks=tuple(
            replace(r, memory_bytes=tuple((name, 10**9 + i) for i, (name, _) in
                                          enumerate(r.memory_bytes)))
            for r in e.ranks
        ),
        assumptions=("an assumption that takes more than a line " * 3,) * 9,
    )  # fmt: skip
    lines = summary(plan, full, notes=("a note " * 20,) * 4, baselines=BASELINES * 2).splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 80


def test_notes_are_whole_before_assumptions_are_sampled():
    """Short ones share a line, and what assumptions begin with leaves its lines to them."""
    plan, told = toy_plan(), "changes " + ", ".join(f"decision_{n}" for n in range(12))
    e = replace(estimated(plan), assumptions=("an assumption",) * 9)
    short = tuple(f"--flag-{n} {n} (default)" for n in range(18))
    alone = summary(plan, e, baselines=BASELINES).splitlines()
    lines = summary(plan, e, notes=(*short, told), baselines=BASELINES).splitlines()
    assert len(alone) + len(short) + 2 >= 40 > len(lines)
    assert told in " ".join(" ".join(lines).split())
    assert lines[0].startswith(f"{short[0]}; {short[1]}; ")
    assert all(len(line) <= 80 and not line.endswith("...") for line in lines)
    assert summary(plan, e).splitlines()[-1].strip() == "an assumption"


def test_no_decision_is_cut_off():
    """Of the layout and of stages with long names, what does not fit a line is on the next."""
    plan = toy_plan()
    d = replace(plan.decisions, offload=(
        ("optimizer", "cpu:2"), ("params", "cpu"), ("activations", "cpu:1")
    ))  # fmt: skip
    plan = replace(plan, decisions=d)
    text = summary(plan, estimated(toy_plan()))
    words = " ".join(text.split())
    for row in offload_words(d):
        assert row in words
    assert "..." not in text.partition("assumed")[0]
    assert all(len(line) <= 80 for line in text.splitlines())


def test_document_has_the_contract_keys():
    plan = toy_plan()
    e = estimated(plan)
    found = document(plan, e, timing=Timing(), baselines=BASELINES)
    assert list(found) == ["schema", "model", "hardware", "workload", "decisions", "estimate",
                           "solver", "timing", "baselines"]  # fmt: skip
    assert found["workload"] == workload_json(WORKLOAD)
    assert list(found["decisions"])[:18] == [
        "pp", "dp", "cp", "tp", "ep", "etp", "zero", "shard", "reshard", "micro_batch",
        "microbatches", "schedule", "virtual_stages", "recompute", "offload",
        "sequence_parallel", "compile", "cp_kind",
    ]  # fmt: skip
    assert found["decisions"]["recompute"] == "selective:4/0"
    estimate = found["estimate"]
    assert sum(estimate["breakdown_s"].values()) == pytest.approx(estimate["step_time_s"])
    step = (8e9 / 8 + 5e8) / 1e12  # the toy's compute over 8 GPUs, and its bubble
    assert estimate["step_time_s"] == step
    assert estimate["tokens_per_s_per_gpu"] == pytest.approx(16 * 2048 / step / 8)
    assert estimate["model_tflops_per_gpu"] == pytest.approx(1e15 / step / 8 / 1e12)
    assert estimate["mfu"] == pytest.approx(1e15 / step / 8 / 989.4e12)
    assert estimate["peak_memory_bytes"] == 2000 + 6000 + 2000
    assert found["solver"] == {"status": "OPTIMAL", "gap": 0.0, "bound_s": 0.0015, "meshes": 40,
                               "meshes_solved": 3}  # fmt: skip
    assert json.loads(json.dumps(found)) == found
    assert not {"timing", "baselines"} & set(document(plan, e))
