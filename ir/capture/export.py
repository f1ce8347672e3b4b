"""Trace a model twice, at two sizes, and turn the pair of torch graphs into one of ours."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.fx.proxy
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn
from torch._export.utils import _compiling_state_context

from ir.capture.experts import experts_in_groups, find_routed
from ir.capture.fold import Classes, Folding, classes_of, folded
from ir.capture.leaf import leaves_as_one
from ir.capture.sized import Sized, sized
from ir.errors import PlanError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
          "fp8": torch.bfloat16, "nvfp4": torch.bfloat16}  # fmt: skip
_READS_VALUES = (  # what torch says where a forward reads values, or makes shapes of them
    "DataDependent", "data-dependent", "GuardOnData", "meta tensor", "Meta tensors",
    "DynamicOutputShape", "unbacked", "nonzero",
)  # fmt: skip
PREFIX = "model."  # the user's model inside the traced step

Size = tuple[int, int]  # batch, sequence
Traced = tuple[tuple[Sized, ...], set[str]]  # a program, and the classes that branch on their index
# Begins to work in another process, if it can; tells the answer, or None where there is none.
Beside = Callable[[Callable[[], Traced]], contextlib.AbstractContextManager[Callable[[], Any]]]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A torch program of a model, what is read of the same at another size, and what folding
    found."""

    programs: tuple[Any, tuple[Sized, ...]]
    sizes: tuple[Size, Size]
    folding: Folding


class DataDependent(PlanError):
    """The forward reads values of a tensor."""


def default_loss(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the last [.., vocab] output in fp32."""
    logits = logits_of(outputs)
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def logits_of(outputs: Any) -> torch.Tensor:
    """The output that a loss is taken of: the one called logits, else the first real matrix."""
    named = getattr(outputs, "logits", None)
    if isinstance(named, torch.Tensor):
        return named
    leaves = [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]
    floats = [x for x in leaves if x.is_floating_point() and x.dim() >= 2]
    if not floats:
        raise PlanError(
            "the model returns no floating point tensor to take a loss of",
            hints=("add `loss(outputs, targets)` to the file",),
        )
    return floats[0]


class _Step(nn.Module):
    """A training step's forward: the model as it is, then the loss."""

    def __init__(self, model: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any) -> Any:
        return self.loss_fn(self.model(*args, **kwargs), targets)


def cast_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """Give floating point parameters on meta the training precision; buffers stay as they are.

    A tied parameter is cast once for each of its names: tie the names again after.
    """
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.is_floating_point() and p.dtype != dtype:
                new = nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad)
                module._parameters[name] = new


def _tie_again(model: nn.Module, ties: tuple[tuple[str, str], ...]) -> None:
    for alias, owner in ties:
        module, _, name = alias.rpartition(".")
        model.get_submodule(module)._parameters[name] = model.get_parameter(owner)


