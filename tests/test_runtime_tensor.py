"""Tensor and sequence parallelism on local ranks, against the same model in one process."""

import json
from dataclasses import replace
from functools import cache

import pytest
import runtime_cases_tensor as cases
import torch

from cost_models.sharding import Edge, Sharding
from planner import trace
from planner.decisions import parse_pins
from planner.objectives import run
from planner.options import TraceOptions
from planner.workload import Asked

# Megatron-LM's layout (arXiv:2205.05198): columns, rows, and the sequence between them
UP, DOWN = ("S(1)", "R", "P", "S(1)"), ("P", "S(1)", "S(1)", "R")  # gather, reduce-scatter
COPY, SUM = ("R", "R", "P", "R"), ("P", "R", "R", "R")  # f and g of arXiv:1909.08053


def edges(**moves):
    return tuple(Edge(at=at, forward=m[:2], backward=m[2:]) for at, m in moves.items())


def named(parameters, moves):
    found = tuple(Edge(at=at, forward=m[:2], backward=m[2:]) for at, m in moves.items())
    return Sharding(parameters=tuple(parameters.items()), edges=found)


def vocabulary(sp):
    return (
        named({"weight": "S(0)"}, {"return[0]": DOWN if sp else SUM}),
        named({"weight": "S(0)"}, {"linear[0]": UP if sp else COPY}),
    )


def llama(sp, keys="S(0)"):
    columns = dict.fromkeys(
        ("attention.wq.weight", "feed_forward.w1.weight", "feed_forward.w3.weight"), "S(0)"
    )
    rows = dict.fromkeys(("attention.wo.weight", "feed_forward.w2.weight"), "S(1)")
    pair = dict.fromkeys(("attention.wk.weight", "attention.wv.weight"), keys)
    whole = dict.fromkeys(("attention_norm.weight", "ffn_norm.weight"), "R")
    moves = {
        "attention_norm:out": UP if sp else COPY, "attention:out": DOWN if sp else SUM,
        "ffn_norm:out": UP if sp else COPY, "feed_forward:out": DOWN if sp else SUM,
    }  # fmt: skip
    return named({**columns, **rows, **pair, **whole}, moves)


def gpt(sp):
    fused = {
        f"{m}.{kind}": "S(0)" for m in ("attn.c_attn", "mlp.c_fc") for kind in ("weight", "bias")
    }
    rows = {"attn.c_proj.weight": "S(1)", "mlp.c_proj.weight": "S(1)"}
    return named(
        {**fused, **rows},
        {"ln_1:out": UP if sp else COPY, "attn:out": DOWN if sp else SUM,
         "ln_2:out": UP if sp else COPY, "mlp:out": DOWN if sp else SUM},
    )  # fmt: skip


@cache
def base(name, model_args=()):
    module = cases.example(name)
    model = module.Llama(*model_args) if model_args else module.build(size="tiny")
    length, loss = ({}, None) if name == "dit" else ({"seq_len": 32}, module.loss)
    return trace(
        model, module.inputs, loss=loss, hardware="h100x1", global_batch=4, precision="fp32",
        engine="native", **length,
        fix=("tp=1", "pp=1", "cp=1", "recompute=none", "micro_batch=4"),
    )  # fmt: skip


def plan_of(name, shardings, tp, sp, model_args=(), **decided):
    plan = base(name, model_args)
    d = replace(
        plan.decisions, tp=tp, sequence_parallel=sp, offload=(),
        **{"compile": False, "dp": 1, "zero": 0, "shard": 1, "reshard": False, "micro_batch": 4,
           **decided},
    )  # fmt: skip
    table = tuple(zip((u.name for u in plan.graph.units), shardings))
    samples = d.dp * d.micro_batch * d.microbatches
    return replace(plan, decisions=d, shardings=table,
                   workload=replace(plan.workload, global_batch=samples))  # fmt: skip


HF = {
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2,
        "n_head": 4, "n_positions": 64, "vocab_size": 256, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    },
}  # fmt: skip


def hf_plan(folder, name, shardings, sp):
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**HF[name], "dtype": "float32"}))
    plan = run(TraceOptions(
        model=str(path), hardware="h100x1", cache=False,
        pins=parse_pins(("tp=1", "pp=1", "recompute=none", "micro_batch=4")),
        asked=Asked(seq_len=32, global_batch=4, precision="fp32", engine="native"),
    )).plan  # fmt: skip
    d = replace(plan.decisions, tp=2, sequence_parallel=sp, compile=False, offload=())
    table = tuple(zip((u.name for u in plan.graph.units), shardings))
    return replace(plan, decisions=d, shardings=table)


def llama_plan(tp, sp, keys="S(0)", layer=None, **decided):
    embed, head = vocabulary(sp)
    units = (embed, layer or llama(sp, keys), Sharding(), head)
    return plan_of("llama", units, tp, sp, **decided)


