"""Cost, energy and goodput on hardware of several kinds: from first principles, and the plans that
are chosen for them against enumeration."""

import functools
import json
import math
import random
from dataclasses import replace

import pytest
from test_fleet import LLAMA, PAIR, PIPED, TINY, tiny_fleet
from test_why_fleet import every_objective
from tiny_models import graph_of

from cost_models.decisions import Decisions, Share
from cost_models.estimate import estimate, whole_step_ps
from cost_models.fleet import load_any, parts_of, used_parts
from cost_models.goodput import checkpoint_bytes, goodput, inputs, most_useful
from cost_models.operations import Operations
from cost_models.prices import Price
from ir.errors import InfeasibleError
from planner.asking import estimated
from planner.capturing import Clock
from planner.charges import charges
from planner.check import Checked
from planner.decisions import Pins
from planner.fleet_planning import attempt_fleet, plan_fleet
from planner.fleet_search import searchers
from planner.limits import Limits
from planner.objectives import plan_within
from planner.options import TraceOptions
from planner.plan import load, recost
from planner.report.verdict import proof
from planner.workload import resolve

EVERY = 10**9
CALM = Operations(failures_per_gpu_hour=0.0)
LLAMA3 = 419 / (54 * 24 * 16_384)  # failures a GPU hour, as docs/size.md has them


def price(name, usd, spot=None, taken=None):
    return Price(device=name, usd_per_gpu_hour=usd, spot_usd_per_gpu_hour=spot,
                 spot_preemptions_per_gpu_hour=taken)  # fmt: skip


# --- goodput -----------------------------------------------------------------------------------


def planned(d, spec="h100x8+a100x16", layers=4):
    graph, hardware = graph_of("llama", size="8b", n_layers=layers), load_any(spec)
    workload = replace(resolve_of(graph, hardware), global_batch=48, seq_len=2048)
    return graph, hardware, workload, d, estimate(graph, hardware, workload, d, {})


def resolve_of(graph, hardware):
    return resolve(graph, hardware, TraceOptions(model="").asked, Pins())[0]


def test_replicas_on_parts_write_a_share_a_gpu_and_the_slowest_node_is_waited_for():
    """Every GPU writes a 24th: a node of 8 a third, at its own part's rate; any of 24 GPUs' failure
    stops all."""
    shares = (Share(part="h100", dp=8, microbatches=4), Share(part="a100", dp=16, microbatches=1))
    d = Decisions(dp=24, zero=1, shard=24, microbatches=4, shares=shares, stages=(4,), compile=True)
    graph, fleet, workload, d, e = planned(d)
    whole = checkpoint_bytes(graph, workload)
    slow = replace(fleet.parts[1], tiers=tuple(
        replace(t, write_bytes_per_s=t.write_bytes_per_s / 10, read_bytes_per_s=1e9)
        for t in fleet.parts[1].tiers
    ))  # fmt: skip
    fleet = replace(fleet, parts=(fleet.parts[0], slow))
    row = goodput(graph, fleet, workload, d, e, Operations())[-1]
    node = math.ceil(whole / 3)
    assert (row.tier, row.node_bytes, row.read_bytes) == ("nvme", node, node)
    assert row.write_s == pytest.approx(node / slow.tier("nvme").write_bytes_per_s)
    assert row.restart_s == pytest.approx(600 + node / 1e9)
    assert row.mtbf_s == pytest.approx(3600 / (24 * LLAMA3))
    # an h100 has 4 samples a step, an a100 one, which its slow tier must give; targets are stored
    # with the tokens, of 8 bytes
    sample = 2048 * 8
    read = inputs(graph, fleet, workload, d, 0.5, Operations())
    assert (read.node_bytes_per_s, read.sample_bytes) == (8 * 1 * sample / 0.5, sample)
    assert read.share == pytest.approx(8 * sample / 0.5 / 1e9)
    usual = inputs(graph, load_any("h100x8+a100x16"), workload, d, 0.5, Operations())
    assert usual.node_bytes_per_s == 8 * 4 * sample / 0.5
    few = replace(slow, tiers=slow.tiers[:1])
    rows = goodput(graph, replace(fleet, parts=(fleet.parts[0], few)), workload, d, e, Operations())
    assert [row.tier for row in rows] == ["cpu"]  # one that both have


