"""What each rank runs in tests/test_runtime_context.py, and its models."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.runtime import gathered, ring
from planner.runtime.flash import additive
from planner.runtime.parallelize import parallelize
from planner.runtime.shares import Shares
from planner.runtime.ulysses import ulysses

EXAMPLES = Path(__file__).parents[1] / "examples"
VOCABULARY = 128
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0, "use_cache": False,
}  # fmt: skip
HF = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 12}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "bert": ("BertForMaskedLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 32,
                                          "num_experts_per_tok": 2}),
    "mamba2": ("Mamba2ForCausalLM", {"num_heads": 4, "head_dim": 32, "n_groups": 1}),
}  # fmt: skip


class Layer(nn.Module):
    """Attention of a kind that is asked for, then what `how` does to the tokens."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.norm = how, nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (4, 8)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        causal = mask is None and self.how != "both ways"
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        if self.how == "cumsum":
            x = x + x.cumsum(1)
        if self.how == "centred":
            x = x - x.mean(1, keepdim=True)
        if self.how == "largest":
            x = x / x.abs().amax(1, keepdim=True)
        if self.how == "previous":
            x = x + torch.roll(x, 1, 1)
        if self.how == "arange":
            x = x + torch.arange(x.shape[1], device=x.device)[:, None]
        if self.how == "scores":
            x = x + (x @ x.transpose(1, 2)).softmax(-1) @ x
        return x


class Tiny(nn.Module):
    """Layers between an embedding and a head; `how` also says what the forward does itself."""

    def __init__(self, how: str = ""):
        super().__init__()
        self.how = how
        self.embed, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.layers = nn.ModuleList(Layer(how) for _ in range(2))
        self.register_buffer("positions", torch.randn(512, 32), persistent=False)

    def forward(self, input_ids: Tensor) -> Any:
        x, length = self.embed(input_ids), input_ids.shape[1]
        if self.how == "buffer":
            x = x + self.positions[:length]
        mask = None
        if self.how == "mask":
            rows = torch.arange(length, device=x.device)
            mask = (rows[:, None] - rows).abs() < 5
        for layer in self.layers:
            x = layer(x, mask) if mask is not None else layer(x)
        if self.how == "first token":
            x = x[:, :1]
        if self.how == "penalty":
            return self.head(x), x.square().mean()
        if self.how == "squared mean":
            return self.head(x), x.mean().square()
        return self.head(x)


def model_of(name: str) -> nn.Module:
    """A model in fp32 by a test's name for it, the same on every rank."""
    torch.manual_seed(3)
    if name.startswith("tiny"):
        return Tiny(name.removeprefix("tiny").strip())
    if name.startswith("hf "):
        import transformers

        cls, more = HF[name.removeprefix("hf ").removesuffix(" eager")]
        built = getattr(transformers, cls)
        made = built.config_class.from_dict({**SMALL, **more})
        if name.endswith("eager"):
            made._attn_implementation = "eager"
        return built(made).train()
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].build(size="tiny")


def loss_of(outputs: Any, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the logits, and a tenth of what a model returns beside them."""
    logits = outputs[0] if isinstance(outputs, tuple) else getattr(outputs, "logits", outputs)
    more = outputs[1].mean() / 10 if isinstance(outputs, tuple) else 0
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten()) + more


def shifted_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def compare(rank: int, cases: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """For every (model, plan) one step beside the unsharded model: both losses, the worst
    gradient's relative error, and what was not compiled."""
    found = []
    for name, plan in cases:
        torch._dynamo.reset()
        d, w = plan.decisions, plan.workload
        draw = torch.Generator().manual_seed(1)
        ids, targets = torch.randint(0, VOCABULARY, (2, w.global_batch, w.seq_len), generator=draw)
        reference, expected = model_of(name), 0.0
        for one, target in zip(
            ids.chunk(d.dp * d.microbatches), targets.chunk(d.dp * d.microbatches)
        ):
            loss = loss_of(reference(input_ids=one), target) / (d.dp * d.microbatches)
            loss.backward()
            expected += loss.item()
        parallel = parallelize(model_of(name), plan, compile_backend="aot_eager")
        ours = parallel.step({"input_ids": ids}, targets, loss_of).item()
        whole = dict(reference.named_parameters())
        worst = 0.0
        for key, p in parallel.named_parameters():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            worst = max(worst, float((grad - whole[key].grad).norm() / whole[key].grad.norm()))
        found.append({"loss": abs(ours / expected - 1), "gradient": worst,
                      "uncompiled": dict(parallel.report.uncompiled)})  # fmt: skip
    return found


def attention(rank: int, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Each operator on shares of random tensors against attention of the whole; what it sent."""
    group = torch.distributed.group.WORLD
    assert group is not None
    ways, found = group.size(), []
    for case in cases:
        zigzag, causal, kind = case.get("zigzag", False), case.get("causal", False), case["kind"]
        shares = Shares(ways=ways, zigzag=zigzag)
        torch.manual_seed(5)
        heads, kv, length, size, size_v = case.get("sizes", (4, 2, 16, 8, 8))
        shapes = ((2, heads, length, size), (2, kv, length, size), (2, kv, length, size_v))
        whole = [torch.randn(s, requires_grad=True) for s in shapes]
        mask = torch.rand(2, 1, length, length) < 0.6 if case.get("mask") else None
        if mask is not None:
            mask = mask | torch.eye(length, dtype=torch.bool)
        seed = torch.randn(2, heads, length, size_v)
        out = F.scaled_dot_product_attention(
            *whole, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        out.backward(seed)
        mine = [shares.take(x.detach(), 2, rank).clone().requires_grad_() for x in whole]
        with counted() as sent:
            if kind == "ulysses":
                attend = functools.partial(
                    F.scaled_dot_product_attention, is_causal=causal, enable_gqa=True
                )
                result = ulysses(*mine, mask, group, attend)
            else:
                bias = None if mask is None else shares.take(additive(mask, out), -2, rank)
                if bias is not None and kind == "ring":
                    bias = torch.cat([shares.take(bias, -1, r) for r in range(ways)], -1)
                operator = ring.ring if kind == "ring" else gathered.gathered
                result = operator(*mine, bias, group.group_name, causal, zigzag, size**-0.5)[0]
            result.backward(shares.take(seed, 2, rank))
        pairs = [(result, out), *((a.grad, b.grad) for a, b in zip(mine, whole))]
        worst = max(float((a - shares.take(b, 2, rank)).norm() / b.norm()) for a, b in pairs)
        found.append({"error": worst, **sent})
    return found


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes of keys and values that the operators hand to the network, by what they say."""
    from planner.runtime.verify.record import Recorder

    found: dict[str, int] = {"sends": 0, "sent_bytes": 0, "said": 0, "said_bytes": 0}
    real = ring.Ring.pass_on

    def pass_on(self: ring.Ring, flat: Tensor) -> Any:
        found["sends"] += 1
        found["sent_bytes"] += flat.numel() * flat.element_size()
        return real(self, flat)

    recorder = Recorder(lambda group: None)
    with mock.patch.object(ring.Ring, "pass_on", pass_on), recorder:
        yield found
    for sent, count in recorder.counts.get(0, {}).items():
        found["said"] += count
        found["said_bytes"] += count * sent.size_bytes
