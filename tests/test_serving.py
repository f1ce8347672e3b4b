"""Serving costs: what is read from a graph, what a rank holds, what a step and a loop take."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.compute import load_kernels
from cost_models.hardware import load_hardware
from cost_models.serving import (
    admitted,
    kv_bytes,
    prompt_steps,
    serve,
    step_parts,
    step_s,
    weight_bytes,
)
from cost_models.serving_decisions import WEIGHT_BYTES, ServeLoad, Serving
from cost_models.serving_engines import load_serving_engine, serving_engines
from cost_models.serving_ops import Costs, step_of
from cost_models.serving_queue import Arrivals
from cost_models.serving_reading import served_model
from cost_models.serving_shapes import ServedModel
from ir.errors import PlanError, UsageError
from ir.graph import Graph

_SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
          "vocab_size": 1024, "max_position_embeddings": 4096}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_SIZES,
              "num_key_value_heads": 2, "intermediate_size": 512},
    "gpt_oss": {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", **_SIZES,
                "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 128,
                "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek": {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
                 **_SIZES, "num_key_value_heads": 8, "intermediate_size": 512,
                 "moe_intermediate_size": 64, "n_routed_experts": 8, "n_shared_experts": 1,
                 "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                 "first_k_dense_replace": 1, "q_lora_rank": 96, "kv_lora_rank": 48,
                 "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
    "hybrid": {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", **_SIZES,
               "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 512,
               "linear_num_value_heads": 8, "linear_num_key_heads": 4,
               "linear_key_head_dim": 32, "linear_value_head_dim": 32, "num_experts": 8,
               "num_experts_per_tok": 2, "moe_intermediate_size": 64,
               "shared_expert_intermediate_size": 64},
    "llama4": {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", **_SIZES,
               "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 128,
               "intermediate_size_mlp": 512, "num_local_experts": 8, "num_experts_per_tok": 1,
               "interleave_moe_layer_step": 2},
}  # fmt: skip


@functools.cache
def graph_of(name: str) -> Graph:
    from ir.capture import capture_graph
    from ir.capture.load import load

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(CONFIGS[name]))
        return capture_graph(load(str(path), {}), precision="bf16", fold=True)


@functools.cache
def model_of(name: str) -> ServedModel:
    return served_model(graph_of(name))


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_counted_once(name: str) -> None:
    model, graph = model_of(name), graph_of(name)
    counted = sum(model.block_elements().values()) + model.other_elements
    assert counted == pytest.approx(graph.parameter_count, rel=1e-9)
    matrices = sum(
        p.tensor.numel() for full, p in graph.parameters.items()
        if len(p.tensor.shape) > 1 and "conv1d" not in full and "bias" not in full
    )
    assert sum(model.block_elements().values()) == matrices


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_what_their_modules_are(name: str) -> None:
    """Element counts by class, against the names that the models' authors gave."""
    words = {
        "routed_experts": ("mlp.experts.",), "router": ("mlp.gate.w", "mlp.router.w"),
        "shared_experts": ("shared_expert",), "embeddings": ("embed_tokens",),
        "attention": ("attn",), "head": ("lm_head",),
    }  # fmt: skip
    if name == "llama4":  # one product of all experts with all tokens, as its forward is
        words = {"router": ("router.w",), "embeddings": ("embed_tokens",), "head": ("lm_head",),
                 "mlp": ("experts.", "shared_expert", "forward.gate", "forward.up", "forward.down"),
                 }  # fmt: skip
    found = model_of(name).block_elements()
    for block, parts in words.items():
        named = sum(
            p.tensor.numel() for full, p in graph_of(name).parameters.items()
            if any(part in full for part in parts) and len(p.tensor.shape) > 1
            and "conv1d" not in full and "bias" not in full
        )  # fmt: skip
        assert found.get(block, 0) == named, block