def ties(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """(alias, owner) of parameters that are one tensor under two names."""
    seen: dict[int, str] = {}
    found = []
    for name, p in model.named_parameters(remove_duplicate=False):
        owner = seen.setdefault(id(p), name)
        if owner != name:
            found.append((name, owner))
    return tuple(found)


def sizes_for(max_seq_len: int | None, seq_in_input: bool) -> tuple[Size, Size]:
    """Two sizes whose ratios tell batch from sequence: 3/2 and 2."""
    if not seq_in_input:
        return (2, 1), (3, 1)
    top = 256 if max_seq_len is None else min(256, max_seq_len)
    return (2, top // 2), (3, top)


@contextlib.contextmanager
def nowhere(work: Callable[[], Traced]) -> Iterator[Callable[[], None]]:
    """No process beside this one."""
    yield lambda: None


def trace(
    model: nn.Module,
    inputs: Callable[[int, int], Any],
    targets: Callable[[int, int], Any] | None,
    loss: Callable[..., Any] | None,
    sizes: tuple[Size, Size],
    *,
    precision: str,
    fold: bool,
    where: str,
    beside: Beside = nowhere,
) -> Trace:
    """Export the training step at both sizes, folded, at the second `beside` the first; a class
    that branches on its own index is split and the step traced again. Raises PlanError that says
    where tracing stopped."""
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    importlib.import_module("torch.export._trace")  # what exporting loads: once, not on two sides
    tied = ties(model)
    cast_floats(model, DTYPES[precision])
    _tie_again(model, tied)
    model.train()
    traced = partial(
        _trace, model, inputs, targets, loss, sizes, dtype=DTYPES[precision], fold=fold,
        where=where, beside=beside,
    )  # fmt: skip

    def once() -> Trace:
        try:
            return traced(hollow=fold)
        except PlanError:  # a forward may look into a layer that it does not call: keep them whole
            if not fold:
                raise
            return traced(hollow=False)

    try:
        return once()
    except DataDependent:
        routed = find_routed(model)
        if not routed:
            raise
        with experts_in_groups(model, routed):
            return once()


def _trace(
    model: nn.Module,
    inputs: Callable[[int, int], Any],
    targets: Callable[[int, int], Any] | None,
    loss: Callable[..., Any] | None,
    sizes: tuple[Size, Size],
    *,
    dtype: torch.dtype,
    fold: bool,
    hollow: bool,
    where: str,
    beside: Beside,
) -> Trace:
    def at(size: Size, classes: Classes) -> tuple[Any, Folding]:
        with leaves_as_one(model), folded(classes, fold=fold, hollow=hollow) as folding:
            args, kwargs = _arguments(inputs, size, dtype)
            given = [targets(*size)] if targets else []
            step, wanted = _step(model, loss, args, kwargs, given, where)
            folding.outputs.clear()  # the trace must see each class anew
            folding.recorded = True
            return _export(step, (args, kwargs, _meta(wanted)), where), folding

    def second(classes: Classes) -> Traced:
        program, folding = at(sizes[1], classes)
        return sized(program.graph_module), folding.touched

    def apart(classes: Classes) -> Traced:
        torch.set_num_threads(1)  # threads of this process do not outlive its fork
        return second(classes)

    split: set[str] = set()
    while True:
        classes = classes_of(model, split)
        with beside(partial(apart, classes)) as answer:
            first, folding = at(sizes[0], classes)
            touched = folding.touched
            if touched <= split:
                other, touched = answer() or second(classes)
        if touched <= split:
            return Trace(programs=(first, other), sizes=sizes, folding=folding)
        split |= touched


def _arguments(
    inputs: Callable[[int, int], Any], size: Size, dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = inputs(*size)
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    args = args if isinstance(args, tuple) else (args,)
    return _meta(args, dtype), _meta(kwargs, dtype)


def _meta(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """The same on the meta device; floating point tensors as `dtype`, where given."""

    def move(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.to("meta", dtype if dtype and x.is_floating_point() else x.dtype)

    return pytree.tree_map(move, tree)


def targets_like(outputs: Any) -> list[torch.Tensor]:
    """Candidate targets: class indices of the logits' leading shape, else a tensor like them."""
    logits = logits_of(outputs)
    return [
        torch.empty(logits.shape[:-1], dtype=torch.int64, device="meta"),
        torch.empty_like(logits),
    ]


def _step(
    model: nn.Module,
    loss: Callable[..., Any] | None,
    args: Any,
    kwargs: Any,
    given: list[Any],
    where: str,
) -> tuple[nn.Module, Any]:
    """The step to trace and its targets: the first candidate that the loss takes."""
    try:
        with torch.no_grad(), _compiling_state_context():  # models branch on being exported
            outputs = model(*args, **kwargs)
    except PlanError:
        raise
    except Exception as fault:
        raise _untraceable(fault, where) from fault
    if loss is None:
        return _Step(model, default_loss), targets_like(outputs)[0]
    failures: list[Exception] = []
    for targets in [_meta(g) for g in given] or targets_like(outputs):
        try:
            with torch.no_grad():
                loss(outputs, targets)
            return _Step(model, loss), targets
        except Exception as fault:
            failures.append(fault)
    first = failures[0]
    raise PlanError(
        f"loss(outputs, targets) raised {type(first).__name__}: {_first_line(first)}",
        where=_user_frame(first) or where,
        why="tried targets of the first output's leading shape (int64), and of its whole shape",
    ) from first


def _export(step: nn.Module, given: tuple[Any, ...], where: str) -> Any:
    try:
        with warnings.catch_warnings():  # advice to who exports: nothing that is run here
            warnings.simplefilter("ignore")
            with _lines_unread(), _source_unwritten():
                return torch.export.export(step, given, strict=False)
    except PlanError:
        raise
    except Exception as fault:
        raise _untraceable(fault, where) from fault


@contextlib.contextmanager
def _lines_unread() -> Iterator[None]:
    """torch notes where each node was made, of some hundred frames the few of the model: have it
    walk them here, each made into words once, and its source read if it is the model's. What is
    noted is the same; torch's own way was a fifth of a trace.
    """
    known: dict[tuple[str, int, str], traceback.FrameSummary] = {}

    class Walked:
        """In place of torch's CapturedTraceback, as far as a tracer of nodes asks it."""

        def __init__(self, frames: list[traceback.FrameSummary]) -> None:
            self._frames = frames

        def summary(self) -> traceback.StackSummary:
            return traceback.StackSummary(self._frames)

        @staticmethod
        def extract() -> Walked:
            found = []
            frame: FrameType | None = sys._getframe(1)
            while frame is not None:
                code = frame.f_code
                where = code.co_filename, frame.f_lineno, code.co_name
                if where not in known:
                    known[where] = traceback.FrameSummary(*where, lookup_line=False)
                found.append(known[where])
                frame = frame.f_back
            return Walked(found[::-1])

    module: Any = torch.fx.proxy
    theirs, module.CapturedTraceback = module.CapturedTraceback, Walked
    try:
        yield
    finally:
        module.CapturedTraceback = theirs


@contextlib.contextmanager
def _source_unwritten() -> Iterator[None]:
    """torch writes Python of a graph and compiles it, anew after each of its passes. Of what is
    exported here nothing is run: let that be done by whoever runs it."""
    theirs = torch.fx.GraphModule.recompile

    def later(graph: torch.fx.GraphModule) -> None:
        def forward(graph: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            theirs(graph)  # which puts its own `forward` in this one's place
            return graph.forward(*args, **kwargs)

        type(graph).forward = forward  # a class of its own for each

    torch.fx.GraphModule.recompile = later  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.fx.GraphModule.recompile = theirs  # type: ignore[method-assign]


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip().splitlines() or [""])[0][:300]


def _user_frame(fault: BaseException) -> str:
    """file:line of the deepest frame outside torch and this package."""
    ours = Path(__file__).parent
    best = ""
    for frame in traceback.extract_tb(fault.__traceback__):
        path = Path(frame.filename)
        inside = "torch" in path.parts and "site-packages" in path.parts
        if not inside and ours not in path.parents and not frame.filename.startswith("<"):
            best = f"{path.name}:{frame.lineno}: {frame.line}"
    return best


def _untraceable(fault: BaseException, where: str) -> PlanError:
    text, at = f"{type(fault).__name__}: {_first_line(fault)}", _user_frame(fault) or where
    if any(word in text for word in _READS_VALUES):
        return DataDependent(
            "the model cannot be traced: its forward reads values of a tensor", where=at,
            why=text,
            hints=(
                "not .item(), .tolist(), if x.sum() > 0, a boolean mask: use torch.where or"
                " F.grouped_mm, or declare the module a leaf with ir.leaf(...)",
            ),
        )  # fmt: skip
    return PlanError(
        f"the model cannot be traced: {text}", where=at,
        hints=("run the model once in eager mode with inputs(batch, seq_len): it must work there",),
    )  # fmt: skip
