"""Worker functions and models of test_runtime_pipeline: what each rank of a local world runs."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir.errors import PlanError
from planner.runtime import tied
from planner.runtime.parallelize import parallelize

VOCABULARY, WIDTH = 64, 32


class Mix(nn.Module):
    """A layer with a residual of its own, and a tuple around what it returns."""

    def __init__(self, several: bool):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.several = several

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Any:
        out = self.up(torch.tanh(self.norm(x)))
        out = out if gate is None else x + out * gate
        return (out, None) if self.several else out


class Outside(nn.Module):
    """Residuals between the units, in the model's own forward, one of them in place."""

    def __init__(self, n_layers: int = 3):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleList((Mix(False), Mix(False))) for _ in range(n_layers)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for first, second in self.layers:
            x = first(x) + x
            y = second(x)
            y += x
            x = y
        return self.head(x)


class Glue(nn.Module):
    """A head that is the embedding's weight, a parameter that every layer's glue reads, layers
    that return more than a tensor, and a dictionary as the result."""

    def __init__(self, n_layers: int = 4):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.gate = nn.Parameter(torch.randn(WIDTH))
        self.layers = nn.ModuleList(Mix(True) for _ in range(n_layers))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x, gate = self.embed(input_ids), self.gate.sigmoid()
        for layer in self.layers:
            x, _ = layer(x, gate)
        return {"logits": F.linear(self.norm(x), self.embed.weight)}


def loss(outputs: Any, targets: Tensor) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def example(name: str) -> tuple[nn.Module, Any]:
    """(a model in fp32, its loss) of a test's name for it; the same weights on every rank."""
    torch.manual_seed(0)
    if name == "outside":
        return Outside(), loss
    if name == "glue":
        return Glue(), loss
    if name == "hf":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=VOCABULARY, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config), loss
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(size="tiny", n_layers=4), module.loss


def batch_of(plan: Any) -> tuple[Tensor, Tensor]:
    w = plan.workload
    numbers = torch.randint(
        0, VOCABULARY, (2, w.global_batch, w.seq_len), generator=torch.Generator().manual_seed(1)
    )
    return numbers[0], numbers[1]


def relative(ours: Tensor, theirs: Tensor) -> float:
    ours = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
    return float((ours - theirs).norm() / theirs.norm())


def unsharded(model: nn.Module, ids: Tensor, targets: Tensor, parts: int, loss_fn: Any) -> float:
    """Forward and backward of the mean over equal parts of the batch; that mean."""
    total = 0.0
    for one, target in zip(ids.chunk(parts), targets.chunk(parts)):
        found = loss_fn(model(input_ids=one), target) / parts
        found.backward()
        total += float(found.detach())
    return total


def compare(rank: int, cases: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """For every (model, plan): two steps of AdamW against the unsharded model's.

    Gives per case the worst relative errors, the names that this rank holds, and, for parameters
    that it holds a copy of, their values after the steps.
    """
    found = []
    for name, plan in cases:
        model, loss_fn = example(name)
        reference, _ = example(name)
        ids, targets = batch_of(plan)
        parts = sum(plan.decisions.microbatches_by_data_rank)
        parallel = parallelize(model, plan)
        ours = torch.optim.AdamW(parallel.parameters(), lr=1e-2, eps=1e-3)
        theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, eps=1e-3)
        worst = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "parameter": 0.0}
        table = dict(reference.named_parameters(remove_duplicate=False))
        for _ in range(2):
            whole = unsharded(reference, ids, targets, parts, loss_fn)
            loss = parallel.step({"input_ids": ids}, targets, loss_fn)
            worst["loss"] = max(worst["loss"], abs(float(loss) - whole) / whole)
            for key, parameter in parallel.named_parameters():
                error = relative(parameter.grad, table[key].grad)
                worst["gradient"] = max(worst["gradient"], error)
            norm = float(nn.utils.clip_grad_norm_(reference.parameters(), 0.5))
            worst["norm"] = max(worst["norm"], abs(float(parallel.clip_grad_norm_(0.5)) / norm - 1))
            ours.step(), theirs.step()
            ours.zero_grad(), theirs.zero_grad()
        for key, parameter in parallel.named_parameters():
            error = relative(parameter.detach(), table[key].detach())
            worst["parameter"] = max(worst["parameter"], error)
        context = parallel._context
        shared = {
            owner[0]: parameter.full_tensor().tolist()
            for stage in parallel._stages
            for key, parameter in stage.module.named_parameters(remove_duplicate=False)
            for owner in [[s.copies[0][1] for s in _shared(plan) if (stage.index, key) in s.copies]]
            if owner
        }
        found.append(
            worst | {"names": [n for n, _ in parallel.named_parameters()], "shared": shared,
                     "duplicates": len(tied.duplicates(parallel._stages, context))}
        )  # fmt: skip
    return found