def test_a_stack_of_experts_is_routed_by_engines_that_do() -> None:
    """Llama 4's forward multiplies every token with every expert; others' kernels with its own."""
    graph = graph_of("llama4")
    plain, routed = served_model(graph), served_model(graph, "vllm")
    stack = 2 * 8 * 3 * 256 * 128  # of two layers of four
    before, after = plain.block_elements(), routed.block_elements()
    assert after["routed_experts"] == stack and "routed_experts" not in before
    assert after["shared_experts"] == stack / 8
    assert before["mlp"] == after["mlp"] + stack + stack / 8
    (one,) = next(layer for layer in routed.layers if layer.experts).experts
    assert (one.experts, one.topk, one.hidden, one.inter) == (8, 1, 256, 128)
    own = next(layer for layer in plain.layers if layer.matrices[3].n == 8 * 2 * 128)
    up, down = own.matrices[3:5]
    assert (up.split, down.split, up.rows, down.rows) == ("column", "row", 1, 1)
    assert down.held(2) == 8 * 256 * 128 / 2
    alike = next(layer for layer in routed.layers if layer.experts)
    assert alike.reductions == own.reductions == ("attention", "mlp")
    # for each expert, of each token: what it reads is written, its gate and up are read and their
    # product written, what it makes is read and summed; of routed ones their sum is read
    more = [getattr(own.light, key) - getattr(alike.light, key)
            for key in ("whole_bytes", "split_bytes")]  # fmt: skip
    assert more == [2 * (8 * 2 - 1) * 256, 2 * 8 * 3 * 128]


def test_splits_of_tensor_parallelism_are_megatrons() -> None:
    (layer,) = model_of("llama").layers
    assert [(m.block, m.split) for m in layer.matrices] == [
        ("attention", "column"), ("attention", "row"), ("mlp", "column"), ("mlp", "row"),
    ]  # fmt: skip
    assert layer.reductions == ("attention", "mlp")
    qkv = layer.matrices[0]
    assert qkv.columns(2) == (256 + 64 + 64) / 2
    assert qkv.columns(8) == 256 / 8 + 2 * 32  # two key heads are repeated on four ranks each
    latent = model_of("deepseek").layers[1]
    assert [m.split for m in latent.matrices if m.block in ("attention", "router")] == [
        "whole", "column", "column", "row", "whole",
    ]  # fmt: skip


def test_attention_keeps_what_its_kind_keeps() -> None:
    (full,) = model_of("llama").layers[0].attention
    assert full.cached() == 2 * 2 * 32 and full.cached(8) == 2 * 32
    (latent,) = model_of("deepseek").layers[0].attention
    assert (latent.latent, latent.rope, latent.cached(8)) == (48, 16, 64)
    windows = sorted(layer.attention[0].window for layer in model_of("gpt_oss").layers)
    assert windows == [0, 64]
    linear = next(layer for layer in model_of("hybrid").layers if layer.recurrences)
    short, state = (one.state_bytes for one in linear.recurrences)
    assert state == 8 * 32 * 32 * 4  # heads x keys x values, in fp32
    assert short == 2 * (2 * 4 * 32 + 8 * 32) * 3


