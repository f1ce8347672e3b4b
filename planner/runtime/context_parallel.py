"""Context parallelism: every rank runs the units on its share of the tokens.

A unit takes its share of what it is given and gives on a DTensor of whole shape, so that the
model's forward between units need not know. Inside, a mode takes the calls of
F.scaled_dot_product_attention, where alone tokens meet: around a ring, with all keys gathered, or
with heads instead of tokens split. What else would need other ranks' tokens is refused when the
plan is made (`planner.token_flow`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from ir.errors import PlanError
from ir.graph import AFTER, Unit
from ir.graph import Tensor as Spec
from planner.runtime.carry import leave_cp, unwrap, wrap
from planner.runtime.context import Context
from planner.runtime.flash import additive
from planner.runtime.gathered import gathered
from planner.runtime.ring import ring
from planner.runtime.shares import shares_of
from planner.runtime.site import Site, results_of
from planner.runtime.ulysses import ulysses
from planner.token_flow import flow_of

Forward = Callable[..., Any]
HEADS, ROWS, COLUMNS = 1, -2, -1
OPERATORS = {"ring": ring, "allgather": gathered}


def apply(sites: Sequence[Site], stage: nn.Module, context: Context) -> None:
    """Patch the forward of every unit that attends over tokens, so that the ranks share it."""
    d = context.plan.decisions
    if d.cp == 1:
        return
    if flow_of(context.plan.graph).ordered:  # what is whole meets what is split between units
        DTensor._op_dispatcher._allow_implicit_replication = True
    for site in sites:
        attention = [n for n in site.unit.nodes if n.op == "attention" and n.module != AFTER]
        if attention:
            check_attention(site)
            keys = [site.unit.values[n.inputs[1]] for n in attention]
            over_tokens = tuple(any(d.seq for d in key.shape) for key in keys)
            site.module.forward = sharing(site.path, over_tokens, context, site.module.forward)


def check_attention(site: Site) -> None:
    """Refuse a Hugging Face model that was told to attend by another function."""
    for module in site.module.modules():
        kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if kind not in (None, "sdpa"):
            raise PlanError(
                f"{site.path} attends by {kind!r}, and cp > 1 shares what calls"
                " F.scaled_dot_product_attention",
                hints=('attn_implementation="sdpa"', "--fix cp=1"),
            )


def apply_shares(sites: Sequence[Site], stage: nn.Module, context: Context) -> None:
    """Patch the forward of every unit to run on this rank's tokens, where no tensor parallelism
    does so already. Around recomputation and compilation, which then see plain tensors."""
    d = context.plan.decisions
    if d.cp == 1 or d.tp > 1:
        return
    # what every layer is given, its version, and the share of it
    shares: MutableMapping[Tensor, tuple[int | None, Tensor]] = WeakIdKeyDictionary()

    def share(x: Tensor, spec: Spec, learns: bool, context: Context) -> Tensor:
        if isinstance(x, DTensor) or x.requires_grad:
            return unwrap(x, spec, learns, context)
        version, found = shares.get(x, (None, x))
        if version != x._version:
            found = unwrap(x, spec, learns, context)
            if found is not x and not found._is_view():  # a view costs nothing, and keeps x alive
                shares[x] = (x._version, found)
        return found

    for site in sites:
        site.module.forward = on_share(site.unit, context, share, site.module.forward)


def sharing(
    path: str, over_tokens: tuple[bool, ...], context: Context, forward: Forward
) -> Forward:
    """A unit's forward with its attention shared; called again to recompute, it is so again.

    over_tokens: for each attention in order, whether its keys are tokens.
    """
    ways = Ways(context)

    @functools.wraps(forward)
    def shared(*args: Any, **kwargs: Any) -> Any:
        mode = SharedAttention(over_tokens, ways)
        with mode:
            result = forward(*args, **kwargs)
        if mode.seen != len(over_tokens):
            raise PlanError(
                f"{path} calls F.scaled_dot_product_attention {mode.seen} times, and has"
                f" {len(over_tokens)} attentions in the plan",
                why="under cp > 1 attention is shared by the ranks where that function is called",
                hints=('attn_implementation="sdpa" for a Hugging Face model', "--fix cp=1"),
            )
        return result

    return shared


def on_share(
    unit: Unit, context: Context, share: Callable[[Tensor, Spec, bool, Context], Tensor],
    forward: Forward,
) -> Forward:  # fmt: skip
    """A unit's forward on this rank's tokens."""
    given, results = given_of(unit), results_of(unit)

    @functools.wraps(forward)
    def local(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = exchanged(given, (args, kwargs), context, share)
        return exchanged(results, forward(*args, **kwargs), context, wrap)

    return local


def given_of(unit: Unit) -> tuple[tuple[Spec, bool], ...]:
    """What a unit's module is called with, in order, and whether it carries a gradient."""
    return tuple(
        (tensor, name in unit.diff_inputs)
        for name, tensor in unit.inputs if name.startswith("in") and name[2:].isdigit()
    )  # fmt: skip


def exchanged(
    specs: Sequence[tuple[Spec, bool]], tree: Any, context: Context,
    move: Callable[[Tensor, Spec, bool, Context], Tensor],
) -> Any:  # fmt: skip
    """The distinct tensors of a tree, each moved as the first spec left that it fits says; those
    without one as they are (a mask, say, that the traced forward did not need)."""
    leaves, structure = pytree.tree_flatten(tree)
    distinct = {id(x): x for x in leaves if isinstance(x, Tensor)}
    moved: dict[int, Tensor] = {}
    left = list(specs)
    for key, x in distinct.items():
        found = next((s for s in left if _fits(x, s[0])), None)
        if found is not None:
            left.remove(found)
            moved[key] = move(x, *found, context)
    return pytree.tree_unflatten([moved.get(id(x), x) for x in leaves], structure)


