"""What ranks run in the tests of recomputation, offload, compilation, optimizers and clipping."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a compiler looks for it there
    spec.loader.exec_module(module)
    return module


class Counted(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def made(plan, name="llama", seed=0, **options):
    """(example, the model alone, the model in parallel, ids, targets) of a plan."""
    from planner.runtime.parallelize import parallelize

    module, w = example(name), plan.workload
    torch.manual_seed(seed)
    alone, model = module.build(size="tiny"), module.build(size="tiny")
    model.load_state_dict(alone.state_dict())
    draw = torch.Generator().manual_seed(1)
    ids, targets = (
        torch.randint(0, 256, (w.global_batch, w.seq_len), generator=draw) for _ in range(2)
    )
    return module, alone, parallelize(model, plan, **options), ids, targets


def loss_alone(module, alone, plan, ids, targets):
    """The mean of the loss over the plan's shares: a mixture's balance is of each share's own."""
    size = plan.decisions.micro_batch
    shares = list(zip(ids.split(size), targets.split(size)))
    return sum(module.loss(alone(i), t) for i, t in shares) / len(shares)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def worst(parallel, alone):
    """The largest ||g - g'|| / ||g|| of any parameter of this rank."""
    theirs = dict(alone.named_parameters(remove_duplicate=False))
    return max(
        float((whole(p.grad) - theirs[n].grad).norm() / theirs[n].grad.norm())
        for n, p in parallel.named_parameters()
    )


def step(rank, plan, options=None, name="llama"):
    """(relative error of the loss, worst gradient's, operations of a second step, reports)."""
    module, alone, parallel, ids, targets = made(plan, name, **(options or {}))
    loss_alone(module, alone, plan, ids, targets).backward()
    expected = loss_alone(module, alone, plan, ids, targets)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss = parallel.step(ids, targets, module.loss)
    error = worst(parallel, alone)
    for p in parallel.parameters():
        p.grad = None
    with nullcontext() if plan.decisions.compile else Counted() as mode:
        parallel.step(ids, targets, module.loss)
    again = worst(parallel, alone)
    return {
        "loss": abs(float(loss / expected.detach()) - 1), "grad": max(error, again),
        "calls": dict(mode.calls) if mode else {}, "uncompiled": dict(parallel.report.uncompiled),
        "said": [str(w.message) for w in said],
    }  # fmt: skip


def kept(rank, plan, options=None):
    """Bytes that a layer's second forward keeps for backward."""
    _, _, parallel, ids, _ = made(plan, **(options or {}))
    parallel.step(ids, ids, example("llama").loss)
    return kept_by(parallel, plan, ids)


def kept_by(parallel, plan, ids):
    """Bytes of the storages that the first layer's forward leaves to autograd or to a checkpoint,
    parameters and what all layers share left out."""
    from torch.utils.checkpoint import _VersionWrapper

    layer = parallel.modules[0].get_submodule("layers.0")
    cos, sin = parallel.modules[0].cos[: ids.shape[1]], parallel.modules[0].sin[: ids.shape[1]]
    x = torch.randn(plan.decisions.micro_batch, ids.shape[1], 64, requires_grad=True)
    gc.collect()
    before = {id(t) for t in gc.get_objects() if type(t) is _VersionWrapper}
    found = {}

    def pack(t):
        local = whole_local(t)
        found[local.untyped_storage()._cdata] = local
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = layer(x, cos, sin)
    for p in (*layer.parameters(), *layer.buffers(), cos, sin):
        found.pop(whole_local(p).untyped_storage()._cdata, None)
    fresh = (
        w.val for w in gc.get_objects() if type(w) is _VersionWrapper and id(w) not in before
    )
    cached = {
        t.untyped_storage()._cdata: t
        for t in (whole_local(v) for v in fresh if isinstance(v, torch.Tensor))
    }
    sizes = {k: t.untyped_storage().nbytes() for k, t in (found | cached).items()}
    out.sum().backward()
    return sum(sizes.values())


def whole_local(p):
    return p._local_tensor if hasattr(p, "_local_tensor") else p


def moved(rank, plan, options):
    """(bytes that the first layer leaves above, bytes that it holds below)."""
    from planner.runtime import offload

    module, _, parallel, ids, targets = made(plan, **options)
    sent = []
    send = offload.Host._send

    def noted(self, local):
        sent.append(local.untyped_storage().nbytes())
        return send(self, local)

    offload.Host._send = noted
    try:
        parallel.step(ids, targets, module.loss)
    finally:
        offload.Host._send = send
    above = kept_by(parallel, plan, ids) if not plan.decisions.compile else 0
    return above, sum(sent)


def trained(rank, plan, kind, folder=None, steps=3, options=None):
    """What three steps make of the parameters, whole, by name; and what the folder holds then."""
    module, _, parallel, ids, targets = made(plan)
    optimizer = parallel.optimizer(kind, folder=folder, **(options or {}))
    for _ in range(steps):
        optimizer.zero_grad()
        parallel.step(ids, targets, module.loss)
        optimizer.step()
    state = [
        t for held in optimizer.state.values() for t in held.values() if isinstance(t, torch.Tensor)
    ]
    left = os.listdir(folder) if folder else []
    mapped = [t for t in state if whole_local(t).untyped_storage().filename] if folder else []
    found = {n: whole(p.detach()).clone() for n, p in parallel.named_parameters()}
    return found, left, (len(mapped), len(state))


