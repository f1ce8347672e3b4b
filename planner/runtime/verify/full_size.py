"""One rank of a plan at its full size, in one process: what it holds and what it sends in a step.

A fake process group stands for all ranks: this process is one of them, its collectives send
nothing, and its tensors have shapes but no memory. The plan is applied as `parallelize` applies it.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import set_checkpoint_early_stop

from cost_models.decisions import Decisions
from ir.errors import PlanError
from planner.plan import Plan
from planner.runtime.lines import lines
from planner.runtime.meshes import Meshes
from planner.runtime.parallel import LossFn, Parallel
from planner.runtime.parallelize import parallelize
from planner.runtime.verify.listed import run_as_captured
from planner.runtime.verify.record import Recorder, nbytes

Axes = tuple[str, ...]  # what a process group may be, in the ledger's words
Made = Callable[[int, int], Any]  # of (batch, seq_len)
# what they hold of a parameter is as large as it: of a rank's part they are asked without DTensor,
# whose ways to lay every operation of an update out take as long as a step
BY_ELEMENT = (torch.optim.AdamW, torch.optim.SGD)


@dataclass(slots=True)
class Seen:
    """What one rank held, in bytes, and sent.

    local: its parameters as they are at rest; whole: gathered copies of parameters, gradients:
    both at their most; optimizer: its state after a step. sent: collectives of a step, by the
    axes that the group may be, kind and bytes.
    """

    local: int = 0
    whole: int = 0
    gradients: int = 0
    optimizer: int = 0
    sent: Counter[tuple[Axes, str, int]] = field(default_factory=Counter)


def look_at(
    plan: Plan, pp_rank: int, model: nn.Module, inputs: Made, targets: Made | None, loss: LossFn
) -> Seen:
    """Run a step as the first rank of a pipeline rank; the model is not changed.

    Of many micro-batches a few are run, since all but the first and the last are alike: where
    there is no pipeline three, the one between counting for all of them; else as few as the
    schedule takes and then one more, what that adds counting for every other one.
    Raises PlanError in a process that has a process group already.
    """
    if dist.is_initialized():
        raise PlanError(
            "this process has a process group already",
            why="a plan is looked at on a fake group of its size",
            hints=("in a process of its own",),
        )
    d = plan.decisions.at_data_rank(0)
    runs: tuple[tuple[int, int], ...] = ((d.microbatches, 1),)  # (micro-batches, times it counts)
    few = {"zbh1": d.pp, "dualpipev": 2 * d.pp}.get(d.schedule, 2)
    if d.pp > 1 and d.microbatches > 2 * few + 1:
        more = d.microbatches - few
        runs = ((few, 1 - more), (few + 1, more))
    elif d.pp == 1 and d.microbatches > 3:
        runs = ((3, 1),)
    total: Counter[tuple[Axes, str, int]] = Counter()
    for count, times in runs:
        # a compiled unit is repeated to its end, an eager one while backward needs it
        ends = set_checkpoint_early_stop(not d.compile)
        with _fake_group(d.gpus, _first_rank(d, pp_rank)), ends:
            seen = _run(_shortened(plan, count), model, inputs, targets, loss,
                        between=d.microbatches - 2, updates=(count, times) == runs[-1])  # fmt: skip
        for key, found in seen.sent.items():
            total[key] += times * found
    seen.sent = Counter({key: count for key, count in total.items() if count})
    return seen


def _first_rank(d: Decisions, pp_rank: int) -> int:
    """The first rank of a pipeline rank; none of its stage sends more."""
    if d.tp_by_part:
        return lines(d)[0][pp_rank][0]
    return pp_rank * d.pipeline // d.pp


@contextlib.contextmanager
def _fake_group(world: int, rank: int) -> Iterator[None]:
    """This process as one rank of a world whose others do not exist; nothing is left of it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    make = DeviceMesh.__init__

    def outside(self: DeviceMesh, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():  # a mesh looks at the numbers in it
            make(self, *args, **kwargs)

    _clear_sharding_prop_cache()  # may hold a mesh of other groups
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    DeviceMesh.__init__ = outside  # type: ignore[method-assign]
    try:
        yield
    finally:
        DeviceMesh.__init__ = make  # type: ignore[method-assign]
        dist.destroy_process_group()
        _clear_sharding_prop_cache()


def _shortened(plan: Plan, microbatches: int) -> Plan:
    """The plan with so many micro-batches, eager: compilation changes neither bytes nor sends;
    and 1f1b, which takes no fewer than pp, has gpipe's in another order."""
    d = plan.decisions
    schedule = "gpipe" if d.schedule == "1f1b" and microbatches < d.pp else d.schedule
    shares = tuple(replace(share, microbatches=microbatches) for share in d.shares)
    return replace(
        plan,
        decisions=replace(
            d, microbatches=microbatches, schedule=schedule, compile=False, formats=(),
            shares=shares,
        ),
        workload=replace(plan.workload, global_batch=d.micro_batch * microbatches * d.dp),
    )  # fmt: skip


def _run(
    plan: Plan, model: nn.Module, inputs: Made, targets: Made | None, loss: LossFn, *,
    between: int, updates: bool,
) -> Seen:  # fmt: skip
    """A step of this process's rank. between: what the second of three micro-batches counts.
    updates: whether the optimizer's state is looked at too."""
    d, w = plan.decisions, plan.workload
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    ours = _without_memory(model, fake)
    run_as_captured(ours, plan.graph)
    # nothing is written to the folder: fake tensors have no bytes
    parallel = parallelize(ours, plan, device="cpu", folder=tempfile.gettempdir())
    at_rest = list(parallel.parameters())
    seen, known = Seen(local=_bytes_of(at_rest)), set(map(id, at_rest))
    groups = _groups(parallel.meshes)
    # else whole gradients are those of a unit or two, on their way
    accumulates = d.pp > 1 or (d.zero < 2 and d.microbatches > 1)

    roots = [(m, list(m.parameters())) for m in parallel.modules]
    # each stage's at their most: with more micro-batches than are run they are there at once
    gradients = [0] * len(roots)

    def look() -> None:
        copies = [p for m in parallel.modules for p in m.parameters() if id(p) not in known]
        seen.whole = max(seen.whole, _bytes_of(copies))
        for i, (root, own) in enumerate(roots):
            gradients[i] = max(gradients[i], _gradient_bytes(root, own, accumulates))

    def before(group: str) -> None:
        if {"dp", "edp", "pp"} & set(groups.get(group, ())):
            look()

    recorder = Recorder(before)

    def next_microbatch(*_: Any) -> None:
        recorder.phase += 1

    def watched(outputs: Any, target: Any) -> Tensor:
        look()
        return loss(outputs, target)

    if d.pp == 1:
        parallel.modules[0].register_forward_pre_hook(next_microbatch, prepend=True)
    samples = d.micro_batch * d.microbatches
    with fake:
        batch = _on_cpu(inputs(samples, w.seq_len))
        classes = torch.zeros(samples, w.seq_len, dtype=torch.int64)
        target = classes if targets is None else _on_cpu(targets(samples, w.seq_len))
    with fake, recorder:
        parallel.step(batch, target, watched)
    look()
    seen.gradients = sum(gradients)
    seen.optimizer = _optimizer_bytes(parallel, fake) if updates else 0
    for phase, found in recorder.counts.items():
        times = between if phase == 2 and d.pp == 1 and d.microbatches == 3 else 1
        for sent, count in found.items():
            group = dist.distributed_c10d._resolve_process_group(GroupName(sent.group))  # type: ignore[attr-defined]
            if group.size() > 1:
                axes = groups.get(sent.group) or (_axis_by_ranks(group, parallel.meshes),)
                seen.sent[axes, sent.kind, sent.size_bytes] += times * count
    return seen


def _without_memory(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A copy whose parameters have shapes on the CPU and no memory; real buffers stay."""
    memo: dict[int, Any] = {}
    with fake:
        for p in model.parameters():
            empty = torch.empty(p.shape, dtype=p.dtype)
            memo[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
        for b in model.buffers():
            memo[id(b)] = torch.empty(b.shape, dtype=b.dtype) if b.is_meta else b
    return copy.deepcopy(model, memo)


def _on_cpu(value: Any) -> Any:
    """The same nested value, its tensors of the same shapes on the CPU."""
    return pytree.tree_map_only(Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), value)


# --- what is held ------------------------------------------------------------------------------


def _local(value: Tensor) -> Tensor:
    return value._local_tensor if isinstance(value, DTensor) else value


def _bytes_of(values: Sequence[Tensor]) -> int:
    """Bytes of the storages under these tensors, padding included, each once."""
    storages = (_local(v).untyped_storage() for v in values)
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def _gradient_bytes(root: nn.Module, at_rest: Sequence[Tensor], waiting: bool) -> int:
    """A stage's gradients as they are now: reduced ones, and whole ones that wait."""
    found = [p.grad for p in at_rest if p.grad is not None]
    sharded = (m for m in root.modules() if waiting and isinstance(m, FSDPModule))
    for group in (g for m in sharded for g in m._get_fsdp_state()._fsdp_param_groups):
        for p in group.fsdp_params:
            # what is accumulated in another dtype than it comes in is a tensor of its own
            own = p.unsharded_accumulated_grad
            if own is None and getattr(p, "reduce_dtype", None) is None:
                own = getattr(getattr(p, "_unsharded_param", None), "grad", None)
            found += [] if own is None else [own]
    return _bytes_of(found)


def _optimizer_bytes(parallel: Parallel, fake: FakeTensorMode) -> int:
    """State after one step of the plan's optimizer, counters of steps left out."""
    optimizer = parallel.optimizer()
    with fake:
        if type(optimizer) in BY_ELEMENT:
            for group in optimizer.param_groups:
                group["params"] = [_own_part(p) for p in group["params"]]
        optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values()]
    return sum(nbytes(_local(v)) for v in states if isinstance(v, Tensor) and v.dim())


def _own_part(parameter: Tensor) -> nn.Parameter:
    """What this rank holds of a parameter and of its gradient, as a parameter."""
    own = nn.Parameter(_local(parameter).detach(), requires_grad=False)
    own.grad = None if parameter.grad is None else _local(parameter.grad)
    return own


# --- over which axis ---------------------------------------------------------------------------


def _groups(meshes: Meshes) -> dict[str, Axes]:
    """The axes that each process group of the meshes is one of."""
    named = [
        ("tp", meshes.tp), ("tp", meshes.axes["tp"]), ("cp", meshes.cp), ("ep", meshes.ep),
        ("etp", meshes.etp), ("pp", meshes.pp), ("pp", meshes.root["pp"]), ("dp", meshes.dp),
        ("dp", meshes.root["replicate"]), ("dp", meshes.root["shard"]),
        ("edp", meshes.expert_root["expert_replicate"]),
        ("edp", meshes.expert_root["expert_shard"]),
    ]  # fmt: skip
    found: dict[str, Axes] = {}
    if meshes.line is not None:
        found[str(meshes.line.group.group_name)] = ("pp",)
    for axis, mesh in named:
        name = str(mesh.get_group().group_name)
        found[name] = tuple(dict.fromkeys((*found.get(name, ()), axis)))
    return found


def _axis_by_ranks(group: dist.ProcessGroup, meshes: Meshes) -> str:
    """The axes along which a group's ranks differ: "dp", "cp.tp"."""
    ranks = torch.tensor(dist.get_process_group_ranks(group))
    order = meshes.axes.mesh.flatten().argsort()[ranks - meshes.axes.mesh.min()]
    places = torch.unravel_index(order, tuple(meshes.axes.mesh.shape))
    differ = [int(at.min()) != int(at.max()) for at in places]
    words = [axis for axis, more in zip(("pp", "dp", "cp", "tp"), differ) if more]
    return "dp" if words in (["dp"], ["cp"], ["dp", "cp"]) else ".".join(words)
