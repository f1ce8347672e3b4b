"""Expert parallelism: expert parameters over ep and etp, routed modules around them.

A parameter keeps its name and its global shape: it is a DTensor, split on its experts over ep
and on the intermediate dimension over etp, columns of what goes up and rows of what comes down.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from cost_models.layout import expert_parameters
from planner.routed import expert_count, inside, reductions, routed_modules, weights_of
from planner.runtime.context import Context
from planner.runtime.health import Layer
from planner.runtime.routed import Region, run_routed
from planner.runtime.site import Site


def apply(sites: Sequence[Site], stage: nn.Module, context: Context) -> None:
    """Lay expert parameters over ep and etp, and run routed modules on this rank's tokens."""
    context.health.routed = any(map(routed_modules, context.plan.graph.units))
    if context.meshes.decisions.ep * context.meshes.decisions.etp > 1:
        use_grouped_matmuls(stage)
    for site in sites:
        lay_out(site, context)
        for path in routed_modules(site.unit):
            run_routed(region_of(site, path, context), context)


def use_grouped_matmuls(stage: nn.Module) -> None:
    """Transformers' experts may run as a loop or as grouped matmuls, by its configuration; a model
    that has one way alone (Llama 4) refuses to be asked."""
    for module in stage.modules():
        able = getattr(module, "_can_set_experts_implementation", None)
        if able is not None and able():
            module.set_experts_implementation("grouped_mm")  # type: ignore[operator]


def lay_out(site: Site, context: Context) -> None:
    """Split the unit's expert parameters over ep and etp; plain where neither has two ranks."""
    d, root = context.meshes.decisions, context.meshes.expert_root
    axes = tuple(axis for axis, ways in (("ep", d.ep), ("etp", d.etp)) if ways > 1)
    if not axes:
        return
    done: dict[nn.Parameter, nn.Parameter] = {}
    for weight in weights_of(site.unit):
        placements: dict[str, Placement] = {"ep": Shard(0), "etp": Replicate()}
        if weight.inner is not None:
            joined = weight.parts > 1  # each of the matrices is split, not their row
            placements["etp"] = (
                _StridedShard(weight.inner, split_factor=weight.parts)
                if joined
                else Shard(weight.inner)
            )
        path, _, name = weight.name.rpartition(".")
        owner = site.module.get_submodule(path)
        given = owner._parameters[name]
        if given is None:
            continue
        if given not in done:
            laid = distribute_tensor(
                given.detach(), root[axes], [placements[axis] for axis in axes], src_data_rank=None
            )
            done[given] = nn.Parameter(laid, requires_grad=given.requires_grad)
        owner._parameters[name] = done[given]


def region_of(site: Site, path: str, context: Context) -> Region:
    d, unit = context.meshes.decisions, site.unit
    islands = _islands(site, path) if d.tp > 1 else ()
    module = site.module.get_submodule(path)
    full = ".".join(x for x in (site.path, path) if x)
    experts = expert_count(unit, path)
    layer = Layer(full, experts)
    context.health.layers.append(layer)

    def ours(where: str) -> bool:
        return inside(where, path) and not any(inside(where, i) for i in islands)

    return Region(
        path=full,
        module=module,
        experts=experts,
        reductions=reductions(unit, ours) if d.tp * d.cp > 1 else (),
        islands=tuple(site.module.get_submodule(i) for i in islands),
        layer=layer,
    )


def _islands(site: Site, path: str) -> tuple[str, ...]:
    """Modules in a routed module whose parameters tensor parallelism splits, the topmost."""
    experts = expert_parameters(site.unit)
    split = [n for n, at in site.sharding.parameters if at != "R" and n not in experts]
    found: list[str] = []
    names = [n for n, _ in site.module.named_modules() if inside(n, path) and n != path]
    for name in names:  # parents come first
        own = [n for n in split if n.startswith(f"{name}.")]
        clean = not any(n.startswith(f"{name}.") for n in experts)
        if own and clean and not any(inside(name, f) for f in found):
            found.append(name)
    return tuple(found)
