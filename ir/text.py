"""Canonical text of a graph: printed, parsed back, hashed. One line a value.

A graph has one text, so what is parsed is printed again and compared: a line that says more, less
or something else than it is read as is a fault, and not left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from itertools import zip_longest

from ir.errors import PlanError
from ir.graph import Attr, Dim, Graph, Node, Parameter, Tensor, Unit

VERSION = "graph/1"
SAVED_KINDS = ("saved", "saved_fused", "saved_selective")

# A tensor is in one process's memory, of which x86-64 and arm64 address 2**48 bytes.
MOST_ELEMENTS = 2**48
MOST_POWER = 4  # of b and s together: attention's scores have 3
_INT64 = range(-(2**63), 2**63)  # torch's integers

_DIM = re.compile(
    r"(?:(?P<n>-?\d{1,19})\*?)?(?P<sym>[bs](?:\*[bs])*)?(?:/(?P<d>\d{1,19}))?(?P<o>[+-]\d{1,19})?",
    re.ASCII,
)
_KEY = re.compile(r"\w+", re.ASCII)
_FAULTS = (IndexError, ValueError, AttributeError, KeyError, RecursionError)
_NODE = re.compile(
    r"^  (?P<outs>.+?) = (?P<name>\S+) (?P<op>\w+)\((?P<ins>[^)]*)\)(?: \{(?P<attrs>.*)\})?"
    r"(?: @(?P<src>\S+))?$"
)


def format_graph(graph: Graph) -> str:
    """The canonical text of a graph; `parse_graph` reads it back."""
    lines = [f"{VERSION} {json.dumps(graph.name)}"]
    lines.append(f"max_seq_len {graph.max_seq_len} seq_in_input {graph.seq_in_input}")
    lines += [f"note {json.dumps(note)}" for note in graph.notes]
    lines += [f"tied {alias} {owner}" for alias, owner in graph.tied]
    lines += [f"layer {path}" for path in graph.layers]
    for unit in (*graph.units, graph.root):
        lines += format_unit(unit)
    return "\n".join(lines) + "\n"


def format_unit(unit: Unit) -> list[str]:
    """The lines of one unit: inputs, parameters, nodes, results, what is saved."""
    lines = [f"unit {unit.name}"]
    for name, tensor in unit.inputs:
        lines.append(f"  input {name} {tensor}{' diff' if name in unit.diff_inputs else ''}")
    lines += [f"  {p.kind} {p.name} {p.tensor}" for p in unit.parameters]
    lines += [_format_node(node) for node in unit.nodes]
    lines.append(f"  return {', '.join(unit.outputs)}".rstrip())
    for kind in SAVED_KINDS:
        lines.append(f"  {kind} {', '.join(getattr(unit, kind))}".rstrip())
    return lines


def graph_hash(text: str) -> str:
    """The graph's name in plans: sha256 of its canonical text."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def parse_graph(text: str) -> Graph:
    """Read canonical text back. Raises PlanError with the line that is not of the format."""
    graph = _parse(text)
    lines = text.splitlines()
    for number, (line, written) in enumerate(zip_longest(lines, format_graph(graph).splitlines())):
        if line != written:
            raise _damaged(lines, number, "it is not as a graph is written")
    return graph


def _parse(text: str) -> Graph:
    lines = text.splitlines()
    number = 0
    try:
        version, _, name = lines[0].partition(" ")
        if version != VERSION:
            raise PlanError(
                f"graph text of version {version!r}", why=f"this version reads {VERSION!r}",
                hints=("trace the model again to write a graph of this version",),
            )  # fmt: skip
        words = lines[1].split()
        notes, tied, layers, units = [], [], [], []
        number = 2
        while number < len(lines) and not lines[number].startswith("unit "):
            key, _, rest = lines[number].partition(" ")
            if key == "note":
                notes.append(_word(rest))
            elif key == "layer":
                layers.append(rest)
            else:
                alias, owner = rest.split()
                tied.append((alias, owner))
            number += 1
        while number < len(lines):
            end = number + 1
            while end < len(lines) and lines[end].startswith("  "):
                end += 1
            units.append(_parse_unit(lines, number, end))
            number = end
        number = 0
        return Graph(
            name=_word(name), units=tuple(units[:-1]), root=units[-1], tied=tuple(tied),
            layers=tuple(layers), notes=tuple(notes), seq_in_input=words[3] == "True",
            max_seq_len=None if words[1] == "None" else int(words[1]),
        )  # fmt: skip
    except _FAULTS as fault:
        raise _damaged(lines, number, fault) from fault


def _damaged(lines: Sequence[str], number: int, fault: Exception | str) -> PlanError:
    at = lines[number][:80] if number < len(lines) else "end of file"
    deep = isinstance(fault, RecursionError)
    return PlanError(
        "the graph text is damaged", where=f"at line {number + 1}: {at}",
        why="brackets within brackets without end" if deep else str(fault),
        hints=("write it again with `plan trace`",),
    )  # fmt: skip