def check(found):
    for rank, result in enumerate(found):
        assert result["loss"] < 1e-6, (rank, result)
        assert result["gradient"] < 1e-5, (rank, result)
    return found[0]


def test_megatron_layouts_take_megatrons_collectives(world):
    """Two layers: forward and backward each gather and scatter twice a layer, and once for the
    vocabulary's matrices; norms' gradients are summed, and the loss takes three numbers a row."""
    sp = check(world.run(2, cases.run_example, "llama", {"size": "tiny"}, llama_plan(2, True)))
    assert sp["collectives"]["all_gather_into_tensor"] == 2 * (2 * 2 + 1)
    assert sp["collectives"]["reduce_scatter_tensor"] == 2 * (2 * 2 + 1)
    assert sp["collectives"]["all_reduce"] == 5 + 3
    assert not sp["replicated"] and not sp["loose"]
    tp = check(world.run(2, cases.run_example, "llama", {"size": "tiny"}, llama_plan(2, False)))
    assert tp["collectives"]["all_reduce"] == 2 * (2 * 2 + 1) + 3
    assert "all_gather_into_tensor" not in tp["collectives"]


def test_more_ranks_than_key_heads(world):
    """Four ranks, two key heads: keys are whole, each rank reads its own head of them."""
    kept = llama(False, keys="R")
    moves = (
        *(e for e in kept.edges if e.at != "attention_norm:out"),
        *edges(**{"attention.wq:in": COPY, "attention/attention[1]": COPY,
                  "attention/attention[2]": COPY}),
    )  # fmt: skip
    plan = llama_plan(4, False, layer=replace(kept, edges=moves))
    check(world.run(4, cases.run_example, "llama", {"size": "tiny"}, plan))


def test_heads_that_the_ranks_cannot_share(world):
    """Six heads on four ranks: columns are split, the heads gathered; rows take slices."""
    shape = (96, 2, 6, 6, 128, 256, 8192)
    gathered, sliced = ("S(2)", "R", "R", "S(2)"), ("R", "S(2)", "S(2)", "R")
    kept = llama(True)
    moves = (
        *kept.edges,
        *edges(**{f"attention.w{x}:out": gathered for x in "qkv"}),
        *edges(**{"attention.wo:in": sliced}),
    )
    embed, head = vocabulary(True)
    plan = plan_of("llama", (embed, replace(kept, edges=moves), Sharding(), head), 4, True,
                   model_args=shape)  # fmt: skip
    check(world.run(4, cases.run_llama, shape, plan))


@pytest.mark.parametrize("sp", [True, False])
def test_fused_and_tied(world, sp):
    """The fused projection is taken apart without communication, and the tied matrix is one."""
    embed, head = vocabulary(sp)
    move = ("P", "S(0)", "S(0)", "R") if sp else SUM
    position = named({"weight": "S(0)"}, {"after/add_0[1]": move})
    plan = plan_of("gpt", (embed, position, gpt(sp), Sharding(), head), 2, sp)
    found = check(world.run(2, cases.run_example, "gpt", {"size": "tiny"}, plan))
    assert found["collectives"].get("all_gather_into_tensor", 0) == (11 if sp else 0)
    assert not found["replicated"]


def test_conditioned_blocks(world):
    layer = named(
        {"qkv.weight": "S(0)", "qkv.bias": "S(0)", "proj.weight": "S(1)", "fc1.weight": "S(0)",
         "fc1.bias": "S(0)", "fc2.weight": "S(1)", "modulation.weight": "S(0)",
         "modulation.bias": "S(0)"},
        {"modulation:in": COPY, "modulation:out": ("S(1)", "R", "R", "S(1)"), "qkv:in": COPY,
         "proj:out": SUM, "fc1:in": COPY, "fc2:out": SUM},
    )  # fmt: skip
    units = [layer if u.parameter_count > 40000 and "qkv.weight" in u.parameter_names
             else Sharding() for u in base("dit").graph.units]  # fmt: skip
    check(world.run(2, cases.run_example, "dit", {"size": "tiny"}, plan_of("dit", units, 2, False)))


def test_with_sharded_data_and_recomputation(world):
    plan = llama_plan(2, True, dp=2, zero=3, shard=2, reshard=True, micro_batch=2, microbatches=2,
                      recompute=((1, 0),))  # fmt: skip
    check(world.run(4, cases.run_example, "llama", {"size": "tiny"}, plan))


def test_loss_of_split_logits(world):
    for found in world.run(2, cases.losses, llama_plan(2, True)):
        for loss, gradient, plain in found:
            assert loss < 1e-6 and gradient < 1e-6 and plain


@pytest.mark.parametrize("taken", ["cross_entropy", "nll_loss"])
def test_mean_over_targets_of_all_ranks(world, taken):
    plan = plan_of("llama", (Sharding(),) * 4, 1, False, dp=2)
    for loss, gradient in world.run(2, cases.shared_mean, plan, taken):
        assert loss < 1e-6 and gradient < 1e-6


