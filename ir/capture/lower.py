"""torch graph -> our graph: one table of operators, sizes from two traces, units from markers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ir.capture.export import PREFIX, Trace, ties
from ir.capture.sizes import recover
from ir.capture.table import FORGOTTEN, SAME_VALUE, TABLE
from ir.errors import PlanError
from ir.graph import Attr, Graph, Node, Parameter, Tensor, Unit, dim
from ir.ops import OPS
from ir.text import format_unit

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "bool", torch.complex64: "c64",
}  # fmt: skip
_FLOATS = ("f64", "f32", "f16", "bf16", "c64")
_PLACE = re.compile(r'File "([^"]+)", line (\d+)')

Value = Any  # a value's name, a list of them, or None for what is not a tensor


@dataclass(kw_only=True)
class _Body:
    """A unit, or the root, while its nodes are read."""

    path: str
    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    outer: list[tuple[fx.Node, str]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    diff: dict[str, bool] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    made: dict[str, Node] = field(default_factory=dict)
    flash: set[str] = field(default_factory=set)

    def unique(self, stem: str) -> str:
        number = self.counts.get(stem, 0)
        self.counts[stem] = number + 1
        return f"{stem}_{number}" if number else stem


@dataclass(frozen=True, kw_only=True)
class _Class:
    """A traced representative: its unit, and what its forward reads from outside its arguments."""

    unit: Unit
    outer: tuple[str, ...]


class _Lowering:
    """Walks the pair of programs in step; one instance a capture."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.sizes = trace.sizes
        self.model = model
        self.unit_modules = trace.folding.units
        self.env: dict[fx.Node, tuple[_Body | None, Value]] = {}
        self.views: dict[fx.Node, fx.Node] = {}
        self.root = _Body(path="")
        self.body = self.root
        self.classes: dict[str, _Class] = {}
        self.units: dict[str, Unit] = {}
        self.parameters = {p: t for p, t in model.named_parameters(remove_duplicate=False)}
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self.ties = ties(model)
        self.no_grad = 0
        first, second = trace.programs
        self._placeholders(first, second)
        self._walk(first.graph_module, second.graph_module, {})

    # --- tensors and names -------------------------------------------------------------------

    def tensor(self, a: torch.Tensor, b: torch.Tensor, where: str) -> Tensor:
        if any(not isinstance(d, int) for d in (*a.shape, *b.shape)):
            raise PlanError(
                "a size depends on data", where=where,
                why=f"shape {tuple(a.shape)}", hints=("declare the module a leaf: ir.leaf(...)",),
            )  # fmt: skip
        shape = tuple(recover(x, y, self.sizes, where) for x, y in zip(a.shape, b.shape))
        if a.dtype not in _DTYPES:
            raise PlanError(f"tensors of {a.dtype} are not known", where=where)
        return Tensor(shape=shape, dtype=_DTYPES[a.dtype])

    def module_of(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        path = ""
        for entry in stack.values():
            path = re.sub(r"@\d+", "", entry[0])
        return path.removeprefix(PREFIX) if path.startswith(PREFIX) else ""

    def source_of(self, node: fx.Node) -> str:
        found = _PLACE.findall(node.meta.get("stack_trace") or "")
        found = [f for f in found if "torch" not in Path(f[0]).parts] or found
        return f"{Path(found[-1][0]).name}:{found[-1][1]}" if found else ""

    def relative(self, module: str) -> str:
        path = self.body.path
        if path and (module == path or module.startswith(path + ".")):
            return module[len(path) + 1 :]
        return "" if path else module

    # --- placeholders ------------------------------------------------------------------------

    def _placeholders(self, first: Any, second: Any) -> None:
        sig = first.graph_signature
        owned = {**sig.inputs_to_parameters, **sig.inputs_to_buffers}
        constants = getattr(sig, "inputs_to_lifted_tensor_constants", {})
        pairs = zip(
            (n for n in first.graph.nodes if n.op == "placeholder"),
            (n for n in second.graph.nodes if n.op == "placeholder"),
        )
        for a, b in pairs:
            value = a.meta.get("val")
            if not isinstance(value, torch.Tensor):
                self.env[a] = (None, None)
            elif a.name in owned:
                self.env[a] = (None, ("parameter", owned[a.name].removeprefix(PREFIX)))
            elif a.name in constants:
                name = f"constant.{constants[a.name]}"
                self._root_value(name, self.tensor(value, b.meta["val"], a.name), "buffer")
                self.env[a] = (self.root, name)
            else:
                tensor = self.tensor(value, b.meta["val"], a.name)
                self.root.inputs.append((a.name, tensor))
                self.root.values[a.name] = tensor
                self.env[a] = (self.root, a.name)

    def _root_value(self, name: str, tensor: Tensor, kind: str) -> None:
        self.root.parameters[name] = Parameter(name=name, tensor=tensor, kind=kind)
        self.root.values[name] = tensor
        self.root.diff[name] = kind == "parameter"

    # --- values seen from the body being read ----------------------------------------------

    def value(self, node: fx.Node) -> Value:
        owner, value = self.env[node]
        if isinstance(value, tuple) and value and value[0] == "parameter":
            return self._parameter(node, value[1])
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
            self._root_value(name, *self._described(name))
        return name

    def _described(self, full: str) -> tuple[Tensor, str]:
        p = self.parameters.get(full)
        value = self.buffers[full] if p is None else p
        kind = "buffer" if p is None else ("parameter" if p.requires_grad else "frozen")
        return Tensor(
            shape=tuple(dim(int(d)) for d in value.shape), dtype=_DTYPES[value.dtype]
        ), kind

    def _outer(self, node: fx.Node, owner: _Body, value: Value) -> Value:
        """A value that the unit's forward takes from its surroundings becomes an input."""
        for known, name in self.body.outer:
            if known is node:
                return name
        if not isinstance(value, str):
            return [self._outer(node, owner, v) for v in value]
        name = self.body.unique("outer")
        self.body.outer.append((node, name))
        self.body.inputs.append((name, owner.values[value]))
        self.body.values[name] = owner.values[value]
        self.body.diff[name] = owner.diff.get(value, False)
        return name

    # --- nodes -------------------------------------------------------------------------------

    def _walk(self, first: fx.GraphModule, second: fx.GraphModule, bound: dict) -> Any:  # type: ignore[type-arg]
        left, right = list(first.graph.nodes), list(second.graph.nodes)
        result: Any = None
        for index, (a, b) in enumerate(zip(left, right)):
            if (a.op, str(a.target)) != (b.op, str(b.target)) or len(left) != len(right):
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
                self._call(a, b, first, second)
            elif a.op == "get_attr" and not isinstance(_attribute(first, a), fx.GraphModule):
                self._constant(a, first)
        return result

    def _constant(self, node: fx.Node, program: fx.GraphModule) -> None:
        value = _attribute(program, node)
        name = f"constant.{node.target}"
        shape = tuple(dim(int(d)) for d in value.shape)
        self._root_value(name, Tensor(shape=shape, dtype=_DTYPES[value.dtype]), "buffer")
        self.env[node] = (self.root, name)

    def _call(self, a: fx.Node, b: fx.Node, first: fx.GraphModule, second: fx.GraphModule) -> None:
        name = getattr(a.target, "__name__", str(a.target))
        if name == "getitem":
            owner, value = self.env[a.args[0]]  # type: ignore[index]
            self.env[a] = (owner, value[a.args[1]] if value is not None else None)  # type: ignore[index]
        elif name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            self._higher_order(a, b, first, second)
        elif isinstance(a.target, torch._ops.OpOverload):
            space, _, base = a.target._schema.name.partition("::")
            if space == "meshwright_fold":
                _MARKERS[base](self, a, b)
            else:
                self._operator(a, b, base if space == "aten" else f"{space}.{base}")
        elif not isinstance(a.meta.get("val"), torch.Tensor):
            self.env[a] = (None, None)
        else:
            raise _no_row(name, self.module_of(a), self.source_of(a))

    def _higher_order(
        self, a: fx.Node, b: fx.Node, first: fx.GraphModule, second: fx.GraphModule
    ) -> None:
        """no_grad and autocast regions: read in place."""
        grad_off = "set_grad" in a.target.__name__ and a.args[0] is False  # type: ignore[union-attr]
        at = next(i for i, x in enumerate(a.args) if isinstance(x, fx.Node))
        inner = [_attribute(p, n.args[at]) for p, n in ((first, a), (second, b))]
        names = [n.name for n in inner[0].graph.nodes if n.op == "placeholder"]
        bound = {
            name: self.env[arg] if isinstance(arg, fx.Node) else (None, None)
            for name, arg in zip(names, a.args[at + 1 :])
        }
        self.no_grad += grad_off
        outputs = self._walk(inner[0], inner[1], bound)
        self.no_grad -= grad_off
        outputs = outputs if isinstance(outputs, (list, tuple)) else (outputs,)
        values = [self.value(x) if isinstance(x, fx.Node) else None for x in outputs]
        self.env[a] = (self.body, values)

    def _operator(self, a: fx.Node, b: fx.Node, base: str) -> None:
        in_place = base.endswith("_") and not base.startswith("__")
        base = base.rstrip("_") if in_place else base
        if base in FORGOTTEN:
            return
        args = _arguments(a)
        tensors = _tensor_arguments(a, args)
        if base in SAME_VALUE or _is_identity(a, base, tensors):
            self.env[a] = (self.body, self.value(tensors[0]))
            if base == "detach":
                self._stop_gradient(a)
            return
        if base not in TABLE:
            raise _no_row(base, self.module_of(a), self.source_of(a))
        op, maker = TABLE[base]
        refs = tuple(r for t in tensors for r in _flat(self.value(t)))
        self._emit(a, b, op, refs, maker(args), tensors)
        if in_place:
            self._mutate(tensors[0], a)

    def _stop_gradient(self, node: fx.Node) -> None:
        """detach gives the value another name, without gradient: a view of it."""
        ref = self.env[node][1]
        name = self.body.unique("detach")
        tensor = self.body.values[ref]
        self.body.nodes.append(
            Node(name=name, op="view", inputs=(ref,), outputs=(tensor,), attrs=(("stop", True),))
        )
        self.body.values[name], self.body.diff[name] = tensor, False
        self.env[node] = (self.body, name)

    def _mutate(self, target: fx.Node, result: fx.Node) -> None:
        """An in-place op: later readers of the target, and of what it is a view of, see the
        result; a write through a partial view is a write of its base."""
        self.env[target] = self.env[result]
        base = self.views.get(target)
        while base is not None:
            old = self.value(base)
            new = self.value(target)
            if isinstance(old, str) and isinstance(new, str):
                name = self.body.unique("write")
                tensor = self.body.values[old]
                self.body.nodes.append(
                    Node(name=name, op="index_put", inputs=(old, new), outputs=(tensor,))
                )
                self.body.values[name] = tensor
                self.body.diff[name] = self.body.diff.get(old, False) or self.body.diff[new]
                self.env[base] = (self.body, name)
            target, base = base, self.views.get(base)

    def _emit(
        self,
        a: fx.Node,
        b: fx.Node,
        op: str,
        refs: tuple[str, ...],
        attrs: dict[str, Attr],
        tensors: list[fx.Node],
    ) -> None:
        where = self.source_of(a)
        values, others = a.meta["val"], b.meta["val"]
        single = isinstance(values, torch.Tensor)
        if not single and any(not isinstance(v, torch.Tensor) for v in values):
            raise PlanError(f"{op} has an output that is no tensor", where=where)
        pairs = [(values, others)] if single else list(zip(values, others))
        outs = [self.tensor(x, y, where) for x, y in pairs]
        if op in SPECIAL:
            op, refs, attrs, extra = SPECIAL[op](self, a, refs, attrs, outs)
        else:
            extra = ()
        module = self.relative(self.module_of(a))
        name = self.body.unique(f"{module}/{op}" if module else op)
        ins = [self.body.diff.get(r, False) for r in refs]
        node = Node(
            name=name, op=op, inputs=refs, outputs=(*outs, *extra),
            attrs=tuple(sorted(attrs.items())), source=where,
        )  # fmt: skip
        self.body.nodes.append(node)
        self.body.made[name] = node
        if op == "attention":
            self.body.flash.add(name)
        learns = any(ins) and not self.no_grad
        if any(ins) and self.no_grad:
            self.body.nodes[-1] = replace(node, attrs=(*node.attrs, ("stop", True)))
        for ref, tensor in zip(node.refs(), node.outputs):
            self.body.values[ref] = tensor
            self.body.diff[ref] = learns and tensor.dtype in _FLOATS
        found: Value = node.refs()[0] if single else list(node.refs()[: len(outs)])
        self.env[a] = (self.body, found)
        if op in OPS and OPS[op].view and tensors:
            self.views[a] = tensors[0]

    # --- markers -------------------------------------------------------------------------------

    def _enter(self, a: fx.Node, b: fx.Node) -> None:
        xs, path, key = a.args
        body = _Body(path=str(path))
        for full in (*self.parameters, *self.buffers):
            if full.startswith(f"{path}."):
                tensor, kind = self._described(full)
                name = full[len(str(path)) + 1 :]
                body.parameters[name] = Parameter(name=name, tensor=tensor, kind=kind)
                body.values[name], body.diff[name] = tensor, kind == "parameter"
        names = []
        for index, x in enumerate(xs):  # type: ignore[arg-type,union-attr]
            ref, name = self.value(x), f"in{index}"  # type: ignore[arg-type]
            body.inputs.append((name, self.body.values[ref]))
            body.values[name] = self.body.values[ref]
            body.diff[name] = self.body.diff.get(ref, False)
            names.append(name)
        outside = self.body
        self.body = body
        self.env[a] = (body, names)
        self._enclosing = (outside, [self._ref_in(outside, x) for x in xs])  # type: ignore[union-attr]

    def _ref_in(self, body: _Body, node: Any) -> str:
        inside, self.body = self.body, body
        ref = str(self.value(node))
        self.body = inside
        return ref

    def _leave(self, a: fx.Node, b: fx.Node) -> None:
        xs, path, key = a.args
        body = self.body
        outputs = tuple(str(self.value(x)) for x in xs)  # type: ignore[arg-type,union-attr]
        outside, refs = self._enclosing
        outer = tuple(self._ref_in(outside, node) for node, _ in body.outer)
        unit = Unit(
            name=str(key), inputs=tuple(body.inputs), parameters=tuple(body.parameters.values()),
            nodes=tuple(body.nodes), outputs=outputs,
            diff_inputs=tuple(n for n, _ in body.inputs if body.diff.get(n)),
        )  # fmt: skip
        diffs = tuple(body.diff.get(o, False) for o in outputs)
        self.body = outside
        self.classes[str(key)] = _Class(unit=unit, outer=outer)
        self._instance(a, str(path), str(key), (*refs, *outer), diffs)

    def _again(self, a: fx.Node, b: fx.Node) -> None:
        xs, _, path, key = a.args
        known = self.classes[str(key)]
        refs = (*(str(self.value(x)) for x in xs), *known.outer)  # type: ignore[arg-type,union-attr]
        learns = tuple(
            name for (name, _), ref in zip(known.unit.inputs, refs) if self.body.diff.get(ref)
        )
        unit = replace(known.unit, diff_inputs=learns)
        variant = str(key)
        if learns != known.unit.diff_inputs:
            variant = f"{key}/{','.join(learns)}"
            self.classes.setdefault(variant, replace(known, unit=unit))
        float_outs = tuple(
            unit.values[o].dtype in _FLOATS and bool(learns or unit.parameter_names)
            for o in unit.outputs
        )
        self._instance(a, str(path), variant, refs, float_outs)

    def _instance(
        self, a: fx.Node, path: str, key: str, refs: tuple[str, ...], diffs: tuple[bool, ...]
    ) -> None:
        unit = self.classes[key].unit
        outs = tuple(unit.values[o] for o in unit.outputs)
        node = Node(
            name=self.body.unique(path), op="call", inputs=refs, outputs=outs,
            attrs=(("path", path), ("unit", key)), source=self.source_of(a),
        )  # fmt: skip
        self.body.nodes.append(node)
        for ref, tensor, learns in zip(node.refs(), outs, diffs):
            self.body.values[ref] = tensor
            self.body.diff[ref] = learns and tensor.dtype in _FLOATS and not self.no_grad
        self.env[a] = (self.body, list(node.refs()))


_MARKERS: dict[str, Callable[[_Lowering, fx.Node, fx.Node], None]] = {
    "enter": _Lowering._enter, "leave": _Lowering._leave, "call": _Lowering._again,
}  # fmt: skip

Special = Callable[
    [_Lowering, fx.Node, tuple[str, ...], dict[str, Attr], list[Tensor]],
    tuple[str, tuple[str, ...], dict[str, Attr], tuple[Tensor, ...]],
]


def _view(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """A reshape that strides forbid is a copy. Flash kernels write heads beside each other, so
    attention's result, heads moved back, is contiguous."""
    x, y = _first_tensor(a).meta["val"], a.meta["val"]
    moved = low.body.made.get(refs[0])
    flash = moved is not None and moved.op == "permute" and moved.inputs[0] in low.body.flash
    if "view" not in str(a.target) and "unsqueeze" not in str(a.target) and not flash:
        try:
            torch.empty_strided(x.shape, x.stride(), device="meta").view(y.shape)
        except RuntimeError:
            return "reshape_copy", refs[:1], attrs, ()
    return "view", refs[:1], attrs, ()


def _permute(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """transpose, t, movedim: the same op with every dimension written out."""
    if "dims" not in attrs:
        rank = len(outs[0].shape)
        order = torch.empty(tuple(range(2, 2 + rank)), device="meta")
        moved = a.target(order, *a.args[1:], **a.kwargs)
        attrs = {"dims": tuple(int(d) - 2 for d in moved.shape)}
    rank = len(outs[0].shape)
    attrs = {"dims": tuple(int(d) % rank for d in attrs["dims"])}
    return "permute", refs, attrs, ()


def _attention(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """The log-sum-exp of each query is an output too: backward reads it."""
    q = low.body.values[refs[0]]
    lse = Tensor(shape=q.shape[:3], dtype="f32")
    return "attention", refs, {k: v for k, v in attrs.items() if v}, (lse,)


def _statistics(count: int) -> Special:
    def make(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
        x = low.body.values[refs[0]]
        op = "layer_norm" if count == 2 else "rms_norm"
        held = int(attrs["dims"])
        lead = x.shape[: len(x.shape) - held]
        stats = Tensor(shape=(*lead, *(dim(1),) * held), dtype="f32")
        return op, refs, attrs, (stats,) * (count if len(outs) == 1 else 0)

    return make


def _channel_statistics(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    x = low.body.values[refs[0]]
    if "batch_norm" in str(a.target):
        op, stats = "batch_norm", Tensor(shape=(x.shape[1],), dtype="f32")
    else:
        groups = int(_arguments(a).get("num_groups", _arguments(a).get("group", 1)))
        op, stats = "group_norm", Tensor(shape=(x.shape[0], dim(groups)), dtype="f32")
    return op, refs, attrs, (stats, stats) if len(outs) == 1 else ()


def _dropout(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    mask = Tensor(shape=outs[0].shape, dtype="bool")
    return "dropout", refs, attrs, (mask,) if len(outs) == 1 else ()


def _max_pool(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    indices = Tensor(shape=outs[0].shape, dtype="i64")
    return "max_pool", refs, attrs, (indices,) if len(outs) == 1 else ()


def _cross_entropy(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    return "cross_entropy", refs, attrs, (low.body.values[refs[0]],)


def _addmm(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """bias + x w: the product is a node of its own."""
    module = low.relative(low.module_of(a))
    name = low.body.unique(f"{module}/matmul" if module else "matmul")
    product = Node(
        name=name, op="matmul", inputs=refs[1:3], outputs=(outs[0],), source=low.source_of(a)
    )
    low.body.nodes.append(product)
    low.body.values[name] = outs[0]
    low.body.diff[name] = any(low.body.diff.get(r, False) for r in refs[1:3])
    return "add", (name, refs[0]), {}, ()


def _cumulative(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """max and min of two tensors are elementwise; of one, reductions."""
    if len(refs) == 2:
        return "maximum", refs, {}, ()
    return "amax", refs, attrs, ()


def _sort(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    return "sort", refs, {"dim": attrs.get("dim") if attrs.get("dim") is not None else -1}, ()


def _heads(low, a, refs, attrs, outs):  # type: ignore[no-untyped-def]
    """Scans: state and head sizes from the operands; which dimension are the heads."""
    kind = a.target._schema.name.partition("::")[2]
    tensors = [low.body.values[r] for r in refs]
    op = {"delta_rule": "delta_rule", "linear_attention": "linear_attention"}.get(kind, "scan")
    head = {"selective_scan": 1, "wkv": 1, "linear_scan": 1}.get(kind)
    state = 1
    if kind == "selective_scan":
        state = int(str(tensors[2].shape[1]))
    elif kind == "ssd_scan":
        state, head = int(str(tensors[3].shape[3])), int(str(outs[0].shape[3]))
    elif head is None:
        state, head = int(str(tensors[1].shape[3])), int(str(outs[0].shape[3]))
    factors = [*map(_scan_letters(kind), tensors), *map(_scan_letters(kind), outs)]
    chunk = attrs.get("chunk", 64) if head != 1 else 1
    found = {"chunk": chunk, "state": state, "head_dim": head, "factors": ";".join(factors)}
    return op, refs, found, ()


def _scan_letters(kind: str) -> Callable[[Tensor], str]:
    """Heads (or channels) are the one factor a scan can be split on."""
    head_at = {"selective_scan": 1, "ssd_scan": 2, "delta_rule": 2, "linear_attention": 1,
               "wkv": 2, "linear_scan": 2}[kind]  # fmt: skip

    def letters(t: Tensor) -> str:
        rank = len(t.shape)
        if rank == 1:
            return "h"
        if not any(d.batch or d.seq for d in t.shape):  # A: [d, n]
            return " ".join(["h", *("!x",) * (rank - 1)])
        return " ".join("h" if i == head_at else f"!x{i}" for i in range(rank))

    return letters


SPECIAL: dict[str, Special] = {
    "view": _view, "permute": _permute, "attention": _attention,
    "meshwright.attention": _attention, "layer_norm": _statistics(2), "rms_norm": _statistics(1),
    "batch_norm": _channel_statistics, "group_norm": _channel_statistics, "dropout": _dropout,
    "max_pool": _max_pool, "cross_entropy": _cross_entropy, "addmm": _addmm, "amax": _cumulative,
    "sort": _sort, "scan": _heads, "delta_rule": _heads, "linear_attention": _heads,
}  # fmt: skip


def _attribute(program: fx.GraphModule, node: Any) -> Any:
    found: Any = program
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def _arguments(node: fx.Node) -> dict[str, Any]:
    schema = node.target._schema  # type: ignore[union-attr]
    names = [arg.name for arg in schema.arguments]
    given = dict.fromkeys(names)
    given |= {arg.name: arg.default_value for arg in schema.arguments if arg.has_default_value()}
    return {**given, **dict(zip(names, node.args)), **node.kwargs}


def _tensor_arguments(node: fx.Node, args: dict[str, Any]) -> list[fx.Node]:
    found: list[fx.Node] = []
    for value in args.values():
        items = value if isinstance(value, (list, tuple)) else (value,)
        for x in items:
            if isinstance(x, fx.Node) and x.meta.get("val") is not None:
                found.append(x)
    return found


def _first_tensor(node: fx.Node) -> fx.Node:
    return _tensor_arguments(node, _arguments(node))[0]


def _flat(value: Value) -> list[str]:
    return [value] if isinstance(value, str) else [v for v in (value or []) if v]


def _is_identity(node: fx.Node, base: str, tensors: list[fx.Node]) -> bool:
    """Casts to the same type, contiguous of contiguous, dropout that drops nothing."""
    if not tensors:
        return False
    x, y = tensors[0].meta["val"], node.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    if base == "contiguous":
        return x.is_contiguous()
    if base in ("dropout", "feature_dropout", "alpha_dropout"):
        args = _arguments(node)
        return not args.get("p") or args.get("train") is False
    if TABLE.get(base, ("",))[0] == "cast":
        return x.dtype == y.dtype
    return base in ("expand", "reshape", "view", "squeeze", "repeat") and x.shape == y.shape


def _no_row(name: str, layer: str, source: str) -> PlanError:
    return PlanError(
        f"torch operator {name!r} has no rule", where=f"{layer or 'top level'} at {source}",
        why="an operator without a rule has no cost, and is never taken to be free",
        hints=(f"add a row for {name!r} to ir/capture/table.py and its op to ir/ops",),
    )  # fmt: skip


def lower(trace: Trace, model: nn.Module, name: str) -> Graph:
    """Make the folded graph: classes merged by what their bodies say, saved values found."""
    low = _Lowering(trace, model)
    outputs = [
        str(low.value(x)) for x in _outputs(trace.programs[0]) if isinstance(x, fx.Node)
    ]
    called = {str(n.attr("path")) for n in low.root.nodes if n.op == "call"}
    for full in low.parameters:
        inside = any(full.startswith(path + ".") for path in called)
        if not inside and full not in low.root.parameters:
            low._root_value(full, *low._described(full))
    root = Unit(
        name="root", inputs=tuple(low.root.inputs), nodes=tuple(low.root.nodes),
        parameters=tuple(low.root.parameters[n] for n in sorted(low.root.parameters)),
        outputs=tuple(outputs),
    )  # fmt: skip
    classes = {key: known.unit for key, known in low.classes.items()}
    return _merge(name, root, classes, low.ties)


def _outputs(program: Any) -> Any:
    out = next(n for n in program.graph.nodes if n.op == "output").args[0]
    names = {s.arg.name for s in program.graph_signature.output_specs
             if "USER" in str(s.kind) or "LOSS" in str(s.kind)}  # fmt: skip
    return [x for x in out if isinstance(x, fx.Node) and x.name in names]


def _merge(
    name: str, root: Unit, classes: dict[str, Unit], tied: tuple[tuple[str, str], ...]
) -> Graph:
    """Give classes short names; classes whose bodies are the same text are one."""
    by_text: dict[str, str] = {}
    renamed: dict[str, str] = {}
    units: list[Unit] = []
    for node in root.nodes:
        if node.op != "call":
            continue
        key = str(node.attr("unit"))
        if key in renamed:
            continue
        text = "\n".join(format_unit(replace(classes[key], name="_")))
        if text not in by_text:
            by_text[text] = f"u{len(units)}"
            units.append(replace(classes[key], name=by_text[text]))
        renamed[key] = by_text[text]
    nodes = tuple(
        replace(n, attrs=(("path", n.attr("path")), ("unit", renamed[str(n.attr("unit"))])))
        if n.op == "call"
        else n
        for n in root.nodes
    )
    return Graph(name=name, units=tuple(units), root=replace(root, nodes=nodes), tied=tied)


