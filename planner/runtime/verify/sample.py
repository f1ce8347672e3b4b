"""What a twin computes with: weights and a batch drawn at random, no dropout, no near-ties."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ir.capture.export import logits_of, targets_like
from ir.errors import PlanError

NOISE = 0.1  # added to parameters that are constant: a gate of zeros would hide what is behind it
NEAR = 1e-4  # of the spread of a row's scores: closer ones change places under fp32's rounding
_CHOICES = (torch.topk, Tensor.topk, torch.argmax, Tensor.argmax)


def without_dropout(model: nn.Module) -> None:
    """Set every dropout probability that the modules hold to zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name.lower() and isinstance(value, float):
                setattr(module, name, 0.0)


def draw_constants(model: nn.Module, seed: int) -> None:
    """Add noise to the parameters that are one number throughout; the others stay as drawn."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and bool((p == p.flatten()[0]).all()):
                p.add_(NOISE * torch.randn(p.shape, generator=draws))


@dataclass
class _Tables(TorchFunctionMode):
    """Notes how many rows the tables have that integer tensors index."""

    rows: dict[int, int] = field(default_factory=dict)  # storage -> rows of the smallest table

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            ids, table = args[0], args[1]
            key = ids.untyped_storage().data_ptr()
            self.rows[key] = min(table.shape[0], self.rows.get(key, table.shape[0]))
        return func(*args, **(kwargs or {}))


def call(model: Callable[..., Any], batch: Any) -> Any:
    """The model's outputs for keyword arguments (a dict) or positional ones (a tuple)."""
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def draw_batch(
    model: nn.Module, given: Any, wanted: Any, loss: Callable[[Any, Any], Any], seed: int
) -> tuple[Any, Any]:
    """Inputs and targets of the shapes given, drawn where they are one number throughout.

    Integers stay below the rows of the table that they index, targets below the classes. What
    the file's functions draw themselves stays as it is.
    """
    draws = torch.Generator().manual_seed(seed)
    tables = _Tables()
    with torch.no_grad(), tables:
        outputs = call(model, given)

    def fill(x: Any, high: int) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0 or x.numel() == 0:
            return x
        if bool((x != x.flatten()[0]).any()):
            return x
        if x.is_floating_point():
            return torch.randn(x.shape, generator=draws).to(x.dtype)
        if x.dtype == torch.bool or high < 2:
            return x
        return torch.randint(0, high, x.shape, generator=draws, dtype=x.dtype)

    def rows(x: Any) -> int:
        return tables.rows.get(x.untyped_storage().data_ptr(), 0) if isinstance(x, Tensor) else 0

    batch = pytree.tree_map(lambda x: fill(x, rows(x)), given)
    classes = logits_of(outputs).shape[-1]
    if wanted is None:
        wanted = _accepted(outputs, loss)
    return batch, pytree.tree_map(lambda x: fill(x, classes), wanted)


def _accepted(outputs: Any, loss: Callable[[Any, Any], Any]) -> Tensor:
    """Zeros as targets: class indices, else a tensor like the outputs, whichever the loss takes."""
    faults: list[Exception] = []
    for shape in targets_like(outputs):
        targets = torch.zeros(shape.shape, dtype=shape.dtype)
        try:
            with torch.no_grad():
                loss(outputs, targets)
            return targets
        except Exception as fault:
            faults.append(fault)
    raise PlanError(
        f"loss(outputs, targets) raised {type(faults[0]).__name__}: {faults[0]}",
        hints=("give targets(batch, seq_len) in the model's file",),
    ) from faults[0]


@dataclass
class _Ties(TorchFunctionMode):
    """Notes where the last of the scores that are chosen is nearly the first that is not."""

    near: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CHOICES and args[0].is_floating_point():
            many = func in _CHOICES[:2]
            count = int(args[1] if len(args) > 1 else kwargs["k"]) if many else 1
            at = args[2 if many else 1] if len(args) > 1 + many else kwargs.get("dim", -1)
            self.near += _near(args[0].detach(), count, -1 if at is None else int(at))
        return func(*args, **kwargs)


def _near(scores: Tensor, count: int, dim: int) -> int:
    """Rows whose count-th and next scores are nearly alike."""
    if scores.shape[dim] <= count:
        return 0
    ranked = scores.transpose(dim, -1).sort(dim=-1, descending=True).values
    finite = ranked.masked_fill(~ranked.isfinite(), 0)
    spread = finite.amax(-1) - finite.amin(-1)
    gap = ranked[..., count - 1] - ranked[..., count]
    return int((gap <= NEAR * spread).sum())


@contextmanager
def ties() -> Iterator[_Ties]:
    """Count near-ties of the choices made inside: a router's, which rounding would turn."""
    found = _Ties()
    with found:
        yield found
