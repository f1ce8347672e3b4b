"""Seconds of a collective over the topology.

Inside one domain (NVLink, PCIe) a protocol of low latency, `a + b sqrt(S)`, gives way to one of
full rate, `a + s + c sqrt(S) + S f / beta`, fitted; between domains each of the r members in a
domain drives its own network port, so a ring moves at `min(r * NIC * efficiency, .9 * NVLink,
beta)`, with latency that grows with the domains (ring) or their logarithm (tree); the lesser
counts. Over a network of several levels (`levels.py`) a ring moves at the least of what its r
ranks in a unit of each level have of that unit's links outward, and a hierarchy counts as well:
reduced inside a unit, across units each rank's share, gathered inside.
S is the full tensor in bytes; for all_to_all it is the buffer that one rank holds.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.constants_table import Constants, load_constants
from cost_models.crossing import (
    crossed_by,
    latencies_s,
    leaving,
    ring_bytes_per_s,
    send_bytes_per_s,
)
from cost_models.hardware import Cluster
from cost_models.links import mixed
from ir.errors import PlanError

FloatArray: TypeAlias = NDArray[np.float64]

# Share of S that a rank moves, as a multiple of (n - 1) / n: formulas of the ring algorithms.
_PASSES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}
# A broadcast streams the tensor along the ring that an all-gather uses, so it is fitted as one.
_FITTED_AS = {"broadcast": "all_gather"}
KINDS = (*_PASSES, "broadcast", "p2p")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One algorithm's time: `overhead_s + start_s + sqrt_s sqrt(S) + S s_per_byte` at large sizes.

    Below switch_bytes the small protocol: `overhead_s + low_sqrt_s sqrt(S)`; 0 where there is none.
    """

    algorithm: str
    overhead_s: float
    sqrt_s: float
    s_per_byte: float
    start_s: float = 0.0
    low_sqrt_s: float = 0.0
    switch_bytes: float = 0.0

    def at(self, size_bytes: FloatArray) -> FloatArray:
        """Seconds; never less than the wire takes, and never less for more bytes."""
        root = np.sqrt(size_bytes)
        large_s = self.overhead_s + self.start_s + self.sqrt_s * root
        large_s = large_s + size_bytes * self.s_per_byte
        if not self.switch_bytes:
            return large_s
        small_s = self.overhead_s + self.low_sqrt_s * root
        return mixed(small_s, large_s, size_bytes, self.switch_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Collectives one behind the other: the forms of each, and the share of the bytes it moves."""

    algorithm: str
    parts: tuple[tuple[tuple[Form | Staged, ...], float], ...]

    @property
    def s_per_byte(self) -> float:
        """Seconds a byte that it takes at least."""
        return sum(share * min(f.s_per_byte for f in forms) for forms, share in self.parts)

    def at(self, size_bytes: FloatArray) -> FloatArray:
        """Seconds; each part takes the least of its forms, by its size."""
        return np.asarray(sum(_least(forms, size_bytes * share) for forms, share in self.parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCost:
    """How a collective is costed: the least of `forms`, bound by `link`, and why.

    level: the outermost level that it crosses, where the hardware lists levels.
    """

    kind: str
    group_size: int
    members: int
    domains: int
    link: str
    forms: tuple[Form | Staged, ...]
    source: str
    level: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    overhead_s: float
    sqrt_s: float
    bytes_per_s: float
    hop_s: float
    start_s: float
    low_sqrt_s: float
    switch_bytes: float
    source: str


def driven(cluster: Cluster, network_share: float) -> Cluster:
    """The cluster as an engine drives it: beyond a domain, that share of its network ports."""
    if network_share == 1:
        return cluster
    inter = cluster.inter
    return replace(cluster, inter=replace(inter, efficiency=inter.efficiency * network_share))


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise PlanError(f"no cost for collective {kind!r}", why=f"known: {', '.join(KINDS)}")


def _fit(cluster: Cluster, kind: str, ranks: int) -> _Fit:
    """Constants for `ranks` in one domain: linear in log2 of the ranks between fitted sizes.

    Above the largest fitted size the overhead grows on by its last slope; the rest stays.
    """
    table = load_constants(cluster.device.constants)
    name = f"collective.{_FITTED_AS.get(kind, kind)}"
    at = np.log2(table.numbers(f"{name}.ranks"))
    overhead = np.array(table.numbers(f"{name}.overhead_s"))
    x = math.log2(ranks)
    scale = cluster.intra.bytes_per_s / table.number("collective.link_bytes_per_s")
    per_byte = 1 / np.array(table.numbers(f"{name}.bytes_per_s"))
    slope = max(0.0, float((overhead[-1] - overhead[-2]) / (at[-1] - at[-2])))
    hops = 2.0 ** at[-1] - 2.0 ** at[0]
    small = table.has(f"{name}.switch_bytes")  # hosts that were not measured have one protocol

    def between(key: str) -> float:
        return float(np.interp(x, at, table.numbers(f"{name}.{key}"))) if small else 0.0

    return _Fit(
        overhead_s=float(np.interp(x, at, overhead)) + slope * max(0.0, x - float(at[-1])),
        sqrt_s=float(np.interp(x, at, table.numbers(f"{name}.sqrt_s"))),
        bytes_per_s=scale / float(np.interp(x, at, per_byte)),
        hop_s=max(0.0, float(overhead[-1] - overhead[0]) / hops),
        start_s=between("start_s"),
        low_sqrt_s=between("low_sqrt_s"),
        switch_bytes=between("switch_bytes"),
        source=table.find(f"{name}.bytes_per_s").source,
    )


def _inside(cluster: Cluster, kind: str, members: int) -> Form:
    """One collective inside a domain, by the fit."""
    fit = _fit(cluster, kind, members)
    share = 1.0 if kind == "broadcast" else _PASSES[kind] * (members - 1) / members
    return Form(
        algorithm="inside", overhead_s=fit.overhead_s, sqrt_s=fit.sqrt_s,
        s_per_byte=share / fit.bytes_per_s, start_s=fit.start_s, low_sqrt_s=fit.low_sqrt_s,
        switch_bytes=fit.switch_bytes,
    )  # fmt: skip


def _across(
    cluster: Cluster, kind: str, shape: tuple[int, ...], table: Constants
) -> tuple[Form | Staged, ...]:
    """Ring and tree over domains; over a network of several levels hierarchies as well.

    shape: how many of the group's ranks are in one unit, of domains, then of each level.
    """
    size, members = shape[-1], shape[0]
    passes = _PASSES.get(kind, 1.0)
    share = passes * (size - 1) / size if kind != "broadcast" else 1.0
    inside = _fit(cluster, kind, max(members, 2))
    rate = ring_bytes_per_s(cluster, shape)
    if members > 1:
        ceiling = table.number("network.nvlink_share") * cluster.intra.bytes_per_s
        rate = min(rate, ceiling, inside.bytes_per_s)
    hops = [
        (size // below - size // above, math.ceil(math.log2(above / below)), hop_s)
        for below, above, hop_s in zip(shape, shape[1:], latencies_s(cluster))
    ]
    ring_s = passes * (
        sum(times * hop_s for times, _, hop_s in hops)
        + size // members * (members - 1) * inside.hop_s
    )
    tree_s = passes * sum(depth * hop_s for _, depth, hop_s in hops)
    tree_rate = rate * table.number("network.tree_efficiency")
    start_s, root = inside.overhead_s + inside.start_s, inside.sqrt_s
    forms: list[Form | Staged] = [
        Form(algorithm="ring", overhead_s=start_s + ring_s, sqrt_s=root, s_per_byte=share / rate)
    ]
    # NCCL 2.28 has a tree for all-gather and reduce-scatter (PAT) at one rank a node only
    if kind not in ("all_gather", "reduce_scatter") or members == 1:
        forms.append(Form(
            algorithm="tree", overhead_s=start_s + tree_s, sqrt_s=root,
            s_per_byte=share / tree_rate,
        ))  # fmt: skip
    return (*forms, *_hierarchies(cluster, kind, shape, table))


# kind -> its parts in order: (kind, inside a unit or across units)
_HIERARCHY = {
    "all_reduce": (("reduce_scatter", True), ("all_reduce", False), ("all_gather", True)),
    "all_gather": (("all_gather", False), ("all_gather", True)),
    "reduce_scatter": (("reduce_scatter", True), ("reduce_scatter", False)),
}


def _hierarchies(
    cluster: Cluster, kind: str, shape: tuple[int, ...], table: Constants
) -> list[Staged]:
    """A hierarchy at each level that the group crosses: all of it inside a unit, and across units
    of each rank its share, all ranks at once. For networks of several levels: of one level, the
    libraries that the constants were fitted on have ring and tree."""
    found: list[Staged] = []
    if len(cluster.levels) < 2 or kind not in _HIERARCHY:
        return found
    for k, level in enumerate(cluster.levels):
        near = shape[k]
        if near == 1 or shape[k + 1] == near:
            continue
        inner = (*shape[: k + 1], *(near for _ in shape[k + 1 :]))
        outer = (*(1 for _ in shape[: k + 1]), *(n // near for n in shape[k + 1 :]))
        parts = tuple(
            (_forms(cluster, part, inner if within else outer, table), 1.0 if within else 1 / near)
            for part, within in _HIERARCHY[kind]
        )
        found.append(Staged(algorithm=f"hierarchy at {level.name}", parts=parts))
    return found


def _exchange(cluster: Cluster, shape: tuple[int, ...]) -> Form:
    """All-to-all between domains: each rank has its own port and its share of the links further
    out, and the slowest part counts."""
    size, members = shape[-1], shape[0]
    inside = _fit(cluster, "all_to_all", max(members, 2))
    near = (members - 1) / size / inside.bytes_per_s
    far = [(size - count) / size / rate for count, rate, _ in leaving(cluster, shape)]
    hops = zip(shape, shape[1:], latencies_s(cluster))
    return Form(
        algorithm="pairs",
        overhead_s=inside.overhead_s
        + inside.start_s
        + sum(math.ceil(math.log2(above / below)) * hop_s for below, above, hop_s in hops),
        sqrt_s=inside.sqrt_s,
        s_per_byte=max(near, *far),
    )


@functools.lru_cache(maxsize=4096)
def send_form(cluster: Cluster, crossed: int, stride: int) -> Form:
    """One rank to another, `stride` on, across so many levels of the network. Of a unit's ranks
    those within `stride` of its end send over its links outward, and share them."""
    table = load_constants(cluster.device.constants)
    link = cluster.inter if crossed else cluster.intra
    rate = link.useful_bytes_per_s
    if not crossed and link.kind == "pcie":
        rate = _fit(cluster, "all_gather", 2).bytes_per_s
    overhead_s = table.number(f"p2p.{'inter' if crossed else 'intra'}_overhead_s")
    if crossed > 1:  # the overhead has the innermost level's latency in it
        overhead_s += latencies_s(cluster)[crossed - 1] - cluster.inter.latency_s
        rate = min(rate, send_bytes_per_s(cluster, crossed, stride))
    return Form(algorithm="send", overhead_s=overhead_s, sqrt_s=0.0, s_per_byte=1 / rate)


def _forms(
    cluster: Cluster, kind: str, shape: tuple[int, ...], table: Constants
) -> tuple[Form | Staged, ...]:
    """The ways to run a collective of more than one rank."""
    if shape[0] == shape[-1]:
        return (_inside(cluster, kind, shape[0]),)
    if kind == "all_to_all":
        return (_exchange(cluster, shape),)
    return _across(cluster, kind, shape, table)


@functools.lru_cache(maxsize=65536)
def explain(
    cluster: Cluster, kind: str, group_size: int, stride: int = 1,
    apart: tuple[int, int] = (1, 1),
) -> CollectiveCost:  # fmt: skip
    """How `kind` is costed over `group_size` ranks, `stride` apart (and that `apart[0]` times,
    `apart[1]` apart).

    Raises PlanError for an unknown kind: no collective is free.
    """
    _check(kind)
    shape = cluster.shape(group_size, stride, apart)
    size, members = shape[-1], shape[0]
    domains = size // members
    table = load_constants(cluster.device.constants)
    link, source, level = cluster.intra.kind, "", ""
    if size == 1:
        forms: tuple[Form | Staged, ...] = ()
    elif kind == "p2p":
        far = stride if group_size > 1 else apart[1]
        forms = (send_form(cluster, crossed_by(shape), far),)
        source = table.find("p2p.inter_overhead_s").source
    else:
        forms = _forms(cluster, kind, shape, table)
        source = _fit(cluster, kind, members).source if domains == 1 else ""
    if domains > 1:
        link = cluster.inter.kind
        name = "cluster.inter"
        if cluster.levels:
            level = cluster.levels[crossed_by(shape) - 1].name
            name = f"cluster.levels.{level}"
        source = source or dict(cluster.sources).get(name, "the hardware file")
    return CollectiveCost(
        kind=kind, group_size=size, members=members, domains=domains, link=link,
        forms=forms, source=source, level=level,
    )  # fmt: skip


def _least(forms: tuple[Form | Staged, ...], size_bytes: FloatArray) -> FloatArray:
    """Seconds of the quickest form at each size."""
    times = [form.at(size_bytes) for form in forms]
    return times[0] if len(times) == 1 else np.asarray(np.minimum.reduce(times))


def collective_s(
    cluster: Cluster, kind: str, size_bytes: ArrayLike, group_size: int, stride: int = 1,
    apart: tuple[int, int] = (1, 1),
) -> FloatArray:  # fmt: skip
    """Seconds of one collective; size_bytes may be an array. Nothing for a group of one.

    size_bytes: the full tensor (all_to_all: one rank's buffer; p2p: the message), in bytes.
    The group as in `explain`. Raises PlanError for an unknown kind.
    """
    size = np.asarray(size_bytes, dtype=np.float64)
    forms = explain(cluster, kind, group_size, stride, apart).forms
    if not forms:
        return np.zeros_like(size)
    return np.where(size > 0, _least(forms, size), 0.0)


def reaching_s(
    cluster: Cluster, kind: str, size_bytes: float, members: int, stride: int, size: int
) -> float:
    """Seconds of one collective of `size` ranks, of which `members`, `stride` apart, lie in this
    cluster and the others behind its network: as if those were in units of it like its own.

    size_bytes: as `collective_s` takes it. Raises PlanError for an unknown kind.
    """
    _check(kind)
    shape = (*cluster.shape(members, stride)[:-1], size)
    forms = _across(cluster, kind, shape, load_constants(cluster.device.constants))
    return float(_least(forms, np.asarray(size_bytes, dtype=np.float64)))


def quickest(
    cluster: Cluster, kind: str, size_bytes: float, group_size: int, stride: int = 1
) -> str:
    """The algorithm that is quickest at that size: inside, ring, tree, pairs, a hierarchy."""
    forms = explain(cluster, kind, group_size, stride).forms
    size = np.asarray(size_bytes, dtype=np.float64)
    return min(forms, key=lambda form: float(form.at(size))).algorithm if forms else ""


def bottleneck(cluster: Cluster, group_size: int, stride: int = 1) -> str:
    """The link that bounds a group: nvlink, pcie or network."""
    return explain(cluster, "all_gather", group_size, stride).link
