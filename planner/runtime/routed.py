"""The forward of a routed module, unmodified: router, sort, grouped matmuls, combine.

It runs on this rank's tokens as plain tensors. A torch-function mode around it sends rows to
their experts at the first grouped matmul, hands the code parameters as plain tensors, averages
statistics over tokens, and notes how many tokens each expert had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ir.errors import PlanError
from planner.routed import Reduction
from planner.runtime.averages import FUNCTIONS, Averages
from planner.runtime.context import Context
from planner.runtime.dispatch import Dispatched, PerExpert, home
from planner.runtime.exchange import Exchange, plan_exchange
from planner.runtime.health import Layer
from planner.runtime.meshes import Meshes
from planner.runtime.reshard import gradient_as, reshard

GROUPED = ("grouped_mm", "_grouped_mm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A routed module: its name in the model, its experts, the reductions over tokens in it, and
    its load. islands: modules in it that tensor parallelism runs (shared experts)."""

    path: str
    module: nn.Module
    experts: int
    reductions: tuple[Reduction, ...]
    islands: tuple[nn.Module, ...]
    layer: Layer


def run_routed(region: Region, context: Context, tokens: Tokens | None = None) -> None:
    """Patch the module's forward, so that it works on this rank's tokens and its experts.

    tokens: which are this rank's, where that is not its share of a sequence.
    """
    inner, tokens = region.module.forward, tokens or Tokens(context)
    decisions = context.plan.decisions
    running: list[Routing] = []
    for island in region.islands:
        _as_island(island, running, tokens)

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(tokens.enter, (args, kwargs))
        mode = Routing(region, context, tokens)
        running.append(mode)
        try:
            with mode:
                out = inner(*args, **kwargs)
        finally:
            running.pop()
        mode.averages.finish(region.path)
        return pytree.tree_map(tokens.leave, out)

    # how many rows an expert has is data: a compiled unit leaves its graph for this
    region.module.forward = torch._dynamo.disable(forward) if decisions.compile else forward


def _as_island(module: nn.Module, running: list[Routing], tokens: Tokens) -> None:
    """Around a tensor-parallel module inside: its values are DTensors again. Hooks, since its
    forward is patched by tensor parallelism later."""

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        running[-1].away += 1
        return pytree.tree_map(tokens.leave, (args, kwargs))

    def after(_: nn.Module, __: Any, out: Any) -> Any:
        out = pytree.tree_map(tokens.enter, out)
        running[-1].away -= 1
        return out

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


class Tokens:
    """This rank's share of the tokens of a micro-batch: their sequence is split over tp, whether
    or not the values around the routed module are."""

    def __init__(self, context: Context) -> None:
        d, workload = context.meshes.decisions, context.plan.workload
        self.mesh, self.split = context.meshes.tp, d.tp > 1
        self.batch, self.length = d.micro_batch, workload.seq_len // d.cp
        self.own = self.length // d.tp
        self.around = Shard(1) if d.sequence_parallel else Replicate()

    def enter(self, x: Any) -> Any:
        """A value as the routed module sees it: this rank's tokens, or the whole."""
        if not isinstance(x, DTensor) or x.device_mesh != self.mesh:
            return x
        flat = x.dim() > 1 and x.shape[0] == self.batch * self.length and self.batch > 1
        if flat:
            x = cast(DTensor, x.unflatten(0, (self.batch, self.length)))
        if x.dim() > 1 and x.shape[:2] == (self.batch, self.length):
            x = reshard(x, Shard(1), gradient_as(x.placements[0]))
            local = x.to_local(grad_placements=(Shard(1),))
            return local.flatten(0, 1) if flat else local
        if x.placements != (Replicate(),):
            x = reshard(x, Replicate(), gradient_as(x.placements[0]))
        return x.to_local(grad_placements=(Partial(),))

    def leave(self, x: Any) -> Any:
        """A result as the code around sees it: on the tp mesh, split on the sequence or whole."""
        if not self.split or not isinstance(x, Tensor):
            return x
        if isinstance(x, DTensor):
            return x
        if x.dim() > 1 and x.shape[:2] == (self.batch, self.own):
            made = DTensor.from_local(x, self.mesh, (Shard(1),), run_check=False)
            return made if self.around == Shard(1) else reshard(made, Replicate(), Shard(1))
        if x.dim() and x.shape[0] == self.batch * self.own:
            made = self.leave(x.unflatten(0, (self.batch, self.own)))
            return reshard(made, Replicate(), made.placements[0]).flatten(0, 1)
        return DTensor.from_local(x, self.mesh, (Replicate(),), run_check=False)


