"""Stacks of experts that a forward multiplies with all tokens, to engines that route."""

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from toy_plan import toy_plan

from cost_models.assumptions import assumptions_of
from cost_models.chain import chain_of
from cost_models.decisions import Decisions, Workload
from cost_models.engines import engine_names, load_engine
from cost_models.forward import forward_of
from cost_models.hardware import load_hardware
from cost_models.layout import expert_parameters
from cost_models.step import Costs, replicated
from ir.check import check_graph
from ir.count import model_flop, saved_bytes
from ir.errors import PlanError
from ir.stacks import as_written, routed, stacks
from ir.text import format_graph, parse_graph
from planner.export import export
from planner.mesh import facts_of
from planner.plan import load

HIDDEN, INTER, EXPERTS, LAYERS = 256, 128, 8, 4
CONFIG = {
    "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 8, "vocab_size": 1024, "head_dim": 32,
    "max_position_embeddings": 4096, "num_key_value_heads": 2, "intermediate_size": INTER,
    "intermediate_size_mlp": 512, "num_local_experts": EXPERTS, "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
}  # fmt: skip
ROUTED_LAYERS = LAYERS // 2
# What Meta published of its models' text parts; 48 layers, of which a period is traced.
PUBLISHED = {
    "hidden_size": 5120, "num_hidden_layers": 4, "num_attention_heads": 40, "head_dim": 128,
    "num_key_value_heads": 8, "vocab_size": 202048, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "max_position_embeddings": 131072,
}  # fmt: skip


@functools.cache
def graph_of(**changed):
    from ir.capture import capture_graph
    from ir.capture.load import load as load_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**CONFIG, **changed}))
        return capture_graph(load_model(str(path), {}), precision="bf16", fold=True)


def routed_unit(graph):
    return next(u for u in graph.units if any(n.op == "grouped_matmul" for n in u.nodes))


# --- the graph --------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_are_multiplied_by_their_own_experts_alone(top_k):
    graph = graph_of(num_experts_per_tok=top_k)
    found = routed(graph)
    check_graph(found)
    tokens = 3 * 64
    an_expert = 3 * 2 * HIDDEN * INTER
    more = model_flop(graph, 3, 64) - model_flop(found, 3, 64)
    assert more == ROUTED_LAYERS * (EXPERTS - top_k) * tokens * an_expert
    unit = routed_unit(found)
    flop = sum(
        2 * unit.values[n.inputs[0]].numel(3, 64) * unit.values[n.name].sizes(3, 64)[-1]
        for n in unit.nodes if n.op == "grouped_matmul"
    )  # fmt: skip
    assert flop == tokens * top_k * an_expert
    ops = [n.op for n in unit.nodes]
    assert [ops.count(op) for op in ("dispatch", "grouped_matmul", "combine", "matmul")] == [
        1, 2, 1, 0,
    ]  # fmt: skip
    wide = EXPERTS * 3 * 64 * HIDDEN  # no value has every token for every expert
    assert all(t.numel(3, 64) < wide for n in unit.nodes for t in n.outputs)


def test_parameters_and_the_file_stay_as_they_are(tmp_path):
    graph = graph_of()
    found = routed(graph)
    assert found.parameters == graph.parameters and found.tied == graph.tied
    assert as_written(found) is graph and routed(found) is found
    assert graph.written is None and routed(graph) is found
    text = format_graph(found)
    again = parse_graph(text)
    check_graph(again)
    assert format_graph(again) == text != format_graph(graph)
    both = {expert_parameters(u) for u in found.units} - {frozenset()}
    assert both == {frozenset({"feed_forward.experts.gate_up_proj",
                               "feed_forward.experts.down_proj"})}  # fmt: skip


