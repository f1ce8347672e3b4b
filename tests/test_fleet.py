"""Hardware of several kinds: read, costed from first principles, searched against enumeration."""

import itertools
import json
import random
import re
from dataclasses import fields, replace
from types import SimpleNamespace

import enumerated
import numpy as np
import pytest
import test_stages as stages
from tiny_models import EXAMPLES, graph_of, with_memory
from toy_plan import toy_plan

from cost_models.decisions import Decisions
from cost_models.engines import load_engine
from cost_models.estimate import stage_problem, whole_step_ps
from cost_models.fleet import Fleet, load_any
from cost_models.hardware import load_hardware
from cost_models.mixed import MixedCosts, border_form, mixed
from cost_models.schedule import simulate
from cost_models.stage_problem import evaluate
from cost_models.units import format_seconds
from ir.errors import InfeasibleError, PlanError, UsageError
from planner.bounds import NEVER_PS
from planner.capturing import Clock
from planner.commands.shared import prices_of
from planner.decisions import Pins
from planner.fleet_planning import attempt_fleet, plan_fleet
from planner.fleet_search import FleetSearch
from planner.fleet_search import searchers as searchers_of
from planner.grouping import divisions, quicker_in_groups
from planner.limits import Limits
from planner.mesh import Mesh
from planner.objectives import plan_for
from planner.options import TraceOptions
from planner.outcome import Outcome, Tried
from planner.plan import hardware_name, load, recost
from planner.show_hardware import hardware_json, hardware_text
from planner.stages import certify, lower_bound_ps, solve, surely_infeasible
from planner.workload import Asked, resolve

LLAMA = str(EXAMPLES / "llama.py")


# --- reading -----------------------------------------------------------------------------------


def test_a_sum_is_its_parts_in_order() -> None:
    fleet = load_any("h100x32+a100x64")
    assert isinstance(fleet, Fleet)
    assert [part.spec for part in fleet.parts] == ["h100x32", "a100x64"]
    assert fleet.parts[1] == load_hardware("a100x64")
    assert (fleet.spec, fleet.count, fleet.between) == ("h100x32+a100x64", 96, None)
    digests = {load_any(spec).digest for spec in
               ("h100x32+a100x64", "a100x64+h100x32", "h100x64+a100x64", "h100x32")}  # fmt: skip
    assert len(digests) == 4
    assert load_any(" h100x32 + a100x64 ".replace(" ", "")) == fleet


def test_a_file_says_the_link_between_parts(tmp_path) -> None:
    (tmp_path / "own.toml").write_text('base = "a100"\ncount = 8\n')
    text = 'parts = ["h100x8", "own.toml"]\n[between]\nname = "WAN"\nkind = "network"\n'
    path = tmp_path / "two.toml"
    path.write_text(text + "bytes_per_s = 1e9\nlatency_s = 1e-3\nefficiency = 0.5\n")
    fleet = load_any(str(path))
    assert [part.name for part in fleet.parts] == ["h100", "own"] and fleet.name == "two"
    alone = replace(fleet, between=None)
    assert alone.digest != fleet.digest
    own, said = (border_form(f.parts, f.between, 1.0) for f in (alone, fleet))
    assert said.s_per_byte == 1 / 5e8
    slow = min(part.inter.useful_bytes_per_s for part in fleet.parts)
    assert own.s_per_byte == 1 / slow
    known = max(part.inter.latency_s for part in fleet.parts)
    assert said.overhead_s - own.overhead_s == pytest.approx(1e-3 - known)


def test_the_example_is_read_and_shown() -> None:
    fleet = load_any(str(EXAMPLES / "hardware" / "two-generations.toml"))
    assert [part.spec for part in fleet.parts] == ["h100x32", "a100x64"]
    text = hardware_text(fleet)
    assert "spine between the halls, 12.5 GB/s" in text and max(map(len, text.split("\n"))) <= 80
    assert hardware_json(fleet)["between"]["bytes_per_s"] == 1.25e10


