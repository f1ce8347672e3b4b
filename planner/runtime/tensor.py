"""Tensor and sequence parallelism: a contract around every unit.

Parameters are DTensors on the one-dimensional tp mesh. A unit is given DTensors too, so that its
forward sees whole shapes; where the plan changes a placement, it is changed there, forward and
backward, as `planner.runtime.edges` found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from torch.utils import _pytree as pytree

from cost_models.layout import PARTIAL, boundary, expert_parameters, placement
from ir.graph import AFTER, full_name
from ir.graph import Tensor as Spec
from planner.runtime import carry, random
from planner.runtime.attention_rule import register_rule
from planner.runtime.context import Context
from planner.runtime.edges import Crossing, Edges, edges_of
from planner.runtime.fallback import Whole
from planner.runtime.fused import fused_parameters, strided
from planner.runtime.reshard import gradient_as, placement_of, reshard
from planner.runtime.site import Site

Forward = Callable[..., Any]


def apply(sites: Sequence[Site], stage: nn.Module, context: Context) -> None:
    """Split parameters over tp and patch the forward of every unit; nothing where tp is 1."""
    if context.meshes.decisions.tp == 1:
        return
    register_rule()
    # gradients that autograd makes from nothing are plain: zeros, the same on every rank
    DTensor._op_dispatcher._allow_implicit_replication = True
    random.in_step(context.meshes)
    mesh = context.meshes.tp
    split_parameters(sites, stage, mesh)
    for site in sites:
        assert site.assignment is not None
        edges = edges_of(site.unit, site.assignment)
        context.report.loose_edges.extend(
            f"{site.path}: {place}" if site.path else place for place in edges.loose
        )
        for path in dict.fromkeys((*edges.into, *edges.out_of)):
            module = site.module.get_submodule(path)
            into, out_of = edges.into.get(path, ()), edges.out_of.get(path, ())
            module.forward = crossing(module.forward, into, out_of)
        site.module.forward = contract(site, edges, context, mesh)
    if all(site.module is not stage for site in sites):
        stage.forward = between(stage.forward, context)


def split_parameters(sites: Sequence[Site], stage: nn.Module, mesh: DeviceMesh) -> None:
    """Make every parameter a DTensor, each rank cutting its own slice; whole where no unit splits
    it. Ties stay ties; parameters over the expert axes are left as they are."""
    wanted: dict[nn.Parameter, Placement] = {}
    left: set[nn.Parameter] = set()
    names = dict(stage.named_parameters(remove_duplicate=False))
    for site in sites:
        assert site.assignment is not None
        experts = expert_parameters(site.unit)
        parts = fused_parameters(site.unit, site.assignment)
        for name, word in site.sharding.parameters:
            parameter = names.get(full_name(site.path, name) if site.path else name)
            if parameter is None:
                continue
            if name in experts:
                left.add(parameter)
            elif wanted.get(parameter, Replicate()) == Replicate():
                at = placement_of(placement(word))
                wanted[parameter] = strided(at, parts[name]) if name in parts else at
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in stage.modules():
        for name, p in module._parameters.items():
            if p is None or p in left or isinstance(p, DTensor):
                continue
            if p not in made:
                at = wanted.get(p, Replicate())
                laid = distribute_tensor(p.detach(), mesh, (at,), src_data_rank=None)
                made[p] = nn.Parameter(laid, requires_grad=p.requires_grad)
            module._parameters[name] = made[p]


def contract(site: Site, edges: Edges, context: Context, mesh: DeviceMesh) -> Forward:
    """A unit's forward: given and giving what lies between units, DTensors inside."""
    forward = site.module.forward
    given = _given(site, context)
    report = context.report
    # layers that share a compiled graph share a name in the report
    where = (site.unit.name if context.plan.decisions.compile else site.path) or "the model"

    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _each_tensor(
            given, (args, kwargs), lambda x, at: _enter(x, at, edges, context, mesh)
        )
        outer = report.running
        if not outer:  # where it is so already nothing changes, which a compiler cannot repeat
            report.running = True
        try:
            with Whole(context, where):
                result = forward(*args, **kwargs)
        finally:
            if not outer:
                report.running = False
        return _each_tensor(edges.results, result, lambda x, at: _leave(x, at, context))

    return inside


def crossing(
    forward: Forward, into: Sequence[Crossing], out_of: Sequence[Crossing]
) -> Forward:
    """A submodule's forward with what it is given, and what it gives, moved as planned."""

    @functools.wraps(forward)
    def moved(*args: Any, **kwargs: Any) -> Any:
        if into:
            args, kwargs = _move(into, (args, kwargs))
        result = forward(*args, **kwargs)
        return _move(out_of, result) if out_of else result

    return moved


