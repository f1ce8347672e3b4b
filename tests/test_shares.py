"""Replicas on parts of several kinds: divided, costed and searched against enumeration; run."""

import itertools
import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import test_fleet as fleets
import test_runtime_experts as experts
import test_runtime_pipeline as pipelines
import test_verify_ledger as ledgers
from test_fleet import LLAMA, PAIR

from cost_models.collectives import collective_s
from cost_models.decisions import Decisions, Share, Workload
from cost_models.estimate import stage_problem, step_overhead, whole_step_ps
from cost_models.fleet import load_any
from cost_models.rank_ledger import tier_uses
from cost_models.share_rules import share_fault
from cost_models.shares import Bridge, SharedCosts, joined_ps
from cost_models.stage_problem import evaluate, tail_ps
from planner import trace
from planner.decisions import Pins, pins_of, recompute_words
from planner.decisions_json import decisions_from_json, decisions_json
from planner.export.pytorch import beyond_torch
from planner.fleet_planning import _planned
from planner.fleet_search import FleetSearch
from planner.fleet_search import searchers as searchers_of
from planner.legality import illegal, inconsistent
from planner.options import TraceOptions
from planner.plan import load, recost
from planner.runtime.verify.scale import smallest
from planner.score import score_of
from planner.share_space import ShareSearcher
from planner.share_splits import Division
from planner.stage_planes import ENDLESS
from planner.workload import resolve

# --- the division ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_divisions_equal_enumeration(seed):
    rng = random.Random(seed)
    ranks = [rng.choice((1, 2, 3, 4)) for _ in range(rng.choice((2, 2, 3)))]
    total = sum(ranks) + rng.randint(0, 20)
    times = [rng.randint(1, 30) for _ in ranks]
    first = [rng.randint(0, 9) for _ in ranks]  # less, where there is one micro-batch alone
    tails = [[rng.randint(0, 40) + more * m for m in range(total + 1)]
             for more in (rng.choice((0, 3)) for _ in ranks)]  # fmt: skip
    tails = [[min(row)] * 2 + sorted(row[2:]) if rng.random() < 0.5 else sorted(row)
             for row in tails]  # fmt: skip

    def pace(p):
        return lambda m: m * times[p] - (first[p] if m == 1 and first[p] < times[p] else 0)

    def allowed(division):
        return seed % 3 > 0 or max(division) % 2 == 0

    paces = [pace(p) for p in range(len(ranks))]
    floors = tuple(pace(1) for pace in paces)
    found = Division(total=total, ranks=tuple(ranks), paces=paces, floors=floors, allowed=allowed)
    every = [
        (max(pace(m) for pace, m in zip(paces, division)), division)
        for division in itertools.product(range(1, total + 1), repeat=len(ranks))
        if sum(n * m for n, m in zip(ranks, division)) == total and allowed(division)
    ]
    steps = [(makespan + max(row[m] for row, m in zip(tails, division)), division)
             for makespan, division in every]  # fmt: skip
    assert found.least_ps(10**9) == min((makespan for makespan, _ in every), default=None)
    after = [row.__getitem__ for row in tails]
    best = min(steps, default=None)
    assert found.best(after, 10**9) == best
    if best is not None:
        assert found.best(after, best[0]) is None
        assert found.best(after, best[0] + 1) == best


# --- the search --------------------------------------------------------------------------------


def replicas_of(seed, folder):
    """A random pair of small clusters, and the search of replicas on both."""
    graph, fleet, asked = fleets.tiny_fleet(seed, folder)
    asked = replace(asked, global_batch=random.Random(seed).choice((4, 6, 8)))
    workload, _ = resolve(graph, fleet, asked, Pins())
    options = TraceOptions(model="", asked=asked, effort=10**9)
    searchers = list(searchers_of(graph, fleet, workload, options))
    (found,) = [s for s in searchers if isinstance(s, ShareSearcher)]
    return graph, fleet, workload, searchers, found


