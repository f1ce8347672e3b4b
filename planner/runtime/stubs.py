"""A stage's copy of the user's module: its own units as they are, the others hollow.

Containers on the way to a unit are copied, so that names and classes stay; a hollow unit keeps
its class and its plain attributes, and its forward is a stub. Where the forward between units
reads a parameter that the stage does not hold, it finds zeros of that shape that take no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn


def stage_copy(
    module: nn.Module,
    own: Collection[str],
    stubs: Mapping[str, Callable[..., Any]],
    kept: Collection[str],
    device: str,
    path: str = "",
) -> nn.Module:
    """The module with only the units `own`; `stubs` are the forwards of the others.

    kept: full names of parameters outside those units that the stage needs.
    """
    if path in own or not any(_below(unit, path) for unit in stubs):
        return module
    if path in stubs:
        found = hollow(module, path, kept, device)
        found.forward = stubs[path]
        return found
    found = _shallow(module)
    _drop_parameters(found, path, kept, device)
    for name, child in module._modules.items():
        if child is not None:
            found._modules[name] = stage_copy(child, own, stubs, kept, device, _join(path, name))
    return found


def hollow(module: nn.Module, path: str, kept: Collection[str], device: str) -> nn.Module:
    """A copy without hooks, buffers or parameters, but those kept; its children are hollow too."""
    found = _shallow(module)
    for name in [name for name in vars(found) if name.endswith("_hooks")]:
        vars(found)[name] = type(vars(found)[name])()
    _drop_parameters(found, path, kept, device)
    for name, buffer in list(found._buffers.items()):
        if buffer is not None:
            del found._buffers[name]
            vars(found)[name] = _zeros(buffer, device)
    for name, child in module._modules.items():
        if child is not None:
            found._modules[name] = hollow(child, _join(path, name), kept, device)
    return found


def _shallow(module: nn.Module) -> nn.Module:
    """A module of the same class with tables of its own; methods bound to it are bound anew."""
    found = module.__class__.__new__(module.__class__)
    for name, value in vars(module).items():
        if isinstance(value, (dict, set)) and name.startswith("_"):
            value = copy.copy(value)
        elif isinstance(value, MethodType) and value.__self__ is module:
            value = MethodType(value.__func__, found)
        vars(found)[name] = value
    return found


def _drop_parameters(module: nn.Module, path: str, kept: Collection[str], device: str) -> None:
    for name, parameter in list(module._parameters.items()):
        if parameter is not None and _join(path, name) not in kept:
            del module._parameters[name]
            vars(module)[name] = _zeros(parameter, device)


def _zeros(like: torch.Tensor, device: str) -> torch.Tensor:
    return torch.zeros((), dtype=like.dtype, device=device).expand(like.shape)


def _below(unit: str, path: str) -> bool:
    return not path or unit == path or unit.startswith(f"{path}.")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
