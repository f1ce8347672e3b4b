"""Goodput: the best interval and the useful share against simulation; bytes against torch."""

import json
import math
import random
from dataclasses import replace

import pytest
from tiny_models import EXAMPLES, graph_of

from cost_models.decisions import Decisions, Workload
from cost_models.goodput import (
    best_interval_s,
    checkpoint_bytes,
    chosen,
    goodput,
    inputs,
    useful_share,
)
from cost_models.hardware import load_hardware
from cost_models.ledger import Estimate, RankLedger
from cost_models.operations import SOURCES, Operations, parse_operations
from cost_models.tiers import Tier
from ir.errors import UsageError


def simulated_share(interval_s, write_s, restart_s, mtbf_s, segments, seed):
    """Live through failures second by second: work, write, fail at any time, restart, again."""
    draw = random.Random(seed)
    now, fails_at, done = 0.0, draw.expovariate(1 / mtbf_s), 0
    while done < segments:
        if now + interval_s + write_s <= fails_at:
            now += interval_s + write_s
            done += 1
            continue
        now = fails_at
        while True:  # a failure while restarting starts the restart again
            fails_at = now + draw.expovariate(1 / mtbf_s)
            if now + restart_s <= fails_at:
                now += restart_s
                break
            now = fails_at
    return segments * interval_s / now


@pytest.mark.parametrize(
    ("interval_s", "write_s", "restart_s", "mtbf_s"),
    [(1800, 30, 600, 11_000), (300, 60, 600, 3_600), (3600, 10, 0, 3_600), (60, 60, 900, 1_000)],
)
def test_the_useful_share_is_what_a_failure_process_leaves(interval_s, write_s, restart_s, mtbf_s):
    shares = [
        simulated_share(interval_s, write_s, restart_s, mtbf_s, 20_000, seed) for seed in range(4)
    ]
    mean = sum(shares) / len(shares)
    assert useful_share(interval_s, write_s, restart_s, mtbf_s) == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize("mtbf_s", [1_000.0, 11_000.0, 1e6, 1e9])
@pytest.mark.parametrize("write_s", [0.01, 1.0, 60.0, 900.0])
def test_the_interval_is_the_best_there_is(write_s, mtbf_s):
    found = best_interval_s(write_s, mtbf_s)
    best = useful_share(found, write_s, 600, mtbf_s)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2):
        assert useful_share(found * factor, write_s, 600, mtbf_s) < best
    # Daly's series, 2006, equation 20, and its first term, Young 1974
    a = write_s / (2 * mtbf_s)
    daly = math.sqrt(2 * write_s * mtbf_s) * (1 + math.sqrt(a) / 3 + a / 9) - write_s
    if a < 0.01:
        assert found == pytest.approx(daly, rel=1e-3)
    if a < 1e-6:
        assert found == pytest.approx(math.sqrt(2 * write_s * mtbf_s), rel=3e-3)


def test_the_best_interval_of_a_simulated_job_is_the_one_computed():
    write_s, restart_s, mtbf_s = 120, 600, 7_200
    found = best_interval_s(write_s, mtbf_s)
    at = {
        factor: simulated_share(found * factor, write_s, restart_s, mtbf_s, 60_000, 7)
        for factor in (0.4, 1.0, 2.5)
    }
    assert at[1.0] == max(at.values())


def test_nothing_fails_and_nothing_ends():
    assert best_interval_s(10.0, math.inf) == math.inf
    assert useful_share(math.inf, 10.0, 600, math.inf) == 1.0
    assert useful_share(90.0, 10.0, 600, math.inf) == 0.9
    assert best_interval_s(0.0, 1e4) == 0.0
    assert useful_share(0.0, 0.0, 100.0, 1e4) == pytest.approx(math.exp(-0.01))
    assert useful_share(10.0, 1e9, 0.0, 1.0) == 0.0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_checkpoint_is_what_torch_holds(optimizer):
    """fp32 parameters and the optimizer's own tensors, one for each element; counters left out."""
    import torch

    from ir.capture.load import load

    model = load(str(EXAMPLES / "llama.py"), {"size": "tiny"}).model
    model = model.to_empty(device="cpu").to(torch.float32)
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    made = (
        torch.optim.AdamW(parameters) if optimizer == "adamw"
        else torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
    )  # fmt: skip
    made.step()
    held = sum(p.nbytes for p in parameters) + sum(
        x.nbytes for state in made.state.values() for x in state.values()
        if isinstance(x, torch.Tensor) and x.ndim
    )  # fmt: skip
    found = checkpoint_bytes(graph_of("llama"), Workload(optimizer=optimizer))
    assert found == held


