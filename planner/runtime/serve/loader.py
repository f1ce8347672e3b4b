"""A model's weights: where each is read, how it is to lie, and where its values come from."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ir.errors import PlanError, UsageError
from planner.runtime.parts import boxes_of, local_of
from planner.runtime.serve.bytes import Extent, InMemory, as_bytes
from planner.runtime.serve.lent import Place, Spec, parameter
from planner.runtime.serve.spool import Originals, Spool
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
            _require_values(w, part)
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


def _require_values(w: Weight, part: Tensor) -> None:
    """Raise PlanError where the file has codes of a format, which scales make values of."""
    values = part.is_floating_point() and part.element_size() > 1
    if w.local.is_floating_point() and not values:
        word = str(part.dtype).removeprefix("torch.")
        raise PlanError(
            f"{w.name} is in {word} in the file, and the model has no scales for it",
            why="expected values, in fp32, bf16 or fp16",
            hints=("a checkpoint in 16 bits: formats of the plan are made of it",),
        )  # fmt: skip


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
