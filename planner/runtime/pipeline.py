"""Pipeline parallelism: stub stages of the user's own module, and what they hand on.

Each stage runs the user's top-level forward on the model's inputs. Units of other stages are
stubs: before the stage's own they return something of the right shape, the last of them what was
received; the first one behind the stage's own leaves the forward with what it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from cost_models.chain import Link, chain_of
from cost_models.layout import boundary
from cost_models.schedule import rank_of
from ir.capture.body import DTYPES
from ir.errors import PlanError
from ir.graph import AFTER, Graph, Node, full_name
from ir.graph import Tensor as Spec
from planner.cuts import Crossing, crossings, first_links, given_places
from planner.runtime.carry import tokens_dim, unwrap, wrap
from planner.runtime.context import Context
from planner.runtime.site import Site, results_of
from planner.runtime.stubs import stage_copy

_TORCH = {word: dtype for dtype, word in DTYPES.items()}


class Left(BaseException):
    """The forward reached a unit of the next stage, which was given these tensors."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.given = given


@dataclass(slots=True, kw_only=True)
class Stage:
    """What this rank runs of one global stage: a module that keeps the model's names.

    first: the position among the chain's links of its first unit. arriving, leaving: what crosses
    the cuts before and behind it. received: those values, while its forward runs. own: the
    forward of the user's class on it, which raises `Left` where the next stage goes on.
    """

    index: int
    module: nn.Module
    sites: tuple[Site, ...]
    first: int = 0
    arriving: tuple[Crossing, ...] = ()
    leaving: tuple[Crossing, ...] = ()
    received: list[torch.Tensor] = field(default_factory=list)
    own: Callable[..., Any] | None = None

    @property
    def written(self) -> bool:
        """Whether what arrives is written into the forward's own values: no stub returns it."""
        return any(value.result is None for value in self.arriving)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a stage's forward is called with beside the model's inputs; no container of tensors,
    so that nothing casts the targets on the way."""

    target: Any
    loss: Callable[[Any, Any], torch.Tensor]


def split(model: nn.Module, sites: tuple[Site, ...], context: Context) -> tuple[Stage, ...]:
    """This rank's stages, in order; the model itself where there is no pipeline."""
    d, graph = context.plan.decisions, context.plan.graph
    if d.pp == 1:
        return (Stage(index=0, module=model, sites=sites),)
    mine = context.meshes.rank("pp")
    indices = [k for k in range(len(d.stages)) if rank_of(d.schedule, d.pp, k) == mine]
    return tuple(_stage(model, sites, context, graph, k) for k in indices)


def _stage(
    model: nn.Module, sites: tuple[Site, ...], context: Context, graph: Graph, index: int
) -> Stage:
    firsts = (*first_links(graph, context.plan.decisions.stages), len(chain_of(graph).links))
    first, end = firsts[index], firsts[index + 1]
    own = tuple(site for site in sites if site.stage == index)
    links, calls = chain_of(graph).links, [n for n in graph.root.nodes if n.op == "call"]
    stage = Stage(
        index=index, module=model, sites=own, first=first,
        arriving=crossings(graph, first) if first else (),
        leaving=crossings(graph, end) if end < len(links) else (),
    )  # fmt: skip
    made = {ref for call in calls for ref in call.refs()}
    stubs: dict[str, Callable[..., Any]] = {}
    for position, (link, call) in enumerate(zip(links, calls)):
        if position >= end:
            stubs.setdefault(link.path, _leave)
        elif position == first - 1:
            stubs[link.path] = partial(_hand_on, stage, link, call, context)
        elif position < first:
            places = [p for ref, p in given_places(call, link).items() if ref in made]
            stubs.setdefault(link.path, partial(_pass, link, call, places, context))
    paths = {site.path for site in own}
    stage.module = stage_copy(
        model, paths, {p: f for p, f in stubs.items() if p not in paths},
        held_outside(graph, links[first:end]), context.meshes.device_type,
    )  # fmt: skip
    # methods of the class are looked up anew: the copy's own forward, not the user's object's
    stage.own = stage.module.forward
    stage.module.forward = partial(_run, stage, stage.own, context)
    return stage


def held_outside(graph: Graph, links: tuple[Link, ...]) -> frozenset[str]:
    """Full names of parameters that top-level operations read beside these units."""
    joined = {
        full_name(link.path, p.name)
        for link in links
        for p in link.unit.parameters
        if p.name.startswith(f"{AFTER}.")
    }
    return frozenset(joined | {p.name for p in chain_of(graph).glue.parameters})


def _run(
    stage: Stage, forward: Callable[..., Any], context: Context, *received: torch.Tensor,
    batch: Any, asked: Asked,
) -> Any:  # fmt: skip
    """A stage's forward: what it hands on, or, on the last stage, the loss."""
    stage.received = [
        wrap(local, value.tensor, value.learns, context)
        for local, value in zip(received, stage.arriving, strict=True)
    ]
    try:
        if isinstance(batch, dict):
            outputs = forward(**batch)
        else:
            outputs = forward(*batch) if isinstance(batch, tuple) else forward(batch)
    except Left as left:
        return tuple(_sent(left.given[v.place], v, context) for v in stage.leaving)
    finally:
        stage.received = []
    if stage.leaving:
        raise PlanError(f"the forward of stage {stage.index} ended before its last unit")
    return asked.loss(outputs, asked.target)


