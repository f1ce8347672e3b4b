"""What is said to bind binds: by every subset of pins; what holds at least is never more than what
is held; hints are plans that fit."""

import itertools
import re
from dataclasses import replace

import pytest
from enumerated import best_of_problem, cuts, every_mesh, stage_choices
from test_search import searched
from tiny_models import EXAMPLES, costs_of, graph_of, with_memory

from cost_models.estimate import estimate_step
from cost_models.hardware import load_hardware
from cost_models.stage_problem import rank_bytes
from planner import infeasible as module
from planner import search
from planner.asking import Asking
from planner.bounds import NEVER_PS
from planner.decisions import Pins, parse_pins
from planner.infeasible import (
    EFFORT,
    MORE_EFFORT,
    Constraint,
    Questions,
    constraints,
    infeasible,
    needs,
)
from planner.mesh import meshes
from planner.pin_checks import check_pins
from planner.room import least_bytes, state_bytes
from planner.search import Searcher

MB = 1_000_000
LLAMA = str(EXAMPLES / "llama.py")


def small(megabytes, *texts, count=4, layers=2, **workload):
    """A search on GPUs of so little memory."""
    graph = graph_of("llama", size="8b", n_layers=layers)
    cluster = with_memory(load_hardware(f"h100x{count}"), megabytes * MB)
    costs = costs_of(graph, cluster, **{"global_batch": 4, "seq_len": 2048, **workload})
    pins = parse_pins(texts)
    costs.points = tuple(dict.fromkeys(
        [(1, 1)] + [(m.micro_batch, m.cp) for m in meshes(costs.chain, cluster, costs.workload,
                                                          Pins())]
    ))  # fmt: skip
    return Searcher(costs=costs, pins=pins, effort=10**9)


def test_what_an_end_holds_of_all_microbatches_is_in_bounds():
    """Logits lie on the GPU wherever layers' activations do: no mesh fits under GPipe."""
    pins = ("pp=2", "offload=activations:cpu")
    for schedule, fits in (("gpipe", False), ("1f1b", True)):
        searcher = small(30_000, f"schedule={schedule}", *pins, global_batch=256)
        runs = [mesh for mesh in searcher.meshes() if searcher.runs(mesh)]
        bounded = searcher.bounds(runs).lower_ps < NEVER_PS
        assert bounded.any() == fits and not bounded.all()
        out = searcher.run()
        assert bool(out.best) == fits
        assert fits or (out.seen and out.misfit.nearest.overflow_bytes > 0)