@pytest.mark.parametrize("top_k", [1, 2])
def test_what_backward_keeps_is_a_tokens_own_rows(top_k):
    """A row: copied, weighed, its gate and up, silu of gate, and that times up."""
    graph = graph_of(num_experts_per_tok=top_k)
    unit = routed_unit(routed(graph))
    mine = [unit.values[r] for r in unit.saved
            if r.startswith("feed_forward") and "shared" not in r]  # fmt: skip
    wide = sum(t.nbytes(1, 64) for t in mine if t.shape[-1].at(1, 1) >= INTER)
    assert wide == 2 * 64 * top_k * (2 * HIDDEN + 4 * INTER)
    before = graph.unit_by_name[unit.name]
    # as it is written, all experts keep as much of each token
    more = saved_bytes(before, 1, 64) - saved_bytes(unit, 1, 64)
    rows = 64 * (EXPERTS - top_k)
    assert more == pytest.approx(2 * rows * (2 * HIDDEN + 4 * INTER), rel=0.02)


def test_what_is_not_read_stays_as_it_is_written():
    """Scores that no choice of experts made, copies that are added to: all tokens, all experts."""
    graph = graph_of()
    for unit in (u for u in graph.units if stacks(u)):
        choosing = next(n for n in unit.nodes if n.op == "scatter")
        weighing = next(n for n in unit.nodes if n.op == "mul"
                        and unit.producers.get(n.inputs[0], n).op == "repeat")  # fmt: skip
        for node, other in ((choosing, replace(choosing, op="where")),
                            (weighing, replace(weighing, op="add"))):  # fmt: skip
            changed = replace(unit, nodes=tuple(other if n is node else n for n in unit.nodes))
            units = tuple(changed if u is unit else u for u in graph.units)
            tried = replace(graph, units=units)
            assert routed(tried).unit_by_name[unit.name].nodes == changed.nodes
    assert not any(stacks(u) for u in routed(graph).units)


def test_the_choice_is_that_of_the_scores():
    """Another choice among as many, which no scores are of, is left as it is."""
    graph = graph_of()
    unit = next(u for u in graph.units if stacks(u))
    at = next(i for i, n in enumerate(unit.nodes) if n.op == "topk")
    before = replace(unit.nodes[at], name="feed_forward.router/before")
    changed = replace(unit, nodes=(*unit.nodes[:at], before, *unit.nodes[at:]))
    tried = replace(graph, units=tuple(changed if u is unit else u for u in graph.units))
    found = routed(tried).unit_by_name[unit.name]
    dispatch = next(n for n in found.nodes if n.op == "dispatch")
    assert dispatch.inputs[1] == f"{unit.nodes[at].name}:1"


def test_models_of_other_experts_are_not_touched():
    from tiny_models import graph_of as example

    for name in ("moe", "llama"):
        assert routed(example(name)) is example(name)


