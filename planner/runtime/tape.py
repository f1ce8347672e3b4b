"""A record of how tensors were made, so that one can be made again, alone and from a seed.

While a model is built, every torch function that makes or changes a tensor is noted, in order.
What has no values (meta) is carried through with its shape only. To make a tensor, the calls that
touch its memory, and the memory that those read, are replayed on real tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ir.errors import PlanError

# without values: a large tensor made while building is memory for nothing
LARGEST_REAL_ELEMENTS = 2**22
_LARGE = ("empty", "zeros", "ones", "full", "rand", "randn")
_UNFILLED = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
_FILLS = (
    "normal_", "uniform_", "zero_", "fill_", "constant_", "ones_", "zeros_", "kaiming_uniform_",
    "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "trunc_normal_", "orthogonal_", "eye_",
)  # fmt: skip
# what else initialisers do to a tensor in place: nothing to run where there are no values
_IN_PLACE = (
    *_FILLS, "erfinv_", "mul_", "add_", "sub_", "div_", "clamp_", "copy_", "bernoulli_", "dirac_",
    "sparse_",
)  # fmt: skip
# functions of a tensor's shape and type, not of its values
_ALIKE = (
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty",
    "new_zeros", "new_ones", "new_full", "new_tensor", "size", "dim",
)  # fmt: skip
_AUGMENTED = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__")


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A tensor on the tape. memory: equal for tensors that share it; numel: of the whole memory."""

    tape: Tape = field(repr=False)
    number: int
    memory: int

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())  # how a tensor was made is not saved with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One function. leaves: its arguments, tensors as `Made`; results: as `Made`, in order.

    written: the memory that it changed in place; fills: it gives all of that memory new values.
    """

    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: Any
    results: tuple[Made, ...]
    written: int | None
    fills: bool
    dtype: torch.dtype

    @property
    def touched(self) -> set[int]:
        return {m.memory for m in self.results} | ({self.written} - {None})  # type: ignore[operator]

    @property
    def unfilled(self) -> bool:
        """Whether it gives nothing a value: torch.empty, or a view."""
        name = self.function.__name__
        within = {x.memory for x in self.results} == self.read
        return name in _UNFILLED or (self.written is None and within)

    @property
    def read(self) -> set[int]:
        return {x.memory for x in self.leaves if isinstance(x, Made)}


class Tape:
    """Calls in order. A tensor knows its place: `made(tensor)`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.parameters: set[int] = set()  # memory of parameters
        self._touching: dict[int, list[int]] = {}
        self._count = 0

    def new(self, memory: int | None = None) -> Made:
        """A place for another tensor, in memory of its own where none is given."""
        self._count += 1
        return Made(self, self._count, self._count if memory is None else memory)

    def add(self, call: Call) -> None:
        for memory in sorted(call.touched):
            self._touching.setdefault(memory, []).append(len(self.calls))
        self.calls.append(call)

    def needed(self, memory: int) -> list[Call]:
        """The calls that the values in this memory come from, in order."""
        found: set[int] = set()
        wanted, seen = [memory], {memory}
        while wanted:
            for at in self._touching.get(wanted.pop(), ()):
                found.add(at)
                fresh = sorted(self.calls[at].read - seen)
                wanted += fresh
                seen.update(fresh)
        filled = [i for i in sorted(found) if self.calls[i].fills]
        if filled and seen == {memory}:  # what was there before it was filled for good
            found -= {i for i in found if i < filled[-1] and self.calls[i].written is not None}
        return [self.calls[i] for i in sorted(found)]

    def sources(self, memory: int) -> set[int]:
        """All memory that the values in this memory come from."""
        return {m for call in self.needed(memory) for m in call.touched | call.read}

    def note(
        self, function: Callable[..., Any], args: Any, kwargs: Any, run: Callable[..., Any]
    ) -> Any:
        """Run a function, on shapes only where an argument has no values, and write it down."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        hollow = any(isinstance(x, Tensor) and x.is_meta and made(x) for x in leaves)
        target = _target(function, args, kwargs)
        if hollow and target is not None and not target.is_meta:
            raise PlanError(
                f"{function.__name__} writes a parameter's values into a real tensor",
                why="inside planner.meta() parameters have none", hints=(BUILD_REAL,),
            )  # fmt: skip
        if not hollow and target is not None and made(target) is None:
            return run(*args, **kwargs)  # a tensor from elsewhere: its values are kept
        if hollow and target is not None and function.__name__ in _IN_PLACE:
            result: Any = target
        else:
            result = self._run(function, leaves, spec, run) if hollow else run(*args, **kwargs)
        found = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if not found and target is None:
            return result
        alike = function.__name__ in _ALIKE
        before = tuple(self._leaf(x, alike) for x in leaves)
        shared = {x.untyped_storage()._cdata: cast(Made, made(x)).memory
                  for x in leaves if isinstance(x, Tensor) and made(x)}  # fmt: skip
        results = []
        for x in found:
            known = made(x)
            if known is None or x is not target:
                known = self.new(shared.get(x.untyped_storage()._cdata))
                x._recorded = known  # type: ignore[attr-defined]
            results.append(known)
        written = cast(Made, made(target)).memory if target is not None else None
        whole = target is not None and (
            target.numel() * target.element_size() == target.untyped_storage().nbytes()
        )
        self.add(Call(
            function=function, leaves=before, spec=spec, results=tuple(results), written=written,
            fills=whole and function.__name__ in _FILLS, dtype=torch.get_default_dtype(),
        ))  # fmt: skip
        return result

    def given(self, values: Tensor) -> Made:
        """A place for a tensor whose values came from elsewhere; they are held."""
        known = made(values)
        if known is None:
            known = self.new()
            leaves, spec = pytree.tree_flatten(((values.detach(),), {}))
            self.add(Call(
                function=torch.clone, leaves=tuple(leaves), spec=spec, results=(known,),
                written=None, fills=False, dtype=values.dtype,
            ))  # fmt: skip
        return known

    def _leaf(self, x: Any, alike: bool) -> Any:
        if isinstance(x, Tensor) and alike:
            return torch.empty((), dtype=x.dtype).expand(x.shape)
        if isinstance(x, Tensor):
            return made(x) or x.detach()
        return None if isinstance(x, torch.Generator) else x

    def _run(
        self, function: Callable[..., Any], leaves: list[Any], spec: Any, run: Callable[..., Any]
    ) -> Any:
        shapes = [x.to("meta") if isinstance(x, Tensor) and not x.is_meta else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(shapes, spec)
        try:
            return run(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as fault:
            raise PlanError(
                f"{function.__name__} reads the values of a parameter while the model is built",
                why=f"inside planner.meta() it has none: {str(fault).splitlines()[0]}",
                hints=(BUILD_REAL,),
            ) from fault


BUILD_REAL = "build the model without planner.meta(): parallelize keeps real weights"


def made(tensor: Tensor) -> Made | None:
    """Where a tensor is on its tape; None where it was not recorded."""
    return tensor.__dict__.get("_recorded")


def large(function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a call of torch.empty and its like asks for more than anything looks at."""
    if getattr(function, "__name__", "") not in _LARGE or kwargs.get("device") is not None:
        return False
    size = kwargs.get("size", args[0] if args and isinstance(args[0], (tuple, list)) else args)
    return bool(torch.Size(n for n in size if isinstance(n, int)).numel() > LARGEST_REAL_ELEMENTS)


