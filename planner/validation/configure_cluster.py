"""Where it ran: a run's GPUs and the network that was printed for them."""

from __future__ import annotations

import re
from dataclasses import replace

from cost_models.hardware import Cluster, load_hardware
from planner.validation.rows import Run


def cluster_of(run: Run, defaults: list[str]) -> Cluster:
    """The run's GPUs; what is assumed of them is added to `defaults`."""
    hw = run.hardware
    count, per_node = int(hw["num_gpus"]), int(hw.get("gpus_per_node") or 8)
    if not hw.get("gpus_per_node"):
        defaults.append("gpus_per_node = 8")
    name = hw["gpu"]
    cluster = load_hardware(f"{name}x{count}")
    if cluster.domain_size <= 8:
        size = min(per_node, count)
        while count % size:
            size -= 1
        if size < min(per_node, count):
            defaults.append(f"gpus_per_node = {size}, as {per_node} does not divide {count} GPUs")
        cluster = replace(cluster, node_size=size, domain_size=size)
    rate = _network(str(hw.get("interconnect") or ""), per_node)
    if rate:
        staged = "omni-path" in str(hw).lower()  # no GPUDirect: copies through the host's memory
        share = cluster.inter.efficiency * (0.5 if staged else 1)
        if staged:
            defaults.append("Omni-Path without GPUDirect: half of what the network reaches")
        cluster = replace(cluster, inter=replace(cluster.inter, bytes_per_s=rate, efficiency=share))
    elif cluster.nodes > 1:
        defaults.append("network: the device's standard node")
    return cluster


def _network(text: str, per_node: int) -> float | None:
    """Bytes/s a GPU that a printed network comes to; None where it prints none."""
    times = re.search(r"(\d+)x(\d+) ?Gb?", text) or re.search(r"(\d+)x HDR (\d+)", text)
    if times:
        return int(times[1]) * int(times[2]) * 1e9 / 8 / per_node
    rate = re.search(r"(\d+) ?Gb(?:ps|/s)(.*)", text)
    if not rate:
        return None
    each = 1 if "per gpu" in rate[2].lower() or int(rate[1]) <= 400 else per_node
    return int(rate[1]) * 1e9 / 8 / each
