"""Hardware of more than one kind: clusters side by side, and what joins them.

A sum, `h100x32+a100x64`, or a file that lists `parts` and may say the link `between` them. A kind
that is named again, `h100x64+h100x32`, is another part, h100#2: the same GPUs in two groups.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cost_models.checked_toml import read_toml, table
from cost_models.decisions import Decisions
from cost_models.hardware import AGAIN, LINK_KEYS, Cluster, Link, load_hardware, summands
from ir.errors import UsageError

_FILE_KEYS = {"name": str, "parts": list, "between": dict, "sources": dict}
RULE = "assumed: parts meet at the slower of their own networks; a file's [between] says a link"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Clusters of different kinds in the order given, one name each.

    between: the link that a GPU of one part has to those of another; None: the slower of their
    own networks.
    """

    name: str
    parts: tuple[Cluster, ...]
    between: Link | None = None

    @property
    def spec(self) -> str:
        """As `--hardware` takes it, where the parts are the catalogue's."""
        return "+".join(part.spec for part in self.parts)

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def digest(self) -> str:
        """sha256 of the parts in order and of what joins them."""
        link = None if self.between is None else asdict(self.between)
        text = json.dumps([[part.digest for part in self.parts], link], separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def part(self, name: str) -> Cluster:
        """The part of that name. Raises UsageError naming those there are."""
        for part in self.parts:
            if part.name == name:
                return part
        names = ", ".join(part.name for part in self.parts)
        raise UsageError(f"{self.spec} has no part {name!r}", why=f"its parts: {names}")


Hardware = Cluster | Fleet


def parts_of(hardware: Hardware) -> tuple[Cluster, ...]:
    """The clusters of one kind that it is made of."""
    return hardware.parts if isinstance(hardware, Fleet) else (hardware,)


def used_parts(hardware: Hardware, d: Decisions) -> tuple[Cluster, ...]:
    """The clusters that a plan uses, in the order of its ranks."""
    if not isinstance(hardware, Fleet):
        return (hardware,)
    names = [share.part for share in d.shares] or [name for name, _ in d.parts]
    return tuple(hardware.part(name) for name in names)


def load_any(spec: str) -> Hardware:
    """Read what `load_hardware` reads, a sum of such, or a file of parts. Raises UsageError."""
    parts = summands(spec)
    if len(parts) > 1:
        if not all(parts):
            raise UsageError(f"hardware {spec!r} names nothing on one side of a +",
                             hints=("as h100x32+a100x64",))  # fmt: skip
        return _fleet(spec, tuple(map(load_hardware, parts)), None, "")
    if spec.endswith(".toml"):
        raw = read_toml(Path(spec))
        return _from_file(Path(spec), raw) if "parts" in raw else load_hardware(spec)
    return load_hardware(spec)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that `load_any` reads for a hardware file: itself, and those of its parts.
    Raises UsageError as it does."""
    parts = read_toml(path).get("parts", [])
    named = parts if isinstance(parts, list) else []  # what is no list, loading it says
    own = [part for part in named if isinstance(part, str) and part.endswith(".toml")]
    return (path, *(path.parent / part for part in own))


def _from_file(path: Path, raw: dict[str, Any]) -> Fleet:
    top = table({"name": path.stem, "between": {}, "sources": {}, **raw}, _FILE_KEYS, str(path), "")
    parts = []
    for i, part in enumerate(top["parts"]):
        if not isinstance(part, str):
            raise UsageError(f"parts[{i}] is {part!r}", where=str(path), why='expected "h100x32"')
        parts.append(load_hardware(str(path.parent / part) if part.endswith(".toml") else part))
    link = None
    if top["between"]:
        link = Link(**table(top["between"], LINK_KEYS, str(path), "between."))
        if link.kind != "network":
            raise UsageError(f"between.kind is {link.kind!r}", where=str(path),
                             why="parts are joined by a network")  # fmt: skip
    return _fleet(top["name"], tuple(parts), link, str(path))


def _fleet(name: str, parts: tuple[Cluster, ...], between: Link | None, where: str) -> Fleet:
    if len(parts) < 2:
        raise UsageError(f"{name} has one part", where=where, hints=("name it alone",))
    named: list[Cluster] = []
    for part in parts:
        alike = [one for one in named if one.kind == part.name]
        if alike and replace(alike[0], count=part.count) != part:
            raise UsageError(
                f"{name} names {part.name} twice", where=where,
                why="those are of different kinds, and parts are told apart by their names",
                hints=("a .toml file gives a part another name",),
            )  # fmt: skip
        again = f"{part.name}{AGAIN}{len(alike) + 1}" if alike else part.name
        named.append(replace(part, name=again))
    return Fleet(name=name, parts=tuple(named), between=between)
