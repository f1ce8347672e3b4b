"""torch graph -> our graph: one table of operators, sizes from two traces, units from markers."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ir.capture.arguments import (
    Value,
    arguments,
    attribute,
    flat,
    is_identity,
    no_row,
    tensor_arguments,
)
from ir.capture.body import DTYPES, Body, Known
from ir.capture.export import PREFIX, Trace, ties
from ir.capture.leaves import LEAVES
from ir.capture.markers import MARKERS
from ir.capture.sized import Shape, Sized
from ir.capture.sizes import recover
from ir.capture.special import SPECIAL
from ir.capture.table import FORGOTTEN, SAME_VALUE, TABLE
from ir.errors import PlanError
from ir.graph import FLOATS, Attr, Graph, Node, Parameter, Tensor, Unit, dim
from ir.ops import OPS
from ir.text import format_unit

_PLACE = re.compile(r'File "([^"]+)", line (\d+)')
_NOT_THE_USERS = (Path(torch.__file__).parent, Path(__file__).parent)


class Lowering:
    """Walks the pair of programs in step; one instance a capture.

    env: each torch node's value, and the body that made it. views: which node a view is of.
    enclosing: bodies around the one being read, with the arguments given to it.
    """

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.sizes = trace.sizes
        self.returns = trace.folding.returns
        self.model = model
        self.env: dict[fx.Node, tuple[Body | None, Value]] = {}
        self.views: dict[fx.Node, fx.Node] = {}
        self.root = Body(path="")
        self.body = self.root
        self.enclosing: list[tuple[Body, tuple[str, ...]]] = []
        self.classes: dict[str, Known] = {}
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self.ties = ties(model)
        self.no_grad = 0
        first, second = trace.programs
        self._placeholders(first, second)
        self._walk(first.graph_module, second, {})

    # --- tensors and names -------------------------------------------------------------------

    def tensor(self, a: torch.Tensor, b: Shape, where: str) -> Tensor:
        """Shape in batch and sequence, from the values at both sizes."""
        if any(not isinstance(d, int) for d in (*a.shape, *b.shape)):
            raise PlanError(
                "a size depends on data", where=where, why=f"shape {tuple(a.shape)}",
                hints=("declare the module a leaf: ir.leaf(Class, flop=..., output=...)",),
            )  # fmt: skip
        shape = tuple(recover(x, int(y), self.sizes, where) for x, y in zip(a.shape, b.shape))
        if a.dtype not in DTYPES:
            raise PlanError(f"tensors of {a.dtype} are not known", where=where)
        return Tensor(shape=shape, dtype=DTYPES[a.dtype])

    def module_of(self, node: fx.Node) -> str:
        """The path of the module that ran it; empty for the model itself and the loss."""
        stack = node.meta.get("nn_module_stack") or {}
        path = ""
        for entry in stack.values():
            path = re.sub(r"@\d+", "", entry[0])
        return path.removeprefix(PREFIX) if path.startswith(PREFIX) else ""

    def source_of(self, node: fx.Node) -> str:
        """file:line of the innermost frame that is neither torch's nor ours."""
        found = _PLACE.findall(node.meta.get("stack_trace") or "")
        for file, line in reversed(found):
            if not any(folder in Path(file).parents for folder in _NOT_THE_USERS):
                return f"{Path(file).name}:{line}"
        return ""

    def relative(self, module: str) -> str:
        path = self.body.path
        if path and (module == path or module.startswith(path + ".")):
            return module[len(path) + 1 :]
        return "" if path else module

    # --- placeholders ------------------------------------------------------------------------

    def _placeholders(self, first: Any, second: tuple[Sized, ...]) -> None:
        sig = first.graph_signature
        owned = {**sig.inputs_to_parameters, **sig.inputs_to_buffers}
        constants = getattr(sig, "inputs_to_lifted_tensor_constants", {})
        pairs = zip(
            (n for n in first.graph.nodes if n.op == "placeholder"),
            (n for n in second if n.op == "placeholder"),
        )
        for a, b in pairs:
            value = a.meta.get("val")
            if not isinstance(value, torch.Tensor):
                self.env[a] = (None, None)
            elif a.name in owned:
                self.env[a] = (None, ("parameter", owned[a.name].removeprefix(PREFIX)))
            elif a.name in constants:
                self.env[a] = (None, self.tensor(value, b.value, a.name))
            else:
                self.root.take(a.name, self.tensor(value, b.value, a.name), False)
                self.env[a] = (self.root, a.name)

    # --- values seen from the body being read ------------------------------------------------

    def value(self, node: fx.Node) -> Value:
        """The name of a torch node's value here; what lies outside becomes an input."""
        owner, value = self.env[node]
        if isinstance(value, tuple) and value and value[0] == "parameter":
            return self._parameter(node, value[1])
        if isinstance(value, Tensor):
            return self.body.constant(node, value)
        if owner is None or owner is self.body or value is None:
            return value
        return self._outer(node, owner, value)

    def _parameter(self, node: fx.Node, name: str) -> str:
        names = [name] + [a for a, o in self.ties if o == name] + [
            o for a, o in self.ties if a == name
        ]  # fmt: skip
        path = self.body.path
        for full in names:
            if path and full.startswith(path + "."):
                return full[len(path) + 1 :]
        if self.body is not self.root:
            inside, self.body = self.body, self.root
            ref = self._parameter(node, name)
            self.body = inside
            return str(self._outer(node, self.root, ref))
        if name not in self.root.parameters:
            self.root.own(self.described(name, name))
        return name

    def described(self, full: str, name: str) -> Parameter:
        """The parameter or buffer of this full name, called `name`."""
        p = self.parameters.get(full)
        value = self.buffers[full] if p is None else p
        kind = "buffer" if p is None else ("parameter" if p.requires_grad else "frozen")
        shape = tuple(dim(int(d)) for d in value.shape)
        return Parameter(
            name=name, tensor=Tensor(shape=shape, dtype=DTYPES[value.dtype]), kind=kind
        )

    def _outer(self, node: fx.Node, owner: Body, value: Value) -> Value:
        """A value that the unit's forward takes from its surroundings becomes an input."""
        for known, name in self.body.outer:
            if known is node:
                return name
        if not isinstance(value, str):
            return [self._outer(node, owner, v) for v in value]
        name = self.body.unique("outer")
        self.body.outer.append((node, name))
        self.body.take(name, owner.values[value], owner.diff.get(value, False))
        return name

    # --- nodes -------------------------------------------------------------------------------

    def _walk(self, first: fx.GraphModule, right: tuple[Sized, ...], bound: dict) -> Any:  # type: ignore[type-arg]
        left = list(first.graph.nodes)
        result: Any = None
        for index, (a, b) in enumerate(zip(left, right)):
            if (a.op, str(a.target)) != (b.op, b.target) or len(left) != len(right):
                at = next((n for n in left[index:] if n.op == "call_function"), a)
                raise PlanError(
                    "the graph depends on the batch or sequence size",
                    where=self.source_of(at) or str(a),
                    why=f"{len(left)} nodes at {self.sizes[0]}, {len(right)} at {self.sizes[1]}"
                    f" (batch, sequence); they differ from {a.target} on",
                    hints=("a loop over the sequence must become one op: declare a leaf",),
                )
            if a.op == "placeholder":
                if bound:
                    self.env[a] = bound[a.name]
            elif a.op == "output":
                result = a.args[0]
            elif a.op == "call_function":
                self._call(a, b, first)
            elif a.op == "get_attr" and not isinstance(attribute(first, a), fx.GraphModule):
                self._constant(a, first)
        return result

    def _constant(self, node: fx.Node, program: fx.GraphModule) -> None:
        value = attribute(program, node)
        shape = tuple(dim(int(d)) for d in value.shape)
        self.env[node] = (None, Tensor(shape=shape, dtype=DTYPES[value.dtype]))

    def _call(self, a: fx.Node, b: Sized, first: fx.GraphModule) -> None:
        name = getattr(a.target, "__name__", str(a.target))
        if name == "getitem":
            owner, value = self.env[a.args[0]]  # type: ignore[index]
            self.env[a] = (owner, value[a.args[1]] if value is not None else None)
        elif name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            self._higher_order(a, b, first)
        elif isinstance(a.target, torch._ops.OpOverload):
            space, _, base = a.target._schema.name.partition("::")
            if space == "meshwright_fold":
                MARKERS[base](self, a)
            elif space == "meshwright_leaf":
                LEAVES[base](self, a, b)
            else:
                self._operator(a, b, base if space == "aten" else f"{space}.{base}")
        elif not isinstance(a.meta.get("val"), torch.Tensor):
            self.env[a] = (None, None)
        else:
            raise no_row(name, self.module_of(a), self.source_of(a))

    def _higher_order(self, a: fx.Node, b: Sized, first: fx.GraphModule) -> None:
        """no_grad and autocast regions: read in place."""
        grad_off = "set_grad" in a.target.__name__ and a.args[0] is False  # type: ignore[union-attr]
        at = next(i for i, x in enumerate(a.args) if isinstance(x, fx.Node))
        inner = attribute(first, a.args[at])
        names = [n.name for n in inner.graph.nodes if n.op == "placeholder"]
        bound = {
            name: self.env[arg] if isinstance(arg, fx.Node) else (None, None)
            for name, arg in zip(names, a.args[at + 1 :])
        }
        self.no_grad += grad_off
        outputs = self._walk(inner, b.inner, bound)
        self.no_grad -= grad_off
        outputs = outputs if isinstance(outputs, (list, tuple)) else (outputs,)
        values = [self.value(x) if isinstance(x, fx.Node) else None for x in outputs]
        self.env[a] = (self.body, values)

    def _operator(self, a: fx.Node, b: Sized, base: str) -> None:
        in_place = base.endswith("_") and not base.startswith("__")
        base = base.rstrip("_") if in_place else base
        if base in FORGOTTEN:
            return
        args = arguments(a)
        tensors = tensor_arguments(a, args)
        if base in SAME_VALUE or is_identity(a, base, tensors):
            self.env[a] = (self.body, self.value(tensors[0]))
            if base == "detach":
                self._stop_gradient(a)
            return
        if base in ("broadcast_tensors", "meshgrid"):
            self._broadcast(a, b, tensors)
            return
        if base not in TABLE:
            raise no_row(base, self.module_of(a), self.source_of(a))
        op, maker = TABLE[base]
        refs = tuple(r for t in tensors for r in flat(self.value(t)))
        if op == "create":
            refs = ()  # what new_zeros, ones_like borrow a shape from is not read
        self._emit(a, b, op, refs, maker(args))
        if op in OPS and OPS[op].view and tensors:
            self.views[a] = tensors[0]
        if in_place:
            self._mutate(tensors[0], a)

    def _broadcast(self, a: fx.Node, b: Sized, tensors: list[fx.Node]) -> None:
        """Several tensors expanded to one shape: a node each, none where nothing changes."""
        refs = []
        for x, y, z in zip(tensors, a.meta["val"], b.value):
            ref, out = str(self.value(x)), self.tensor(y, z, self.source_of(a))
            same = self.body.values[ref].shape == out.shape
            refs.append(ref if same else self.put(a, "expand", (ref,), (out,), {}))
        self.env[a] = (self.body, refs)

    def _stop_gradient(self, node: fx.Node) -> None:
        """detach gives the value another name, without gradient: a view of it."""
        ref = self.env[node][1]
        name = self.body.unique("detach")
        stop = Node(
            name=name, op="view", inputs=(ref,), outputs=(self.body.values[ref],),
            attrs=(("stop", True),), source=self.source_of(node),
        )  # fmt: skip
        self.body.add(stop, (False,))
        self.env[node] = (self.body, name)

    def _mutate(self, target: fx.Node, result: fx.Node) -> None:
        """An in-place op: later readers of the target, and of what it is a view of, see the
        result; a write through a partial view is a write of its base."""
        self.env[target] = self.env[result]
        base = self.views.get(target)
        while base is not None:
            old, new = self.value(base), self.value(target)
            if isinstance(old, str) and isinstance(new, str):
                diff, tensor = self.body.diff, self.body.values[old]
                name = self.body.unique("write")
                write = Node(name=name, op="write", inputs=(old, new), outputs=(tensor,))
                self.body.add(write, (diff.get(old, False) or diff[new],))
                self.env[base] = (self.body, name)
            target, base = base, self.views.get(base)

    def _emit(
        self, a: fx.Node, b: Sized, op: str, refs: tuple[str, ...], attrs: dict[str, Attr]
    ) -> None:
        """Add the node of one torch call, with the outputs that torch keeps to itself."""
        where = self.source_of(a)
        values, others = a.meta["val"], b.value
        single = isinstance(values, torch.Tensor)
        pairs = [(values, others)] if single else list(zip(values, others))
        if any(not isinstance(x, torch.Tensor) for x, _ in pairs):
            raise PlanError(f"{op} has an output that is no tensor", where=where)
        outs = [self.tensor(x, y, where) for x, y in pairs]
        extra: tuple[Tensor, ...] = ()
        if op in SPECIAL:
            op, refs, attrs, extra = SPECIAL[op](self, a, refs, attrs, outs)
        self.put(a, op, refs, (*outs, *extra), attrs)
        refs = self.body.nodes[-1].refs()
        self.env[a] = (self.body, refs[0] if single else list(refs[: len(outs)]))

    def put(
        self, a: fx.Node, op: str, refs: tuple[str, ...], outs: tuple[Tensor, ...],
        attrs: dict[str, Attr],
    ) -> str:  # fmt: skip
        """Add a node in the name of torch node `a`; returns its name."""
        module = self.relative(self.module_of(a))
        name = self.body.unique(f"{module}/{op}" if module else op)
        given = any(self.body.diff.get(r, False) for r in refs)
        attrs = {**attrs, "stop": True} if given and self.no_grad else attrs
        node = Node(
            name=name, op=op, inputs=refs, outputs=outs, attrs=tuple(sorted(attrs.items())),
            source=self.source_of(a),
        )  # fmt: skip
        learns = given and not self.no_grad
        self.body.add(node, tuple(learns and t.dtype in FLOATS for t in outs))
        return name


