"""What changed between two plans, as a value and as text."""

from dataclasses import replace
from pathlib import Path

import pytest
from toy_plan import DECISIONS, SHARDED, toy_estimate, toy_graph, toy_plan

from cost_models.hardware import load_hardware
from cost_models.sharding import Sharding
from ir.errors import GateError, UsageError
from ir.text import format_graph, graph_hash
from planner.check import Checked
from planner.differ import diff as diff_of
from planner.differ import gate
from planner.differ_text import MOST_CHARACTERS, diff_json, diff_markdown, diff_text
from planner.plan import step_time_us

GOLDEN = Path(__file__).parent / "golden"
CLUSTER = load_hardware("h100x8")


def checked(plan, **estimate):
    e = toy_estimate(plan.graph, CLUSTER, plan.workload, plan.decisions, {})
    if "step_time_us" not in estimate:
        plan = replace(plan, step_time_us=step_time_us(e))
    e = replace(e, **{k: v for k, v in estimate.items() if k != "step_time_us"})
    return Checked(plan=plan, hardware=CLUSTER, estimate=e, inputs=(), stale=False)


def toy_cost(plan, hardware):
    return toy_estimate(plan.graph, hardware, plan.workload, plan.decisions, {})


def diff(old, new):
    return diff_of(old, new, toy_cost)


OLD = checked(toy_plan())
OTHER = replace(DECISIONS, tp=1, dp=4, shard=4, microbatches=4, sequence_parallel=False,
                stages=(4, 4), recompute=((4, 0), (0, 0)))  # fmt: skip


def test_the_same_plan():
    found = diff(OLD, OLD)
    assert not found.differs
    assert found.verdict == "the plans are the same"


def test_different_work_is_said_first_and_compared_by_its_rate():
    """Twice the samples in the same step: another step time would say nothing. A rename alone, or
    another engine, decides nothing differently."""
    more = replace(toy_plan().workload, global_batch=32)
    same_time = checked(toy_plan(workload=more), tokens=2 * OLD.estimate.tokens)
    assert diff(OLD, same_time).verdict == (
        "different work (global_batch 16 -> 32): the new plan: 100.0% more tokens/s/GPU"
    )
    large = checked(toy_plan(), gpus=2 * OLD.estimate.gpus)
    assert diff(OLD, replace(large, plan=replace(large.plan, hardware="h100x16"))).verdict == (
        "different clusters (GPUs 8 -> 16): the new plan: 50.0% fewer tokens/s/GPU"
    )
    engine = checked(toy_plan(workload=replace(toy_plan().workload, engine="megatron")))
    assert diff(OLD, engine).verdict == "other inputs, decided the same, costs the same"
    fewer = checked(toy_plan(toy_graph(6), decisions=replace(DECISIONS, stages=(3, 3))))
    assert diff(OLD, fewer).verdict.startswith("different work (model): the new plan: ")


def test_diff_text(update_golden):
    found = diff(OLD, checked(toy_plan(decisions=OTHER, shardings=())))
    assert found.differs
    update_golden(GOLDEN / "diff.txt", diff_text(found) + "\n")


def test_decisions_and_places_are_told():
    found = diff(OLD, checked(toy_plan(decisions=OTHER, shardings=())))
    decided = {c.what: (c.old, c.new) for c in found.decisions}
    assert decided == {
        "dp": ("2", "4"), "tp": ("2", "1"), "shard": ("2", "4"), "microbatches": ("8", "4"),
        "recompute": ("selective:4/0", "full:4/0"), "sequence_parallel": ("on", "off"),
    }  # fmt: skip
    assert ("layers.4", "pp rank 0, stage 0", "pp rank 1, stage 1") in [
        (c.what, c.old, c.new) for c in found.stages
    ]
    assert ("layers.{0..7}.self_attn.{q,k,v}_proj.weight, layers.{0..7}.mlp.up_proj.weight",
            "S(0)", "R") in [(c.what, c.old, c.new) for c in found.placements]  # fmt: skip


def test_small_deltas_are_within_the_models_error():
    step = OLD.estimate.step_time_ps
    near = diff(OLD, checked(toy_plan(), step_time_ps=round(step * 1.05)))
    far = diff(OLD, checked(toy_plan(), step_time_ps=round(step * 1.2)))
    assert near.numbers[0].within_error and not far.numbers[0].within_error
    assert "within model error" in diff_text(near)
    assert "+20.0%\n" in diff_text(far)


def test_drift_of_the_old_estimate_is_told_apart():
    old = checked(toy_plan(step_time_us=3000), step_time_us=None)
    found = diff(old, OLD)
    assert found.drift.old == 0.003
    assert found.drift.change == -0.5  # the toy takes 1.5 ms today
    assert found.numbers[0].change == 0
    assert "not counted below" in diff_text(found)
    assert diff(OLD, OLD).drift is None


def test_inputs_that_moved():
    new = toy_plan(hardware="h200x8", workload=replace(OLD.plan.workload, seq_len=1024))
    found = diff(OLD, checked(new))
    assert [c.what for c in found.inputs] == ["hardware", "seq_len"]


