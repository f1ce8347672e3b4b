"""Of the plans within the share, no one is nearer to the old plan, by trying them all."""

import itertools
from dataclasses import replace

import pytest
from enumerated import best_of_problem, every_mesh
from test_search import searched
from tiny_models import EXAMPLES

from cost_models.estimate import estimate_step, stage_problem, whole_step_ps
from cost_models.stage_problem import evaluate
from planner import load
from planner.decisions import Pins
from planner.plan import Solver, make_plan
from planner.stability import changed, distance, keeps, objective_limit, steady

LLAMA = str(EXAMPLES / "llama.py")


def plan_of(costs, tried):
    """A plan file's content of what a search found."""
    from cost_models.words import sharding_of

    made = estimate_step(costs, costs.step(tried.decisions, tried.assignments), tried.decisions)
    shardings = {unit.name: sharding_of(unit, a) for (unit, _), a in tried.assignments.items()}
    return make_plan(
        costs.graph, "h100x8", costs.cluster, costs.workload, tried.decisions, shardings, made,
        Solver(),
    )  # fmt: skip


OLD = [
    ("four", {"tp": 2}), ("four", {"pp": 2}), ("four", {"zero": 0}), ("four", {"micro_batch": 1}),
    ("two", {"pp": 2, "schedule": "gpipe"}), ("recompute", {"tp": 1}), ("both", {"cp": 1}),
    ("moe, two", {"ep": 2}), ("moe, four", {"zero": 1}), ("tp", {"tp": 2}),
]  # fmt: skip


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in OLD))
def test_no_plan_within_the_share_is_nearer(name, tmp_path):
    problem = searched(name, tmp_path)
    out, ways = problem.searcher.run(), every_way(problem)
    for pins in (pins for of, pins in OLD if of == name):
        old = problem.searcher.under(Pins(**pins)).run().best
        assert old is not None
        far = [(least, tuple(map(len, changed(old.decisions, d)))) for least, d in ways]
        for share in (0.0, 0.02, 0.3, 3.0):
            nearest_of(problem, old, out, far, share)


def every_way(problem):
    """(the least step, decisions) of all that differ in more than stages and recomputation."""
    costs, searcher, found = problem.costs, problem.searcher, []
    for mesh in every_mesh(problem):
        laid = searcher.assign(mesh.tp, mesh.sequence_parallel)
        ways = [way for d in searcher.variants(mesh) for way in (d, *searcher.by_count(d))]
        for held in ways:
            made = costs.step(held, laid)
            for d in searcher.schedules(held):
                default = searcher.problem(made, d)
                others = [p for _, p in searcher.kept_otherwise(made, d, default)]
                steps = [best_of_problem(p) for p in (default, *others)]
                if any(step is not None for step in steps):
                    found.append((min(step for step in steps if step is not None), d))
    return found


def nearest_of(problem, old, out, far, share):
    """Of the plans within the share, the one chosen changes least. far: (step, distance) of all."""
    costs, searcher = problem.costs, problem.searcher
    found = steady(searcher, out, plan_of(costs, old), share)
    chosen = found.outcome.best
    limit = objective_limit(costs, out.best.objective_ps, share)
    step = costs.step(chosen.decisions, chosen.assignments)
    again = evaluate(stage_problem(costs, step), chosen.decisions.stages, chosen.decisions.pairs)
    assert again[::2] == (chosen.objective_ps, True) and chosen.objective_ps <= limit
    assert found.distance[:3] == min(distance for step, distance in far if step <= limit)
    if old.objective_ps <= limit:
        assert chosen.decisions == old.decisions and found.distance == (0,) * 5
    assert found.distance <= found.best_distance
    assert found.slower <= share + 1e-6


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_the_proof_stays_of_time(share, tmp_path):
    """The bound is the search's; the gap is what the choice gave up, and more if it was open."""
    problem = searched("four", tmp_path)
    costs, searcher = problem.costs, problem.searcher
    old = searcher.under(Pins(tp=2)).run().best
    out = searcher.run()
    kept = steady(searcher, out, plan_of(costs, old), share).outcome
    assert out.proved and kept.bound == out.bound
    assert kept.proved == (kept.best.score == out.best.score)
    assert kept.gap == pytest.approx(1 - out.best.score / kept.best.score)


