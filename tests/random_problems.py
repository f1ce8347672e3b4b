"""Random tiny problems, small enough that every plan of them is simulated (`enumerated`)."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from enumerated import Tiny, divisors, every_mesh
from tiny_models import costs_of, graph_of, with_memory

from cost_models.decisions import Decisions
from cost_models.estimate import stage_problem
from cost_models.hardware import Cluster, load_hardware
from cost_models.stage_problem import evaluate
from planner.decisions import Pins
from planner.mesh import meshes
from planner.search import Searcher

INTER = """
[cluster.inter]
name = "Ethernet"
kind = "network"
bytes_per_s = 3e9
latency_s = 5e-6
efficiency = 0.8
"""
SMALL = """
name = "small"
[device]
title = "a small device"
family = "ampere"
constants = "a100"
memory_bytes = {memory}
memory_bandwidth_bytes_per_s = 2.0e11
power_w = 100
sm_count = 40
host_link_bytes_per_s = 1.2e10
[device.peak_flop_per_s]
fp32 = 1e13
bf16 = 4e13
fp16 = 4e13
fp8 = 8e13
[cluster]
node_size = 2
domain_size = 2
host_ram_bytes = "64GiB"
[cluster.intra]
name = "PCIe"
kind = "pcie"
bytes_per_s = 1.6e10
latency_s = 1e-6
efficiency = 0.6
{inter}[[cluster.tiers]]
name = "cpu"
bytes = "64GiB"
read_bytes_per_s = 1e11
write_bytes_per_s = 1e11
[sources]
"device" = "made up"
"cluster" = "made up"
"""
LEVEL = """
[[cluster.levels]]
name = "{name}"
kind = "tree"
{ranks}
efficiency = 0.9
bytes_per_s = {rate}
latency_s = 5e-6
source = "made up"
"""

LLAMA = {"heads": (4, 2)}
WIDE = {"heads": (32, 8)}
MOE = {"heads": (4, 2), "experts": 8, "features": (64, 128)}
BIG_MOE = {"heads": (16, 4), "experts": 8, "features": (2048, 6400)}
# of so many problems, example, its arguments, the layers it may have, what limits its axes
MODELS = (
    (3, "llama", {}, (2, 3, 4, 5, 6), LLAMA),
    (3, "llama", {"size": "8b"}, (2, 3, 4, 5, 6), WIDE),
    (1, "moe", {}, (2, 3, 4), MOE),
    (1, "moe", {"size": "8b-a1b"}, (2, 3), BIG_MOE),
)
ENGINES = ("native-compiled", "native", "torchtitan", "megatron", "deepspeed")


def make(example, args, limits, cluster: Cluster, units=(), **workload) -> Tiny:
    """A problem with costs at every work point of its space."""
    graph = graph_of(example, workload.get("precision", "bf16"), **args)
    costs = costs_of(graph, cluster, **{"seq_len": 8192, **workload})
    searcher = Searcher(costs=costs, effort=10**9)
    tiny = Tiny(costs=costs, searcher=searcher, units=units, **limits)
    found = meshes(costs.chain, cluster, costs.workload, Pins())
    points = ((1, 1), *((m.micro_batch, m.cp) for m in (*found, *every_mesh(tiny))))
    costs.points = tuple(dict.fromkeys(points))
    return tiny


def small_cluster(folder: Path, text: str, count: int) -> Cluster:
    path = folder / "small.toml"
    path.write_text(f"count = {count}\n" + text)
    return load_hardware(str(path))


def random_tiny(seed: int, folder: Path, *, most_gpus: int = 8, most_layers: int = 6) -> Tiny:
    """A random model, cluster, engine, batch and memory; half of them short of memory."""
    rng = random.Random(seed)
    _, example, args, layers, limits = rng.choices(MODELS, [row[0] for row in MODELS])[0]
    args = {**args, "n_layers": rng.choice([n for n in layers if n <= most_layers])}
    gpus = rng.choice([n for n in (2, 4, 4, 6, 8) if n <= most_gpus])
    domain = rng.choice([n for n in (1, 2, 4) if gpus % n == 0])
    spans = [n for n in divisors(gpus) if n % domain == 0 and domain < n < gpus]
    units = (rng.choice(spans),) if spans and rng.random() < 0.4 else ()
    inter = INTER.replace("3e9", _rate(rng, 8.5, 10.7))
    if units:
        names = (("leaf", f"ranks = {units[0]}"), ("spine", ""))
        inter = "".join(LEVEL.format(name=name, ranks=ranks, rate=_rate(rng, 8.5, 10))
                        for name, ranks in names)  # fmt: skip
    text = SMALL.format(memory=10**12, inter=inter).replace("_size = 2", f"_size = {domain}")
    text = text.replace("1.6e10", _rate(rng, 9.5, 11.5))
    cluster = small_cluster(folder, text, gpus)
    if rng.random() < 0.2:
        cluster = replace(cluster, tiers=())
    engine = rng.choice(ENGINES)
    workload = {
        "engine": engine, "seq_len": rng.choice((512, 2048, 8192)),
        "global_batch": rng.choice((1, 2, 4, 4, 6, 8)),
        "optimizer": rng.choice(("adamw", "adamw", "sgd")),
    }  # fmt: skip
    narrow = random.Random(f"formats {seed}").random() < 0.2  # apart: other problems stay
    if narrow and engine not in ("native", "native-compiled"):
        workload["allowed_formats"] = ("fp8",)
    tiny = make(example, args, limits, cluster, units, **workload)
    loose = rng.random() < 0.5
    return tiny if loose else _tightened(tiny, rng)


def _rate(rng: random.Random, low: float, high: float) -> str:
    """Bytes a second between two powers of ten."""
    return f"{10 ** rng.uniform(low, high):.3g}"


def _tightened(tiny: Tiny, rng: random.Random) -> Tiny:
    """Memory between a part of what the whole model takes on one GPU, and a little more."""
    laid = tiny.searcher.assign(1, False)
    step = tiny.costs.step(Decisions(compile=tiny.costs.engine.fused), laid)
    problem = stage_problem(tiny.costs, step)
    (peak,) = evaluate(problem, (tiny.layers,), ((0, 0),))[1]
    share = 2 ** rng.uniform(-2.5, 0.2)
    memory = problem.constant_bytes + round(share * (peak - problem.constant_bytes))
    costs = replace(tiny.costs, cluster=with_memory(tiny.costs.cluster, memory))
    return replace(tiny, costs=costs, searcher=Searcher(costs=costs, effort=10**9))