def _target(function: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
    """The tensor that a function changes in place."""
    name = getattr(function, "__name__", "")
    if kwargs.get("out") is not None:
        return kwargs["out"] if isinstance(kwargs["out"], Tensor) else None
    inside = name.endswith("_") and not name.endswith("__")
    if inside or name in _AUGMENTED:
        first = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        return first if isinstance(first, Tensor) and name != "requires_grad_" else None
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Makes recorded tensors. seed_of: memory -> the seed of its random numbers."""

    seed_of: Callable[[int], int]
    device: torch.device

    @torch.no_grad()
    def make(self, wanted: Made) -> Tensor:
        """The tensor's values now, as after the last recorded call. Unwritten ones are NaN."""
        held: dict[int, Tensor] = {}
        states: dict[int, Tensor] = {}
        with _random_kept(self.device), self.device:
            for call in wanted.tape.needed(wanted.memory):
                self._again(call, held, states)
        return held[wanted.number]

    def _again(self, call: Call, held: dict[int, Tensor], states: dict[int, Tensor]) -> None:
        leaves = [held[x.number] if isinstance(x, Made) else self._moved(x) for x in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        memory = call.written if call.written is not None else call.results[0].memory
        with _default_dtype(call.dtype), self._random(memory, states):
            result = call.function(*args, **kwargs)
        found = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if call.function.__name__ in _UNFILLED and found[0].is_floating_point():
            found[0].fill_(torch.nan)
        held.update((m.number, x) for m, x in zip(call.results, found))

    def _moved(self, x: Any) -> Any:
        if isinstance(x, torch.device):
            return self.device
        return x.to(self.device) if isinstance(x, Tensor) else x

    @contextlib.contextmanager
    def _random(self, memory: int, states: dict[int, Tensor]) -> Iterator[None]:
        """Each memory has a stream of random numbers of its own."""
        source: Any = torch.cuda if self.device.type == "cuda" else torch
        if memory in states:
            source.set_rng_state(states[memory])
        else:
            torch.manual_seed(self.seed_of(memory))
        yield
        states[memory] = source.get_rng_state()


@contextlib.contextmanager
def _random_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    if dtype.is_floating_point and dtype != before:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
