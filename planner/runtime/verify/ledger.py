"""What a plan predicts against what its ranks would do, in one process, at the plan's full size.

A fake process group stands for all ranks: this process is one of them, its collectives send
nothing, and its tensors have shapes but no memory. The plan is applied to the model as
`parallelize` applies it, a step is run, and what is held and sent is compared with the ledger.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from cost_models.engines import load_engine
from cost_models.ledger import RankLedger
from cost_models.state import mode_of
from ir.errors import PlanError
from planner.plan import Plan, load_cluster, recost
from planner.routed import expert_count, routed_modules
from planner.runtime.meshes import Meshes
from planner.runtime.parallel import LossFn, Parallel
from planner.runtime.parallelize import parallelize
from planner.runtime.verify.record import Recorder, nbytes

# micro-batches that are run where there is no pipeline: the first, one between, and the last;
# those between are alike, so that the one stands for all of them
RUN_MICROBATCHES = 3
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison. what: a kind of collective, counted a step, of size_bytes each over `axis`;
    or a kind of state ("parameters", "gradients", "optimizer"), in bytes, without an axis.

    where: what the plan says it is for. reason: why a difference is as it should be.
    """

    pp_rank: int
    what: str
    axis: str
    size_bytes: int
    where: str
    planned: int
    found: int
    reason: str = ""

    @property
    def equal(self) -> bool:
        return self.planned == self.found

    def __str__(self) -> str:
        size = f" of {self.size_bytes:,} bytes over {self.axis}" if self.axis else " bytes"
        told = f" ({self.where})" * bool(self.where) + f": {self.reason}" * bool(self.reason)
        return (
            f"pp rank {self.pp_rank}: {self.what}{size}: planned {self.planned:,}, "
            f"found {self.found:,}{told}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerResult:
    """Every comparison that was made, of one rank of each pipeline rank that was looked at."""

    rows: tuple[Row, ...]

    @property
    def differences(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.equal)

    @property
    def equal(self) -> bool:
        """Whether every difference has its reason."""
        return all(row.reason for row in self.differences)


@dataclass(slots=True)
class Held:
    """Bytes that a rank was seen to hold: `local`, its parameters as they are at rest; `whole`,
    gathered copies of parameters at the end of a forward; gradients at their most; the
    optimizer's state after a step."""

    local: int = 0
    whole: int = 0
    gradients: int = 0
    optimizer: int = 0


def check_ledger(
    plan: Plan,
    model: nn.Module,
    inputs: Callable[[int, int], Any],
    loss: LossFn,
    *,
    targets: Callable[[int, int], Any] | None = None,
    pp_ranks: Sequence[int] | None = None,
    folder: Path = Path(),
) -> LedgerResult:
    """Compare the plan's ledger with a step on a fake process group of the plan's size.

    model: as `planner.meta()` builds it; it is not changed. inputs and targets: of (batch,
    seq_len), as `plan trace` takes them; targets are class numbers [batch, seq_len] by default.
    pp_ranks: which to look at, by default the first, one in the middle and the last.
    Raises PlanError in a process that has a process group already.
    """
    if dist.is_initialized():
        raise PlanError(
            "this process has a process group already",
            why="the ledger is checked on a fake group of the plan's size",
            hints=("check it in a process of its own",),
        )
    d = plan.decisions
    estimate = recost(plan, load_cluster(plan, folder))
    rows: list[Row] = []
    for pp_rank in pp_ranks or sorted({0, d.pp // 2, d.pp - 1}):
        with _fake_group(d.gpus, pp_rank * d.gpus // d.pp):
            sent, held = _run(plan, model, inputs, targets, loss)
        ledger = estimate.ranks[pp_rank]
        rows += [*_state_rows(plan, ledger, held), *_sent_rows(plan, ledger, sent)]
    return LedgerResult(rows=tuple(rows))


@contextlib.contextmanager
def _fake_group(world: int, rank: int) -> Iterator[None]:
    """This process as one rank of a world whose others do not exist; nothing is left of it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    make = DeviceMesh.__init__

    def outside(self: DeviceMesh, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():  # a mesh looks at the numbers in it
            make(self, *args, **kwargs)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    DeviceMesh.__init__ = outside  # type: ignore[method-assign]
    try:
        yield
    finally:
        DeviceMesh.__init__ = make  # type: ignore[method-assign]
        dist.destroy_process_group()


# --- running -----------------------------------------------------------------------------------


def _run(
    plan: Plan,
    model: nn.Module,
    inputs: Callable[[int, int], Any],
    targets: Callable[[int, int], Any] | None,
    loss: LossFn,
) -> tuple[Counter[tuple[tuple[str, ...], str, int]], Held]:
    """(collectives of a step by (axes it may be, kind, bytes), state) of this process's rank."""
    short, weights = _shortened(plan)
    d, w = short.decisions, short.workload
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    parallel = parallelize(_without_memory(model, fake), short, device="cpu")
    at_rest = list(parallel.parameters())
    held, known = Held(local=_bytes_of(at_rest)), set(map(id, at_rest))
    groups = _groups(parallel.meshes)
    # else whole gradients are those of a unit or two, on their way
    accumulates = d.pp > 1 or (d.zero < 2 and d.microbatches > 1)

    def look() -> None:
        copies = [p for m in parallel.modules for p in m.parameters() if id(p) not in known]
        held.whole = max(held.whole, _bytes_of(copies))
        found = _gradient_bytes(parallel.modules if accumulates else (), at_rest)
        held.gradients = max(held.gradients, found)

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
        target = _on_cpu(
            torch.zeros(samples, w.seq_len, dtype=torch.int64)
            if targets is None
            else targets(samples, w.seq_len)
        )
    with fake, recorder:
        parallel.step(batch, target, watched)
    look()
    held.optimizer = _optimizer_bytes(plan, parallel, fake)
    counts: Counter[tuple[tuple[str, ...], str, int]] = Counter()
    for phase, found in recorder.counts.items():
        for sent, count in found.items():
            if dist.get_world_size(_group(sent.group)) > 1:
                axes = groups.get(sent.group) or (_axis_by_ranks(sent.group, parallel.meshes),)
                counts[axes, sent.kind, sent.size_bytes] += count * weights.get(phase, 1)
    return counts, held


def _shortened(plan: Plan) -> tuple[Plan, dict[int, int]]:
    """The plan with as many micro-batches as need be run, eager; how often each counts."""
    d = plan.decisions
    count, weights = d.microbatches, {}
    if d.pp == 1 and count > RUN_MICROBATCHES:
        count, weights = RUN_MICROBATCHES, {2: d.microbatches - 2}
    return replace(
        plan,
        decisions=replace(d, microbatches=count, compile=False),
        workload=replace(plan.workload, global_batch=d.micro_batch * count * d.dp),
    ), weights


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
    return pytree.tree_map_only(
        Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype, device="cpu"), value
    )


# --- what is held ------------------------------------------------------------------------------


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _bytes_of(values: Sequence[Tensor]) -> int:
    """Bytes of the storages under these tensors, each once."""
    storages = {_local(v).untyped_storage()._cdata: _local(v).untyped_storage() for v in values}
    return sum(s.nbytes() for s in storages.values())


def _gradient_bytes(roots: Sequence[nn.Module], at_rest: Sequence[Tensor]) -> int:
    """Gradients as they are now: reduced ones, and in these modules whole ones that wait."""
    found = [p.grad for p in at_rest if p.grad is not None]
    for module in (m for root in roots for m in root.modules()):
        for group in module._get_fsdp_state()._fsdp_param_groups if _is_sharded(module) else ():
            for p in group.fsdp_params:
                # what is accumulated in another dtype than it comes in is a tensor of its own
                own = p.unsharded_accumulated_grad
                if own is None and getattr(p, "reduce_dtype", None) is None:
                    own = getattr(getattr(p, "_unsharded_param", None), "grad", None)
                found += [] if own is None else [own]
    return _bytes_of(found)


def _is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def _optimizer_bytes(plan: Plan, parallel: Parallel, fake: FakeTensorMode) -> int:
    """State after one step, counters of steps left out; 0 for an optimizer that torch has not."""
    make = OPTIMIZERS.get(plan.workload.optimizer)
    if make is None:
        return 0
    optimizer = make([p for p in parallel.parameters() if p.requires_grad])
    with fake:
        optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values()]
    return sum(nbytes(_local(v)) for v in states if isinstance(v, Tensor) and v.dim())


def _state_rows(plan: Plan, ledger: RankLedger, held: Held) -> list[Row]:
    """Parameters, gradients and optimizer state: where whole copies are kept for the step, they
    are the parameters and the local shards the optimizer's."""
    mode = mode_of(plan.decisions, load_engine(plan.workload.engine))
    kept = mode.parameters_peak == "whole"
    found = {
        "parameters": held.whole if kept else held.local,
        "gradients": held.gradients,
        "optimizer": held.optimizer + (held.local if kept else 0),
    }
    planned = dict(ledger.memory_bytes)
    return [
        Row(pp_rank=ledger.pp_rank, what=what, axis="", size_bytes=0, where="",
            planned=planned[what], found=size)
        for what, size in found.items()
    ]  # fmt: skip


# --- what is sent ------------------------------------------------------------------------------


def _groups(meshes: Meshes) -> dict[str, tuple[str, ...]]:
    """The axes, in the ledger's words, that each process group of the meshes is one of."""
    named = [
        ("tp", meshes.tp), ("tp", meshes.axes["tp"]), ("cp", meshes.cp), ("ep", meshes.ep),
        ("etp", meshes.etp), ("pp", meshes.pp), ("pp", meshes.root["pp"]), ("dp", meshes.dp),
        ("dp", meshes.root["replicate"]), ("dp", meshes.root["shard"]),
        ("edp", meshes.expert_root["expert_replicate"]),
        ("edp", meshes.expert_root["expert_shard"]),
    ]  # fmt: skip
    found: dict[str, tuple[str, ...]] = {}
    for axis, mesh in named:
        name = str(mesh.get_group().group_name)
        found[name] = tuple(dict.fromkeys((*found.get(name, ()), axis)))
    return found


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[no-any-return]


def _axis_by_ranks(name: str, meshes: Meshes) -> str:
    """The axes along which a group's ranks differ: "dp", "cp.tp"."""
    shape = tuple(meshes.axes.mesh.shape)
    ranks = torch.tensor(dist.get_process_group_ranks(_group(name)))
    places = torch.unravel_index(ranks, shape)
    words = [a for a, at in zip(("pp", "dp", "cp", "tp"), places) if len(at.unique()) > 1]
    return "dp" if words in (["dp"], ["cp"], ["dp", "cp"]) else ".".join(words)


def _sent_rows(
    plan: Plan, ledger: RankLedger, sent: Counter[tuple[tuple[str, ...], str, int]]
) -> list[Row]:
    """Planned and found collectives side by side, by kind, axis and size."""
    planned: Counter[tuple[str, str, int]] = Counter()
    where: dict[tuple[str, str, int], list[str]] = {}
    for c in ledger.collectives:
        key = (c.kind, c.axis, c.size_bytes)
        planned[key] += c.count
        where.setdefault(key, []).append(c.where)
    found: Counter[tuple[str, str, int]] = Counter()
    for (axes, kind, size), count in sent.items():
        keys = [(kind, axis, size) for axis in axes]
        found[next((key for key in keys if key in planned), keys[0])] += count
    small = _unplanned(plan)
    return [
        Row(pp_rank=ledger.pp_rank, what=key[0], axis=key[1], size_bytes=key[2],
            where=", ".join(where.get(key, ())), planned=planned[key], found=found[key],
            reason="" if planned[key] else small.get((key[0], key[2]), ""))
        for key in dict.fromkeys([*planned, *sorted(found)])
    ]  # fmt: skip


def _unplanned(plan: Plan) -> dict[tuple[str, int], str]:
    """Why a collective (kind, bytes) is sent that the ledger leaves out: a few numbers each."""
    d = plan.decisions
    found = {
        ("all_reduce", 4): "the mean loss, one fp32",
        ("all_reduce", 8): "how many targets count, one int64 a micro-batch",
    }
    for unit in plan.graph.units:
        for path in routed_modules(unit):
            counts = 8 * expert_count(unit, path)
            told = "rows for each expert, int64, so that ranks know what they get"
            found["all_to_all", counts] = told
            found["all_gather", counts * d.etp] = told
    return found
