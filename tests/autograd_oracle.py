"""What autograd really keeps of a model on the CPU, unit by unit: the oracle of saved bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn


@dataclass
class Kept:
    """Storages that autograd saved: bytes, the units that saved each, and the units that were
    given each (True: with a gradient). Tensors are held so that no address is used twice."""

    size: dict[int, int] = field(default_factory=dict)
    savers: dict[int, list[str]] = field(default_factory=dict)
    given: dict[int, dict[str, bool]] = field(default_factory=dict)
    held: list[torch.Tensor] = field(default_factory=list)

    def owner(self, storage: int) -> str:
        """The unit that made it and keeps it, else the only one that keeps it, else the root."""
        savers, given = self.savers[storage], self.given.get(storage, {})
        made = [unit for unit in savers if unit not in given]
        if made:
            return made[0]
        return savers[0] if len(savers) == 1 and given[savers[0]] else ""

    def by_unit(self) -> dict[str, int]:
        """Bytes of each unit that keeps anything; "" is the root."""
        total: dict[str, int] = {}
        for storage, size in self.size.items():
            owner = self.owner(storage)
            total[owner] = total.get(owner, 0) + size
        return total


def kept(
    model: nn.Module, step: Callable[[], torch.Tensor], units: tuple[str, ...], inputs: Any
) -> Kept:
    """Run a forward `step` of `model` and see what is kept, parameters and buffers left out.

    What runs between two units follows from the first of them, and is its. inputs: the step's
    tensors, targets too, which are the root's.
    """
    found = Kept()
    for x in pytree.tree_leaves(inputs):
        found.given[x.untyped_storage().data_ptr()] = dict.fromkeys(units, False)
    stack = [""]
    static = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            stack.append(path)
            for x in pytree.tree_leaves((args, kwargs)):
                if isinstance(x, torch.Tensor):
                    found.held.append(x)
                    key = x.untyped_storage().data_ptr()
                    found.given.setdefault(key, {})[path] = x.requires_grad

        return hook

    def leave(*_: Any) -> None:
        stack[0] = stack.pop()

    def pack(x: torch.Tensor) -> torch.Tensor:
        key = x.untyped_storage().data_ptr()
        if key not in static and x.untyped_storage().nbytes():
            found.held.append(x)
            found.size[key] = x.untyped_storage().nbytes()
            savers = found.savers.setdefault(key, [])
            if stack[-1] not in savers:
                savers.append(stack[-1])
        return x

    hooks = []
    for path in units:
        module = model.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
        hooks.append(module.register_forward_hook(leave))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = step()
    for hook in hooks:
        hook.remove()
    assert loss.requires_grad
    return found
