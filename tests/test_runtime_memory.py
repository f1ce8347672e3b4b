"""Recomputation, offload, compilation, optimizers and clipping on two real ranks."""

import functools
import math
from dataclasses import asdict, replace

import pytest
import runtime_cases_memory as cases
import torch
from tiny_models import costs_of, graph_of

from cost_models.decisions import Decisions, Workload
from cost_models.estimate import read_assignments
from cost_models.words import sharding_of
from ir import keep
from ir.errors import PlanError
from planner.plan import Plan
from planner.runtime.world import RankFailure
from planner.search import Searcher

ACTIVATIONS, OPTIMIZER = ("activations", "cpu"), ("optimizer", "cpu")
EXACT = 1e-5


def plan(name="llama", precision="fp32", optimizer="adamw", **decisions):
    """Two data ranks, two micro-batches of two samples each, ZeRO-3."""
    base = {
        "dp": 2, "zero": 3, "shard": 2, "micro_batch": 2, "microbatches": 2, "compile": False,
        "stages": (2,), "recompute": ((0, 0),),
    }  # fmt: skip
    workload = Workload(
        engine="native", global_batch=8, seq_len=32, precision=precision, optimizer=optimizer
    )
    return Plan(
        graph=graph_of(name, precision), graph_hash="", hardware="h100x2", hardware_hash="",
        constants_hash="", workload=workload, decisions=Decisions(**(base | decisions)),
    )  # fmt: skip


RECOMPUTE = {"none": ((0, 0),), "full": ((2, 0),), "selective": ((0, 2),)}


def exact(results):
    assert max(r["loss"] for r in results) < 1e-6
    assert max(r["grad"] for r in results) < EXACT


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recomputation_repeats_what_the_plan_says(world, kind):
    """A layer has 7 matmuls and one attention, the head one. Backward is twice the matmuls; full
    repeats all but the last, which only adds to its input; selective repeats none."""
    results = world.run(2, cases.step, plan(recompute=RECOMPUTE[kind]))
    exact(results)
    again = 2 * 6 if kind == "full" else 0
    for r in results:
        assert r["calls"]["mm"] == 2 * (3 * (2 * 7 + 1) + again)  # two micro-batches
        flash = "_scaled_dot_product_flash_attention_for_cpu"
        assert r["calls"][flash] == 2 * 2 * (2 if kind == "full" else 1)
        assert r["calls"][f"{flash}_backward"] == 2 * 2


@functools.cache
def megatron():
    """A large Llama's placements on tp with sequence parallelism, by class: a tiny one's own
    would split nothing."""
    costs = costs_of(
        graph_of("llama", "fp32", size="8b", n_layers=2), "h100x8", seq_len=8192, global_batch=8
    )
    laid = Searcher(costs=costs).assign(8, True)
    return tuple((unit.name, sharding_of(unit, a)) for (unit, _), a in laid.items())


def on_tp(**decisions):
    split = {"dp": 1, "tp": 2, "zero": 0, "shard": 1, "microbatches": 4, "sequence_parallel": True}
    return replace(plan(**(split | decisions)), shardings=megatron())


def collectives(calls):
    names = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
    return {name: calls[f"_c10d_functional::{name}"] for name in names}


def test_recomputation_on_tp_repeats_no_collective_in_part(world):
    """In part neither matmuls nor collectives; in full all but the last matmul of a layer and what
    sums it."""
    none, some, full = (
        world.run(2, cases.step, on_tp(recompute=RECOMPUTE[kind]))
        for kind in ("none", "selective", "full")
    )
    exact([*none, *some, *full])
    for a, b, c in zip(none, some, full):
        assert a["calls"]["mm"] == b["calls"]["mm"] == c["calls"]["mm"] - 4 * 2 * 6
        assert collectives(a["calls"]) == collectives(b["calls"])
        assert collectives(c["calls"]) == {
            # four micro-batches, two layers: both gathers of a layer, one of its two sums
            "all_gather_into_tensor": collectives(a["calls"])["all_gather_into_tensor"] + 4 * 2 * 2,
            "reduce_scatter_tensor": collectives(a["calls"])["reduce_scatter_tensor"] + 4 * 2,
            "all_reduce": collectives(a["calls"])["all_reduce"],
        }


