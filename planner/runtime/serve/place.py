"""Put every weight of a model on its tier in its format, one at a time, and patch what streams.

Nothing of the user's forward changes: a resident weight is a parameter as any, a streamed one is
put in its module while its unit runs, an expert of a stack is fetched as the forward takes it, and
one that is multiplied on the host stands in its place as a parameter whose products run there.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ir.errors import UsageError
from planner.runtime.serve.bytes import Block, Extent, block_of, give_back
from planner.runtime.serve.lent import Place, lent, parameter, views
from planner.runtime.serve.loader import Loader, Weight
from planner.runtime.serve.ring import Ring
from planner.runtime.serve.stacks import Experts, on_host, stacked


@dataclass(slots=True)
class Loaded:
    """What lies where now, and what moves it; rings and experts count what they move."""

    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    rings: list[Ring] = field(default_factory=list)
    experts: dict[str, Experts] = field(default_factory=dict)


@dataclass(slots=True)
class _Placing:
    """Weights being placed. made: parameters that stay, which tied units share; shared: blocks of
    streamed weights that several units read."""

    loader: Loader
    device: torch.device
    tied: frozenset[str]
    loaded: Loaded = field(default_factory=Loaded)
    made: dict[str, nn.Parameter] = field(default_factory=dict)
    shared: dict[str, Block] = field(default_factory=dict)
    streams: list[tuple[nn.Module, list[Weight], Block]] = field(default_factory=list)

    def unit(self, path: str, module: nn.Module, weights: Sequence[Weight]) -> None:
        routed: dict[str, list[Weight]] = {}
        below: dict[tuple[str, str, str], list[Weight]] = {}
        stacks = {module_of(w.name) for w in weights if w.tensor.dim() >= 3}
        for w in weights:
            if w.name in self.made:
                w.put(self.made[w.name])
            elif w.laid.tier == "gpu":
                self._resident(w)
            elif w.laid.experts is not None:
                routed.setdefault(_routed_in(w, stacks), []).append(w)
            else:
                alone = w.name if w.name in self.tied else ""
                below.setdefault((w.laid.tier, w.laid.how, alone), []).append(w)
        for where, stack in routed.items():
            self._experts(stack, where)
        for (tier, how, alone), some in below.items():
            if how == "compute":
                self._compute(some, path)
            else:
                self._stream(module, some, alone, f"{path}.{alone or tier}")

    def _stream(self, module: nn.Module, some: list[Weight], alone: str, path: str) -> None:
        block = self.shared.get(alone) if alone else None
        if block is None:
            block = self._block(self.loader.extents(some, False, path)[0])
            self._count(some, block.size_bytes)
            if alone:
                self.shared[alone] = block
        self.streams.append((module, some, block))

    def _block(self, extents: Sequence[tuple[Extent, ...]]) -> Block:
        return block_of([e for row in extents for e in row], pinned=self.device.type != "cpu")

    def _count(self, weights: Sequence[Weight], size_bytes: int) -> None:
        if weights[0].laid.tier == "cpu":
            self.loaded.host_bytes += size_bytes
        else:
            self.loaded.disk_bytes += size_bytes

    def _resident(self, w: Weight) -> None:
        parts = [p.to(self.device) for p in w.spec.parts_of(self.loader.value(w))]
        self.loaded.device_bytes += sum(w.spec.sizes_bytes)
        self.made[w.name] = made = w.wrapped(w.spec.made_of(parts))
        w.put(made)

    def _compute(self, weights: Sequence[Weight], path: str) -> None:
        """Weights that are multiplied in host memory."""
        if any(w.laid.tier != "cpu" for w in weights):
            raise UsageError(f"{weights[0].name} cannot be multiplied on {weights[0].laid.tier}",
                             hints=("tier cpu, or stream it",))  # fmt: skip
        block = self._block(self.loader.extents(weights, False, path)[0])
        assert block.host is not None
        self.loaded.host_bytes += block.size_bytes
        for w, held in zip(weights, views([w.spec for w in weights], block.host), strict=True):
            up = on_host(held, self.device, w.laid.rows) if held.dim() > 1 else held.to(self.device)
            self.made[w.name] = made = w.wrapped(up)
            w.put(made)

    def _experts(self, weights: Sequence[Weight], where: str) -> None:
        """The experts of one routed module: stacked parameters, or a module for each of them."""
        apart = _apart(weights, where)
        if apart:
            rows = [self.loader.extents(one, False, f"{where}.{i}")[0]
                    for i, one in enumerate(apart)]  # fmt: skip
            names = tuple(w.name[len(where) + 1 :].partition(".")[2] for w in apart[0])
            specs = tuple(w.spec for w in apart[0])
        else:
            rows = self.loader.extents(weights, True, where)
            names = tuple(w.name.rpartition(".")[2] for w in weights)
            specs = tuple(w.spec.row for w in weights)
        blocks, first = [self._block(row) for row in rows], weights[0].laid
        self._count(weights, sum(b.size_bytes for b in blocks))
        experts = Experts(
            names=names, specs=specs, blocks=blocks, device=self.device,
            slots=min(first.experts or 0, len(blocks)), compute=first.how == "compute",
            rows=first.rows,
        )  # fmt: skip
        self.loaded.device_bytes += experts.held_bytes
        self.loaded.experts[where] = experts
        if apart:
            for index, one in enumerate(apart):
                _fetched(experts, index, one)
            return
        for w, made in zip(weights, stacked(experts), strict=True):
            w.put(w.wrapped(made))


def member_of(name: str) -> str | None:
    """The innermost member of a list of modules that a parameter is in: "experts.3"."""
    parts = name.split(".")
    number = next((i for i in range(len(parts) - 1, 0, -1) if parts[i].isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def module_of(name: str) -> str:
    """The module that a parameter, or the list that a module, is in."""
    return name.rpartition(".")[0]


def _routed_in(w: Weight, stacks: set[str]) -> str:
    """Where the experts of a parameter are: its module, where that has stacks of them, or the list
    of experts' modules."""
    own = module_of(w.name)
    return own if own in stacks else module_of(member_of(w.name) or "")


