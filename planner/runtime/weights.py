"""What a model's weights are called and where they came from, noted before a plan changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from planner.runtime.hf_weights import Convert, conversions_of
from planner.runtime.meta import filled
from planner.runtime.tape import Made, made

Place = Callable[[Tensor], torch.device | str]  # where a parameter or buffer is to be held


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model's own names.

    shapes: of parameters and of the buffers that a checkpoint holds, a tied one under its first
    name, its owner; aliases: name -> owner. transient: buffers that no checkpoint holds. origins:
    how those without values would have been filled. conversions: of names of another format.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    transient: frozenset[str] = frozenset()
    origins: Mapping[str, Made] = field(default_factory=dict)
    conversions: Convert | None = None

    def owner(self, name: str) -> str:
        return self.aliases.get(name, name)


def weights_of(model: nn.Module, tied: Sequence[tuple[str, str]] = ()) -> Weights:
    """Note the weights of a model as the user built it. tied: (alias, owner) of the plan."""
    _fill_attributes(model)
    owners: dict[int, str] = {}
    aliases: dict[str, str] = {}
    planned = dict(tied)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in tensors.items():
        if name not in planned:
            aliases_to = owners.setdefault(id(parameter), name)
            if aliases_to != name:
                aliases[name] = aliases_to
    for alias, owner in tied:
        if alias in tensors:
            aliases[alias] = aliases.get(owner, owner)
    kept, transient = {}, set()
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{path}.{name}" if path else name
            if name in module._non_persistent_buffers_set or buffer is None:
                transient.add(full)
            else:
                kept[full] = buffer
    everything = {**tensors, **kept}
    origins = {n: made(x) for n, x in [*tensors.items(), *model.named_buffers()] if x.is_meta}
    return Weights(
        shapes={n: tuple(x.shape) for n, x in everything.items() if n not in aliases},
        aliases=aliases,
        transient=frozenset(transient),
        origins={n: x for n, x in origins.items() if x is not None and n not in aliases},
        conversions=conversions_of(model),
    )


def _fill_attributes(model: nn.Module) -> None:
    """Give values to large plain attributes and buffers that were made without."""
    for module in model.modules():
        for table in (vars(module), module._buffers):
            for name, value in list(table.items()):
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    table[name] = filled(value)


def named_weights(
    modules: Sequence[nn.Module], weights: Weights
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of this rank with its owner's name, each tensor once."""
    seen: set[int] = set()
    for root in modules:
        for path, module in root.named_modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield weights.owner(f"{path}.{name}" if path else name), tensor


def materialize(tensor: Tensor, device: torch.device | str) -> None:
    """Give a tensor on meta memory of its own, without values; it stays the same object, so that
    an optimizer that was made before, and `fully_shard`, go on with it."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if not local.is_meta:
        return
    empty: Tensor = torch.empty_like(local, device=device, requires_grad=False)
    if isinstance(tensor, DTensor):
        empty = DTensor(empty, tensor._spec, requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, empty)