@pytest.mark.parametrize("kind, backend", [("full", "aot_eager"), ("selective", "inductor")])
def test_contracts_compile(world, kind, backend):
    """Tensor parallelism, recomputation, offload and a compiler, one graph a class; a checkpoint
    around one runs it again outside the model's forward, which makes another."""
    offload = (ACTIVATIONS,) if kind == "full" else ()
    made = on_tp(compile=True, recompute=RECOMPUTE[kind], offload=offload)
    results = world.run(2, cases.compiled, made, backend)
    exact([r for r, _ in results])
    assert all(r["uncompiled"] == {} for r, _ in results)
    assert {graphs for _, graphs in results} == {5 if kind == "full" else 4}


def layer_class(made):
    path = made.graph.layers[0]
    return next(unit for _, at, unit in made.graph.calls() if at == path)


def bytes_of(made, names):
    d, w = made.decisions, made.workload
    values = layer_class(made).values
    return sum(values[r].nbytes(d.micro_batch, w.seq_len) for r in names)


def test_what_is_kept_is_what_the_graph_keeps(world):
    """To the byte: the unit's input under full recomputation, the graph's set in part."""
    full, some = (plan(recompute=RECOMPUTE[k]) for k in ("full", "selective"))
    unit = layer_class(full)
    assert set(world.run(2, cases.kept, full)) == {bytes_of(full, unit.diff_inputs)}
    assert set(world.run(2, cases.kept, some)) == {bytes_of(some, unit.saved_selective)}


KEPT = ((), ("attention/attention", "feed_forward.w1"))


def in_part(kept, make=plan, **decisions):
    """Both layers computed again in part, of each only these operations kept."""
    made = make(recompute=RECOMPUTE["selective"], **decisions)
    return replace(made, decisions=replace(made.decisions, keep=((layer_class(made).name, kept),)))


@pytest.mark.parametrize("kept", KEPT)
def test_operations_are_kept_one_by_one(world, kept):
    """To the byte: the input and their results; the others are repeated, but the last matmul."""
    made = in_part(kept)
    results = world.run(2, cases.step, made)
    exact(results)
    unit = layer_class(made)
    again = [n.op for n in keep.repeated(unit, kept)]
    for r in results:
        assert r["calls"]["mm"] == 2 * (3 * (2 * 7 + 1) + 2 * again.count("linear"))
        flash = "_scaled_dot_product_flash_attention_for_cpu"
        assert r["calls"][flash] == 2 * 2 * (1 + again.count("attention"))
    ones = [r for n in keep.keepable(unit) if keep.word(n, unit) in kept for r in n.refs()]
    assert set(world.run(2, cases.kept, made)) == {bytes_of(made, [*unit.diff_inputs, *ones])}


def planned_bytes(made):
    """What the cost model has a layer keep, of a micro-batch on one rank."""
    d, w = made.decisions, made.workload
    costs = costs_of(made.graph, "h100x2", ((d.micro_batch, 1),), **asdict(w))
    step = costs.step(d, read_assignments(costs, d, made.sharding_by_unit))
    return step.row(costs.chain.layers[0]).kept[1]


@pytest.mark.parametrize("kept", KEPT)
def test_operations_are_kept_one_by_one_on_tp(world, kept):
    """No collective is repeated: both gathered inputs and the reduced sum are kept. The layer that
    is measured is given its input whole, where a rank of the model has half."""
    made = in_part(kept, on_tp)
    exact(world.run(2, cases.step, made))
    half = bytes_of(made, layer_class(made).diff_inputs) // 2
    assert set(world.run(2, cases.kept, made)) == {planned_bytes(made) + half}


