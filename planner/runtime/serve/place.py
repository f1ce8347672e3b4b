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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ir.errors import PlanError, UsageError
from planner.runtime.parts import boxes_of, local_of
from planner.runtime.serve.bytes import Block, Extent, InMemory, as_bytes, block_of
from planner.runtime.serve.lent import Place, Spec, lent, parameter, views
from planner.runtime.serve.ring import Ring
from planner.runtime.serve.spool import Originals, Spool
from planner.runtime.serve.stacks import Experts, on_host, stacked
from planner.runtime.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """Where a parameter lies and in what format.

    word: a format, "" for the model's own. tier: "gpu", or what is below: "cpu" is host memory,
    any other a folder's disk. how: "resident", "stream" or "compute" (on the host). experts: of a
    routed module's parameters how many experts stay on the device. rows: tokens up to which the
    host multiplies; for more the weight comes up, 0 being never.
    """

    word: str = ""
    tier: str = "gpu"
    how: str = "resident"
    experts: int | None = None
    rows: int = 0


@dataclass(slots=True)
class Loaded:
    """What lies where now, and what moves it; rings and experts count what they move."""

    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    rings: list[Ring] = field(default_factory=list)
    experts: dict[str, Experts] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter, where the model holds it: every place that reads it. expert: the module of
    the expert it is part of, where each has one."""

    name: str
    places: tuple[Place, ...]
    tensor: nn.Parameter
    laid: Laid
    expert: nn.Module | None = None

    @property
    def local(self) -> Tensor:
        return local_of(self.tensor)

    @functools.cached_property
    def spec(self) -> Spec:
        return Spec.of(self.local.shape, self.local.dtype, self.laid.word)

    def put(self, made: nn.Parameter) -> None:
        for place in self.places:
            place.put(made)

    def wrapped(self, weight: Tensor) -> nn.Parameter:
        """A weight of this rank as the parameter that the model reads."""
        if isinstance(self.tensor, DTensor):
            weight = DTensor(weight, self.tensor._spec, requires_grad=False)
        return parameter(weight)


class Loader:
    """Values of weights: the model's own, or those of the files, a weight at a time."""

    def __init__(self, sources: Mapping[str, Source], folder: Path | None) -> None:
        self.sources, self._folder, self._originals = sources, folder, Originals()

    @torch.no_grad()
    def value(self, w: Weight) -> Tensor:
        """This rank's part of a weight, in host memory or where the model held it."""
        if not w.local.is_meta:
            return w.local.detach()
        if w.name not in self.sources:
            raise PlanError(f"{w.name} has no values", hints=(
                "planner.serve(model, plan, weights=FOLDER) reads them",))  # fmt: skip
        found = torch.empty(w.local.shape, dtype=w.local.dtype)
        for box in boxes_of(w.tensor):
            part = self.sources[w.name].read(list(zip(box.offsets, box.sizes)))
            box.of_local(found).copy_(part)
        return found

    def extents(
        self, weights: Sequence[Weight], rows: bool, path: str
    ) -> list[list[tuple[Extent, ...]]]:
        """Of each row (an expert of a stack; one row where these are no stacks) the extents of each
        weight, below the device."""
        disk = weights[0].laid.tier != "cpu"
        found: dict[tuple[str, int], tuple[Extent, ...]] = {}
        counts = {w.name: w.local.shape[0] if rows else 1 for w in weights}
        specs = {w.name: w.spec.row if rows else w.spec for w in weights}
        if disk:
            found |= self._originally(weights, specs, rows, counts)
        left = [w for w in weights if (w.name, 0) not in found]
        spool = None
        if disk and left:
            if self._folder is None:
                raise UsageError(
                    f"{left[0].name} is to lie on {left[0].laid.tier}, and no file has it as"
                    " planned",
                    hints=("planner.serve(.., folder=DIR): it is written there, packed, once",),
                )
            spool = Spool(self._folder / f"{path or 'model'}.safetensors",
                          {w.name: [specs[w.name]] * counts[w.name] for w in left})  # fmt: skip
        for w in left:
            value = self.value(w)
            for row in range(counts[w.name]):
                parts = specs[w.name].parts_of(value[row] if rows else value)
                if spool is not None:
                    spool.write(w.name, row, parts)
                else:
                    found[w.name, row] = tuple(InMemory(as_bytes(_own(p))) for p in parts)
            _empty(w)
        if spool is not None:
            found |= spool.finish()
        return [[found[w.name, row] for w in weights] for row in range(counts[weights[0].name])]

    def _originally(
        self, weights: Sequence[Weight], specs: Mapping[str, Spec], rows: bool,
        counts: Mapping[str, int],
    ) -> dict[tuple[str, int], tuple[Extent, ...]]:  # fmt: skip
        """Of weights that the user's files hold as they are wanted, where."""
        found: dict[tuple[str, int], tuple[Extent, ...]] = {}
        for w in weights:
            source, first = self.sources.get(w.name), _first_row(w) if rows else 0
            if source is None or first is None or (isinstance(w.tensor, DTensor) and not rows):
                continue
            here = [self._originals.extent(source, specs[w.name], first + row if rows else None)
                    for row in range(counts[w.name])]  # fmt: skip
            if all(here):
                found |= {(w.name, row): (one,) for row, one in enumerate(here) if one}
                _empty(w)
        return found


def _first_row(w: Weight) -> int | None:
    """The first of this rank's rows of a stack in the whole; None where rows are cut."""
    boxes = boxes_of(w.tensor)
    whole = len(boxes) == 1 and boxes[0].sizes[1:] == tuple(w.tensor.shape[1:])
    return boxes[0].offsets[0] if whole else None


def _own(part: Tensor) -> Tensor:
    """A part in host memory that shares none with the model's whole parameter."""
    part = part.cpu().contiguous()
    whole = part.untyped_storage().nbytes() == part.numel() * part.element_size()
    return part if whole else part.clone()


def _empty(w: Weight) -> None:
    """Let go of the values that the model held."""
    w.put(w.wrapped(w.spec.placeholder()))


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
            names = tuple(w.name.removeprefix(f"{where}.0.") for w in apart[0])
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
        found.setdefault(int(w.name.removeprefix(f"{where}.").split(".")[0]), []).append(w)
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
