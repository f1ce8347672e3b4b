"""A twin run on local processes, beside the unsharded twin that every process runs as well."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from cost_models.decisions import Decisions
from ir.capture.export import default_loss
from ir.capture.real import Recipe, build
from ir.errors import PlanError
from planner.plan import Plan
from planner.runtime.parallel import Parallel
from planner.runtime.parallelize import parallelize
from planner.runtime.verify.compare import (
    FLOOR,
    TENSOR,
    Compared,
    Number,
    RankFound,
    Tensors,
    together,
)
from planner.runtime.verify.sample import call, draw_batch, draw_constants, ties, without_dropout
from planner.runtime.verify.twin import Twin
from planner.runtime.world import World

BACKEND = "aot_eager"  # of compiled plans: what is compiled is checked, not the code it makes
MOST_SEEDS = 50
UNCLIPPED = 1e9  # a norm that no gradient of a twin has
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
    then, the second's loss."""

    losses: tuple[float, float]
    norm: float
    gradients: dict[str, Tensor | None]
    parameters: dict[str, Tensor]


def verify_twin(world: World, twin: Twin) -> Compared:
    """Run the twin's step sharded and unsharded. Raises RankFailure, or what a rank raised."""
    plan = twin.plan
    return together(world.run(plan.decisions.gpus, on_rank, plan, twin.recipe))


def on_rank(rank: int, plan: Plan, recipe: Recipe) -> RankFound:
    """One rank's part: the steps under the plan, compared with the whole ones."""
    warnings.simplefilter("ignore")  # torch's advice on speed; what raises comes back as it is
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    start = time.perf_counter()
    case, seed = unsharded(plan, recipe)
    model, _ = _built(recipe, seed)
    _copy(model, case.model)
    parallel = parallelize(model, plan, compile_backend=BACKEND)
    ours, theirs = run_sharded(parallel, case), run_whole(case, plan.decisions)
    report = parallel.report
    return RankFound(
        numbers=(
            Number(what="loss", ours=ours.losses[0], theirs=theirs.losses[0]),
            Number(what="gradients' norm", ours=ours.norm, theirs=theirs.norm, allowed=TENSOR),
            Number(what="loss of the next step", ours=ours.losses[1], theirs=theirs.losses[1]),
        ),
        tensors=_errors(ours, theirs, _owners(case.model)),
        names=tuple(name for name, g in theirs.gradients.items() if g is not None),
        replicated=tuple((unit, op, n) for (unit, op), n in sorted(report.replicated.items())),
        loose_edges=tuple(report.loose_edges), seed=seed, seconds=time.perf_counter() - start,
    )  # fmt: skip


def run_sharded(parallel: Parallel, case: Case) -> Ran:
    """The steps under the plan; tensors as one process would have them, by this rank's names."""

    def learning() -> dict[str, nn.Parameter]:
        return {name: p for name, p in parallel.named_parameters() if p.requires_grad}

    first = float(parallel.step(case.batch, case.targets, case.loss_fn))
    gradients = {name: _gradient(p) for name, p in learning().items()}
    norm = float(parallel.clip_grad_norm_(UNCLIPPED))
    optimizer = parallel.optimizer(torch.optim.AdamW, **ADAM)
    optimizer.step()
    optimizer.zero_grad()
    parameters = {name: _whole(p) for name, p in learning().items()}
    second = float(parallel.step(case.batch, case.targets, case.loss_fn))
    return Ran(
        losses=(first, second), norm=norm, gradients=gradients, parameters=parameters
    )  # fmt: skip


def run_whole(case: Case, d: Decisions) -> Ran:
    """The same steps of the model as it is."""
    learning = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    first = step_whole(case, d)
    gradients = {name: _gradient(p) for name, p in learning.items()}
    norm = float(nn.utils.clip_grad_norm_(learning.values(), UNCLIPPED))
    optimizer = torch.optim.AdamW(learning.values(), **ADAM)
    optimizer.step()
    optimizer.zero_grad()
    parameters = {name: p.detach().clone() for name, p in learning.items()}
    second = step_whole(case, d)
    return Ran(losses=(first, second), norm=norm, gradients=gradients, parameters=parameters)


def _errors(ours: Ran, theirs: Ran, owner: dict[str, str]) -> tuple[Tensors, ...]:
    """The errors of what this rank holds, by the first name of each tensor."""
    known = [g for g in theirs.gradients.values() if g is not None]
    floor = FLOOR * _root_mean_square(known)
    return tuple(
        Tensors(
            name=(name := owner[alias]),
            gradient=_error(gradient, theirs.gradients[name], theirs.parameters[name], floor),
            parameter=_error(ours.parameters[alias], theirs.parameters[name],
                             theirs.parameters[name], 0.0),
        )
        for alias, gradient in ours.gradients.items()
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
    count = d.dp * d.microbatches

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


def _whole(x: Tensor) -> Tensor:
    """A tensor as one process would have it; collective where it is sharded."""
    whole = x.full_tensor() if isinstance(x, DTensor) else x
    return whole.detach().cpu().clone()


def _gradient(p: Tensor) -> Tensor | None:
    return None if p.grad is None else _whole(p.grad)


def _owners(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter's tensor, by every name."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(p), name)
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def _root_mean_square(tensors: list[Tensor]) -> float:
    squares = sum(float(x.double().square().sum()) for x in tensors)
    return float((squares / max(1, sum(x.numel() for x in tensors))) ** 0.5)


def _error(ours: Tensor | None, theirs: Tensor | None, like: Tensor, floor: float) -> float:
    """||ours - theirs|| / ||theirs||, a norm below `floor` an element taken as that; a gradient
    that is not there is zero."""
    a = torch.zeros_like(like) if ours is None else ours
    b = torch.zeros_like(like) if theirs is None else theirs
    if a.shape != b.shape:
        return float("inf")
    least = max(floor * like.numel() ** 0.5, 1e-30)
    return float((a.double() - b.double()).norm() / max(float(b.double().norm()), least))