def every_share(searcher, mesh, refused=()):
    """The least score of a mesh's plans that have none of what is refused: states, divisions and
    what each part computes again, each weighed from its parts' own stage problems."""
    away = {name for key, value in refused if key == "recompute" for name in value}
    gone = [row for row in refused if row[0] != "recompute"]
    costs, (n, k) = searcher.costs, searcher.data_ranks(mesh)
    laid = searcher.assign(mesh.tp, mesh.sequence_parallel)
    total, ranks = costs.workload.global_batch // mesh.micro_batch, (n + k) * mesh.cp
    layers, found = len(costs.chain.layers), []
    pairs = [(f, s) for f in range(layers + 1) for s in range(layers + 1 - f)
             if not (f and "full" in away) and not (s and "selective" in away)
             and not (f + s < layers and "none" in away)]  # fmt: skip
    for zero, reshard, shard, offload in itertools.product(
        range(4), (False, True), range(1, ranks + 1), ((), (("optimizer", "cpu"),))
    ):
        base = Decisions(
            dp=n + k, cp=mesh.cp, tp=mesh.tp, zero=zero, shard=shard, reshard=reshard,
            offload=offload, micro_batch=mesh.micro_batch, compile=costs.engine.fused,
            sequence_parallel=mesh.sequence_parallel, cp_kind=mesh.cp_kind, stages=(layers,),
        )  # fmt: skip
        if (reshard and zero != 3) or (shard == 1) != (zero == 0):
            continue
        for a in range(1, total + 1):
            b, left = divmod(total - n * a, k)
            shares = (Share(part="quick", dp=n, microbatches=a),
                      Share(part="slow", dp=k, microbatches=b))  # fmt: skip
            if left or b < 1:
                continue
            whole = replace(base, microbatches=max(a, b), shares=shares)
            if share_fault(whole) or illegal(whole, costs.workload):
                continue
            if any(getattr(whole, key) == value for key, value in gone):
                continue
            sides = []
            for side in costs.sides:
                step = side.own_step(whole, laid)
                p, own = stage_problem(side, step), step.decisions
                ways = []
                for pair in pairs:
                    objective, _, fits = evaluate(p, own.stages, (pair,))
                    cut = replace(own, recompute=(pair,))
                    uses = tier_uses([(side.cluster, step)], cut, p)
                    if fits and all(use.fits for use in uses):
                        ways.append(objective - tail_ps(p, own.stages))
                sides.append((ways, tail_ps(p, own.stages)))
            if all(ways for ways, _ in sides):
                makespan = max(min(ways) for ways, _ in sides)
                found.append(makespan + max(tail for _, tail in sides))
    return min((score_of(x, mesh) for x in found), default=None)


@pytest.mark.parametrize("seed", range(1, 6))
def test_search_of_replicas_equals_enumeration(seed, tmp_path):
    *_, searcher = replicas_of(seed, tmp_path)
    meshes = list(searcher.meshes())
    assert meshes
    every = {mesh: every_share(searcher, mesh) for mesh in meshes}
    best = min((x for x in every.values() if x is not None), default=None)
    out = searcher.run()
    assert (out.best and out.best.score) == best
    assert best is None or out.proved
    for mesh, low in zip(meshes, searcher.bounds(meshes).lower_ps):
        assert every[mesh] is None or score_of(int(low), mesh) <= every[mesh]


def test_replicas_that_a_part_has_no_memory_for_are_left_out():
    """Of those that are, enumeration has no plan that fits; the bound is below all others."""
    never, fits = 0, 0
    for seed in range(1, 11):
        _, searchers = fleets.short_of_memory(seed)
        (searcher,) = [s for s in searchers if isinstance(s, ShareSearcher)]
        meshes = list(searcher.meshes())
        for mesh, low in zip(meshes, fleets.memory_weighed(searcher, meshes)):
            least = every_share(searcher, mesh)
            assert least is None or low <= least
            never, fits = never + (low >= ENDLESS), fits + (least is not None)
    assert never and fits


def test_meshes_that_a_pinned_division_does_not_fill_are_left_out(tmp_path):
    """They have no division at all; to find that mesh by mesh took minutes where there is none."""
    *_, workload, _, searcher = replicas_of(1, tmp_path)
    meshes, names = list(searcher.meshes()), [part.name for part in searcher.clusters]
    count = {True: 0, False: 0}
    for said in itertools.product(range(1, 5), repeat=2):
        pinned = replace(searcher, pins=Pins(shares=tuple(zip(names, said))))
        kept = list(pinned.meshes())
        for mesh in meshes:
            one = pinned.division(mesh, [lambda m: m] * 2, [1, 1]).least_ps(10**9)
            assert (one is not None) == (mesh in kept)
            count[mesh in kept] += 1
    assert min(count.values()) > 0 and workload.global_batch > 1


