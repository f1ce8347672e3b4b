"""Loops over experts of a list, where values are not there to say who gets what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ir.capture.experts import Routed, find_routed
from ir.graph import Graph
from planner.routed import lists_of


def run_as_captured(model: nn.Module, graph: Graph) -> None:
    """Let routed modules whose loop the capture recognised compute without reading values: each
    expert, called as the loop calls it, has an equal share of the rows.

    What is counted is the same: an expert's rows are no collective, and every expert's weights
    have gradients, of no rows zeros. Models without such a list stay as they are.
    """
    if any(lists_of(unit) for unit in graph.units):
        for path, routed in find_routed(model).items():
            model.get_submodule(path).forward = _in_equal_shares(routed)


def _in_equal_shares(routed: Routed) -> Callable[..., Tensor]:
    """The forward of a routed module. x: [..., hidden]."""

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = routed.router(tokens).softmax(-1).topk(routed.top_k, dim=-1)
        rows = tokens.repeat_interleave(routed.top_k, 0).tensor_split(len(routed.experts))
        answers = torch.cat([expert(own) for expert, own in zip(routed.experts, rows)])
        # each token's answers by its weights: a matmul, which is no statistic over tokens
        sums = weights.unsqueeze(1) @ answers.unflatten(0, chosen.shape)
        return sums.view(x.shape)

    return forward