class Routing(TorchFunctionMode):
    """One forward of a routed module. away: how deep it is in islands, which are left alone."""

    def __init__(self, region: Region, context: Context, tokens: Tokens) -> None:
        super().__init__()
        self.away = 0
        self.averages = Averages(region.reductions, context.meshes, tokens.batch, tokens.own)
        self._region, self._meshes, self._tokens = region, context.meshes, tokens
        self._exchanges: list[tuple[Tensor, int, Exchange]] = []
        self._plain: dict[int, tuple[Tensor, Tensor]] = {}  # offsets as given, and as a tensor
        self._sent: dict[tuple[int, int], tuple[Tensor, Dispatched]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.away:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in GROUPED:
            return self._grouped(func, *args, **kwargs)
        if name == "__getitem__" and self._reads_experts(*args):
            return PerExpert(*args)
        if self._tokens.split and name != "__get__":
            args, kwargs = pytree.tree_map(self._tokens.enter, (args, kwargs))
        out = func(*args, **kwargs)
        if name == "topk":
            self._region.layer.routed(args[0], out[1])
        elif name in FUNCTIONS:
            out = self.averages.after(name, args[0] if args else None, out)
        return out

    def _reads_experts(self, table: Any, index: Any) -> bool:
        """Whether code takes a row of an expert table for each row."""
        return (
            isinstance(table, DTensor)
            and table.device_mesh != self._tokens.mesh
            and table.dim() == 2
            and isinstance(index, Tensor)
            and index.dim() == 1
        )

    def _grouped(
        self, func: Callable[..., Tensor], rows: Tensor, weight: Tensor, *rest: Any, **kwargs: Any
    ) -> Tensor:
        """A grouped matmul where its rows are, or on the ranks of its experts."""
        ends = rest[0] if rest else kwargs.pop("offs")
        ends = self._plain.setdefault(id(ends), (ends, ends.as_subclass(Tensor)))[1]
        self._region.layer.grouped(ends)
        if self._tokens.split:
            rows, weight = self._tokens.enter(rows), self._tokens.enter(weight)
        if not isinstance(weight, DTensor):
            rows = home(rows) if isinstance(rows, Dispatched) else rows
            return _matmul(func, rows, weight, ends, kwargs)
        exchange = self._exchange(ends, Tensor.size(rows, 0))
        if not isinstance(rows, Dispatched) or rows._exchange is not exchange:
            rows = self._dispatched(rows, ends, exchange)
        made = _matmul(func, rows._rows, weight.to_local(), exchange.ends, kwargs)
        lies = _split_over_etp(weight, self._meshes)
        if (lies == "partial") != (rows._lies == "split") or rows._lies == "partial":
            raise PlanError(
                f"the experts of {self._region.path} are not a chain of two matmuls",
                hints=("plan with --fix etp=1",),
            )
        return Dispatched(made, exchange, Tensor.size(rows, 0), lies)

    def _exchange(self, ends: Tensor, count: int) -> Exchange:
        for known, n, exchange in self._exchanges:
            if n == count and (known is ends or torch.equal(known, ends)):
                return exchange
        made = plan_exchange(ends, count, self._meshes.ep, self._meshes.etp)
        self._exchanges.append((ends, count, made))
        return made

    def _dispatched(self, rows: Tensor, ends: Tensor, exchange: Exchange) -> Dispatched:
        """Rows at their experts; the same rows are sent once."""
        if isinstance(rows, Dispatched):
            rows = home(rows)
        key = id(rows), id(exchange)
        if key not in self._sent:
            count = Tensor.size(rows, 0)
            made = Dispatched(exchange.there(rows), exchange, count, "whole")
            self._sent[key] = rows, made
        return self._sent[key][1]


def _split_over_etp(weight: DTensor, meshes: Meshes) -> str:
    """How the features of a product with weight [experts, k, n] lie over etp."""
    names = weight.device_mesh.mesh_dim_names or ()
    if "etp" not in names or meshes.etp.size() == 1:
        return "whole"
    at = cast(Shard, weight.placements[names.index("etp")]).dim
    return {1: "partial", 2: "split"}[at]


def _matmul(
    func: Callable[..., Tensor], rows: Tensor, weight: Tensor, ends: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """A grouped matmul that takes any gradient: the kernel takes no expanded one, as a sum gives.

    Fake tensors, where only shapes count, know it in bf16 alone.
    """
    if isinstance(rows, FakeTensor) and rows.dtype != torch.bfloat16:
        return rows @ weight[0]
    made = func(rows, weight, offs=ends, **kwargs)
    if made.requires_grad:
        made.register_hook(Tensor.contiguous)
    return made