@pytest.mark.parametrize("seed", range(4))
def test_what_is_found_is_what_its_estimate_says(seed, tmp_path):
    graph, fleet, workload, _, searcher = replicas_of(seed, tmp_path)
    found = FleetSearch(fleet=fleet, workload=workload)
    found.search(searcher)
    if found.best is None:
        return
    plan, e = _planned(graph, "two", found, Pins())
    assert plan.solver.status == "OPTIMAL" and e.fits
    assert e.step_time_ps == found.step_ps == sum(ps for _, ps in e.breakdown_ps)
    costs, d = searcher.costs, found.best.decisions
    assert isinstance(costs, SharedCosts)
    step = costs.step(d, found.best.assignments)
    steps = (replace(step, beside=()), *step.beside)
    problems = [stage_problem(side, one) for side, one in zip(costs.sides, steps)]
    objective, fits = joined_ps(problems, steps)
    assert fits and whole_step_ps(costs, objective) == e.step_time_ps
    idle = sum(
        share.dp * (objective - evaluate(p, one.decisions.stages, one.decisions.pairs)[0])
        for share, p, one in zip(d.shares, problems, steps)
    )
    host, _ = step_overhead(costs)
    assert host < e.step_time_ps
    assert abs(dict(e.breakdown_ps)["bubble"] - idle / d.dp) < 20  # picoseconds of rounding
    assert [rank.part for rank in e.ranks] == [share.part for share in d.shares]
    samples = sum(s.dp * s.microbatches * d.micro_batch for s in d.shares)
    assert samples == workload.global_batch and e.gpus == fleet.count


def test_a_collective_over_parts_goes_at_the_pace_of_the_slower_and_of_the_link_between():
    """Rings of one rank a node: by hand, from the wire; then the same through a said link."""
    fast, slow = load_any("h100x16"), load_any("a100x16")
    kind, size = "all_reduce", 4e9

    def bridge(between, *networks):
        return Bridge(networks=networks, between=between, network_share=1.0)

    alone = [bridge(None, one).collective_s(kind, size, [2], [8]) for one in (fast, slow)]
    assert alone[0] == float(collective_s(fast, kind, size, 2, 8))
    both = bridge(None, fast, slow).collective_s(kind, size, [1, 1], [8, 8])
    assert both == max(
        bridge(None, one, one).collective_s(kind, size, [1, 1], [8, 8]) for one in (fast, slow)
    )
    wire = 2 * (4 - 1) / 4 * size / slow.inter.useful_bytes_per_s
    four = bridge(None, fast, slow).collective_s(kind, size, [2, 2], [8, 8])
    assert wire < four < 1.1 * wire
    link = replace(slow.inter, bytes_per_s=1e9, efficiency=0.5, latency_s=1e-3)
    far = bridge(link, fast, slow).collective_s(kind, size, [2, 2], [8, 8])
    assert far == pytest.approx(2 * 3 / 4 * size / 0.5e9 + 4 * (1e-3 - slow.inter.latency_s))
    wide = bridge(link, fast, slow).collective_s(kind, size, [16, 16], [1, 1])
    assert wide == pytest.approx(2 * 31 / 32 * size / (8 * 0.5e9), rel=0.01)


# --- running -----------------------------------------------------------------------------------


def planned(hardware, *fix):
    """A plan of the small model with these replicas, in fp32."""
    model, loss = pipelines.cases.example("llama")
    return trace(
        model, pipelines.inputs, loss=loss, hardware=hardware, seq_len=16, global_batch=6,
        precision="fp32", engine="native", fix=("cp=1", "micro_batch=1", *fix),
    )  # fmt: skip


