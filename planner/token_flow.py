"""What the ranks of a context-parallel group know of each value, when each runs the model's own
forward on its share of the tokens: found from the graph alone, before anything runs.

A value without a sequence dimension is the same on every rank, or the mean over a rank's tokens
of something (whose average over ranks is the whole mean, as long as only linear operations
follow), or a statistic of a rank's tokens that no later operation puts right. What has a sequence
dimension is split on it. An operation that must see the whole sequence cannot be run so; attention
is the one that the runtime shares.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from cost_models.layout import ON_EXPERTS, ROUTING
from ir.backward import differentiable
from ir.graph import AFTER, FLOATS, Graph, Node, Tensor, Unit
from ir.ops import rule
from ir.ops.base import REDUCED, Letters
from planner.routed import inside, reductions, routed_modules

SAME, SHARED, MEAN, PARTIAL = "same", "shared", "mean", "partial"  # on each rank, or split
WHOLE = "whole"  # two sequence dimensions: a mask, which no rank splits
LINEAR = (
    "add", "sub", "neg", "view", "reshape_copy", "permute", "expand", "repeat", "slice", "split",
    "select", "stack", "concat", "cast", "copy", "mean", "sum",
)  # fmt: skip
LOSSES = ("cross_entropy", "nll_loss", "mse")
LOOKUPS = ("index", "gather", "embedding")  # of a table: its first operand


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """How a model's tokens can be shared.

    reason: why they cannot, or empty. dropout: whether attention drops probabilities. causal:
    whether some attention is. ordered: whether the order of a rank's tokens must be the
    sequence's, because operations between units mix them with what every rank holds whole.
    """

    reason: str = ""
    dropout: bool = False
    causal: bool = False
    ordered: bool = False


class Mixed(Exception):
    """An operation that needs other ranks' tokens: its name and why."""


@functools.cache
def flow_of(graph: Graph) -> Flow:
    """Follow every value through the model's units; the first that cannot be shared is named."""
    kinds = {name: _plain(t) for name, t in graph.root.inputs}
    kinds |= {p.name: SAME for p in graph.root.parameters}
    ordered, calls = False, list(graph.calls())
    sequences = [t for _, _, u in calls for _, t in u.inputs if _sequence(t)]
    if not sequences:
        return Flow(reason="no value that a unit is given has a sequence dimension")
    for node in graph.root.nodes:
        if node.op != "call":
            kinds.update((ref, _plain(t)) for ref, t in zip(node.refs(), node.outputs))
    targets = _from_targets(graph.root)
    try:
        for number, (call, path, unit) in enumerate(calls):
            given = tuple(kinds[r] for r in call.inputs)
            loss = frozenset(
                name for (name, _), r in zip(unit.inputs, call.inputs) if r in targets
            ) | (frozenset(["..."]) if number == len(calls) - 1 else frozenset())
            try:
                found = _through(unit, given, loss)
            except Mixed as fault:
                raise Mixed(f"{path}: {fault}") from None
            ordered = ordered or found.ordered
            kinds.update(zip(call.refs(), found.outputs))
    except Mixed as fault:
        return Flow(reason=str(fault))
    attention = [n for u in graph.units for n in u.nodes if n.op == "attention"]
    return Flow(
        dropout=any(n.attr("dropout") for n in attention),
        causal=any(n.attr("causal") for n in attention), ordered=ordered,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    outputs: tuple[str, ...]
    ordered: bool


@dataclass(slots=True, kw_only=True)
class _Walk:
    """One unit while it is walked. origin: where each statistic of a rank's tokens was made.
    plain: values of top-level operations that every rank holds whole. averaged: reductions over
    tokens in routed modules, which the runtime averages over ranks."""

    unit: Unit
    kinds: dict[str, str]
    learns: dict[str, bool]
    routed: frozenset[str]
    averaged: frozenset[str]
    origin: dict[str, str] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)
    ordered: bool = False


