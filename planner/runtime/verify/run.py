"""A twin run on local processes, beside the unsharded twin that every process runs as well."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cost_models.decisions import Decisions
from ir.capture.export import default_loss
from ir.capture.real import Recipe, build
from ir.errors import PlanError
from planner.plan import Plan
from planner.runtime.parallel import Parallel
from planner.runtime.parallelize import parallelize
from planner.runtime.parts import boxes_of, local_of
from planner.runtime.verify.compare import (
    FLOOR,
    TENSOR,
    Compared,
    Number,
    Part,
    RankFound,
    Whole,
    together,
)
from planner.runtime.verify.sample import call, draw_batch, draw_constants, ties, without_dropout
from planner.runtime.verify.twin import Twin
from planner.runtime.world import World

# torch 2.13's vectorized CPU code has a layer norm's gradient wrong by percents (blocks of
# examples/dit.py, without a plan); what is checked is the plan, not code for this machine
PLAIN = {"cpp.simdlen": 1}
MOST_SEEDS = 50
UNCLIPPED = 1e9  # a norm that no gradient of a twin has
TINY = 1e-30  # so that nothing is divided by zero
# Adam's own eps of 1e-8 makes the first step the gradients' sign, and 1e-8 of noise a difference
ADAM: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3}
LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The model without a plan, and a step's batch."""

    model: nn.Module
    batch: Any
    targets: Any
    loss_fn: LossFn


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """Two steps with an update between: the first's loss and gradients, their norm, the parameters
    then, the second's loss. Tensors as this rank holds them."""

    losses: tuple[float, float]
    norm: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def verify_twin(world: World, twin: Twin, compile_backend: str = "inductor") -> Compared:
    """Run the twin's step sharded and unsharded. Raises RankFailure, or what a rank raised."""
    plan = twin.plan
    return together(
        world.run(plan.decisions.gpus, on_rank, plan, twin.recipe, compile_backend)
    )


def on_rank(rank: int, plan: Plan, recipe: Recipe, compile_backend: str) -> RankFound:
    """One rank's part: the steps under the plan, compared with the whole ones."""
    warnings.simplefilter("ignore")  # torch's advice on speed; what raises comes back as it is
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    start = time.perf_counter()
    case, seed = unsharded(plan, recipe)
    model, _ = _built(recipe, seed)
    _copy(model, case.model)
    with (  # a folder for what the plan holds on a disk
        tempfile.TemporaryDirectory() as folder,
        torch._inductor.config.patch(PLAIN),
    ):
        parallel = parallelize(model, plan, compile_backend=compile_backend, folder=folder)
        ours = run_sharded(parallel, case)
    theirs = run_whole(case, plan.decisions)
    report = parallel.report
    return RankFound(
        numbers=(
            Number(what="loss", ours=ours.losses[0], theirs=theirs.losses[0]),
            Number(what="gradients' norm", ours=ours.norm, theirs=theirs.norm, allowed=TENSOR),
            Number(what="loss of the next step", ours=ours.losses[1], theirs=theirs.losses[1]),
        ),
        wholes=_wholes(theirs), parts=tuple(_parts(ours, theirs, _owners(case.model))),
        replicated=tuple((unit, op, n) for (unit, op), n in sorted(report.replicated.items())),
        loose_edges=tuple(report.loose_edges), uncompiled=tuple(report.uncompiled.items()),
        seed=seed, seconds=time.perf_counter() - start,
    )  # fmt: skip


def run_sharded(parallel: Parallel, case: Case) -> Ran:
    """The steps under the plan; tensors by this rank's names."""

    def learning() -> dict[str, nn.Parameter]:
        return {name: p for name, p in parallel.named_parameters() if p.requires_grad}

    first = float(parallel.step(case.batch, case.targets, case.loss_fn))
    gradients = {name: _gradient(p) for name, p in learning().items()}
    norm = float(parallel.clip_grad_norm_(UNCLIPPED))
    optimizer = parallel.optimizer(torch.optim.AdamW, **ADAM)
    optimizer.step()
    optimizer.zero_grad()
    parameters = {name: p.detach().clone() for name, p in learning().items()}
    second = float(parallel.step(case.batch, case.targets, case.loss_fn))
    return Ran(losses=(first, second), norm=norm, gradients=gradients, parameters=parameters)