def test_parts_give_the_gradients_of_the_whole_model(world):
    """Two data ranks on each part, two micro-batches on one and one on the other: shards over all
    ranks and inside parts; then tp, and layers that one part alone computes again."""
    one = planned("h100x2+a100x2", "shares=h100:2,a100:1", "tp=1", "zero=1", "recompute=none")
    d, (quick, slow) = one.decisions, one.decisions.shares
    assert (quick.microbatches, slow.microbatches, d.dp, d.shares[0].dp) == (2, 1, 4, 2)
    ways = [{"shard": 4}, {"zero": 3, "shard": 2, "reshard": True}]
    own = replace(slow, recompute=((2, 1),))
    plans = [replace(one, decisions=replace(d, **way)) for way in ways]
    plans[-1] = replace(plans[-1], decisions=replace(plans[-1].decisions, shares=(quick, own)))
    two = planned("h100x2+a100x2", "shares=h100:4,a100:2", "tp=2", "zero=1")
    assert all(inconsistent(plan.decisions, plan.workload) is None for plan in (*plans, two))
    pipelines.run(world, 4, [("llama", plan) for plan in (*plans, two)])


def test_experts_lie_inside_a_part(world):
    """Routed among the ranks of a part with each micro-batch, reduced over both once a step."""
    plan = experts.planned("moe", dp=4, ep=2, zero=3, shard=2)
    shares = (Share(part="a", dp=2, microbatches=2), Share(part="b", dp=2, microbatches=1))
    d = replace(plan.decisions, microbatches=2, shares=shares, reshard=True)
    samples = d.micro_batch * sum(d.microbatches_by_data_rank)
    plan = replace(plan, decisions=d, workload=replace(plan.workload, global_batch=samples))
    assert inconsistent(d, plan.workload) is None
    experts.check(world, 4, ("moe", plan))


@pytest.mark.parametrize("fix", ["zero=1", "zero=3 shard=4 reshard=on"])
def test_the_ledger_of_a_part_is_what_its_ranks_hold_and_send(fix):
    shares = "tp=1 cp=1 pp=1 micro_batch=1 shares=h100:4,a100:2 "
    plan, _ = ledgers.assert_as_planned(
        "llama", "h100x4+a100x8", shares + fix, layers=1, global_batch=32
    )
    assert len(plan.decisions.shares) == 2


def test_a_batch_is_cut_by_shares():
    d = Decisions(dp=3, microbatches=4, shares=(Share(part="a", dp=1, microbatches=4),
                                                Share(part="b", dp=2, microbatches=1)))  # fmt: skip
    assert d.microbatches_by_data_rank == (4, 1, 1)
    assert [d.at_data_rank(r).microbatches for r in range(3)] == [4, 1, 1]
    alone = Decisions(dp=2, microbatches=3)
    assert alone.microbatches_by_data_rank == (3, 3) and alone.at_data_rank(1) is alone


# --- commands ----------------------------------------------------------------------------------


def test_replicas_of_other_counts_are_hinted_at(plan):
    """Where those that are pinned divide no batch: not that there be none."""
    code, _, err = plan("trace", LLAMA, *PAIR, "--fix", "shares=h100:20,a100:1")
    hint = next(line for line in err.split("\n") if "hint: without shares" in line)
    found = re.search(r"it fits: shares=h100:(\d+),a100:(\d+), ", hint)
    assert code == 3 and found and int(found[1]) > int(found[2])


