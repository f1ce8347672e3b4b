"""Pipelines on local ranks: every schedule, cut and data parallelism against the whole model."""

from dataclasses import replace
from functools import cache

import pytest
import runtime_cases_pipeline as cases
import torch

from cost_models.chain import chain_of
from planner import trace
from planner.cuts import crossings, first_links, stub_fault
from planner.runtime.tied import shared_parameters
from planner.runtime.world import PRELOAD, PRELOAD_COMPILED, PRELOAD_HF, RankFailure

EXACT = {"loss": 1e-6, "norm": 1e-6, "gradient": 1e-5, "parameter": 1e-5}


def inputs(batch, seq_len):
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}


@cache
def base(name, *axes):
    """A plan of the model on two stages of its own making."""
    model, loss = cases.example(name)
    return trace(
        model, inputs, loss=loss, hardware="h100x4" if axes else "h100x2", seq_len=16,
        global_batch=8, precision="fp32", engine="native",
        fix=("pp=2", *(axes or ("tp=1", "cp=1")), "micro_batch=2", "recompute=none",
             "schedule=1f1b"),
    )  # fmt: skip


def planned(name, stages, axes=(), **decided):
    """The plan with other decisions; `stages` are layers per global stage."""
    plan = base(name, *axes)
    d = replace(plan.decisions, stages=stages, recompute=((0, 0),) * len(stages), offload=(),
                **decided)  # fmt: skip
    samples = d.dp * d.micro_batch * d.microbatches
    return replace(plan, decisions=d, workload=replace(plan.workload, global_batch=samples))


def run(world, ranks, named):
    found = world.run(ranks, cases.compare, [(name, plan) for name, plan in named])
    for rank, results in enumerate(found):
        for (name, plan), result in zip(named, results):
            for key, allowed in EXACT.items():
                assert result[key] <= allowed, (name, plan.decisions, rank, key, result[key])
    return found


FOUR = (1, 1, 1, 1)
V = {"virtual_stages": 2}


def test_every_schedule_gives_the_gradients_of_the_whole_model(world):
    run(world, 2, [
        ("llama", planned("llama", (2, 2), schedule="gpipe")),
        ("llama", planned("llama", (2, 2))),
        ("llama", planned("llama", (2, 2), schedule="zbh1")),
        ("llama", planned("llama", FOUR, schedule="interleaved", **V)),
        ("llama", planned("llama", FOUR, schedule="zbv", **V)),
        ("llama", planned("llama", FOUR, schedule="dualpipev", **V)),
    ])  # fmt: skip


def test_split_backward_adds_up_low_precision_gradients_in_high(world):
    cut = {"stages": FOUR, "schedule": "zbv", **V}
    plan = planned("llama", dp=2, zero=2, shard=2, micro_batch=1, **cut)
    plan = replace(plan, workload=replace(plan.workload, precision="bf16"))
    for (result,) in world.run(4, cases.compare, [("llama", plan)]):
        assert result["loss"] < 1e-2 and result["norm"] < 1e-2 and result["gradient"] < 5e-2


def test_four_stages_and_uneven_ones(world):
    run(world, 4, [
        ("llama", planned("llama", FOUR, pp=4)),
        ("llama", planned("llama", FOUR, pp=4, schedule="zbh1", microbatches=5)),
    ])  # fmt: skip
    run(world, 2, [
        ("llama", planned("llama", (3, 1))),
        ("llama", planned("llama", (1, 1, 1, 1), schedule="interleaved", virtual_stages=2)),
        ("llama", planned("llama", (1, 3), schedule="gpipe", microbatches=3)),
    ])  # fmt: skip


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_stages_reduce_over_data_ranks_under_every_zero(world, schedule):
    cut = {"stages": (2, 2)} if schedule == "1f1b" else {"stages": FOUR, **V}
    run(world, 4, [
        ("llama", planned("llama", dp=2, zero=zero, shard=1 if zero == 0 else 2, micro_batch=1,
                          schedule=schedule, **cut))
        for zero in (0, 1, 2, 3)
    ])  # fmt: skip


def test_tied_weights_are_summed_over_their_stages_and_stay_equal(world):
    plans = [
        ("gpt", planned("gpt", (2, 2))),
        ("gpt", planned("gpt", FOUR, schedule="zbv", **V)),  # both copies on one rank
        ("glue", planned("glue", (1, 3))),  # and a parameter that every stage's glue reads
        ("glue", planned("glue", FOUR, schedule="interleaved", **V)),
    ]
    first, last = run(world, 2, plans)
    assert "wte.weight" in first[0]["names"] and "lm_head.weight" not in first[0]["names"]
    assert "lm_head.weight" in last[0]["names"] and "wte.weight" not in last[0]["names"]
    assert first[1]["duplicates"] == 1 and last[1]["duplicates"] == 0
    for place in (0, 2):
        assert first[place]["duplicates"] == 0
        assert last[place]["duplicates"] == len(last[place]["shared"])
        assert first[place]["shared"] and first[place]["shared"] == last[place]["shared"]
    data = [("gpt", planned("gpt", (2, 2), dp=2, zero=3, shard=2, micro_batch=1))]
    ranks = run(world, 4, data)
    assert ranks[0][0]["shared"] == ranks[3][0]["shared"]


