"""Pipeline parallelism: stub stages of the user's own module, under torch's schedules."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from planner.runtime.context import Context
from planner.runtime.site import Site


@dataclass(slots=True, kw_only=True)
class Stage:
    """What this rank runs of one global stage: a module that keeps the model's names."""

    index: int
    module: nn.Module
    sites: tuple[Site, ...]


def split(model: nn.Module, sites: tuple[Site, ...], context: Context) -> tuple[Stage, ...]:
    """This rank's stages, in order; the model itself where there is no pipeline."""
    if context.plan.decisions.pp == 1:
        return (Stage(index=0, module=model, sites=sites),)
    raise NotImplementedError
