"""Offload by count of layers, the tiers below the device, and formats of gradients by leave."""

import itertools
import json
from dataclasses import replace

import pytest
from enumerated import difference, least_by_mesh
from random_problems import BIG_MOE, INTER, SMALL, WIDE, make, small_cluster
from tiny_models import costs_of, graph_of

from cost_models.decisions import Decisions
from cost_models.estimate import estimate_step, stage_problem
from cost_models.hardware import load_hardware
from cost_models.stage_problem import evaluate
from cost_models.tiers import Tier, fullest
from ir.errors import InfeasibleError, PlanError, UsageError
from planner.decisions import Pins, parse_pins
from planner.decisions_json import decisions_from_json, decisions_json
from planner.infeasible import infeasible
from planner.legality import illegal, inconsistent
from planner.mesh import meshes
from planner.offloads import keeps_offload, off_host, offload_words
from planner.pin_checks import check_pins
from planner.refused import Without
from planner.search import Searcher

H100 = load_hardware("h100x8")
LAYERS, LINK = 4, 5e10  # bytes/s of one GPU's link
SOME = (("activations", "cpu:1"),)
BASE = Decisions(
    dp=8, zero=1, shard=8, micro_batch=1, microbatches=2, compile=False, stages=(LAYERS,),
    recompute=((1, 0),),
)  # fmt: skip
OPTIMIZER = (("optimizer", "cpu"),)


def stepped(d, cluster=H100, **workload):
    """(costs, step, estimate) of Llama 8B cut to four layers, 8,192 tokens a sample."""
    graph = graph_of("llama", size="8b", n_layers=LAYERS)
    costs = costs_of(
        graph, cluster, **{"seq_len": 8192, "global_batch": 16, "engine": "native", **workload}
    )
    step = costs.step(d, Searcher(costs=costs).assign(1, False))
    return costs, step, estimate_step(costs, step, d)


def layer(step):
    return step.row(step.chain.layers[0])


def test_some_layers_lie_on_the_host():
    """Of four layers the first is recomputed, the second is below: it takes its copies' time,
    keeps nothing, and two layers' activations are there while they are copied."""
    d = replace(BASE, offload=SOME)
    costs, step, e = stepped(d)
    _, above, plain = stepped(BASE)
    row, was = layer(step), layer(above)
    assert (d.moved, d.pairs, d.tiers) == ((1,), ((1, 1),), {"activations": "cpu"})
    kept, seconds = was.kept[0], was.kept[0] / LINK
    unit = step.chain.links[step.chain.layers[0]].unit
    point = costs.at(d, unit, True, Searcher(costs=costs).assign(1, False)[unit, True])
    share = costs.engine.fsdp_interference
    each = sum(max(share * seconds, seconds - hidden) for hidden in point.kernels_s)
    assert row.again_ps[0] == pytest.approx(each * 1e12, abs=2)
    assert row.kept == (kept, 0, was.kept[2]) and row.aside == (0, kept, 0)
    assert row.working[1] == was.working[0] + 2 * kept
    assert (row.forward, row.backward, row.again_ps[1]) == (
        was.forward, was.backward, was.again_ps[1],
    )  # fmt: skip
    before, after = (dict(x.breakdown_ps) for x in (plain, e))
    assert after["offload"] == row.again_ps[0] * d.microbatches
    assert after["recompute"] == before["recompute"]
    held = [dict(x.ranks[0].memory_bytes)["activations"] for x in (plain, e)]
    assert held[0] - held[1] == kept
    assert [(use.name, use.used_bytes, use.gpus) for use in e.tiers] == [("cpu", 8 * kept, 8)]


def test_the_step_by_count_is_made_of_the_plain_one():
    """The search derives it; it is what costing the decisions anew gives."""
    costs, plain, _ = stepped(BASE)
    d = replace(BASE, offload=(*OPTIMIZER, ("activations", "cpu:")))
    laid = Searcher(costs=costs).assign(1, False)
    below = costs.step(replace(BASE, offload=OPTIMIZER), laid)
    assert costs.counted(below, d, laid) == costs.step(d, laid)
    assert costs.counted(plain, replace(BASE, offload=SOME), laid) == costs.step(
        replace(BASE, offload=SOME), laid
    )


