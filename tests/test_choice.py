"""The choice solver against exhaustive enumeration, and each of its parts against the problem."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from ir.errors import InfeasibleError, PlanError
from planner.choice.core import core_of
from planner.choice.dual import Dual
from planner.choice.mip import Limits, relax, solve_mip
from planner.choice.problem import FORBIDDEN, Problem, cost_of, feasible, peak_of
from planner.choice.reduce import graph_of, reduce, restore
from planner.choice.solve import solve

ROOT = Path(__file__).resolve().parent.parent


def instance(seed, *, nodes=7, states=4, tightness=None, forbidden=0.2, follow=0.3):
    """A random problem: chains and shortcuts, some tables that determine a state or are sums.

    tightness: of the limit between the least bytes and the most; None for a random one.
    """
    rng = random.Random(seed)
    sizes = [rng.randint(1, states) for _ in range(nodes)]

    def costs(*shape):
        found = np.array([rng.randint(0, 50) for _ in range(int(np.prod(shape)))]).reshape(shape)
        return found.astype(np.int64)

    pairs = [(v, rng.randrange(v)) for v in range(1, nodes) if rng.random() < 0.9]
    pairs += [tuple(rng.sample(range(nodes), 2)) for _ in range(nodes // 2)]
    tables = []
    for u, v in pairs:
        table = costs(sizes[u], sizes[v])
        kind = rng.random()
        if kind < follow:
            leads = np.array([rng.randrange(sizes[v]) for _ in range(sizes[u])])
            table[np.arange(sizes[v])[None] != leads[:, None]] = FORBIDDEN
        elif kind < follow + 0.1:
            table = costs(sizes[u])[:, None] + costs(sizes[v])[None]
        else:
            for cell in np.ndindex(table.shape):
                table[cell] = FORBIDDEN if rng.random() < forbidden else table[cell]
        tables.append(table)
    intervals = []
    for _ in range(nodes):
        start = rng.randrange(8)
        intervals.append((start, start + rng.randint(0, 6)))
    usages = tuple(costs(n) for n in sizes)
    problem = Problem(
        costs=tuple(costs(n) for n in sizes), usages=usages, intervals=tuple(intervals),
        edges=tuple(pairs), tables=tuple(tables),
    )  # fmt: skip
    least = peak_of(problem, [int(u.argmin()) for u in usages])
    most = peak_of(problem, [int(u.argmax()) for u in usages])
    share = rng.choice((-0.1, 0.0, 0.1, 0.3, 0.6, 1.0)) if tightness is None else tightness
    limit = round(least + share * (most - least))
    return Problem(
        costs=problem.costs, usages=usages, intervals=problem.intervals, edges=problem.edges,
        tables=problem.tables, limit=limit,
    )  # fmt: skip


def least_cost(problem):
    """The optimum by enumeration; None if there is no solution."""
    found = [
        cost_of(problem, picks)
        for picks in product(*(range(len(c)) for c in problem.costs))
        if feasible(problem, picks)
    ]
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(80))
def test_optimum_is_that_of_enumeration(seed):
    problem = instance(seed, nodes=5 + seed % 4)
    expected = least_cost(problem)
    if expected is None:
        with pytest.raises(InfeasibleError):
            solve(problem)
        return
    found = solve(problem)
    assert feasible(problem, found.picks)
    assert (found.cost, found.bound, found.optimal) == (expected, expected, True)
    assert cost_of(problem, found.picks) == found.cost


@pytest.mark.parametrize("seed", range(60))
def test_reductions_keep_the_optimum(seed):
    """Of what the reductions leave, the best is the best of all, once restored."""
    problem = instance(1000 + seed)
    expected = least_cost(problem)
    graph = graph_of(problem)
    try:
        reduce(graph)
    except InfeasibleError:
        assert expected is None
        return
    left = sorted(graph.alive)
    costs = []
    for picks in product(*(range(len(graph.alive[v])) for v in left)):
        whole = restore(graph, dict(zip(left, picks)))
        core = core_of(graph)
        cost = core.total(np.array(picks, dtype=np.int64))
        fits = core.fits(np.array(picks, dtype=np.int64))
        assert cost_of(problem, whole) == cost or not np.isfinite(cost)
        assert fits == (peak_of(problem, whole) <= problem.limit)
        if fits and np.isfinite(cost):
            costs.append(cost)
    assert min(costs, default=None) == expected


def hard(seed, tightness=0.1):
    """A problem that no reduction takes apart."""
    return instance(seed, nodes=9, states=4, tightness=tightness, forbidden=0.05, follow=0.0)


@pytest.mark.parametrize("seed", range(25))
def test_bounds_hold_and_what_is_read_fits(seed):
    """No multipliers and no sweeps bring the bound above the optimum."""
    problem = hard(seed)
    expected = least_cost(problem)
    graph = graph_of(problem)
    try:
        reduce(graph)
    except InfeasibleError:
        assert expected is None
        return
    core = core_of(graph)
    if expected is None or not core.nodes:
        return
    dual = Dual(core)
    dual.ascend(30, lambda: False)
    assert dual.bound <= expected + 1e-6
    dual.price(core.memory.times, np.linspace(0.0, 3.0, len(core.memory.times)))
    for _ in range(5):
        assert dual.sweep() <= expected + 1e-6
    if dual.picks is not None:
        assert core.fits(dual.picks)
        whole = restore(graph, dict(zip(core.nodes, dual.picks.tolist())))
        assert feasible(problem, whole) and cost_of(problem, whole) == dual.cost >= expected
    relaxed = relax(core, rows=[])
    assert relaxed is not None and (relaxed.multipliers >= 0).all()
    answer = solve_mip(core, rows=[], limits=Limits(nodes=1000))
    assert answer.complete and answer.bound <= expected + 1e-3
    assert core.total(answer.picks) == expected


@pytest.mark.parametrize("seed", range(12))
def test_kernels_find_good_solutions(seed, monkeypatch):
    """The way of large problems, on small ones: it fits, its bound holds, and it is near."""
    import planner.choice.solve as module

    monkeypatch.setattr(module, "WHOLE_CELLS", 0)
    monkeypatch.setattr(module, "KERNEL_STATES", 1.0)
    problem = hard(200 + seed, tightness=0.3)
    expected = least_cost(problem)
    if expected is None:
        with pytest.raises(PlanError):
            solve(problem)
        return
    found = solve(problem)
    assert feasible(problem, found.picks) and cost_of(problem, found.picks) == found.cost
    assert found.bound <= expected <= found.cost <= 1.1 * expected


def test_forbidden_everywhere_is_infeasible():
    table = np.full((2, 2), FORBIDDEN)
    zero = np.zeros(2, dtype=np.int64)
    problem = Problem(
        costs=(zero, zero), usages=(zero, zero), intervals=((0, 1), (0, 1)), edges=((0, 1),),
        tables=(table,),
    )  # fmt: skip
    with pytest.raises(InfeasibleError):
        solve(problem)


def test_malformed_problems_are_refused():
    zero = np.zeros(2, dtype=np.int64)
    with pytest.raises(PlanError, match="table has one entry"):
        Problem(costs=(zero, zero), usages=(zero, zero), intervals=((0, 1), (0, 1)),
                edges=((0, 1),), tables=(np.zeros((2, 3), dtype=np.int64),))  # fmt: skip
    with pytest.raises(PlanError, match="joins two nodes"):
        Problem(costs=(zero,), usages=(zero,), intervals=((0, 1),), edges=((0, 0),),
                tables=(np.zeros((2, 2), dtype=np.int64),))  # fmt: skip


def medium(seed=7, nodes=120, states=6):
    """Larger than enumeration can, with memory short."""
    return instance(seed, nodes=nodes, states=states, tightness=0.3, forbidden=0.0, follow=0.0)


def test_same_work_same_answer():
    """Effort alone decides: also in kernels, and under a limit that is not reached."""
    first = solve(medium(), effort=0.5)
    assert solve(medium(), effort=0.5, seconds=600.0) == first
    assert feasible(medium(), first.picks)


def test_each_better_solution_is_told():
    told = []
    last = solve(medium(9), better=told.append)
    costs = [s.cost for s in told]
    assert costs == sorted(costs, reverse=True) and last.cost == costs[-1]
    assert all(s.bound <= last.cost for s in told)


def contest_file(problem, path):
    """Write a problem as the contest does."""
    text = json.dumps({"problem": {
        "name": "random",
        "nodes": {
            "intervals": [list(i) if i[0] < i[1] else [] for i in problem.intervals],
            "costs": [c.tolist() for c in problem.costs],
            "usages": [u.tolist() for u in problem.usages],
        },
        "edges": {
            "nodes": [list(e) for e in problem.edges],
            "costs": [t.ravel().tolist() for t in problem.tables],
        },
        "usage_limit": problem.limit,
    }})  # fmt: skip
    path.write_bytes(gzip.compress(text.encode()))
    return path


def command(*words):
    """The benchmark, as a user calls it."""
    return [sys.executable, str(ROOT / "benchmarks" / "iopddl.py"), *map(str, words)]


def test_command_prints_the_strategies_last(tmp_path):
    problem = instance(3, tightness=1.0, forbidden=0.0, follow=0.0)
    path = contest_file(problem, tmp_path / "p.json.gz")
    done = subprocess.run(command(path, "--seconds", 60), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    picks = json.loads(done.stdout.splitlines()[-1])
    assert cost_of(problem, picks) == least_cost(problem) and feasible(problem, picks)
    assert "OPTIMAL" in done.stderr


def test_command_faults(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    done = subprocess.run(command(tmp_path / "x.json"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and "not an instance" in done.stderr
    path = contest_file(instance(3, tightness=-0.5), tmp_path / "p.json.gz")
    done = subprocess.run(command(path), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_prints_the_best_so_far(tmp_path, number, heeds_interrupts):
    problem = instance(11, nodes=900, states=12, tightness=0.5, forbidden=0.0, follow=0.0)
    path = contest_file(problem, tmp_path / "p.json.gz")
    child = subprocess.Popen(
        command(path, "--effort", 1000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heeds_interrupts,
    )  # fmt: skip
    assert child.stderr is not None and child.stderr.readline().startswith("cost ")
    assert child.poll() is None, "it was done before the signal"
    os.kill(child.pid, number)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert feasible(problem, json.loads(out.splitlines()[-1]))
