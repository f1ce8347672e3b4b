"""Routed experts apart: some on the device, by how often tokens ask for them, the rest below.

A stack of experts stays one parameter with its name and shape; taking one of them (as a loop over
the experts that tokens hit does) fetches that expert. An expert that is asked for more often than
the least asked for of those on the device takes its place; any other is brought for this once, or
multiplied where it lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from planner.runtime.serve.bytes import Block
from planner.runtime.serve.lent import Spec, views
from planner.runtime.serve.packed import Packed

aten = torch.ops.aten


@dataclass(slots=True)
class Asked:
    """How experts were found: on the device, brought, or multiplied on the host; bytes brought."""

    resident: int = 0
    brought: int = 0
    on_host: int = 0
    moved_bytes: int = 0


@dataclass(slots=True, eq=False)
class Experts:
    """The experts of one routed module, `slots` of them on the device and one more for a moment.

    names, specs: the parameters of one expert. blocks: each expert's bytes. compute: experts that
    are not on the device are multiplied on the host, for `rows` tokens at most.
    """

    names: tuple[str, ...]
    specs: tuple[Spec, ...]
    blocks: Sequence[Block]
    device: torch.device
    slots: int
    compute: bool
    rows: int = 0
    report: Asked = field(default_factory=Asked)
    counts: Counter[int] = field(default_factory=Counter)
    _memory: list[Tensor] = field(default_factory=list)
    _held: dict[int, int] = field(default_factory=dict)  # expert -> slot
    _passing: int = -1  # the expert in the slot for a moment
    _host: Tensor | None = None

    def __post_init__(self) -> None:
        size = self.blocks[0].size_bytes
        extra = not self.compute and self.slots < len(self.blocks)
        self._memory = [
            torch.empty(size, dtype=torch.uint8, device=self.device)
            for _ in range(self.slots + extra)
        ]
        for expert in range(self.slots):
            self._bring(expert, expert)
            self._held[expert] = expert

    @property
    def held_bytes(self) -> int:
        """On the device."""
        return sum(m.numel() for m in self._memory)

    def take(self, name: str, expert: int) -> Tensor:
        """A weight of an expert, on the device or standing for one on the host."""
        at = self.names.index(name)
        if at == 0:
            self.counts[expert] += 1
        slot = self._held.get(expert)
        if slot is not None:
            self.report.resident += at == 0
            return self._weight(at, slot)
        if expert == self._passing:
            return self._weight(at, self.slots)
        slot = self._least_asked_for(expert)
        if slot is None and self.compute:
            self.report.on_host += at == 0
            return on_host(self._below(expert)[at], self.device, self.rows)
        if slot is None:
            slot, self._passing = self.slots, -1
        self._bring(expert, slot)
        self.report.brought += 1
        if slot == self.slots:
            self._passing = expert
        else:
            self._held[expert] = slot
        return self._weight(at, slot)

    def _least_asked_for(self, expert: int) -> int | None:
        """The slot of the expert on the device that is asked for least, if less than this one."""
        if not self._held:
            return None
        least = min(self._held, key=lambda e: (self.counts[e], e))
        return self._held.pop(least) if self.counts[least] < self.counts[expert] else None

    def _weight(self, at: int, slot: int) -> Tensor:
        return views(self.specs, self._memory[slot])[at]

    def _bring(self, expert: int, slot: int) -> None:
        block, memory = self.blocks[expert], self._memory[slot]
        self.report.moved_bytes += block.size_bytes
        if self.device.type == "cpu":
            block.read(memory)
        else:
            memory.copy_(self._bytes(expert), non_blocking=True)

    def _bytes(self, expert: int) -> Tensor:
        """An expert's bytes in host memory, read from its file where they are in one."""
        block = self.blocks[expert]
        if block.host is not None:
            return block.host
        host = torch.empty(block.size_bytes, dtype=torch.uint8)
        block.read(host)
        return host

    def _below(self, expert: int) -> list[Tensor]:
        return views(self.specs, self._bytes(expert))


class Stack(torch.Tensor):
    """A parameter (experts, ..) of which any expert can be taken, wherever it lies."""

    experts: Experts
    which: str

    @staticmethod
    def __new__(cls, experts: Experts, name: str) -> Stack:
        spec = experts.specs[experts.names.index(name)]
        made: Stack = torch.Tensor._make_wrapper_subclass(
            cls, (len(experts.blocks), *spec.shape), dtype=spec.dtype, device=experts.device,
            requires_grad=False,
        )  # fmt: skip
        made.experts, made.which = experts, name
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Stack({self.which}, {list(self.shape)})"

    def whole(self) -> Tensor:
        """All experts at once, for a forward that does not take one at a time."""
        taken = [self.experts.take(self.which, i) for i in range(self.shape[0])]
        return torch.stack([x.whole() if isinstance(x, OnHost | Packed) else x.clone()
                            for x in taken])  # fmt: skip

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, Stack):
            if func in (aten.detach.default, aten.alias.default):
                return Stack(first.experts, first.which)
            if func is aten.select.int and args[1] % first.dim() == 0:
                return first.experts.take(first.which, int(args[2]) % first.shape[0])
        args, kwargs = pytree.tree_map_only(Stack, Stack.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


class OnHost(torch.Tensor):
    """A weight (n, k) in host memory that is multiplied there: what it meets goes down, the
    result comes up. rows: for more of them the weight comes up instead, 0 being never. flipped: it
    stands for its transpose."""

    held: Tensor
    rows: int
    flipped: bool

    @staticmethod
    def __new__(
        cls, held: Tensor, device: torch.device, rows: int = 0, flipped: bool = False
    ) -> OnHost:
        shape = held.shape if not flipped else (*held.shape[:-2], held.shape[-1], held.shape[-2])
        made: OnHost = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=held.dtype, device=device, requires_grad=False
        )
        made.held, made.rows, made.flipped = held, rows, flipped
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnHost({list(self.shape)}, {self.dtype})"

    def few(self, func: Any, args: Any) -> bool:
        """Whether so few rows meet it that the host multiplies them."""
        if not self.rows or func is aten.embedding.default:
            return True
        given = args[1] if func is aten.addmm.default else args[0]
        return bool(given.numel() // given.shape[-1] <= self.rows)

    def whole(self) -> Tensor:
        """The weight on the device."""
        found = self.held.whole() if isinstance(self.held, Packed) else self.held
        return (found.mT if self.flipped else found).to(self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        weight = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, OnHost))
        if func in (aten.detach.default, aten.alias.default):
            return OnHost(weight.held, weight.device, weight.rows, weight.flipped)
        if func is aten.t.default:
            return OnHost(weight.held, weight.device, weight.rows, not weight.flipped)
        if func in _ON_HOST and weight.few(func, args):
            below = pytree.tree_map_only(torch.Tensor, _down, (args, kwargs or {}))
            return func(*below[0], **below[1]).to(weight.device)
        args, kwargs = pytree.tree_map_only(OnHost, OnHost.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


_ON_HOST = (
    aten.mm.default, aten.addmm.default, aten.linear.default, aten.embedding.default,
)  # fmt: skip


def _down(x: Tensor) -> Tensor:
    if isinstance(x, OnHost):
        return x.held.t() if x.flipped else x.held
    return x.to("cpu")


def on_host(weight: Tensor, device: torch.device, rows: int = 0) -> OnHost:
    """A weight in host memory as one that a module on the device can read."""
    return OnHost(weight, device, rows)


def stacked(experts: Experts) -> list[Stack]:
    """What stands for the parameters of the routed module, in the order of their names."""
    return [Stack(experts, name) for name in experts.names]