def between(forward: Forward, context: Context) -> Forward:
    """The model's own forward: what runs between units meets DTensors."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with Whole(context, ""):
            return forward(*args, **kwargs)

    return run


def _given(site: Site, context: Context) -> tuple[tuple[str, Spec, bool], ...]:
    """(name, value, whether it carries a gradient) of what the unit's module is called with."""
    return tuple(
        (name, tensor, name in site.unit.diff_inputs)
        for name, tensor in site.unit.inputs if not name.startswith((f"{AFTER}.", "outer"))
    )  # fmt: skip


def _enter(
    x: torch.Tensor, given: tuple[str, Spec, bool], edges: Edges, context: Context,
    mesh: DeviceMesh,
) -> torch.Tensor:  # fmt: skip
    name, spec, learns = given
    local = carry.unwrap(x, spec, learns, context)
    to = edges.entry.get(name)
    if not learns and to is None:
        return local  # plain, the same on every rank: it becomes a DTensor where it meets one
    at = placement_of(boundary(spec, context.meshes.decisions.sequence_parallel and learns))
    inside = DTensor.from_local(local, mesh, (at,), run_check=False)
    return inside if to is None else reshard(inside, placement_of(to), at)


def _leave(x: torch.Tensor, result: Crossing, context: Context) -> torch.Tensor:
    if not isinstance(x, DTensor):
        return carry.wrap(x, result.spec, False, context)
    d = context.meshes.decisions
    limit = boundary(result.spec, d.sequence_parallel and result.learns)
    to = limit if result.to == PARTIAL else result.to
    if d.cp > 1 and result.spec.shape and result.spec.shape[to if to >= 0 else 0].seq:
        to = limit
    at = placement_of(to)
    if x.placements != (at,) or x.placements[0].is_partial():
        x = reshard(x, at, gradient_as(x.placements[0]))
    local = x.to_local(grad_placements=(at,))
    if to != limit:  # top-level operations that joined the unit go on with it so
        if to >= 0 and x.shape[to] % d.tp:  # of a server: shares do not say the whole
            return DTensor.from_local(local, x.device_mesh, (at,), run_check=False, shape=x.shape,
                                      stride=x.stride())  # fmt: skip
        return DTensor.from_local(local, x.device_mesh, (at,), run_check=False)
    return carry.wrap(local, result.spec, result.learns, context)


def _move(crossings: Iterable[Crossing], tree: Any) -> Any:
    """Change the placement of the tensors of a tree that are meant."""
    left = list(crossings)

    def move(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, DTensor):
            return x
        place = next((i for i, c in enumerate(left) if fits(x, c.spec)), None)
        if place is None:
            return x
        found = left.pop(place)
        return reshard(x, placement_of(found.to), gradient_as(x.placements[0]))

    return _distinct(tree, move)


def _each_tensor(specs: Sequence[Any], tree: Any, change: Callable[[Any, Any], Any]) -> Any:
    """Change the distinct tensors of a tree, each with its spec; those without one stay."""
    left = list(specs)
    same = len(_unlike(pytree.tree_leaves(tree))) == len(left)

    def one(x: torch.Tensor) -> torch.Tensor:
        fit = (i for i, s in enumerate(left) if fits(x, _spec(s)))
        place = 0 if same else next(fit, None)
        return x if place is None else change(x, left.pop(place))

    return _distinct(tree, one)


def _spec(of: Any) -> Spec:
    return of.spec if isinstance(of, Crossing) else of[1]


def _distinct(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    leaves, structure = pytree.tree_flatten(tree)
    given = _unlike(leaves)
    changed = [change(x) for x in given]
    after = [next((y for g, y in zip(given, changed) if g is x), x) for x in leaves]
    return pytree.tree_unflatten(after, structure)


def _unlike(leaves: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors, each once; by `is`, which a compiler need not know an address for."""
    found: list[torch.Tensor] = []
    for x in leaves:
        if isinstance(x, torch.Tensor) and not any(x is y for y in found):
            found.append(x)
    return found


def fits(x: torch.Tensor, spec: Spec) -> bool:
    """Whether a tensor may be this value: its constant sizes are."""
    return x.dim() == len(spec.shape) and all(
        not d.is_constant or d.at(1, 1) == size for d, size in zip(spec.shape, x.shape)
    )
