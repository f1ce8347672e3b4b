"""Objectives and limits of `plan trace`: what a plan is chosen for, and what it may not exceed."""

import itertools
import json

import pytest
from tiny_models import EXAMPLES, graph_of

from cost_models.hardware import load_hardware
from ir.errors import InfeasibleError, UsageError
from planner.limits import Limits, capped, parse_share, parse_sizes, uncapped
from planner.objectives import RESOLVED, plan_for, plan_within
from planner.options import TraceOptions
from planner.tracing import Clock, attempt, plan_graph
from planner.workload import Asked

LLAMA = str(EXAMPLES / "llama.py")
GRAPH = {"size": "small", "n_layers": 8}


def options(**more):
    asked = Asked(global_batch=32, seq_len=1024)
    return TraceOptions(**{"model": LLAMA, "hardware": "h100x8", "asked": asked, **more})


def traced(given, cluster=None):
    cluster = cluster or load_hardware(given.hardware)
    return plan_for(graph_of("llama", **GRAPH), given, cluster, Clock())


def test_a_limit_of_memory_holds_and_the_capacity_stays_the_gpus():
    cluster = load_hardware("h100x8")
    free = traced(options())
    limit = free.estimate.peak_memory_bytes - 1
    bound = traced(options(limits=Limits(memory_bytes=limit)))
    assert bound.estimate.peak_memory_bytes <= limit
    assert bound.estimate.capacity_bytes == cluster.device.memory_bytes
    assert bound.plan.hardware_hash == free.plan.hardware_hash == cluster.digest
    assert bound.estimate.step_time_ps >= free.estimate.step_time_ps
    loose = traced(options(limits=Limits(memory_bytes=1 << 50)))
    assert loose.estimate == free.estimate
    assert capped(cluster, None) is cluster
    assert uncapped(free.estimate, cluster) == free.estimate
    with pytest.raises(InfeasibleError, match=r"0\.1 GB a GPU"):
        traced(options(limits=Limits(memory_bytes=100_000_000)))


@pytest.mark.parametrize("slack", [0.0, 0.3])
def test_the_least_memory_within_the_slack(slack):
    """No limit that is finely lower has a plan that is fast enough."""
    cluster, graph = load_hardware("h100x8"), graph_of("llama", **GRAPH)
    fastest = traced(options())
    found = traced(options(objective="memory", slack=slack))
    longest = fastest.estimate.step_time_ps * (1 + slack)
    assert found.estimate.step_time_ps <= longest
    assert found.estimate.peak_memory_bytes <= fastest.estimate.peak_memory_bytes
    assert any("--objective memory" in line for line in found.echo)
    lower = found.estimate.peak_memory_bytes - cluster.device.memory_bytes // RESOLVED - 1
    less, _, _ = attempt(graph, options(limits=Limits(memory_bytes=lower)), cluster, Clock())
    assert less is None or less.estimate.step_time_ps > longest


def test_the_fewest_gpus_that_hold_it():
    """Of the counts that are tried none smaller has a plan; the batch is that of all GPUs."""
    graph = graph_of("llama", size="8b")
    limits = Limits(memory_bytes=24_000_000_000)
    given = options(hardware="h100x16", objective="gpus", limits=limits)
    found = plan_for(graph, given, load_hardware("h100x16"), Clock())
    gpus = found.plan.decisions.gpus
    assert 1 < gpus < 16
    assert found.plan.hardware == f"h100x{gpus}"
    assert found.plan.workload.global_batch == 32
    assert found.estimate.peak_memory_bytes <= limits.memory_bytes
    fewer = options(hardware=f"h100x{gpus // 2}", limits=limits)
    assert attempt(graph, fewer, load_hardware(fewer.hardware), Clock())[0] is None


def test_what_never_fits_is_said_of_the_whole_cluster():
    graph = graph_of("llama", **GRAPH)
    given = options(hardware="h100x2", objective="gpus", limits=Limits(memory_bytes=100_000_000))
    with pytest.raises(InfeasibleError, match="h100x2"):
        plan_for(graph, given, load_hardware("h100x2"), Clock())


