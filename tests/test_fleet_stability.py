"""Of the plans of several kinds of GPUs within the share, none is nearer to the old plan, by trying
them all: parts alone, replicas on both, pipelines over both."""

import functools
import itertools
import json
from dataclasses import replace

import pytest
from enumerated import best_of_problem
from test_fleet import LLAMA, TINY, tiny_fleet

from cost_models.decisions import Decisions, Share
from cost_models.estimate import stage_problem, whole_step_ps
from cost_models.share_rules import share_fault
from cost_models.stage_problem import tail_ps
from planner import load
from planner.capturing import Clock
from planner.decisions import Pins, parse_pins
from planner.fleet_planning import _planned, attempt_fleet
from planner.fleet_search import FleetSearch, named, searchers
from planner.fleet_stability import as_of, steady_fleet
from planner.options import TraceOptions
from planner.share_space import ShareSearcher
from planner.stability import changed, distance, keeps
from planner.workload import resolve

EVERY = 10**9


@functools.cache
def every_way(seed):
    """A tiny fleet, and (step, decisions) of every way to hold and run a mesh on any of its parts,
    each with its best stages."""
    graph, fleet, asked = tiny_fleet(seed, None)
    asked = replace(asked, global_batch=4)
    workload, _ = resolve(graph, fleet, asked, Pins())
    options = TraceOptions(model="", asked=asked, hardware="two", effort=EVERY)
    found = []
    for searcher in searchers(graph, fleet, workload, options):
        tried = shared_ways if isinstance(searcher, ShareSearcher) else ways
        found += [
            (whole_step_ps(searcher.costs, least), named(d, searcher.costs))
            for least, d in tried(searcher)
        ]
    return graph, fleet, options, found


def ways(searcher):
    costs = searcher.costs
    for mesh in filter(searcher.runs, searcher.meshes()):
        laid = searcher.assign(mesh.tp, mesh.sequence_parallel)
        held = [way for d in searcher.variants(mesh) for way in (d, *searcher.by_count(d))]
        for d in (made for one in held for made in searcher.schedules(one)):
            step = costs.step(d, laid)
            default = searcher.problem(step, d)
            others = [p for _, p in searcher.kept_otherwise(step, d, default)]
            steps = [x for p in (default, *others) if (x := best_of_problem(p)) is not None]
            if steps:
                yield min(steps), d


def shared_ways(searcher):
    costs = searcher.costs
    for mesh in filter(searcher.runs, searcher.meshes()):
        laid = searcher.assign(mesh.tp, mesh.sequence_parallel)
        total, ranks = costs.workload.global_batch // mesh.micro_batch, searcher.data_ranks(mesh)
        counts = itertools.product(*(range(1, total + 1) for _ in ranks))
        divided = [c for c in counts if sum(n * m for n, m in zip(ranks, c)) == total]
        for d in (made for one in searcher.variants(mesh) for made in searcher.schedules(one)):
            for each in divided:
                shares = tuple(Share(part=s.part, dp=s.dp, microbatches=m)
                               for s, m in zip(d.shares, each))  # fmt: skip
                whole = replace(d, shares=shares, microbatches=max(each))
                makespans, tails = [], []
                assert share_fault(whole) is None
                for side in costs.sides:
                    p = stage_problem(side, side.own_step(whole, laid))
                    best = best_of_problem(p)
                    if best is None:
                        break
                    tails.append(tail_ps(p, (p.layers,)))
                    makespans.append(best - tails[-1])
                else:
                    yield max(makespans) + max(tails), whole


def old_plans(seed):
    """The best plan of each search alone: of each part, of replicas, of each pipeline."""
    graph, fleet, options, _ = every_way(seed)
    workload, _ = resolve(graph, fleet, options.asked, Pins())
    for searcher in searchers(graph, fleet, workload, options):
        found = FleetSearch(fleet=fleet, workload=workload)
        found.search(searcher)
        if found.best is not None:
            yield _planned(graph, "two", found, Pins())