def test_a_path_with_a_plus_is_a_file_and_a_sum_may_have_files(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b.toml").write_text('base = "a100"\ncount = 8\n')
    (tmp_path / "Own.toml").write_text('base = "a100"\ncount = 8\n')
    assert load_any("a+b.toml") == load_hardware("a+b.toml")
    assert hardware_name("a+b.toml") == "a+b.toml"
    assert [part.name for part in load_any("H100x8+Own.toml").parts] == ["h100", "Own"]
    assert hardware_name("H100x8+Own.toml") == "h100x8+Own.toml"


def test_a_kind_named_again_is_another_part_of_the_same_gpus(tmp_path, monkeypatch) -> None:
    fleet = load_any("h100x64+a100x8+H100x32")
    assert [part.name for part in fleet.parts] == ["h100", "a100", "h100#2"]
    assert fleet.parts[2] == replace(load_hardware("h100x32"), name="h100#2")
    assert fleet.spec == "h100x64+a100x8+h100x32" and load_any(fleet.spec).parts == fleet.parts
    three = load_any("h100x8+h100x8+h100x8")
    assert [part.name for part in three.parts] == ["h100", "h100#2", "h100#3"]
    assert three.digest != load_any("h100x8+h100x16").digest
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h100.toml").write_text('base = "a100"\ncount = 8\n')
    with pytest.raises(UsageError, match="twice") as caught:
        load_any("h100x8+h100.toml")
    assert "different kinds" in "\n".join(caught.value.lines())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("h100x8+", ["names nothing on one side of a +"]),
        ("+h100x8", ["names nothing", "h100x32+a100x64"]),
        ("h100x8+h10x8", ["h10", "h100"]),
        ("h100x12+a100x8", ["whole nodes"]),
    ],
)
def test_sums_that_cannot_be_meant(spec, words) -> None:
    with pytest.raises(UsageError) as caught:
        load_any(spec)
    text = "\n".join(caught.value.lines())
    assert caught.value.exit_code == 64 and all(word in text for word in words), text


# --- stages ------------------------------------------------------------------------------------

ONE_STAGE = ("1f1b", "gpipe", "zbh1")


def two_kinds(seed, schedule):
    """A random problem whose first ranks are of one kind, the others of another."""
    rng = random.Random(seed)
    while True:
        a = stages.tiny(rng.randint(0, 10**6), schedule)
        if a.pp > 1:
            break
    counts = [n := rng.randint(1, a.pp - 1), a.pp - n]
    kept = {} if rng.random() < 0.5 else {"activation_bytes": a.activation_bytes}
    while True:
        b = stages.tiny(rng.randint(0, 10**6), schedule)
        if b.layers == a.layers:
            break
    slower = rng.choice((1, 3))
    b = replace(
        b, pp=a.pp, microbatches=a.microbatches, levels=a.levels, **kept,
        forward_ps=tuple(slower * t for t in b.forward_ps),
        input_grad_ps=tuple(slower * t for t in b.input_grad_ps),
    )  # fmt: skip
    pair = [a, b] if rng.random() < 0.5 else [b, a]
    sends = [(rng.choice((0, 3, 15)), 0) for _ in range(a.pp)]
    return mixed(list(zip(pair, counts)), sends), pair, counts, sends


def weigh_kinds(pair, counts, sends, stages_, recompute):
    """The objective from each kind's own problem: a rank's bytes and stage times are its kind's."""
    kinds = [p for p, n in zip(pair, counts) for _ in range(n)]
    f, b, w, memory, tails = [], [], [], [], []
    layer = 0
    for r, (p, n, (full, some)) in enumerate(zip(kinds, stages_, recompute)):
        times, act, work, gathered = [p.rank_glue_forward_ps, p.rank_glue_backward_ps, 0], 0, 0, 0
        state, comm, own = p.constant_bytes, 0, 0
        for place in range(n):
            level = 2 if place < full else 1 if place < full + some else 0
            times[0] += p.forward_ps[layer]
            times[1] += p.input_grad_ps[layer]
            times[1] += (0, p.recompute_ps[1][layer], p.recompute_ps[0][layer])[level]
            times[2] += p.weight_grad_ps[layer]
            act += p.activation_bytes[level][layer]
            work = max(work, p.working_bytes[level][layer])
            gathered = max(gathered, p.gathered_bytes[layer])
            state += p.state_bytes[layer]
            comm += p.tail_comm_ps[layer] - p.tail_hide_ps[layer]
            own += p.tail_own_ps[layer]
            layer += 1
        for e in [p.first] * (r == 0) + [p.last] * (r == len(kinds) - 1):
            times = [times[0] + e.forward_ps, times[1] + e.input_grad_ps,
                     times[2] + e.weight_grad_ps]  # fmt: skip
            act, state = act + e.activation_bytes, state + e.state_bytes
            work, gathered = max(work, e.working_bytes), max(gathered, e.gathered_bytes)
            comm, own = comm + e.tail_comm_ps - e.tail_hide_ps, own + e.tail_own_ps
        for line, t in zip((f, b, w), times):
            line.append(t)
        flight = p.in_flight(r)[0][0]
        memory.append(state + flight * act + work + 2 * gathered)
        tails.append(max(0, comm) + own)
    p = pair[0]
    line = simulate(p.schedule, f, b, w, [took for took, _ in sends[:-1]], p.microbatches, p.pp)
    fits = all(used <= kind.capacity_bytes for used, kind in zip(memory, kinds))
    return line.makespan_ps + max(tails), tuple(memory), fits


