"""Reading a folded graph for serving: which matrices, attentions, experts and states it has.

A unit's nodes are walked once in order of execution. Each value knows the heavy nodes that it came
from through light ones, and where tensor parallelism leaves it: whole, split or a partial sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

from cost_models.chain import chain_of
from cost_models.kernels import LOOKUPS, chains
from cost_models.layout import expert_parameters
from cost_models.serving_engines import NATIVE
from cost_models.serving_light import eager_elements, edges, has_tokens
from cost_models.serving_shapes import (
    Attend,
    Experts,
    LayerShape,
    Light,
    Matrix,
    Recurrence,
    ServedModel,
)
from ir.errors import PlanError
from ir.graph import FLOATS, ITEM_BYTES, Graph, Node, Unit
from ir.ops import rule
from ir.stacks import as_written, routed

# Reductions over features: a matrix whose result is normalised whole is not split, unless heads
# of attention follow (then the norm's sums are exchanged).
_REDUCING = ("mean", "sum", "var", "rms_norm", "layer_norm", "softmax", "vector_norm", "amax")
_PICKING = ("topk", "sort")
_ADDING = ("add", "sub")
_MIXERS = frozenset({"attention", "scan", "delta_rule", "linear_attention", "causal_conv1d"})


def served_model(graph: Graph, engine: str = NATIVE) -> ServedModel:
    """Read a graph's layers. Raises PlanError for work that a cache cannot serve, naming it.

    A product of all tokens with every expert of a stack (Llama 4's) is one matrix to our own
    runtime, which runs the forward; the kernels of other engines take a token's own experts alone.
    """
    graph = as_written(graph) if engine == NATIVE else routed(as_written(graph))
    chain = chain_of(graph)
    counts: dict[str, int] = {}
    for link in chain.links:
        if link.is_layer:
            counts[link.unit.name] = counts.get(link.unit.name, 0) + 1
    if not counts:
        raise PlanError(
            f"{graph.name} has no repeated layers to serve",
            why="a server caches what layers keep for each token",
            hints=("give a model whose layers are in a container",),
        )
    layers = tuple(_layer(graph.unit_by_name[name], count) for name, count in counts.items())
    table, vocab = 0, 0
    head: tuple[Matrix, ...] = ()
    for name in dict.fromkeys(link.unit.name for link in chain.links if not link.is_layer):
        unit = graph.unit_by_name[name]
        table += sum(p.tensor.numel() for p in unit.parameters if _looked_up(unit, p.name))
        found = _Walk(unit).matrices
        if found:
            head = tuple(replace(m, block="head", split="column") for m in found)
            vocab = max(m.n for m in head)
    tied = bool(head) and any(alias.startswith(link.path) for alias, _ in graph.tied
                              for link in chain.links[-1:])  # fmt: skip
    hidden = head[0].k if head else max(m.k for m in layers[0].matrices if m.split == "column")
    known: float = table + (0 if tied else sum(m.elements for m in head))
    known += sum(
        layer.count * (sum(m.elements for m in layer.matrices)
                       + sum(e.elements for e in layer.experts))
        for layer in layers
    )  # fmt: skip
    total = sum(
        p.tensor.numel() for link in chain.links for p in link.unit.parameters
        if p.kind != "buffer"
    ) - (sum(m.elements for m in head) if tied else 0)  # fmt: skip
    return ServedModel(
        name=graph.name, hidden=hidden, vocab=vocab, tied=tied, layers=layers, head=head,
        embedding_elements=table, other_elements=max(round(total - known), 0),
        order=tuple([*counts].index(link.unit.name) for link in chain.links if link.is_layer),
    )  # fmt: skip


def _layer(unit: Unit, count: int) -> LayerShape:
    walk = _Walk(unit)
    return LayerShape(
        count=count, matrices=walk.matrices, attention=walk.attends(), experts=walk.experts(),
        recurrences=walk.recurrences(), light=walk.light(), reductions=tuple(walk.reductions),
        norm_reductions=walk.norm_reductions,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a parameter is a part of: its block, "" for norms and the like. split, over tp:
    "column", "row", "whole", "experts", or "free" where that follows from the others."""

    block: str = ""
    split: str = "whole"


def parts_of(graph: Graph) -> dict[str, dict[str, Part]]:
    """Of every unit class each parameter's part, by its name in the unit."""
    chain, found = chain_of(graph), dict[str, dict[str, Part]]()
    for link in chain.links:
        unit = link.unit
        if unit.name in found:
            continue
        walk, experts = _Walk(unit), expert_parameters(unit)
        rows = {p.name: Part() for p in unit.parameters}
        for name, linear in walk.linears.items():
            block = walk.blocks[name] if link.is_layer else "head"
            split = linear.split if link.is_layer else "column"
            weight = linear.node.inputs[1]
            if weight not in rows or walk.kv_heads(name):  # turned on the way; keys and values
                split = "free"
            rows[walk.weights[weight]] = Part(block=block, split=split)
        for p in unit.parameters:
            if p.name in experts:
                rows[p.name] = Part(block="routed_experts", split="experts")
            elif not link.is_layer and _looked_up(unit, p.name):
                rows[p.name] = Part(block="embeddings")
        found[unit.name] = rows
    return found


def _looked_up(unit: Unit, name: str) -> bool:
    return any(n.op == "embedding" and n.inputs[0] == name for n in unit.nodes)


@dataclass(slots=True, kw_only=True)
class _Found:
    """A matrix in the making: what it reads, the matrices and mixers behind that, what reads it."""

    node: Node
    k: int
    n: int
    rows: int
    read: str
    parents: frozenset[str]
    split: str = "column"
    feeds: set[str] = field(default_factory=set)
    normed: bool = False


class _Walk:
    """One pass over a unit's nodes.

    roots: the heavy nodes that a value came from through light ones. placed: "R" whole on every
    rank, "S" split over tp, "P" a partial sum.
    """

    def __init__(self, unit: Unit):
        self.unit = unit
        self.weights = _of_parameters(unit)
        self.roots: dict[str, frozenset[str]] = {}
        self.linears: dict[str, _Found] = {}
        self.attention: list[tuple[Node, frozenset[str], frozenset[str]]] = []
        self.scans: list[Node] = []
        self.grouped: list[Node] = []
        self.inside_experts: set[str] = set()
        self.placed: dict[str, str] = {}
        self.reductions: list[str] = []
        self.norm_reductions = 0
        for node in unit.nodes:
            self._visit(node)
        self.mixers = {n.name for n, _, _ in self.attention} | {n.name for n in self.scans}
        for node in unit.nodes:
            state = self._place(node, [self.placed.get(r, "R") for r in node.inputs])
            self.placed.update(dict.fromkeys(node.refs(), state))
        self.blocks = {name: self._block(found) for name, found in self.linears.items()}

    # --- what there is ------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        kind = rule(node).kind
        came = [self.roots.get(r, frozenset()) for r in node.inputs]
        everything = frozenset[str]().union(*came)
        picking = node.op in _PICKING
        heavy = kind not in ("memory", "free")
        if node.op == "cross_entropy":
            return
        if heavy or picking:
            for name in everything & self.linears.keys():
                self.linears[name].feeds.add("picked" if picking else node.op)
        if kind == "gemm":
            self._linear(node, everything)
        elif kind == "attention":
            self.attention.append((node, came[1], came[2]))
        elif kind == "scan":
            self.scans.append(node)
        elif kind == "grouped_gemm":
            self.grouped.append(node)
        elif kind in ("conv", "leaf"):
            raise PlanError(
                f"{node.name or node.op} of {self.unit.name} is not costed for serving",
                where=node.source, why=f"a {kind} inside a layer has no cached form here",
            )  # fmt: skip
        if node.op in _REDUCING:
            self._reduced(node)
        touched = any(r in self.inside_experts for r in node.inputs)
        if kind == "dispatch" or (touched and kind != "combine"):
            self.inside_experts.update(node.refs())
        mine = frozenset({node.name}) if heavy else everything
        self.roots.update(dict.fromkeys(node.refs(), mine))

    def _linear(self, node: Node, parents: frozenset[str]) -> None:
        unit = self.unit
        if node.inputs[1] not in self.weights:
            raise PlanError(
                f"{node.name} of {unit.name} multiplies two activations", where=node.source,
                why="attention written as plain products keeps no cache that a server could use",
                hints=("an attention that calls scaled_dot_product_attention is served",),
            )  # fmt: skip
        spec = rule(node).spec(node, tuple(unit.values[r] for r in node.inputs))
        given, out = spec.inputs[0], spec.outputs[0]
        sizes = dict(zip(spec.inputs[1], self._sizes(node.inputs[1])))
        k = prod(size for x, size in sizes.items() if x in given and x not in out)
        n = prod(size for x, size in sizes.items() if x not in given)
        stack = prod(size for x, size in sizes.items() if x in given and x in out)
        rows = unit.values[node.inputs[0]].numel(1, 1) // (k * stack)
        self.linears[node.name] = _Found(
            node=node, k=k, n=n * stack, rows=max(rows, 1), read=node.inputs[0], parents=parents,
        )  # fmt: skip

    def _reduced(self, node: Node) -> None:
        """A norm over all features of what matrices made, and not one of each head's."""
        tensor = self.unit.values[node.inputs[0]]
        for name in self.roots.get(node.inputs[0], frozenset()) & self.linears.keys():
            own = self.unit.values[name]
            alike = len(tensor.shape) <= len(own.shape) and tensor.shape[0] == own.shape[0]
            self.linears[name].normed |= alike and tensor.numel(1, 1) > 1

    # --- how tensor parallelism places it -----------------------------------------------------

    def _place(self, node: Node, ins: list[str]) -> str:
        if node.name in self.linears:
            return self._place_linear(self.linears[node.name], ins[0])
        if rule(node).kind in ("attention", "scan"):
            return "S" if "S" in ins[:3] else "R"
        if rule(node).kind == "combine":
            return "P"
        whole = any(
            s == "R" and has_tokens(self.unit.values[r]) for s, r in zip(ins, node.inputs)
        )
        if "P" in ins and node.op in _ADDING and whole:
            roots = self.roots.get(node.inputs[ins.index("P")], frozenset())
            named = [self._block(self.linears[r]) for r in sorted(roots & self.linears.keys())]
            self.reductions.append("attention" if "attention" in named else "mlp")
            return "R"
        state = "P" if "P" in ins else "S" if "S" in ins else "R"
        if state == "S" and node.op in ("mean", "rms_norm", "layer_norm"):
            made = self.roots.get(node.inputs[0], frozenset()) & self.linears.keys()
            self.norm_reductions += any(self.linears[m].normed for m in made)
        return state

    def _place_linear(self, found: _Found, given: str) -> str:
        if given == "S":
            found.split = "row"
            return "P"
        compressed = found.normed and any(
            found.node.name in other.parents for other in self.linears.values()
        )
        whole = "picked" in found.feeds or found.n == 1 or compressed
        found.split = "whole" if whole else "column"
        return "R" if whole else "S"

    def _block(self, found: _Found) -> str:
        """The class of blocks a matrix belongs to: what leads to a mixer, gates or follows it."""
        if "picked" in found.feeds:
            return "router"
        reads = [x for x in self.linears.values() if found.node.name in x.parents]
        leads = found.feeds & _MIXERS or any(x.feeds & _MIXERS for x in reads)
        gates = any(x.parents & self.mixers for x in reads)
        if leads or gates or found.parents & self.mixers:
            return "attention"
        return "shared_experts" if self.grouped else "mlp"

    # --- the results --------------------------------------------------------------------------

    def _sizes(self, ref: str) -> tuple[int, ...]:
        """Sizes of a value for one token of one sequence."""
        return self.unit.values[ref].sizes(1, 1)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Matrices of one input, block and split are one kernel."""
        keyed: dict[tuple[str, str, str, int, int, bool], list[tuple[int, int]]] = {}
        expanding = {name for _, _, values in self.attention for name in self._expanding(values)}
        for name, found in self.linears.items():
            key = (found.read, self.blocks[name], found.split, found.k, found.rows,
                   name in expanding)  # fmt: skip
            keyed.setdefault(key, []).append((found.n, self.kv_heads(name)))
        return tuple(
            Matrix(block=block, k=k, parts=tuple(parts), split=split, rows=rows, expands=expands)
            for (_, block, split, k, rows, expands), parts in keyed.items()
        )

    def _expanding(self, values: frozenset[str]) -> list[str]:
        """Matrices of attention's values that read what another matrix made, a latent."""
        return [
            name for name in sorted(values & self.linears.keys())
            if self.linears[name].parents & self.linears.keys()
            and not self.linears[name].parents & self.mixers
        ]  # fmt: skip

    def kv_heads(self, name: str) -> int:
        for node, keys, values in self.attention:
            if name in keys | values and not self._latent(keys, values)[0]:
                return self._sizes(node.inputs[1])[1]
        return 0

    def _latent(self, keys: frozenset[str], values: frozenset[str]) -> tuple[int, int]:
        """(elements of a latent that values expand, of the key beside it); 0 where there is none.

        The latent is what a compressing matrix made: the cache keeps that, not the heads.
        """
        for name in self._expanding(values):
            found = self.linears[name]
            wide = max(self.linears[x].n for x in found.parents & self.linears.keys())
            beside = (keys & self.linears.keys()) - {name}
            return found.k, max(wide - found.k, 0) if beside else 0
        return 0, 0

    def attends(self) -> tuple[Attend, ...]:
        found = []
        for node, keys, values in self.attention:
            q, k, v = (self._sizes(r) for r in node.inputs[:3])
            latent, rope = self._latent(keys, values)
            found.append(
                Attend(
                    heads=q[1], kv_heads=k[1], dim_qk=q[3], dim_v=v[3], latent=latent, rope=rope,
                    window=node.number("window") or node.number("chunk"),
                )
            )  # fmt: skip
        return tuple(found)

    def experts(self) -> tuple[Experts, ...]:
        """The routed experts of the layer; one set of them a layer."""
        if not self.grouped:
            return ()
        last = self.grouped[-1]
        given = self._sizes(last.inputs[0])
        up = sum(self._sizes(n.name)[-1] for n in self.grouped[:-1])
        return (
            Experts(
                experts=self._sizes(last.inputs[1])[0],
                topk=given[0],
                hidden=self._sizes(last.name)[-1], inter=(up + given[-1]) / 3,
            ),
        )  # fmt: skip

    def recurrences(self) -> tuple[Recurrence, ...]:
        found = []
        for node in self.scans:
            outs = tuple(t.sizes(1, 1) for t in node.outputs)
            ins = tuple(self._sizes(r) for r in node.inputs)
            values = [t for t in (*(self.unit.values[r] for r in node.inputs), *node.outputs)
                      if has_tokens(t)]  # fmt: skip
            short = node.op == "causal_conv1d"  # keeps its last inputs, 16 bits each
            kept = 2 * (ins[1][-1] - 1) if short else 4 * node.number("state", 1)
            found.append(
                Recurrence(
                    state_bytes=float(prod(outs[0]) * kept),
                    flop=float(rule(node).flop(node, ins, outs)),
                    moved_bytes=float(sum(t.nbytes(1, 1) for t in values)),
                )
            )
        return tuple(found)

    def light(self) -> Light:
        """Chains of elementwise nodes, each one kernel; those between experts are the experts',
        and what a router makes of its scores is one kernel in all."""
        routers = {name for name, block in self.blocks.items() if block == "router"}
        kernels, whole, split = len(routers), 0.0, 0.0
        for run in chains(self.unit):
            if all(r in self.inside_experts for n in run for r in n.refs()):
                continue
            if any(self.roots[n.name] and self.roots[n.name] <= routers for n in run):
                continue
            moving = [r for r in edges(self.unit, run) if has_tokens(self.unit.values[r])]
            kernels += bool(moving)
            for r in moving:
                tensor = self.unit.values[r]  # an engine's own kernels keep 16 bits
                size = tensor.numel(1, 1) * min(ITEM_BYTES[tensor.dtype], 2)
                divided = tensor.dtype in FLOATS and self.placed.get(r, "R") == "S"
                split, whole = split + size * divided, whole + size * (not divided)
        kernels += sum(
            n.op in (*_PICKING, *LOOKUPS) and not self.roots[n.name] <= routers
            for n in self.unit.nodes
        )
        return Light(
            kernels=kernels, whole_bytes=whole, split_bytes=split,
            ops=sum(not rule(n).view for n in self.unit.nodes),
            eager_elements=eager_elements(self.unit),
        )  # fmt: skip


def _of_parameters(unit: Unit) -> dict[str, str]:
    """Values made of one parameter alone, through casts and views: value -> parameter."""
    found = {p.name: p.name for p in unit.parameters}
    for node in unit.nodes:
        if len(node.inputs) == 1 and node.inputs[0] in found and rule(node).fusible:
            found[node.name] = found[node.inputs[0]]
    return found
