"""`planner.serve`: a plan of serving applied to the user's model, on this rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from cost_models.chain import chain_of
from cost_models.decisions import Decisions, Workload
from cost_models.layout import expert_parameters
from cost_models.serving_decisions import Held, Serving
from cost_models.serving_engines import NATIVE
from cost_models.serving_reading import parts_of
from ir.errors import PlanError, UsageError
from ir.graph import full_name
from planner.plan import Plan
from planner.routed import weights_of as expert_weights
from planner.runtime import tensor
from planner.runtime.parallelize import begin
from planner.runtime.serve import experts
from planner.runtime.serve.core import Limits, Served, serve_here
from planner.runtime.serve.kv import Kv
from planner.runtime.serve.loader import Laid
from planner.runtime.serve.pipe import answer_calls
from planner.runtime.serve.replicas import divide_batch
from planner.runtime.site import check_parameters
from planner.runtime.weights import weights_of
from planner.serving.plan import ServingPlan, require_blocks
from planner.serving.runnable import PACKED, experts_of, unservable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def serve(
    model: nn.Module, plan: ServingPlan, *, weights: str | Path | None = None,
    folder: str | Path | None = None, device: str | None = None,
) -> nn.Module:  # fmt: skip
    """The model under the plan: its weights in their formats and on their tiers, its cache as
    planned, its own forward and `generate`. `model.served` says what lies where and what moved.

    model: best built under `planner.meta()`; its modules change in place. weights: a folder of
    safetensors, where it was built so. folder: on the disk that the plan means, for weights that
    no file holds as planned; each rank of a job has its own in it. Where the plan divides a replica
    over several GPUs, each rank of a job of that size calls it, and all call the model alike.
    Raises GateError for another model.
    """
    s = plan.serving
    if reason := unservable(NATIVE, s, experts_of(plan.graph)):
        raise PlanError(f"planner.serve does not run this plan of {plan.asked.engine}: {reason}",
                        hints=("without --engine, plans are made of what it runs",))  # fmt: skip
    require_blocks(plan)
    ranks = s.ranks * s.pp
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError as fault:
        raise UsageError(f"device={device!r} is no device of torch", why=str(fault).split(":")[0],
                         hints=('device="cuda" or device="cpu"',)) from fault  # fmt: skip
    _as_planned(model, s)
    rule = laid_by(plan)
    limits = Limits(batch=max(1, -(-s.batch // s.replicas)), prompt=plan.asked.prompt,
                    tokens=plan.asked.prompt + plan.asked.output,
                    beams=s.attention_dp == 1)  # fmt: skip
    kv = Kv.planned(s, below=s.kv_tier != "gpu" and device != "cpu")
    shared = _shared_plan(plan)
    if ranks == 1:
        check_parameters(model, shared)
        modules = dict(model.named_modules())
        units = [(link.path, modules[link.path]) for link in chain_of(plan.graph).links]
        noted = weights_of(model, plan.graph.tied)
        served, staged = model, False
    else:
        if not dist.is_initialized() or dist.get_world_size() != ranks:
            found = dist.get_world_size() if dist.is_initialized() else 1
            raise PlanError(
                f"a replica of the plan runs on {ranks} GPUs, this job has {found} processes",
                why=f"tp {s.tp} x attention_dp {s.attention_dp} x pp {s.pp}",
                hints=(f"torchrun --nproc-per-node {ranks}", "each replica is a job of its own"),
            )
        context, stages = begin(model, shared, device)
        (stage,) = stages
        if stage.own is not None:
            stage.module.forward = stage.own
        experts.apply(stage.sites, stage.module, context)
        tensor.apply(stage.sites, stage.module, context)
        served, staged, noted = stage.module, stage.own is not None, context.weights
        if staged:
            answer_calls(stage, served.forward, context)
        if s.attention_dp > 1:
            divide_batch(served, context)
        units = [(site.path, site.module) for site in stage.sites]
        if folder is not None:  # ranks hold other parts of what has the same name
            folder = Path(folder) / f"rank{dist.get_rank()}"
    done: Served = serve_here(
        served, units, rule, weights=noted, files=weights, folder=folder,
        device=torch.device(device), kv=kv, limits=limits, staged=staged,
    )  # fmt: skip
    served.served = done  # type: ignore[assignment]
    return served


def _as_planned(model: nn.Module, s: Serving) -> None:
    """Parameters in the plan's own format, one after the other."""
    dtype = DTYPES.get(s.default, torch.bfloat16)
    for p in model.parameters():
        if p.is_floating_point() and p.dtype != dtype:
            p.data = p.data.to(dtype)