@pytest.mark.parametrize("schedule", ONE_STAGE)
def test_stages_on_two_kinds_equal_enumeration(schedule):
    proved = 0
    for seed in range(15):
        p, pair, counts, sends = two_kinds(seed, schedule)
        weighed = {choice: weigh_kinds(pair, counts, sends, *choice)
                   for choice in stages.choices(p)}  # fmt: skip
        for choice in itertools.islice(weighed, 12):
            assert evaluate(p, *choice) == weighed[choice]
        best = min((step for step, _, fits in weighed.values() if fits), default=None)
        found = solve(p)
        if best is None:
            over = min(max(used - p.at(r).capacity_bytes for r, used in enumerate(memory))
                       for _, memory, _ in weighed.values())  # fmt: skip
            assert found.status == "INFEASIBLE" and found.nearest.overflow_bytes == over > 0, seed
            continue
        assert (found.status, found.step_ps) == ("OPTIMAL", best), seed
        assert weighed[found.stages, found.recompute] == (best, found.peak_bytes, True)
        assert lower_bound_ps(p) <= best and not surely_infeasible(p), seed
        assert solve(p, incumbent_ps=best).status == "CUTOFF"
        if seed < 4:
            assert certify(p, incumbent_ps=best) <= best
        proved += 1
    assert proved > 5


def test_kinds_that_are_alike_cost_what_one_kind_does():
    for seed in range(30):
        p = stages.tiny(seed, "1f1b")
        if p.pp == 1:
            continue
        sends = [(p.p2p_ps, 0)] * p.pp
        both = mixed([(p, 1), (replace(p, levels=p.levels), p.pp - 1)], sends)
        found, alone = solve(both), solve(p)
        assert (found.status, found.stages, found.step_ps, found.bound_ps) == (
            alone.status, alone.stages, alone.step_ps, alone.bound_ps,
        )  # fmt: skip
        assert lower_bound_ps(both) >= lower_bound_ps(p)


# --- the search --------------------------------------------------------------------------------


def tiny_fleet(seed, folder, alike=False):
    """A random pair of small clusters, a batch, and the layers of a model for them. alike: both
    are of one kind."""
    rng = random.Random(seed)
    counts = rng.choice(((1, 1), (2, 2), (2, 1), (1, 2)))
    parts = []
    for name, count, base in zip(("quick", "slow"), counts, ("h100x2", "a100x2")):
        memory = rng.choice((16_000, 30_000, 60_000)) * 10**6
        part = replace(load_hardware(base), name=name, count=count)
        parts.append(with_memory(part, memory))
    if alike:
        parts[1] = replace(parts[0], name="slow", count=counts[1])
    fleet = Fleet(name="two", parts=tuple(parts))
    engine = rng.choice(("native", "native-compiled"))
    asked = Asked(engine=engine, seq_len=2048, global_batch=rng.choice((2, 4)))
    graph = graph_of("llama", size="8b", n_layers=rng.choice((2, 3)))
    return graph, fleet, asked


def over_parts(searcher, fleet):
    """What `enumerated` needs of a problem, each axis on all GPUs."""
    return SimpleNamespace(
        costs=searcher.costs, searcher=searcher, gpus=fleet.count, heads=(32, 8), experts=0,
        layers=len(searcher.costs.chain.layers), units=(), features=(), by_layer=False,
        domain=min(part.count for part in fleet.parts),
    )  # fmt: skip