@functools.cache
def _through(unit: Unit, given: tuple[str, ...], loss: frozenset[str]) -> _Found:
    """A unit's results from what it is given. loss: inputs that follow from the targets, and
    "..." in the model's last unit."""
    kinds = dict(zip((name for name, _ in unit.inputs), given))
    kinds |= {p.name: SAME for p in unit.parameters}
    routed = frozenset(n.module for n in unit.nodes if n.op in ON_EXPERTS)
    averaged = frozenset(
        r.node
        for path in routed_modules(unit)
        for r in reductions(unit, functools.partial(inside, path=path))
    )
    walk = _Walk(
        unit=unit, kinds=kinds, learns=differentiable(unit), routed=routed, averaged=averaged
    )
    for name, tensor in unit.inputs:
        if name.partition("_")[0] == "outer" and _sequence(tensor):
            raise Mixed("it reads a sequence past its arguments")
        _regular(tensor, f"its input {name}")
        if name.startswith(f"{AFTER}.") and name not in unit.diff_inputs and name not in loss:
            walk.plain.add(name)
    own = dict.fromkeys(loss, True)
    for node in unit.nodes:
        _after(walk, node, own, "..." in loss)
        for ref, kind in zip(node.refs(), _kinds(walk, node)):
            walk.kinds[ref] = kind
    for ref in unit.outputs:
        if walk.kinds[ref] == PARTIAL:
            raise Mixed(f"{walk.origin.get(ref, ref)} is of a rank's tokens, not of the sequence")
        if any(d.batch and d.seq for d in unit.values[ref].shape):
            raise Mixed(f"its result {ref} has batch and sequence in one dimension")
    return _Found(outputs=tuple(walk.kinds[r] for r in unit.outputs), ordered=walk.ordered)


def _after(walk: _Walk, node: Node, own: dict[str, bool], last: bool) -> None:
    """Top-level operations run on whole shapes: what they mix must lie alike."""
    if not node.name.startswith(f"{AFTER}/"):
        return
    if any(r in own for r in node.inputs):
        if any(r in walk.plain and _sequence(walk.unit.values[r]) for r in node.inputs):
            raise Mixed(f"{node.name} has the loss look at positions")
        own.update(dict.fromkeys(node.refs(), True))  # the loss: given shares of all it compares
        return
    split = [r for r in node.inputs if _sequence(walk.unit.values[r])]
    plain = [r for r in split if r in walk.plain]
    if len(plain) == len(split):
        walk.plain.update(node.refs() if split else ())
        return
    if plain and last:
        raise Mixed(f"{node.name} mixes its result with a sequence that every rank holds whole")
    walk.ordered = walk.ordered or bool(plain)
    merged = any(d.batch and d.seq for d in node.outputs[0].shape)
    if not last and merged and node.op in ("view", "reshape_copy"):
        raise Mixed(f"{node.name} merges batch and sequence between units")


def _kinds(walk: _Walk, node: Node) -> tuple[str, ...]:
    """What each rank knows of a node's results. Raises Mixed."""
    ins = tuple(walk.unit.values[r] for r in node.inputs)
    kinds = tuple(walk.kinds[r] for r in node.inputs)
    if node.name in walk.averaged:
        return (SAME,) * len(node.outputs)
    if node.op == "attention":
        return _attention(walk, node, ins, kinds)
    for tensor in node.outputs:
        if SHARED in kinds:
            _regular(tensor, node.name)
    if WHOLE in kinds:
        if SHARED in kinds:
            raise Mixed(f"{node.name} reads a mask of the whole sequence outside attention")
        return _worst(walk, node, kinds, WHOLE)
    if any(len(_sequence(t)) > 1 for t in node.outputs):
        raise Mixed(f"{node.name} compares every token with every other outside attention")
    routed = node.module in walk.routed and node.op in ROUTING
    if node.op in ON_EXPERTS or routed:
        floats = any(
            k in (PARTIAL, MEAN) and t.dtype in FLOATS for k, t in zip(kinds, ins)
        )  # offsets are of this rank's rows: they are meant so
        if not floats:
            return tuple(
                SHARED if _sequence(t) else PARTIAL if set(kinds) & {SHARED, PARTIAL} else SAME
                for t in node.outputs
            )
    if PARTIAL in kinds:
        return _worst(walk, node, kinds, PARTIAL)
    if MEAN in kinds:
        products = sum(k == MEAN for k in kinds) > 1 or (node.op == "div" and kinds[0] != MEAN)
        linear = node.op in LINEAR or (node.op in ("mul", "div") and not products)
        return _worst(walk, node, kinds, MEAN if linear and SHARED not in kinds else PARTIAL)
    return _split(walk, node, ins, kinds)