def test_replicas_are_written_read_shown_checked_compared_and_exported(plan, tmp_path):
    assert plan("trace", LLAMA, *PAIR)[0] == 0
    path = tmp_path / "plan.json"
    text = path.read_text()
    raw, found = json.loads(text), load(str(path))
    shares = raw["decisions"]["shares"]
    assert list(shares) == ["h100", "a100"] and all("part" not in row for row in raw["stages"])
    d = found.decisions
    counts = {name: row["microbatches"] for name, row in shares.items()}
    assert counts["h100"] > counts["a100"] and d.microbatches == counts["h100"]
    assert sum(2 * n for n in counts.values()) * d.micro_batch == 32
    words = ",".join(f"{name}:{n}" for name, n in counts.items())
    code, shown, _ = plan("show")
    assert code == 0 and f"micro-batches {words} x {d.micro_batch}" in shown
    assert f"2 h100: {2 * counts['h100'] * d.micro_batch} samples" in shown and "bubble" in shown
    stage = plan("show", "--stage", "0")[1]
    assert "memory of pp rank 0 of h100" in stage and "memory of pp rank 0 of a100" in stage
    assert plan("check")[0] == plan("show", "--json")[0] == plan("diff", "plan.json")[0] == 0
    assert plan("trace", LLAMA, *PAIR, "--fix", "shares=none", "-o", "none.json")[0] == 0
    other = json.loads((tmp_path / "none.json").read_text())
    assert "shares" not in other["decisions"]
    assert raw["estimate"]["step_time_us"] < other["estimate"]["step_time_us"]
    code, out, _ = plan("diff", "none.json", "plan.json")
    assert "shares" in out and words in out
    again = replace(d, shares=(d.shares[0], replace(d.shares[1], recompute=((2, 1),))))
    assert decisions_from_json(decisions_json(again), d.stages, d.recompute) == again
    assert recompute_words(again) == "none, a100 full:2+selective:1"
    assert pins_of(again).shares == tuple(counts.items())
    assert "unequal shares of the batch" in beyond_torch(d)
    assert plan("report", "plan.json", "--no-why", "--trace", "step.json")[0] == 0
    page, events = (tmp_path / "report.html").read_text(), json.loads(
        (tmp_path / "step.json").read_text())["traceEvents"]  # fmt: skip
    assert f"runs {counts['h100']} on h100, {counts['a100']} on a100" in page
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    ops = Counter(names[e["pid"]] for e in events if e.get("cat") == "forward")
    assert ops == counts and not any(e["ph"] == "s" for e in events)
    step = [e for e in events if e.get("cat") == "step"]
    last = max(e["ts"] + e["dur"] for e in step)
    assert last == pytest.approx(recost(found, load_any("h100x2+a100x2")).step_time_ps / 1e6)
    code, _, err = plan("export", "plan.json", "--to", "megatron")
    assert code == 1 and "shares: every data rank" in err
    assert "hint: --hardware of one kind of GPU" in err
    for old, new, word in (
        ('"a100": {"dp": 2', '"b200": {"dp": 2', "b200"),
        ('"a100": {"dp": 2', '"a100": {"dp": 4', "data ranks"),
        ('"a100": {"dp": 2', '"a100": {"dp": "2"', "decisions.shares.a100"),
        ("h100x2+a100x2", "h100x4", "shares"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        code, _, err = plan("check")
        assert code == 1 and word in err, err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--engine", "megatron", "--fix", "shares=h100:3,a100:1"), 64, "as many micro-batches"),
        (("--fix", "shares=h100:3"), 64, "one part"),
        (("--fix", "shares=h100:3,b200:1"), 64, "no part 'b200'"),
        (("--fix", "shares=h100:3,h100:1"), 64, "h100:11,a100:5"),
        (("--fix", "shares=h100:3,a100:3"), 3, "no mesh"),
        (("--hardware", "h100x8", "--fix", "shares=h100:3,a100:1"), 64, "several kinds"),
    ],
)
def test_shares_that_are_refused_and_why(plan, words, code, said):
    found, _, err = plan("trace", LLAMA, *PAIR, *words)
    assert found == code and said in err, err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"zero": 1, "shard": 4}, None),
        ({"zero": 3, "shard": 4}, "inside a part"),
        ({"zero": 1, "shard": 3}, "inside one part"),
        ({"pp": 2}, "no pipeline"),
        ({"ep": 4}, "several parts"),
        ({"microbatches": 3}, "the most"),
        ({"dp": 6}, "data ranks"),
        ({"parts": (("a", 1),)}, "no stages of its own"),
    ],
)
def test_what_parts_may_share(changed, said):
    shares = (Share(part="a", dp=2, microbatches=2), Share(part="b", dp=2, microbatches=1))
    d = Decisions(dp=4, microbatches=2, shares=shares, stages=(4,))
    fault = share_fault(replace(d, **changed))
    assert fault is None if said is None else said in fault


def test_a_twin_keeps_the_shares():
    shares = (Share(part="a", dp=32, microbatches=3),
              Share(part="b", dp=64, microbatches=7, recompute=((9, 3),)))  # fmt: skip
    d = Decisions(dp=96, zero=1, shard=96, microbatches=7, shares=shares, stages=(32,))
    small, work = smallest(d, Workload(), 4, 32, 8, lambda *_: None)
    assert small.dp == small.shard == 2 and work.global_batch == 3
    assert [(s.part, s.dp, s.microbatches) for s in small.shares] == [("b", 1, 2), ("a", 1, 1)]
    assert small.shares[0].recompute == ((1, 1),) and small.recompute == ((0, 0),)
    assert len({d.at_data_rank(r).recompute for r in (0, 32)}) == 2