def _shared(plan: Any) -> Any:
    return tied.shared_parameters(plan.graph, plan.decisions.stages)


def differing_copies(rank: int, plan: Any) -> list[float]:
    """Copies that begin apart are made alike: the norms of a tied weight's copies, after that."""
    model, _ = example("gpt")
    parallel = parallelize(model, plan)
    with torch.no_grad():
        for parameter in parallel.parameters():
            parameter.add_(rank)
    tied.align(parallel._stages, parallel._context)
    names = {name for s in _shared(plan) for _, name in s.copies}
    return [float(p.full_tensor().norm()) for n, p in parallel.named_parameters() if n in names]


def crash(rank: int) -> None:
    ctypes.string_at(0)


def lose_a_rank(rank: int, plan: Any, heard: str) -> None:
    """The last rank dies in a step: the others must stop and say so."""
    model, _ = example("llama")
    parallel = parallelize(model, plan)
    ids, targets = batch_of(plan)

    def dying(outputs: Any, target: Any) -> Any:
        os._exit(1)

    try:
        parallel.step({"input_ids": ids}, targets, dying)
    except PlanError as fault:
        Path(heard).write_text(str(fault))


def with_batch_of(rank: int, plan: Any, seq_len: int) -> None:
    """A step on sequences of another length than planned."""
    model, loss_fn = example("llama")
    short = replace(plan, workload=replace(plan.workload, seq_len=seq_len))
    parallelize(model, plan).step({"input_ids": batch_of(short)[0]}, batch_of(short)[1], loss_fn)


def neighbours(rank: int, plan: Any) -> list[int]:
    """The ranks of this rank's pipeline, in the order of its stages."""
    import torch.distributed as dist

    from planner.runtime.meshes import make_meshes

    meshes = make_meshes(plan.decisions, "cpu")
    return dist.get_process_group_ranks(meshes.pp.get_group())


def not_loaded(rank, names):
    """Those of the modules that this worker was not forked with."""
    return [name for name in names if name not in sys.modules]


def world_of(rank, plan):
    """This process, the sum over its pipeline, how many groups there are."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    from planner.runtime.meshes import make_meshes

    total = torch.tensor(rank)
    dist.all_reduce(total, group=make_meshes(plan.decisions, "cpu").pp.get_group())
    return os.getpid(), int(total), len(_world.pg_map)


def compare_and_count(
    rank: int, cases: list[tuple[str, Any]]
) -> list[tuple[dict[str, Any], dict[int, int]]]:
    """`compare`, and what this rank sends to other stages in a step, piece by piece: bytes, times.
    """
    from planner.runtime.torch_stage import LineStage

    real, found = LineStage._sent, []
    for case in cases:
        sizes: Counter[int] = Counter()

        def counted(self: Any, *given: Any, sizes: Counter[int] = sizes) -> Any:
            made = real(self, *given)
            sizes.update(op.tensor.nbytes for op in made)
            return made

        LineStage._sent = counted
        try:
            (result,) = compare(rank, [case])  # of two steps
        finally:
            LineStage._sent = real
        found.append((result, {size: n // 2 for size, n in sizes.items()}))
    return found
