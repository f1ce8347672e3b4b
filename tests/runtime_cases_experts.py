"""Worker functions and models of test_runtime_experts: what each rank of a local world runs."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from planner.plan import Plan
from planner.runtime.parallelize import parallelize

WIDTH, HIDDEN, EXPERTS, VOCABULARY = 32, 48, 4, 64


class Mlp(nn.Module):
    def __init__(self, hidden: int = HIDDEN):
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden, bias=False)
        self.down = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Shared(nn.Module):
    """Stacked experts with gate and up in one matrix, a bias each, and a shared expert."""

    def __init__(self, biased: bool):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / HIDDEN**0.5)
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH)) if biased else None
        self.shared = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        weight, chosen = self.router(tokens).softmax(-1).topk(2, dim=-1)
        expert, order = chosen.flatten().sort(stable=True)
        ends = torch.histc(expert.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32)
        rows = torch._grouped_mm(tokens[order // 2], self.gate_up.transpose(1, 2), offs=ends)
        gate, up = rows.chunk(2, dim=-1)
        rows = torch._grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        if self.bias is not None:
            rows = rows + self.bias[expert]
        rows = (rows * weight.flatten()[order, None])[order.argsort()]
        return rows.view(-1, 2, WIDTH).sum(1).view_as(x) + self.shared(x)


class Listed(nn.Module):
    """Experts that are modules, each called for its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 1
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        weight, chosen = self.router(tokens).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            if len(token):
                out = out.index_add(0, token, expert(tokens[token]) * weight[token, place, None])
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, mixture: nn.Module):
        super().__init__()
        self.norm, self.mixture = nn.LayerNorm(WIDTH), mixture

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixture(self.norm(x))


class Small(nn.Module):
    def __init__(self, make: Any):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(make()) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def prediction(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def transformer(name: str) -> nn.Module:
    """A model of transformers from a small configuration, set to run its experts in a loop."""
    import transformers

    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "vocab_size": VOCABULARY, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts_per_tok": 2, "use_cache": False,
    }  # fmt: skip
    own = {
        "Mixtral": {"num_local_experts": 4},
        "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16},
    }
    config = getattr(transformers, f"{name}Config")(**sizes, **own[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.set_experts_implementation("eager")  # as some configurations ask
    return model


def from_transformers(outputs: Any, targets: Tensor) -> Tensor:
    return prediction(outputs.logits, targets)


def built(name: str) -> tuple[nn.Module, Any]:
    """A model and its loss, weights from the same seed everywhere; routers that decide."""
    torch.manual_seed(0)
    if name in ("Mixtral", "Qwen3Moe"):
        model, loss = transformer(name), from_transformers
    elif name == "moe":
        path = Path(__file__).parents[1] / "examples" / "moe.py"
        spec = importlib.util.spec_from_file_location("example_moe", path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        model, loss = module.build(size="tiny"), module.loss
    else:
        make = {"shared": lambda: Shared(False), "biased": lambda: Shared(True), "list": Listed}
        model, loss = Small(make[name]), prediction
    for path, parameter in model.named_parameters():
        if "router" in path or "gate.weight" in path:
            nn.init.normal_(parameter, std=0.5)
    return model, loss


def inputs(batch: int, seq_len: int) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}


class Sent(TorchDispatchMode):
    """Counts all-to-alls of rows; those of whole numbers say how many follow."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all" in str(func) and args[0].is_floating_point():
            self.count += 1
        return func(*args, **(kwargs or {}))


def compare(rank: int, cases: list[tuple[str, Plan]]) -> list[dict[str, Any]]:
    """One step of each model under its plan, against the whole model on the whole batch."""
    return [one(name, plan) for name, plan in cases]


def one(name: str, plan: Plan) -> dict[str, Any]:
    model, loss_fn = built(name)
    whole = copy.deepcopy(model)
    d, w = plan.decisions, plan.workload
    g = torch.Generator().manual_seed(1)
    ids, targets = (
        torch.randint(0, VOCABULARY, (w.global_batch, w.seq_len), generator=g) for _ in range(2)
    )
    pieces = sum(d.microbatches_by_data_rank)
    expected = 0.0
    for given, target in zip(ids.chunk(pieces), targets.chunk(pieces)):
        loss = loss_fn(whole(input_ids=given), target) / pieces
        loss.backward()
        expected += float(loss.detach())
    parallel = parallelize(model, plan)
    told: list[Any] = []
    parallel.on_expert_load(told.append)
    with Sent() as sent:
        loss = parallel.step({"input_ids": ids}, targets, loss_fn)
    theirs = dict(whole.named_parameters())
    worst = Counter[str]()
    for path, parameter in parallel.named_parameters():
        assert parameter.shape == theirs[path].shape, path
        grad = parameter.grad
        whole_grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        other = theirs[path].grad
        norm = max(float(other.norm()), 1e-12)
        worst[path] = float((whole_grad - other).norm()) / norm
    path, error = worst.most_common(1)[0]
    return {
        "loss": abs(float(loss) - expected) / abs(expected), "gradient": error, "at": path,
        "loads": told[0], "sent": sent.count,
        "held": {p: tuple(x.to_local().shape) for p, x in parallel.named_parameters()},
    }  # fmt: skip


def broken_router(rank: int, plan: Plan) -> tuple[Any, ...]:
    """The load of a model whose first router is not finite, and whose second has one choice."""
    model, loss_fn = built("moe")
    parallel = parallelize(model, plan)
    with torch.no_grad():
        for path, parameter in parallel.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if path == "layers.1.experts.router.weight":
                local.fill_(math.nan)
    ids = torch.zeros(plan.workload.global_batch, plan.workload.seq_len, dtype=torch.long)
    with contextlib.suppress(Exception):
        parallel.step({"input_ids": ids}, ids, loss_fn)
    return parallel.expert_load()
