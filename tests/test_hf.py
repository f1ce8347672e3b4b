"""Configurations become modules that trace whole, and the operators they trace to are right.

As a script it sweeps every causal language model of transformers: python tests/test_hf.py [TYPE..]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers")

from ir.capture import export, hf, hf_patches, torch_ops  # noqa: E402
from ir.capture.load import Source, load  # noqa: E402
from ir.errors import PlanError, UsageError  # noqa: E402

ops = torch.ops.meshwright
SIZES = ((2, 128), (3, 256))

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
MIXTRAL = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}
DEEPSEEK = {  # DeepSeek-V3's shape is the default of its class; Kimi-K2 changes the type's name
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "num_nextn_predict_layers": 1,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 3,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}


def source(config: dict[str, Any], **args: str) -> Source:
    return hf.source(config, name="test", args=args, key="", where="config.json")


def trace(model: Source, batch: int, seq_len: int) -> list[str]:
    """The operators of a trace, in order."""
    with model.tracing(), export._lines_unread(), export._source_unwritten():
        program = torch.export.export(
            model.model, (), kwargs=model.inputs(batch, seq_len), strict=False
        )
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "published"), [(LLAMA, 8_030_261_248), (MIXTRAL, 46_702_792_704)]
)
def test_counts(config: dict[str, Any], published: int) -> None:
    built = source(config)
    assert parameters(built.model) == published
    assert {p.dtype for p in built.model.parameters()} == {torch.bfloat16}
    assert all(t.is_meta for t in [*built.model.parameters(), *built.model.buffers()])
    assert built.max_seq_len == config["max_position_embeddings"]
    assert (built.kind, built.task, built.seq_in_input) == ("hf", "causal-lm", True)
    assert built.model.training and not built.model.config.use_cache


def test_tied_weights_are_one_parameter() -> None:
    tied = source({**LLAMA, "tie_word_embeddings": True}).model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert parameters(tied) == 8_030_261_248 - 128256 * 4096


def test_a_type_unknown_to_transformers_is_its_architecture() -> None:
    kimi = source(DEEPSEEK)
    assert type(kimi.model).__name__ == "DeepseekV3ForCausalLM"
    assert any("multi-token" in note for note in kimi.notes)
    targets = trace(kimi, *SIZES[0])
    assert targets.count("meshwright.attention.default") == 4
    assert targets.count("meshwright.moe_experts_dispatch.default") == 1


def test_arguments_change_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    two = load(str(tmp_path), {"num_hidden_layers": "2", "tie_word_embeddings": "true"})
    assert two.name == tmp_path.name and len(two.model.model.layers) == 2
    with pytest.raises(UsageError, match="no such key"):
        source(LLAMA, layers="2")
    with pytest.raises(UsageError, match="expected int"):
        source(LLAMA, num_hidden_layers="two")
    with pytest.raises(PlanError) as caught:
        source({**LLAMA, "hidden_act": "no_such_function"})
    assert "no_such_function" in caught.value.why


def test_text_of_a_multimodal_model() -> None:
    text = {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4}
    both = source({"architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": text})
    assert both.task == "causal-lm" and any("vision_config" in note for note in both.notes)
    targets = trace(both, 2, 128)
    assert targets.count("meshwright.delta_rule.default") == 3
    assert targets.count("meshwright.attention.default") == 1


# name -> how to make a small one, and the operators that must be in its trace
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": ({}, ("attention",)),
    "qwen2": ({}, ("attention",)),
    "gemma2": ({"head_dim": 16, "num_hidden_layers": 4}, ("attention",)),
    "gemma3_text": ({"head_dim": 16}, ("attention",)),
    "mixtral": (EXPERTS, ("attention", "moe_experts_combine")),
    "qwen3_moe": ({**EXPERTS, "moe_intermediate_size": 32}, ("moe_experts_dispatch",)),
    "gpt_oss": ({**EXPERTS, "head_dim": 16}, ("attention", "moe_experts_bias")),
    "llama4_text": ({**EXPERTS, "head_dim": 16, "intermediate_size_mlp": 96}, ("attention",)),
    "gpt2": ({"n_embd": 64, "n_head": 4, "n_layer": 2}, ("attention",)),
    "bloom": ({"n_head": 4, "n_layer": 2}, ()),
    "gptj": ({"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}, ()),
    "falcon": ({}, ()),
    "mamba": ({"state_size": 8}, ("causal_conv1d", "selective_scan")),
    "mamba2": (
        {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2},
        ("causal_conv1d", "ssd_scan"),
    ),
    "qwen3_next": (
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "head_dim": 16,
        },
        ("delta_rule", "causal_conv1d", "attention"),
    ),
    "rwkv": ({"attention_hidden_size": 64}, ("wkv",)),
    "minimax": ({**EXPERTS, "head_dim": 16, "block_size": 8}, ("linear_attention",)),
    "recurrent_gemma": ({"num_hidden_layers": 3, "lru_width": 64}, ("linear_scan",)),
    "xlstm": ({"num_heads": 4, "chunk_size": 8, "autocast_kernel_dtype": "float32"}, ("mlstm",)),
    "dbrx": (
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
        ("moe_experts_dispatch",),
    ),
}


def small(kind: str, dtype: str = "float32") -> dict[str, Any]:
    extra, _ = FAMILIES[kind]
    name = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    return {"architectures": [name], "model_type": kind, "dtype": dtype, **SMALL, **extra}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_traces_without_loops_over_the_sequence(kind: str) -> None:
    model = source(small(kind, "bfloat16"))
    first, second = (trace(model, *size) for size in SIZES)
    assert first == second
    for name in FAMILIES[kind][1]:
        assert f"meshwright.{name}.default" in first


@pytest.mark.parametrize("kind", [k for k in FAMILIES if k not in ("bloom", "gptj", "falcon")])
def test_the_traced_model_is_the_one_that_trains(kind: str) -> None:
    """On real numbers the adapted model gives the logits and gradients of the eager one."""
    torch.manual_seed(0)
    config = hf._configuration(
        getattr(transformers, small(kind)["architectures"][0]), small(kind), ""
    )
    hf._without_cache(config)
    with hf._quiet():
        model = getattr(transformers, small(kind)["architectures"][0])._from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    model.eval()
    ids = torch.randint(1, 128, (2, 24))
    results = []
    for adapted in (False, True):
        tracing = hf.adapt(model)[0] if adapted else torch.enable_grad
        model.zero_grad()
        with tracing():
            logits = model(input_ids=ids).logits
            logits.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), grads))
    (eager, eager_grads), (ours, our_grads) = results
    torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-3)
    assert our_grads.keys() == eager_grads.keys()
    for name, grad in eager_grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=1e-4, rtol=1e-2, msg=name)


def test_patches_are_undone() -> None:
    model = source(small("mamba"))
    file = sys.modules[type(model.model).__module__]
    before = file.mamba_selective_scan
    with model.tracing():
        assert file.mamba_selective_scan is hf_patches.mamba_selective_scan
    assert file.mamba_selective_scan is before


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of one query at a time, with Python lists of what it sees."""
    out = torch.zeros(*q.shape[:3], v.shape[-1])
    for h in range(q.shape[1]):
        kv = h * k.shape[1] // q.shape[1]
        for i in range(q.shape[2]):
            seen = [j for j in range(i + 1) if window is None or i - j < window]
            seen = [j for j in seen if chunk is None or i // chunk == j // chunk]
            logits = torch.einsum("bd,bjd->bj", q[:, h, i], k[:, kv, seen]) * 0.3
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            top = logits.exp()
            bottom = top.sum(1) + (0 if sinks is None else sinks[h].exp())
            out[:, h, i] = torch.einsum("bj,bjd->bd", top, v[:, kv, seen]) / bottom[:, None]
    return out.transpose(1, 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 3}, {"softcap": 2.0}, {"chunk": 4}, {"sinks": True, "window": 5}],
    ids=str,
)
def test_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 10, d) for n, d in ((4, 8), (2, 8), (2, 6)))
    sinks = torch.randn(4) if options.pop("sinks", False) else None
    window, chunk, softcap = (options.get(n) for n in ("window", "chunk", "softcap"))
    tensors = [t.requires_grad_() for t in (q, k, v)]
    ours = ops.attention(q, k, v, None, sinks, 0.3, window, chunk, softcap, True, 0.0)
    theirs = naive(q, k, v, sinks, window, chunk, softcap)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    weight = torch.randn_like(ours)
    grads = [torch.autograd.grad((out * weight).sum(), tensors) for out in (ours, theirs)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_attention_equals_sdpa() -> None:
    q, k, v = (torch.randn(2, n, 9, 8) for n in (6, 2, 2))
    mask = torch.randn(1, 6, 9, 9)
    for causal, bias in ((True, None), (False, None), (False, mask), (False, mask > 0)):
        ours = ops.attention(q, k, v, bias, None, 0.4, None, None, None, causal, 0.0)
        theirs = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal, scale=0.4, enable_gqa=True
        )
        torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("used", [(0, 1, 2, 3, 4), (2, 4)])