def test_state_on_a_tier_is_counted_by_node():
    """FSDP2 keeps fp32 parameters and gradients in memory, and Adam's moments beside them or on
    the disk; eight GPUs share both, and a pool is shared by as many as its row says."""
    d = replace(BASE, offload=OPTIMIZER, recompute=((0, 0),))
    _, step, e = stepped(d)
    updated = sum(row.state.updated for row in map(step.row, range(len(step.chain.links))))
    shards = sum(row.state.shard for row in map(step.row, range(len(step.chain.links))))
    memory = 4 * (shards + updated)
    assert [(t.name, t.used_bytes) for t in e.tiers] == [("cpu", 8 * (memory + 8 * updated))]
    pool = Tier(name="cxl", bytes=10**12, read_bytes_per_s=4e10, write_bytes_per_s=2e10, gpus=4)
    cluster = replace(H100, tiers=(*H100.tiers, pool))
    _, on_pool, e = stepped(replace(d, offload=(("optimizer", "cxl"),)), cluster)
    assert {t.name: (t.used_bytes, t.gpus) for t in e.tiers} == {
        "cpu": (8 * memory, 8), "cxl": (4 * 8 * updated, 4),
    }  # fmt: skip
    # the pool's four GPUs read and write their moments at its rates
    more = 4 * 8 * layer(on_pool).state.updated * (1 / 4e10 + 1 / 2e10) * 1e12
    assert layer(on_pool).offload_ps - layer(step).offload_ps == pytest.approx(more, rel=1e-9)