def test_renamed_modules_are_told_once():
    graph = toy_graph()
    text = format_graph(graph).replace("layers.", "blocks.")
    from ir.text import parse_graph

    new = toy_plan(parse_graph(text), graph_hash=graph_hash(text))
    found = diff(OLD, checked(new))
    assert not found.placements and not found.stages
    assert [c.what for c in found.inputs] == ["model"]
    assert found.verdict == "renamed, decided the same, costs the same"
    assert found.renamed[0][0].startswith("layers.{0..7}")
    assert found.renamed[0][1].startswith("blocks.{0..7}")


def test_one_parameter_placed_otherwise():
    pairs = dict(SHARDED.parameters) | {"mlp.up_proj.weight": "R"}
    sharding = Sharding(parameters=tuple(pairs.items()), edges=SHARDED.edges)
    found = diff(OLD, checked(toy_plan(shardings=(("Layer", sharding),))))
    assert [(c.what, c.old, c.new) for c in found.placements] == [
        ("layers.{0..7}.mlp.up_proj.weight", "S(0)", "R")
    ]


def test_gate():
    found = diff(OLD, checked(toy_plan(), step_time_ps=round(OLD.estimate.step_time_ps * 1.05)))
    gate(found, "step-time=+6%,memory=+0%")
    with pytest.raises(GateError, match="fails the gate") as error:
        gate(found, "step-time=+3%")
    assert "step time +5.0%, allowed +3%" in error.value.why
    with pytest.raises(UsageError):
        gate(found, "speed=3%")


def test_json_keys():
    found = diff_json(diff(OLD, checked(toy_plan(decisions=OTHER, shardings=()))))
    assert list(found) == ["schema", "verdict", "differs", "numbers", "drift", "effects",
                           "decisions", "stages", "blocks", "placements", "inputs",
                           "renamed"]  # fmt: skip
    assert found["numbers"][0]["name"] == "step_time_s"


def test_a_plan_that_does_not_fit():
    small = checked(toy_plan(decisions=OTHER, shardings=()), capacity_bytes=9_000)
    assert diff(OLD, small).verdict == "the new plan does not fit"
    assert diff(small, small).verdict == "the plans are the same, and do not fit"


def test_each_change_alone_and_all_together_sum_to_the_whole():
    """tp 2 -> 1 with dp 2 -> 4 leaves the toy's time as it is, and adds 2,000 bytes; the
    micro-batch has no effect; what has none alone is still a row."""
    d = replace(OTHER, micro_batch=2, microbatches=2)
    found = diff(OLD, checked(toy_plan(decisions=d, shardings=())))
    rows = {row.keys: (row.step_time_ps, row.peak_memory_bytes) for row in found.effects}
    assert rows == {
        ("dp", "tp", "sequence_parallel"): (0, 2000), ("micro_batch",): (0, 0),
        ("stages",): (0, 0), ("recompute",): (0, 0),
    }  # fmt: skip
    wider = replace(DECISIONS, dp=4, pp=1, shard=4, microbatches=2, micro_batch=2, stages=(8,),
                    recompute=((0, 0),))  # fmt: skip
    new = checked(toy_plan(decisions=wider))
    found = diff(OLD, new)
    whole = new.estimate.step_time_ps - OLD.estimate.step_time_ps
    assert sum(row.step_time_ps for row in found.effects) == whole
    assert "pp" in found.effects[0].keys and "stages" in found.effects[0].keys


def test_what_no_legal_plan_has_alone_goes_with_what_it_needs():
    """A micro-batch of 3 does not divide 16 samples over dp 2: it goes with the batch of 12."""
    d = replace(OTHER, micro_batch=3, microbatches=1)
    batch = replace(OLD.plan.workload, global_batch=12)
    found = diff(OLD, checked(toy_plan(workload=batch, decisions=d, shardings=())))
    keys = {row.keys for row in found.effects}
    assert keys == {("micro_batch", "global_batch"), ("dp", "tp", "sequence_parallel"),
                    ("stages",), ("recompute",)}  # fmt: skip


def test_a_comment_holds_no_markup_of_a_plan(update_golden):
    found = diff(OLD, checked(toy_plan(decisions=OTHER, shardings=())))
    text = diff_markdown(found, "plans/plan.json")
    update_golden(GOLDEN / "diff.md", text + "\n")
    hostile = replace(found.stages[0], what="a|b`<img src=x>\n# @all -->")
    text = diff_markdown(replace(found, stages=(hostile,)), "x --> <b>")
    assert "`a\\|b'<img src=x> # @all -->`" in text  # in code nothing is markup
    assert text.splitlines()[0] == "<!-- meshwright-plan-diff x_-___b_ -->"


def test_a_comment_is_short_enough_and_says_what_it_left_out():
    found = diff(OLD, checked(toy_plan(decisions=OTHER, shardings=())))
    many = tuple(replace(found.stages[0], what=f"layers.{i}.{'x' * 80}") for i in range(3000))
    text = diff_markdown(replace(found, stages=many, placements=many))
    assert 30_000 < len(text) < MOST_CHARACTERS
    assert text.count("`plan diff` lists them") == 2
    assert text.count("<details") == text.count("</details>")
