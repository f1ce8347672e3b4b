"""Worker functions of test_runtime_tensor: what each rank of a local world runs."""

from __future__ import annotations

import copy
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from planner.plan import Plan
from planner.runtime.parallelize import parallelize
from planner.runtime.parts import boxes_of, local_of


def example(name: str) -> Any:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Collectives(TorchDispatchMode):
    """Counts collectives by name, those of parameters over data ranks (c10d) apart."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if space in ("_c10d_functional", "c10d") and name != "wait_tensor":
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def own_part(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of a sharded tensor, and the same part of the whole one."""
    boxes = boxes_of(x)
    if not boxes:
        return torch.zeros(()), torch.zeros(())
    mine = [box.of_local(local_of(x)).flatten() for box in boxes]
    return torch.cat(mine), torch.cat([box.of_whole(reference).flatten() for box in boxes])


def run_beside(model: nn.Module, plan: Plan, batch: Any, targets: Any, loss_fn: Any) -> dict:
    """One step of the model under the plan, and of the model as it is on the same samples."""
    single = copy.deepcopy(model)
    expected = 0.0
    d = plan.decisions
    for rank in range(d.dp):
        for micro in range(d.microbatches):
            at = (rank * d.microbatches + micro) * d.micro_batch
            rows = slice(at, at + d.micro_batch)
            one = {k: v[rows] for k, v in batch.items()}
            out = single(**one)
            loss = loss_fn(out, targets[rows]) if loss_fn else out.loss
            loss = loss / (d.dp * d.microbatches)
            loss.backward()
            expected += float(loss.detach())
    parallel = parallelize(model, plan)
    own = loss_fn
    if loss_fn is None:
        inner = parallel.modules[0].forward
        parallel.modules[0].forward = lambda **kw: inner(**kw).loss
    with Collectives() as comm:
        loss = parallel.step(batch, targets, own)
    gradients = {n: p.grad for n, p in single.named_parameters() if p.grad is not None}
    worst, where = 0.0, ""
    for name, p in parallel.named_parameters():
        if name not in gradients:
            continue
        assert p.grad is not None, name
        assert p.grad.placements == p.placements, (name, p.grad.placements, p.placements)
        mine, theirs = own_part(p.grad, gradients[name])
        far = float((mine - theirs).norm() / gradients[name].norm())
        # a bias of keys has no gradient but noise
        if gradients[name].norm() > 1e-6 and far > worst:
            worst, where = far, name
    return {
        "loss": abs(float(loss) - expected) / abs(expected),
        "gradient": worst,
        "where": where,
        "replicated": dict(parallel.report.replicated),
        "loose": list(parallel.report.loose_edges),
        "collectives": dict(comm.found),
        "found": float(loss),
    }