def test_copies_that_begin_apart_are_aligned(world):
    (first,), (last,) = world.run(2, cases.differing_copies, planned("gpt", (2, 2)))
    assert first == last


def test_units_that_return_several_values_and_glue_between_units(world):
    run(world, 2, [
        ("moe", planned("moe", (2, 2))),
        ("moe", planned("moe", FOUR, schedule="zbv", **V)),
        ("outside", planned("outside", (3, 3))),
        ("outside", planned("outside", (1, 2, 2, 1), schedule="zbv", **V)),
        ("hf", planned("hf", (1, 3))),
        ("hf", planned("hf", FOUR, schedule="interleaved", **V)),
    ])  # fmt: skip


def test_what_crosses_is_split_over_tensor_and_context_ranks(world):
    split = ("tp=2", "cp=1", "sequence_parallel=on")
    run(world, 4, [
        ("llama", planned("llama", (2, 2), split)),
        ("gpt", planned("gpt", FOUR, split, schedule="zbv", **V)),
        ("outside", planned("outside", (3, 3), ("tp=2", "cp=1", "sequence_parallel=off"))),
        ("llama", planned("llama", (3, 1), cp=2, cp_kind="ring")),
    ])  # fmt: skip


def test_the_stages_that_wait_for_a_lost_rank_say_so(world, tmp_path):
    with pytest.raises(RankFailure, match="died by exit code 1"):
        world.run(2, cases.lose_a_rank, planned("llama", (2, 2)), str(tmp_path / "heard"),
                  timeout_s=20)  # fmt: skip
    assert "stage 0 cannot go on" in (tmp_path / "heard").read_text()


def test_a_rank_that_crashes_says_where(world):
    with pytest.raises(RankFailure, match="died by SIGSEGV") as fault:
        world.run(1, cases.crash)
    assert "in crash" in fault.value.traceback


def test_workers_are_forked_with_what_they_import(world):
    """multiprocessing leaves out, and does not say, a module that it cannot import."""
    assert world.run(1, cases.not_loaded, (*PRELOAD, *PRELOAD_HF, *PRELOAD_COMPILED)) == [[]]


def test_a_world_stays_for_the_next_call_of_its_size(world):
    """With its meshes, of which each has groups; another size is another world."""
    two, four = planned("llama", (2, 2)), planned("llama", (2, 2), ("tp=2", "cp=1"))
    first, again, other, back = (
        world.run(plan.decisions.gpus, cases.world_of, plan) for plan in (two, two, four, two)
    )
    assert first == again == back
    assert [row[0] for row in other[:2]] == [row[0] for row in first]  # the same processes
    assert [row[1] for row in first] == [1, 1]
    assert [row[1] for row in other] == [0 + 2, 1 + 3, 0 + 2, 1 + 3]  # tp innermost


def test_another_sequence_length_than_planned_is_refused(world):
    with pytest.raises(RankFailure, match="where the plan has"):
        world.run(2, cases.with_batch_of, planned("llama", (2, 2)), 12, timeout_s=20)


def test_what_crosses_a_cut_is_known_from_the_graph():
    graph = base("moe").graph
    (hidden, auxiliary) = crossings(graph, first_links(graph, (2, 2))[1])
    assert [len(x.tensor.shape) for x in (hidden, auxiliary)] == [3, 1]
    assert (hidden.result, auxiliary.result) == (0, 1)
    outside = base("outside").graph
    (only,) = crossings(outside, first_links(outside, (3, 3))[1])
    assert only.result is None and only.learns  # top-level operations made it


def test_shared_parameters_are_those_that_stages_have_in_common():
    (tie,) = shared_parameters(base("gpt").graph, (2, 2))
    assert tie.copies == ((0, "wte.weight"), (1, "lm_head.weight"))
    found = {s.copies[0][1]: [stage for stage, _ in s.copies]
             for s in shared_parameters(base("glue").graph, (1, 1, 2))}  # fmt: skip
    assert found == {"embed.weight": [0, 2], "gate": [0, 1, 2]}
    assert shared_parameters(base("llama").graph, (2, 2)) == ()


def test_models_that_stubs_cannot_cut_are_told_from_those_they_can():
    for name in ("llama", "moe", "gpt", "outside", "glue", "hf"):
        assert stub_fault(base(name).graph) is None
    graph = base("llama").graph
    calls = [n for n in graph.root.nodes if n.op == "call"]
    # the caller reads an early layer's result, which no later layer is given
    early = replace(graph, root=replace(graph.root, outputs=(*graph.root.outputs, calls[1].name)))
    assert "is not given it" in stub_fault(early)
    odd = tuple(
        replace(n, attrs=(*n.attrs[:1], ("returns", "?Output"), *n.attrs[1:])) if n.op == "call"
        else n for n in graph.root.nodes
    )  # fmt: skip
    assert "Output" in stub_fault(replace(graph, root=replace(graph.root, nodes=odd)))
    assert len(chain_of(graph).layers) == 4
