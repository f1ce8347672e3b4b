"""Optimizer state in files, mapped into memory: what the plan lays on a disk.

A state tensor is written to a file of its own as the optimizer makes it, and read and updated
through the mapping; the system moves pages. Files have no name once they are mapped, so nothing
is left behind, whatever ends the process.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
    place = Path(folder)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise PlanError(f"{place} is no folder that can be written", hints=("mkdir it first",))

    below = None if those is None else frozenset(those)

    def remap(changed: Optimizer) -> None:
        fresh = States(place, below)
        for parameter, state in changed.state.items():
            fresh[parameter].update(state)
        changed.state = fresh

    remap(optimizer)
    optimizer.register_load_state_dict_post_hook(remap)


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
        if local.device.type != "cpu" or local.numel() * local.element_size() < LEAST_BYTES:
            return value
        flat = map_file(self._folder, local.numel(), local.dtype)
        held = flat.view(local.shape)
        held.copy_(local.detach())
        return DTensor(held, value._spec, requires_grad=False) if value is not local else held  # type: ignore[attr-defined]


def map_file(folder: Path, numel: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor whose memory is a new file in `folder`. Raises PlanError where it is full."""
    handle, path = tempfile.mkstemp(prefix="optimizer-", suffix=".state", dir=folder)
    try:
        # pages without room behind them would end the process when they are written
        os.posix_fallocate(handle, 0, numel * dtype.itemsize)
        return torch.from_file(path, shared=True, size=numel, dtype=dtype)
    except OSError as fault:
        raise PlanError(
            f"optimizer state does not fit {folder}",
            why=f"{numel * dtype.itemsize} bytes: {fault.strerror}",
            hints=("a folder with more room", "offload=optimizer:cpu"),
        ) from fault
    finally:
        os.close(handle)
        os.unlink(path)
