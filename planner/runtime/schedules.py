"""Pipeline schedules: the plan's order of operations, run by torch's pipeline runtime.

Every schedule goes the same way: `cost_models.schedule.order`, which the plan was costed with, as
torch's list of actions. So what runs is what was simulated, ZB-H1 included, which torch lacks.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_reduce_grad,
    _add_send_recv,
    _ComputationType,
    _PipelineScheduleRuntime,
)

from cost_models.decisions import Decisions
from cost_models.schedule import global_stage, order, rank_of
from ir.errors import PlanError
from planner.runtime.context import Context
from planner.runtime.pipeline import Asked, Stage, example, whole_split, write_received
from planner.runtime.tied import sum_gradients
from planner.runtime.torch_stage import LineStage, TorchStage

WORDS = {
    "F": _ComputationType.FORWARD,
    "B": _ComputationType.BACKWARD_INPUT,
    "W": _ComputationType.BACKWARD_WEIGHT,
    "BW": _ComputationType.FULL_BACKWARD,
}
FAKE = "fake"  # the backend that talks to nobody
_LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out")


class Schedule(_PipelineScheduleRuntime):
    """A plan's schedule on this rank. FSDP gathers a unit where a step first runs it, and keeps
    it: there are no actions for that. Losses come divided by the micro-batches."""

    def __init__(self, stages: Sequence[Stage], context: Context) -> None:
        d = context.plan.decisions
        mesh = context.meshes.pp
        super().__init__(
            [_torch_stage(stage, context) for stage in stages],
            n_microbatches=d.microbatches, loss_fn=lambda loss, _: loss, scale_grads=False,
        )  # fmt: skip
        self._talks_to_nobody = dist.get_backend(mesh.get_group()) == FAKE
        whole: dict[int, Any] = _add_send_recv(
            {rank: _actions(d, rank) for rank in range(d.pp)},
            stage_to_rank=lambda stage: rank_of(d.schedule, d.pp, stage),
            num_stages=len(d.stages),
        )
        self._prepare_schedule_with_comms(whole, format="compute_comms")

    def run(self, given: Sequence[tuple[Any, Any]], loss: Callable[[Any, Any], Any]) -> Any:
        """Forward and backward of every (batch, target); the mean loss, 0 but on the last stage."""
        for stage in self._stages:
            stage.has_backward = True
            stage.clear_runtime_states()
        losses: list[torch.Tensor] = []
        with _quiet():
            self._step_microbatches(
                kwarg_mbs=[{"batch": one, "asked": Asked(target, loss)} for one, target in given],
                target_mbs=[None] * len(given), losses=losses, return_outputs=False,
            )  # fmt: skip
        zero = torch.zeros((), device=self._stages[0].device)
        return sum((x.detach().float() for x in losses), zero)

    def _assert_unsharded(self, stage: Any) -> None:
        """Nothing to do: units gather themselves."""

    def _warmup_p2p(self, stages: Any, has_backward: bool, p2p_done: bool) -> None:
        """Shapes are known, so nobody votes where there is nobody to answer, or where a rank has
        several neighbours on a side."""
        across = all(isinstance(stage, LineStage) for stage in stages)
        if not self._talks_to_nobody and not across:
            super()._warmup_p2p(stages, has_backward, p2p_done)
            return
        from torch.distributed.pipelining._utils import InferenceMode

        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC
            if across and not self._talks_to_nobody:
                stage.meet()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from writing the whole schedule before the error that ends a step."""
    logger = logging.getLogger("torch.distributed.pipelining.schedules")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _torch_stage(stage: Stage, context: Context) -> TorchStage:
    device = torch.device(context.meshes.device_type)
    leaving: tuple[torch.Tensor, ...] = tuple(example(v, context) for v in stage.leaving)
    if not leaving:
        leaving = (torch.empty((), device="meta", requires_grad=True),)  # the loss
    given = (stage.module, stage.index, len(context.plan.decisions.stages), device)
    shapes: dict[str, Any] = {
        "input_args": tuple(example(v, context) for v in stage.arriving),
        "output_args": leaving, "group": context.meshes.pp.get_group(),
    }  # fmt: skip
    line = context.meshes.line
    if line is None:
        return TorchStage(*given, **shapes)
    arriving, out = ([whole_split(v, context) for v in some]
                     for some in (stage.arriving, stage.leaving))  # fmt: skip
    return LineStage(*given, **shapes, line=line, arriving=arriving, leaving=out)


def _actions(d: Decisions, rank: int) -> list[Any]:
    """A rank's compute operations as torch writes them, each stage's reduction behind its last."""
    line: list[_Action | None] = [
        _Action(global_stage(d.schedule, d.pp, rank, chunk), WORDS[op], microbatch)
        for op, microbatch, chunk in order(d.schedule, d.pp, d.microbatches, d.virtual_stages, rank)
    ]
    return list(_add_reduce_grad(line, d.microbatches))


class Pipeline:
    """The stages of this rank under their schedule: what a step runs where pp is more than one."""

    def __init__(self, stages: Sequence[Stage], context: Context) -> None:
        self._stages, self._context = tuple(stages), context
        for stage in stages:
            if stage.written:
                write_received(stage)
        self._schedule = Schedule(stages, context)

    def step(self, given: Sequence[tuple[Any, Any]], loss: Callable[[Any, Any], Any]) -> Any:
        """Run every (batch, target); the mean loss of this data rank's share, on all its stages.

        loss: of (outputs, target), divided by the number of micro-batches.
        Raises PlanError where a rank of the pipeline is lost.
        """
        try:
            total = self._schedule.run(given, loss)
            sum_gradients(self._stages, self._context)
            line = self._context.meshes.line
            if line is None:
                dist.all_reduce(total, group=self._context.meshes.pp.get_group())
            else:  # the last stage's ranks have it, as many as its tp
                dist.all_reduce(total if line.rank == 0 else total.zero_(), group=line.group)
        except RuntimeError as fault:
            known = self._known(fault)
            if known is None:
                raise
            raise known from fault
        return total

    def _known(self, fault: BaseException) -> PlanError | None:
        """What a fault that torch wrapped was: one of ours, or the loss of a rank."""
        cause: BaseException | None = fault
        while cause is not None and not isinstance(cause, PlanError):
            cause = cause.__cause__
        text = str(fault).strip()
        if cause is None and (isinstance(fault, dist.DistError) or any(x in text for x in _LOST)):
            stages = ", ".join(str(stage.index) for stage in self._stages)
            return PlanError(
                f"pipeline stage {stages} cannot go on: a rank that it talks to is lost",
                why=text.splitlines()[0] if text else type(fault).__name__,
                hints=("see the first line of the rank that failed first",),
            )
        return cause