def test_attention_written_as_products_is_refused() -> None:
    from ir.capture import capture_graph
    from ir.capture.load import load

    source = (
        "import torch\nfrom torch import nn\n"
        "class A(nn.Module):\n"
        " def __init__(s):\n  super().__init__(); s.q = nn.Linear(8, 8)\n"
        " def forward(s, x):\n  q = s.q(x); return x + (q @ q.transpose(1, 2)).softmax(-1) @ q\n"
        "class M(nn.Module):\n"
        " def __init__(s):\n  super().__init__(); s.e = nn.Embedding(16, 8)\n"
        "  s.layers = nn.ModuleList(A() for _ in range(2)); s.h = nn.Linear(8, 16)\n"
        " def forward(s, ids):\n  x = s.e(ids)\n  for y in s.layers: x = y(x)\n  return s.h(x)\n"
        "def build(): return M()\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.py"
        path.write_text(source)
        graph = capture_graph(load(str(path), {}), precision="bf16", fold=True)
    with pytest.raises(PlanError, match="multiplies two activations"):
        served_model(graph)


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_all_ranks_are_the_model(name: str) -> None:
    model = model_of(name)
    whole = weight_bytes(model, Serving())
    assert whole == 2 * graph_of(name).parameter_count
    repeated = sum(
        layer.count * m.elements for layer in model.layers for m in layer.matrices
        if m.split == "whole"
    ) + model.other_elements  # fmt: skip
    assert 2 * weight_bytes(model, Serving(tp=2)) == pytest.approx(whole + 2 * repeated)


def test_the_fullest_stage_is_counted() -> None:
    """Three dense layers and five with experts over three stages: 3 (all dense), 3, 2. The first
    has the embeddings, the last the head."""
    one = model_of("gpt_oss").layers[0]
    dense = replace(one, count=3, experts=())
    model = replace(model_of("gpt_oss"), layers=(dense, replace(one, count=5)), tied=False,
                    order=(0, 0, 0, 1, 1, 1, 1, 1), other_elements=0)  # fmt: skip
    matrices = sum(m.elements for m in one.matrices)
    experts = sum(e.elements for e in one.experts)
    head = sum(m.elements for m in model.head)
    stages = (3 * matrices + model.embedding_elements, 3 * (matrices + experts),
              2 * (matrices + experts) + head)  # fmt: skip
    assert weight_bytes(model, Serving(pp=3)) == 2 * max(stages)
    assert weight_bytes(model, Serving()) == 2 * (8 * matrices + 5 * experts
                                                  + model.embedding_elements + head)  # fmt: skip
    kept = [float(kv_bytes(model, Serving(pp=pp), np.asarray(100.0))) for pp in (1, 3, 8)]
    assert kept[1:] == pytest.approx([kept[0] * 3 / 8, kept[0] / 8])
    config = model_of("deepseek")  # its first layer has no experts
    assert [*config.order] == [0] + [1] * (config.layer_count - 1)


def test_formats_count_by_block() -> None:
    model = model_of("gpt_oss")
    experts = model.block_elements()["routed_experts"]
    narrow = weight_bytes(model, Serving(weights=(("routed_experts", "int4"),)))
    saved = experts * (2 - WEIGHT_BYTES["int4"])
    assert narrow == pytest.approx(weight_bytes(model, Serving()) - saved)


def test_a_window_bounds_its_layers_cache() -> None:
    model, s = model_of("gpt_oss"), Serving(kv="fp8")
    for tokens in (10, 64, 1000):
        brute = 2 * (tokens + min(tokens, 64)) * 2 * 2 * 32
        assert float(kv_bytes(model, s, np.asarray(float(tokens)))) == brute


def test_admitted_sequences_fill_the_room() -> None:
    model, cluster = model_of("llama"), load_hardware("t4x1")
    engine = replace(load_serving_engine("vllm"), reserves=True)
    load = ServeLoad(prompt=1000, output=1000)
    count = admitted(model, cluster, engine, Serving(), load)
    each = 2000 * 4 * 128 * 2
    room = cluster.device.memory_bytes * engine.memory_share - 3.5e9
    room -= weight_bytes(model, Serving())
    assert count * each <= room < (count + 1) * each


# --- time -------------------------------------------------------------------------------------


def _costs(engine: str = "vllm", hardware: str = "h100x8", **decisions: Any) -> Costs:
    return Costs(
        cluster=load_hardware(hardware), engine=load_serving_engine(engine),
        serving=Serving(**decisions),
    )  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 2, "ep": 2}, {"attention_dp": 2}])
def test_a_step_is_no_less_than_its_bytes_and_grows(name: str, layout: dict[str, int]) -> None:
    model, costs = model_of(name), _costs(**layout)
    b = np.array([1.0, 8.0, 64.0, 256.0]) * costs.serving.attention_dp
    seconds = step_s(costs, model, step_of(b, 2048.0))
    assert (np.diff(seconds) > 0).all() and np.isfinite(seconds).all()
    assert (step_s(costs, model, step_of(b, 8192.0)) >= seconds).all()
    mixed = step_s(costs, model, step_of(b, 2048.0, 1.0, 512.0))
    assert (mixed > seconds).all()
    parts = step_parts(costs, model, step_of(b, 2048.0))
    assert sum(parts.values()) == pytest.approx(seconds)
    dense = sum(layer.count * m.held(costs.serving.tp) for layer in model.layers
                for m in layer.matrices)  # fmt: skip
    device = costs.device
    assert seconds[0] > 2 * dense / device.memory_bandwidth_bytes_per_s


