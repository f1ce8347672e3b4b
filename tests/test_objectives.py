"""Objectives and limits of `plan trace`: what a plan is chosen for, and what it may not exceed."""

import functools
import itertools
import json
import re
from dataclasses import replace

import pytest
from tiny_models import EXAMPLES, graph_of

from cost_models.hardware import load_hardware
from cost_models.operations import Operations
from cost_models.prices import Price
from ir.errors import InfeasibleError, UsageError
from planner.capturing import Clock
from planner.charges import charges
from planner.decisions import Pins, parse_pins
from planner.limits import Limits, capped, parse_share, parse_sizes, uncapped, usd_at_least
from planner.objectives import RESOLVED, plan_for, plan_within
from planner.options import TraceOptions
from planner.tracing import attempt, check_model, plan_graph
from planner.workload import Asked, resolve

LLAMA = str(EXAMPLES / "llama.py")
GRAPH = {"size": "small", "n_layers": 8}
SHALLOW = {"size": "small", "n_layers": 2}  # where nothing fits: each core of pins is a search


def options(**more):
    asked = Asked(global_batch=32, seq_len=1024)
    return TraceOptions(**{"model": LLAMA, "hardware": "h100x8", "asked": asked, **more})


def traced(given, cluster=None):
    cluster = cluster or load_hardware(given.hardware)
    return plan_for(graph_of("llama", **GRAPH), given, cluster, Clock())


@functools.cache
def unlimited():
    return traced(options())


def test_a_limit_of_memory_holds_and_the_capacity_stays_the_gpus():
    cluster = load_hardware("h100x8")
    free = unlimited()
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
    nothing = options(limits=Limits(memory_bytes=100_000_000))
    with pytest.raises(InfeasibleError, match=r"0\.1 GB a GPU"):
        plan_for(graph_of("llama", **SHALLOW), nothing, cluster, Clock())


@pytest.mark.parametrize("slack", [0.0, 0.3])
def test_the_least_memory_within_the_slack(slack):
    """No limit that is finely lower has a plan that is fast enough."""
    cluster, graph = load_hardware("h100x8"), graph_of("llama", **GRAPH)
    fastest = unlimited()
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
    graph = graph_of("llama", size="8b", n_layers=8)
    limits, pins = Limits(memory_bytes=9_000_000_000), parse_pins(["offload=none"])
    given = options(hardware="h100x16", objective="gpus", limits=limits, pins=pins)
    found = plan_for(graph, given, load_hardware("h100x16"), Clock())
    gpus = found.plan.decisions.gpus
    assert 1 < gpus < 16
    assert found.plan.hardware == f"h100x{gpus}"
    assert found.plan.workload.global_batch == 32
    assert found.estimate.peak_memory_bytes <= limits.memory_bytes
    fewer = options(hardware=f"h100x{gpus // 2}", limits=limits, pins=pins)
    assert attempt(graph, fewer, load_hardware(fewer.hardware), Clock())[0] is None


def test_what_never_fits_is_said_of_the_whole_cluster():
    graph = graph_of("llama", **SHALLOW)
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


def test_a_cost_that_is_hinted_at_is_not_below_what_it_is_of():
    """Rounded to the nearest, the hint was refused in turn: 0.016794 USD is over 0.01679."""
    said = {0.016794: "0.0168", 0.0100001: "0.01001", 2.5: "2.5", 123456.7: "123500", 0.0: "0",
            1e-7 / 3: "0.00000003334", 0.99999: "1"}  # fmt: skip
    assert {usd: usd_at_least(usd) for usd in said} == said
    assert all(float(usd_at_least(usd)) >= usd for usd in said)


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
    fault = plan("trace", LLAMA, *tiny, "--max-memory", "700MB")
    assert fault[0] == 3 and "binding: memory (--max-memory 700.0 MB)" in fault[2]
    (least,) = re.findall("hint: --max-memory (.*GB) holds the nearest", fault[2])
    assert plan("trace", LLAMA, *tiny, "--max-memory", least)[0] == 0
    (fault := plan("trace", LLAMA, "--hardware", "h100x4", "--max-memory", "lots"))
    assert fault[0] == 64 and "'lots'" in fault[2]
    code, _, err = plan("trace", LLAMA, *tiny, "--fix", "dp=3")  # 33 samples would not do either
    assert code == 64 and "does not divide the hardware's 4 GPUs" in err and "dp=4" in err
    for size in ("0GB", "70"):  # a number alone is bytes
        (fault := plan("trace", LLAMA, "--hardware", "h100x4", "--max-memory", size))
        assert fault[0] == 64 and f"--max-memory {size} leaves a plan no memory" in fault[2]


