"""The search equals exhaustive enumeration of every decision; its bounds hold; its bytes repeat."""

import functools
import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from enumerated import difference, every_mesh, least_by_mesh, least_score
from random_problems import (
    BIG_MOE,
    INTER,
    LLAMA,
    MOE,
    SMALL,
    WIDE,
    make,
    random_tiny,
    small_cluster,
)
from tiny_models import EXAMPLES

from cost_models.hardware import load_hardware
from cost_models.schedule import SCHEDULES, SPLIT_BACKWARD, schedule_illegal
from cost_models.stage_problem import in_flight
from planner.bound_ranks import flight, kind_of_schedule
from planner.bounds import mesh_bounds_ps
from planner.decisions import Pins, Recompute
from planner.mesh import Mesh, meshes, shard_sizes
from planner.score import score_of

# --- cases -------------------------------------------------------------------------------------

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
    "odd batch": ("llama", {"size": "8b", "n_layers": 3}, WIDE, "small", 20_000,
                  {"global_batch": 3, "seq_len": 4096}),
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
    "parts of a PCIe domain": ("llama", {"size": "8b", "n_layers": 4}, WIDE, "l40sx4", None,
                               {"global_batch": 8, "seq_len": 2048}),
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
    text = SMALL.format(memory=megabytes * MB, inter=INTER)
    if name == "slow":
        text = text.replace("_size = 2", "_size = 1")
    return small_cluster(folder, text, 8 if name.endswith("8") else 4)


def searched(name, folder):
    """A case's problem."""
    example, args, limits, hardware, megabytes, workload = CASES[name]
    problem = make(example, args, limits, cluster_of(hardware, megabytes, folder), **workload)
    return replace(problem, by_layer=megabytes is not None, known=known(name))


@functools.cache
def known(name):
    """What is enumerated once of a case, under whatever pins: a plan's objective has none."""
    return {}


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory):
    """(the problem, every mesh's least objective) of a case."""
    problem = searched(request.param, tmp_path_factory.mktemp("hardware"))
    return problem, least_by_mesh(problem)


def test_meshes_are_every_divisor_combination(case):
    problem, _ = case
    costs = problem.costs
    found = list(meshes(costs.chain, costs.cluster, costs.workload, Pins()))
    assert len(found) == len(set(found))
    assert set(found) == set(every_mesh(problem))


def test_search_equals_enumeration(case):
    problem, least = case
    out = problem.searcher.run()
    assert difference(problem, least, out) == ""
    assert out.best is not None or out.misfit is not None


def test_random_problems_equal_their_enumeration(tmp_path):
    """Every decision on, memory tight and loose: the same feasibility, the same best score."""
    fits = []
    for seed in range(56):
        problem = random_tiny(seed, tmp_path, most_gpus=4, most_layers=3)
        least = least_by_mesh(problem)
        assert difference(problem, least, problem.searcher.run()) == "", seed
        if least:
            fits.append(any(step is not None for step in least.values()))
    assert len(fits) >= 50 and fits.count(False) >= 5, fits


def test_bounds_hold_for_every_mesh(case):
    problem, least = case
    space, searcher = list(least), problem.searcher
    for apart in (False, True):
        bounds = mesh_bounds_ps(
            problem.costs, space, searcher.assign, schedules=searcher.searched_schedules,
            keeps=searcher.keeps, apart=apart,
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
    ("recompute", {"schedule": "gpipe"}),
    *(("eager, slow", {"pp": 2, "schedule": s}) for s in ("zbh1", "zbv", "dualpipev")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "pins"), PINNED)
def test_search_under_pins_equals_enumeration(name, pins, tmp_path):
    problem = searched(name, tmp_path)
    least = least_score(least_by_mesh(problem, **pins))
    out = problem.searcher.under(Pins(**pins)).run()
    if least is None:
        assert out.best is None
        return
    assert out.best.score == least == out.bound
    for key, value in pins.items():
        assert getattr(out.best.decisions, key) == value


def test_what_a_pin_computes_again_is_under_no_split_backward(tmp_path):
    """Free to choose, the search takes the best of the schedules that may be pinned beside it."""
    searcher = searched("eager, slow", tmp_path).searcher
    pins = {"pp": 2, "tp": 1, "cp": 1, "recompute": Recompute(full=(1,), selective=(0,))}
    best = searcher.under(Pins(**pins)).run().best
    each = [
        searcher.under(Pins(schedule=name, **pins)).run().best.score
        for name in ("1f1b", "gpipe", "interleaved")
    ]
    assert best.decisions.schedule not in SPLIT_BACKWARD and best.score == min(each)


