"""`plan size`: its front against brute force, its numbers against first principles, its words."""

import itertools
import json
import math
import random
import re
from dataclasses import replace

import pytest
from tiny_models import EXAMPLES, graph_of

from cost_models.decisions import Workload
from cost_models.estimate import estimate_step
from cost_models.goodput import goodput
from cost_models.hardware import describe, load_hardware
from cost_models.operations import Operations
from cost_models.pareto import dominates, front
from cost_models.prices import Price, load_prices
from cost_models.step import Costs
from ir.errors import InfeasibleError, UsageError
from planner.limits import Limits
from planner.mesh import meshes
from planner.search import Searcher
from planner.sizing import PAST, Sizer, Target, _Searches, counts
from planner.sizing_options import parse_devices, parse_target

LLAMA = str(EXAMPLES / "llama.py")
TINY = ("--arg", "size=tiny", "--global-batch", "64", "--seq-len", "128")
WORKLOAD = Workload(global_batch=64, seq_len=128)
PRICES = {
    "h100": Price(device="h100", usd_per_gpu_hour=2.5, spot_usd_per_gpu_hour=1.0,
                  spot_preemptions_per_gpu_hour=0.5),
    "a100": Price(device="a100", usd_per_gpu_hour=1.2),
}  # fmt: skip


# --- the front -----------------------------------------------------------------------------------


def test_the_front_is_what_nothing_beats():
    draw = random.Random(3)
    for _ in range(100):
        points = [tuple(draw.choice((0, 1, 2, math.inf)) for _ in range(3)) for _ in range(12)]
        for p, on in zip(points, front(points)):
            beaten = any(
                all(x <= y for x, y in zip(q, p)) and any(x < y for x, y in zip(q, p))
                for q in points
            )
            assert on == (not beaten)
    assert not dominates((1, 2), (1, 2)) and dominates((1, 1), (1, 2))


def sizer(target, **more):
    return Sizer(graph=graph_of("llama"), workload=WORKLOAD, target=target, **more)


def some(*names):
    return tuple(describe(name) for name in names)


@pytest.mark.parametrize(
    ("axes", "prices", "target"),
    [
        (("time", "energy", "gpus"), {}, Target(tokens_per_s=3e5)),
        (("time", "cost", "spot", "energy", "gpus"), PRICES, Target(tokens_per_s=6e5)),
        (("cost", "memory"), PRICES, Target(step_time_s=0.02)),
    ],
)
def test_what_is_left_out_would_not_be_on_the_front(axes, prices, target):
    """Every candidate searched, and only those that bounds cannot rule out: the same front; and
    what is said to be too slow or too large has no plan that is neither."""
    devices = some("h100", "a100", "l4", "b200")
    more = {"axes": axes, "prices": prices, "limits": Limits(gpus=8)}
    quick = sizer(target, **more).run(devices)
    whole = sizer(target, **more, every=True).run(devices)
    assert quick.searched <= whole.searched

    def on_front(found):
        return {
            (row.hardware.spec, row.estimate.step_time_ps)
            for row, on in zip(found.rows, found.on_front) if on
        }  # fmt: skip

    assert on_front(quick) == on_front(whole)
    for left in quick.left:
        if left.reason == "dominated":
            continue
        cluster = load_hardware(left.hardware)
        alone = sizer(target, **more)
        row = alone._row(cluster, _Searches(graph_of("llama"), WORKLOAD, cluster, Limits(), 60))
        assert (row is None) == (left.reason == "memory")
        assert not alone.rows


def test_every_candidate_is_what_a_search_of_its_own_finds():
    """Counts share placements and nothing else: each row equals a fresh searcher's plan."""
    found = sizer(Target(tokens_per_s=1.0), limits=Limits(gpus=32), every=True).run(
        some("h100", "gb200")
    )
    assert found.rows
    for row in found.rows:
        costs = Costs(
            graph=graph_of("llama"), cluster=row.hardware, workload=WORKLOAD,
            points=tuple(dict.fromkeys(
                (m.micro_batch, m.cp)
                for m in meshes(sizer_chain(), row.hardware, WORKLOAD, no_pins())
            )),
        )  # fmt: skip
        fresh = Searcher(costs=costs, effort=60).run().best
        alone = estimate_step(costs, costs.step(fresh.decisions, fresh.assignments),
                              fresh.decisions)  # fmt: skip
        assert (row.decisions, row.estimate) == (fresh.decisions, alone)


def sizer_chain():
    from cost_models.chain import chain_of

    return chain_of(graph_of("llama"))


def no_pins():
    from planner.decisions import Pins

    return Pins()