def least_over_parts(p, fleet, refused=()):
    """The least objective of every mesh of which each part has whole stages, one a rank, and none
    of what is refused."""
    found, away = {}, {name for key, value in refused if key == "recompute" for name in value}

    def left(rows):
        for d in rows:
            if not any(d.get(key) == value or (key == "tp" and value in dict(
                d.get("tp_by_part", ())).values()) for key, value in refused):  # fmt: skip
                yield d

    names = [f.name for f in fields(Mesh)]
    alike = (
        d for d in enumerated.product(p, enumerated.MESH_AXES) if d["pp"] > 1
        and not any(part.count % (d["dp"] * d["cp"] * d["tp"]) for part in fleet.parts)
    )  # fmt: skip
    for d in left(enumerated.with_tp_by_part(p) if p.searcher.apart else alike):
        laid, objectives = p.searcher.assign(d["tp"], d["sequence_parallel"]), []
        rows = (*enumerated.STATE_AXES, *enumerated.SCHEDULE_AXES)
        for made in left(enumerated.product(p, rows, d)):
            decided = Decisions(**made)
            levels = [x for x in enumerated.recomputed(p, decided) if x not in away]
            if made["virtual_stages"] == 1 and levels and (
                made["schedule"] not in enumerated.SPLIT or "none" in levels
            ):  # fmt: skip
                problem = stage_problem(
                    p.costs, p.costs.step(decided, laid), levels=tuple(levels)
                )
                objectives.append(enumerated.best_of_problem(problem))
        mesh = Mesh(**{name: d[name] for name in names})
        found[mesh] = min((x for x in objectives if x is not None), default=None)
    return found


@pytest.mark.parametrize(("seed", "alike"), [(0, 0), (1, 0), (2, 0), (3, 0), (5, 1), (7, 1)])
def test_search_of_pipelines_over_parts_equals_enumeration(seed, alike):
    graph, fleet, asked = tiny_fleet(seed, "", alike)
    workload, _ = resolve(graph, fleet, asked, Pins())
    options = TraceOptions(model="", asked=asked, effort=10**9)
    searchers = list(searchers_of(graph, fleet, workload, options))
    pipelined = [s for s in searchers if isinstance(s.costs, MixedCosts)]
    assert len(searchers) == 7 and [s.apart for s in pipelined] == [False, False, True, True]
    for searcher in pipelined:
        p = over_parts(searcher, fleet)
        least = least_over_parts(p, fleet)
        assert set(searcher.meshes()) == set(least)
        assert enumerated.difference(p, least, searcher.run()) == ""
        for mesh, low in zip(least, searcher.bounds(list(least)).lower_ps):
            assert least[mesh] is None or low <= least[mesh], mesh


def memory_weighed(searcher, meshes):
    """Bounds that were nothing, after a search has weighed what fits."""
    lower, candidates = [0] * len(meshes), [(searcher, mesh) for mesh in meshes]
    worse = Tried(decisions=Decisions(), assignments={}, objective_ps=1 << 59)
    searcher._sharpen(range(len(meshes)), candidates, lower, Outcome(best=worse))
    return lower


def short_of_memory(seed, alike=False):
    """A random fleet whose parts are alike short of memory, and its searches."""
    graph, fleet, asked = tiny_fleet(seed, "", alike)
    memory = random.Random(seed).choice((8, 10, 11, 12, 13)) * 10**9
    fleet = replace(fleet, parts=tuple(with_memory(part, memory) for part in fleet.parts))
    workload, _ = resolve(graph, fleet, asked, Pins())
    options = TraceOptions(model="", asked=asked, effort=10**9)
    return fleet, searchers_of(graph, fleet, workload, options)


def test_pipelines_that_no_memory_holds_are_left_out():
    """Of those that are, enumeration has no plan that fits."""
    never, fits = 0, 0
    for seed in range(8):
        fleet, searchers = short_of_memory(seed)
        for searcher in searchers:
            if isinstance(searcher.costs, MixedCosts) and not searcher.apart:
                least = least_over_parts(over_parts(searcher, fleet), fleet)
                for mesh, low in zip(least, memory_weighed(searcher, list(least))):
                    assert low in (0, NEVER_PS) and (low == 0 or least[mesh] is None), mesh
                    never, fits = never + (low > 0), fits + (least[mesh] is not None)
    assert never and fits