def _fits(x: Tensor, spec: Spec) -> bool:
    """Whether a tensor may be this value: its constant sizes are."""
    return x.dim() == len(spec.shape) and all(
        not d.is_constant or d.at(1, 1) == size for d, size in zip(spec.shape, x.shape)
    )


class Ways:
    """How the ranks share attention: plain attributes, which a compiler reads as constants."""

    def __init__(self, context: Context) -> None:
        self.kind = context.plan.decisions.cp_kind
        self.group = context.meshes.cp.get_group()
        self.name = self.group.group_name
        self.rank = context.meshes.rank("cp")
        self.shares = shares_of(context.plan)
        self.zigzag = self.shares.zigzag


class SharedAttention(TorchFunctionMode):
    """While it is active, attention over tokens is shared by the cp ranks. seen: calls so far,
    in the order of the unit's attentions."""

    def __init__(self, over_tokens: tuple[bool, ...], ways: Ways) -> None:
        super().__init__()
        self.over_tokens, self.ways, self.seen = over_tokens, ways, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:  # its body is run without the mode
            with mock.patch.object(F, "scaled_dot_product_attention", self.attend):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """As F.scaled_dot_product_attention, of this rank's queries with every rank's keys."""
        self.seen += 1
        if not all(self.over_tokens[self.seen - 1 : self.seen]):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        size = query.shape[-1] ** -0.5 if scale is None else float(scale)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return shared_attention(self.ways, q, k, v, mask, is_causal, size, dropout_p)

        if isinstance(query, DTensor):
            return _on_heads(attend, query, key, value, attn_mask)
        return attend(query, key, value, attn_mask)


def shared_attention(
    ways: Ways, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dropout: float,
) -> Tensor:  # fmt: skip
    """Attention of plain tensors [.., heads, tokens, d] under the plan's kind of sharing."""
    if q.dim() != 4:
        lead = q.shape[:-3]
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
        whole = shared_attention(ways, q, k, v, mask, causal, scale, dropout)
        return whole.reshape(*lead, *whole.shape[1:])
    if ways.kind == "ulysses":
        gqa = q.shape[HEADS] != k.shape[HEADS]

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, mask, dropout, causal, scale=scale, enable_gqa=gqa
            )

        return ulysses(q, k, v, mask, ways.group, attend)
    if dropout:
        raise PlanError(
            f"attention with dropout is not shared by cp_kind={ways.kind}",
            hints=("cp_kind=ulysses", "no dropout in attention"),
        )
    if mask is not None:
        shares = ways.shares
        mask = shares.take(mask, ROWS, ways.rank) if mask.shape[ROWS] != 1 else mask
        if ways.kind == "ring":
            mask = torch.cat([shares.take(mask, COLUMNS, r) for r in range(shares.ways)], COLUMNS)
        mask = additive(mask, q)
    operator = OPERATORS[ways.kind]
    out: Tensor = operator(q, k, v, mask, ways.name, causal, ways.zigzag, scale)[0]
    return out


def _on_heads(
    attend: Callable[..., Tensor], q: DTensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention of DTensors on tp: of a rank's own heads, or of all where they are whole."""
    at = q.placements[0]
    if at != Shard(HEADS):
        q, at = q.redistribute(placements=(Replicate(),)), Replicate()
    mesh, count, heads = q.device_mesh, q.device_mesh.size(), q.shape[HEADS]
    rank = mesh.get_local_rank()

    def own(x: Tensor) -> Tensor:
        assert isinstance(x, DTensor)
        if x.placements == (at,) or at == Replicate():
            return x.redistribute(placements=(at,)).to_local(grad_placements=(at,))
        if x.shape[HEADS] % count == 0:
            return x.redistribute(placements=(at,)).to_local(grad_placements=(at,))
        whole = x.redistribute(placements=(Replicate(),))
        groups, each = heads // x.shape[HEADS], heads // count
        first, last = rank * each // groups, (rank * each + each - 1) // groups
        return whole.to_local(grad_placements=(Partial(),))[:, first : last + 1]

    if isinstance(mask, DTensor):
        mask = mask.full_tensor()
    if mask is not None and at == Shard(HEADS) and mask.dim() == 4 and mask.shape[HEADS] > 1:
        mask = mask.chunk(count, HEADS)[rank]
    local = attend(q.to_local(grad_placements=(at,)), own(k), own(v), mask)
    return DTensor.from_local(local, mesh, (at,), run_check=False)


def own_tokens(outputs: Any, targets: Any, context: Context) -> tuple[Any, Any]:
    """What this cp rank's loss is given: its tokens of what the model returned, and of targets."""
    return result_of(outputs, context), share_targets(targets, context)


def share_targets(tree: Any, context: Context) -> Any:
    """This cp rank's tokens of what the user has whole: each tensor of the tree is cut on its
    dimension of the plan's sequence length, the samples' first one aside."""
    d, length = context.plan.decisions, context.plan.workload.seq_len
    if d.cp == 1:
        return tree
    shares, rank = shares_of(context.plan), context.meshes.rank("cp")

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, DTensor):
            return x
        first = 1 if x.dim() > 1 else 0
        found = [i for i in range(first, x.dim()) if x.shape[i] == length]
        return shares.take(x, found[0], rank) if found else x

    return pytree.tree_map(cut, tree)


def result_of(tree: Any, context: Context) -> Any:
    """This cp rank's tokens of what the model returned, as the loss takes them: what a unit made
    is left on tp alone."""
    if context.plan.decisions.cp == 1:
        return tree
    return pytree.tree_map_only(Tensor, lambda x: leave_cp(x, context), tree)