def test_a_pipeline_over_parts_writes_what_each_stage_holds():
    """One stage on 8 H100s, then two of 8 A100s each: the busiest node is the one whose stage has
    most."""
    d = Decisions(
        pp=3, dp=8, zero=1, shard=8, microbatches=6, stages=(2, 1, 1), compile=True,
        parts=(("h100", 1), ("a100", 2)),
    )  # fmt: skip
    graph, fleet, workload, d, e = planned(d)
    whole, held = checkpoint_bytes(graph, workload), [rank.parameters for rank in e.ranks]
    nodes = [whole * n / sum(held) for n in held]
    row = goodput(graph, fleet, workload, d, e, Operations())[-1]
    h100, a100 = (part.tier("nvme").write_bytes_per_s for part in fleet.parts)
    assert row.node_bytes == math.ceil(max(nodes))
    assert row.write_s == pytest.approx(
        max(nodes[0] / h100, nodes[1] / a100, nodes[2] / a100), rel=1e-6
    )
    # as wide a tp on the second part: its stage has all 16
    wide = replace(d, pp=2, tp=2, tp_by_part=(("h100", 1), ("a100", 2)), stages=(2, 2),
                   parts=(("h100", 1), ("a100", 1)), microbatches=6)  # fmt: skip
    made = replace(e, ranks=e.ranks[:2])
    (_, row) = goodput(graph, fleet, workload, wide, made, Operations())
    assert row.node_bytes == math.ceil(max(held[0], held[1] / 2) / sum(held[:2]) * whole)


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_is_useful_for_more_of_the_time_than_is_said_of_its_parts(seed, tmp_path):
    rng = random.Random(seed)
    graph, fleet, asked = tiny_fleet(seed, tmp_path)
    under = Operations(failures_per_gpu_hour=rng.choice((1e-3, 0.3)), restart_s=rng.choice((0, 60)))
    workload, _ = resolve(graph, fleet, asked, Pins())
    options = TraceOptions(model="", asked=asked, effort=30)
    for searcher in searchers(graph, fleet, workload, options):
        best = searcher.run().best
        if best is None:
            continue
        d = best.decisions
        if not (d.parts or d.shares):
            d = replace(d, parts=((searcher.costs.cluster.name, d.pp),))
        e = estimate(graph, fleet, workload, d, {}) if d.tp == 1 else None
        rows = goodput(graph, fleet, workload, d, e, under) if e else ()
        most = most_useful(graph, used_parts(fleet, d), workload, under)
        assert all(row.useful <= most * (1 + 1e-9) for row in rows)


# --- cost and energy -----------------------------------------------------------------------------


@functools.cache
def enumerated_steps(seed):
    """(parts, least step of any plan on all of their GPUs), of every sum of the parts of a tiny
    fleet; of one part alone its own search, which test_search enumerates."""
    graph, fleet, asked = tiny_fleet(seed, None)
    workload, _ = resolve(graph, fleet, asked, Pins())
    options = TraceOptions(model="", asked=asked, effort=EVERY, gain_ppm=0)
    found = {}
    for searcher in searchers(graph, fleet, workload, options):
        names = tuple(sorted(part.name for part in searcher.clusters))
        if len(names) == 1:
            out = searcher.run()
            least = out.best and out.best.objective_ps
        else:
            every = every_objective(searcher, fleet, ())
            least = min((x for _, x in every if x is not None), default=None)
        if least is not None:
            step = whole_step_ps(searcher.costs, least)
            found[names] = min(step, found.get(names, step))
    return graph, fleet, asked, found


