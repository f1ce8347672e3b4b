"""Serving costs: replicas of attention, latents that are expanded, formats of a block's parts."""

from dataclasses import replace

import numpy as np
import pytest
from test_serving import CONFIGS, _costs, model_of

from cost_models.serving import serve, step_parts, weight_bytes
from cost_models.serving_decisions import WEIGHT_BYTES, Serving
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_ops import step_of


def test_a_prompt_is_one_attention_replicas() -> None:
    model, two, one = model_of("deepseek"), _costs(attention_dp=2), _costs(hardware="h100x1")
    parts = {n: step_parts(two, model, step_of(0.0, 0.0, n, 2048.0)) for n in (1.0, 2.0, 3.0)}
    alone = step_parts(one, model, step_of(0.0, 0.0, 1.0, 2048.0))
    assert parts[1.0]["attention"] == parts[2.0]["attention"] == alone["attention"]
    assert parts[1.0]["elementwise"] == parts[2.0]["elementwise"] < parts[3.0]["elementwise"]
    assert parts[1.0]["moe"] < parts[2.0]["moe"] < parts[3.0]["moe"]  # which both replicas' share
    for prompts in (0.5, 1.0, 1.5, 2.0, 7.0):
        step = step_of(8.0, 64.0, prompts, 100.0).of_fullest(2, 1)
        assert step.of_all(2) == pytest.approx(8.0 + 100.0 * prompts)
        assert step.prompts == max(prompts / 2, min(prompts, 1.0))
    shape = np.ones(1)
    load = (model, 4000 * shape, 200 * shape, shape, 64 * shape)
    first = serve(two, *load).ttft_s[0]
    assert first > 0.9 * serve(one, *load).ttft_s[0]  # nobody halves it


def test_replicas_of_attention_read_beside_one_another() -> None:
    """Twice the requests on twice the replicas, which share no experts: what one of them sees."""
    model, two, one = model_of("llama"), _costs(attention_dp=2), _costs(hardware="h100x1")
    # a host of its own: how near they come turns on it (it is the same in both)
    two, one = (replace(c, engine=replace(c.engine, sequence_host_s=2.5e-5)) for c in (two, one))
    shape = np.ones(1)
    few = serve(one, model, 4000 * shape, 40 * shape, 32 * shape, 64 * shape)
    many = serve(two, model, 4000 * shape, 40 * shape, 64 * shape, 128 * shape)
    assert many.decode_s[0] == pytest.approx(few.decode_s[0], rel=1e-6)
    assert few.tpot_s[0] * 0.9 < many.tpot_s[0] < few.tpot_s[0] * 1.1
    assert few.ttft_s[0] * 0.7 < many.ttft_s[0] < few.ttft_s[0] * 1.3


def test_latents_are_expanded_where_an_engine_does_not_decode_in_them() -> None:
    """The rows that transformers' own forward gives the matrix that expands them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {**CONFIGS["deepseek"], "num_hidden_layers": 1}
    kind = shape.pop("model_type")
    tiny = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()
    rows: list[int] = []
    tiny.model.layers[0].self_attn.kv_b_proj.register_forward_pre_hook(
        lambda _, given: rows.append(given[0].numel() // given[0].shape[-1])
    )
    with torch.no_grad():
        tiny.generate(torch.arange(12).view(2, 6), max_new_tokens=3, do_sample=False)
    layer = model_of("deepseek").layers[0]
    (matrix,) = [m for m in layer.matrices if m.expands]
    assert (matrix.k, matrix.n) == (48, 8 * (32 + 32))
    native = replace(_costs(hardware="h100x1"), engine=load_serving_engine("native"))
    steps = [step_of(0.0, 0.0, 2.0, 6.0), step_of(2.0, 7.0), step_of(2.0, 8.0)]
    assert [float(native.rows_of(matrix, layer.attention, step)) for step in steps] == rows[:3]
    engine = _costs(hardware="h100x1")
    assert [float(engine.rows_of(matrix, layer.attention, step)) for step in steps] == [12, 0, 0]
    (attend,) = layer.attention
    whole = replace(attend, latent=0, rope=0, kv_heads=attend.heads)
    step = step_of(32.0, 4096.0)
    copied = 32 * 4096 * 8 * (32 + 48) * 2 / native.device.memory_bandwidth_bytes_per_s
    read = native.attention_s(whole, step)
    assert read + copied < native.attention_s(attend, step) < read + 2 * copied


def test_what_leaves_attention_may_have_a_format_of_its_own() -> None:
    model = model_of("llama")
    plain = weight_bytes(model, Serving(default="bf16"))
    packed = weight_bytes(model, Serving(default="bf16", weights=(("attention_out", "fp4"),)))
    assert plain - packed == pytest.approx(4 * 256 * 256 * (2 - WEIGHT_BYTES["fp4"]))
    assert Serving(weights=(("attention", "fp8"),)).format_of("attention_out") == "fp8"


def test_tokens_of_four_bits_are_packed_before_they_are_sent() -> None:
    size = np.array([64e6])
    wide = _costs(hardware="b200x8", attention_dp=8).exchange_s(size)
    packed = _costs(hardware="b200x8", attention_dp=8, default="fp4").exchange_s(size)
    assert 0.55 * wide < packed < 0.75 * wide  # a way there of four is packed, the way back is not
    assert _costs(attention_dp=2, default="fp4").exchange_s(size) == pytest.approx(
        _costs(attention_dp=2).exchange_s(size)
    )  # Hopper multiplies in 16 bits
