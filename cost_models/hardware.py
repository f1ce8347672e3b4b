"""What a plan is made for: devices, links, memory tiers and the cluster they make up.

A cluster is read from a TOML file: the catalogue's (`hardware/*.toml`, every number with its
source) or the user's own. Ranks are laid over it in order: node by node, domain by domain.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cost_models.checked_toml import merged, read_toml, table, typed
from cost_models.constants_table import OwnConstants, own_constants
from cost_models.levels import Level, check_network, read_levels, shape_of, spans_of
from cost_models.tiers import Tier, read_tier
from ir.errors import UsageError

_CATALOGUE = Path(__file__).with_name("hardware")
_COUNTED = re.compile(r"([a-z0-9][a-z0-9.-]*?)x([0-9]+)")
MOST_DIGITS = 9  # of a count of GPUs
AGAIN = "#"  # h100#2 is the second part of that kind in a sum
DTYPES = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "int8", "nvfp4", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator.

    memory_bytes is what the driver reports to a process. peak_flop_per_s is dense, without
    sparsity. constants names the table of `constants/` that its kernels are costed with, or is
    what a hardware file brings over one.
    """

    name: str
    title: str
    family: str
    constants: str | OwnConstants
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    peak_flop_per_s: tuple[tuple[str, float], ...]
    power_w: float
    sm_count: int
    host_link_bytes_per_s: float

    def has(self, dtype: str) -> bool:
        """Whether the device computes in `dtype` at all."""
        return any(name == dtype for name, _ in self.peak_flop_per_s)

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s in `dtype`. Raises UsageError naming the dtypes the device has."""
        for name, value in self.peak_flop_per_s:
            if name == dtype:
                return value
        names = ", ".join(name for name, _ in self.peak_flop_per_s)
        raise UsageError(
            f"{self.name} does not compute in {dtype}",
            why=f"{self.title} has {names}",
            hints=tuple(f"--precision {p}" for p in ("bf16", "fp16", "fp32") if self.has(p))[:1],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way for bytes between devices, per device and direction.

    kind: nvlink (any direct fabric), pcie or network. bytes_per_s is the line rate, efficiency
    the share of it that large transfers reach, latency_s one hop.
    """

    name: str
    kind: str
    bytes_per_s: float
    latency_s: float
    efficiency: float

    @property
    def useful_bytes_per_s(self) -> float:
        """The rate a large transfer reaches."""
        return self.bytes_per_s * self.efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """How ranks that are `stride` apart lie: `members` of them a domain, in `domains` domains."""

    size: int
    members: int
    domains: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`count` devices in nodes of `node_size`; `domain_size` of them share the intra link.

    levels: of the network between domains, inside out; `inter` is the innermost of them, or all
    there is where none are listed. uplink_gpus: that share one link to the host, as those behind a
    PCIe switch do; it has the rate of one GPU's own.
    """

    name: str
    device: Device
    count: int
    node_size: int
    domain_size: int
    intra: Link
    inter: Link
    host_ram_bytes: int
    tiers: tuple[Tier, ...]
    sources: tuple[tuple[str, str], ...]
    levels: tuple[Level, ...] = ()
    uplink_gpus: int = 1

    @property
    def kind(self) -> str:
        """The name, whichever part of that kind in a sum it is."""
        return self.name.partition(AGAIN)[0]

    @property
    def spec(self) -> str:
        """What `--hardware` takes: h100x64."""
        return f"{self.kind}x{self.count}"

    @property
    def nodes(self) -> int:
        return -(-self.count // self.node_size)

    @property
    def domain_ranks(self) -> int:
        """Ranks that share the intra link: equal parts of whole nodes, or of one, so 128 GPUs on
        NVL72 are 2 x 64."""
        domains, node = -(-self.count // self.domain_size), min(self.node_size, self.count)
        while self.count % domains or (
            (self.count // domains) % node and node % (self.count // domains)
        ):
            domains += 1
        return self.count // domains

    @property
    def digest(self) -> str:
        """sha256 of all that a cost depends on; prose and paths are left out."""
        content = {key: value for key, value in asdict(self).items() if key != "sources"}
        levels = content.pop("levels")
        if levels:
            prose = ("name", "source")
            content["levels"] = [
                {k: v for k, v in level.items() if k not in prose} for level in levels
            ]
        if self.uplink_gpus == 1:
            del content["uplink_gpus"]
        content["tiers"] = [
            {k: v for k, v in tier.items() if v is not None} for tier in content["tiers"]
        ]
        content["device"] = {k: v for k, v in content["device"].items() if k != "title"}
        own = self.device.constants
        if not isinstance(own, str):
            content["device"]["constants"] = [own.base, *((c.name, c.value) for c in own.items)]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def spans(self) -> tuple[int, ...]:
        """Ranks of a unit, inside out: a domain, then each level of the network; the last all."""
        return spans_of(self.domain_ranks, self.count, self.levels)

    def shape(self, size: int, stride: int = 1, apart: tuple[int, int] = (1, 1)) -> tuple[int, ...]:
        """How many ranks of a group are in one unit of each of `spans`; the worst-placed counts.

        The group: `size` ranks, `stride` apart, and that `apart[0]` times, `apart[1]` apart.
        """
        reach = size * stride if apart[0] == 1 else apart[0] * apart[1]
        if min(size, stride, *apart) < 1 or reach > self.count:
            raise UsageError(f"{size} ranks with stride {stride} do not fit {self.spec}")
        return shape_of(self.spans, self.levels, size, stride, apart)

    def group(self, size: int, stride: int = 1) -> Group:
        """Lay `size` ranks, `stride` apart, over the domains; the worst-placed group counts."""
        members = self.shape(size, stride)[0]
        return Group(size=size, members=members, domains=size // members)

    def tier(self, name: str) -> Tier:
        """The tier of that name. Raises UsageError naming those there are."""
        for tier in self.tiers:
            if tier.name == name:
                return tier
        names = ", ".join(tier.name for tier in self.tiers) or "none"
        raise UsageError(f"{self.spec} has no tier {name!r}", why=f"its tiers: {names}")

    def sharers(self, tier: Tier) -> int:
        """GPUs that share a tier."""
        return min(tier.gpus or self.node_size, self.count)

    def uplink_bytes_per_s(self, gpus: int | None = None) -> float:
        """What each GPU has of the way to its host, either direction, while so many of a node (all,
        if not said) copy at once."""
        together = min(self.uplink_gpus, self.count if gpus is None else gpus)
        return self.device.host_link_bytes_per_s / together


DEVICE_KEYS = {
    "title": str, "family": str, "constants": str, "memory_bytes": int,
    "memory_bandwidth_bytes_per_s": float, "peak_flop_per_s": dict, "power_w": float,
    "sm_count": int, "host_link_bytes_per_s": float,
}  # fmt: skip
LINK_KEYS = {
    "name": str, "kind": str, "bytes_per_s": float, "latency_s": float, "efficiency": float,
}  # fmt: skip
CLUSTER_KEYS = {
    "node_size": int, "domain_size": int, "uplink_gpus": int, "host_ram_bytes": int,
    "intra": dict, "inter": dict, "tiers": list,
}  # fmt: skip
_FILE_KEYS = {"name": str, "device": dict, "constants": dict, "cluster": dict, "sources": dict}


def _device(name: str, raw: Any, where: str, constants: Any) -> Device:
    fields = table(raw, DEVICE_KEYS, where, "device.")
    if constants:
        fields["constants"] = own_constants(constants, fields["constants"], where)
    peaks = fields.pop("peak_flop_per_s")
    for dtype in peaks:
        if dtype not in DTYPES:
            raise UsageError(
                f"unknown dtype device.peak_flop_per_s.{dtype}",
                where=where,
                why=f"known: {', '.join(DTYPES)}",
            )
    ordered = tuple(
        (d, typed(peaks[d], float, where, f"device.peak_flop_per_s.{d}"))
        for d in DTYPES
        if d in peaks
    )
    return Device(name=name, peak_flop_per_s=ordered, **fields)


def _cluster(raw: dict[str, Any], count: int, where: str) -> Cluster:
    top = table({"sources": {}, "constants": {}, **raw}, _FILE_KEYS, where, "", ("base", "count"))
    given = {"uplink_gpus": 1, **top["cluster"]}
    listed = given.pop("levels", None)
    if listed:
        given["inter"] = {}
    body = table(given, CLUSTER_KEYS, where, "cluster.", ("levels",))
    if body["uplink_gpus"] < 1:
        raise UsageError(f"cluster.uplink_gpus is {body['uplink_gpus']}", where=where,
                         why="GPUs that share one link to the host: 1 or more")  # fmt: skip
    levels = read_levels(listed, body["domain_size"], count, where) if listed else ()
    if levels:
        body["inter"] = _innermost(levels[0])
    links = [
        Link(**table(body.pop(name), LINK_KEYS, where, f"cluster.{name}."))
        for name in ("intra", "inter")
    ]
    for link in links:
        if link.kind not in ("nvlink", "pcie", "network"):
            raise UsageError(
                f"unknown link kind {link.kind!r} of {link.name!r}",
                where=where,
                why="known: nvlink, pcie, network",
            )
    tiers = tuple(
        read_tier(tier, where, f"cluster.tiers[{i}].")
        for i, tier in enumerate(body.pop("tiers"))
    )
    twice = next((t.name for i, t in enumerate(tiers) if t.name in {u.name for u in tiers[:i]}), "")
    if twice:
        raise UsageError(f"two cluster.tiers are named {twice!r}", where=where,
                         why="a plan names the tier that something lies on")  # fmt: skip
    said = {str(key): str(text) for key, text in top["sources"].items()}
    if levels:
        said.pop("cluster.inter", None)  # of a catalogue device's standard network
        said |= {f"cluster.levels.{level.name}": level.source for level in levels if level.source}
    sources = tuple(sorted(said.items()))
    device = _device(top["name"], top["device"], where, top["constants"])
    return _counted(
        Cluster(
            name=top["name"], device=device, count=count, intra=links[0], inter=links[1],
            tiers=tiers, sources=sources, levels=levels, **body,
        )
    )  # fmt: skip


def _innermost(level: Level) -> dict[str, Any]:
    """The innermost level as `[cluster.inter]` would say it: what a rank's own port reaches."""
    return {
        "name": level.name, "kind": "network", "latency_s": level.latency_s,
        "bytes_per_s": level.bytes_per_s / level.oversubscription, "efficiency": level.efficiency,
    }  # fmt: skip