def test_a_part_that_no_mesh_suits_leaves_no_gap():
    """Six GPUs divide neither the batch nor the layers: no plan of theirs could be better."""
    options = TraceOptions(model="", hardware="h100x6+a100x2", asked=Asked(
        global_batch=4, seq_len=1024))  # fmt: skip
    fleet = load_any(options.hardware)
    result, found = attempt_fleet(
        graph_of("llama", n_layers=2), options, fleet, Clock()
    )
    (part,) = [row for row in found.rows if row.words == "h100x6"]
    assert part.outcome.meshes == 0
    assert (result.plan.solver.status, result.plan.solver.gap_ppm) == ("OPTIMAL", 0)


@pytest.mark.parametrize("seed", range(8, 12))
def test_no_plan_is_slower_than_the_best_part_alone(seed, tmp_path):
    graph, fleet, asked = tiny_fleet(seed, tmp_path)
    workload, _ = resolve(graph, fleet, asked, Pins())
    options = TraceOptions(model="", asked=asked)
    found = FleetSearch(fleet=fleet, workload=workload)
    alone = []
    for searcher in searchers_of(graph, fleet, workload, options):
        found.search(searcher)
        if not isinstance(searcher.costs, MixedCosts):
            out = replace(searcher).run()  # without what was found elsewhere
            if out.best is not None:
                alone.append(whole_step_ps(searcher.costs, out.best.objective_ps))
    assert (found.best is not None) or not alone
    if alone:
        assert found.step_ps <= min(alone) and found.bound_ps() <= found.step_ps


# --- commands ----------------------------------------------------------------------------------

TINY = ("--arg", "size=8b", "--arg", "n_layers=6", "--global-batch", "32", "--seq-len", "4096")
PIPED = ("--fix", "shares=none")
PAIR = ("--hardware", "h100x2+a100x2", *TINY)  # as few GPUs as a plan over parts needs


@pytest.fixture
def two(plan):
    """The output of `plan trace` for a pipeline over two kinds of GPUs; its plan lies in the
    folder."""
    code, out, err = plan("trace", LLAMA, *PAIR, *PIPED)
    assert code == 0, err
    return out


def test_a_plan_over_parts_is_written_read_shown_and_checked(plan, two, tmp_path):
    assert "the plan uses" in two and "h100x2 alone" in two
    path = tmp_path / "plan.json"
    found, raw = load(str(path)), json.loads(path.read_text())
    d = found.decisions
    assert [row["part"] for row in raw["stages"]] == list(d.part_of_rank)
    assert {name for name, _ in d.parts} == {"h100", "a100"}
    assert d.dp * d.cp * d.tp * d.pp == 4
    layers = {name: sum(n for n, part in zip(d.stages, d.part_of_rank) if part == name)
              for name, _ in d.parts}  # fmt: skip
    assert layers["h100"] > layers["a100"] > 0
    assert plan("check")[0] == 0
    shown = plan("show")[1]
    assert "2 a100: stage" in shown and "2 h100: stage" in shown and ", a100): " in shown
    assert plan("show", "--stage", "0")[0] == plan("show", "--json")[0] == 0
    assert plan("diff", "plan.json")[0] == 0
    assert border_seconds(found) == pytest.approx(1)
    again = path.read_bytes()
    assert plan("trace", LLAMA, *PAIR, *PIPED)[0] == 0
    assert path.read_bytes() == again


def border_seconds(found):
    """What the ledger says of sends between the first stage and the second, on two parts, over
    what the slower network takes for them."""
    d, fleet = found.decisions, load_any(found.hardware)
    assert d.part_of_rank[0] != d.part_of_rank[1]
    (row,) = [c for c in recost(found, fleet).ranks[0].collectives if c.kind == "p2p"]
    engine = load_engine(found.workload.engine)
    one_s = border_form(fleet.parts, None, engine.network_share).at(np.float64(row.size_bytes))
    return row.total_s / (row.count * float(one_s))