@pytest.mark.parametrize("experts, step, total_billion", [(16, 1, 107.77), (128, 2, 400.71)])
def test_published_sizes(experts, step, total_billion):
    """Scout and Maverick: the parameters that Meta names, and FLOPs of the 17 B of a token."""
    graph = graph_of(**PUBLISHED, num_local_experts=experts, interleave_moe_layer_step=step)
    found = routed(graph)
    h, f, wide, vocab = 5120, 8192, 16384, 202048
    attention = h * 128 * (40 + 2 * 8) + 40 * 128 * h
    dense = (48 - 48 // step) * 3 * h * wide
    of_layers = 48 // step * (experts * 3 * h * f + 3 * h * f + experts * h)
    norms = 48 * 2 * h + h
    total = 48 * attention + dense + of_layers + norms + 2 * vocab * h
    outside = 2 * vocab * h + h  # embedding, head, last norm: once
    assert 12 * (found.parameter_count - outside) + outside == total
    assert total == pytest.approx(total_billion * 1e9, rel=1e-4)
    active = 48 * attention + dense + 48 // step * (2 * 3 * h * f + experts * h)
    # matmuls of one token of a sequence of 1, without attention's: 2 * 2 * d * heads
    head = 2 * vocab * h
    a_token = 12 * (model_flop(found, 1, 1) - head)
    assert a_token == pytest.approx(2 * active + 48 * 4 * 40 * 128, rel=1e-9)
    assert active == pytest.approx(17e9, rel=0.12)


# --- costs ------------------------------------------------------------------------------------


def costs_of(engine, **workload):
    work = Workload(engine=engine, global_batch=16, seq_len=2048, **workload)
    return Costs(graph=forward_of(graph_of(), engine), cluster=load_hardware("h100x16"),
                 workload=work)  # fmt: skip


def unit_costs(costs, **axes):
    unit = next(k for k, is_layer, _ in costs.kinds
                if is_layer and any("router" in p.name for p in k.parameters))  # fmt: skip
    return costs.unit(unit, True, replicated(unit, 1), Decisions(dp=16, **axes))


@pytest.mark.parametrize("ep, etp", [(1, 1), (8, 1), (4, 2)])
def test_an_engine_that_routes_is_costed_as_of_experts(ep, etp):
    costs = costs_of("torchtitan")
    alone, experts, *_ = unit_costs(costs, ep=ep, etp=etp)
    rows = 2048
    # balanced: as many rows come to a rank's experts as leave it; etp gathers and splits them
    assert float(experts.flop[0][0]) == rows * 3 * 2 * HIDDEN * INTER
    assert float(experts.flop[1][0]) == 2 * rows * 3 * 2 * HIDDEN * INTER
    sent = {(t.kind, t.axis): float(t.size_bytes[0]) for t in experts.traffic}
    exchanged = rows * HIDDEN * 2
    expected = {("all_to_all", "ep"): exchanged} if ep > 1 else {}
    if etp > 1:
        expected |= {("all_gather", "etp"): etp * exchanged,
                     ("reduce_scatter", "etp"): etp * exchanged}  # fmt: skip
    assert sent == expected
    written = sum(float(c.flop[0][0]) for c in unit_costs(costs_of("native-compiled")))
    ours = sum(float(c.flop[0][0]) for c in (alone, experts))
    assert written - ours == (EXPERTS - 1) * rows * 3 * 2 * HIDDEN * INTER


def test_expert_parameters_lie_over_ep():
    """State of the rank: a share of the experts, and all that is no expert."""
    costs = costs_of("megatron")
    unit = routed_unit(costs.graph)
    stack = EXPERTS * 3 * HIDDEN * INTER
    rest = unit.parameter_count - stack
    for ep in (1, 2, 8):
        d = Decisions(dp=16, ep=ep, zero=0, shard=16, micro_batch=1, microbatches=1)
        assignments = {(u, layer): replicated(u, 1) for u, layer, _ in costs.kinds}
        step = costs.step(d, assignments)
        row = next(r for r, (u, _, _) in zip(step.rows, costs.kinds) if u is unit)
        assert row.state.parameter_bytes == 2 * (rest + stack // ep)


def test_the_user_is_told_which_forward_is_costed():
    told = assumptions_of(costs_of("megatron"), Decisions(dp=16))
    assert told[0] == (
        "experts: the model's forward multiplies every token with all 8 experts; megatron with its"
        " own 1 alone (Megatron-LM MoELayer: a token dispatcher, then grouped GEMMs)"
    )
    told = assumptions_of(costs_of("native"), Decisions(dp=16))
    assert told[0] == (
        "experts: the model's forward multiplies every token with all 8 experts, of which 1 of a"
        " token's own count, and is costed as it is written (the model's own forward is run)"
    )
    for name in engine_names():
        graph = forward_of(routed(graph_of()), name)
        assert (graph.written is not None) == load_engine(name).routes_experts
        assert as_written(graph) is graph_of()
    assert not load_engine("native-compiled").routes_experts


# --- plans ------------------------------------------------------------------------------------


@pytest.fixture
def planned(plan, tmp_path, no_baselines):
    """Trace CONFIG for an engine: the plan's file."""
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))

    def run(engine, *fix):
        path = f"{engine}.json"
        words = [word for pin in fix for word in ("--fix", pin)]
        code, _, err = plan(
            "trace", "model.json", "--hardware", "h100x8", "--engine", engine, "--seq-len", 1024,
            "--global-batch", 16, "-o", path, *words,
        )  # fmt: skip
        assert code == 0, err
        return path

    return run