def _counted(cluster: Cluster) -> Cluster:
    """The cluster, its count being part of one node or whole nodes. Raises UsageError."""
    count, node = cluster.count, cluster.node_size
    if count < 1:
        raise UsageError(f"{cluster.spec} has no device", hints=(f"{cluster.name}x1",))
    if count > node and count % node:
        below, above = count // node * node, -(-count // node) * node
        raise UsageError(
            f"{cluster.spec} fills no whole nodes",
            why=f"{cluster.name} has {node} GPUs a node; more than one node is whole nodes",
            hints=(f"{cluster.name}x{below}", f"{cluster.name}x{above}"),
        )
    return cluster


@functools.cache
def catalogue() -> tuple[str, ...]:
    """Names of the devices that ship with the planner, in order."""
    return tuple(sorted(path.stem for path in _CATALOGUE.glob("*.toml") if path.stem != "aliases"))


@functools.cache
def aliases() -> tuple[tuple[str, str], ...]:
    """Other names of catalogue devices: (alias, name)."""
    return tuple(
        sorted((str(k), str(v)) for k, v in read_toml(_CATALOGUE / "aliases.toml").items())
    )


def canonical(name: str) -> str:
    """The catalogue's name for a device as tables and users write it: H100_SXM is h100.

    Raises UsageError listing the nearest.
    """
    name = re.sub(r"[ _]+", "-", name.strip().lower())
    found = dict(aliases()).get(name, name)
    if found in catalogue():
        return found
    choices = [*catalogue(), *(alias for alias, _ in aliases())]
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.4)
    raise UsageError(
        f"unknown device {name!r}",
        why=f"the catalogue has {', '.join(catalogue())}",
        hints=tuple(f"did you mean {match}?" for match in near)
        + ("a .toml file describes any other hardware: plan hardware show h100x8",),
    )