def lower(trace: Trace, model: nn.Module, name: str) -> Graph:
    """Make the folded graph: classes merged by what their bodies say."""
    low = Lowering(trace, model)
    outputs = [str(low.value(x)) for x in _outputs(trace.programs[0])]
    called = {str(n.attr("path")) for n in low.root.nodes if n.op == "call"}
    for full in low.parameters:
        parents = itertools.accumulate(full.split(".")[:-1], "{}.{}".format)
        if called.isdisjoint(parents) and full not in low.root.parameters:
            low.root.own(low.described(full, full))
    root = Unit(
        name="root", inputs=tuple(low.root.inputs), nodes=tuple(low.root.nodes),
        parameters=tuple(low.root.parameters[n] for n in sorted(low.root.parameters)),
        outputs=tuple(outputs),
    )  # fmt: skip
    classes = {key: known.unit for key, known in low.classes.items()}
    return _merge(name, root, classes, low.ties)


def _outputs(program: Any) -> list[fx.Node]:
    out = next(n for n in program.graph.nodes if n.op == "output").args[0]
    names = {s.arg.name for s in program.graph_signature.output_specs
             if "USER" in str(s.kind) or "LOSS" in str(s.kind)}  # fmt: skip
    return [x for x in out if isinstance(x, fx.Node) and x.name in names]