def test_dispatch_and_combine_equal_a_loop_over_experts(used: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    hidden, bias = torch.randn(11, 6), torch.randn(5, 6)
    index = torch.stack([torch.tensor(used)[torch.randperm(len(used))[:2]] for _ in range(11)])
    weights = torch.rand(11, 2)
    for t in (hidden, bias, weights):
        t.requires_grad_()
    rows, offsets = ops.moe_experts_dispatch(hidden, index, 5)
    out = ops.moe_experts_combine(ops.moe_experts_bias(rows, bias, offsets), weights, index)
    expected = sum(weights[:, i, None] * (hidden + bias[index[:, i]]) for i in range(2))
    torch.testing.assert_close(out, expected)
    counts = [int((index == e).sum()) for e in range(5)]
    assert offsets.tolist() == [sum(counts[: e + 1]) for e in range(5)]
    leaves = (hidden, bias, weights)
    grads = [torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected)]
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_every_operator_is_one_node_each_way() -> None:
    """Shapes on meta agree with the CPU kernel, and a backward is an operator too."""
    assert set(torch_ops.NAMES) >= {"meshwright::attention", "meshwright::delta_rule"}
    x, w = torch.randn(2, 6, 12), torch.randn(6, 4)
    real = ops.causal_conv1d(x, w, None, "silu")
    fake = ops.causal_conv1d(x.to("meta"), w.to("meta"), None, "silu")
    assert real.shape == fake.shape and real.stride() == fake.stride()
    leaf = torch.randn(2, 6, 12, device="meta", requires_grad=True)
    out = ops.causal_conv1d(leaf, w.to("meta"), None, "")
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert grad.shape == leaf.shape and grad.is_meta


def sweep(only: list[str]) -> None:
    """Trace each causal language model at its default width, four layers deep, and tell."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for kind in only or sorted(names):
        name = names[kind] if isinstance(names[kind], str) else names[kind][0]
        config: dict[str, Any] = {"model_type": kind, "architectures": [name]}
        for depth in ({"num_hidden_layers": 4}, {}):
            try:
                model = source({**config, **depth})
                counts = [len(trace(model, *size)) for size in SIZES]
                print("pass" if counts[0] == counts[1] else "UNEQUAL", kind, counts, model.notes)
                break
            except Exception as error:
                failure = f"FAIL {kind} {type(error).__name__}: {str(error)[:120]!r}"
        else:
            print(failure)


if __name__ == "__main__":
    sweep(sys.argv[1:])
