"""Names and layouts of transformers' checkpoints, by its own tables: the one place that asks it."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from planner.runtime.sources import Joined, Made, Source, Stacked, whole

Convert = Callable[[Mapping[str, Source], Collection[str]], dict[str, Source]]


def conversions_of(model: nn.Module) -> Convert | None:
    """How tensors of a checkpoint become the model's: (stored, the model's names) -> by name.

    None for a model that is not transformers'. What is none of the model's is left under its name,
    but what the model's class says to leave out.
    """
    if "transformers.modeling_utils" not in sys.modules:  # where its models' class is: slow to load
        return None
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # before transformers 5.0
        return None
    transforms = get_model_conversion_mapping(model)
    renamings: Any = [t for t in transforms if not isinstance(t, WeightConverter)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    prefix, config = model.base_model_prefix, model.config

    def convert(stored: Mapping[str, Source], names: Collection[str]) -> dict[str, Source]:
        known = dict.fromkeys(names, True)
        found: dict[str, Source] = {}
        groups: dict[str, tuple[Any, dict[str, list[Source]]]] = {}
        for key in sorted(stored, key=_natural):
            target, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if pattern is None:
                if target in known or not any(re.search(p, key) for p in ignored):
                    found.setdefault(target, stored[key])
                continue
            converter = next(c for c in converters if pattern in c.source_patterns)
            parts = groups.setdefault(target, (converter, {}))[1]
            parts.setdefault(pattern, []).append(stored[key])
        for target, (converter, parts) in groups.items():
            found.update(_converted(target, converter, parts, model, config))
        return found

    return convert


def _natural(key: str) -> list[tuple[int, Any]]:
    """Experts in the order of their numbers."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]


def _converted(
    target: str, converter: Any, parts: dict[str, list[Source]], model: nn.Module, config: Any
) -> dict[str, Source]:
    """The model's tensors that a converter makes of some stored ones."""
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    ordered = [parts[p] for p in converter.source_patterns if p in parts]
    whole_groups = len(ordered) == len(converter.source_patterns)
    if whole_groups and steps and steps[0] == ("MergeModulelist", 0):
        stacks = tuple(Stacked(parts=tuple(group)) for group in ordered)
        if len(steps) == 1 and len(stacks) == 1:
            return {target: stacks[0]}
        if len(steps) == 2 and steps[1][0] == "Concatenate":
            return {target: Joined(parts=stacks, dim=int(steps[1][1] or 0))}
    if whole_groups and len(steps) == 1 and steps[0][0] == "Concatenate":
        joined = tuple(one for group in ordered for one in group)
        return {target: Joined(parts=joined, dim=int(steps[0][1] or 0))}

    def run(read: Callable[[Source], Tensor]) -> dict[str, Tensor]:
        own = copy.deepcopy(converter)
        for pattern, group in parts.items():
            for one in group:
                own.add_tensor(target, target, pattern, partial(read, one))
        made: dict[str, Tensor] = own.convert(target, model=model, config=config)
        return {n: x[0] if isinstance(x, list) else x for n, x in made.items()}

    shapes = run(lambda one: torch.empty(one.shape, device="meta"))
    return {
        name: Made(shape=tuple(x.shape), make=partial(_one, run, name))
        for name, x in shapes.items()
    }


def _one(run: Callable[[Callable[[Source], Tensor]], dict[str, Tensor]], name: str) -> Tensor:
    return run(whole)[name]
