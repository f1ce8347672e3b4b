"""The hardware catalogue, and one cluster of it, as text or JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cost_models.collectives import quickest
from cost_models.constants_table import Constant, load_constants
from cost_models.fleet import RULE, Fleet, Hardware
from cost_models.hardware import Cluster, aliases, catalogue, describe
from cost_models.serving_host import host_of
from cost_models.units import (
    format_bytes,
    format_bytes_per_s,
    format_flop_per_s,
    format_seconds,
)

COLUMNS = 80


def catalogue_text() -> str:
    """One line a device: what one is, how it is put together, what its constants rest on."""
    lines = [
        f"{'name':13}{'memory':>9}{'bandwidth':>12}{'bf16':>16}{'node':>6}{'domain':>7}  constants"
    ]
    for name in catalogue():
        c = describe(name)
        peak = format_flop_per_s(c.device.peak("bf16")) if c.device.has("bf16") else "no bf16"
        lines.append(
            f"{name:13}{format_bytes(c.device.memory_bytes):>9}"
            f"{format_bytes_per_s(c.device.memory_bandwidth_bytes_per_s):>12}"
            f"{peak:>16}{c.node_size:6}{c.domain_size:7}  {basis(c)}"
        )
    also = ", ".join(f"{alias} = {name}" for alias, name in aliases())
    words = (
        "constants: kernels measured on it or its chip, whole runs fitted on it, or both; assumed: "
        "transferred by class or from datasheets. plan calibrate measures yours."
    )
    return "\n".join([
        *lines, "", *_wrapped("also: " + also, 6), *_wrapped(words),
        "plan hardware show NAMExCOUNT has the sources",
    ])  # fmt: skip


def basis(c: Cluster) -> str:
    """What the cluster's cost constants rest on, in a word or two."""
    table = load_constants(c.device.constants)
    if not isinstance(c.device.constants, str):
        return "calibrated"
    said = [word for word, is_so in (("kernels", table.measured), ("runs", table.runs)) if is_so]
    return ", ".join(said) or "assumed"