def asked_for(asked, **more):
    return TraceOptions(model="", asked=asked, hardware="two", effort=EVERY, gain_ppm=0,
                        operations=CALM, **more)  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 10, 11])
@pytest.mark.parametrize("objective", ["cost", "energy"])
def test_the_plan_of_least_cost_or_energy_is_that_of_enumeration(seed, objective):
    """Of every sum of parts its GPUs' price, or power, times the least step of any plan on them."""
    graph, fleet, asked, steps = enumerated_steps(seed)
    rng = random.Random(seed)
    usd = {part.name: rng.choice((1.0, 2.0, 4.0)) for part in fleet.parts}
    each = {
        part.name: part.count * (usd[part.name] if objective == "cost" else part.device.power_w)
        for part in fleet.parts
    }
    least = min(sum(each[n] for n in names) * step for names, step in steps.items())
    prices = {name: price(name, x) for name, x in usd.items()}
    options = asked_for(asked, objective=objective, prices=prices)
    found, search = attempt_fleet(graph, options, fleet, Clock())
    names = tuple(sorted(part.name for part in used_parts(fleet, found.plan.decisions)))
    e, solver = found.estimate, found.plan.solver
    assert sum(each[n] for n in names) * e.step_time_ps == pytest.approx(least, rel=1e-9)
    assert (solver.status, solver.gap_ppm, solver.objective) == ("OPTIMAL", 0, objective)
    tokens = e.tokens
    if objective == "cost":
        usd_each = sum(each[n] for n in names) / 3600 * e.step_time_s / tokens * 1e6
        assert found.charges.usd_per_million_tokens == pytest.approx(usd_each)
        assert search.value == pytest.approx(usd_each)
    else:
        watts = sum(each[n] for n in names) * CALM.pue
        assert search.value == pytest.approx(watts * e.step_time_s / tokens)


@pytest.mark.parametrize("seed", [0, 10])
def test_a_limit_of_cost_gives_the_quickest_plan_that_keeps_it(seed):
    graph, fleet, asked, steps = enumerated_steps(seed)
    usd = {"quick": 4.0, "slow": 1.0}
    prices = {name: price(name, x) for name, x in usd.items()}
    counts = {part.name: part.count for part in fleet.parts}
    tokens = asked.global_batch * asked.seq_len

    def cost(names):
        hourly = sum(counts[n] * usd[n] for n in names)
        return hourly / 3600 * steps[names] / 1e12 / tokens * 1e6

    costs = sorted(map(cost, steps))
    for limit in (*(x * 1.0001 for x in costs), costs[0] * 0.99):
        within = [step for names, step in steps.items() if cost(names) <= limit]
        options = asked_for(asked, prices=prices, limits=Limits(usd_per_million_tokens=limit))
        found, _ = attempt_fleet(graph, options, fleet, Clock())
        if not within:
            assert found is None
            with pytest.raises(InfeasibleError) as fault:
                plan_fleet(graph, options, fleet, Clock())
            assert f"the least costs {costs[0]:.4g}" in fault.value.why
            least = float(fault.value.hints[0].split()[1].rstrip(":"))
            assert costs[0] <= least <= 1.001 * costs[0]  # kept where it is typed
            continue
        assert found.estimate.step_time_ps == min(within)
        assert found.plan.solver.status == "OPTIMAL" and found.charges.least_usd <= limit


