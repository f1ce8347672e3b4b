"""A configuration is cut to a model for a laptop, and its structure stays."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from test_hf import DEEPSEEK, LLAMA, MIXTRAL  # noqa: E402

from ir.capture import hf, hf_cut  # noqa: E402
from ir.errors import UsageError  # noqa: E402

GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 2560,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024,
    "intermediate_size": 10240, "num_hidden_layers": 34, "vocab_size": 262208,
    "layer_types": [("full" if i % 6 == 5 else "sliding") + "_attention" for i in range(34)],
}  # fmt: skip
GPT = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_head": 12,
    "n_layer": 12, "n_positions": 1024, "vocab_size": 50257, "resid_pdrop": 0.1,
}  # fmt: skip


def cut(config, layers=4, **changes):
    return hf_cut.cut(config, layers, changes, "config.json")


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL, DEEPSEEK, GEMMA, GPT],
                         ids=lambda c: c["model_type"])  # fmt: skip
def test_it_runs(config):
    small = cut(config)
    cls = hf._model_class(small, "")
    model = cls._from_config(hf._configuration(cls, small, ""), dtype=torch.float32)
    logits = model(input_ids=torch.zeros(1, 32, dtype=torch.long)).logits
    assert torch.isfinite(logits).all()
    assert sum(p.numel() for p in model.parameters()) < 3_000_000
    assert len(hf._model_class(config, "").__name__) and logits.shape[:2] == (1, 32)


def test_ratios_and_ties_stay():
    small = cut(LLAMA)
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (4, 2)
    assert (small["hidden_size"], small["head_dim"]) == (64, 16)
    alone = cut({**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True})
    assert alone["num_key_value_heads"] == 1 and alone["tie_word_embeddings"] is True
    more = hf_cut.cut(LLAMA, 4, {}, "", heads=8)
    assert (more["num_attention_heads"], more["num_key_value_heads"]) == (8, 4)
    each = cut({**LLAMA, "num_key_value_heads": 32})
    assert each["num_key_value_heads"] == each["num_attention_heads"]
    apart = cut({**LLAMA, "head_dim": 256})
    assert apart["head_dim"] * apart["num_attention_heads"] != apart["hidden_size"]


def test_sizes_divide_as_the_whole_ones_do():
    for vocab, small in ((128256, 256), (50257, 257), (50258, 258), (50260, 260), (100, 100)):
        assert cut({**LLAMA, "vocab_size": vocab})["vocab_size"] == small
    assert cut(MIXTRAL)["num_local_experts"] == 8
    assert cut({**MIXTRAL, "num_experts_per_tok": 1})["num_experts_per_tok"] == 1


def test_every_kind_of_layer_stays():
    kinds = cut(GEMMA)["layer_types"]
    assert len(kinds) == 4 and set(kinds) == set(GEMMA["layer_types"])
    assert cut(DEEPSEEK)["first_k_dense_replace"] == 1
    assert cut(GEMMA)["sliding_window"] < 32


def test_layers_are_chosen_by_all_that_is_said_of_each():
    """Llama 4: of experts or not, rotary or not, in chunks or not; which layers have experts is a
    list of numbers, as long as there are layers where all do."""
    llama4 = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text",
              "num_hidden_layers": 48, "hidden_size": 5120, "num_attention_heads": 40,
              "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 202048,
              "intermediate_size": 8192, "intermediate_size_mlp": 16384}  # fmt: skip
    scout, maverick = (
        cut({**llama4, "num_local_experts": n, "interleave_moe_layer_step": step}, layers=3)
        for n, step in ((16, 1), (128, 2))
    )
    chunks = ["chunked_attention", "chunked_attention", "full_attention"]
    for small, routed in ((scout, [0, 1, 2]), (maverick, [1, 2])):
        assert small["layer_types"] == chunks and small["no_rope_layers"] == [1, 1, 0]
        assert small["moe_layers"] == routed
    kinds = [*zip(maverick["no_rope_layers"], (i in maverick["moe_layers"] for i in range(3)))]
    assert kinds == [(1, False), (1, True), (0, True)]


def test_nothing_is_dropped_and_a_key_can_be_set_by_hand():
    assert cut(GPT)["resid_pdrop"] == 0.0
    assert cut(GPT, n_layer="3")["n_layer"] == 3
    with pytest.raises(UsageError, match="no such key"):
        cut(GPT, layers=4, depth="3")