def test_operations_are_kept_one_by_one_in_a_compiled_layer(world):
    """The same bytes, the same numbers, one graph a class."""
    made = in_part(KEPT[1], compile=True)
    results = world.run(2, cases.compiled, made, "aot_eager")
    exact([r for r, _ in results])
    assert all(r["uncompiled"] == {} for r, _ in results) and {n for _, n in results} == {4}
    options = {"compile_backend": "aot_eager"}
    assert set(world.run(2, cases.kept, made, options)) == {planned_bytes(made)}


@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("compiled", [False, True])
def test_offloaded_activations(world, kind, compiled):
    """The same numbers; nothing that a layer keeps is left above but what is below a kilobyte."""
    made = plan(recompute=RECOMPUTE[kind], offload=(ACTIVATIONS,), compile=compiled)
    options = {"compile_backend": "aot_eager"} if compiled else {}
    exact(world.run(2, cases.step, made, options))
    for above, below in world.run(2, cases.moved, made, options):
        assert above < 1024
        kept = bytes_of(made, layer_class(made).diff_inputs)
        # two layers, two micro-batches; without recomputation there is more than their inputs
        if kind == "none":
            assert below > 8 * kept
        else:  # a compiler keeps some small things beside them
            assert 4 * kept <= below < (6 if compiled else 4) * kept + 1


@pytest.mark.parametrize("compiled", [False, True])
def test_offloaded_activations_of_some_layers(world, compiled):
    """The same numbers; one of two layers sends half of what both do, and keeps nothing above."""
    options = {"compile_backend": "aot_eager"} if compiled else {}
    one = (("activations", "cpu:1"),)
    if compiled:  # the first layer recomputed, the second below
        both = plan(offload=one, recompute=((1, 0),), compile=True)
        exact(world.run(2, cases.step, both, options))
        return
    exact(world.run(2, cases.step, plan(offload=one)))
    sent = []
    for offload in ((ACTIVATIONS,), one):
        moved = world.run(2, cases.moved, plan(offload=offload), {})
        assert all(above < 1024 for above, _ in moved)
        sent.append([below for _, below in moved])
    assert [2 * below for below in sent[1]] == sent[0]


@pytest.mark.parametrize(
    "decisions",
    [
        {"zero": 1, "offload": (OPTIMIZER,)},
        {"zero": 0, "shard": 1, "offload": (OPTIMIZER,)},
        {"reshard": True, "offload": (OPTIMIZER, ("params", "cpu"))},
        {"offload": (OPTIMIZER, ("params", "cpu"), ACTIVATIONS), "recompute": ((1, 0),)},
    ],
)
def test_offloaded_state(world, decisions):
    exact(world.run(2, cases.step, plan(**decisions)))


@pytest.mark.parametrize("decisions", [
    {"zero": 1, "offload": (("optimizer", "cpu:1"),)},
    {"reshard": True, "offload": (("optimizer", "cpu:1"), ("params", "cpu"))},
])  # fmt: skip
def test_offloaded_state_of_some_layers(world, decisions):
    """One of two layers: three steps of AdamW give the model's own weights, and that layer alone
    is updated on the host."""
    made = plan(**decisions)
    expected = cases.alone_trained(made, lambda p: [torch.optim.AdamW(p.values(), **ADAM)])
    for found, hosted in world.run(2, cases.trained_below, made, ADAM):
        close(found, expected)
        assert hosted == ["layers.0"]


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_compiled_layers_share_a_graph(world, kind):
    """One graph for the embedding, one for both layers, one for the norm, one for the head."""
    made = plan(recompute=RECOMPUTE[kind], compile=True)
    results = world.run(2, cases.compiled, made, "aot_eager")
    exact([r for r, _ in results])
    assert all(r["uncompiled"] == {} for r, _ in results)
    assert {graphs for _, graphs in results} == {4}


def test_what_does_not_compile_says_so(world):
    """It runs as it is, once, with a warning and in the report."""
    results = world.run(2, cases.compiled, plan(compile=True), cases.no_backend)
    exact([r for r, _ in results])
    for r, _ in results:
        assert len(r["uncompiled"]) == 4
        assert len([text for text in r["said"] if "runs uncompiled, against the plan" in text]) == 4