def recognise(driver_name: str, memory_bytes: int) -> str | None:
    """The catalogue's name for a device as its driver calls it; None where there is none.

    "NVIDIA A100-SXM4-40GB" is a100-40gb: every part of the name is a word of the driver's; of
    several the one with most parts, then the one whose memory is nearest.
    """
    words = set(re.split(r"[^a-z0-9]+", driver_name.lower()))
    names = [(name, name) for name in catalogue()] + list(aliases())
    fits = [(said.split("-"), name) for said, name in names if words.issuperset(said.split("-"))]
    ordered = sorted(
        (-len(parts), abs(_catalogued(name).device.memory_bytes - memory_bytes), name)
        for parts, name in fits
    )
    return ordered[0][2] if ordered else None


def _load_file(path: Path) -> Cluster:
    """A user's file: all keys, or `base` (a catalogue name) and the keys that differ; `count`."""
    raw = read_toml(path)
    if "parts" in raw:
        raise UsageError(f"{path.name} lists parts, and here one kind is meant", where=str(path))
    base, count = raw.pop("base", None), raw.pop("count", None)
    if count is None:
        raise UsageError("missing key count", where=str(path), why="the number of devices",
                         hints=("count = 8, above the first table",))  # fmt: skip
    number = typed(count, int, str(path), "count")
    check_network(raw, str(path))
    if base is not None:
        name = canonical(typed(base, str, str(path), "base"))
        own = raw.get("cluster")
        raw = merged({**read_toml(_CATALOGUE / f"{name}.toml"), "name": path.stem}, raw)
        made = _cluster(raw, number, str(path))
        stated = not isinstance(own, dict) or "host_ram_bytes" in own or "tiers" not in own
        return made if stated else _of_own_host(made)
    return _cluster(raw, number, str(path))