def _wrapped(text: str, indent: int = 0) -> list[str]:
    """Lines of at most 80 columns, all but the first indented."""
    return textwrap.wrap(
        text, COLUMNS, subsequent_indent=" " * indent, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


def hardware_text(hardware: Hardware) -> str:
    """A cluster, or the parts of several kinds and what joins them."""
    if not isinstance(hardware, Fleet):
        return cluster_text(hardware)
    link = hardware.between
    between = RULE if link is None else (
        f"{link.name}, {format_bytes_per_s(link.bytes_per_s)} a GPU and direction,"
        f" {link.efficiency:.0%} of it reached, {format_seconds(link.latency_s)}"
    )  # fmt: skip
    lines = [hardware.spec, *_wrapped(f"  {'between':10}{between}", 12)]
    return "\n".join([*lines, *(f"\n{cluster_text(part)}" for part in hardware.parts)])


def hardware_json(hardware: Hardware) -> dict[str, Any]:
    """The hardware's values, base units, under their names; parts, where there are several."""
    if not isinstance(hardware, Fleet):
        return cluster_json(hardware)
    link = hardware.between
    return {
        "schema": "hardware/1", "spec": hardware.spec, "digest": hardware.digest,
        "name": hardware.name, "parts": [cluster_json(part) for part in hardware.parts],
        "between": None if link is None else asdict(link),
    }  # fmt: skip


def cluster_text(c: Cluster) -> str:
    """One cluster: every number that a cost depends on, and where it is from."""
    d = c.device
    peaks = ", ".join(f"{dtype} {format_flop_per_s(peak)}" for dtype, peak in d.peak_flop_per_s)
    kind = "device" if d.family == "cpu" else "GPU"
    rows = [
        ("device", f"{d.title}, {format_bytes(d.memory_bytes)} at "
         f"{format_bytes_per_s(d.memory_bandwidth_bytes_per_s)}, {d.power_w:.0f} W"),
        ("peak", peaks),
        ("nodes", f"{c.nodes} of {min(c.node_size, c.count)} {kind}s; "
         f"{c.domain_ranks} {kind}s share {c.intra.name}"),
        *((where, f"{link.name}, {format_bytes_per_s(link.bytes_per_s)} a {kind} and direction, "
           f"{link.efficiency:.0%} of it reached, {format_seconds(link.latency_s)}")
          for where, link in (("inside", c.intra), ("between", c.inter))[: 1 if c.levels else 2]),
        *(("between", text) for text in _levels(c)),
        *(("over all", _by_size(c, kind)) for kind in _SHOWN if c.levels),
        ("host", f"{format_bytes(c.host_ram_bytes)} a node, "
         f"{format_bytes_per_s(d.host_link_bytes_per_s)} to each {kind}"
         + (f", {c.uplink_gpus} share one uplink" if c.uplink_gpus > 1 else "")),
        *(("tier", f"{t.name}: {format_bytes(t.bytes)} "
           f"{f'for {t.gpus} GPUs' if t.gpus else 'a node'}, reads "
           f"{format_bytes_per_s(t.read_bytes_per_s)}, writes "
           f"{format_bytes_per_s(t.write_bytes_per_s)}") for t in c.tiers),
        ("constants", _constants_words(c)),
    ]  # fmt: skip
    lines = [c.spec]
    for name, text in rows:
        lines += _wrapped(f"  {name:10}{text}", 12)
    lines += ["", "sources"]
    for key, text in c.sources:
        lines += _wrapped(f"  {key}: {text}", 4)
    if not isinstance(d.constants, str):
        lines += ["", "constants of its own", *_constant_lines(d.constants.items)]
    assumed = host_of(d).assumed
    if assumed:
        lines += ["", "assumed of its host, for serving from below the GPU"]
        lines += _constant_lines(assumed)
    return "\n".join(lines)


def _constant_lines(items: Sequence[Constant]) -> list[str]:
    """Each with its numbers and where they are from."""
    lines = []
    for item in items:
        values = item.value if isinstance(item.value, tuple) else (item.value,)
        numbers = ", ".join(f"{value:.4g}" for value in values)
        lines += _wrapped(f"  {item.name} {numbers}: {item.source}", 4)
    return lines


_SHOWN = ("all_reduce", "all_gather")
_SIZES = tuple(1 << n for n in range(10, 37))  # bytes: 1 KiB to 64 GiB


def _levels(c: Cluster) -> list[str]:
    """The levels of the network, inside out, each with the units it joins."""
    found = []
    for level, below, span in zip(c.levels, c.spans, c.spans[1:]):
        ports = level.oversubscription
        found.append(
            f"{level.name} ({level.kind}): {c.count // span} of {span} GPUs, each joins "
            f"{span // below} units; {format_bytes_per_s(level.bytes_per_s)} a GPU and direction, "
            + (f"{ports:g}:1 oversubscribed, " if ports > 1 else "")
            + f"{level.efficiency:.0%} of it reached, {format_seconds(level.latency_s)}"
        )
    return found


def _by_size(c: Cluster, kind: str) -> str:
    """The algorithm that is quickest over all GPUs, by size."""
    names = [quickest(c, kind, float(size), c.count) for size in _SIZES]
    runs = [
        (name, _SIZES[at]) for at, name in enumerate(names) if at == 0 or name != names[at - 1]
    ]
    return f"{kind.replace('_', '-')}: " + ", ".join(
        name if at == 0 else f"{name} from {format_bytes(size)}"
        for at, (name, size) in enumerate(runs)
    )


def _constants_words(c: Cluster) -> str:
    own = c.device.constants
    if not isinstance(own, str):
        return f"measured on a machine, {len(own.items)} numbers over those of {own.base}"
    found = basis(c)
    if found == "assumed":
        return "not measured: transferred by class or assumed; plan calibrate measures them"
    return {"kernels": "kernels measured", "runs": "fitted on published runs"}.get(
        found, "kernels measured, fitted on published runs"
    )


def cluster_json(c: Cluster) -> dict[str, Any]:
    """The cluster's values, base units, under their names."""
    raw = asdict(c)
    raw["device"]["peak_flop_per_s"] = dict(c.device.peak_flop_per_s)
    return {"schema": "hardware/1", "spec": c.spec, "digest": c.digest, **raw,
            "sources": dict(c.sources),
            "assumed_of_host": {item.name: item.value for item in host_of(c.device).assumed},
            }  # fmt: skip
