"""Data ranks outside the pipeline: laid, run, costed, searched."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import runtime_cases_pipeline as cases
import test_runtime_pipeline as pipelines
import test_verify_ledger as ledgers
from enumerated import difference, least_by_mesh
from random_problems import SMALL, WIDE, make
from tiny_models import costs_of, graph_of

from cost_models.crossing import boundary_levels
from cost_models.decisions import Decisions, Workload
from cost_models.estimate import estimate_step
from cost_models.hardware import load_hardware
from cost_models.schedule import global_stage, order, rank_of, schedule_illegal, simulate
from cost_models.state import ranks_of
from ir.errors import PlanError, UsageError
from planner.bounds import mesh_bounds_ps
from planner.decisions import Pins, parse_pins
from planner.decisions_json import decisions_from_json, decisions_json
from planner.legality import illegal, inconsistent
from planner.mesh import meshes as candidates
from planner.pin_checks import check_pins
from planner.runtime.meshes import laid_ranks
from planner.runtime.verify.scale import cut_decisions, meshes
from planner.search import Searcher

HARDWARE = Path(__file__).parents[1] / "examples" / "hardware"


def coordinates(d):
    """(pp, dp, cp, tp) of every rank, counted from the definition: inside out tp, cp, the dp that
    lie inside, pp, the dp that lie outside."""
    inner = d.dp // d.dp_outer
    found = []
    for rank in range(d.gpus):
        rest, tp = divmod(rank, d.tp)
        rest, cp = divmod(rest, d.cp)
        rest, near = divmod(rest, inner)
        far, pp = divmod(rest, d.pp)
        found.append((pp, far * inner + near, cp, tp))
    return found


MESHES = [
    Decisions(pp=pp, dp=dp, cp=cp, tp=tp, dp_outer=outer)
    for pp, dp, cp, tp in itertools.product((1, 2, 3), (1, 2, 4), (1, 2), (1, 2))
    for outer in (1, 2, 4)
    if dp % outer == 0 and (pp > 1 or outer == 1)
]


def test_ranks_are_laid_as_the_decisions_say() -> None:
    for d in MESHES:
        where = coordinates(d)
        order = [where[rank] for rank in laid_ranks(d).tolist()]
        sizes = (range(d.pp), range(d.dp), range(d.cp), range(d.tp))
        assert order == list(itertools.product(*sizes)), d


def spread(layout):
    """The ranks of the group that begins at rank 0."""
    size, stride, (times, apart) = layout
    return sorted(i * stride + k * apart for i in range(size) for k in range(times))


def test_groups_that_are_costed_are_those_that_run() -> None:
    """Ranks that share a shard, that repeat it, and all of them, for dense parameters."""
    for mesh in MESHES:
        data = mesh.dp * mesh.cp
        near = data // mesh.dp_outer
        for shard in (n for n in range(1, data + 1) if data % n == 0):
            if near % shard and shard % near:
                continue
            d, where = replace(mesh, shard=shard), coordinates(mesh)
            mine = [
                (rank, dp * d.cp + cp) for rank, (pp, dp, cp, tp) in enumerate(where)
                if pp == tp == 0
            ]
            found = ranks_of(d, False)
            assert spread(found.sharing) == sorted(r for r, i in mine if i < shard), d
            assert spread(found.replicating) == sorted(r for r, i in mine if i % shard == 0), d
            assert spread(found.all) == sorted(r for r, _ in mine), d


def test_expert_groups_lie_inside_a_pipeline() -> None:
    d = Decisions(pp=2, dp=8, tp=2, ep=4, dp_outer=2, zero=1, shard=8)
    ranks = ranks_of(d, True)
    assert (ranks.shard, ranks.replicas) == (4, 1) and d.pipeline == 16
    assert spread(ranks.sharing) == [0, 4, 16, 20]  # two blocks of ep in each of two parts
    assert spread(ranks_of(replace(d, shard=4), True).sharing) == [0, 4]
    assert spread(ranks_of(replace(d, shard=4), True).replicating) == [0, 16]


def test_a_job_with_ranks_outside_the_pipeline_computes_what_the_whole_model_does(world) -> None:
    """Two pipelines, each in ranks of its own in a row, under every ZeRO stage."""
    pipelines.run(world, 4, [
        ("llama", pipelines.planned(
            "llama", (2, 2), dp=2, dp_outer=2, zero=zero, shard=1 if zero == 0 else 2,
            micro_batch=1))
        for zero in (0, 1, 3)
    ])  # fmt: skip
    tied = pipelines.planned("gpt", (2, 2), dp=2, dp_outer=2, zero=1, shard=2, micro_batch=1)
    pipelines.run(world, 4, [("gpt", tied)])


def test_pipelines_lie_in_parts_of_their_own(world) -> None:
    plan = pipelines.planned("llama", (2, 2), dp=2, dp_outer=2, zero=1, shard=2, micro_batch=1)
    assert world.run(4, cases.neighbours, plan) == [[0, 1], [0, 1], [2, 3], [2, 3]]
    inside = pipelines.planned("llama", (2, 2), dp=2, zero=1, shard=2, micro_batch=1)
    assert world.run(4, cases.neighbours, inside) == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_the_ledger_of_such_a_plan_is_what_a_rank_sends() -> None:
    """At full size on a fake group: the groups of every collective, tensor ranks among them."""
    fix = "pp=2 tp=2 cp=1 micro_batch=1 zero=1 dp_outer=2 recompute=none schedule=1f1b"
    for more in ("", " shard=2"):
        made, _ = ledgers.assert_as_planned("llama", "h100x16", fix + more, layers=2)
        assert made.decisions.dp_outer == 2 and made.decisions.dp == 4


def test_a_twin_keeps_data_ranks_outside() -> None:
    d = Decisions(pp=8, dp=16, tp=4, dp_outer=4, zero=1, shard=16, micro_batch=1, microbatches=16,
                  stages=(4,) * 8, recompute=((0, 0),) * 8)  # fmt: skip
    small = next(meshes(d, 16))
    assert (small.pp, small.dp, small.tp, small.dp_outer) == (2, 4, 2, 2)
    twin, work = cut_decisions(d, Workload(global_batch=256, seq_len=64), small, 4, 32)
    assert twin.dp_outer == 2 and inconsistent(twin, work) is None


# --- the decision ------------------------------------------------------------------------------


def test_the_plan_records_it_and_says_nothing_where_there_is_none() -> None:
    plain = Decisions(pp=2, dp=4, stages=(1, 1))
    assert "dp_outer" not in decisions_json(plain)
    made = replace(plain, dp_outer=2)
    text = decisions_json(made)
    assert text["dp_outer"] == 2 and decisions_from_json(text, (1, 1), ()) == made
    assert decisions_from_json(decisions_json(plain), (1, 1), ()) == plain
    for wrong in (0, "2", True):
        with pytest.raises(PlanError, match="dp_outer"):
            decisions_from_json({**text, "dp_outer": wrong}, (1, 1), ())


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ("pp=1 dp_outer=2", "without a pipeline"),
        ("pp=2 dp=4 dp_outer=3", "does not divide dp"),
        ("pp=2 dp=8 cp=1 dp_outer=2 shard=2", ""),
        ("pp=2 dp=12 cp=1 dp_outer=3 shard=6", "shards lie across pipelines"),
    ],
)
def test_pins_that_contradict_it_are_told(pins, words) -> None:
    parsed = parse_pins(pins.split())
    work, gpus = Workload(global_batch=48, seq_len=64), 48
    if not words:
        check_pins(parsed, work, gpus=gpus)
        return
    with pytest.raises(UsageError) as caught:
        check_pins(parsed, work, gpus=gpus)
    assert words in "\n".join(caught.value.lines())


def test_engines_that_lay_pipelines_outermost_are_not_planned_so() -> None:
    d = Decisions(pp=2, dp=2, dp_outer=2, stages=(1, 1), microbatches=2)
    for engine in ("native", "native-compiled", "megatron", "torchtitan", "deepspeed"):
        reason = illegal(replace(d, compile=engine != "native"), Workload(engine=engine))
        assert ("outermost" in (reason or "")) == (not engine.startswith("native")), engine


# --- schedules over slow boundaries ------------------------------------------------------------


def by_events(schedule, pp, v, f, b, latency, busy, m):
    """The makespan by stepping through time: what can start starts, what is sent queues."""
    count = len(f)
    todo = {r: list(order(schedule, pp, m, v, r)) for r in range(pp)}
    arrived, free, taken = {}, [0] * pp, {}
    while any(todo.values()):
        moved = False
        for r in range(pp):
            while todo[r]:
                op, mb, chunk = todo[r][0]
                k = global_stage(schedule, pp, r, chunk)
                need = ("F", k - 1, mb) if op == "F" else ("B", k + 1, mb)
                outside_input = (op == "F" and k == 0) or (op != "F" and k == count - 1)
                if op != "W" and not outside_input and need not in arrived:
                    break
                start = 0 if op == "W" or outside_input else arrived[need]
                lasts = {"F": f[k], "B": b[k], "W": 0, "BW": b[k]}[op]
                free[r] = max(free[r], start) + lasts
                todo[r].pop(0)
                moved = True
                if op == "W":
                    continue
                other = k + 1 if op == "F" else k - 1
                if not 0 <= other < count:
                    continue
                there = rank_of(schedule, pp, other)
                name = ("F" if op == "F" else "B", k, mb)
                if there == r:
                    arrived[name] = free[r]
                    continue
                at = min(k, other)
                leaves = max(free[r], taken.get((r, there), 0))
                taken[r, there] = leaves + busy[at]
                arrived[name] = leaves + latency[at]
        assert moved
    return max(free)


@pytest.mark.parametrize(("schedule", "v"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2)])
def test_slow_links_carry_one_send_at_a_time(schedule, v) -> None:
    for pp, m in ((2, 4), (4, 8), (4, 4)):
        if schedule_illegal(schedule, pp, m, v):
            continue
        count = pp * v
        f, b = [7 + k % 3 for k in range(count)], [13 + k % 2 for k in range(count)]
        for slow in (0, 5, 40):
            wide = [rank_of(schedule, pp, k) == pp // 2 - 1 for k in range(count - 1)]
            busy = [slow * w for w in wide]
            latency = [1 + (slow + 3) * w for w in wide]
            found = simulate(schedule, f, b, [0] * count, latency, m, pp, v, busy_ps=busy)
            assert found.makespan_ps == by_events(schedule, pp, v, f, b, latency, busy, m)
            free = simulate(schedule, f, b, [0] * count, latency, m, pp, v).makespan_ps
            assert found.makespan_ps >= max(free, m * slow)
            assert slow > 5 or found.makespan_ps == free or v > 1  # shorter than a stage: no queue


# --- the search over two datacentres -----------------------------------------------------------

LEVELS_OF = """[[cluster.levels]]
name = "fabric"
kind = "tree"
ranks = 2
bytes_per_s = 3e9
latency_s = 5e-6
efficiency = 0.8
[[cluster.levels]]
name = "wan"
kind = "wan"
bytes_per_s = {wide}
latency_s = {latency}
efficiency = 0.8
[[cluster.tiers]]"""


def two_sites(folder, megabytes, wide, latency):
    """Four small devices, two at each end of a long line."""
    levels = LEVELS_OF.format(wide=wide, latency=latency)
    text = SMALL.format(memory=megabytes * 1_000_000, inter="").replace("_size = 2", "_size = 1")
    text = text.replace("[[cluster.tiers]]", levels, 1)
    path = folder / "sites.toml"
    path.write_text("count = 4\n" + text)
    return load_hardware(str(path))


@pytest.mark.parametrize(
    ("megabytes", "wide", "latency"),
    [(30_000, 2e8, 1e-3), (14_000, 5e7, 1e-2), (14_000, 2e9, 1e-5), (14_000, 2e7, 1e-4)],
)
def test_search_over_sites_equals_enumeration(tmp_path, megabytes, wide, latency) -> None:
    cluster = two_sites(tmp_path, megabytes, wide, latency)
    problem = make("llama", {"size": "8b", "n_layers": 3}, WIDE, cluster, units=(2,),
                   global_batch=8, seq_len=2048)  # fmt: skip
    least, searcher = least_by_mesh(problem), problem.searcher
    bounds = mesh_bounds_ps(
        problem.costs, list(least), searcher.assign, schedules=searcher.searched_schedules
    ).lower_ps
    assert all(low <= x for x, low in zip(least.values(), bounds) if x is not None)
    assert difference(problem, least, searcher.run()) == ""


def test_what_crosses_an_ocean_depends_on_it(tmp_path) -> None:
    """A model on two sites: with a line as quick as the fabric any layout goes; over a slow one
    the pipeline or the data ranks that send less lie across it, and the estimate says so."""
    graph = graph_of("llama", size="8b", n_layers=4)
    times = {}
    for wide in (1e9, 1e7):
        costs = costs_of(graph, two_sites(tmp_path, 40_000, wide, 1e-4), global_batch=64,
                         seq_len=2048)  # fmt: skip
        laid = Searcher(costs=costs).assign(1, False)
        for outer in (1, 2):
            d = Decisions(pp=2, dp=2, zero=1, shard=2, micro_batch=1, microbatches=32,
                          stages=(2, 2), recompute=((0, 0),) * 2, dp_outer=outer)  # fmt: skip
            made = estimate_step(costs, costs.step(d, laid), d)
            parts = {name: ps / 1e12 for name, ps in made.breakdown_ps}
            times[wide, outer] = made.step_time_s, parts["pp_comm"], parts["dp_comm"]
            assert sum(parts.values()) == pytest.approx(made.step_time_s)
            crossed = boundary_levels(costs.cluster, 2, d.pipeline // 2, outer)
            assert crossed[0] == (2 if outer == 1 else 1)
    # a pipeline across the line waits for activations, one on each side for gradients
    assert times[1e7, 1][1] > times[1e9, 1][1] and times[1e7, 2][2] > times[1e9, 2][2]
    assert times[1e7, 2][1] == times[1e9, 2][1]


@pytest.mark.parametrize(("global_batch", "outer"), [(8, 1), (1024, 2)])
def test_the_search_lays_across_the_line_what_sends_less(tmp_path, global_batch, outer) -> None:
    """Two stages on two sites: few tokens a step are fewer bytes than the gradients, many more."""
    graph = graph_of("llama", size="8b", n_layers=4)
    cluster = two_sites(tmp_path, 40_000, 1e8, 1e-3)
    pins = Pins(pp=2, tp=1, cp=1)
    costs = costs_of(graph, cluster, global_batch=global_batch, seq_len=2048)
    found = candidates(costs.chain, cluster, costs.workload, pins)
    costs.points = tuple(dict.fromkeys([(1, 1), *((m.micro_batch, m.cp) for m in found)]))
    best = {
        n: Searcher(costs=costs, pins=replace(pins, dp_outer=n)).run().best for n in (None, 1, 2)
    }
    assert best[None].decisions.dp_outer == outer
    assert best[None].objective_ps == min(best[1].objective_ps, best[2].objective_ps)


def test_a_plan_in_two_datacentres_is_proved(plan, tmp_path) -> None:
    """Pipelines across the line and inside a site, replicas across it; all of it would fit one GPU,
    so nothing is asked about that lies below."""
    code, told, said = plan(
        "trace", HARDWARE.parent / "gpt.py", "--hardware", HARDWARE / "two-datacentres.toml",
        "-o", tmp_path / "plan.json",
    )  # fmt: skip
    assert code == 0 and "OPTIMAL" in told, said


def test_examples_are_planned_over_their_levels(plan, tmp_path) -> None:
    out, own = tmp_path / "plan.json", tmp_path / "two-datacentres.toml"
    own.write_text((HARDWARE / own.name).read_text())
    words = ["--global-batch", "2048", "--seq-len", "4096", "--fix", "pp=4", "--fix", "tp=8",
             "--fix", "dp_outer=2", "--fix", "cp=1", "--fix", "recompute=none"]  # fmt: skip
    code, _, said = plan("trace", HARDWARE.parent / "llama.py", "--arg", "size=8b", "--hardware",
                         own.name, *words, "-o", out)  # fmt: skip
    assert code == 0 and '"dp_outer": 2' in out.read_text(), said
    _, shown, said = plan("show", out)
    assert "dp outside the pipeline: 2" in shown, said
    code, _, said = plan("check", out)
    assert code == 0, said