def made(pp, parameters):
    """An estimate that has pp ranks with so many parameters each."""
    ranks = tuple(
        RankLedger(pp_rank=r, parameters=n, in_flight=(1,), memory_bytes=(), collectives=())
        for r, n in zip(range(pp), parameters)
    )
    return Estimate(
        step_time_ps=10**12, breakdown_ps=(), error=0.1, tokens=1, gpus=1, model_flop=1,
        executed_flop=1, peak_flop_per_s=1.0, capacity_bytes=1, ranks=ranks,
    )  # fmt: skip


@pytest.mark.parametrize(("pp", "count"), [(1, 64), (3, 24), (4, 16), (8, 8), (16, 8), (2, 512)])
def test_the_busiest_node_counts(pp, count):
    graph, workload = graph_of("llama"), Workload(optimizer="adamw")
    cluster = load_hardware(f"h100x{count}")
    if count % pp:
        cluster = replace(cluster, count=count * pp)
    d = Decisions(pp=pp, dp=cluster.count // pp, zero=1, shard=cluster.count // pp)
    parameters = [100 + 37 * r * r for r in range(pp)]
    whole = checkpoint_bytes(graph, workload)
    each = [
        parameters[gpu // d.dp] / d.dp / sum(parameters) * whole for gpu in range(cluster.count)
    ]
    nodes = [sum(each[k : k + 8]) for k in range(0, cluster.count, 8)]
    rows = goodput(graph, cluster, workload, d, made(pp, parameters), Operations())
    assert [row.tier for row in rows] == ["cpu", "nvme"]
    for row, tier in zip(rows, cluster.tiers):
        assert row.node_bytes == pytest.approx(max(nodes), abs=1)
        rate = min(tier.write_bytes_per_s, 8 * cluster.device.host_link_bytes_per_s)
        assert row.write_s == pytest.approx(row.node_bytes / rate)
        assert row.read_bytes == row.node_bytes  # sharded over all: each byte is read once


def test_failures_grow_with_the_job_and_copies_are_read_by_each():
    graph, workload = graph_of("llama"), Workload()
    one, many = (load_hardware(f"h100x{n}") for n in (8, 16_384))
    zero = Decisions(dp=8, zero=0)
    small = goodput(graph, one, workload, zero, made(1, [1]), Operations())[-1]
    large = goodput(graph, many, workload, replace(zero, dp=16_384), made(1, [1]), Operations())[-1]
    assert small.read_bytes == 8 * small.node_bytes  # replicated: every rank reads it whole
    assert small.mtbf_s == pytest.approx(large.mtbf_s * 2048)
    assert large.mtbf_s == pytest.approx(54 * 86_400 / 419)
    assert large.useful < small.useful < 1
    never = Operations(failures_per_gpu_hour=0.0)
    calm = goodput(graph, one, workload, zero, made(1, [1]), never)[-1]
    assert (calm.useful, calm.interval_s, calm.mtbf_s) == (1.0, math.inf, math.inf)
    spot = Operations(preemptions_per_gpu_hour=0.01)
    taken = goodput(graph, one, workload, zero, made(1, [1]), spot)[-1]
    per_hour = 8 * (419 / (54 * 24 * 16_384) + 0.01)
    assert taken.mtbf_s == pytest.approx(3600 / per_hour)


def test_a_tier_that_is_too_small_or_not_there():
    graph, cluster = graph_of("llama"), load_hardware("h100x8")
    d = Decisions(dp=8, zero=0)
    tiny = Tier(name="cpu", bytes=10, read_bytes_per_s=1e9, write_bytes_per_s=1e9)
    small = replace(cluster, tiers=(tiny,))
    assert goodput(graph, small, Workload(), d, made(1, [1]), Operations()) == ()
    assert chosen((), (small,), Operations()) is None
    rows = goodput(graph, cluster, Workload(), d, made(1, [1]), Operations())
    assert chosen(rows, (cluster,), Operations()) == rows[-1]
    assert chosen(rows, (cluster,), Operations(tier="cpu")) == rows[0]
    with pytest.raises(UsageError, match="no tier 'tape'"):
        chosen(rows, (cluster,), Operations(tier="tape"))


@pytest.mark.parametrize(("tp", "ranks"), [(1, 8), (2, 4), (8, 1)])
def test_a_node_reads_the_samples_of_its_data_ranks(tp, ranks):
    """64 samples of 128 int64 tokens a step, over dp ranks of which a node has `ranks`."""
    graph, cluster = graph_of("llama"), load_hardware("h100x16")
    d = Decisions(tp=tp, dp=16 // tp)
    assert [name for name, _ in graph.root.inputs][1:] == ["targets"]  # the next tokens: the same
    w = Workload(global_batch=64, seq_len=128)
    found = inputs(graph, cluster, w, d, 0.5, Operations())
    expected = 64 / d.dp * ranks * 128 * 8 / 0.5
    assert found.node_bytes_per_s == expected == 64 / 2 * 128 * 8 / 0.5
    assert found.share == pytest.approx(expected / cluster.tier("nvme").read_bytes_per_s)
    packed = inputs(graph, cluster, w, d, 0.5, Operations(sample_bytes=256.0))
    assert packed.node_bytes_per_s == expected / 4
    assert inputs(graph, replace(cluster, tiers=()), w, d, 0.5, Operations()).share is None


def test_assumptions_are_read_and_each_has_a_source():
    found = parse_operations(["restart_s=300", "tier=cpu", "pue=1.1", "failures_per_gpu_hour=0"])
    assert found == Operations(restart_s=300, tier="cpu", pue=1.1, failures_per_gpu_hour=0)
    assert set(SOURCES) == set(Operations.__dataclass_fields__)
    for bad in ("pue=0.9", "restart_s=-1", "restart_s=soon", "restart=3", "pue", "restart_s=inf"):
        with pytest.raises(UsageError):
            parse_operations([bad])
    with pytest.raises(UsageError, match="twice"):
        parse_operations(["pue=2", "pue=2"])


# --- plan show --goodput -------------------------------------------------------------------------


@pytest.fixture
def traced(plan):
    llama = str(EXAMPLES / "llama.py")
    words = ("--arg", "size=tiny", "--hardware", "h100x16", "--global-batch", "64")
    code, _, err = plan("trace", llama, *words)
    assert code == 0, err


def test_show_says_what_failures_leave(plan, traced):
    code, out, err = plan("show", "--goodput", "--json")
    assert code == 0, err
    raw = json.loads(out)
    assert [row["tier"] for row in raw["tiers"]] == ["cpu", "nvme"]
    for row in raw["tiers"]:
        share = useful_share(row["interval_s"], row["write_s"], row["restart_s"], row["mtbf_s"])
        assert row["useful"] == pytest.approx(share)
        assert row["expected_tokens_per_s"] == pytest.approx(share * raw["tokens_per_s"])
    code, out, err = plan("show", "--goodput")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    for words in ("nvme", "useful", "Llama 3 405B", "MegaScale", "one in"):
        assert words in out


def test_show_takes_assumptions_of_goodput_alone(plan, traced):
    words = ("--assume", "failures_per_gpu_hour=0", "--assume", "restart_s=5")
    code, out, err = plan("show", "--goodput", *words)
    assert code == 0, err
    assert "none" in out and "never" in out and "100.00%" in out and "Llama" not in out
    assert json.loads(plan("show", "--goodput", "--json", *words)[1])["tiers"][0][
        "interval_s"] is None  # fmt: skip
    code, out, err = plan("show", *words)
    assert code == 64 and "--goodput" in err