def _word(text: str) -> str:
    """A JSON text that is a string."""
    found = json.loads(text)
    if not isinstance(found, str):
        raise ValueError(f"not a word in quotes: {text[:80]}")
    return found


def _format_node(node: Node) -> str:
    outs = " ".join(str(t) for t in node.outputs)
    text = f"  {outs} = {node.name} {node.op}({', '.join(node.inputs)})"
    if node.attrs:
        text += " {" + ", ".join(f"{k}={_format_attr(v)}" for k, v in node.attrs) + "}"
    return text + (f" @{node.source}" if node.source else "")


def _format_attr(value: Attr) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _parse_attrs(text: str) -> tuple[tuple[str, Attr], ...]:
    found: list[tuple[str, Attr]] = []
    decoder = json.JSONDecoder()
    while text:
        key, _, rest = text.partition("=")
        value, end = decoder.raw_decode(rest)
        if not _KEY.fullmatch(key) or key in dict(found):
            raise ValueError(f"not the key of an attribute: {key[:80]!r}")
        if not _is_attr(value):
            raise ValueError(f"not an attribute: {key}={rest[:end][:80]}")
        found.append((key, tuple(value) if isinstance(value, list) else value))
        text = rest[end:].removeprefix(", ")
    return tuple(found)


def _is_attr(value: object) -> bool:
    """Is it an `Attr`, its numbers torch's?"""
    if isinstance(value, list):
        return all(type(item) is int and item in _INT64 for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if type(value) is int:
        return value in _INT64
    return value is None or isinstance(value, (bool, str))


def parse_dim(text: str) -> Dim:
    """Read a size as `Dim.__str__` writes it: "8", "b", "2*b*s/64", "s+3". Raises ValueError."""
    match = _DIM.fullmatch(text)
    if not match or not text or int(match["d"] or 1) == 0:
        raise ValueError(f"not a size: {text!r}")
    symbols = match["sym"] or ""
    return Dim(
        numerator=int(match["n"]) if match["n"] else 1, denominator=int(match["d"] or 1),
        batch=symbols.count("b"), seq=symbols.count("s"), offset=int(match["o"] or 0),
    )  # fmt: skip


def _parse_tensor(text: str) -> Tensor:
    dtype, _, rest = text.partition("[")
    sizes = rest.rstrip("]")
    shape = tuple(parse_dim(d) for d in sizes.split(", ")) if sizes else ()
    for size in shape:
        if size.numerator < (0 if size.is_constant else 1):
            raise ValueError(f"a dimension of {size} in {text[:80]}")
    if math.prod(max(1, d.numerator, abs(d.offset)) for d in shape) > MOST_ELEMENTS:
        raise ValueError(f"more than {MOST_ELEMENTS:,} elements in {text[:80]}")
    if sum(d.batch + d.seq for d in shape) > MOST_POWER:
        raise ValueError(f"a power of b and s of more than {MOST_POWER} in {text[:80]}")
    return Tensor(dtype=dtype, shape=shape)


def _parse_unit(lines: Sequence[str], start: int, end: int) -> Unit:
    """The unit of lines start to end. Raises PlanError with the line at fault."""
    inputs, parameters, nodes, diff = [], [], [], []
    outputs: tuple[str, ...] = ()
    saved: dict[str, tuple[str, ...]] = {}
    number = start
    try:
        for number in range(start + 1, end):
            line = lines[number]
            key, _, rest = line[2:].partition(" ")
            if key == "input":
                name, _, tensor = rest.partition(" ")
                if tensor.endswith(" diff"):
                    diff.append(name)
                inputs.append((name, _parse_tensor(tensor.removesuffix(" diff"))))
            elif key in ("parameter", "buffer", "frozen"):
                name, _, tensor = rest.partition(" ")
                held = _parse_tensor(tensor)
                if not all(size.is_constant for size in held.shape):
                    raise ValueError(f"a {key} is as large in every batch, not {tensor[:80]}")
                parameters.append(Parameter(name=name, tensor=held, kind=key))
            elif key == "return":
                outputs = tuple(rest.split(", ")) if rest else ()
            elif key in SAVED_KINDS:
                saved[key] = tuple(rest.split(", ")) if rest else ()
            else:
                nodes.append(_parse_node(line))
    except _FAULTS as fault:
        raise _damaged(lines, number, fault) from fault
    return Unit(
        name=lines[start].removeprefix("unit "), inputs=tuple(inputs), parameters=tuple(parameters),
        nodes=tuple(nodes), outputs=outputs, diff_inputs=tuple(diff), **saved,
    )  # fmt: skip


def _parse_node(line: str) -> Node:
    match = _NODE.match(line)
    if not match:
        raise ValueError(f"not a node: {line.strip()[:80]!r}")
    return Node(
        name=match["name"], op=match["op"],
        inputs=tuple(match["ins"].split(", ")) if match["ins"] else (),
        outputs=tuple(_parse_tensor(t) for t in re.findall(r"\w+\[[^\]]*\]", match["outs"])),
        attrs=_parse_attrs(match["attrs"] or ""), source=match["src"] or "",
    )  # fmt: skip