def test_no_plan_is_faster_than_the_bound_that_rules_it_out():
    """The rate that rules candidates out is at least that of every plan that is found."""
    for name, count in itertools.product(("h100", "l4", "a100"), (1, 4, 16)):
        device = describe(name)
        search = _Searches(graph_of("llama"), WORKLOAD, device, Limits(), 400)
        cluster = replace(device, count=count)
        _, estimate, _ = search.fastest(cluster)
        rate = estimate.tokens / estimate.step_time_s
        assert rate <= search.most_tokens_per_s(cluster)
        assert rate <= count * device.device.peak("bf16") * estimate.tokens / search.flop


# --- the numbers ---------------------------------------------------------------------------------


def test_rates_energy_and_prices_are_of_expected_tokens():
    operations = Operations(pue=1.25, failures_per_gpu_hour=0.02, restart_s=120.0)
    found = sizer(
        Target(tokens_per_s=1.0), operations=operations, prices=PRICES,
        axes=("time", "cost", "spot", "energy", "gpus"), limits=Limits(gpus=8), every=True,
    ).run(some("h100", "a100"))  # fmt: skip
    for row in found.rows:
        c, e = row.hardware, row.estimate
        kept = goodput(graph_of("llama"), c, WORKLOAD, row.decisions, e, operations)[-1]
        rate = 64 * 128 / e.step_time_s * kept.useful
        assert kept.useful < 0.9999
        assert row.expected_tokens_per_s == pytest.approx(rate)
        watts = c.count * c.device.power_w * 1.25
        assert row.joules_per_token == pytest.approx(watts / rate)
        hourly = {"h100": 2.5, "a100": 1.2}[c.name]
        assert row.usd_per_million_tokens == pytest.approx(hourly * c.count / 3600 / rate * 1e6)
        if c.name == "a100":
            assert row.spot_usd_per_million_tokens is None
            continue
        risky = replace(operations, preemptions_per_gpu_hour=0.5)
        kept = goodput(graph_of("llama"), c, WORKLOAD, row.decisions, e, risky)[-1]
        rate = 64 * 128 / e.step_time_s * kept.useful
        assert row.spot_expected_tokens_per_s == pytest.approx(rate)
        assert row.spot_usd_per_million_tokens == pytest.approx(1.0 * c.count / 3600 / rate * 1e6)


def test_counts_double_within_a_node_and_by_nodes():
    assert list(counts(describe("h100"), 100)) == [1, 2, 4, 8, 16, 32, 64]
    assert list(counts(describe("gb200"), 16)) == [1, 2, 4, 8, 16]
    mine = replace(describe("h100"), name="mine", count=24)  # a file says how many there are
    assert sizer(Target())._counts(mine) == [1, 2, 4, 8, 16, 24]
    assert sizer(Target(), limits=Limits(gpus=20))._counts(mine) == [1, 2, 4, 8, 16]
    six = replace(describe("h100"), node_size=6)
    assert list(counts(six, 24)) == [1, 2, 4, 6, 12, 24]


def test_limits_hold_and_nothing_is_an_error_that_says_what_came_near():
    memory = 4_000_000_000
    found = sizer(Target(tokens_per_s=1.0), limits=Limits(gpus=8, memory_bytes=memory)).run(
        some("h100")
    )
    for row in found.rows:
        assert row.hardware.count <= 8
        assert row.estimate.peak_memory_bytes <= memory
        assert row.estimate.capacity_bytes == row.hardware.device.memory_bytes
        assert row.headroom_bytes >= row.hardware.device.memory_bytes - memory
    with pytest.raises(InfeasibleError) as fault:
        sizer(Target(tokens_per_s=1e12), limits=Limits(gpus=8)).run(some("h100", "a100"))
    assert "nearest: h100x8, less than" in fault.value.why
    with pytest.raises(InfeasibleError) as fault:
        sizer(Target(tokens_per_s=1.0, step_time_s=1e-3)).run(())
    assert "no plan was found" in fault.value.why
    dear = Limits(gpus=8, usd_per_million_tokens=1e-12)
    with pytest.raises(InfeasibleError) as fault:
        sizer(Target(tokens_per_s=1.0), limits=dear, prices=PRICES).run(some("h100", "a100"))
    assert "nearest: h100x" in fault.value.why and "a step" in fault.value.why
    some_usd = Limits(gpus=8, usd_per_million_tokens=1e12)  # l4 has no price there
    found = sizer(Target(tokens_per_s=1.0), limits=some_usd, prices=PRICES).run(some("h100", "l4"))
    assert {row.hardware.name for row in found.rows} == {"h100"}
    assert {left.reason for left in found.left if "l4" in left.hardware} <= {"unpriced", "memory"}
    assert any(left.reason == "unpriced" for left in found.left)