def _sent(value: torch.Tensor, crossing: Crossing, context: Context) -> torch.Tensor:
    """This rank's part, in the planned element type; a copy, since a view cannot be detached."""
    local = unwrap(value, crossing.tensor, crossing.learns, context)
    planned = local_sizes(crossing.tensor, crossing.learns, context)
    if tuple(local.shape) != planned:
        raise PlanError(
            f"{list(local.shape)} leaves a stage where the plan has {list(planned)}",
            why="the model runs otherwise than it was traced, or on another batch",
        )
    local = local.to(_TORCH[crossing.tensor.dtype], copy=True)
    return local if crossing.learns else local.detach()


def local_sizes(spec: Spec, learns: bool, context: Context) -> tuple[int, ...]:
    """The shape of this rank's part of a value between units, for one micro-batch."""
    d = context.plan.decisions
    sizes = list(context.sizes(spec))
    tokens, at = tokens_dim(spec), boundary(spec, d.sequence_parallel and learns)
    if tokens is not None:
        sizes[tokens] //= d.cp
    if at >= 0:
        sizes[at] //= d.tp
    return tuple(sizes)


def whole_split(crossing: Crossing, context: Context) -> tuple[int, int | None]:
    """Where stages with another tp each split what crosses: the dimension, and its whole size; or
    (0, None) where every tp rank has all of it."""
    line, spec = context.meshes.line, crossing.tensor
    at = boundary(spec, line is not None and line.split and crossing.learns)
    return (at, context.sizes(spec)[at]) if at >= 0 else (0, None)


def example(crossing: Crossing, context: Context) -> torch.Tensor:
    """What crosses, on the meta device."""
    return torch.empty(
        local_sizes(crossing.tensor, crossing.learns, context),
        dtype=_TORCH[crossing.tensor.dtype], device="meta", requires_grad=crossing.learns,
    )  # fmt: skip


def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The distinct tensors that a unit is called with, in the order of the graph's inputs."""
    flat = pytree.tree_leaves((args, kwargs))
    return list({id(x): x for x in flat if isinstance(x, torch.Tensor)}.values())


def _leave(*args: Any, **kwargs: Any) -> Any:
    raise Left(_tensors(args, kwargs))


def _pass(
    link: Link, call: Node, places: list[int], context: Context, *args: Any, **kwargs: Any
) -> Any:
    """A unit before the stage's own: what it is given, where that has the shape of its results."""
    tensors = _tensors(args, kwargs)
    given = [tensors[place] for place in places if place < len(tensors)]
    results = []
    for spec, learns in results_of(link.unit):
        whole = context.sizes(spec)
        alike = [x for x in given if x.shape == whole and x.dtype == _TORCH[spec.dtype]]
        given = [x for x in given if not alike or x is not alike[0]]
        results.append(alike[0] if alike else _blank(spec, learns, context))
    return _returned(call, results)


def _hand_on(stage: Stage, link: Link, call: Node, context: Context, *_: Any, **__: Any) -> Any:
    """The unit before the stage's own: what arrived, in the places of its results."""
    arrived = {v.result: x for v, x in zip(stage.arriving, stage.received)}
    results = [
        arrived[i] if i in arrived else _blank(spec, learns, context)
        for i, (spec, learns) in enumerate(results_of(link.unit))
    ]
    return _returned(call, results)


def _returned(call: Node, results: list[torch.Tensor]) -> Any:
    """Results in the structure that the unit returns them in, "(*, None)" for instance."""
    shape = str(call.attr("returns") or "")
    if not shape:
        return results[0] if len(results) == 1 else tuple(results)
    found, at = [], iter(results)
    for word in shape.strip("()[]").split(", "):
        found.append(next(at) if word == "*" else None)
    return found if shape.startswith("[") else tuple(found)


def _blank(spec: Spec, learns: bool, context: Context) -> torch.Tensor:
    local = torch.zeros(
        local_sizes(spec, learns, context),
        dtype=_TORCH[spec.dtype], device=context.meshes.device_type,
    )  # fmt: skip
    return wrap(local, spec, learns, context)


def write_received(stage: Stage) -> None:
    """Have what arrives written into what the stage's first unit is called with.

    For cuts behind top-level operations: the forward goes on with its own values, which then are
    what the stage before computed. The hook must see them before any other hook of the unit.
    """

    def write(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = _tensors(args, kwargs)
        for value, arrived in zip(stage.arriving, stage.received):
            given[value.place].copy_(arrived)

    stage.sites[0].module.register_forward_pre_hook(write, prepend=True, with_kwargs=True)