def run_whole(case: Case, d: Decisions) -> Ran:
    """The same steps of the model as it is; gradients of what the loss depends on alone."""
    learning = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    first = step_whole(case, d)
    gradients = {name: _gradient(p) for name, p in learning.items() if p.grad is not None}
    norm = float(nn.utils.clip_grad_norm_(learning.values(), UNCLIPPED))
    optimizer = torch.optim.AdamW(learning.values(), **ADAM)
    optimizer.step()
    optimizer.zero_grad()
    parameters = {name: p.detach().clone() for name, p in learning.items()}
    second = step_whole(case, d)
    return Ran(losses=(first, second), norm=norm, gradients=gradients, parameters=parameters)


def _gradient(p: nn.Parameter) -> Tensor:
    """A parameter's gradient, zeros where there is none."""
    return torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()


def _wholes(theirs: Ran) -> tuple[Whole, ...]:
    """What errors are relative to; a gradient's norm is no less than the floor."""
    count = sum(g.numel() for g in theirs.gradients.values())
    floor = FLOOR * (sum(_square(g) for g in theirs.gradients.values()) / max(1, count)) ** 0.5
    return tuple(
        Whole(
            name=name, elements=g.numel(),
            gradient=max(_square(g) ** 0.5, floor * g.numel() ** 0.5, TINY),
            parameter=max(_square(theirs.parameters[name]) ** 0.5, TINY),
        )
        for name, g in theirs.gradients.items()
    )  # fmt: skip


def _parts(ours: Ran, theirs: Ran, owner: dict[str, str]) -> Iterator[Part]:
    """The errors in each box that this rank holds, by the first name of its tensor."""
    for alias, parameter in ours.parameters.items():
        name, gradient = owner[alias], ours.gradients[alias]
        whole = theirs.parameters[name]
        slope = theirs.gradients.get(name, torch.zeros_like(whole))
        held, moved = local_of(gradient).cpu(), local_of(parameter).cpu()
        for box in boxes_of(parameter):
            yield Part(
                name=name, offsets=box.offsets, sizes=box.sizes,
                gradient=_square(box.of_local(held) - box.of_whole(slope)),
                parameter=_square(box.of_local(moved) - box.of_whole(whole)),
            )  # fmt: skip


def unsharded(plan: Plan, recipe: Recipe) -> tuple[Case, int]:
    """The model and a batch of the first seed whose routers choose clearly, and that seed."""
    d, w = plan.decisions, plan.workload
    for seed in range(MOST_SEEDS):
        model, real = _built(recipe, seed)
        loss_fn = real.loss or default_loss
        samples, length = w.global_batch, w.seq_len
        wanted = real.targets(samples, length) if real.targets else None
        batch, targets = draw_batch(model, real.inputs(samples, length), wanted, loss_fn, seed)
        case = Case(model=model, batch=batch, targets=targets, loss_fn=loss_fn)
        with ties() as found, torch.no_grad():
            for part, _ in shares(case, d):
                call(model, part)
        if not found.near:
            return case, seed
    raise PlanError(
        f"in {MOST_SEEDS} draws of weights and batch some router's choice was always a near-tie",
        why="rounding alone would change it, and with it the gradients",
        hints=("--twin with fewer experts or layers",),
    )


def shares(case: Case, d: Decisions) -> list[tuple[Any, Any]]:
    """The batch in the pieces that a data rank runs at once, in the order of data ranks."""
    count = sum(d.microbatches_by_data_rank)

    def cut(value: Any) -> list[Any]:
        whole = isinstance(value, Tensor) and value.dim()
        return list(torch.split(value, d.micro_batch)) if whole else [value] * count

    leaves, spec = pytree.tree_flatten((case.batch, case.targets))
    return [pytree.tree_unflatten(list(row), spec) for row in zip(*map(cut, leaves))]


def step_whole(case: Case, d: Decisions) -> float:
    """Forward and backward of the unsharded model over every share; the mean loss."""
    parts = shares(case, d)
    total = 0.0
    for batch, targets in parts:
        loss = case.loss_fn(call(case.model, batch), targets) / len(parts)
        torch.autograd.backward(loss)
        total += float(loss.detach().double())
    return total


def _built(recipe: Recipe, seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    real = build(recipe)
    real.model.train()
    without_dropout(real.model)
    draw_constants(real.model, seed)
    return real.model, real


def _copy(model: nn.Module, source: nn.Module) -> None:
    """Make two builds of a model one: a factory need not draw the same numbers twice."""
    with torch.no_grad():
        for (_, p), (_, q) in zip(model.named_parameters(), source.named_parameters()):
            p.copy_(q)
        for (_, b), (_, c) in zip(model.named_buffers(), source.named_buffers()):
            b.copy_(c)


def _owners(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter's tensor, by every name."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(p), name)
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())