def _apart(weights: Sequence[Weight], where: str) -> list[list[Weight]]:
    """Weights by expert where each is a module of a list; none where they are stacked."""
    if any(w.tensor.dim() >= 3 for w in weights):
        return []
    found: dict[int, list[Weight]] = {}
    for w in weights:
        found.setdefault(int(w.name[len(where) + 1 :].split(".")[0]), []).append(w)
    return [found[i] for i in sorted(found)]


def _fetched(experts: Experts, index: int, weights: Sequence[Weight]) -> None:
    """Patch an expert's module so that its weights are fetched as it runs."""
    places = [place for w in weights for place in w.places]
    after = [w.wrapped(w.spec.placeholder()) for w in weights]
    for w, empty in zip(weights, after, strict=True):
        w.put(empty)
    module = weights[0].expert
    assert module is not None
    forward = module.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [parameter(experts.take(name, index)) for name in experts.names]
        with lent(places, given, after):
            return forward(*args, **kwargs)

    module.forward = run


def place_all(
    units: Sequence[tuple[str, nn.Module, Sequence[Weight]]], loader: Loader,
    device: torch.device, *, slots: int = 2,
) -> Loaded:  # fmt: skip
    """Place the weights of every unit: (path, module, weights), in the order that they run. A
    weight that several units read is in each, with the places of that unit."""
    names = Counter(name for _, _, weights in units for name in {w.name for w in weights})
    tied = frozenset(name for name, count in names.items() if count > 1)
    placing = _Placing(loader, device, tied)
    for path, module, weights in units:
        placing.unit(path, module, weights)
        give_back()
    loaded = placing.loaded
    if placing.streams:
        loaded.rings.append(_stream(placing.streams, device, slots))
        loaded.device_bytes += loaded.rings[0].held_bytes
    return loaded


def _stream(
    streams: Sequence[tuple[nn.Module, Sequence[Weight], Block]], device: torch.device, slots: int
) -> Ring:
    """Patch the units so that each waits for its block and hands it on."""
    ring = Ring([block for _, _, block in streams], device, slots)
    by_module: dict[nn.Module, list[int]] = {}
    for index, (module, _, _) in enumerate(streams):
        by_module.setdefault(module, []).append(index)
    empty: dict[str, nn.Parameter] = {}
    for _, some, _ in streams:
        for w in some:  # tied ones stay one
            empty.setdefault(w.name, w.wrapped(w.spec.placeholder()))
            w.put(empty[w.name])
    for module, indices in by_module.items():
        module.forward = _around(module.forward, [
            (index, *_lending(streams[index][1], ring, empty)) for index in indices
        ], ring)  # fmt: skip
    return ring


Lending = tuple[list[Place], Callable[[int], list[nn.Parameter]], list[nn.Parameter]]


def _lending(weights: Sequence[Weight], ring: Ring, empty: Mapping[str, nn.Parameter]) -> Lending:
    """Where weights are put, what they are in a slot, and what stands there in between."""
    places = [place for w in weights for place in w.places]
    times = [len(w.places) for w in weights]
    specs = [w.spec for w in weights]

    @functools.cache
    def given(slot: int) -> list[nn.Parameter]:
        made = [w.wrapped(x) for w, x in zip(weights, views(specs, ring.memory(slot)), strict=True)]
        return _repeated(made, times)

    return places, given, _repeated([empty[w.name] for w in weights], times)


def _repeated(one_each: Iterable[nn.Parameter], times: Iterable[int]) -> list[nn.Parameter]:
    return [p for p, n in zip(one_each, times, strict=True) for _ in range(n)]


def _around(
    forward: Callable[..., Any], lendings: Sequence[tuple[int, Any, Any, Any]], ring: Ring
) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for index, places, given, after in lendings:
                slot = stack.enter_context(ring.use(index))
                stack.enter_context(lent(places, given(slot), after))
            return forward(*args, **kwargs)

    return run
