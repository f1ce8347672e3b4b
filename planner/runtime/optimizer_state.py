"""An optimizer's state under the names of the model's parameters."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ir.errors import PlanError
from planner.runtime.held import Held
from planner.runtime.parts import local_of

Named = Mapping[Tensor, str]


def tensors_of(
    optimizer: Optimizer, names: Named, skipped: Collection[Tensor]
) -> dict[str, Held]:
    """Its tensors as "state.PARAMETER.KEY", as torch's flattened optimizer state is called.

    Raises PlanError for tensors that cannot be cut otherwise (quantised in blocks).
    """
    found = {}
    for parameter, state in optimizer.state.items():
        name = _name(parameter, names)
        if parameter in skipped:
            continue
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            if type(local_of(value)) not in (Tensor, nn.Parameter):
                raise PlanError(
                    f"the {key} of {name} is a {type(local_of(value)).__name__}, which another"
                    " plan could not take over",
                    hints=("parallel.save(folder) without this optimizer",),
                )
            found[f"state.{name}.{key}"] = Held(value)
    return found


def settings_of(optimizer: Optimizer, names: Named) -> dict[str, Any]:
    """What is not a tensor, to be written as JSON: hyperparameters by group, numbers in state;
    and which state each rank has whole."""
    groups = [
        {
            "options": {k: _plain(v) for k, v in group.items() if k != "params" and _is_plain(v)},
            "parameters": [_name(p, names) for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    numbers = {
        f"{_name(p, names)}.{key}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, (int, float)) or value is None
    }
    every = [
        key
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and isinstance(p, DTensor) and not isinstance(value, DTensor)
    ]
    return {
        "kind": type(optimizer).__name__, "groups": groups, "numbers": numbers,
        "whole": sorted(set(every)),
    }  # fmt: skip


def merged(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of all ranks as one: groups of equal hyperparameters are one group."""
    groups: dict[str, dict[str, Any]] = {}
    for own in settings:
        for group in own["groups"]:
            key = json.dumps(group["options"], sort_keys=True)
            at = groups.setdefault(key, {"options": group["options"], "parameters": {}})
            at["parameters"].update(dict.fromkeys(group["parameters"]))
    return {
        "kind": settings[0]["kind"],
        "groups": [{**g, "parameters": list(g["parameters"])} for g in groups.values()],
        "numbers": {k: v for own in settings for k, v in own["numbers"].items()},
        "whole": sorted({k for own in settings for k in own["whole"]}),
    }


def allocate(
    optimizer: Optimizer, names: Named, stored: Mapping[str, Any], whole: Collection[str]
) -> list[tuple[str, Held]]:
    """Make state for what is stored of this rank's parameters, without values yet.

    stored: "state.PARAMETER.KEY" -> DCP's metadata of the tensor. State that is there already is
    filled in place, so that it stays where the optimizer laid it. whole: keys that each rank has
    whole.
    """
    keys: dict[str, list[str]] = {}
    for name in stored:
        parameter, _, key = name.removeprefix("state.").rpartition(".")
        keys.setdefault(parameter, []).append(key)
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = _name(p, names)
            for key in keys.get(name, ()):
                full = f"state.{name}.{key}"
                state = optimizer.state[p]
                if not _fits(state.get(key), stored[full]):
                    state[key] = _empty(p, group, stored[full], key in whole)
                found.append((full, Held(state[key])))  # a mapped state hands out another tensor
    return found


def _fits(value: Any, stored: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == stored.size


def _empty(p: nn.Parameter, group: Mapping[str, Any], stored: Any, whole: bool) -> Tensor:
    dtype = stored.properties.dtype
    if stored.size == p.shape and not whole:
        return torch.zeros_like(p.detach(), dtype=dtype)
    local = local_of(p.detach())
    counter = not len(stored.size) and not (group.get("capturable") or group.get("fused"))
    return torch.zeros(stored.size, dtype=dtype, device="cpu" if counter else local.device)


def apply_settings(optimizer: Optimizer, names: Named, settings: Mapping[str, Any]) -> None:
    """Set hyperparameters and numbers as they were. Raises PlanError where one group of today has
    parameters that had different ones."""
    options = {name: g["options"] for g in settings["groups"] for name in g["parameters"]}
    chosen = []
    for group in optimizer.param_groups:
        found = {json.dumps(options.get(_name(p, names)), sort_keys=True): _name(p, names)
                 for p in group["params"]}  # fmt: skip
        found.pop("null", None)
        if len(found) > 1:
            one, other = list(found.values())[:2]
            raise PlanError(f"{one} and {other} were in groups of other hyperparameters",
                            why="in this optimizer they are in one group")  # fmt: skip
        chosen.append(json.loads(next(iter(found), "{}")))
    for group, values in zip(optimizer.param_groups, chosen):
        for key, value in values.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value
    for p, name in names.items():
        for full, value in settings["numbers"].items():
            if full.rpartition(".")[0] == name:
                optimizer.state[p][full.rpartition(".")[2]] = value


def _name(parameter: Tensor, names: Named) -> str:
    try:
        return names[parameter]
    except KeyError:
        raise PlanError(
            f"the optimizer has a parameter of shape {list(parameter.shape)} that is none of the"
            " model's",
            why="it was made before parallelize, or of another model",
            hints=("make it of parallel.parameters()",),
        ) from None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, Tensor):
        return value.numel() == 1 and not isinstance(value, DTensor)
    return value is None or isinstance(value, (bool, int, float, str))
