"""The graph: what a model is, folded. Frozen values; meaning lives in `ir.ops`.

A `Graph` has one `Unit` per structural class (a layer, the embedding, the norm, the head) and a
`root`: the top-level forward, whose `call` nodes name the instances. Sizes are `Dim`s in the
batch size b and the sequence length s, so one trace serves every micro-batch and context shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

ITEM_BYTES = {
    "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "f8": 1, "i64": 8, "i32": 4, "i16": 2, "i8": 1,
    "u8": 1, "bool": 1, "c64": 8,
}  # fmt: skip

FLOATS = ("f64", "f32", "f16", "bf16", "c64")  # element types that carry gradients

Attr = int | float | bool | str | None | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dim:
    """A size `numerator * b**batch * s**seq / denominator + offset`: an integer monomial.

    `offset` is zero but for padded sequences (a causal convolution sees s + 3).
    """

    numerator: int
    denominator: int = 1
    batch: int = 0
    seq: int = 0
    offset: int = 0

    def at(self, b: Any, s: Any) -> Any:
        """The size at batch b and sequence s: ints, or integer numpy arrays."""
        if not self.batch and not self.seq:
            return self.numerator + self.offset
        return self.numerator * b**self.batch * s**self.seq // self.denominator + self.offset

    @property
    def is_constant(self) -> bool:
        return not self.batch and not self.seq

    def __str__(self) -> str:
        if self.is_constant:
            return str(self.numerator + self.offset)
        parts = [] if self.numerator == 1 else [str(self.numerator)]
        parts += ["b"] * self.batch + ["s"] * self.seq
        text = "*".join(parts)
        text += f"/{self.denominator}" if self.denominator != 1 else ""
        return text + (f"{self.offset:+d}" if self.offset else "")


def dim(size: int) -> Dim:
    """A constant size."""
    return Dim(numerator=size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Shape and element type of a value; `dtype` is a key of `ITEM_BYTES`."""

    shape: tuple[Dim, ...]
    dtype: str

    def sizes(self, b: Any, s: Any) -> tuple[Any, ...]:
        return tuple(d.at(b, s) for d in self.shape)

    def numel(self, b: Any = 1, s: Any = 1) -> Any:
        return prod(self.sizes(b, s))

    def nbytes(self, b: Any = 1, s: Any = 1) -> Any:
        return self.numel(b, s) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter or buffer of a unit, by its name relative to the unit."""

    name: str
    tensor: Tensor
    kind: str = "parameter"  # or "buffer", or "frozen": a parameter without gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operation. `inputs` name values of the unit: inputs, parameters, or node outputs.

    `name` is stable across runs: module path relative to the unit, then op, then an ordinal.
    A node with several outputs is referred to as `name`, `name:1`, ...
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[Tensor, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()
    source: str = ""

    def attr(self, key: str, default: Attr = None) -> Attr:
        return dict(self.attrs).get(key, default)

    def number(self, key: str, default: int = 0) -> int:
        """An attribute that is an integer; `default` where it is not given."""
        value = self.attr(key)
        return value if isinstance(value, int) else default

    @property
    def module(self) -> str:
        """The path of the module that ran it, relative to the unit; empty for the unit itself."""
        return self.name.rpartition("/")[0]

    def refs(self) -> tuple[str, ...]:
        return (self.name, *(f"{self.name}:{i}" for i in range(1, len(self.outputs))))


@dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
    """A body: inputs, parameters, nodes in execution order, outputs.

    What stays between forward and backward, as value names, parameters left out: `saved` by
    autograd in eager mode, `saved_fused` under a compiler that recomputes elementwise chains (a
    minimum cut), `saved_selective` where only matmul and attention outputs are kept.
    `diff_inputs` are the inputs that carry a gradient.
    """

    name: str
    inputs: tuple[tuple[str, Tensor], ...]
    parameters: tuple[Parameter, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    diff_inputs: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    saved_fused: tuple[str, ...] = ()
    saved_selective: tuple[str, ...] = ()

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """Every value by name."""
        table = dict(self.inputs) | {p.name: p.tensor for p in self.parameters}
        for node in self.nodes:
            table.update(zip(node.refs(), node.outputs))
        return table

    @cached_property
    def producers(self) -> dict[str, Node]:
        return {ref: node for node in self.nodes for ref in node.refs()}

    @cached_property
    def consumers(self) -> dict[str, tuple[Node, ...]]:
        table: dict[str, list[Node]] = {}
        for node in self.nodes:
            for ref in dict.fromkeys(node.inputs):
                table.setdefault(ref, []).append(node)
        return {ref: tuple(nodes) for ref, nodes in table.items()}

    @cached_property
    def parameter_names(self) -> frozenset[str]:
        return frozenset(p.name for p in self.parameters)

    @cached_property
    def parameter_count(self) -> int:
        return sum(p.tensor.numel() for p in self.parameters if p.kind != "buffer")


AFTER = "after"  # the module path, inside a unit, of top-level operations that joined it


def full_name(path: str, name: str) -> str:
    """A parameter's name in the model, from its unit's path and its name there; one that came
    with a joined operation has the name it has at the top."""
    joined = name.removeprefix(f"{AFTER}.")
    return f"{path}.{name}" if joined == name else joined


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """A folded model.

    `units`: the classes, in order of first use. `root`: the top-level body; its nodes with op
    "call" have `attr("unit")`, the class, and `attr("path")`, the instance's module path, and
    `attr("returns")` where the module returns neither a tensor nor a tuple of them: "(*, None)",
    or "?Name" of an object; its own parameters are named in full. `tied`: pairs (alias, owner) of
    full parameter names. `layers`: module paths of the repeated units, the ones a pipeline
    divides; `chain_reason` says why the pipeline cannot cut between units, if it cannot. `notes`:
    what the user must know. `written`: of a graph that is another engine's forward (`ir.stacks`),
    the model's own, which is what files hold.
    """

    name: str
    units: tuple[Unit, ...]
    root: Unit
    tied: tuple[tuple[str, str], ...] = ()
    layers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    max_seq_len: int | None = None
    seq_in_input: bool = True
    written: Graph | None = None

    @cached_property
    def unit_by_name(self) -> dict[str, Unit]:
        return {u.name: u for u in self.units}

    def calls(self) -> Iterator[tuple[Node, str, Unit]]:
        """(node, module path, class) of every instance, in execution order."""
        for node in self.root.nodes:
            if node.op == "call":
                yield node, str(node.attr("path")), self.unit_by_name[str(node.attr("unit"))]

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """Every parameter by its full name, each tensor once (owner of a tie, not its alias)."""
        aliases = {alias for alias, _ in self.tied}
        table = {p.name: p for p in self.root.parameters}
        for _, path, unit in self.calls():
            for p in unit.parameters:
                table.setdefault(full_name(path, p.name), p)
        return {name: p for name, p in table.items() if p.kind != "buffer" and name not in aliases}

    @cached_property
    def parameter_count(self) -> int:
        return sum(p.tensor.numel() for p in self.parameters.values())