# --- ranges --------------------------------------------------------------------------------------


def test_a_range_is_its_ends_and_doublings_between():
    assert parse_sizes(None, "--seq-len") == ()
    assert parse_sizes("512", "--seq-len") == (512,)
    assert parse_sizes("100..450", "--seq-len") == (100, 128, 200, 256, 400, 450)
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
    for batch, seq_len in itertools.product((8, 13, 32), (512, 1024)):
        asked = Asked(global_batch=batch, seq_len=seq_len)
        alone = plan_graph(graph, options(asked=asked), cluster, Clock())
        rates[batch, seq_len] = alone.estimate.tokens / alone.estimate.step_time_s
    best = max(rates, key=lambda pair: rates[pair])
    assert (found.plan.workload.global_batch, found.plan.workload.seq_len) == best
    assert found.estimate.tokens / found.estimate.step_time_s == rates[best]
    with pytest.raises(UsageError, match="divide"):
        pinned = options(asked=Asked(), batches=(13, 15), pins=Pins(micro_batch=2))
        plan_within(graph, pinned, cluster, Clock())
    even = plan_within(graph, options(asked=Asked(), batches=(13, 17)), cluster, Clock())
    assert even.plan.workload.global_batch == 16  # neither end; what eight GPUs divide
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


# --- limits of GPUs and USD ----------------------------------------------------------------------

PRICE = Price(
    device="h100", usd_per_gpu_hour=2.0, spot_usd_per_gpu_hour=1.0,
    spot_preemptions_per_gpu_hour=0.05,
)  # fmt: skip


def within(**more):
    return traced(options(prices={"h100": PRICE}, limits=Limits(**more)))


@functools.cache
def priced(gpus):
    """Of so many GPUs, without a limit."""
    return traced(options(hardware=f"h100x{gpus}", prices={"h100": PRICE}))


def test_what_a_plan_costs_is_its_price_by_the_rate_that_failures_leave():
    """Spot machines are taken away beside failing; the share left is Daly's."""
    cluster, found = load_hardware("h100x8"), priced(8)
    e, cost = found.estimate, found.charges
    rate = e.tokens / e.step_time_s
    sure, spot = cost.goodput, cost.spot_goodput
    assert sure.mtbf_s == pytest.approx(3600 / (8 * Operations().failures_per_gpu_hour))
    taken = Operations().failures_per_gpu_hour + 0.05
    assert spot.mtbf_s == pytest.approx(3600 / (8 * taken))
    assert spot.useful < sure.useful < 1
    assert cost.usd_per_million_tokens == pytest.approx(
        2.0 * cluster.count / 3600 / (rate * sure.useful) * 1e6
    )
    assert cost.spot_usd_per_million_tokens == pytest.approx(
        1.0 * cluster.count / 3600 / (rate * spot.useful) * 1e6
    )
    assert cost.least_usd == cost.spot_usd_per_million_tokens
    assert sum("USD a million tokens" in line for line in found.echo) == 2
    assert traced(options()).charges is None


