"""What a layer keeps for backward, held below the device until its backward: all layers', or so
many of each stage. It lies in host memory, or in files of a folder where the plan names another
tier.

A layer's saved tensors are copied down as they are saved, each storage once, and come up again
when its backward starts, those of the layer before it with them. On an accelerator the copies run
in streams of their own, and two layers' activations at most are on the device. Parameters and
what all layers share (tables, masks) stay where they are. On the CPU the same is done, copies
included.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from cost_models.chain import chain_of
from cost_models.stage_problem import starts_of
from planner.runtime.context import Context
from planner.runtime.nvme import map_file
from planner.runtime.site import Site

LEAST_BYTES = 1024  # a copy costs more than what is smaller is worth: seeds and scalars stay


def apply_activations(sites: Sequence[Site], stage: nn.Module, context: Context) -> None:
    """Patch the forward of the stage's layers, those that the plan says, so that what they save
    lies on the host."""
    d = context.plan.decisions
    if "activations" not in d.tiers:
        return
    chain = chain_of(context.plan.graph)
    paths = [chain.links[i].path for i in chain.layers]
    layers = {
        path for start, count, (full, n) in zip(starts_of(d.stages), d.stages, d.pairs)
        for place, path in enumerate(paths[start : start + count])
        if d.moved is None or full <= place < full + n
    }  # fmt: skip
    host = Host(context.meshes.device_type, context.folder_of("activations"))
    moved = [site for site in sites if site.path in layers]
    for place, site in enumerate(moved):
        site.module.forward = host.around(site.module, site.module.forward, first=place == 0)
    stay = [site for site in sites if site.path in paths and site not in moved]
    behind = [s for s in stay if moved and paths.index(s.path) > paths.index(moved[-1].path)]
    if behind:  # its backward comes before that of the last layer that was moved
        behind[0].module.forward = host.ahead(behind[0].module.forward)


@dataclass(slots=True, weakref_slot=True, eq=False)
class Moved:
    """One storage on the host; `device` is its copy above while there are `left` readers."""

    host: Tensor
    readers: int = 0
    left: int = 0
    device: Tensor | None = None


@dataclass(slots=True, eq=False)
class Record:
    """What one forward of one layer moved; `before` is the layer whose backward comes next."""

    before: Record | None
    moved: list[weakref.ref[Moved]] = field(default_factory=list)
    done: Any = None  # the event after its copies down
    asked: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """What stands for a saved tensor."""

    record: Record
    moved: Moved
    view: Callable[[Tensor], Tensor]


class Host:
    """The copies of one stage: two streams on an accelerator, none on the CPU."""

    def __init__(self, device_type: str, folder: Path | None = None) -> None:
        self._type, self._folder = device_type, folder
        self._streams = None if device_type == "cpu" else torch.get_device_module(device_type)
        self._down = self._streams.Stream() if self._streams else None
        self._up = self._streams.Stream() if self._streams else None
        self._last: Record | None = None
        self._leaving: tuple[list[Tensor], Record] | None = None  # sources of copies under way

    def around(self, module: nn.Module, forward: Callable[..., Any], *, first: bool) -> Any:
        """The forward of a layer with its saved tensors moved; `first` starts a new backward."""

        @functools.wraps(forward)
        def moved(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            with self._saving(module, (args, kwargs), first):
                return forward(*args, **kwargs)

        return moved

    def ahead(self, forward: Callable[..., Any]) -> Any:
        """The forward of the layer behind those that are moved: when its backward begins, the last
        one's copies up do as well."""

        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            record, out = self._last, forward(*args, **kwargs)
            reached = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.grad_fn]
            if torch.is_grad_enabled() and record and reached:
                reached[0].register_hook(lambda _: self._bring(record))
            return out

        return noted

    @contextlib.contextmanager
    def _saving(self, module: nn.Module, given: Any, first: bool) -> Iterator[None]:
        stay = {_storage(t) for t in (*module.parameters(), *module.buffers())}
        stay |= {
            _storage(t) for t in pytree.tree_leaves(given)
            if isinstance(t, Tensor) and not t.requires_grad
        }  # fmt: skip
        record = Record(before=None if first else self._last)
        seen: dict[tuple[int, int], Moved] = {}
        sources: list[Tensor] = []  # kept while copies run, and so that no address comes twice

        def pack(saved: Tensor) -> Tensor | Packed:
            local = _local(saved)
            small = local.untyped_storage().nbytes() < LEAST_BYTES
            if small or local.device.type != self._type or _storage(local) in stay:
                return saved
            with torch.no_grad():
                local = local.detach().resolve_conj().resolve_neg()
                key = (_storage(local), local._version)
                if key not in seen:
                    seen[key] = self._send(local)
                    record.moved.append(weakref.ref(seen[key]))
                    sources.append(local)
                seen[key].readers += 1
                seen[key].left += 1
            return Packed(record, seen[key], _view_of(local, saved))

        with saved_tensors_hooks(pack, self._unpack):
            yield
        self._last = record
        if self._down:
            record.done = self._down.record_event()
        self._settle()
        self._leaving = sources, record

    def _settle(self) -> None:
        """Let go of what an earlier layer sent down, once its copies are done."""
        if self._leaving and self._streams:
            self._streams.current_stream().wait_event(self._leaving[1].done)
        self._leaving = None

    def _unpack(self, packed: Tensor | Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        record, moved = packed.record, packed.moved
        with torch.no_grad():
            if not record.asked:
                record.asked = True
                self._settle()
                self._bring(record)
                if record.before:
                    self._bring(record.before)
            if moved.device is None:
                moved.device, moved.left = self._fetch(moved, record), moved.readers
            if self._up and self._streams:
                self._streams.current_stream().wait_stream(self._up)
            found = packed.view(moved.device)
        moved.left -= 1
        if moved.left <= 0:
            moved.device = None
        return found

    def _send(self, local: Tensor) -> Moved:
        """Copy a tensor's whole storage down."""
        size = local.untyped_storage().nbytes() // local.element_size()
        flat = local.as_strided((size,), (1,), 0)
        if self._folder is None or isinstance(flat, FakeTensor):  # a fake one has no bytes
            host = torch.empty(
                size, dtype=flat.dtype, device="cpu", pin_memory=self._streams is not None
            )
        else:
            host = map_file(self._folder, size, flat.dtype, "what layers keep", "activations")
        with self._on(self._down):
            host.copy_(flat, non_blocking=True)
        return Moved(host)

    def _bring(self, record: Record) -> None:
        """Copy what a layer sent down up again, ahead of its readers."""
        for alive in filter(None, (ref() for ref in record.moved)):
            if alive.device is None and alive.left == alive.readers:
                alive.device = self._fetch(alive, record)

    def _fetch(self, moved: Moved, record: Record) -> Tensor:
        device = torch.empty_like(moved.host, device=self._type, pin_memory=False)
        with self._on(self._up):
            if self._up:
                self._up.wait_event(record.done)
            device.copy_(moved.host, non_blocking=True)
        return device

    @contextlib.contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        """Run copies on a stream, behind what is computed so far."""
        if stream is None or self._streams is None:
            yield
            return
        stream.wait_stream(self._streams.current_stream())
        with self._streams.stream(stream):
            yield


def _local(tensor: Tensor) -> Tensor:
    """The plain tensor that holds a tensor's data on this rank."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.trigger_wait() if isinstance(local, AsyncCollectiveTensor) else local


def _storage(tensor: Tensor) -> int:
    """A storage's identity while it lives; its address would not do for tensors without data."""
    return int(_local(tensor).untyped_storage()._cdata)


def _view_of(local: Tensor, saved: Tensor) -> Callable[[Tensor], Tensor]:
    """How the saved tensor is made from its storage as a flat tensor."""
    shape = (local.size(), local.stride(), local.storage_offset())
    dtype, spec, learns = local.dtype, getattr(saved, "_spec", None), saved.requires_grad

    def view(flat: Tensor) -> Tensor:
        found = flat.view(dtype).as_strided(*shape)
        return found if spec is None else DTensor(found, spec, requires_grad=learns)

    return view
