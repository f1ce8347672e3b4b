"""Levels of a network beyond the domains, inside out, and how a group of ranks lies over them.

A level joins units of the level below it (at first domains) to units of its own. What leaves a
unit goes over that unit's links into the level, which its ranks share: each rank has the level's
useful rate. So a flat network, rails, a fat tree with fewer uplinks than downlinks, a dragonfly
and a link between datacentres differ in their numbers, and in the little that `Level.kind` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cost_models.checked_toml import table, typed
from ir.errors import UsageError

# kind -> what it says beyond its numbers
LEVEL_KINDS = {
    "tree": "switches, every pair of units alike",
    "rail": "joins GPUs of the same place in their domains; others meet one level further out",
    "dragonfly": "a link between every two units: neighbours alone fill few of them",
    "wan": "links between datacentres",
}
LEVEL_KEYS = {
    "name": str, "kind": str, "bytes_per_s": float, "latency_s": float, "efficiency": float,
    "oversubscription": float, "source": str,
}  # fmt: skip
_LEFT_OUT = {"oversubscription": 1.0, "source": ""}
# A unit that sends to one other alone may use the links to all others, each byte then taking two
# of them: Valiant's routing, half of the rate (Kim et al., ISCA 2008, section 4).
_DETOURED = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One level of the network.

    ranks: that a unit of it joins, 0 for all. bytes_per_s: line rate a rank, one direction, into
    the level; efficiency: the share of it that large transfers reach; oversubscription: ports down
    over ports up of what it joins. latency_s: end to end, where nothing further out is crossed.
    """

    name: str
    kind: str
    ranks: int
    bytes_per_s: float
    latency_s: float
    efficiency: float
    oversubscription: float = 1.0
    source: str = ""

    @property
    def useful_bytes_per_s(self) -> float:
        """What a rank has of the links that leave its unit, when all ranks send at once."""
        return self.bytes_per_s * self.efficiency / self.oversubscription


def read_levels(raw: Any, domain: int, count: int, where: str) -> tuple[Level, ...]:
    """`[[cluster.levels]]` of a hardware file, checked. Raises UsageError naming the key."""
    typed(raw, list, where, "cluster.levels")
    found: list[Level] = []
    below = domain
    for place, row in enumerate(raw):
        path, last = f"cluster.levels[{place}].", place == len(raw) - 1
        fields = dict(typed(row, dict, where, path[:-1]))
        ranks = fields.pop("ranks", None)
        if ranks is None and not last:
            raise UsageError(f"missing key {path}ranks", where=where,
                             why="the outermost level alone may join all GPUs")  # fmt: skip
        ranks = 0 if ranks is None else typed(ranks, int, where, f"{path}ranks")
        fields = table({**_LEFT_OUT, **fields}, LEVEL_KEYS, where, path, ("ranks",))
        level = Level(ranks=ranks, **fields)
        if level.kind not in LEVEL_KINDS:
            raise UsageError(f"unknown kind {level.kind!r} of level {level.name!r}", where=where,
                             why=f"known: {', '.join(LEVEL_KINDS)}")  # fmt: skip
        if level.name in (other.name for other in found):
            raise UsageError(f"{path}name is {level.name!r} again", where=where,
                             why="what crosses a level is told by its name")  # fmt: skip
        if level.oversubscription < 1:
            raise UsageError(f"{path}oversubscription is {level.oversubscription:g}", where=where,
                             why="ports down over ports up: 1 or more")  # fmt: skip
        if ranks and (ranks % below or ranks == below):
            raise UsageError(f"{path}ranks is {ranks}", where=where,
                             why=f"it joins two or more units of {below} GPUs")  # fmt: skip
        if last and ranks and ranks < count:
            raise UsageError(f"{path}ranks is {ranks}, the cluster has {count} GPUs", where=where,
                             hints=("one more level, or no ranks: it joins all",))  # fmt: skip
        below = ranks
        found.append(level)
    return tuple(found)


def check_network(raw: dict[str, Any], where: str) -> None:
    """Raise UsageError where a file says the network in two ways."""
    body = raw.get("cluster", {})
    if isinstance(body, dict) and body.get("levels") and "inter" in body:
        raise UsageError("cluster.inter and cluster.levels both say the network", where=where,
                         why="the innermost level is what a GPU's port reaches",
                         hints=("leave out [cluster.inter]",))  # fmt: skip


def spans_of(domain: int, count: int, levels: tuple[Level, ...]) -> tuple[int, ...]:
    """Ranks of a unit: of a domain, then of each level, in equal parts; the last is all."""
    found = [domain]
    for level in levels[:-1]:
        units = -(-count // level.ranks)
        while count % units or (count // units) % found[-1]:
            units += 1
        found.append(count // units)
    return (*found, count)


def members_of(size: int, stride: int, span: int, count: int) -> int:
    """Of `size` ranks, `stride` apart, those in one unit of `span` ranks, of the group that lies
    worst."""
    if span == count:
        return size
    even = (m for m in range(size, 0, -1) if size % m == 0 and span % (m * stride) == 0)
    return next(even, 1)


def shape_of(
    spans: tuple[int, ...], levels: tuple[Level, ...], size: int, stride: int,
    apart: tuple[int, int],
) -> tuple[int, ...]:  # fmt: skip
    """How many of a group are in one unit, of domains, then of each level; the last is all.

    The group is `size` ranks, `stride` apart, and `apart[0]` times that, `apart[1]` apart. Rails
    join no domains for a group whose ranks lie in other places of each domain.
    """
    (copies, far), count = apart, spans[-1]
    found = []
    for span in spans:
        near = members_of(size, stride, span, count)
        more = members_of(copies, far, span, count) if near == size else 1
        found.append(near * more)
    if len(levels) > 1 and levels[0].kind == "rail":
        tiled = (_tiles(n, step, spans[0], count) for n, step in ((size, stride), apart))
        found[1] = found[1] if all(tiled) else found[0]
    return tuple(found)


def _tiles(size: int, stride: int, domain: int, count: int) -> bool:
    """Whether a group's ranks have the same places in every domain that they are in."""
    members = members_of(size, stride, domain, count)
    return members == size or stride % domain == 0 or members * stride == domain


def ring_share(level: Level, units: int) -> float:
    """The share of a level's rate where each unit sends to one other; units: that it joins."""
    if level.kind != "dragonfly" or units <= 2:
        return 1.0
    return max(1 / (units - 1), _DETOURED)


def exchange_share(level: Level, units: int, met: int) -> float:
    """The same where each unit sends to `met` - 1 of the others alike."""
    if level.kind != "dragonfly" or units <= 2:
        return 1.0
    return max((met - 1) / (units - 1), _DETOURED)