def test_failures_and_spot_machines_decide_what_costs_least():
    """On spot a job loses more time the more GPUs it has; a device without a spot price is on
    demand in the sum. What is chosen is what costs least of the plans that were found."""
    graph, fleet, asked = tiny_fleet(10, None)
    under = Operations(failures_per_gpu_hour=0.01)
    prices = {"quick": price("quick", 4.0, 1.0, 3.0), "slow": price("slow", 1.0)}
    workload, _ = resolve(graph, fleet, asked, Pins())
    options = replace(asked_for(asked, objective="cost", prices=prices), operations=under)
    found, search = attempt_fleet(graph, options, fleet, Clock())
    every = []
    for searcher in searchers(graph, fleet, workload, options):
        best = searcher.run().best
        if best is not None:
            d = best.decisions
            if not (d.parts or d.shares):
                d = replace(d, parts=((searcher.costs.cluster.name, d.pp),))
            e = estimated(searcher.costs, best.decisions, best.assignments)
            every.append(charges(graph, fleet, workload, d, e, under, prices).least_usd)
    assert found.charges.least_usd == pytest.approx(min(every))
    assert search.bound() <= search.value == pytest.approx(found.charges.least_usd)
    parts = parts_of(fleet)
    hourly = [p.count for p in parts]
    d = Decisions(dp=sum(hourly), shares=tuple(
        Share(part=p.name, dp=p.count, microbatches=1) for p in parts
    ))  # fmt: skip
    both = charges(graph, fleet, workload, d, found.estimate, under, prices)
    mtbf_s = 3600 / (sum(hourly) * 0.01 + hourly[0] * 3.0)
    assert both.spot_goodput.mtbf_s == pytest.approx(mtbf_s)
    rate = both.spot_expected_tokens_per_s
    assert both.spot_usd_per_million_tokens == pytest.approx(
        (hourly[0] * 1.0 + hourly[1] * 1.0) / 3600 / rate * 1e6
    )


def test_a_range_of_batches_is_planned_for_what_the_objective_says():
    graph, fleet, asked = tiny_fleet(10, None)
    prices = {"quick": price("quick", 4.0), "slow": price("slow", 1.0)}
    options = replace(asked_for(asked, objective="cost", prices=prices), effort=100)
    each = {}
    for batch in (2, 4):
        one = replace(options, asked=replace(asked, global_batch=batch))
        each[batch] = plan_fleet(graph, one, fleet, Clock()).charges.least_usd
    found = plan_within(graph, replace(options, batches=(2, 4)), fleet, Clock())
    assert found.charges.least_usd == min(each.values())
    assert "least cost a token of the ranges" in found.echo[-1]


@pytest.mark.parametrize(("objective", "word"), [("cost", "cheaper"), ("time", "better"),
                                                 ("energy", "of less energy")])  # fmt: skip
def test_a_report_says_what_its_proof_is_of(objective, word):
    graph, fleet, asked = tiny_fleet(10, None)
    prices = {"quick": price("quick", 4.0), "slow": price("slow", 1.0)}
    options = asked_for(asked, objective=objective, prices=prices)
    plan = plan_fleet(graph, replace(options, effort=100), fleet, Clock()).plan
    for status, gap in (("OPTIMAL", 0), ("FEASIBLE", 20_000)):
        solver = replace(plan.solver, status=status, gap_ppm=gap, axis_gain_ppm=20_000)
        said = proof(Checked(plan=replace(plan, solver=solver), hardware=fleet,
                             estimate=recost(plan, fleet), inputs=(), stale=False))  # fmt: skip
        of = f" of {objective}" if objective != "time" else ""
        assert (f"2.00%{of} can be gained" if gap else f" {word} by 2% an axis") in said


# --- commands ------------------------------------------------------------------------------------