def test_a_step_waits_for_samples_that_storage_gives_too_slowly():
    """Samples of twice the bytes that the disk gives a step's nodes: half the rate, twice the
    energy; as many as it gives cost nothing."""
    found = unlimited()
    cluster, p = load_hardware("h100x8"), found.plan  # one node, which reads the whole batch
    disk = cluster.tier("nvme").read_bytes_per_s
    gives = disk * found.estimate.step_time_s / p.workload.global_batch

    def charged(sample_bytes):
        under = Operations(sample_bytes=sample_bytes)
        return charges(p.graph, cluster, p.workload, p.decisions, found.estimate, under, {})

    fine, slow = charged(gives), charged(2 * gives)
    assert fine.expected_tokens_per_s == charged(1.0).expected_tokens_per_s
    assert slow.expected_tokens_per_s == pytest.approx(fine.expected_tokens_per_s / 2)
    assert slow.joules_per_token == pytest.approx(2 * fine.joules_per_token)
    assert slow.tokens_per_s == fine.tokens_per_s


def test_fewer_gpus_where_more_cost_too_much():
    """The most GPUs of those allowed whose plan keeps the limit of cost; the batch is the same."""
    alone = {n: priced(n) for n in (1, 2, 4)}
    usd = {n: found.charges.least_usd for n, found in alone.items()}
    most = within(gpus=4)
    assert most.plan.hardware == "h100x4" and "--max-gpus 4: 4 of 8" in most.echo[-1]
    assert most.charges.least_usd == usd[4]
    assert usd[1] < usd[4]
    limit = (usd[1] + usd[2]) / 2 if usd[1] < usd[2] else (usd[2] + usd[4]) / 2
    kept = [n for n, cost in usd.items() if cost <= limit]
    found = within(gpus=4, usd_per_million_tokens=limit)
    assert found.plan.decisions.gpus == max(kept) and found.plan.workload.global_batch == 32
    fewest = traced(options(objective="gpus", prices={"h100": PRICE},
                            limits=Limits(usd_per_million_tokens=limit)))  # fmt: skip
    assert fewest.plan.decisions.gpus == min(kept)


@pytest.mark.parametrize("objective", ["cost", "energy"])
@pytest.mark.parametrize("prices", [{}, {"h100": PRICE}])
def test_with_the_count_open_the_least_cost_of_all_counts_is_taken(objective, prices):
    """Without prices what costs are GPU hours, which energy is as well."""
    usd, joules = {}, {}
    for n in (1, 2, 4, 8):
        found = priced(n)
        usd[n], joules[n] = found.charges.least_usd, found.charges.joules_per_token
    wanted = usd if objective == "cost" and prices else joules
    for most in (8, 4):
        best = min((n for n in wanted if n <= most), key=lambda n: wanted[n])
        found = traced(options(objective=objective, prices=prices, limits=Limits(gpus=most)))
        assert found.plan.decisions.gpus == best and found.plan.workload.global_batch == 32
        assert f"--objective {objective}: {best} GPUs take least" in found.echo[-1]
    assert min(wanted, key=lambda n: wanted[n]) < 8  # the most would be another answer


def test_a_limit_that_cannot_be_met_says_by_how_much_and_the_nearest_that_can():
    free = priced(8).charges.least_usd
    with pytest.raises(InfeasibleError) as raised:
        within(usd_per_million_tokens=free / 1000)
    fault = raised.value
    assert "99900.0% over --max-cost" in fault.why and "the least that was found" in fault.hints[0]
    one = priced(1).charges.least_usd
    with pytest.raises(InfeasibleError) as raised:
        within(usd_per_million_tokens=(one + free) / 2)
    assert "--max-gpus" in raised.value.hints[0] and "USD on h100x" in raised.value.hints[0]
    graph, cluster = graph_of("llama", size="8b", n_layers=2), load_hardware("h100x4")
    tight = Limits(memory_bytes=10_000_000_000, gpus=1)
    with pytest.raises(InfeasibleError) as raised:
        plan_for(graph, options(hardware="h100x4", limits=tight), cluster, Clock())
    assert "--max-gpus 1" in str(raised.value) and "more" in raised.value.why
    (hint,) = raised.value.hints
    held = replace(tight, gpus=int(hint.split()[-1]))
    found = plan_for(graph, options(hardware="h100x4", limits=held), cluster, Clock())
    assert found.plan.decisions.gpus == held.gpus > 1