def test_chunks_of_a_prompt_attend_as_the_whole_does() -> None:
    model, costs = model_of("llama"), _costs(hardware="h100x1")
    (attend,) = model.layers[0].attention
    long = 65536.0
    whole = costs.attention_s(attend, step_of(0.0, 0.0, 1.0, long))
    halves = [costs.attention_s(attend, step_of(0.0, 0.0, 1.0, long / 2, past))
              for past in (0.0, long / 2)]  # fmt: skip
    start = costs._known("prefill", "fa3")["overhead_s"]
    assert sum(halves) - start == pytest.approx(float(whole), rel=1e-6)


def test_a_loop_obeys_littles_law_and_queues_beyond_its_room() -> None:
    model, costs = model_of("llama"), _costs(hardware="h100x1")
    batch = np.array([1.0, 16.0, 64.0, 128.0])
    shape = np.ones(4)
    out = serve(costs, model, 1000 * shape, 200 * shape, batch, 64 * shape)
    in_flight = out.tokens_per_s / 200 * (out.ttft_s + 199 * out.tpot_s)
    assert in_flight == pytest.approx(batch)
    assert out.running.tolist() == [1, 16, 64, 64]
    assert out.tpot_s[3] == out.tpot_s[2] and out.ttft_s[3] > 2 * out.ttft_s[2]
    assert (out.tpot_s >= out.decode_s).all()
    assert out.tpot_s[0] == out.decode_s[0]  # nobody else's prompts


def test_arrivals_wait_for_the_host_and_for_steps_that_are_waited_on_purpose() -> None:
    model, costs = model_of("llama"), _costs(hardware="h100x1")
    late = replace(costs, engine=replace(costs.engine, arrival_host_s=0.01))
    none = replace(costs, engine=replace(costs.engine, arrival_host_s=0.0))
    load = (model, np.full(2, 1000.0), np.full(2, 200.0), np.array([1.0, 9.0]), np.full(2, 64.0))

    def ttft_s(costs: Costs, **more: float) -> np.ndarray:
        return serve(costs, *load, Arrivals(**more)).ttft_s

    # one after another in a burst: 1, 2 .. 9 times; a tenth of it in ten waves, none in a steady
    # state
    for waves, share in ((1.0, 1.0), (10.0, 0.1), (np.inf, 0.0)):
        more = ttft_s(late, waves=waves) - ttft_s(none, waves=waves)
        assert more == pytest.approx(share * 0.01 * np.array([1.0, 5.0]))
    steps_s = serve(none, *load).decode_s
    held = {"gathered_prompts": 64.0, "gathered_steps": 2.0}  # the first of a group waits for all
    more = (ttft_s(none, **held) - ttft_s(none)) / steps_s
    assert more[0] == pytest.approx(2.0) and 1 < more[1] < 2 + 0.2  # eight others, one in 25 steps
    burst = ttft_s(none, waves=1.0)
    assert ttft_s(none, waves=1.0, **held) == pytest.approx(burst)  # a burst is looked at once


def test_prompts_between_decode_steps_run_at_the_rated_clock() -> None:
    model, costs = model_of("llama"), _costs(hardware="b200x1")
    prompts = step_of(0.0, 0.0, 1.0, 8192.0)
    alone = replace(costs, prompts_alone=True)
    batch = replace(costs, engine=load_serving_engine("native"))
    assert (costs.clock, alone.clock) == (1.0, load_kernels(costs.device).clock)
    assert batch.clock == 1 > alone.clock  # decode steps draw less than the board may
    assert step_s(costs, model, prompts) < step_s(alone, model, prompts)
    one = np.ones(1)  # prompts of a batch follow one another
    read_s = prompt_steps(batch, model, 0 * one, 0 * one, 8192 * one, one)
    own_s = step_s(replace(batch, prompts_alone=True), model, prompts)
    assert read_s[0] == pytest.approx(float(own_s))


