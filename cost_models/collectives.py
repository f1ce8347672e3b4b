"""Seconds of a collective over the topology.

Inside one domain (NVLink, PCIe) a protocol of low latency, `a + b sqrt(S)`, gives way to one of
full rate, `a + s + c sqrt(S) + S f / beta`, fitted; between domains each of the r members in a
domain drives its own network port, so a ring moves at `min(r * NIC * efficiency, .9 * NVLink,
beta)`, with latency that grows with the domains (ring) or their logarithm (tree); the lesser
counts. S is the full tensor in bytes; for all_to_all it is the buffer that one rank holds.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.constants_table import Constants, load_constants
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
class CollectiveCost:
    """How a collective is costed: the least of `forms`, bound by `link`, and why."""

    kind: str
    group_size: int
    members: int
    domains: int
    link: str
    forms: tuple[Form, ...]
    source: str


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


def _across(
    cluster: Cluster, kind: str, members: int, domains: int, table: Constants
) -> tuple[Form, ...]:
    """Ring and tree over `domains` domains with `members` ranks in each."""
    size = members * domains
    passes = _PASSES.get(kind, 1.0)
    share = passes * (size - 1) / size if kind != "broadcast" else 1.0
    inside = _fit(cluster, kind, max(members, 2))
    rate = members * cluster.inter.useful_bytes_per_s
    if members > 1:
        ceiling = table.number("network.nvlink_share") * cluster.intra.bytes_per_s
        rate = min(rate, ceiling, inside.bytes_per_s)
    hop_s = cluster.inter.latency_s
    ring_s = passes * ((domains - 1) * hop_s + domains * (members - 1) * inside.hop_s)
    tree_s = passes * math.ceil(math.log2(domains)) * hop_s
    tree_rate = rate * table.number("network.tree_efficiency")
    start_s, root = inside.overhead_s + inside.start_s, inside.sqrt_s
    ring = Form(algorithm="ring", overhead_s=start_s + ring_s, sqrt_s=root, s_per_byte=share / rate)
    if kind in ("all_gather", "reduce_scatter") and members > 1:
        return (ring,)  # NCCL 2.28 has a tree for them (PAT) at one rank a node only
    return (
        ring,
        Form(
            algorithm="tree", overhead_s=start_s + tree_s, sqrt_s=root,
            s_per_byte=share / tree_rate,
        ),
    )  # fmt: skip


def _exchange(cluster: Cluster, members: int, domains: int) -> Form:
    """All-to-all between domains: each rank has its own port, and the slower part counts."""
    size = members * domains
    inside = _fit(cluster, "all_to_all", max(members, 2))
    far = (size - members) / size / cluster.inter.useful_bytes_per_s
    near = (members - 1) / size / inside.bytes_per_s
    return Form(
        algorithm="pairs",
        overhead_s=inside.overhead_s + inside.start_s
        + math.ceil(math.log2(domains)) * cluster.inter.latency_s,
        sqrt_s=inside.sqrt_s,
        s_per_byte=max(far, near),
    )


def _send(cluster: Cluster, table: Constants, inside: bool) -> Form:
    """One rank to its neighbour; the slowest boundary of the group counts."""
    link = cluster.intra if inside else cluster.inter
    name = "intra" if inside else "inter"
    rate = link.useful_bytes_per_s
    if inside and link.kind == "pcie":
        rate = _fit(cluster, "all_gather", 2).bytes_per_s
    overhead_s = table.number(f"p2p.{name}_overhead_s")
    return Form(algorithm="send", overhead_s=overhead_s, sqrt_s=0.0, s_per_byte=1 / rate)


@functools.lru_cache(maxsize=65536)
def explain(cluster: Cluster, kind: str, group_size: int, stride: int = 1) -> CollectiveCost:
    """How `kind` over `group_size` ranks, `stride` apart, is costed.

    Raises PlanError for an unknown kind: no collective is free.
    """
    _check(kind)
    group = cluster.group(group_size, stride)
    members, domains = group.members, group.domains
    table = load_constants(cluster.device.constants)
    link, source = cluster.intra.kind, ""
    if group_size == 1:
        forms: tuple[Form, ...] = ()
    elif kind == "p2p":
        forms = (_send(cluster, table, domains == 1),)
        source = table.find("p2p.inter_overhead_s").source
    elif domains == 1:
        fit = _fit(cluster, kind, members)
        share = 1.0 if kind == "broadcast" else _PASSES[kind] * (members - 1) / members
        per_byte, source = share / fit.bytes_per_s, fit.source
        forms = (
            Form(
                algorithm="inside", overhead_s=fit.overhead_s, sqrt_s=fit.sqrt_s,
                s_per_byte=per_byte, start_s=fit.start_s, low_sqrt_s=fit.low_sqrt_s,
                switch_bytes=fit.switch_bytes,
            ),
        )  # fmt: skip
    elif kind == "all_to_all":
        forms = (_exchange(cluster, members, domains),)
    else:
        forms = _across(cluster, kind, members, domains, table)
    if domains > 1:
        link = cluster.inter.kind
        source = source or dict(cluster.sources).get("cluster.inter", "the hardware file")
    return CollectiveCost(
        kind=kind, group_size=group_size, members=members, domains=domains, link=link,
        forms=forms, source=source,
    )  # fmt: skip


def collective_s(
    cluster: Cluster, kind: str, size_bytes: ArrayLike, group_size: int, stride: int = 1
) -> FloatArray:
    """Seconds of one collective; size_bytes may be an array. Nothing for a group of one.

    size_bytes: the full tensor (all_to_all: one rank's buffer; p2p: the message), in bytes.
    Raises PlanError for an unknown kind.
    """
    size = np.asarray(size_bytes, dtype=np.float64)
    forms = explain(cluster, kind, group_size, stride).forms
    if not forms:
        return np.zeros_like(size)
    times = [form.at(size) for form in forms]
    best = times[0] if len(times) == 1 else np.minimum(times[0], times[1])
    return np.where(size > 0, best, 0.0)


def bottleneck(cluster: Cluster, group_size: int, stride: int = 1) -> str:
    """The link that bounds a group: nvlink, pcie or network."""
    return explain(cluster, "all_gather", group_size, stride).link