def test_a_plan_of_an_engine_that_routes(planned, plan):
    """Its file holds the model as it is written; it is read, costed and checked as it was made."""
    ours = planned("megatron", "ep=4", "tp=1")
    theirs = planned("native", "tp=1")
    graphs = [Path(path).with_suffix(".graph").read_text() for path in (ours, theirs)]
    assert graphs[0] == graphs[1] and "grouped_matmul" not in graphs[0]
    read = load(ours)
    assert read.graph.written is not None and read.decisions.ep == 4
    assert load(theirs).graph.written is None
    assert facts_of(chain_of(read.graph)).experts == (EXPERTS,)
    again = read
    again.save("again.json")
    for end in ("json", "graph"):
        assert Path(f"again.{end}").read_text() == Path(f"megatron.{end}").read_text()
    again.save("inside.json", embed=True)
    assert load("inside.json") == read
    for words in (["check", ours, "--model", "model.json"], ["check", theirs],
                  ["check", "inside.json", "--model", "model.json"]):  # fmt: skip
        code, out, err = plan(*words)
        assert code == 0 and "not stale" in out, err
    code, out, err = plan("diff", theirs, ours, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert "engine" in str(told["inputs"]) and "model" not in str(told["inputs"])
    code, out, err = plan("why", ours, "--not", "ep=4", "--json")
    assert code == 0, err


def test_tensor_parallel_plans_are_read_back(planned, plan):
    """Placements of values that the written forward does not have."""
    path = planned("megatron", "tp=2", "ep=4", "etp=1", "sequence_parallel=on")
    assert load(path).shardings
    code, out, err = plan("check", path)
    assert code == 0 and "not stale" in out, err
    code, out, err = plan("why", path, "--layer", "model.layers.1")
    assert code == 0 and "feed_forward.experts.gate_up_proj" in out, out + err
    other = planned("native", "tp=2", "pp=1")
    for pair in ((path, other), (other, path)):
        code, out, err = plan("diff", *pair)
        assert code == 0 and "engine" in out, err


def test_runs_of_the_models_own_forward_refuse_it(planned, tmp_path):
    from planner.runnable import require_own_forward
    from planner.runtime.verify.twin import make_twins

    path = planned("torchtitan", "ep=4", "tp=1")
    read = load(path)
    for fails in (
        lambda: require_own_forward(read),
        lambda: make_twins(read, "model.json", {}, {}),
        lambda: export(read, "pytorch", path),
    ):
        with pytest.raises(PlanError) as caught:
            fails()
        assert "torchtitan, which routes tokens to experts" in caught.value.what
    alone = load(planned("torchtitan", "ep=1", "etp=1", "tp=1", "pp=1"))
    (twin,) = make_twins(alone, "model.json", {}, {})
    assert twin.plan.graph.written is None and any("routes them" in note for note in twin.notes)
    require_own_forward(toy_plan())


def test_exports_are_of_the_forward_that_the_target_runs(planned, plan):
    """DeepSpeed routes where AutoEP is on; Megatron-LM's flags of experts follow the model."""
    path = planned("native", "tp=1", "pp=1")
    read = load(path)
    ((_, text),) = export(read, "deepspeed", path).files
    assert json.loads(text)["expert_parallel"] == {
        "enabled": True, "autoep_size": 1, "expert_tensor_parallel_size": 1,
    }  # fmt: skip
    ((_, text),) = export(read, "megatron", path).files
    assert "--expert-model-parallel-size 1" in text
    Path("ds_config.json").write_text(
        export(load(planned("deepspeed", "tp=1", "pp=1", "ep=2")), "deepspeed", "x").files[0][1]
    )
    code, _, err = plan("import", "ds_config.json", "--from", "deepspeed", "--model",
                          "model.json", "--hardware", "h100x8", "-o", "back.json")  # fmt: skip
    assert code == 0, err
    assert load("back.json").graph.written is not None and load("back.json").decisions.ep == 2
