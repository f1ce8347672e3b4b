"""Where a unit routes tokens to experts, read off its graph: modules, weights, statistics.

What the runtime does to a routed module, and what it cannot do, are both decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cost_models.layout import expert_parameters
from ir.graph import AFTER, Graph, Node, Tensor, Unit
from ir.ops import rule

ON_EXPERTS = ("grouped_matmul", "expert_bias")
# an op that may reduce over tokens, and the torch functions that run it
REDUCTIONS = {
    "mean": ("mean",), "sum": ("sum", "count_nonzero"), "histogram": ("bincount", "histc"),
}  # fmt: skip
PATTERN = "the experts are no stacked parameters that grouped matmuls read as they are"
LISTED = "the experts are modules of a list, each whole"
FUSED = "the experts' biases cannot be split over etp"
SUMMED = "{} gives more than a sum of what single experts give"
CHAIN = "{} of {} is no second matmul of its experts"
STATISTICS = "{} reduces over tokens that the ranks share, and is no mean, sum or count"
COMPARED = ("topk", "cumsum", "softmax")  # ops that compare what lies along their `dim`
CHOICE = "{} compares tokens that the ranks share"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A stacked parameter of experts. inner: its intermediate dimension, None where it has none
    (a bias); parts: matrices joined along it, as gate and up are."""

    name: str
    inner: int | None
    parts: int


def weights_of(unit: Unit) -> tuple[Weight, ...]:
    """The stacked parameters that grouped matmuls read as they are, or transposed."""
    found: dict[str, Weight] = {}
    after: set[str] = set()  # values made from a grouped matmul's result
    for node in unit.nodes:
        down = bool(node.inputs) and node.inputs[0] in after
        here = node.op in ON_EXPERTS or any(r in after for r in node.inputs)
        if here and node.op != "dispatch":
            after.update(node.refs())
        if node.op in ON_EXPERTS:
            name, dims = _stacked(unit, node.inputs[1])
            if name and node.op == "expert_bias":
                found[name] = Weight(name=name, inner=None, parts=1)
            elif name and len(dims) == 3:
                parts = 1 if down else _parts(unit, node)
                found[name] = Weight(name=name, inner=dims[1 if down else 2], parts=parts)
    return tuple(found.values())


def _stacked(unit: Unit, ref: str) -> tuple[str, list[int]]:
    """The parameter that an op on experts reads, and which of its dimensions are the op's; an
    empty name where it is cut or reshaped on the way."""
    dims = list(range(len(unit.values[ref].shape)))
    while ref not in unit.parameter_names:
        node = unit.producers.get(ref)
        if node is None or node.op not in ("permute", "cast"):
            return "", dims
        if node.op == "permute":
            order = node.attr("dims")
            assert isinstance(order, tuple)
            dims = [order[d] for d in dims]
        ref = node.inputs[0]
    return ref, dims


def _parts(unit: Unit, node: Node) -> int:
    """How many matrices' results a grouped matmul gives side by side."""
    readers = list(unit.consumers.get(node.name, ()))
    readers += [m for n in readers if n.op == "expert_bias" for m in unit.consumers.get(n.name, ())]
    return next((len(n.outputs) for n in readers if n.op == "split"), 1)


def lists_of(unit: Unit) -> tuple[tuple[str, ...], ...]:
    """Parameters of experts that are a module each: of each kind one for every expert, in order."""
    read = {r for n in unit.nodes if n.op in ON_EXPERTS for r in n.inputs}
    return tuple(
        n.inputs for n in unit.nodes if n.op == "stack_view" and n.name in read
        and all(ref in unit.parameter_names for ref in n.inputs)
    )  # fmt: skip


def routed_modules(unit: Unit) -> tuple[str, ...]:
    """Module paths, in the unit, of its routed modules: the smallest that hold the router's top-k
    with the grouped matmuls; "" where only the whole unit does."""
    return _smallest_with(unit, {"topk", "combine"})