def _split(
    walk: _Walk, node: Node, ins: tuple[Tensor, ...], kinds: tuple[str, ...]
) -> tuple[str, ...]:
    """Results of what is split on the sequence: the op's letters say what must be whole."""
    table = node.op in LOOKUPS and kinds[:1] == (SAME,)
    elementwise = node.op == "complex" and [_sequence(t) for t in ins[:1]] == [
        _sequence(t) for t in node.outputs
    ]
    if table or elementwise:
        return tuple(SHARED if SHARED in kinds else SAME for _ in node.outputs)
    spec = rule(node).spec(node, ins)
    carried: set[str] = set()
    for letters, tensor, kind in zip(spec.inputs, ins, kinds):
        if kind != SHARED:
            continue
        for at in _sequence(tensor):
            letter = _letter(letters, at)
            if letter.startswith(REDUCED) and node.op != "mean":
                raise Mixed(f"{node.name} ({node.op}) needs the whole sequence")
            carried.add(letter)
    found = []
    for letters, tensor, ref in zip(spec.outputs, node.outputs, node.refs()):
        dims = _sequence(tensor)
        here = {_letter(letters, i) for i in dims}
        if dims and not here & carried and not _uniform(node, tensor):
            raise Mixed(f"{node.name} ({node.op}) makes positions for the sequence inside the unit")
        if carried <= here or not carried:
            found.append(SHARED if dims else SAME)
            continue
        average = node.op == "mean" or (node.op in LOSSES and not tensor.shape)
        if not average:
            walk.origin[ref] = f"{node.name} ({node.op})"
        found.append(MEAN if average else PARTIAL)
    return tuple(found)


def _uniform(node: Node, tensor: Tensor) -> bool:
    """Whether what is made along a sequence dimension is the same for each token: repeats, fills
    and noise; one dimension of numbers made from nothing is an arange."""
    return node.op in ("expand", "repeat") or (node.op == "create" and len(tensor.shape) > 1)


def _attention(
    walk: _Walk, node: Node, ins: tuple[Tensor, ...], kinds: tuple[str, ...]
) -> tuple[str, ...]:
    """Attention over tokens is shared; its mask must be whole and given."""
    for key in ("softcap", "sinks"):
        if node.attr(key):
            raise Mixed(f"{node.name}: {key} is no argument of scaled_dot_product_attention")
    queries, keys = bool(_sequence(ins[0])), bool(_sequence(ins[1]))
    if keys and not queries:
        raise Mixed(f"{node.name}: queries that are no tokens attend to all tokens")
    if node.attr("mask"):
        dims, kind = _sequence(ins[3]), kinds[3]
        if keys and (len(dims) != 2 or kind != WHOLE):
            raise Mixed(f"{node.name}: its mask is not given for all queries and keys")
        if walk.learns[node.inputs[3]]:
            raise Mixed(f"{node.name}: its mask is learnt")
    if set(kinds[:3]) & {MEAN, PARTIAL}:
        return _worst(walk, node, kinds, PARTIAL)
    return tuple(SHARED if _sequence(t) else SAME for t in node.outputs)


def _worst(walk: _Walk, node: Node, kinds: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """All results are of one kind; where a statistic was made is remembered."""
    if kind == PARTIAL:
        known = next((walk.origin[r] for r in node.inputs if r in walk.origin), None)
        what = known or f"{node.name} ({node.op})"
        walk.origin.update(dict.fromkeys(node.refs(), what))
    return (kind,) * len(node.outputs)


def _letter(letters: Letters, at: int) -> str:
    return letters[at] if at < len(letters) else f"{REDUCED}x"


def _sequence(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions that grow with the sequence."""
    return tuple(i for i, d in enumerate(tensor.shape) if d.seq)


def _plain(tensor: Tensor) -> str:
    """What a unit makes of a whole value that it is given: its share, if it has a sequence."""
    count = len(_sequence(tensor))
    return (SAME, SHARED, WHOLE)[min(count, 2)]


def _regular(tensor: Tensor, what: str) -> None:
    """Every rank has the same size of each dimension."""
    for size in tensor.shape:
        if size.seq and (size.offset or size.denominator != 1 or size.seq > 1):
            raise Mixed(f"{what} has a dimension of {size}, which ranks cannot share")


def _from_targets(root: Unit) -> frozenset[str]:
    """Top-level values that follow from what the loss compares with."""
    found = {name for name, _ in root.inputs if name.startswith("targets")}
    for node in root.nodes:
        if node.op != "call" and found & set(node.inputs):
            found.update(node.refs())
    return frozenset(found)
