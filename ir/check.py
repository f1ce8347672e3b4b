"""Is a graph legal? Asked of every file, and after each pass in tests; a fault names its place."""

from __future__ import annotations

from collections.abc import Iterator

from ir.errors import PlanError
from ir.graph import ITEM_BYTES, Dim, Graph, Node, Tensor, Unit
from ir.ops import rule
from ir.text import SAVED_KINDS

# Ops whose letters name a factor that has another size on either side: a view merges and splits,
# grouped heads share one factor, a token is copied once per chosen expert, a share is a part.
_RESIZES = (
    "view", "reshape_copy", "split", "attention", "dispatch", "combine", "concat", "repeat",
    "slice", "pad", "scan", "delta_rule", "linear_attention", "causal_conv1d", "leaf",
)  # fmt: skip


def check_graph(graph: Graph) -> None:
    """Raise PlanError that lists what is not legal, one line each."""
    faults = list(_faults(graph))
    if faults:
        raise PlanError(
            f"the graph of {graph.name} is not legal", why="\n".join(faults[:20]),
            hints=("trace the model again; if that does not help, this is a fault of ours",),
        )  # fmt: skip


def check_sizes(graph: Graph, batch: int, seq: int) -> None:
    """Raise PlanError for a size in b and s of which this batch and this sequence leave nothing."""
    for unit in (*graph.units, graph.root):
        for name, tensor in unit.values.items():
            for size in tensor.shape:
                if not size.is_constant and size.at(batch, seq) < 1:
                    raise PlanError(
                        f"{name} of unit {unit.name} is {tensor}, and {size} is"
                        f" {size.at(batch, seq)}", why=f"at b = {batch}, s = {seq}",
                        hints=("trace the model again, with a longer sequence if it needs one",),
                    )  # fmt: skip


def _faults(graph: Graph) -> Iterator[str]:
    names = [unit.name for unit in graph.units]
    if len(set(names)) != len(names):
        yield "two units have one name"
    for unit in (*graph.units, graph.root):
        yield from (f"unit {unit.name}: {fault}" for fault in _unit_faults(graph, unit))
    if all(str(n.attr("unit")) in names for n in graph.root.nodes if n.op == "call"):
        yield from _parameter_faults(graph)
    called = {str(n.attr("path")) for n in graph.root.nodes if n.op == "call"}
    yield from (f"layer {path} is never called" for path in graph.layers if path not in called)


def _unit_faults(graph: Graph, unit: Unit) -> Iterator[str]:
    """Names, order, types, and every node by its rule."""
    defined: dict[str, Tensor] = {}
    for name, tensor in (*unit.inputs, *((p.name, p.tensor) for p in unit.parameters)):
        yield from _defines(defined, name, tensor)
    for name in unit.diff_inputs:
        if name not in dict(unit.inputs):
            yield f"{name} carries a gradient and is no input"
    for node in unit.nodes:
        missing = [ref for ref in node.inputs if ref not in defined]
        if missing:
            yield f"{node.name} reads {', '.join(missing)} before it is made"
        elif node.op == "call":
            yield from _call_faults(graph, unit, node)
        else:
            yield from _node_faults(node, tuple(defined[ref] for ref in node.inputs))
        for ref, tensor in zip(node.refs(), node.outputs):
            yield from _defines(defined, ref, tensor)
    for what, refs in (("returns", unit.outputs), *((k, getattr(unit, k)) for k in SAVED_KINDS)):
        yield from (f"{what} {ref}, which is not made" for ref in refs if ref not in defined)


def _defines(defined: dict[str, Tensor], name: str, tensor: Tensor) -> Iterator[str]:
    if name in defined:
        yield f"{name} is made twice"
    if tensor.dtype not in ITEM_BYTES:
        yield f"{name} is of unknown type {tensor.dtype}"
    defined[name] = tensor


def _call_faults(graph: Graph, unit: Unit, node: Node) -> Iterator[str]:
    """A call gives its class what that takes, and gets what that returns."""
    called = graph.unit_by_name.get(str(node.attr("unit")))
    if unit is not graph.root:
        yield f"{node.name} is a call inside a unit"
    elif called is None:
        yield f"{node.name} calls {node.attr('unit')}, which is no unit"
    else:
        given = tuple(unit.values[ref] for ref in node.inputs)
        if given != tuple(tensor for _, tensor in called.inputs):
            yield f"{node.name} gives {_shown(given)} to {called.name}"
        if node.outputs != tuple(called.values.get(ref) for ref in called.outputs):
            yield f"{node.name} gets {_shown(node.outputs)} from {called.name}"


def _node_faults(node: Node, ins: tuple[Tensor, ...]) -> Iterator[str]:
    """The rule exists; it has letters for every dimension; one letter is one size."""
    try:
        spec = rule(node).spec(node, ins)
    except PlanError as fault:
        yield fault.what
        return
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as fault:
        yield f"{node.name}: {node.op} has not what its rule reads ({fault})"
        return
    empty = any(d.is_constant and d.numerator == 0 for t in (*ins, *node.outputs) for d in t.shape)
    if empty and rule(node).kind not in ("memory", "free"):
        yield f"{node.name}: {node.op} of a tensor without elements"
    heads = [t.shape[3] for t in ins[:3:2] if len(t.shape) > 3]  # fewer are told below
    if node.op == "attention" and not all(size.is_constant for size in heads):
        yield f"{node.name}: {node.op} of heads of {' and '.join(map(str, heads))}"
    operands = (*zip(spec.inputs, ins), *zip(spec.outputs, node.outputs))
    if len(spec.inputs) != len(ins) or len(spec.outputs) != len(node.outputs):
        yield f"{node.name}: the rule of {node.op} has another number of operands"
    sizes: dict[str, Dim] = {}
    for letters, tensor in operands:
        if len(letters) != len(tensor.shape):
            yield f"{node.name}: {node.op} has letters {' '.join(letters)} for {tensor}"
            continue
        for letter, size in zip(letters, tensor.shape):
            if letter == "!1" and str(size) != "1" and node.op not in _RESIZES:
                yield f"{node.name}: {node.op} cannot spread a dimension of {size}"
            blocked = letter.startswith("!") or node.op in _RESIZES
            if not blocked and sizes.setdefault(letter, size) != size:
                yield f"{node.name}: factor {letter} is {sizes[letter]} and {size}"


def _parameter_faults(graph: Graph) -> Iterator[str]:
    """Every parameter is in one place, tied ones aside; and a tie's owner is there."""
    shared = {name for pair in graph.tied for name in pair}
    owners: dict[str, str] = {
        p.name: "the root" for p in graph.root.parameters if p.kind != "buffer"
    }
    for _, path, unit in graph.calls():
        for p in unit.parameters:
            name = f"{path}.{p.name}"
            if p.kind != "buffer" and owners.setdefault(name, path) != path and name not in shared:
                yield f"parameter {name} is also {owners[name]}'s"
    aliases = {alias for alias, _ in graph.tied}
    for alias, owner in graph.tied:
        if owner not in graph.parameters and owner not in aliases:
            yield f"{alias} is tied to {owner}, which is no parameter"


def _shown(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(map(str, tensors)) or "nothing"
