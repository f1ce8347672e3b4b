"""Replicas of attention inside one group of experts: the batch divided over ranks, called as one.

Every rank is called with all prompts, as under tp; it runs its own, keeps their cache alone, and
what comes out is everybody's, so that `generate` goes on everywhere with the same tokens. Tokens of
all replicas meet at the experts: gathered before them, and summed to where each came from behind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ir.errors import PlanError
from planner.runtime.context import Context
from planner.runtime.serve.pipe import outputs_whole


def shares_of(batch: int, ways: int) -> tuple[int, ...]:
    """Prompts of each replica: as even as they come, the first have more."""
    return tuple(batch // ways + (k < batch % ways) for k in range(ways))


def divide_batch(module: nn.Module, context: Context) -> None:
    """Have a rank's module run its prompts of a call's, and return what all ranks' made.

    A replica without a prompt runs the first one along: all ranks meet in every layer.
    """
    forward, ways = module.forward, context.meshes.decisions.dp
    rank, group = context.meshes.rank("dp"), context.meshes.dp.get_group()

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        ids = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 1),
                   None)  # fmt: skip
        if ids is None:
            raise PlanError("a model that is divided over replicas of attention is called with"
                            " tokens (batch, length)")  # fmt: skip
        if kwargs.get("labels") is not None:
            raise PlanError("a loss, and the plan divides sequences over replicas of attention",
                            why="each would return that of its own sequences",
                            hints=("take it of the logits, which come back whole",))  # fmt: skip
        batch = ids.shape[0]
        shares = shares_of(batch, ways)
        first = sum(shares[:rank]) if shares[rank] else 0
        run_here = tuple(max(n, 1) for n in shares)
        mine = slice(first, first + run_here[rank])
        sample = context.sample
        sample.batch, sample.tokens = run_here[rank], ids.shape[1]
        sample.shares = tuple(n * ids.shape[1] for n in run_here)
        own_args, own_kwargs = _cut((list(args), kwargs), batch, mine)
        cache = kwargs.get("past_key_values")
        found = outputs_whole(forward(*own_args, **own_kwargs))

        def whole(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[0] != run_here[rank]:
                return x
            parts = gathered(x, run_here, group).split(run_here)
            return torch.cat([part[:n] for part, n in zip(parts, shares)])

        return pytree.tree_map(whole, found, is_leaf=lambda x: x is cache)

    module.forward = run


def _cut(given: Any, batch: int, mine: slice) -> Any:
    """The rows of this rank of tensors (batch, ..), in lists and dictionaries too."""
    if isinstance(given, Tensor):
        return given[mine] if given.dim() > 1 and given.shape[0] == batch else given
    if type(given) in (list, tuple):
        return type(given)(_cut(x, batch, mine) for x in given)
    return {k: _cut(v, batch, mine) for k, v in given.items()} if type(given) is dict else given


def gathered(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks behind one another; counts: of each rank, this one's in x."""
    if len(set(counts)) > 1:
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: x.shape[0]] = x
        x = padded
    found = x.new_empty(len(counts) * x.shape[0], *x.shape[1:])
    dist.all_gather_single(found, x.contiguous(), group=group)
    parts = found.split(x.shape[0])
    return torch.cat([part[:n] for part, n in zip(parts, counts)])


def scattered_sum(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Of rows of all ranks this one's, summed over them."""
    most = max(counts)
    padded = x.new_zeros(len(counts), most, *x.shape[1:])
    for place, part in zip(padded, x.split(list(counts))):
        place[: part.shape[0]] = part
    found = x.new_empty(most, *x.shape[1:])
    dist.reduce_scatter_single(found, padded.flatten(0, 1), group=group)
    return found[: counts[dist.get_rank(group)]]


def met(
    inner: Callable[..., Any], path: str, sums: Callable[[Tensor], bool], context: Context
) -> Callable[..., Any]:
    """A module's forward on the tokens of all replicas: its sums come back to where they belong.

    Tensors that it is given (tokens, ..), or (sequences, length, ..), are those of all. sums: which
    of its results are sums over experts; others are alike on all ranks.
    """
    group, rank = context.meshes.dp.get_group(), context.meshes.rank("dp")

    def forward(*args: Any, **kwargs: Any) -> Any:
        counts, length = context.sample.shares, context.sample.tokens
        mine = counts[rank]
        seen: list[bool] = []

        def of_all(x: Any) -> Any:
            by_row = isinstance(x, Tensor) and x.shape[:2] == (mine // length, length)
            if not by_row and not (isinstance(x, Tensor) and x.dim() and x.shape[0] == mine):
                return x
            seen.append(by_row)
            flat = gathered(x.flatten(0, 1) if by_row else x, counts, group)
            return flat.unflatten(0, (-1, length)) if by_row else flat

        args, kwargs = pytree.tree_map(of_all, (args, kwargs))
        if not seen:
            raise PlanError(f"{path} is given no tokens as it is called: replicas of attention"
                            " cannot meet there", hints=("--fix attention_dp=1",))  # fmt: skip

        def to_own(x: Tensor) -> Tensor:
            by_row = x.shape[:2] == (sum(counts) // length, length)
            if not by_row and not (x.dim() and x.shape[0] == sum(counts)):
                return x
            flat = x.flatten(0, 1) if by_row else x
            flat = scattered_sum(flat, counts, group) if sums(x) else flat.split(counts)[rank]
            return flat.unflatten(0, (-1, length)) if by_row else flat

        return pytree.tree_map_only(Tensor, to_own, inner(*args, **kwargs))

    return forward
