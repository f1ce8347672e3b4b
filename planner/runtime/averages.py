"""Statistics over tokens where a rank routes a share of them: load-balancing losses.

The forward of a routed module runs on this rank's tokens. What it reduces over them (the mean
probability of each expert, a router z-loss) is a statistic of all tokens: each such value is
averaged over the ranks that share the sequence. Which reductions these are, the graph says.
A count of tokens stays this rank's own while it is a whole number, since offsets are made of it;
the fraction made of it is averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as fc
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ir.errors import GateError
from planner.routed import REDUCTIONS, Reduction
from planner.runtime.meshes import Meshes

FUNCTIONS = frozenset(name for names in REDUCTIONS.values() for name in names)
STILL_COUNTS = ("cumsum", "clone", "contiguous", "detach")  # of counts that are held as floats


class Averages:
    """Follows one forward of a routed module, averaging its reductions over tokens."""

    def __init__(
        self, left: tuple[Reduction, ...], meshes: Meshes, batch: int, tokens: int
    ) -> None:
        """batch, tokens: the samples of a micro-batch and this rank's tokens of each."""
        self._left, self._meshes, self._sizes = list(left), meshes, (batch, tokens)

    def after(self, name: str, given: Any, made: Any) -> Any:
        """What the module goes on with, after a function of `FUNCTIONS`."""
        if not self._left or not isinstance(given, Tensor) or not isinstance(made, Tensor):
            return made
        due = self._left[0]
        if (
            name not in due.functions
            or tuple(given.shape) != due.given.sizes(*self._sizes)
            or tuple(made.shape) != due.made.sizes(*self._sizes)
        ):
            return made
        del self._left[0]
        if name in REDUCTIONS["histogram"] or not made.is_floating_point():
            if isinstance(made, FakeTensor):
                return made  # it can be no subclass, and has no values to be wrong
            counts = made.as_subclass(Counts)
            counts._meshes = self._meshes
            return counts
        return averaged(made, self._meshes)

    def finish(self, where: str) -> None:
        """Raise GateError where a reduction of the graph did not run."""
        if self._left:
            raise GateError(
                f"{self._left[0].node} of the plan's graph did not run in {where}",
                why="statistics over tokens are found by it; "
                f"each rank has {self._sizes[0]} x {self._sizes[1]} tokens under this plan",
                hints=("run the plan's own batch and sequence length",),
            )


class Counts(Tensor):
    """Whole numbers of this rank's tokens; fractions made of them are of all tokens."""

    _meshes: Meshes

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs or {}))
        counts = next(x for x in leaves if isinstance(x, Counts))
        args, kwargs = pytree.tree_unflatten(
            [x.as_subclass(Tensor) if isinstance(x, Counts) else x for x in leaves], spec
        )
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            held_as_float = counts.is_floating_point()

        def follow(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if x.is_floating_point() and not (
                held_as_float and getattr(func, "__name__", "") in STILL_COUNTS
            ):
                return averaged(x, counts._meshes)
            kept = x.as_subclass(Counts)
            kept._meshes = counts._meshes
            return kept

        return pytree.tree_map(follow, out)


def averaged(x: Tensor, meshes: Meshes) -> Tensor:
    """The mean of a value over the ranks that share a sequence: cp and tp."""
    made: Tensor = _Average.apply(x, meshes)
    return made


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, meshes: Meshes) -> Tensor:
        ctx.ways = meshes.tp.size()
        for mesh in (meshes.tp, meshes.cp):
            if mesh.size() > 1:
                x = fc.wait_tensor(fc.all_reduce(x / mesh.size(), "sum", mesh.get_group()))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The loss is one on all tp ranks, whose gradients are summed; cp ranks have a loss each,
        which data parallelism averages."""
        return grad / ctx.ways, None