def test_dropout_agrees_where_values_do(world):
    one, two = world.run(2, cases.masks, llama_plan(2, True))
    assert one["whole"] == two["whole"] and one["split"] != two["split"]
    assert not torch.equal(one["attention"], two["attention"])
    for found in (one, two):
        for name in ("whole", "split"):
            assert found[f"{name} repeats"] and found[f"{name} differs"]
            kept = torch.tensor(found[name])
            assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
            assert 0.7 < float((kept > 0).float().mean()) < 0.8  # 5 standard deviations


def test_operations_that_are_not_split(world):
    for found in world.run(2, cases.odd_operations, llama_plan(2, True)):
        for name in ("conv", "mask", "unfold", "view", "fill", "constant", "norm"):
            assert found[name], name
        assert found["numbers"] == (4.0, 4.0, True, 4)
        assert found["replicated"]["unit", "conv2d"] == 1


def test_huggingface_models_run_unmodified(world, tmp_path):
    """They read hidden_states.shape between units, and take their own loss."""
    columns = [f"self_attn.{x}_proj.weight" for x in "qkv"]
    columns += ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    layer = named(
        {**dict.fromkeys(columns, "S(0)"), "self_attn.o_proj.weight": "S(1)",
         "mlp.down_proj.weight": "S(1)"},
        {"input_layernorm:out": UP, "self_attn:out": DOWN,
         "post_attention_layernorm:out": UP, "mlp:out": DOWN},
    )  # fmt: skip
    embed, head = vocabulary(True)
    plan = hf_plan(tmp_path, "llama", (embed, layer, Sharding(), head), True)
    found = check(world.run(2, cases.run_huggingface, HF["llama"], plan))
    assert found["collectives"]["all_gather_into_tensor"] == 2 * (2 * 2 + 1)


def test_views_and_biases_between_a_collective_and_its_module(world, tmp_path):
    """GPT-2's projections view their input and add their bias inside: a gather is made before
    the view, a reduction behind the bias; and the fused projection stays split."""
    lookup = named({}, {"embedding[1]": ("R", "S(1)", "S(1)", "R")})
    up, down = ("S(0)", "R", "P", "S(0)"), ("P", "S(0)", "S(0)", "R")
    layer = named(
        {"attn.c_attn.weight": "S(1)", "attn.c_attn.bias": "S(0)", "attn.c_proj.weight": "S(0)",
         "mlp.c_fc.weight": "S(1)", "mlp.c_fc.bias": "S(0)", "mlp.c_proj.weight": "S(0)"},
        {"attn.c_attn/matmul[0]": up, "attn.c_proj/add[0]": down,
         "mlp.c_fc/matmul[0]": up, "mlp.c_proj/add[0]": down},
    )  # fmt: skip
    head = named({}, {"after:out": SUM, "after/cross_entropy_1[1]": ("R", "S(0)", "S(0)", "R")})
    plan = hf_plan(tmp_path, "gpt2", (lookup, lookup, layer, Sharding(), head), True)
    found = check(world.run(2, cases.run_huggingface, HF["gpt2"], plan))
    assert not found["loose"]
    assert found["collectives"]["all_gather_into_tensor"] == 2 * 2 * 2, found
    assert found["collectives"]["reduce_scatter_tensor"] == 2 * 2 * 2, found


def test_recomputation_drops_the_same(world):
    embed, head = vocabulary(True)
    position = named({"weight": "S(0)"}, {"after/add_0[1]": ("P", "S(0)", "S(0)", "R")})
    units = (embed, position, gpt(True), Sharding(), head)
    kept, again = (
        plan_of("gpt", units, 2, True, recompute=((count, 0),)) for count in (0, 2)
    )  # fmt: skip
    pairs = zip(world.run(2, cases.dropped, kept), world.run(2, cases.dropped, again))
    for (loss, gradients), (same, others) in pairs:
        assert loss == same
        for one, two in zip(gradients, others):
            assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)


def test_compiled_units(world):
    for found in world.run(2, cases.compiled, "llama", llama_plan(2, True, compile=True)):
        assert found["loss"] < 1e-6 and found["gradient"] < 1e-5, found
        assert not found["uncompiled"], found


def test_fused_projections_are_compiled(world):
    embed, head = vocabulary(True)
    position = named({"weight": "S(0)"}, {"after/add_0[1]": ("P", "S(0)", "S(0)", "R")})
    plan = plan_of("gpt", (embed, position, gpt(True), Sharding(), head), 2, True, compile=True)
    for found in world.run(2, cases.compiled, "gpt", plan):
        assert found["loss"] < 1e-6 and found["gradient"] < 1e-5, found
        assert not found["uncompiled"], found