def in_files(rank, plan, folder):
    """What three steps make of the parameters, what is left in the folder, and how many of the
    parameters, or of the tensors that were saved for backward, lie in files."""
    from planner.runtime import offload

    module, _, parallel, ids, targets = made(plan, folder=folder)
    optimizer = parallel.optimizer(lr=1e-2)
    send, filed = offload.Host._send, []

    def noted(self, local):
        moved = send(self, local)
        filed.append(moved.host.untyped_storage().filename)
        return moved

    offload.Host._send = noted
    try:
        for _ in range(3):
            optimizer.zero_grad()
            parallel.step(ids, targets, module.loss)
            optimizer.step()
    finally:
        offload.Host._send = send
    filed += [whole_local(p).untyped_storage().filename for p in parallel.parameters()]
    found = {n: whole(p.detach()).clone() for n, p in parallel.named_parameters()}
    return found, os.listdir(folder) if folder else [], sum(map(bool, filed))


def trained_below(rank, plan, options):
    """What three steps make of the parameters; the modules that FSDP2 updates on the host, each of
    whose parameters the plan lays there."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    module, _, parallel, ids, targets = made(plan)
    optimizer = parallel.optimizer(**options)
    for _ in range(3):
        optimizer.zero_grad()
        parallel.step(ids, targets, module.loss)
        optimizer.step()
    hosted = [
        name for name, m in parallel.modules[0].named_modules() if hasattr(m, "_get_fsdp_state")
        for group in m._get_fsdp_state()._fsdp_param_groups
        if isinstance(group.offload_policy, CPUOffloadPolicy)
    ]
    return {n: whole(p.detach()).clone() for n, p in parallel.named_parameters()}, hosted


def alone_trained(plan, build, steps=3, name="llama"):
    """The same steps of the model alone; build makes its optimizers from its named parameters."""
    module, w = example(name), plan.workload
    torch.manual_seed(0)
    alone = module.build(size="tiny")
    draw = torch.Generator().manual_seed(1)
    ids, targets = (
        torch.randint(0, 256, (w.global_batch, w.seq_len), generator=draw) for _ in range(2)
    )
    optimizers = build(dict(alone.named_parameters()))
    for _ in range(steps):
        for o in optimizers:
            o.zero_grad()
        loss_alone(module, alone, plan, ids, targets).backward()
        for o in optimizers:
            o.step()
    return {n: p.detach() for n, p in alone.named_parameters()}


def resumed(rank, plan, folder):
    """Parameters after two steps, a round of the optimizer's state through its dictionary, and a
    third step; whether the loaded state is in files again."""
    module, _, parallel, ids, targets = made(plan)
    optimizer = parallel.optimizer("adamw", folder=folder, lr=1e-2, eps=1e-3)
    for i in range(3):
        optimizer.zero_grad()
        parallel.step(ids, targets, module.loss)
        if i == 2:
            old = optimizer
            optimizer = parallel.optimizer("adamw", folder=folder, lr=1e-2, eps=1e-3)
            optimizer.load_state_dict(old.state_dict())
        optimizer.step()
    mapped = all(
        bool(whole_local(t).untyped_storage().filename)
        for held in optimizer.state.values() for t in held.values()
        if isinstance(t, torch.Tensor) and whole_local(t).nbytes >= 4096
    )  # fmt: skip
    return {n: whole(p.detach()).clone() for n, p in parallel.named_parameters()}, mapped


def clipped(rank, plan, name, max_norm, norm_type, poison=None):
    """(norm told, gradients after, norm of the model alone, its gradients after), or the error."""
    module, alone, parallel, ids, targets = made(plan, name)
    loss_alone(module, alone, plan, ids, targets).backward()
    parallel.step(ids, targets, module.loss)
    named = dict(parallel.named_parameters())
    if poison is not None:
        for model in (alone, None):
            p = dict(alone.named_parameters())["layers.0.ffn_norm.weight"] if model else (
                named.get("layers.0.ffn_norm.weight")
            )
            if p is not None:
                whole_local(p.grad).fill_(poison)
        try:
            parallel.clip_grad_norm_(max_norm, norm_type=norm_type, error_if_nonfinite=True)
        except Exception as fault:
            return str(fault), float(parallel.clip_grad_norm_(max_norm, norm_type=norm_type))
        return "no error", 0.0
    mine = float(parallel.clip_grad_norm_(max_norm, norm_type=norm_type))
    theirs = float(torch.nn.utils.clip_grad_norm_(alone.parameters(), max_norm, norm_type))
    return mine, theirs, worst(parallel, alone)


def no_backend(graph, inputs):
    raise RuntimeError("this compiler compiles nothing")


def compiled(rank, plan, backend):
    """`step` with a compiler that starts anew, and how many graphs it made."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    found = step(rank, plan, {"compile_backend": backend})
    return found, counters["stats"]["unique_graphs"]