def test_distances():
    from cost_models.decisions import Decisions

    a = Decisions(pp=2, dp=4, zero=1, shard=4, micro_batch=1, microbatches=8, stages=(2, 2),
                  recompute=((1, 0), (0, 0)))  # fmt: skip
    assert distance(a, a) == (0, 0, 0, 0, 0)
    assert distance(a, replace(a, dp=8, shard=8, microbatches=4)) == (1, 0, 0, 0, 0)
    assert distance(a, replace(a, shard=2)) == (0, 1, 0, 0, 0)
    assert distance(a, replace(a, zero=2, schedule="gpipe")) == (0, 1, 1, 0, 0)
    assert distance(a, replace(a, stages=(3, 1), recompute=((1, 0), (1, 0)))) == (0, 0, 0, 1, 1)
    assert distance(a, replace(a, cp_kind="ulysses")) == (0, 0, 0, 0, 0)  # cp is 1
    assert distance(a, replace(a, stages=(2, 3))) == (0, 0, 0, 5, 5)
    order = [replace(a, tp=2), replace(a, zero=2, shard=2), replace(a, schedule="gpipe"),
             replace(a, stages=(3, 1)), replace(a, recompute=((0, 0), (0, 0)))]  # fmt: skip
    far = [distance(a, b) for b in order]
    assert all(x > y for x, y in itertools.pairwise(far))


def test_limit_is_the_largest_within_the_share(tmp_path):
    problem = searched("four", tmp_path)
    costs, searcher = problem.costs, problem.searcher
    best = searcher.run().best.objective_ps
    for share in (0.0, 0.02, 0.5):
        limit = objective_limit(costs, best, share)
        most = whole_step_ps(costs, best) * (1 + share)
        assert limit >= best and whole_step_ps(costs, limit) <= most + 1
        assert whole_step_ps(costs, limit + 2) > most - 1


def test_pins_are_kept(tmp_path):
    problem = searched("four", tmp_path)
    costs, searcher = problem.costs, problem.searcher
    old = searcher.under(Pins(tp=2)).run().best
    pinned = searcher.under(Pins(tp=1, zero=2))
    found = steady(pinned, pinned.run(), plan_of(costs, old), 10.0).outcome.best.decisions
    assert (found.tp, found.zero) == (1, 2)
    assert keeps(Pins(tp=2), old.decisions) and not keeps(Pins(tp=1), old.decisions)


def test_the_command(plan, tmp_path):
    tiny = ("--arg", "size=tiny", "--arg", "n_layers=4", "--global-batch", "16")
    assert plan("trace", LLAMA, *tiny, "--hardware", "h100x4", "--fix", "tp=2", "-o",
                "old.json")[0] == 0  # fmt: skip
    old = load(tmp_path / "old.json")
    again = ("trace", "--hardware", "h100x4", "--base", "old.json", "-o", "new.json")
    assert plan(*again)[0] == 0
    assert load(tmp_path / "new.json").decisions != old.decisions
    code, out, _ = plan(*again, "--stability", "900%")
    new = load(tmp_path / "new.json")
    assert code == 0 and "changes nothing" in out
    assert new.decisions == old.decisions and new.solver.status == "FEASIBLE"
    assert new.solver.bound_us < new.step_time_us and new.solver.gap_ppm > 0
    text = (tmp_path / "new.json").read_text()
    assert plan(*again, "--stability", "900%")[0] == 0
    assert (tmp_path / "new.json").read_text() == text
    assert plan("trace", LLAMA, *tiny, "--hardware", "h100x4", "--stability", "2%")[0] == 64
    assert plan(*again, "--stability", "2")[0] == 64