@pytest.mark.parametrize("name", ["recompute", "offload", "slow, tight", "moe, least", "groups"])
def test_no_rank_holds_less(name, tmp_path):
    """Of every variant and every cut, the fullest rank."""
    problem = searched(name, tmp_path)
    costs, searcher, space = problem.costs, problem.searcher, every_mesh(problem)
    checked = 0
    for mesh in space[:: max(1, len(space) // 12)]:
        laid = searcher.assign(mesh.tp, mesh.sequence_parallel)
        for d in searcher.variants(mesh):
            step = costs.step(d, laid)
            for made in searcher.schedules(d):
                p = searcher.problem(step, made)
                held = [
                    max(rank_bytes(p, stages, again))
                    for stages in cuts(p.layers, p.count)
                    for again in itertools.product(*(stage_choices(p, n) for n in stages))
                ]
                plain = max(rank_bytes(p, (s := next(cuts(p.layers, p.count))), [(0, 0)] * len(s)))
                assert state_bytes(step) <= least_bytes(step, recomputes=True) <= min(held)
                assert least_bytes(step, recomputes=False) <= plain
                checked += 1
    assert checked > 10


def test_what_a_recipe_has_seen_not_to_fit_is_told_as_memory():
    """Every state of the pins was too much for a search before: the nearest is the same."""
    searcher = small(300, "pp=1", "tp=1", "zero=0", "micro_batch=1")
    first, again = searcher.run(), searcher.run()
    assert first.misfit is not None and again.misfit == first.misfit
    assert "GB on pp rank 0: " in needs(searcher, again.misfit)


def test_leaving_out_what_cannot_fit_changes_nothing(tmp_path, monkeypatch):
    """The same best plan as where every program is solved."""
    from planner import expanding

    for name in ("offload", "slow, tight", "both", "moe, tight"):
        searcher = searched(name, tmp_path).searcher
        fast = searcher.run()
        monkeypatch.setattr(expanding, "least_bytes", lambda step, recomputes: 0)
        monkeypatch.setattr(expanding, "state_bytes", lambda step: 0)
        slow = replace(searcher, _over={}).run()
        monkeypatch.undo()
        assert fast.best == slow.best and fast.bound == slow.bound


CORES = [
    (8_000, ["recompute=none", "offload=none"]), (16_000, ["tp=1", "pp=1", "micro_batch=2"]),
    (12_000, ["tp=1", "zero=0", "micro_batch=4"]), (8_000, ["dp=4", "offload=none", "zero=1"]),
    (5_000, ["dp=4", "recompute=none"]), (1_000, ["tp=2", "recompute=none"]),
]  # fmt: skip


@pytest.mark.parametrize(("megabytes", "texts"), CORES)
def test_the_core_is_minimal(megabytes, texts):
    """By solving every subset of the pins: nothing fits under the core, something does without
    any one pin of it; and a core of no pins says that nothing fits at all."""
    searcher = small(megabytes, *texts)
    assert searcher.run().best is None

    def fits(pins):
        return searcher.under(pins).run().best is not None

    every = {
        kept: fits(parse_pins(kept))
        for n in range(len(texts) + 1) for kept in itertools.combinations(texts, n)
    }  # fmt: skip
    core = Questions(asked=Asking(searcher=searcher), pins=searcher.pins).core()
    words = tuple(t for t in texts if t in {c.said(searcher.pins) for c in core.pins})
    assert core.limits[0] == "memory" and core.proved
    assert not every[words]
    for one in words:
        assert every[tuple(w for w in words if w != one)]
    assert bool(words) == every[()]


def test_cores_of_no_pin_to_three():
    found = [small(mb, *texts) for mb, texts in CORES]
    cores = [Questions(asked=Asking(searcher=s), pins=s.pins).core().pins for s in found]
    assert {len(core) for core in cores} == {0, 1, 2, 3}


def test_hints_are_plans_that_fit():
    """Each is what another search finds, under what it says."""
    searcher = small(8_000, "recompute=none", "offload=none")
    fault = infeasible(searcher, searcher.run())
    assert fault.exit_code == 3 and "binding: memory" in fault.why
    for hint in fault.hints:
        size = float(re.search(r"([0-9.]+) GB a GPU", hint)[1])
        assert size <= 8.0
        if hint.startswith("without"):
            gone = re.findall(r"(\w+)=none", hint.partition(" it fits")[0])
            pins = replace(searcher.pins, **dict.fromkeys(gone))
            assert searcher.under(pins).run().best is not None
        more = re.match(r"(h100x\d+) holds it", hint)
        if more:
            count = load_hardware(more[1]).count
            assert small(8_000, "recompute=none", "offload=none", count=count).run().best
    assert fault.hints and infeasible(searcher, searcher.run()).lines() == fault.lines()


def test_what_a_hint_says_can_be_pinned():
    """Of layers below also which stages count them."""
    searcher = small(8_000, "offload=none", "tp=1")
    hint = infeasible(searcher, searcher.run()).hints[0]
    said = re.findall(r"(\w+=\S+),", hint.partition(" it fits: ")[2])
    assert "offload=optimizer:cpu:2" in said
    pins = parse_pins(said)
    check_pins(pins, searcher.costs.workload, gpus=4, layers=2)
    assert searcher.under(pins).run().best is not None


def test_two_cores_are_left_together():
    """Where each of two pins is too much alone, the hint leaves out both."""
    searcher = small(6_000, "dp=4", "offload=none")
    for text in ("dp=4", "offload=none"):
        assert searcher.under(parse_pins([text])).run().best is None
    core = Questions(asked=Asking(searcher=searcher), pins=searcher.pins).core()
    assert len(core.pins) == 1
    assert re.match(r"without (dp=4|offload=none) and (dp=4|offload=none) it fits", core.hints[0])


def test_no_legal_plan_names_the_pins(plan):
    code, out, err = plan(
        "trace", LLAMA, "--arg", "size=tiny", "--hardware", "h100x8", "--global-batch", "16",
        "--fix", "schedule=interleaved", "--fix", "micro_batch=1",
    )  # fmt: skip
    assert (code, out) == (3, "")
    assert "no mesh of h100x8" in err and "binding: schedule=interleaved (--fix)" in err
    assert "micro_batch" not in err.partition("hint:")[0].partition("binding")[2]
    assert "hint: without schedule=interleaved it fits: schedule=" in err


@pytest.mark.parametrize("words, said", [
    (["--fix", "microbatches=999999999", "--fix", "pp=2"], "hint: without pp=2 it fits: pp=1"),
    (["--seq-len", "999999999", "--global-batch", "8"], "planned are units of 10,000 s a sample"),
    (["--global-batch", "999999992", "--arg", "size=8b"], "planned are steps of a day at most"),
    (["--fix", "micro_batch=999999999", "--fix", "dp=8"],
     "--global-batch 7,999,999,992 is no size"),
])  # fmt: skip
def test_sizes_beyond_all_are_answered(plan, words, said):
    """Nothing that is asked goes on for as long as a number is large."""
    sized = () if "size=8b" in words else ("--arg", "size=tiny", "--seq-len", "64")
    code, out, err = plan("trace", LLAMA, "--hardware", "h100x8", *sized, *words)
    assert (code, out) in ((3, ""), (64, "")) and said in err


def test_one_domain_binds_where_a_wider_tp_would_do():
    searcher = small(80_000, "pp=1", "dp=1", "cp=1", count=16)
    out = searcher.run()
    assert out.meshes == 0
    fault = infeasible(searcher, out)
    assert "tp<=8 (one NVLink domain)" in fault.why
    assert any(hint.startswith("with --fix tp=16, across domains, it fits") for hint in fault.hints)


def test_constraints_leave_the_pins_alone():
    pins = parse_pins(["tp=2", "zero=1", "place:layers.*.wq=S(0)", "place:layers.*.wo=R"])
    names = [c.said(pins) for c in constraints(pins)]
    assert names == ["tp=2", "zero=1", "place:layers.*.wq=S(0)", "place:layers.*.wo=R"]
    for one in constraints(pins):
        assert len(constraints(one.without(pins))) == 3
    assert Constraint(key="tp").without(pins) == replace(pins, tp=None)


def test_brute_force_agrees_on_what_fits():
    """The whole space of a few programs, by all cuts and recomputations."""
    searcher = small(9_000, "offload=none", layers=2)
    costs, any_fits = searcher.costs, False
    for mesh in meshes(costs.chain, costs.cluster, costs.workload, searcher.pins):
        laid = searcher.assign(mesh.tp, mesh.sequence_parallel)
        for d in searcher.variants(mesh):
            step = costs.step(d, laid)
            for made in searcher.schedules(d):
                any_fits |= best_of_problem(searcher.problem(step, made)) is not None
    assert any_fits == (searcher.run().best is not None)


def test_with_less_than_the_nearest_misfit_holds_nothing_fits():
    """What is told to be near is: 3% below it there is no plan, and with it there is."""
    of = {"count": 16, "layers": 6, "global_batch": 64, "seq_len": 4096}
    megabytes = 2_500
    out = small(megabytes, **of).run()
    assert out.best is None and out.misfit is not None
    held = megabytes * MB + out.misfit.nearest.overflow_bytes
    assert small(held * 97 // 100 // MB, **of).run().best is None
    assert small(-(-held // MB), **of).run().best is not None


def test_meshes_known_not_to_fit_are_not_tried_one_after_the_other(monkeypatch):
    """Once nothing else is left a few of them say what is nearest, and it is known that nothing
    fits: as if all were tried, and no plan is nearer than that."""
    of = {"count": 16, "layers": 6, "global_batch": 64, "seq_len": 4096}
    out = small(1_000, **of).run()
    assert out.best is None and out.seen and out.expanded + out.hopeless == out.meshes
    assert out.expanded == search.NEAREST < out.meshes - 40
    monkeypatch.setattr(search, "NEAREST", 10**9)
    every = small(1_000, **of).run()
    assert every.best is None and every.expanded == every.meshes
    assert out.misfit.nearest.overflow_bytes <= every.misfit.nearest.overflow_bytes


def test_a_question_goes_on_while_something_may_fit(monkeypatch):
    """Little effort that finds nothing does not say that nothing fits."""
    searcher = small(7_000, "offload=none", count=8)
    asked, efforts, ask = Asking(searcher=searcher), [], Asking.ask

    def little(self, pins, *, effort, **rest):
        efforts.append(effort)
        return ask(self, pins, effort=0 if effort == EFFORT else effort, **rest)

    monkeypatch.setattr(Asking, "ask", little)
    found = Questions(asked=asked, pins=searcher.pins).answer(Pins())
    assert found is not None and found.outcome.best is not None
    assert efforts == [EFFORT, MORE_EFFORT]


def test_the_nearest_is_estimated_once(monkeypatch):
    """With a limit to memory, which names what it holds in a hint as well."""
    searcher, asked = small(8_000, "recompute=none", "offload=none"), []
    out = searcher.run()
    monkeypatch.setattr(module, "estimate_step", lambda *a: asked.append(a) or estimate_step(*a))
    fault = infeasible(searcher, out, (8_000 * MB, 85_000 * MB))
    said, held = (float(re.search(rf"{words} (\d+\.\d) ?GB", text)[1]) for words, text in (
        ("nearest needs", fault.why), ("--max-memory", fault.hints[0])
    ))  # fmt: skip
    assert said <= held <= said + 0.11 and len(asked) == 1