def _of_own_host(cluster: Cluster) -> Cluster:
    """A cluster whose file has tiers of its own and says no more of the host: its memory is what
    they have of it, and not what the base's node has."""
    found = [tier for tier in cluster.tiers if tier.name == "cpu"]
    nodes = [cluster.node_size / (tier.gpus or cluster.node_size) for tier in found]
    size = sum(round(tier.bytes * count) for tier, count in zip(found, nodes))
    return replace(cluster, host_ram_bytes=size) if found else cluster


@functools.cache
def _catalogued(name: str) -> Cluster:
    return _cluster(read_toml(_CATALOGUE / f"{name}.toml"), 1, f"hardware/{name}.toml")


def describe(name: str) -> Cluster:
    """One whole node of a catalogue device, with its sources, for listing."""
    cluster = _catalogued(canonical(name))
    return replace(cluster, count=cluster.node_size)


def summands(spec: str, folder: Path = Path()) -> list[str]:
    """The parts of a sum as they are said; one, where it is none or a file whose path has a +."""
    whole = spec.endswith(".toml") and any(p.exists() for p in (Path(spec), folder / spec))
    return [spec] if whole else [part.strip() for part in spec.split("+")]


def load_hardware(spec: str) -> Cluster:
    """Read `NAMExCOUNT`, or a path that ends in .toml. Raises UsageError, saying what is near.

    Sums and files of parts are `cost_models.fleet`'s.
    """
    parts = summands(spec)
    if spec.endswith(".toml") and len(parts) == 1:
        return _load_file(Path(spec))
    if len(parts) > 1:
        raise UsageError(
            f"{spec} mixes devices, and here one kind is meant",
            hints=tuple(f"each alone: --hardware {part}" for part in parts),
        )
    if spec == "local":
        raise UsageError(
            "this machine is not measured yet",
            hints=("plan calibrate -o host.toml", "then --hardware host.toml"),
        )
    match = _COUNTED.fullmatch(spec.lower())
    if match is None:
        name = canonical(spec.lower())
        size = _catalogued(name).node_size
        raise UsageError(f"{spec} has no count", hints=(f"{name}x{size} is one node of it",))
    if len(match[2]) > MOST_DIGITS:
        raise UsageError(f"{spec[:60]}: there are not so many GPUs",
                         why=f"expected a count of at most {MOST_DIGITS} digits")  # fmt: skip
    return _counted(replace(_catalogued(canonical(match[1])), count=int(match[2])))
