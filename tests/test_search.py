"""The search equals exhaustive enumeration of every decision; its bounds hold; its bytes repeat."""

import functools
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import EXAMPLES, costs_of, graph_of

from cost_models.decisions import Decisions
from cost_models.estimate import stage_problem
from cost_models.hardware import load_hardware
from cost_models.schedule import SCHEDULES, schedule_illegal
from cost_models.stage_problem import LEVELS, evaluate, in_flight
from planner.bound_ranks import flight
from planner.bounds import kind_of_schedule, mesh_bounds_ps
from planner.decisions import Pins
from planner.mesh import Mesh, meshes
from planner.score import score_of
from planner.search import Searcher

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
[cluster.inter]
name = "Ethernet"
kind = "network"
bytes_per_s = 3e9
latency_s = 5e-6
efficiency = 0.8
[[cluster.tiers]]
name = "cpu"
bytes = "64GiB"
read_bytes_per_s = 1e11
write_bytes_per_s = 1e11
[sources]
"device" = "made up"
"cluster" = "made up"
"""


# --- the space, enumerated from its definition -------------------------------------------------


def divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


def all_meshes(costs, layers, heads, experts=0, features=()):
    """Every (pp, tp, cp, ep, etp, dp, micro-batch, sequence parallel, cp kind) that is legal."""
    w, cluster = costs.workload, costs.cluster
    gpus, domain = cluster.count, min(cluster.domain_size, cluster.count)
    degrees = itertools.product(divisors(gpus), repeat=4)
    for pp, tp, c, dp in degrees:
        if pp * tp * c * dp != gpus or pp > layers or tp > domain or w.global_batch % dp:
            continue
        if w.seq_len % c or (c > 1 and w.seq_len // c < 4096):
            continue
        ranks = dp * c * tp
        layouts = [
            (ep, etp) for ep in divisors(ranks) for etp in divisors(ranks)
            if (experts % ep == 0 and etp <= 8 and all(f % etp == 0 for f in features)
                and ranks % (ep * etp) == 0 if experts else ep == etp == 1)
        ]  # fmt: skip
        kinds = ["ring"]
        if c > 1 and w.engine == "deepspeed":
            kinds = ["ulysses"] * all(h % (tp * c) == 0 for h in heads)
        elif c > 1:
            kinds = ["ring"] * (w.seq_len % (2 * c) == 0) + ["allgather"]
            kinds += ["ulysses"] * all(h % (tp * c) == 0 for h in heads)
        splits_sequence = [False] + [True] * (tp > 1 and w.seq_len // c % tp == 0)
        samples = w.global_batch // dp
        for (ep, etp), kind, sp, b in itertools.product(
            layouts, kinds, splits_sequence, divisors(samples)
        ):
            if b <= 64:
                yield Mesh(pp, tp, c, ep, etp, dp, b, samples // b, sp, kind)


def held_ways(mesh, cluster):
    """ZeRO stage, shard group, gathering again, optimizer offload."""
    ranks, domain = mesh.dp * mesh.cp, min(cluster.domain_size, cluster.count)
    spreads = [max(1, domain // mesh.tp) * k for k in (1, 2, 4, 8)]
    groups = [s for s in divisors(ranks) if s == ranks or s in spreads]
    for zero in (0, 1, 2, 3):
        for shard in groups if zero else [1]:
            if zero and shard == 1 < ranks:
                continue  # shards nothing: it is zero 0
            for reshard in (False, True) if zero == 3 and mesh.pp == 1 else (False,):
                for offload in ((), (("optimizer", "cpu"),)):
                    if offload and zero >= 2 and mesh.pp == 1:
                        continue  # FSDP2's CPU policy moves parameters with the optimizer
                    yield zero, shard, reshard, offload


def schedules(mesh, layers):
    yield "1f1b", 1
    if mesh.pp > 1:
        yield from (("gpipe", 1), ("zbh1", 1), ("zbv", 2), ("dualpipev", 2))
        for v in range(2, 9):
            yield "interleaved", v


def cuts(layers, stages):
    for places in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *places, layers)))


def pairs(n):
    return [(full, some) for full in range(n + 1) for some in range(n + 1 - full)]


@functools.cache
def best_of_problem(problem):
    """The least step of every partition and recomputation that fits, by trying them all."""
    found = []
    for stages in cuts(problem.layers, problem.count):
        for recompute in itertools.product(*map(pairs, stages)):
            if problem.levels == ("none",) and any(map(any, recompute)):
                continue
            step, _, fits = evaluate(problem, stages, recompute)
            if fits:
                found.append(step)
    return min(found, default=None)


def every_mesh(costs, searcher, space, layers, **pins):
    """The least objective of every mesh among what has the pinned values; None: nothing fits."""
    found = {}
    for mesh in space:
        if any(getattr(mesh, key, value) != value for key, value in pins.items()):
            continue
        laid = searcher.assign(mesh.tp, mesh.sequence_parallel)
        objectives = []
        for zero, shard, reshard, offload in held_ways(mesh, costs.cluster):
            if mesh.pp > 1 and zero not in costs.engine.pp_zero:
                continue
            d = Decisions(
                pp=mesh.pp, dp=mesh.dp, cp=mesh.cp, tp=mesh.tp, ep=mesh.ep, etp=mesh.etp,
                zero=zero, shard=shard, reshard=reshard, micro_batch=mesh.micro_batch,
                microbatches=mesh.microbatches, sequence_parallel=mesh.sequence_parallel,
                cp_kind=mesh.cp_kind, offload=offload, compile=costs.engine.fused,
            )  # fmt: skip
            mine = ("zero", "shard", "reshard", "offload")
            if any(getattr(d, key) != pins.get(key, getattr(d, key)) for key in mine):
                continue
            for name, v in schedules(mesh, layers):
                if name != pins.get("schedule", name) or v != pins.get("virtual_stages", v):
                    continue
                if mesh.pp * v > layers:
                    continue
                compiled = costs.engine.fused
                runs = costs.engine.compiled_schedules if compiled else costs.engine.schedules
                if name not in runs:
                    continue
                if schedule_illegal(name, mesh.pp, mesh.microbatches, v) is not None:
                    continue
                made = costs.step(replace(d, schedule=name, virtual_stages=v), laid)
                levels = ("none",) if name in ("zbh1", "zbv", "dualpipev") else LEVELS
                objectives.append(best_of_problem(stage_problem(costs, made, levels=levels)))
        found[mesh] = min((x for x in objectives if x is not None), default=None)
    return found


# --- cases -------------------------------------------------------------------------------------

LLAMA = {"heads": (4, 2)}
WIDE = {"heads": (32, 8)}
MOE = {"heads": (4, 2), "experts": 8, "features": (64, 128)}
BIG_MOE = {"heads": (16, 4), "experts": 8, "features": (2048, 6400)}
MB = 1_000_000
# name: (example, its arguments, what limits its axes, hardware, megabytes of a device, workload)
CASES = {
    "two": ("llama", {"n_layers": 4}, LLAMA, "h100x2", None, {"global_batch": 4}),
    "four": ("llama", {"n_layers": 3}, LLAMA, "h100x4", None, {"global_batch": 8}),
    "fp16": ("llama", {"n_layers": 4}, LLAMA, "t4x4", None,
             {"global_batch": 4, "precision": "fp16"}),
    "sgd": ("llama", {"n_layers": 3}, LLAMA, "t4x2", None,
            {"global_batch": 4, "precision": "fp32", "optimizer": "sgd"}),
    "megatron": ("llama", {"size": "8b", "n_layers": 4}, WIDE, "h100x4", None,
                 {"global_batch": 4, "engine": "megatron"}),
    "one sample": ("llama", {"n_layers": 4}, LLAMA, "h100x4", None, {"global_batch": 1}),
    "recompute": ("llama", {"n_layers": 4}, LLAMA, "small", 1050, {"global_batch": 4}),
    "nothing fits": ("llama", {"n_layers": 3}, LLAMA, "small", 900, {"global_batch": 4}),
    "offload": ("llama", {"size": "8b", "n_layers": 3}, WIDE, "small", 12_000,
                {"global_batch": 4}),
    "tp": ("llama", {"size": "8b", "n_layers": 3}, WIDE, "small", 20_000, {"global_batch": 4}),
    "both": ("llama", {"size": "8b", "n_layers": 3}, WIDE, "small", 16_000, {"global_batch": 1}),
    "slow": ("llama", {"size": "8b", "n_layers": 4}, WIDE, "slow", 30_000,
             {"global_batch": 4, "seq_len": 4096}),
    "slow, tight": ("llama", {"size": "8b", "n_layers": 4}, WIDE, "slow", 14_000,
                    {"global_batch": 8, "seq_len": 2048}),
    "groups": ("llama", {"size": "8b", "n_layers": 2}, WIDE, "small8", 14_000,
               {"global_batch": 8, "seq_len": 2048}),
    "eager": ("llama", {"n_layers": 4}, LLAMA, "h100x4", None,
              {"global_batch": 8, "engine": "native"}),
    "eager, slow": ("llama", {"size": "8b", "n_layers": 4}, WIDE, "slow", 30_000,
                    {"global_batch": 8, "seq_len": 4096, "engine": "native"}),
    "eager, tight": ("llama", {"size": "8b", "n_layers": 4}, WIDE, "slow", 18_000,
                     {"global_batch": 8, "seq_len": 2048, "engine": "native"}),
    "moe, two": ("moe", {}, MOE, "h100x2", None, {"global_batch": 4}),
    "moe, four": ("moe", {}, MOE, "h100x4", None, {"global_batch": 4}),
    "moe, tight": ("moe", {"size": "8b-a1b", "n_layers": 2}, BIG_MOE, "small", 6000,
                   {"global_batch": 2}),
    "moe, least": ("moe", {"size": "8b-a1b", "n_layers": 2}, BIG_MOE, "small", 4000,
                   {"global_batch": 1}),
}  # fmt: skip


def cluster_of(name, megabytes, folder):
    """A catalogue device; or "small" (nodes of two on Ethernet), "slow" (nodes of one)."""
    if not name.startswith(("small", "slow")):
        return load_hardware(name)
    text = SMALL.format(memory=megabytes * MB)
    if name == "slow":
        text = text.replace("_size = 2", "_size = 1")
    path = folder / f"{name}.toml"
    path.write_text(f"count = {8 if name.endswith('8') else 4}\n" + text)
    return load_hardware(str(path))


def searched(name, folder):
    """(costs, searcher, the space) of a case."""
    example, args, limits, hardware, megabytes, workload = CASES[name]
    graph = graph_of(example, workload.get("precision", "bf16"), **args)
    cluster = cluster_of(hardware, megabytes, folder)
    costs = costs_of(graph, cluster, **{"seq_len": 8192, **workload})
    space = list(all_meshes(costs, len(costs.chain.layers), **limits))
    costs.points = tuple(dict.fromkeys((m.micro_batch, m.cp) for m in space))
    return costs, Searcher(costs=costs, effort=10**9), space


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory):
    """(costs, searcher, the space, every mesh's least objective) of a case."""
    costs, searcher, space = searched(request.param, tmp_path_factory.mktemp("hardware"))
    layers = len(costs.chain.layers)
    return costs, searcher, space, every_mesh(costs, searcher, space, layers)


def test_meshes_are_every_divisor_combination(case):
    costs, _, space, _ = case
    found = list(meshes(costs.chain, costs.cluster, costs.workload, Pins()))
    assert len(found) == len(set(found))
    assert set(found) == set(space)


def test_search_equals_enumeration(case):
    costs, searcher, _, least = case
    out = searcher.run()
    scores = [score_of(x, mesh) for mesh, x in least.items() if x is not None]
    if not scores:
        assert out.best is None and out.misfit is not None
        return
    assert out.best.score == min(scores)
    d, laid = out.best.decisions, out.best.assignments
    problem = stage_problem(costs, costs.step(d, laid))
    assert evaluate(problem, d.stages, d.recompute)[::2] == (out.best.objective_ps, True)
    assert out.bound <= out.best.score
    assert out.proved and out.gap == 0


def test_bounds_hold_for_every_mesh(case):
    costs, searcher, space, least = case
    bounds = mesh_bounds_ps(
        costs, space, searcher.assign, schedules=searcher.searched_schedules
    ).lower_ps
    broken = [
        (mesh, int(low), least[mesh]) for mesh, low in zip(space, bounds)
        if least[mesh] is not None and low > least[mesh]
    ]  # fmt: skip
    assert not broken


PINNED = [
    ("four", {"pp": 2}), ("four", {"pp": 3}), ("four", {"tp": 4}), ("four", {"cp": 2}),
    ("four", {"cp": 2, "cp_kind": "ulysses"}), ("four", {"dp": 1}), ("four", {"zero": 1}),
    ("four", {"zero": 3, "reshard": True}), ("four", {"micro_batch": 1}),
    ("two", {"pp": 2, "schedule": "gpipe"}), ("two", {"pp": 2, "schedule": "interleaved"}),
    ("two", {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}), ("two", {"zero": 0}),
    ("two", {"tp": 2, "sequence_parallel": False}), ("two", {"offload": (("optimizer", "cpu"),)}),
    ("offload", {"pp": 2}), ("offload", {"zero": 0}), ("both", {"cp": 1}), ("tp", {"tp": 1}),
    ("groups", {"shard": 2}), ("groups", {"pp": 2, "dp": 4}), ("moe, four", {"ep": 4}),
    ("moe, four", {"ep": 2, "etp": 2}), ("moe, four", {"pp": 2, "ep": 2}),
    ("moe, tight", {"ep": 1}), ("moe, least", {"cp": 1}),
    *(("eager, slow", {"pp": 2, "schedule": s}) for s in ("zbh1", "zbv", "dualpipev")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "pins"), PINNED)
def test_search_under_pins_equals_enumeration(name, pins, tmp_path):
    costs, searcher, space = searched(name, tmp_path)
    layers = len(costs.chain.layers)
    least = every_mesh(costs, searcher, space, layers, **pins)
    scores = [score_of(x, mesh) for mesh, x in least.items() if x is not None]
    out = searcher.under(Pins(**pins)).run()
    if not scores:
        assert out.best is None
        return
    assert out.best.score == min(scores) == out.bound
    for key, value in pins.items():
        assert getattr(out.best.decisions, key) == value


def test_a_known_plan_changes_nothing(tmp_path):
    """Starting from any plan of the space ends at the same best."""
    _, searcher, _ = searched("tp", tmp_path)
    alone = searcher.run().best
    start = searcher.under(Pins(cp=2)).run().best
    assert start.score > alone.score
    found = searcher.run(start)
    assert (found.best.decisions, found.proved) == (alone.decisions, True)


def test_little_effort_says_so(tmp_path):
    """Cut short, the search still has a bound below every plan."""
    _, searcher, _ = searched("offload", tmp_path)
    whole = searcher.run()
    for effort in (1, 5, 20, 60, 120):
        searcher.effort = effort
        out = searcher.run()
        assert out.bound <= whole.best.score
        if out.best is not None:
            assert out.best.score >= whole.best.score
            assert out.proved == (out.bound == out.best.score)
            assert 0 <= out.gap < 1


PLAN_BYTES = """
import sys
from pathlib import Path
from planner.options import TraceOptions
from planner.tracing import run
from planner.workload import Asked
for name in ("llama", "moe"):
    options = TraceOptions(
        model=f"{sys.argv[1]}/{name}.py", hardware="h100x16", args=(("size", "tiny"),),
        cache=False, asked=Asked(global_batch=16),
    )
    run(options).plan.save(f"{name}.json")
"""


def test_same_bytes_under_another_hash_seed(tmp_path):
    """Traced and planned twice, in processes whose sets iterate in other orders."""
    found = []
    for seed in ("1", "77"):
        folder = tmp_path / seed
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", PLAN_BYTES, str(EXAMPLES)], cwd=folder, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(EXAMPLES.parent)},
        )  # fmt: skip
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1]
    assert len(found[0]) == 4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_the_memory_bound_rests_on(schedule):
    """At one moment a rank holds so many micro-batches of every chunk; one chunk is its peak."""
    for pp, m, v in itertools.product(range(1, 7), range(1, 17), (1, 2, 3, 4)):
        legal = schedule_illegal(schedule, pp, m, v) is None
        if not legal or (v > 1) != (schedule in ("interleaved", "zbv", "dualpipev")):
            continue
        least = flight(pp, np.array([m]), kind_of_schedule(schedule))[0]
        for rank in range(pp):
            moments = in_flight(schedule, pp, m, v, rank)
            assert any(min(counts) >= least[rank] for counts in moments), (pp, m, v, rank)
