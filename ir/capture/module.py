"""A module that is in memory already, as the capture takes a model: a copy on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ir.capture.load import Source
from ir.capture.meta import move_to_meta, tracing


def source_of(
    model: nn.Module,
    inputs: Callable[[int, int], Any],
    loss: Callable[[Any, Any], Any] | None = None,
    max_seq_len: int | None = None,
) -> Source:
    """Copy a module without its parameters' storage; the module itself is not changed."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    twin = copy.deepcopy(model, memo)
    move_to_meta(twin)
    config = getattr(model, "config", None)
    context: Callable[[], Any] = tracing
    notes: tuple[str, ...] = ()
    if config is not None and hasattr(config, "model_type"):
        from ir.capture import hf

        context, notes = hf.adapt(twin)
    return Source(
        model=twin, name=type(model).__name__, key="", kind="file", task="other", inputs=inputs,
        targets=None, loss=loss, seq_in_input=_has_sequence(inputs), notes=notes,
        max_seq_len=max_seq_len or getattr(config, "max_position_embeddings", None),
        tracing=context,
    )  # fmt: skip


def _has_sequence(inputs: Callable[[int, int], Any]) -> bool:
    """Whether inputs(batch, seq_len) depends on seq_len."""

    def shapes(seq_len: int) -> list[Any]:
        return [tuple(getattr(x, "shape", ())) for x in pytree.tree_leaves(inputs(2, seq_len))]

    return shapes(16) != shapes(32)