def test_counts_end_where_the_target_is_well_exceeded():
    most = 1 << 14
    found = sizer(Target(tokens_per_s=1e5), limits=Limits(gpus=most), every=True).run(some("h100"))
    rates = [row.expected_tokens_per_s for row in found.rows]
    assert all(rate < PAST * 1e5 for rate in rates[:-1]) and rates[-1] >= PAST * 1e5
    assert found.rows[-1].gpus < most


# --- what is asked -------------------------------------------------------------------------------


def test_targets_are_read():
    assert parse_target(["tokens_per_s=1e6"], 0).tokens_per_s == 1e6
    assert parse_target(["days=10"], 864e9).tokens_per_s == pytest.approx(1e6)
    both = parse_target(["days=10", "tokens_per_s=2M", "step_time_s=5"], 864e9)
    assert (both.tokens_per_s, both.step_time_s) == (2e6, 5.0)
    for bad in ([], ["days=10"], ["tokens=1"], ["days"], ["tokens_per_s=0"], ["tokens_per_s=x"]):
        with pytest.raises(UsageError):
            parse_target(bad, 0)


def test_devices_are_names_without_counts(tmp_path):
    assert [c.name for c in parse_devices("h100,b200-sxm")] == ["h100", "b200"]
    assert len(parse_devices("")) > 20
    for bad in ("h100x8", "h100,h100", "h900", "h100+a100"):
        with pytest.raises(UsageError):
            parse_devices(bad)
    path = tmp_path / "mine.toml"
    path.write_text('base = "h100"\ncount = 16\n')
    assert parse_devices(str(path))[0].name == "mine"


def test_prices_are_read_and_checked(tmp_path):
    path = tmp_path / "prices.toml"

    def read(text):
        path.write_text(text)
        return load_prices(str(path), ["mine"])

    spot = "spot_usd_per_gpu_hour = 1\nspot_preemptions_per_gpu_hour = 0\n"
    found = read(f"[h100-sxm]\nusd_per_gpu_hour = 2\n{spot}[mine]\nusd_per_gpu_hour = 0.5\n")
    assert found["h100"] == Price(device="h100", usd_per_gpu_hour=2.0, spot_usd_per_gpu_hour=1.0,
                                  spot_preemptions_per_gpu_hour=0.0)  # fmt: skip
    assert found["mine"].spot_usd_per_gpu_hour is None
    bad = (
        "[h900]\nusd_per_gpu_hour = 1", "[h100]\nusd = 1", "[h100]\nusd_per_gpu_hour = -1",
        "[h100]\nusd_per_gpu_hour = 'x'", "[h100]", "h100 = 2", "[h100]\nusd_per_gpu_hour = true",
        "[h100]\nspot_usd_per_gpu_hour = 1", "[h100]\nspot_preemptions_per_gpu_hour = 1",
        "[h100]\nusd_per_gpu_hour = 1\n[h100-sxm]\nusd_per_gpu_hour = 1", "[h100",
    )  # fmt: skip
    for text in bad:
        with pytest.raises(UsageError):
            read(text)
    with pytest.raises(UsageError, match="price file"):
        load_prices(str(tmp_path / "none.toml"))


# --- the command ---------------------------------------------------------------------------------

QUESTION = ("size", LLAMA, *TINY, "--target", "tokens_per_s=3e5", "--max-gpus", "16")


def test_what_plans_a_row_asks_what_was_asked(plan):
    """Else the plan is another's: within the same memory, of the same sequences."""
    asked = ("--seq-len", "64", "--optimizer", "sgd", "--engine", "native", "--max-memory", "40GB")
    code, out, err = plan(*QUESTION, "--hardware", "h100", *asked)
    assert code == 0, err
    again = err.rsplit("to plan it: plan ", 1)[1].split()
    assert {*zip(asked[::2], asked[1::2])} <= {*itertools.pairwise(again)}
    code, planned, err = plan(*again)
    assert code == 0, err
    row = next(line.split() for line in out.splitlines() if line.startswith("h100x"))
    step = next(line.split() for line in planned.splitlines() if line.startswith("step "))
    assert row[1:3] == step[1:3]


@pytest.mark.parametrize(("words", "said"), [
    (("--target", "step_time_s=1s"), "--target step_time_s=1s is no count"),
    (("--target", "days=3", "--tokens", "15X"), "--tokens 15X is no count"),
])  # fmt: skip
def test_of_what_is_no_count_the_flag_is_named(plan, words, said):
    code, out, err = plan("size", LLAMA, *words)
    assert (code, out) == (64, "") and said in err