def _shared_plan(plan: ServingPlan) -> Plan:
    """What the runtime's parts are told: the division of the ranks, as a plan of training."""
    s = plan.serving
    layers = len(chain_of(plan.graph).layers)
    stages = tuple(layers // s.pp + (k < layers % s.pp) for k in range(s.pp))
    routed = any(expert_parameters(unit) for unit in plan.graph.units)
    decisions = Decisions(
        pp=s.pp, dp=s.attention_dp, tp=s.tp, ep=s.ep, etp=s.expert_tp if routed else 1,
        compile=False, stages=stages, recompute=((0, 0),) * s.pp,
    )  # fmt: skip
    workload = Workload(engine="native", global_batch=1, seq_len=1, precision="fp32")
    return Plan(
        graph=plan.graph, graph_hash=plan.graph_hash, hardware=plan.hardware,
        hardware_hash=plan.hardware_hash, constants_hash=plan.constants_hash, workload=workload,
        decisions=decisions, shardings=plan.shardings,
    )  # fmt: skip


def laid_by(plan: ServingPlan) -> Callable[[str], Laid]:
    """Where each parameter lies and in what format, by its full name."""
    s, graph = plan.serving, plan.graph
    chain, parts = chain_of(graph), parts_of(graph)
    held = {h.block: h for h in s.tiers}
    numbers: dict[str, int] = {}
    owners = dict(graph.tied)
    found: dict[str, Laid] = {}
    layers = {chain.links[i].path: at for at, i in enumerate(chain.layers)}
    totals: dict[str, int] = {}
    for link in chain.links:
        for block in {part.block for part in parts[link.unit.name].values()} - {""}:
            numbers[f"{link.path} {block}"] = totals.get(block, 0)
            totals[block] = totals.get(block, 0) + 1
    for link in chain.links:
        tables = {w.name for w in expert_weights(link.unit) if w.inner is None}  # biases
        for p in link.unit.parameters:
            part = parts[link.unit.name][p.name]
            name = full_name(link.path, p.name)
            if owners.get(name, name) in found or p.kind == "buffer":
                continue
            dims = len(p.tensor.shape)
            packs = part.block and dims > 1 and p.name not in tables
            word = PACKED.get(s.format_of(part.block), "") if packs else ""
            laid = Laid(word=word)
            h = held.get(part.block)
            if h is not None and dims > 1:
                at = numbers[f"{link.path} {part.block}"]
                if part.block == "routed_experts":
                    laid = Laid(word=word, tier=h.tier, how=h.place, experts=h.resident,
                                rows=plan.rows_on_host)  # fmt: skip
                elif not _stays(at, h, totals[part.block], link.path in layers):
                    laid = Laid(word=word, tier=h.tier, how=h.place, rows=plan.rows_on_host)
            found[owners.get(name, name)] = laid
    return lambda name: found.get(name, Laid())


def _stays(at: int, held: Held, total: int, layer: bool) -> bool:
    """Whether a block of layer number `at` stays on the GPU: those that do lie evenly between the
    others, so that the link has time for each."""
    if not layer:
        return False
    return (at + 1) * held.resident // total > at * held.resident // total