def summing_modules(unit: Unit) -> tuple[str, ...]:
    """Module paths of the smallest modules that hold grouped matmuls and combine their results:
    they give a sum over experts (`no_expert_sum`)."""
    return _smallest_with(unit, {"combine"})


def _smallest_with(unit: Unit, ops: set[str]) -> tuple[str, ...]:
    grouped = dict.fromkeys(n.module for n in unit.nodes if n.op == "grouped_matmul")
    found = []
    for module in grouped:
        parts = module.split(".") if module else []
        above = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
        held = (p for p in above if ops <= {n.op for n in nodes_in(unit, p)})
        found.append(next(held, ""))
    return tuple(dict.fromkeys(found))


def nodes_in(unit: Unit, path: str) -> tuple[Node, ...]:
    """The nodes of a module and those inside it."""
    return tuple(n for n in unit.nodes if inside(n.module, path))


def inside(module: str, path: str) -> bool:
    """Whether a module is another or in it; all are in the unit, ""."""
    return not path or module == path or module.startswith(f"{path}.")


def expert_count(unit: Unit, path: str) -> int:
    """Experts of a routed module."""
    weights = (n.inputs[1] for n in nodes_in(unit, path) if n.op == "grouped_matmul")
    return int(unit.values[next(weights)].shape[0].at(1, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """A reduction over tokens in a routed module: the functions that may run it, its operand and
    its result."""

    node: str
    functions: tuple[str, ...]
    given: Tensor
    made: Tensor


def reductions(unit: Unit, ours: Callable[[str], bool]) -> tuple[Reduction, ...]:
    """The reductions over tokens in the modules that are `ours`, in the order of the forward."""
    return tuple(
        Reduction(
            node=n.name, functions=REDUCTIONS[n.op], given=unit.values[n.inputs[0]],
            made=n.outputs[0],
        )
        for n in unit.nodes
        if n.op in REDUCTIONS and ours(n.module) and _loses_tokens(unit, n)
    )  # fmt: skip


def _loses_tokens(unit: Unit, node: Node) -> bool:
    """Whether a node's operands have a token dimension and its results none."""
    given = any(d.seq for r in node.inputs for d in unit.values[r].shape)
    return given and not any(d.seq for t in node.outputs for d in t.shape)


# --- what cannot be run ---------------------------------------------------------------------------


def no_expert_axis(graph: Graph) -> str | None:
    """Why experts cannot lie over ep or etp: their weights are no stacks."""
    for unit in graph.units:
        ours = {w.name for w in weights_of(unit)}
        stray = sorted(expert_parameters(unit) - ours)
        if stray:
            return f"{PATTERN}: {stray[0]} of {unit.name}"
    return None


def no_whole_experts(graph: Graph) -> str | None:
    """Why ranks cannot have whole experts each: they are no stacks, and no modules of lists."""
    for unit in graph.units:
        ours = {w.name for w in weights_of(unit)} | {n for names in lists_of(unit) for n in names}
        stray = sorted(expert_parameters(unit) - ours)
        if stray:
            return f"{PATTERN}: {stray[0]} of {unit.name}"
    return None


def no_expert_slices(graph: Graph) -> str | None:
    """Why ranks cannot have slices of experts: those are modules of lists."""
    return LISTED if any(lists_of(unit) for unit in graph.units) else None


def no_expert_tensor_axis(graph: Graph) -> str | None:
    """Why experts cannot lie over etp: they have biases."""
    for unit in graph.units:
        biases = [w.name for w in weights_of(unit) if w.inner is None]
        if biases:
            return f"{FUSED}: {biases[0]} of {unit.name}"
    return None


def no_expert_sum(graph: Graph) -> str | None:
    """Why ranks that each have a part of the experts, or of each expert, cannot sum what their
    modules give: it is no sum of what single experts give."""
    for unit in graph.units:
        for path in summing_modules(unit):
            if sums_of(unit, path) is None:
                return SUMMED.format(f"{path or 'the whole'} of {unit.name}")
    return None


def no_expert_chain(graph: Graph) -> str | None:
    """Why ranks cannot each have a slice of every expert: its last matmul reads no other's."""
    for unit in graph.units:
        after = _after_grouped(unit)
        for node in _last_grouped(unit):
            if node.inputs[0] not in after:
                return CHAIN.format(node.name, unit.name)
    return None


def _after_grouped(unit: Unit) -> set[str]:
    """Values that are made from a grouped matmul's result."""
    after: set[str] = set()
    for node in unit.nodes:
        if node.op == "grouped_matmul" or any(r in after for r in node.inputs):
            after.update(node.refs())
    return after


def _last_grouped(unit: Unit) -> tuple[Node, ...]:
    """The grouped matmuls from whose results no other of the same routing is made."""
    reached: set[str] = set()  # values that a grouped matmul is made from
    last = []
    for node in reversed(unit.nodes):
        grouped = node.op == "grouped_matmul"
        made = any(r in reached for r in node.refs())
        if grouped and not made:
            last.append(node)
        if (made or grouped) and node.op != "dispatch":
            reached.update(node.inputs[:1] if grouped else node.inputs)
    return tuple(last)


def sums_of(unit: Unit, path: str) -> tuple[Tensor, ...] | None:
    """What a module gives that is linear in its last grouped matmuls: sums over experts. None where
    it gives anything else that is made of them, or that cannot be told from them by its shape."""
    last, partial, other = {n.name for n in _last_grouped(unit)}, set[str](), set[str]()
    nodes = [n for n in nodes_in(unit, path) if n.module != AFTER]
    created = {n.name for n in nodes if n.op == "create"}  # what rows are added up on: zeros
    for node in nodes:
        given = [r in partial for r in node.inputs]
        if node.name in last:
            partial.update(node.refs())
        elif any(given) or any(r in other for r in node.inputs):
            scaled = node.op in ("mul", "div") and given[0] and sum(given) == 1
            scaled |= node.op == "mul" and sum(given) == 1
            rows = node.op in ("combine", "expert_bias") and sum(given) == 1
            rows &= given[0] or (given[-1] and node.inputs[0] in created)
            alike = all(given) and (node.op in ("add", "sub", "sum", "cast") or rule(node).view)
            mixed = any(r in other for r in node.inputs)
            made = partial if not mixed and (scaled or rows or alike) else other
            made.update(node.refs())
    names = {n.name for n in nodes}
    read = {ref for n in unit.nodes if n.name not in names for ref in n.inputs} | set(unit.outputs)
    given_away = [ref for n in nodes for ref in n.refs() if ref in read]
    sums = [unit.values[ref] for ref in given_away if ref in partial]
    rest = [unit.values[ref] for ref in given_away if ref not in partial]
    if any(ref in other for ref in given_away):
        return None
    return None if any(_alike(a, b) for a in sums for b in rest) else tuple(sums)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two values may have one shape."""
    return len(a.shape) == len(b.shape) and all(
        x.at(1, 1) == y.at(1, 1) for x, y in zip(a.shape, b.shape)
        if x.is_constant and y.is_constant
    )  # fmt: skip


def no_shared_tokens(graph: Graph) -> str | None:
    """Why the ranks that share a sequence cannot route a share of it each."""
    for unit in graph.units:
        for path in routed_modules(unit):
            for node in nodes_in(unit, path):
                odd = node.op not in REDUCTIONS and rule(node).kind not in ("grouped_gemm",)
                said = f"{node.name} ({node.op}) of {unit.name}"
                if odd and _loses_tokens(unit, node):
                    return STATISTICS.format(said)
                if node.op in COMPARED and _along_tokens(unit, node):
                    return CHOICE.format(said)
    return None


def _along_tokens(unit: Unit, node: Node) -> bool:
    shape = unit.values[node.inputs[0]].shape
    at = node.number("dim", -1)
    return bool(shape) and bool(shape[at].seq)