def test_groups_of_one_kind_cost_what_the_kind_does(plan, tmp_path):
    """The same pipeline on 16 GPUs, and on 8 and 8 of them."""
    words = ("pp=2", "tp=2", "dp=4", "zero=1", "micro_batch=1", "stages=3,3", "schedule=1f1b",
             "recompute=none")  # fmt: skip
    pins = [x for word in words for x in ("--fix", word)]
    steps = []
    for spec, more in (("h100x16", ()), ("h100x8+h100x8", PIPED)):
        found = plan("trace", LLAMA, "--hardware", spec, *TINY, *pins, *more)
        assert found[0] == 0, found
        steps.append(json.loads((tmp_path / "plan.json").read_text())["estimate"])
    assert steps[0]["step_time_us"] == steps[1]["step_time_us"]


def test_a_batch_that_does_not_divide_is_shared_out_by_groups(plan, tmp_path):
    """64 samples are 3 or 2 of each of 24 GPUs: quicker than in pipelines of 3 stages. The line
    that says so has the step and the gain of the plan that it names."""
    size = (*TINY[:4], "--global-batch", "64", "--seq-len", "4096")
    code, out, err = plan("trace", LLAMA, "--hardware", "h100x24", *size)
    said = re.search(r"--hardware h100x16\+h100x8: (\S+ m?s), (\S+)% quicker than one", out + err)
    assert code == 0 and said
    one = json.loads((tmp_path / "plan.json").read_text())
    assert plan("trace", LLAMA, "--hardware", "h100x16+h100x8", *size)[0] == 0
    two, d = json.loads((tmp_path / "plan.json").read_text()), load("plan.json").decisions
    assert {share.part: share.microbatches for share in d.shares} == {"h100": 3, "h100#2": 2}
    steps = [made["estimate"]["step_time_us"] for made in (two, one)]
    assert format_seconds(steps[0] / 1e6) == said[1] and steps[0] < 0.98 * steps[1]
    assert float(said[2]) == pytest.approx(100 * (1 - steps[0] / steps[1]), abs=0.06)
    assert plan("check")[0] == 0 and "8 h100#2: 16 samples" in plan("show")[1]
    assert plan("export", "--to", "torchrun")[0] == 0  # nodes are alike
    (tmp_path / "usd.toml").write_text("[h100]\nusd_per_gpu_hour = 3.0\n")
    assert list(prices_of("usd.toml", load_any("h100x16+h100x8").parts)) == ["h100"]
    assert plan("show", "--goodput", "--prices", "usd.toml")[0] == 0


def test_groups_are_not_asked_for_what_cannot_have_them():
    """Another engine, pins, and a file's own count leave them out, before anything is searched."""
    h100s, one = load_hardware("h100x24"), toy_plan()

    def asked(options=None, cluster=h100s, **work):
        plan = replace(one, workload=replace(one.workload, global_batch=64, **work))
        found = SimpleNamespace(plan=plan, interrupted=False, estimate=None)
        return quicker_in_groups(options or TraceOptions(model=""), cluster, found)

    assert asked(engine="torchtitan") == ()
    assert asked(TraceOptions(model="", pins=Pins(tp=1)), engine="native") == ()
    assert asked(cluster=replace(h100s, name="mine"), engine="native") == ()
    with pytest.raises(AttributeError):  # of the step, which is asked for next
        asked(engine="native")


def test_groups_of_whole_nodes_that_a_remainder_leaves():
    """Of 96 GPUs and 512 samples 32 have one more than others, or 32 pairs of 48: the same two
    groups. None where the batch divides, or where what is over is no whole node."""
    h100s = load_hardware("h100x96")
    assert [*divisions(h100s, 512)] == [32] and not [*divisions(h100s, 480)]
    assert [*divisions(h100s, 64)] == [32]  # 16 of 48 pairs have two
    assert [*divisions(h100s, 100)] == [8, 16, 32]  # 4 ranks of 2, 4 or 8 GPUs
    assert not [*divisions(load_hardware("h100x8"), 20)]


def test_stages_that_do_not_lie_on_the_parts_are_refused(plan, two, tmp_path):
    path = tmp_path / "plan.json"
    text = path.read_text()
    for old, new, word in (
        ('"part": "a100"', '"part": "b200"', "no part b200"),
        ("h100x2+a100x2", "h100x2+a100x4", "a100x4"),
        ('"part": "a100", ', "", "stages"),
        ("h100x2+a100x2", "h100x4", "parts"),
    ):
        path.write_text(text.replace(old, new))
        code, _, err = plan("check")
        assert code == 1 and word in err, err
    back = json.loads(text)
    assert len(back["stages"]) >= 2