def test_the_command_prints_the_front_at_80_columns(plan, tmp_path):
    (tmp_path / "prices.toml").write_text("[h100]\nusd_per_gpu_hour = 2.5\n")
    code, out, err = plan(*QUESTION, "--prices", "prices.toml", "--tokens", "1T")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    for words in ("$/M", "days", "J/token", "PUE 1.58", "Llama 3 405B", "h100x"):
        assert words in out
    assert "to plan it: plan trace" in err
    spot = "spot_usd_per_gpu_hour = 0.3\nspot_preemptions_per_gpu_hour = 0\n"
    (tmp_path / "prices.toml").write_text(f"[h100]\nusd_per_gpu_hour = 0.35\n{spot}")
    code, out, err = plan(*QUESTION, "--prices", "prices.toml", "--hardware", "h100")
    assert code == 0 and re.search(r" 0\.000[0-9]{3} ", out), out  # the widest that a price is
    assert not re.search(r"[0-9]\.[0-9]+\.[0-9]", out), out  # and none runs into the next column
    code, out, err = plan(*QUESTION)
    assert code == 0, err
    assert "$/M" not in out and "no cost: --prices FILE" in out
    assert "3 without bf16: t4, v100-16gb, v100-32gb" in " ".join(out.split())


def test_the_command_answers_in_json_and_repeats_its_bytes(plan):
    words = (*QUESTION, "--hardware", "h100,a100", "--all", "--json")
    code, out, err = plan(*words)
    assert code == 0, err
    raw = json.loads(out)
    assert list(raw) == [
        "schema", "model", "workload", "target", "limits", "objective", "axes",
        "rate_counts_up_to_target_times", "assumed", "candidates", "searched", "left_out",
    ]  # fmt: skip
    assert raw["schema"] == "size/1" and raw["objective"] == "gpus"
    assert raw["axes"] == ["time", "energy", "gpus"]
    for row in raw["candidates"]:
        assert row["usd_per_million_tokens"] is None
        assert row["expected_tokens_per_s"] >= 3e5
        assert row["headroom_bytes"] == row["capacity_bytes"] - row["peak_memory_bytes"]
        assert row["decisions"]["dp"] * row["decisions"]["micro_batch"] <= 64
        assert row["goodput"]["tier"] == "nvme"
    points = [
        (-min(r["expected_tokens_per_s"], 6e5), r["joules_per_token"], r["gpus"])
        for r in raw["candidates"]
    ]
    assert [r["on_front"] for r in raw["candidates"]] == list(front(points))
    assert plan(*words)[1] == out


def test_what_a_row_says_is_what_trace_says_with_its_plan_pinned(plan):
    """The same decisions, costed by `plan trace`: the same step and memory."""
    code, out, err = plan(*QUESTION, "--hardware", "h100", "--json")
    assert code == 0, err
    row = json.loads(out)["candidates"][0]
    d = row["decisions"]
    pins = [
        f"{key}={d[key]}"
        for key in ("pp", "dp", "cp", "tp", "zero", "micro_batch", "schedule", "recompute")
    ]
    fixed = [word for pin in pins for word in ("--fix", pin)]
    code, out, err = plan("trace", LLAMA, *TINY, "--hardware", row["hardware"], *fixed, "--json")
    assert code == 0, err
    assert json.loads(out)["estimate"]["step_time_s"] == pytest.approx(row["step_time_s"])
    assert json.loads(out)["estimate"]["peak_memory_bytes"] == row["peak_memory_bytes"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 64, "needs a --target"),
        (("--target", "tokens_per_s=1", "--objective", "cost"), 64, "need prices"),
        (("--target", "tokens_per_s=1", "--objective", "love"), 64, "--objective love"),
        (("--target", "tokens_per_s=1", "--hardware", "h100x8"), 64, "--max-gpus 8"),
        (("--target", "tokens_per_s=1", "--hardware", "t4"), 64, "computes in bf16"),
        (("--target", "tokens_per_s=1", "--assume", "luck=1"), 64, "no assumption"),
        (("--target", "tokens_per_s=1e15", "--hardware", "h100"), 3, "reaches the target"),
    ],
)
def test_what_cannot_be_meant_or_reached_says_why(plan, words, code, said):
    found, out, err = plan("size", LLAMA, *TINY, *words)
    assert (found, out) == (code, "")
    assert said in err


def test_the_whole_node_of_a_file_is_a_device(plan, tmp_path):
    (tmp_path / "mine.toml").write_text('base = "h100"\ncount = 16\n')
    (tmp_path / "prices.toml").write_text("[mine]\nusd_per_gpu_hour = 1.0\n")
    code, out, err = plan(*QUESTION, "--hardware", "mine.toml", "--prices", "prices.toml")
    assert code == 0, err
    assert "minex" in out and "to plan it" not in err
    assert load_hardware("mine.toml").count == 16