def test_the_command_takes_limits_of_cost_and_gpus(plan, tmp_path):
    (tmp_path / "prices.toml").write_text("[h100]\nusd_per_gpu_hour = 2.0\n")
    tiny = ("--arg", "size=tiny", "--global-batch", "32", "--hardware", "h100x4")
    priced = ("--prices", "prices.toml")
    code, out, err = plan("trace", LLAMA, *tiny, *priced, "--max-gpus", "2", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["hardware"] == "h100x2" and said["estimate"]["usd_per_million_tokens"] > 0
    code, out, err = plan("show", "--goodput", *priced)
    assert code == 0 and "on demand:" in out, err
    code, out, err = plan("show", "--goodput", *priced, "--json")
    usd = json.loads(out)["cost"]["usd_per_million_tokens"]
    assert usd == pytest.approx(said["estimate"]["usd_per_million_tokens"])
    code, out, err = plan("trace", LLAMA, *tiny, *priced, "--max-cost", "1e-9")
    assert code == 3 and "over --max-cost" in err
    for bad in (("--max-cost", "1"), ("--assume", "pue=1.2")):
        code, out, err = plan("trace", LLAMA, *tiny, *bad)
        assert code == 64 and "--prices" in err
    (tmp_path / "prices.toml").write_text("[b200]\nusd_per_gpu_hour = 2.0\n")
    code, out, err = plan("trace", LLAMA, *tiny, *priced)
    assert code == 64 and "has no price of h100" in err


def test_the_command_takes_what_an_axis_must_earn(plan):
    tiny = ("trace", LLAMA, "--arg", "size=tiny", "--global-batch", "32", "--hardware", "h100x4")
    usual, none = (plan(*tiny, "--json", *more) for more in ((), ("--axis-gain", "0%")))
    assert usual[0] == none[0] == 0, none[2]
    times = [json.loads(out)["estimate"]["step_time_s"] for _, out, _ in (usual, none)]
    assert times[1] <= times[0]
    code, _, err = plan(*tiny, "--axis-gain", "2")
    assert code == 64 and "--axis-gain 2" in err
    again = ("trace", "--hardware", "h100x4", "--base", "plan.json", "--stability", "2%")
    code, _, err = plan(*again, "--axis-gain", "0%")
    assert code == 64 and "--stability and --axis-gain" in err


def test_ep_that_does_not_divide_is_told_what_does(plan):
    tiny = ("trace", str(EXAMPLES / "moe.py"), "--arg", "size=tiny", "--hardware", "h100x16")
    code, _, err = plan(*tiny, "--fix", "ep=16")
    (experts,) = re.findall(r"does not divide the experts \((\d+)\)", err)
    degrees = [int(n) for n in re.findall(r"ep=(\d+)", err.partition("hint:")[2])]
    assert code == 64 and degrees and all(int(experts) % n == 0 for n in degrees)


def test_a_schedule_that_runs_eager_is_not_refused_for_what_compiles_not():
    """zbv runs eager under native-compiled, where tp ranks may drop values."""
    graph = graph_of("gpt", dropout=0.1, n_layers=4)
    cluster, asked = load_hardware("h100x4"), Asked(global_batch=8, seq_len=128)
    workload, _ = resolve(graph, cluster, asked, Pins())
    with pytest.raises(UsageError, match="tp=2"):
        check_model(graph, cluster, workload, Pins(pp=2, tp=2))
    check_model(graph, cluster, workload, Pins(pp=2, tp=2, schedule="zbv"))
    check_model(graph, cluster, workload, Pins(pp=2, tp=2, compile=False))
