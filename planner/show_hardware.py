"""The hardware catalogue, and one cluster of it, as text or JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cost_models.hardware import Cluster, aliases, catalogue, describe
from cost_models.units import (
    format_bytes,
    format_bytes_per_s,
    format_flop_per_s,
    format_seconds,
)


def catalogue_text() -> str:
    """One line a device: what one is, and how it is put together."""
    lines = [f"{'name':12}{'memory':>10}{'bandwidth':>13}{'bf16':>16}{'a node':>8}{'domain':>8}"]
    for name in catalogue():
        c = describe(name)
        peak = format_flop_per_s(c.device.peak("bf16")) if c.device.has("bf16") else "no bf16"
        lines.append(
            f"{name:12}{format_bytes(c.device.memory_bytes):>10}"
            f"{format_bytes_per_s(c.device.memory_bandwidth_bytes_per_s):>13}"
            f"{peak:>16}{c.node_size:8}{c.domain_size:8}"
        )
    also = ", ".join(f"{alias} = {name}" for alias, name in aliases())
    return "\n".join([*lines, "", f"also: {also}", "plan hardware show NAMExCOUNT has the sources"])


def cluster_text(c: Cluster) -> str:
    """One cluster: every number that a cost depends on, and where it is from."""
    d = c.device
    peaks = ", ".join(f"{dtype} {format_flop_per_s(peak)}" for dtype, peak in d.peak_flop_per_s)
    rows = [
        ("device", f"{d.title}, {format_bytes(d.memory_bytes)} at "
         f"{format_bytes_per_s(d.memory_bandwidth_bytes_per_s)}, {d.power_w:.0f} W"),
        ("peak", peaks),
        ("nodes", f"{c.nodes} of {min(c.node_size, c.count)} GPUs; "
         f"{c.domain_ranks} GPUs share {c.intra.name}"),
        *((where, f"{link.name}, {format_bytes_per_s(link.bytes_per_s)} a GPU and direction, "
           f"{link.efficiency:.0%} of it reached, {format_seconds(link.latency_s)}")
          for where, link in (("inside", c.intra), ("between", c.inter))),
        ("host", f"{format_bytes(c.host_ram_bytes)} a node, "
         f"{format_bytes_per_s(d.host_link_bytes_per_s)} to each GPU"),
        *(("tier", f"{t.name}: {format_bytes(t.bytes)} a node, reads "
           f"{format_bytes_per_s(t.read_bytes_per_s)}, writes "
           f"{format_bytes_per_s(t.write_bytes_per_s)}") for t in c.tiers),
    ]  # fmt: skip
    lines = [c.spec, *(f"  {name:9}{text}" for name, text in rows), "", "sources"]
    return "\n".join([*lines, *(f"  {key}: {text}" for key, text in c.sources)])


def cluster_json(c: Cluster) -> dict[str, Any]:
    """The cluster's values, base units, under their names."""
    raw = asdict(c)
    raw["device"]["peak_flop_per_s"] = dict(c.device.peak_flop_per_s)
    return {"schema": "hardware/1", "spec": c.spec, "digest": c.digest, **raw,
            "sources": dict(c.sources)}  # fmt: skip