def test_a_known_plan_changes_nothing(tmp_path):
    """Starting from any plan of the space ends at the same best, and says how far it is: the
    gap never rises, and is what lies between the best and the bound."""
    lines: list[str] = []
    searcher = searched("tp", tmp_path).searcher
    alone = searcher.run().best
    start = searcher.under(Pins(cp=2)).run().best
    assert start.score > alone.score
    searcher.progress = lines.append
    found = searcher.run(start)
    assert (found.best.decisions, found.proved) == (alone.decisions, True)
    form = r"solving: best ([\d.]+ m?s), bound ([\d.]+ m?s), gap ([\d.]+)%"
    told = [re.fullmatch(form, line).groups() for line in lines]
    gaps = [float(gap) for _, _, gap in told]
    assert gaps and gaps == sorted(gaps, reverse=True)
    for best, bound, gap in told:
        share = seconds(bound) / seconds(best)
        assert float(gap) == pytest.approx(100 * (1 - share), abs=1)  # of three digits


def seconds(text):
    size, unit = text.split()
    return float(size) * {"s": 1, "ms": 1e-3}[unit]


def test_little_effort_says_so(tmp_path):
    """Cut short, the search still has a bound below every plan."""
    searcher = searched("offload", tmp_path).searcher
    whole = searcher.run()
    for effort in (1, 5, 20, 60, 120):
        searcher.effort = effort
        out = searcher.run()
        assert out.bound <= whole.best.score
        if out.best is not None:
            assert out.best.score >= whole.best.score
            assert out.proved == (out.bound == out.best.score)
            assert 0 <= out.gap < 1


def test_patience_is_for_what_is_untried_alone(tmp_path):
    """Beyond its effort it goes on until the least bound untried is within one part in a hundred of
    the best, and no further than so many times its effort."""
    searcher = searched("offload", tmp_path).searcher
    whole, gaps = searcher.run(), []
    for patience in (1, 2, 4, 10**9):
        searcher.effort, searcher.patience = 3, patience
        out = searcher.run()
        assert out.bound <= whole.best.score <= out.best.score
        gaps.append(out.gap)
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0.01 > gaps[-1] > 0


PLAN_BYTES = """
import sys
from pathlib import Path
from planner.options import TraceOptions
from planner.objectives import run
from planner.workload import Asked
for name in ("llama", "moe"):
    options = TraceOptions(
        model=f"{sys.argv[1]}/{name}.py", hardware="h100x4", args=(("size", "tiny"),),
        cache=False, asked=Asked(global_batch=8),
    )
    run(options).plan.save(f"{name}.json")
"""


def test_same_bytes_under_another_hash_seed(tmp_path, monkeypatch):
    """Traced and planned here, where sets iterate in an order of this session's, and in a process
    where they do in another: the graphs' text, which their hashes are of, and the plans."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", str(EXAMPLES)])
    exec(PLAN_BYTES, {})
    here = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    folder = tmp_path / "there"
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-c", PLAN_BYTES, str(EXAMPLES)], cwd=folder, check=True,
        env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(EXAMPLES.parent)},
    )  # fmt: skip
    assert here == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(here) == 4


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


def test_what_an_axis_must_earn(tmp_path):
    """With nothing to earn the quickest plan of all is found; else the least score."""
    problem = searched("tp", tmp_path)
    least = {m: x for m, x in least_by_mesh(problem).items() if x is not None}
    for gain_ppm in (0, 20_000, 500_000):
        problem.searcher.gain_ppm = gain_ppm
        out = problem.searcher.run()
        assert out.proved and out.best.score == min(
            score_of(x, m, gain_ppm) for m, x in least.items()
        )
        if not gain_ppm:
            assert out.best.score == out.best.objective_ps == min(least.values())
    assert score_of(1000, Mesh(2, 2, 1, 1, 1, 1, 1, 1, False, "ring")) == 1040


@pytest.mark.parametrize("hardware, sizes", [("l40sx16", (16, 8, 4, 2)), ("h100x16", (16, 8))])
def test_parts_of_a_domain_share_state_over_pcie_alone(hardware, sizes):
    mesh = Mesh(1, 1, 1, 1, 1, 16, 1, 1, False, "ring")
    assert shard_sizes(mesh, (load_hardware(hardware),), Pins(), 1, 1) == sizes
