"""A pass: a stack of experts that multiplies every token, as experts that tokens are routed to.

A forward may copy all tokens once per expert, weigh each copy by its score (zero, but for the
token's top k), multiply all of them by a stack of matrices and sum over the experts, as Llama 4's
in transformers does. An engine with kernels of its own for experts runs a token's own ones alone:
what that is of the graph is made here, for the costs. Parameters stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ir.backward import storage_roots, with_saved
from ir.graph import Attr, Dim, Graph, Node, Tensor, Unit, dim
from ir.ops import rule

_COPIES = ("repeat", "expand", "gather", "index")  # ops that give every expert the tokens
_TURNS = ("permute", "view", "reshape_copy", "cast")
_SPREADS = ("scatter", "one_hot", "index_put")  # what writes a token's scores where its experts are


@functools.cache
def routed(graph: Graph) -> Graph:
    """The graph with each such stack as routed experts, itself where there is none; `written` is
    what it was made from."""
    units = tuple(_routed(unit) or unit for unit in graph.units)
    if units == graph.units:
        return graph
    return replace(with_saved(replace(graph, units=units)), written=graph)


def as_written(graph: Graph) -> Graph:
    """The graph as the model is written, of one that was rewritten for an engine."""
    return graph.written or graph


def stacks(unit: Unit) -> tuple[tuple[int, int], ...]:
    """(experts, of them a token's own) of every product of all tokens with a stack of experts."""
    own = _own_experts(unit)
    return tuple(
        (count, own[count]) for node in (unit.nodes if own else ())
        if (count := _stacked(unit, node)) in own
    )  # fmt: skip


def _own_experts(unit: Unit) -> dict[int, int]:
    """Of every number of experts that tokens choose among, how many each chooses."""
    found = {}
    for node in unit.nodes:
        given = unit.values[node.inputs[0]].shape if node.op == "topk" else ()
        if given:
            at = node.number("dim", -1)
            found[int(given[at].at(1, 1))] = int(node.outputs[0].shape[at].at(1, 1))
    return found


def _stacked(unit: Unit, node: Node) -> int:
    """How many matrices of a parameter a product has, one for each share of its rows; else 0."""
    if rule(node).kind != "gemm":
        return 0
    stack = unit.values[node.inputs[1]].shape
    parameter = storage_roots(unit)[node.inputs[1]] in unit.parameter_names
    if len(stack) != 3 or not parameter or not stack[0].is_constant:
        return 0
    spec = rule(node).spec(node, tuple(unit.values[r] for r in node.inputs))
    own = spec.inputs[1][0]
    return int(stack[0].at(1, 1)) if own in spec.inputs[0] and own in spec.outputs[0] else 0


@dataclass(kw_only=True)
class _Walk:
    """A unit while its stack becomes routed experts. nodes: those it has by now. rows: of values
    with every token for every expert, those with a token's own experts alone. scores: of values
    that only turn the scores of all experts, the scores, [tokens, experts]; weights: of those, each
    row's own. renamed: of results, what gives them now. weighed: rows were multiplied by scores;
    multiplied: so many times by a stack."""

    unit: Unit
    topk: Node
    experts: int
    tokens: Dim
    nodes: list[Node] = field(default_factory=list)
    rows: dict[str, str] = field(default_factory=dict)
    scores: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    offsets: str = ""
    weighed: bool = False
    multiplied: int = 0

    @property
    def choices(self) -> int:
        return int(self.unit.values[self.topk.name].shape[-1].at(1, 1))

    def add(self, node: Node) -> str:
        self.nodes.append(node)
        return node.name


def _routed(unit: Unit) -> Unit | None:
    """The unit with its stack routed; None where it has none, or one that is not read. Of several
    choices among as many (of groups, of experts) it is the one that the scores are of."""
    counts = {count for count, _ in stacks(unit)}
    for node in unit.nodes if counts else ():
        given = unit.values[node.inputs[0]].shape if node.op == "topk" else ()
        if len(given) == 2 and node.number("dim", -1) in (-1, 1) and given[1].at(1, 1) in counts:
            made = _walked(_Walk(
                unit=unit, topk=node, experts=given[1].at(1, 1), tokens=given[0]
            ))  # fmt: skip
            if made is not None:
                return made
    return None


def _walked(walk: _Walk) -> Unit | None:
    unit = walk.unit
    chosen = _made_of_choice(walk)
    for node in unit.nodes:
        if any(r in walk.rows for r in node.inputs):
            if not _on_rows(walk, node):
                return None
        elif _copies_tokens(walk, node):
            _dispatch(walk, node)
        else:
            _note_scores(walk, node, chosen)
            walk.nodes.append(replace(
                node, inputs=tuple(walk.renamed.get(r, r) for r in node.inputs)
            ))  # fmt: skip
    outputs = tuple(walk.renamed.get(r, r) for r in unit.outputs)
    if not (walk.weighed and walk.multiplied >= 2) or any(r in walk.rows for r in unit.outputs):
        return None
    return replace(unit, nodes=tuple(_alive(walk.nodes, unit, outputs)), outputs=outputs)


def _made_of_choice(walk: _Walk) -> set[str]:
    """Values that say which experts a token goes to: made of what the choice was spread over."""
    found: set[str] = set()
    index = f"{walk.topk.name}:1"
    for node in walk.unit.nodes:
        if (node.op in _SPREADS and index in node.inputs) or any(r in found for r in node.inputs):
            found.update(node.refs())
    return found


def _note_scores(walk: _Walk, node: Node, chosen: set[str]) -> None:
    """Scores of all experts, and what only turns them."""
    if node.name in chosen and node.outputs[0].shape == (walk.tokens, dim(walk.experts)):
        walk.scores[node.name] = node.name
    elif node.op in _TURNS and node.inputs[0] in walk.scores:
        walk.scores[node.name] = walk.scores[node.inputs[0]]


def _copies_tokens(walk: _Walk, node: Node) -> bool:
    """Whether a node gives every expert all tokens: [tokens, h] -> [experts * tokens, h]."""
    if node.op not in _COPIES or len(walk.unit.values[node.inputs[0]].shape) != 2:
        return False
    given, made = walk.unit.values[node.inputs[0]], node.outputs[0]
    return (
        given.shape[0] == walk.tokens and made.shape[-1] == given.shape[-1]
        and _all(walk, made) and len(made.shape) in (2, 3)
    )  # fmt: skip


def _all(walk: _Walk, tensor: Tensor) -> bool:
    """Whether a value has a row of its last dimension for every token and every expert, experts
    outermost."""
    lead = tensor.shape[:-1]
    whole = replace(walk.tokens, numerator=walk.tokens.numerator * walk.experts)
    return lead in ((whole,), (dim(walk.experts), walk.tokens))


def _dispatch(walk: _Walk, node: Node) -> None:
    made = replace(
        node, name=_name(walk, node, "dispatch"), op="dispatch", attrs=(),
        inputs=(walk.renamed.get(node.inputs[0], node.inputs[0]), f"{walk.topk.name}:1"),
        outputs=(
            _of_rows(walk, node.outputs[0]),
            Tensor(shape=(dim(walk.experts),), dtype="i32"),
        ),
    )  # fmt: skip
    walk.rows[node.name] = walk.add(made)
    walk.offsets = f"{made.name}:1"


def _on_rows(walk: _Walk, node: Node) -> bool:
    """Run a node on a token's own experts alone. False: it is not known how."""
    given = walk.rows.get(node.inputs[0], "")
    if node.op == "sum" and given:
        return _combine(walk, node)
    if node.op == "matmul" and given and _stacked(walk.unit, node) == walk.experts:
        walk.multiplied += 1
        walk.rows[node.name] = walk.add(replace(
            node, name=_name(walk, node, "grouped_matmul"), op="grouped_matmul", attrs=(),
            inputs=(given, node.inputs[1], walk.offsets),
            outputs=(_of_rows(walk, node.outputs[0]),),
        ))  # fmt: skip
        return True
    if not all(_all(walk, t) for t in node.outputs):
        return False
    if node.op in ("view", "reshape_copy"):  # rows are [rows, features] whatever was around them
        walk.rows[node.name] = given
        return True
    inputs = [_operand(walk, r) for r in node.inputs]
    attrs = _along_features(node)
    if None in inputs or attrs is None or not (rule(node).fusible or node.op == "split"):
        return False
    walk.add(replace(
        node, inputs=tuple(r for r in inputs if r is not None), attrs=attrs,
        outputs=tuple(_of_rows(walk, t) for t in node.outputs),
    ))  # fmt: skip
    walk.rows |= dict(zip(node.refs(), node.refs()))
    walk.weighed |= node.op == "mul" and any(r in walk.scores for r in node.inputs)
    return True


def _along_features(node: Node) -> tuple[tuple[str, Attr], ...] | None:
    """A node's attributes where it works along the last dimension, that of features, or along
    none; else None."""
    last = len(node.outputs[0].shape) - 1
    said = {"dim": (-1, last), "dims": ((-1,), (last,))}
    if any(key in said and value not in said[key] for key, value in node.attrs):
        return None
    ours: dict[str, Attr] = {"dim": -1, "dims": (-1,)}
    return tuple((key, ours.get(key, value)) for key, value in node.attrs)


def _operand(walk: _Walk, ref: str) -> str | None:
    """What stands for an operand of a node on rows; None for one that is not known."""
    if ref in walk.rows:
        return walk.rows[ref]
    if ref in walk.scores:
        return _weights(walk, walk.scores[ref])
    tensor = walk.unit.values[ref]
    alike = len(tensor.shape) <= 1 and all(d.is_constant for d in tensor.shape)
    return walk.renamed.get(ref, ref) if alike else None


def _weights(walk: _Walk, scores: str) -> str:
    """Each row's own score, [rows, 1]. That rows lie by expert, and scores by token, is a number a
    row to move: it is left out."""
    if scores not in walk.weights:
        maker, index = walk.unit.producers[scores], f"{walk.topk.name}:1"
        dtype, rows = maker.outputs[0].dtype, _of_rows(walk, walk.unit.values[index]).shape[0]
        made = replace(
            maker, name=_name(walk, maker, "gather"), op="gather", inputs=(scores, index),
            attrs=(("dim", 1),),
            outputs=(Tensor(shape=walk.unit.values[index].shape, dtype=dtype),),
        )  # fmt: skip
        walk.weights[scores] = walk.add(made)
        if walk.choices > 1:
            walk.weights[scores] = walk.add(replace(
                maker, name=_name(walk, maker, "view"), op="view", inputs=(made.name,), attrs=(),
                outputs=(Tensor(shape=(rows, dim(1)), dtype=dtype),),
            ))  # fmt: skip
    return walk.weights[scores]


def _combine(walk: _Walk, node: Node) -> bool:
    """A sum over the experts."""
    given = walk.unit.values[node.inputs[0]]
    if node.attr("dims") not in ((0,), (-3,)) or len(given.shape) != 3:
        return False
    made = walk.add(replace(
        node, name=_name(walk, node, "combine"), op="combine", attrs=(),
        inputs=(walk.rows[node.inputs[0]], f"{walk.topk.name}:1"),
    ))  # fmt: skip
    walk.renamed[node.name] = made
    return node.outputs[0].shape == (walk.tokens, given.shape[-1])


def _of_rows(walk: _Walk, tensor: Tensor) -> Tensor:
    count = replace(walk.tokens, numerator=walk.tokens.numerator * walk.choices)
    return replace(tensor, shape=(count, tensor.shape[-1]))


def _name(walk: _Walk, node: Node, op: str) -> str:
    """A new node's name in the module of the one that it stands for: `path/op`, with a number
    where there is another of that name."""
    taken = {n.name for n in (*walk.unit.nodes, *walk.nodes)}
    path = f"{node.module}/" if node.module else ""
    names = (f"{path}{op}" + (f"_{i}" if i else "") for i in range(len(taken) + 1))
    return next(name for name in names if name not in taken)


def _alive(nodes: list[Node], unit: Unit, outputs: tuple[str, ...]) -> Iterator[Node]:
    """The nodes without those that nobody reads any more."""
    before = {r for n in unit.nodes for r in n.inputs} | set(unit.outputs)
    read, kept = set(outputs), []
    for node in reversed(nodes):
        new = node.name not in unit.producers
        unread = not new and not any(r in before for r in node.refs())
        if unread or any(r in read for r in node.refs()):
            kept.append(node)
            read.update(node.inputs)
    return reversed(kept)