def test_prompts_are_read_in_chunks_of_the_engine() -> None:
    model = model_of("llama")
    one = np.ones(1)
    whole = prompt_steps(_costs(), model, 0 * one, one, 4096 * one, one)
    split = prompt_steps(_costs(prefill_chunk=1024), model, 0 * one, one, 4096 * one, one)
    assert split > whole
    together = prompt_steps(_costs(), model, 0 * one, one, 1024 * one, 4 * one)
    assert together < 4 * prompt_steps(_costs(), model, 0 * one, one, 1024 * one, one)


def test_the_host_launches_experts_that_are_a_chain_of_kernels() -> None:
    """Each step that reads prompts waits for it, so all requests do; not where one kernel does all
    that experts do (4 bits where tensor cores have them), nor without experts."""
    one = np.ones(1)

    def seconds(name: str, fmt: str, hardware: str, op_s: float) -> tuple[float, float, float]:
        costs = _costs(hardware=hardware, prefill_chunk=1024, weights=(("routed_experts", fmt),))
        costs = replace(costs, engine=replace(costs.engine, routed_op_host_s=op_s))
        model = model_of(name)
        steps = float(prompt_steps(costs, model, 0 * one, one, 4096 * one, one)[0])
        out = serve(costs, model, 1000 * one, 200 * one, 2 * one, 64 * one)
        return steps, float(out.tpot_s[0]), float(out.ttft_s[0])

    cases = (("gpt_oss", "fp4", "h100x1", True), ("gpt_oss", "fp4", "b200x1", False),
             ("gpt_oss", "fp8", "b200x1", True), ("llama", "bf16", "b200x1", False))  # fmt: skip
    for name, fmt, hardware, waits in cases:
        none, some = (seconds(name, fmt, hardware, op_s) for op_s in (0.0, 1e-5))
        host_s = 1e-5 * model_of(name).routed_ops * waits
        assert some[0] - none[0] == pytest.approx(4 * host_s)  # four chunks
        # one prompt of another in 200 steps, of which few share a step
        assert 0.9 * host_s / 200 <= some[1] - none[1] <= host_s / 200 * (1 + 1e-9)
        assert host_s <= some[2] - none[2] <= 3 * host_s


@pytest.mark.parametrize("fmt", sorted(WEIGHT_BYTES))
@pytest.mark.parametrize("hardware", ["a100x1", "h100x1", "b200x1", "t4x1"])
def test_every_format_is_costed_everywhere(fmt: str, hardware: str) -> None:
    model = model_of("gpt_oss")
    costs = _costs(hardware=hardware, default=fmt)
    seconds = step_s(costs, model, step_of(np.array([1.0, 64.0]), 512.0))
    assert np.isfinite(seconds).all() and (seconds > 0).all()


def test_four_bits_help_small_batches_and_not_large_ones() -> None:
    """A large dense matrix: int4 weights are a quarter of the bytes, unpacked for each use."""
    from cost_models.serving_shapes import Matrix

    matrix = Matrix(block="mlp", k=8192, parts=((57344, 0),), split="column")
    tokens = np.array([1.0, 4096.0])
    wide = _costs(hardware="a100x1").matrix_s(matrix, tokens)
    narrow = _costs(hardware="a100x1", default="int4").matrix_s(matrix, tokens)
    assert wide[0] / narrow[0] > 2 and narrow[1] > 0.9 * wide[1]


# --- faults -----------------------------------------------------------------------------------


def test_decisions_that_cannot_be_meant_are_refused() -> None:
    for wrong, words in (
        ({"tp": 0}, "less than one"), ({"default": "fp5"}, "unknown format"),
        ({"kv": "int3"}, "unknown KV"), ({"tp": 4, "ep": 3}, "does not divide"),
        ({"tp": 4, "ep": 2, "etp": 4}, "is not tp=4"),
        ({"weights": (("mpl", "fp8"),)}, "unknown block"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            Serving(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown serving engine 'vlm'") as fault:
        load_serving_engine("vlm")
    assert "did you mean vllm?" in fault.value.hints


def test_engines_have_sources() -> None:
    assert {"sglang", "trtllm", "vllm"} <= set(serving_engines())
    for name in serving_engines():
        assert len(load_serving_engine(name).source) > 20