@pytest.mark.parametrize("objective", ["cost", "energy"])
def test_at_one_count_the_fastest_plan_costs_and_takes_least(objective):
    graph, cluster = graph_of("llama", **GRAPH), load_hardware("h100x8")
    found = traced(options(objective=objective))
    assert found.plan == plan_graph(graph, options(), cluster, Clock()).plan
    assert any(f"--objective {objective}" in line for line in found.echo)


def test_shares_are_per_cent():
    assert parse_share("5%", "--slack") == 0.05
    for bad in ("5", "-1%", "x%", "%", ""):
        with pytest.raises(UsageError):
            parse_share(bad, "--slack")


def test_the_command_takes_objective_and_limits(plan):
    tiny = ("--arg", "size=tiny", "--global-batch", "32", "--hardware", "h100x4")
    code, out, err = plan("trace", LLAMA, *tiny, "--max-memory", "3GB", "--json")
    assert code == 0, err
    estimate = json.loads(out)["estimate"]
    assert estimate["peak_memory_bytes"] <= 3e9 < estimate["capacity_bytes"]
    code, out, err = plan("trace", LLAMA, *tiny, "--objective", "gpus")
    assert code == 0, err
    assert "--objective gpus: 1 of 4 GPUs" in out and "h100x1" in out
    code, out, err = plan("trace", LLAMA, *tiny, "--objective", "love")
    assert code == 64 and "known: time, cost" in err
    code, out, err = plan("trace", LLAMA, *tiny, "--slack", "much", "--objective", "memory")
    assert code == 64 and "--slack much" in err
    (fault := plan("trace", LLAMA, "--hardware", "h100x4", "--max-memory", "lots"))
    assert fault[0] == 64 and "'lots'" in fault[2]


# --- ranges --------------------------------------------------------------------------------------


def test_a_range_is_its_ends_and_doublings_between():
    assert parse_sizes(None, "--seq-len") == ()
    assert parse_sizes("512", "--seq-len") == (512,)
    assert parse_sizes("100..450", "--seq-len") == (100, 200, 400, 450)
    assert parse_sizes("7..7", "--seq-len") == (7,)
    for bad in ("", "0", "x", "2..1", "1..", "..4", "1...4", "-3", "1.5"):
        with pytest.raises(UsageError):
            parse_sizes(bad, "--seq-len")


def test_of_a_range_the_plan_of_most_tokens_a_second_is_taken():
    graph, cluster = graph_of("llama", **GRAPH), load_hardware("h100x8")
    found = plan_within(
        graph, options(asked=Asked(), batches=(8, 13, 32), seq_lens=(512, 1024)), cluster, Clock()
    )
    rates = {}
    for batch, seq_len in itertools.product((8, 32), (512, 1024)):  # of 13 no part divides
        asked = Asked(global_batch=batch, seq_len=seq_len)
        alone = plan_graph(graph, options(asked=asked), cluster, Clock())
        rates[batch, seq_len] = alone.estimate.tokens / alone.estimate.step_time_s
    best = max(rates, key=lambda pair: rates[pair])
    assert (found.plan.workload.global_batch, found.plan.workload.seq_len) == best
    assert found.estimate.tokens / found.estimate.step_time_s == rates[best]
    with pytest.raises(UsageError, match="divide"):
        plan_within(graph, options(asked=Asked(), batches=(13, 17)), cluster, Clock())
    with pytest.raises(UsageError, match="one batch"):
        plan_within(graph, options(objective="gpus", batches=(8, 16)), cluster, Clock())


def test_the_command_takes_a_range(plan):
    tiny = ("--arg", "size=tiny", "--hardware", "h100x4", "--seq-len", "128")
    code, out, err = plan("trace", LLAMA, *tiny, "--global-batch", "16..32", "--json")
    assert code == 0, err
    assert json.loads(out)["workload"]["global_batch"] == 32
    assert "most tokens/s of the ranges" in err
    code, out, err = plan("trace", LLAMA, *tiny, "--global-batch", "many")
    assert code == 64 and "--global-batch many" in err
