"""The examples: exact sizes, and that they train on a CPU at size tiny."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ir.capture.load import Source, load

EXAMPLES = Path(__file__).parents[1] / "examples"


def source(name: str, **args: str) -> Source:
    return load(str(EXAMPLES / f"{name}.py"), args)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def module(name: str) -> dict[str, object]:
    text = (EXAMPLES / f"{name}.py").read_text()
    scope: dict[str, object] = {"__name__": name}
    exec(compile(text, name, "exec"), scope)
    return scope


def transformer(d: int, layers: int, heads: int, kv: int, vocab: int, mlp: int) -> int:
    """Untied embedding and head, q k v o, two norms a layer and a last one. mlp: per layer."""
    attention = 2 * d * d + 2 * d * (d // heads * kv)
    return 2 * vocab * d + layers * (attention + mlp + 2 * d) + d


@pytest.mark.parametrize(
    ("size", "shape", "published"),
    [
        ("8b", (4096, 32, 32, 8, 14336), 8_030_261_248),
        ("70b", (8192, 80, 64, 8, 28672), 70_553_706_496),
        ("405b", (16384, 126, 128, 8, 53248), 405_853_388_800),
    ],
)
def test_llama_counts(size: str, shape: tuple[int, ...], published: int) -> None:
    d, layers, heads, kv, hidden = shape
    assert transformer(d, layers, heads, kv, 128256, 3 * d * hidden) == published
    assert parameters(source("llama", size=size).model) == published


def test_llama_1t_is_about_1e12() -> None:
    assert abs(parameters(source("llama", size="1t").model) / 1e12 - 1) < 0.03


@pytest.mark.parametrize(
    ("size", "d", "layers", "positions", "vocab"),
    [
        ("124m", 768, 12, 1024, 50257),
        ("1.5b", 1600, 48, 1024, 50257),
        ("7b", 4096, 32, 2048, 50304),
    ],
)
def test_gpt_counts(size: str, d: int, layers: int, positions: int, vocab: int) -> None:
    block = 4 * d * d + 8 * d * d + (3 * d + d + 4 * d + d) + 4 * d
    model = source("gpt", size=size).model
    assert parameters(model) == vocab * d + positions * d + layers * block + 2 * d
    assert model.lm_head.weight is model.wte.weight


def test_moe_counts() -> None:
    mlp = 8 * 3 * 4096 * 14336 + 8 * 4096
    assert transformer(4096, 32, 32, 8, 32000, mlp) == 46_702_792_704
    assert parameters(source("moe", size="8x7b").model) == 46_702_792_704
    assert 7.5e9 < parameters(source("moe", size="8b-a1b").model) < 8.5e9


def test_dit_and_resnet_counts() -> None:
    d, layers = 1152, 28
    block = (3 * d + 3) * d + (d + 1) * d + (8 * d + 5) * d + 6 * d * (d + 1)
    ends = (16 + 1) * d + 257 * d + (d + 1) * d + 1001 * d + 2 * d * (d + 1) + 32 * (d + 1)
    assert parameters(source("dit", size="xl/2").model) == layers * block + ends
    assert parameters(source("resnet", size="18").model) == 11_689_512
    assert parameters(source("resnet", size="50").model) == 25_557_032


@pytest.mark.parametrize("name", ["llama", "gpt", "moe", "dit", "resnet"])
def test_a_tiny_example_trains(name: str) -> None:
    scope = module(name)
    torch.manual_seed(0)
    model = scope["build"](size="tiny")
    inputs = scope["inputs"](2, 16)
    outputs = model(**inputs)
    targets = scope.get("targets", lambda b, s: torch.zeros(b, s, dtype=torch.long))(2, 16)
    loss = scope["loss"](outputs, targets)
    loss.backward()
    assert loss.isfinite() and loss.dim() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert [k for k in dict(model.named_modules()) if k == "layers"]


@pytest.mark.parametrize("name", ["llama", "gpt", "moe", "dit", "resnet"])
def test_an_example_traces_alike_at_two_sizes(name: str) -> None:
    tiny = source(name, size="tiny")
    counts = set()
    for batch, seq_len in ((2, 64), (3, 128)):
        with tiny.tracing():
            program = torch.export.export(tiny.model, (), tiny.inputs(batch, seq_len), strict=False)
        counts.add(len(program.graph.nodes))
    assert len(counts) == 1
    assert tiny.seq_in_input == (name not in ("dit", "resnet"))


@pytest.mark.parametrize("favourites", [(0, 1), (2, 5), None])
def test_moe_drops_no_token_and_takes_idle_experts(favourites: tuple[int, int] | None) -> None:
    """The grouped path equals a loop over experts; all tokens may want the same two."""
    torch.manual_seed(1)
    layer = module("moe")["Experts"](16, 32, 8, 2)
    x = torch.randn(3, 5, 16)
    if favourites is not None:
        with torch.no_grad():
            layer.router.weight.zero_()
            for rank, expert in enumerate(favourites):
                layer.router.weight[expert] = 1.0 + rank
        x = x.abs()
    out, losses = layer(x)

    tokens = x.flatten(0, 1)
    logits = tokens @ layer.router.weight.T
    probs = logits.softmax(-1)
    weights, chosen = probs.topk(2)
    expected = torch.zeros_like(tokens)
    for t, token in enumerate(tokens):
        for weight, e in zip(weights[t] / weights[t].sum(), chosen[t]):
            hidden = F.silu(token @ layer.w1[e]) * (token @ layer.w3[e])
            expected[t] += weight * (hidden @ layer.w2[e])
    torch.testing.assert_close(out.flatten(0, 1), expected, atol=1e-6, rtol=1e-4)

    share = torch.bincount(chosen.flatten(), minlength=8) / chosen.numel()
    balance = 8 * (share * probs.mean(0)).sum()
    z = torch.logsumexp(logits, -1).pow(2).mean()
    torch.testing.assert_close(losses, torch.stack([balance, z]))
    out.square().sum().backward()
    if favourites is not None:
        idle = [e for e in range(8) if e not in favourites]
        assert set(chosen.flatten().tolist()) == set(favourites)
        assert layer.w1.grad[idle].abs().sum() == 0