def test_unknown_compilers_are_named(world):
    with pytest.raises(RankFailure, match="unknown compile_backend 'inducktor'"):
        world.run(2, cases.compiled, plan(compile=True), "inducktor")


def close(found, expected, limit=2e-6):
    for name, value in expected.items():
        assert (found[name] - value).norm() <= limit * value.norm(), name


ADAM = {"lr": 1e-2, "eps": 1e-3}


@pytest.mark.parametrize(
    "decisions",
    [{}, {"zero": 1, "offload": (OPTIMIZER,)}, {"offload": (OPTIMIZER, ("params", "cpu"))}],
)
def test_adamw_is_the_model_s_alone(world, decisions):
    made = plan(**decisions)
    expected = cases.alone_trained(made, lambda p: [torch.optim.AdamW(p.values(), **ADAM)])
    results = world.run(2, cases.trained, made, None, None, 3, ADAM)
    for found, _, _ in results:
        close(found, expected)


def test_state_on_disk_is_bit_for_bit_and_leaves_no_file(world, tmp_path):
    """AdamW's moments in files: three steps give the same bits as in memory."""
    memory = plan(zero=1, offload=(OPTIMIZER,))
    disk = plan(zero=1, offload=(("optimizer", "nvme"),))
    kept = world.run(2, cases.trained, memory, None, None, 3)
    filed = world.run(2, cases.trained, disk, None, str(tmp_path), 3)
    for (expected, _, _), (found, left, (mapped, states)) in zip(kept, filed):
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        assert left == []
        # of the two moments, those of a page or more: the matrices' (the smallest has 32 x 64 / 2)
        assert 0 < mapped < states


def test_state_of_some_layers_on_disk(world, tmp_path):
    """One of two layers: AdamW's two moments of each of its parameters are in files, the same bits
    come out."""
    memory = plan(zero=1, offload=(("optimizer", "cpu:1"),))
    disk = plan(zero=1, offload=(("optimizer", "nvme:1"),))
    kept = world.run(2, cases.trained, memory, None, None, 3)
    filed = world.run(2, cases.trained, disk, None, str(tmp_path), 3)
    whole = world.run(
        2, cases.trained, plan(zero=1, offload=(("optimizer", "nvme"),)), None, str(tmp_path), 3
    )
    for (expected, _, _), (found, left, (some, _)), (_, _, (every, _)) in zip(kept, filed, whole):
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        large = [n for n, p in expected.items() if p.numel() * 4 // 2 >= 4096]
        mine = [n for n in large if n.startswith("layers.0.")]
        assert left == [] and (some, every) == (2 * len(mine), 2 * len(large)) and mine


def test_state_on_disk_is_loaded_to_disk(world, tmp_path):
    disk = plan(zero=1, offload=(("optimizer", "nvme"),))
    expected = cases.alone_trained(disk, lambda p: [torch.optim.AdamW(p.values(), **ADAM)])
    for found, mapped in world.run(2, cases.resumed, disk, str(tmp_path)):
        close(found, expected)
        assert mapped


@pytest.mark.parametrize("held", ["gathered", "kept"])
def test_parameters_and_activations_in_files_are_bit_for_bit(world, tmp_path, held):
    """FSDP2's fp32 shards, and what layers keep, in files: three steps give the same bits as in
    memory, and no name is left in the folder."""
    what = {"gathered": ("params", "optimizer"), "kept": ("activations",)}[held]
    words = [(w, "cpu") for w in ("optimizer", "params", "activations") if w in what]
    memory = plan(offload=tuple(words))
    disk = plan(offload=tuple((w, "cpu" if w == "optimizer" else "cxl") for w, _ in words))
    kept = world.run(2, cases.in_files, memory, None)
    filed = world.run(2, cases.in_files, disk, str(tmp_path))
    for (expected, none, before), (found, left, mapped) in zip(kept, filed):
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        assert left == none == [] and before == 0
        assert mapped == (len(expected) if held == "gathered" else mapped) and mapped > 0
    with pytest.raises(RankFailure, match="no folder is given"):
        world.run(2, cases.in_files, disk, None)


def test_a_disk_needs_a_folder(world, tmp_path):
    disk = plan(zero=1, offload=(("optimizer", "nvme"),))
    for folder, words in ((None, "no folder is given"), (str(tmp_path / "gone"), "is no folder")):
        with pytest.raises(RankFailure, match=words) as fault:
            world.run(2, cases.trained, disk, None, folder)
        assert isinstance(fault.value.fault, PlanError)


def test_a_full_disk_is_an_error_before_it_is_written(tmp_path):
    """The room is taken before the file is mapped; what has none would end the process."""
    from planner.runtime.nvme import map_file

    with pytest.raises(PlanError, match="does not fit"):
        map_file(tmp_path, 1 << 60, torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_adafactor_sees_whole_matrices(world):
    made = plan(optimizer="adafactor")
    expected = cases.alone_trained(made, lambda p: [torch.optim.Adafactor(p.values(), lr=1e-2)])
    for found, _, _ in world.run(2, cases.trained, made, None, None, 3, {"lr": 1e-2}):
        close(found, expected, 1e-5)


def test_muon_sees_whole_matrices_of_layers(world):
    """torch's Muon on layers' matrices, AdamW on the rest; bf16 iterations agree to bf16."""
    made = plan(optimizer="muon")

    def build(named):
        matrices = [p for n, p in named.items() if n.startswith("layers.") and p.dim() == 2]
        others = [p for n, p in named.items() if not n.startswith("layers.") or p.dim() < 2]
        return [
            torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1),
            torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1, eps=1e-3),
        ]

    expected = cases.alone_trained(made, build)
    for found, _, _ in world.run(2, cases.trained, made, None, None, 3, ADAM):
        close(found, expected, 2e-3)