def _merge(
    name: str, root: Unit, classes: dict[str, Unit], tied: tuple[tuple[str, str], ...]
) -> Graph:
    """Give classes short names; classes whose bodies are the same text are one.

    Source lines do not tell classes apart: a body has those of its first use.
    """
    by_text: dict[str, str] = {}
    first: dict[str, tuple[Node, ...]] = {}
    renamed: dict[str, str] = {}
    units: list[Unit] = []
    for node in root.nodes:
        key = str(node.attr("unit"))
        if node.op != "call" or key in renamed:
            continue
        unit = classes[key]
        bare = replace(unit, name="_", nodes=tuple(replace(n, source="") for n in unit.nodes))
        nodes = first.setdefault(_text(replace(bare, diff_inputs=())), unit.nodes)
        text = _text(bare)
        if text not in by_text:
            by_text[text] = f"u{len(units)}"
            units.append(replace(unit, name=by_text[text], nodes=nodes))
        renamed[key] = by_text[text]
    nodes = tuple(
        replace(n, attrs=(*n.attrs[:-1], ("unit", renamed[str(n.attr("unit"))])))
        if n.op == "call"
        else n
        for n in root.nodes
    )
    return Graph(name=name, units=tuple(units), root=replace(root, nodes=nodes), tied=tied)


def _text(unit: Unit) -> str:
    return "\n".join(format_unit(unit))
