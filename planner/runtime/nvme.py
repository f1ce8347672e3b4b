"""Files mapped into memory: what the plan lays on a disk, or on another tier that is a folder.

A state tensor is written to a file of its own as the optimizer makes it, and read and updated
through the mapping; the system moves pages. FSDP2's fp32 shards are moved to such files, saved
activations written to them. Files have no name once they are mapped, so nothing is left behind,
whatever ends the process.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ir.errors import PlanError

LEAST_BYTES = 4096  # a page: counters of steps stay in memory


def hold_on_disk(
    optimizer: Optimizer, folder: str | os.PathLike[str], those: Iterable[Tensor] | None = None
) -> None:
    """Lay all state that an optimizer makes from now on in files in `folder`, or that of some
    parameters.

    Raises PlanError where the folder cannot be written or has no room.
    """
    place = writable(folder)
    below = None if those is None else frozenset(those)

    def remap(changed: Optimizer) -> None:
        fresh = States(place, below)
        for parameter, state in changed.state.items():
            fresh[parameter].update(state)
        changed.state = fresh

    remap(optimizer)
    optimizer.register_load_state_dict_post_hook(remap)


def writable(folder: str | os.PathLike[str]) -> Path:
    """The folder. Raises PlanError where it is none that can be written."""
    place = Path(folder)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise PlanError(f"{place} is no folder that can be written", hints=("mkdir it first",))
    return place


def hold_shards(modules: Iterable[nn.Module], folder: Path) -> None:
    """Move the shards that FSDP2 holds on the CPU to files in `folder`, with their padding: each
    parameter stays the object that it is. Raises PlanError where there is no room."""
    for module in modules:
        for group in fully_shard.state(module)._fsdp_param_groups:  # type: ignore[attr-defined]
            if isinstance(group.offload_policy, CPUOffloadPolicy):
                for one in group.fsdp_params:
                    _hold_shard(one, folder)


def _hold_shard(one: FSDPParam, folder: Path) -> None:
    one.reset_sharded_param()  # what was filled since is padded first
    flat, local = one._sharded_param_data, one.sharded_param._local_tensor  # type: ignore[attr-defined]
    fake = isinstance(flat, FakeTensor)  # has no bytes
    if not flat.numel() or flat.is_meta or fake or flat.untyped_storage().filename:
        return
    held = map_file(folder, flat.numel(), flat.dtype, "parameters", "params")
    held.copy_(flat)
    one._sharded_param_data = held
    one.sharded_param._local_tensor = held.as_strided(  # type: ignore[attr-defined]
        local.size(), local.stride(), local.storage_offset() - flat.storage_offset()
    )


class States(defaultdict[Tensor, Any]):
    """State by parameter: of those below, or of all, on the disk."""

    def __init__(self, folder: Path, below: frozenset[Tensor] | None) -> None:
        super().__init__(dict)
        self._folder, self._below = folder, below

    def __missing__(self, parameter: Tensor) -> dict[str, Any]:
        low = self._below is None or parameter in self._below
        self[parameter] = made = OnDisk(self._folder) if low else {}
        return made


class OnDisk(dict[str, Any]):
    """One parameter's state: what is put in comes out mapped."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, Tensor) and value is not self.get(key):
            value = self._mapped(value)
        super().__setitem__(key, value)

    def update(self, *more: Any, **named: Any) -> None:  # dict's own does not call __setitem__
        for key, value in dict(*more, **named).items():
            self[key] = value

    def __reduce__(self) -> tuple[Any, ...]:
        return (dict, (dict(self),))

    def _mapped(self, value: Tensor) -> Tensor:
        local = value._local_tensor if isinstance(value, DTensor) else value
        small = local.numel() * local.element_size() < LEAST_BYTES
        if small or local.device.type != "cpu" or isinstance(local, FakeTensor):
            return value
        flat = map_file(self._folder, local.numel(), local.dtype)
        held = flat.view(local.shape)
        held.copy_(local.detach())
        return DTensor(held, value._spec, requires_grad=False) if value is not local else held  # type: ignore[attr-defined]


def map_file(
    folder: Path, numel: int, dtype: torch.dtype, what: str = "optimizer state",
    word: str = "optimizer",
) -> Tensor:  # fmt: skip
    """A flat tensor whose memory is a new file in `folder`. what, word: of it, for people and as
    a pin says it. Raises PlanError where the folder is full, or gone."""
    try:
        handle, path = tempfile.mkstemp(prefix=f"{word}-", suffix=".state", dir=folder)
    except OSError as fault:
        raise PlanError(f"no file for {what} can be made in {folder}", why=str(fault)) from fault
    try:
        # pages without room behind them would end the process when they are written
        os.posix_fallocate(handle, 0, numel * dtype.itemsize)
        return torch.from_file(path, shared=True, size=numel, dtype=dtype)
    except OSError as fault:
        raise PlanError(
            f"{what} does not fit {folder}",
            why=f"{numel * dtype.itemsize} bytes: {fault.strerror}",
            hints=("a folder with more room", f"offload={word}:cpu"),
        ) from fault
    finally:
        os.close(handle)
        os.unlink(path)