def test_sgd_and_optimizers_of_the_user(world):
    made = plan(optimizer="sgd")
    expected = cases.alone_trained(
        made, lambda p: [torch.optim.SGD(p.values(), lr=1e-2, momentum=0.9)]
    )
    for kind, more in ((None, {}), (torch.optim.SGD, {"momentum": 0.9})):
        for found, _, _ in world.run(2, cases.trained, made, kind, None, 3, {"lr": 1e-2, **more}):
            close(found, expected)


def test_unknown_optimizers_are_named(world):
    with pytest.raises(RankFailure, match="unknown optimizer 'adam8'"):
        world.run(2, cases.trained, plan(), "adam8")


LAYOUTS = {
    "dp": ("llama", {}),
    "replicas": ("llama", {"zero": 0, "shard": 1}),
    "tied": ("gpt", {}),
    "experts": ("moe", {"ep": 2}),
    "pipeline": ("llama", {"pp": 2, "dp": 1, "zero": 0, "shard": 1, "microbatches": 4,
                           "stages": (1, 1), "recompute": ((0, 0),) * 2}),
    "tied across stages": ("gpt", {"pp": 2, "dp": 1, "zero": 0, "shard": 1, "microbatches": 4,
                                   "stages": (1, 1), "recompute": ((0, 0),) * 2}),
    "on the host": ("llama", {"zero": 1, "offload": (OPTIMIZER,)}),
}  # fmt: skip


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clipping_is_by_the_whole_model_s_norm(world, layout, norm_type):
    """Each tensor once, however it lies, and the same number on every rank."""
    name, decisions = LAYOUTS[layout]
    results = world.run(2, cases.clipped, plan(name, **decisions), name, 1e-2, norm_type)
    assert len({mine for mine, _, _ in results}) == 1
    for mine, theirs, error in results:
        assert mine == pytest.approx(theirs, rel=1e-5)
        assert error < EXACT


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_norm_that_is_no_number_is_told(world, poison, norm_type):
    for text, norm in world.run(2, cases.clipped, plan(), "llama", 1.0, norm_type, poison):
        assert text == f"the norm of the gradients is {poison}"
        assert math.isnan(norm) if math.isnan(poison) else math.isinf(norm)
