"""Weights from safetensors: each rank reads its own parts, and no rank the whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ir.errors import PlanError
from planner.runtime.parts import boxes_of, local_of
from planner.runtime.sources import Files, Source
from planner.runtime.together import together
from planner.runtime.weights import Place, Weights, materialize, named_weights

SHOWN = 5  # names listed in a message


def load(
    modules: Sequence[nn.Module], weights: Weights, path: str | Path, place: Place,
    *, strict: bool = True,
) -> None:  # fmt: skip
    """Fill this rank's parameters and buffers from files of weights.

    path: a .safetensors file, a folder with an index, or a folder of several. Names are the
    model's, with or without the first part ("model."), or transformers' own. strict: false skips
    weights that the model does not have, and leaves those alone that the files do not have.
    Raises PlanError on every rank, before anything is changed, for missing, extra or wrongly
    shaped weights.
    """
    held = list(named_weights(modules, weights))
    files = together("the weights cannot be opened", lambda: Files(Path(path)))
    with files:
        sources = together(
            "the weights cannot be matched",
            lambda: matched(files.stored(), weights, held, str(path), strict),
        )
        together("the weights cannot be read", lambda: _fill(held, sources, place))


def matched(
    stored: Mapping[str, Source], weights: Weights, held: Sequence[tuple[str, Tensor]], path: str,
    strict: bool,
) -> dict[str, Source]:  # fmt: skip
    """What to read for each of this rank's tensors."""
    found = named(stored, weights)
    extra = sorted(set(found) - set(weights.shapes) - set(weights.aliases) - weights.transient)
    missing = [n for n in weights.shapes if n not in found]
    if missing and (strict or any(x.is_meta for n, x in held if n in missing)):
        raise PlanError(
            f"{path} lacks {len(missing)} of the model's {len(weights.shapes)} weights:"
            f" {shown(missing)}",
            why=f"it holds {len(stored)}: {shown(list(stored))}",
            hints=_missing_hints(missing, extra, weights),
        )
    if extra and strict:
        raise PlanError(
            f"{path} holds {len(extra)} weights that the model does not have: {shown(extra)}",
            hints=("parallel.load(path, strict=False) skips them",),
        )
    wrong = [
        f"{n} is {list(found[n].shape)} in the file, {list(weights.shapes[n])} in the model"
        for n in dict(held)
        if n in found and n in weights.shapes and found[n].shape != weights.shapes[n]
    ]
    if wrong:
        raise PlanError(
            f"{len(wrong)} of the weights in {path} have other shapes: {wrong[0]}",
            why="\n".join(wrong[1:SHOWN]),
        )
    lost = [n for n, x in held if x.is_meta and n not in found]
    if lost:
        raise PlanError(
            f"{lost[0]} has no values, and {path} none for it",
            why="the model computes it from parameters while it is built",
            hints=("build the model without planner.meta(): parallelize keeps real weights",),
        )
    return {n: found[n] for n in dict(held) if n in found}


def named(stored: Mapping[str, Source], weights: Weights) -> dict[str, Source]:
    """Stored tensors under the model's own names, tied ones under their owner's."""
    everything = set(weights.shapes) | set(weights.aliases)
    found = dict(stored) if weights.conversions is None else weights.conversions(stored, everything)
    found = _prefixed(found, everything)
    for alias, owner in weights.aliases.items():
        if alias in found:
            found.setdefault(owner, found[alias])
    return found


def _prefixed(found: Mapping[str, Source], names: Collection[str]) -> dict[str, Source]:
    """Add or take away one first part of names ("model.", "module.") where that makes more fit."""
    unknown = [key for key in found if key not in names]
    added = Counter(
        name.split(".", 1)[0] for name in names if "." in name and name.split(".", 1)[1] in found
    )
    taken = Counter(
        key.split(".", 1)[0] for key in unknown if "." in key and key.split(".", 1)[1] in names
    )
    best = [*added.most_common(1), *taken.most_common(1)]
    if not best:
        return dict(found)
    add = bool(added) and max(best, key=lambda x: x[1]) == added.most_common(1)[0]
    part = max(best, key=lambda x: x[1])[0] + "."
    result = {key: source for key, source in found.items() if key in names}
    for key in unknown:
        other = part + key if add else key.removeprefix(part)
        result.setdefault(other if other in names else key, found[key])
    return result


def _missing_hints(missing: list[str], extra: list[str], weights: Weights) -> tuple[str, ...]:
    hints = []
    if extra:
        hints.append(f"it holds {len(extra)} others instead: {shown(extra)}")
    apart = [n for n in extra if ".experts." in n and any(p.isdigit() for p in n.split("."))]
    if apart and weights.conversions is None:
        hints.append("experts are stored one by one, and the model stacks them: stack them first")
    return (*hints, "parallel.load(path, strict=False) leaves missing ones as they are"
            " where they have values")  # fmt: skip


def shown(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


@torch.no_grad()
def _fill(
    held: Sequence[tuple[str, Tensor]], sources: Mapping[str, Source], place: Place
) -> None:
    for name, tensor in held:
        if name not in sources:
            continue
        materialize(tensor, place(tensor))
        local = local_of(tensor)
        for box in boxes_of(tensor):
            part = sources[name].read(list(zip(box.offsets, box.sizes)))
            box.of_local(local).copy_(part)