@pytest.mark.parametrize(("pp", "dp", "tp", "outer"), [(4, 2, 2, 1), (4, 4, 1, 2), (2, 3, 2, 1)])
@pytest.mark.parametrize("gpus", [1, 2, 4, 6, 8, 16])
def test_the_fullest_gpus_in_a_row(pp, dp, tp, outer, gpus):
    d = Decisions(pp=pp, dp=dp, tp=tp, dp_outer=outer)
    held = [7, 1, 9, 3][:pp]
    each = d.pipeline // pp
    by_gpu = [held[i % d.pipeline // each] for i in range(d.gpus)]
    groups = [sum(by_gpu[i : i + gpus]) for i in range(0, d.gpus, gpus)]
    assert fullest(d, held, gpus) == max(groups)


def small_host(gigabytes, disk=True):
    cpu, nvme = H100.tiers
    tiers = (replace(cpu, bytes=int(gigabytes * 1e9)), nvme)
    return replace(H100, count=1, tiers=tiers[: 1 + disk])


def searcher(cluster, pins=(), megabytes=22_000, **workload):
    device = replace(cluster.device, memory_bytes=megabytes * 10**6)
    graph = graph_of("llama", size="8b", n_layers=LAYERS)
    costs = costs_of(
        graph, replace(cluster, device=device),
        **{"seq_len": 2048, "global_batch": 2, "engine": "native", **workload},
    )  # fmt: skip
    found = meshes(costs.chain, costs.cluster, costs.workload, Pins())
    costs.points = tuple(dict.fromkeys([(1, 1), *((m.micro_batch, m.cp) for m in found)]))
    return Searcher(costs=costs, pins=parse_pins(pins))


def test_a_full_tier_is_named_and_the_next_one_is_used():
    """Llama of four wide layers has 1.9 G parameters: 16 bytes each are 31 GB of a host's memory,
    8 of them Adam's moments, which may lie on the disk."""
    plain = searcher(small_host(100)).run()
    assert plain.best.decisions.tiers["optimizer"] == "cpu" and plain.full is None
    disk = searcher(small_host(20)).run()
    assert disk.best.decisions.tiers["optimizer"] == "nvme"
    assert disk.best.objective_ps > plain.best.objective_ps
    assert disk.full is not None and disk.full.name == "cpu"
    tight = searcher(small_host(20, disk=False))
    out = tight.run()
    assert out.best is None
    with pytest.raises(InfeasibleError) as fault:
        raise infeasible(tight, out)
    assert "tier cpu 30." in fault.value.why and "of 20.0 GB, for one GPU" in fault.value.why


def test_offload_never_where_it_fits():
    out = searcher(H100, megabytes=80_000, global_batch=16).run()
    assert out.best.decisions.offload == () and out.proved


FREE = Pins()


def test_state_goes_from_the_host_to_any_other_tier():
    pool = Tier(name="cxl", bytes=10**12, read_bytes_per_s=9e10, write_bytes_per_s=9e10, gpus=8)
    cluster = replace(H100, tiers=(*H100.tiers, pool))
    d = replace(BASE, offload=(*OPTIMIZER, ("params", "cpu")))

    def on(d, engine="native", pins=FREE):
        return [tuple(x.tiers.values()) for x in off_host(d, pins, engine, cluster)]

    assert on(d) == [("cxl", "cpu"), ("nvme", "cpu"), ("cpu", "cxl"), ("cpu", "nvme")]
    assert on(d.on("nvme")) == [("nvme", "cxl"), ("nvme", "nvme")]
    assert on(d, "torchtitan") == on(d)[:2]  # its parameters lie in the host's memory
    assert on(BASE) == on(d.on("nvme", "params").on("cxl")) == []
    assert on(replace(BASE, offload=OPTIMIZER), pins=Pins(offload=OPTIMIZER)) == []


@pytest.mark.parametrize("count", ["1", "2", "9"])
def test_a_pinned_count_is_kept(count):
    out = searcher(
        replace(H100, count=2), [f"offload=activations:cpu:{count}", "pp=2"], megabytes=80_000,
        seq_len=512,
    ).run()  # fmt: skip
    d = out.best.decisions
    assert d.moved == tuple(min(int(count), n) for n in d.stages)
    assert not any(map(any, d.recompute))
    assert keeps_offload((("activations", f"cpu:{count}"),), d)
    assert not keeps_offload((("activations", "cpu"),), d)
    assert offload_words(d) == [f"activations of {sum(d.moved)} layers on cpu"]
    again = decisions_from_json(json.loads(json.dumps(decisions_json(d))), d.stages, d.recompute)
    assert again == d


def test_words_of_counts():
    assert parse_pins(["offload=activations:cpu:4/3"]).offload == (("activations", "cpu:4/3"),)
    assert parse_pins(["offload=optimizer:nvme:3"]).offload == (("optimizer", "nvme:3"),)
    assert parse_pins(["offload=activations:cxl:3"]).offload == (("activations", "cxl:3"),)
    for bad in ("optimizer:nvme:x", "optimizer::3", "params:cpu:1", "activations:cpu:"):
        with pytest.raises(UsageError):
            parse_pins([f"offload={bad}"])
    d = replace(BASE, stages=(2, 2), recompute=((1, 0), (0, 0)), pp=2, dp=4, shard=4,
                microbatches=4)  # fmt: skip
    raw = decisions_json(replace(d, offload=(("activations", "cpu:1/2"),)))
    assert raw["offload"] == {"activations": "cpu:1/2"}
    with pytest.raises(PlanError, match=r"decisions.offload.activations is 'cpu:x'"):
        decisions_from_json({**raw, "offload": {"activations": "cpu:x"}}, d.stages, d.recompute)
    workload = stepped(BASE)[0].workload
    for word, reason in (("cpu:1", "of 1 stages of 2"), ("cpu:2/2", "more layers than it has")):
        changed = replace(d, offload=(("activations", word),))
        assert reason in inconsistent(changed, workload)
    split = replace(d, schedule="zbh1", recompute=(), offload=(("activations", "cpu:1/1"),))
    assert "not offloaded by count" in illegal(split, workload)


@pytest.mark.parametrize("pins", [["pp=1"], ["pp=4", "stages=1,1,1,1"]])
@pytest.mark.parametrize("what", ["optimizer:nvme", "activations:cpu"])
def test_counts_are_one_or_as_many_as_stages(pins, what):
    workload = stepped(BASE)[0].workload
    check_pins(parse_pins([f"offload={what}:1", *pins]), workload, gpus=8, layers=LAYERS)
    with pytest.raises(UsageError, match=r"of 2 stages, and there are [14]"):
        check_pins(parse_pins([f"offload={what}:1/1", *pins]), workload, gpus=8, layers=LAYERS)


def test_every_choice_of_a_program_by_count():
    """The solver's (full, half) are layers recomputed and layers below, whatever the cut."""
    d = replace(BASE, pp=2, dp=4, shard=4, offload=(("activations", "cpu:"),))
    costs, step, _ = stepped(d.cut((2, 2), ((0, 1), (0, 1))))
    problem = stage_problem(costs, replace(step, decisions=d))
    for first in range(1, LAYERS):
        stages = (first, LAYERS - first)
        for pairs in itertools.product(*([(f, n - f) for f in range(n + 1)] for n in stages)):
            cut = d.cut(stages, pairs)
            assert cut.recompute == tuple((f, 0) for f, _ in pairs)
            assert cut.pairs == (pairs if any(n for _, n in pairs) else cut.recompute)
            assert ("activations" in cut.tiers) == any(n for _, n in pairs)
    assert problem.activation_bytes[1] == (0,) * LAYERS


def test_the_program_of_a_schedule_is_the_same_whatever_was_asked_before():
    costs, step, _ = stepped(replace(BASE, pp=2, dp=4, shard=4).cut((2, 2), ((0, 1), (0, 1))))
    steps = [costs.rescheduled(step, replace(step.decisions, schedule=name))
             for name in ("1f1b", "zbh1", "gpipe")]  # fmt: skip
    asked = [stage_problem(costs, one) for one in steps]
    assert asked == [stage_problem(replace(costs, layered={}), one) for one in steps]
    assert asked[0].forward_ps is asked[2].forward_ps is not asked[1].forward_ps


BELOW = (("optimizer", "cpu:1"),)


@pytest.mark.parametrize("zero", [1, 3])
def test_the_optimizer_of_some_layers(zero):
    """The first layer is as it is where all optimizers are below, all other units as where none is;
    under ZeRO-3 its parameters go with it. Bytes, seconds and the tier are the sums of these."""
    params = (("params", "cpu"),) if zero == 3 else ()
    base = replace(BASE, zero=zero, recompute=((0, 0),))
    _, whole, _ = stepped(replace(base, offload=(*OPTIMIZER, *params)))
    costs, plain, before = stepped(base)
    _, step, e = stepped(replace(base, offload=(*BELOW, *params)))
    first, *rest = step.chain.layers
    assert step.row(first) == whole.row(first) != plain.row(first)
    others = {*range(len(step.chain.links))} - {first}
    assert all(step.row(i) == plain.row(i) for i in others) and rest
    up = step.row(first)
    assert dict(e.breakdown_ps)["offload"] == up.offload_ps + base.microbatches * (
        up.forward[-2] + up.backward[-2]
    )
    held = [sum(dict(x.ranks[0].memory_bytes)[k] for k in ("parameters", "gradients", "optimizer"))
            for x in (before, e)]  # fmt: skip
    s, t = plain.row(first).state, up.state
    less = s.parameter_bytes + s.gradient_bytes + s.optimizer_bytes
    less -= t.parameter_bytes + t.gradient_bytes + t.optimizer_bytes
    assert held[0] - held[1] == less > 0
    assert [(x.name, x.used_bytes) for x in e.tiers] == [("cpu", 8 * dict(up.below)["cpu"])]
    # with activations by count, and kept otherwise: what costing anew gives
    d = replace(base, offload=(*BELOW, *params, ("activations", "cpu:2")))
    laid = Searcher(costs=costs).assign(1, False)
    assert costs.counted(step, d, laid) == costs.step(d, laid)


@pytest.mark.parametrize("pins", [["pp=1"], ["pp=2", "stages=3,1"]])
def test_a_pinned_count_of_the_optimizer(pins):
    """More layers below hold less and take longer; the plan is what it was said to be, no bound is
    above it, and it reads back."""
    found = []
    for count in ("1", "2", "9"):
        searching = searcher(
            replace(H100, count=2), [f"offload=optimizer:cpu:{count}", *pins, "zero=1"],
            megabytes=80_000, seq_len=512,
        )  # fmt: skip
        out = searching.run()
        best, d = out.best, out.best.decisions
        assert out.proved and keeps_offload((("optimizer", f"cpu:{count}"),), d)
        assert d.below == tuple(min(int(count), n) for n in d.stages)
        assert offload_words(d) == [f"optimizer of {sum(d.below)} layers on cpu"]
        again = decisions_json(d)
        assert again["offload"]["optimizer"] == "cpu:" + "/".join(map(str, d.below))
        assert decisions_from_json(json.loads(json.dumps(again)), d.stages, d.recompute) == d
        costs = searching.costs
        step = costs.step(d, best.assignments)
        assert evaluate(stage_problem(costs, step), d.stages, d.pairs)[::2] == (
            best.objective_ps, True
        )  # fmt: skip
        mesh = next(m for m in searching.meshes() if (m.pp, m.dp, m.cp, m.tp, m.micro_batch) == (
            d.pp, d.dp, d.cp, d.tp, d.micro_batch
        ) and m.sequence_parallel == d.sequence_parallel)  # fmt: skip
        assert searching.bounds([mesh]).lower_ps[0] <= best.objective_ps
        e = estimate_step(costs, step, d)
        assert e.tiers[0].fits and inconsistent(d, costs.workload) is None
        found.append((e.peak_memory_bytes, -dict(e.breakdown_ps)["offload"]))
    assert found == sorted(found)[::-1] and len(set(found)) > 1


def test_some_layers_below_are_found(tmp_path):
    """Searched, proved, equal to trying every number of layers with all else but pipelines: two of
    three; and no mesh's bound is above its best."""
    cluster = small_cluster(tmp_path, SMALL.format(memory=6 * 10**9, inter=INTER), 4)
    problem = make("moe", {"size": "8b-a1b", "n_layers": 3}, BIG_MOE, cluster, global_batch=4,
                   seq_len=512)  # fmt: skip
    least = least_by_mesh(replace(problem, by_layer=True), pp=1)
    out = problem.searcher.under(Pins(pp=1)).run()
    assert difference(problem, least, out) == ""
    assert 0 < out.best.decisions.below[0] < 3
    bounds = problem.searcher.bounds([*least]).lower_ps
    assert all(low <= x for low, x in zip(bounds, least.values()) if x is not None)


def test_some_layers_of_each_stage_are_found(tmp_path):
    """Two stages of 21 GB: two layers of three below on the first and none on the second, proved,
    equal to trying every number on each with all else; 15% quicker than all of them below."""
    cluster = small_cluster(tmp_path, SMALL.format(memory=21 * 10**9, inter=INTER), 2)
    problem = make("llama", {"size": "8b", "n_layers": 4}, WIDE, cluster, global_batch=4,
                   seq_len=2048)  # fmt: skip
    problem, pins = replace(problem, by_layer=True), {"pp": 2, "schedule": "1f1b"}
    least, searching = least_by_mesh(problem, **pins), problem.searcher.under(Pins(**pins))
    out = searching.run()
    assert difference(problem, least, out) == ""
    d = out.best.decisions
    assert (d.stages, d.below) == ((3, 1), (2, 0))
    assert inconsistent(d, problem.costs.workload) is None
    bounds = searching.bounds([*least]).lower_ps
    assert all(low <= x for low, x in zip(bounds, least.values()) if x is not None)
    whole = problem.searcher.under(Pins(offload=OPTIMIZER, **pins)).run().best
    assert out.best.objective_ps < 0.86 * whole.objective_ps
    # refused, it is refused of any number of layers, alone or with others: nothing else fits
    held = {**pins, "offload": (("optimizer", "cpu"), ("activations", "cpu"))}
    with_more = problem.searcher.under(Pins(**held)).run().best
    assert with_more is not None
    searching = Without(costs=searching.costs, pins=Pins(**pins), refused=(("offload", d.offload),))
    assert searching.run().best is None
    rest = replace(searching, refused=(("offload", with_more.decisions.offload),)).run().best
    assert rest is not None and rest.objective_ps == out.best.objective_ps


def test_which_layers_the_optimizer_is_of_is_known():
    """Elsewhere than on our runtime, or with stages left open, it is refused."""
    workload = stepped(BASE)[0].workload
    for engine, words in (("native", ["pp=2"]), ("native", []), ("megatron", ["pp=1"])):
        pins = parse_pins(["offload=optimizer:cpu:2", *words])
        with pytest.raises(UsageError):
            check_pins(pins, replace(workload, engine=engine), gpus=8, layers=LAYERS)
    d = replace(BASE, offload=(("optimizer", "cpu:5"),))
    assert "more layers than it has" in inconsistent(d, workload)
    assert "of 2 stages of 1" in inconsistent(
        replace(BASE, offload=(("optimizer", "cpu:1/1"),)), workload
    )


def test_gradients_lose_bits_by_leave_alone():
    """fp32 unless any is allowed; then bf16 is taken, as it moves and holds half the bytes."""
    cluster = replace(H100, count=2)
    kinds = {}
    for words in ([], ["grad_dtype=any"], ["grad_dtype=bf16"]):
        out = searcher(cluster, [*words, "tp=1", "pp=1"], megabytes=80_000).run()
        kinds[tuple(words)] = (out.best.decisions.grad_dtype, out.best.objective_ps)
        assert out.proved
    assert [kind for kind, _ in kinds.values()] == ["fp32", "bf16", "bf16"]
    default, free, pinned = (ps for _, ps in kinds.values())
    assert free == pinned < default


def pinned_whole(d):
    """Every decision of a plan, as a user pins it."""
    full = "/".join(str(n) for n, _ in d.recompute)
    return [
        *(f"{key}={getattr(d, key)}" for key in ("pp", "dp", "cp", "tp", "zero", "micro_batch")),
        f"schedule={d.schedule}", f"recompute={'full:' + full if any(full.split('0')) else 'none'}",
        "offload=" + ",".join(":".join(row) for row in d.offload),
        "stages=" + ",".join(map(str, d.stages)), f"reshard={'on' if d.reshard else 'off'}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("megabytes", "pins"),
    [(30_000, []), (31_000, ["recompute=none"]), (34_000, ["recompute=none"]),
     (36_000, ["recompute=none"])],
)  # fmt: skip
def test_a_plan_pinned_whole_is_the_plan(megabytes, pins):
    """With activations of some layers on the host, which a pin that nothing is computed again
    leaves open; and enumeration of all such plans finds no better one."""
    cluster = replace(H100, count=1)
    out = searcher(cluster, pins, megabytes=megabytes).run()
    d = out.best.decisions
    assert out.proved and any(d.moved) and any(map(any, d.recompute)) == (not pins)
    whole = pinned_whole(d)
    for left in (whole, [p for p in whole if not (pins and p.startswith("recompute"))]):
        again = searcher(cluster, left, megabytes=megabytes).run()
        assert again.proved and again.best.decisions == d
        assert again.best.objective_ps == out.best.objective_ps
    if pins:  # of the plans that keep all: none, by any number on the host and of optimizers there
        searching = searcher(cluster, ["pp=1", *pins], megabytes=megabytes)
        laid, steps = searching.assign(1, False), []
        for zero, size, (below, moved) in itertools.product(
            range(4), (1, 2), itertools.product(range(LAYERS + 1), repeat=2)
        ):
            one = replace(
                d, zero=zero, micro_batch=size, microbatches=2 // size, reshard=False,
                offload=tuple((what, f"cpu:{n}") for what, n in
                              (("optimizer", below), ("activations", moved)) if n),
            )  # fmt: skip
            costs = searching.costs
            if illegal(one, costs.workload):
                continue
            problem = stage_problem(costs, costs.step(one, laid))
            step, _, fits = evaluate(problem, one.stages, one.pairs)
            steps += [step] if fits else []
        assert min(steps) == out.best.objective_ps