def test_the_commands_plan_for_cost_and_say_it(plan, tmp_path):
    (tmp_path / "prices.toml").write_text(
        "[h100]\nusd_per_gpu_hour = 4.0\n[a100]\nusd_per_gpu_hour = 1.0\n"
    )
    priced = (*PAIR, "--prices", "prices.toml")
    code, out, err = plan("trace", LLAMA, *priced, "--objective", "cost")
    assert code == 0 and "the plan uses a100x2" in out and "no cheaper plan" in out, err
    assert "on demand:" in out and "costs less by 2% an axis" in out
    assert "spot" not in out
    found = load("plan.json")
    assert found.solver.objective == "cost" and found.decisions.gpus == 2
    assert json.loads((tmp_path / "plan.json").read_text())["solver"]["objective"] == "cost"
    assert json.loads(plan("show", "--json")[1])["solver"]["objective"] == "cost"
    assert plan("check")[0] == 0
    code, out, err = plan("why", "--not", "zero=1", "--effort", "20")
    assert code == 0, err
    code, out, err = plan("trace", LLAMA, *priced, "--json")
    assert code == 0, err
    dear = json.loads(out)
    assert "objective" not in dear["solver"]  # of time: as files before had it
    usd = dear["estimate"]["usd_per_million_tokens"]
    code, out, err = plan("show", "--goodput", "--prices", "prices.toml", "--json")
    assert code == 0, err
    assert json.loads(out)["cost"]["usd_per_million_tokens"] == pytest.approx(usd)
    code, out, err = plan("trace", LLAMA, *priced, "--max-cost", f"{usd * 0.9}", "--json")
    assert code == 0 and json.loads(out)["estimate"]["usd_per_million_tokens"] <= usd * 0.9, err
    code, out, err = plan("trace", LLAMA, *priced, "--max-cost", "1e-9")
    assert code == 3 and "over --max-cost" in err
    code, out, err = plan("trace", LLAMA, *priced[:-2], "--objective", "energy")
    assert code == 0 and "takes less energy" in out and "J a token" in out, err


def test_a_plan_file_names_an_objective_that_there_is(plan, tmp_path):
    assert plan("trace", LLAMA, *PAIR, *PIPED)[0] == 0
    path = tmp_path / "plan.json"
    raw = json.loads(path.read_text())
    assert "objective" not in raw["solver"]
    raw["solver"]["objective"] = "fame"
    path.write_text(json.dumps(raw))
    code, _, err = plan("check")
    assert code == 1 and "solver.objective" in err and "cost" in err
    code, out, err = plan("trace", LLAMA, *PAIR, *PIPED)
    code, out, err = plan("show", "--goodput")
    assert code == 0 and "useful" in out, err


def test_cost_of_several_kinds_needs_the_price_of_each(plan, tmp_path):
    (tmp_path / "prices.toml").write_text("[h100]\nusd_per_gpu_hour = 4.0\n")
    code, _, err = plan("trace", LLAMA, *PAIR, "--objective", "cost")
    assert code == 64 and "--prices FILE" in err
    code, _, err = plan("trace", LLAMA, *PAIR, "--objective", "cost", "--prices", "prices.toml")
    assert code == 64 and "no price of a100" in err


SPOT = "spot_usd_per_gpu_hour = {}\nspot_preemptions_per_gpu_hour = 0.002\n"


@pytest.mark.parametrize(("h100", "a100", "uses", "by"), [
    (0.1, None, "h100x2", "by spot prices; on demand where a device has none"),
    (0.1, 0.9, "h100x2", "by spot prices"),
    (4.0, None, "a100x2", "by the lesser of on demand and spot; for this plan on demand"),
])  # fmt: skip
def test_which_price_decided_is_said(h100, a100, uses, by, plan, tmp_path):
    """Who pays on demand would have another plan: both lines that depend on it say so."""
    text = f"[h100]\nusd_per_gpu_hour = 4.0\n{SPOT.format(h100)}[a100]\nusd_per_gpu_hour = 1.0\n"
    (tmp_path / "prices.toml").write_text(text + (SPOT.format(a100) if a100 else ""))
    priced = ("--prices", "prices.toml", "--objective", "cost")
    code, out, err = plan("trace", LLAMA, *PAIR, *priced)
    assert code == 0 and f"the plan uses {uses}" in out, err
    said = " ".join(out.split())
    assert f"is idle: no cheaper plan was found with it, {by}" in said
    assert f"--objective cost: counted {by}" in said
    code, out, err = plan("trace", LLAMA, "--hardware", "h100x2", *TINY, "--prices", "prices.toml",
                          "--max-cost", "1000")  # fmt: skip
    word = "by spot prices" if h100 < 4 else "for this plan on demand"
    assert code == 0 and "--max-cost 1000: counted by" in out and word in " ".join(out.split()), err