@pytest.mark.parametrize("seed", [0, 1, 10])
def test_no_plan_within_the_share_is_nearer(seed):
    graph, fleet, options, every = every_way(seed)
    quick, searched = attempt_fleet(graph, options, fleet, Clock())
    assert quick.plan.solver.status == "OPTIMAL"
    best = quick.estimate.step_time_ps
    stayed = 0
    for old, made in old_plans(seed):
        far = [(step, tuple(map(len, changed(old.decisions, d)))) for step, d in every]
        far.append((made.step_time_ps, (0, 0, 0)))  # it may lay fewer layers' state below
        for share in (0.0, 0.02, 0.3, 3.0, 30.0):
            search = replace(searched)
            words = steady_fleet(search, old, share)
            plan, e = _planned(graph, "two", search, Pins())
            limit = best + round(share * 1e6) * best // 1_000_000
            d = plan.decisions
            assert e.step_time_ps == search.step_ps <= limit
            near = min(away for step, away in far if step <= limit)
            assert distance(old.decisions, d)[:3] == near, (share, d)
            if made.step_time_ps <= limit:
                assert d == old.decisions
                stayed += 1
            assert ("nothing" in words) == (distance(old.decisions, d) == (0,) * 5)
            # the bound stays that of the search
            assert (plan.solver.status == "OPTIMAL") == (e.step_time_ps == best)
            assert search.bound_ps() <= best
    assert stayed > 2
    asked = replace(options, old=old, base="old.json", stability=30.0)
    found, _ = attempt_fleet(graph, asked, fleet, Clock())
    assert found.plan == plan and f"old.json: {words}" in found.echo


def test_distances_over_parts():
    pipe = Decisions(pp=2, dp=2, stages=(2, 1), parts=(("quick", 1), ("slow", 1)))
    assert distance(pipe, replace(pipe, parts=(("slow", 1), ("quick", 1))))[:3] == (1, 0, 0)
    assert distance(pipe, replace(pipe, stages=(1, 2))) == (0, 0, 0, 1, 0)
    shares = (Share(part="quick", dp=2, microbatches=3), Share(part="slow", dp=2, microbatches=1))
    both = Decisions(dp=4, microbatches=3, shares=shares, stages=(3,))
    less = (replace(shares[0], microbatches=2), replace(shares[1], microbatches=2))
    assert distance(both, replace(both, shares=less, microbatches=2)) == (0, 0, 1, 0, 0)
    again = (shares[0], replace(shares[1], recompute=((2, 0),)))
    assert distance(both, replace(both, shares=again)) == (0, 0, 0, 0, 2)
    (pins,) = [parse_pins(["shares=slow:1,quick:3"])]
    assert keeps(pins, both) and not keeps(pins, replace(both, shares=less))


def test_a_plan_of_one_kind_is_one_of_the_part_of_that_name(plan, tmp_path):
    assert plan("trace", LLAMA, "--hardware", "h100x2", *TINY, "-o", "old.json")[0] == 0
    again = ("trace", "--hardware", "h100x2+a100x2", "--base", "old.json")
    code, out, err = plan(*again, "--stability", "2%")
    assert code == 0 and ("old.json: changes" in out or "best plan changes least" in out), err
    assert load("plan.json").decisions.gpus == 4
    code, out, err = plan(*again, "--stability", "900%")
    assert code == 0 and "old.json: changes nothing" in out, err
    kept, old = load("plan.json"), load("old.json")
    assert kept.decisions == replace(old.decisions, parts=(("h100", old.decisions.pp),))
    assert kept.solver.status == "FEASIBLE" and kept.solver.gap_ppm > 0
    assert json.loads((tmp_path / "plan.json").read_text())["solver"]["bound_us"] > 0
    from cost_models.fleet import load_any

    fleet = load_any("h100x2+a100x2")
    assert as_of(replace(old, hardware="b200x8"), fleet).decisions == old.decisions