def test_one_part_is_used_where_the_others_make_no_step_shorter(plan, tmp_path):
    """A model whose step a slow border would only lengthen."""
    (tmp_path / "far.toml").write_text(
        'parts = ["h100x2", "a100x2"]\n[between]\nname = "WAN"\nkind = "network"\n'
        "bytes_per_s = 1e6\nlatency_s = 0.1\nefficiency = 1.0\n"
    )
    code, out, err = plan("trace", LLAMA, "--hardware", "far.toml", *TINY)
    assert code == 0, err
    d = load("plan.json").decisions
    assert d.parts == (("h100", d.pp),) and d.gpus == 2
    assert "a100x2 is idle" in out and "all others idle" in out
    assert plan("check")[0] == 0
    step = json.loads((tmp_path / "plan.json").read_text())["estimate"]
    assert plan("trace", LLAMA, "--hardware", "h100x2", *TINY, "-o", "alone.json")[0] == 0
    assert json.loads((tmp_path / "alone.json").read_text())["estimate"] == step


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--objective", "cost"), 64, "needs prices"),
        (("--max-gpus", "1"), 3, "the smallest has 2"),
        (("--fix", "dp=5"), 64, "5"),
        (("--hardware", "h100x4+a100x4", "--fix", "pp=4", "--fix", "schedule=gpipe"), 0, ""),
    ],
)
def test_what_is_refused_and_why(plan, words, code, said):
    found, _, err = plan("trace", LLAMA, *PAIR, *words)
    assert found == code and said in err, err


def test_a_plan_of_one_kind_names_no_parts(plan, tmp_path):
    assert plan("trace", LLAMA, "--hardware", "h100x2", *TINY)[0] == 0
    raw = json.loads((tmp_path / "plan.json").read_text())
    assert all("part" not in row for row in raw["stages"]) and "parts" not in raw["decisions"]
    assert load("plan.json").decisions.parts == ()
    with pytest.raises(PlanError):
        load("missing.json")


def test_fewest_gpus_are_those_of_one_part(tmp_path):
    """Of all parts and sums of parts, the fewest GPUs on which anything fits; a limit of GPUs
    leaves out what has more; what holds it is said where the limit is too low."""
    graph, fleet, asked = tiny_fleet(0, tmp_path)  # parts of 1 and 2 GPUs
    parts = tuple(with_memory(part, 9 * 10**9) for part in fleet.parts)
    fleet, sizes = replace(fleet, parts=parts), {}
    workload, _ = resolve(graph, fleet, asked, Pins())
    options = TraceOptions(model="", asked=asked, hardware="two", effort=10**9)
    for searcher in searchers_of(graph, fleet, workload, options):
        best, count = searcher.run().best, sum(part.count for part in searcher.clusters)
        if best is not None:
            step = whole_step_ps(searcher.costs, best.objective_ps)
            sizes[count] = min(step, sizes.get(count, step))
    fewest = min(sizes)

    def planned(**changes):
        return attempt_fleet(graph, replace(options, **changes), fleet, Clock())[0]

    assert planned(objective="gpus").plan.decisions.gpus == fewest
    for most in (1, 2, 3):
        within = [step for count, step in sizes.items() if count <= most]
        found = planned(limits=Limits(gpus=most))
        assert (found is None) == (not within)
        if found is not None:
            assert found.plan.decisions.gpus <= most
            assert min(within) <= found.estimate.step_time_ps <= sizes.get(fewest)
    assert fewest > 1
    with pytest.raises(InfeasibleError) as fault:
        plan_fleet(graph, replace(options, limits=Limits(gpus=1)), fleet, Clock())
    assert f"the fewest that hold it are {fewest}" in fault.value.why


def test_least_memory_on_parts_is_within_the_slack(tmp_path):
    graph, fleet, asked = tiny_fleet(10, tmp_path)
    options = TraceOptions(model="", asked=asked, hardware="two", effort=60, slack=0.5)
    fastest, made = (
        plan_for(graph, replace(options, objective=word), fleet, Clock()).estimate
        for word in ("time", "memory")
    )
    most = [max(rank.peak_bytes for rank in e.ranks) for e in (made, fastest)]
    assert most[0] < most[1] and made.step_time_s <= 1.5 * fastest.step_time_s
