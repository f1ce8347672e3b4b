"""A unit, or the root, while its nodes are read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from ir.graph import Node, Parameter, Tensor, Unit

DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "bool", torch.complex64: "c64",
}  # fmt: skip


@dataclass(kw_only=True)
class Body:
    """What has been read of one unit so far.

    outer: torch nodes of the surroundings that the forward reads past its arguments, and the
    inputs they became. diff: which values carry a gradient. made: the node of each name.
    """

    path: str
    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    outer: list[tuple[fx.Node, str]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    diff: dict[str, bool] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    made: dict[str, Node] = field(default_factory=dict)
    constants: dict[fx.Node, str] = field(default_factory=dict)

    def unique(self, stem: str) -> str:
        """A name not given before: stem, stem_1, stem_2, ..."""
        number = self.counts.get(stem, 0)
        self.counts[stem] = number + 1
        return f"{stem}_{number}" if number else stem

    def take(self, name: str, tensor: Tensor, learns: bool) -> None:
        """One more input."""
        self.inputs.append((name, tensor))
        self.values[name], self.diff[name] = tensor, learns

    def own(self, parameter: Parameter) -> None:
        """One more parameter or buffer."""
        self.parameters[parameter.name] = parameter
        self.values[parameter.name] = parameter.tensor
        self.diff[parameter.name] = parameter.kind == "parameter"

    def constant(self, node: fx.Node, tensor: Tensor) -> str:
        """A tensor that the forward makes from Python values: a buffer of who reads it."""
        if node not in self.constants:
            self.constants[node] = self.unique("constant")
            self.own(Parameter(name=self.constants[node], tensor=tensor, kind="buffer"))
        return self.constants[node]

    def add(self, node: Node, learns: tuple[bool, ...]) -> None:
        """One more node; learns: which of its outputs carry a gradient."""
        self.nodes.append(node)
        self.made[node.name] = node
        for ref, tensor, grad in zip(node.refs(), node.outputs, learns):
            self.values[ref], self.diff[ref] = tensor, grad


@dataclass(frozen=True, kw_only=True)
class Known:
    """A traced representative: its unit, and what its forward reads from outside its arguments."""

    unit: Unit
    outer: tuple[str, ...]
