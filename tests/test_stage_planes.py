"""Paths through schedules, the bounds made of them, and what a search does with both."""

import itertools
import operator
import random
import signal
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from ortools.linear_solver import linear_solver_pb2, pywraplp
from test_stages import brute, large, legal_shape, tiny

from cost_models.decisions import Decisions
from cost_models.schedule import SCHEDULES, rank_of, simulate
from cost_models.schedule_paths import critical_path, rank_paths
from cost_models.stage_problem import Extra
from planner.interrupts import held, interruptible
from planner.linear import INF, Draft
from planner.outcome import Unsettled
from planner.proof import BEYOND, Proof, joined
from planner.proving import Ask, Told, easiest_of
from planner.stage_paths import Known
from planner.stage_planes import ENDLESS, Effort, applies, refute
from planner.stage_whole import solve_tree, solve_whole
from planner.stages import evaluate, lower_bound_ps, near, solve


def taken(paths, times, sends):
    """What each path takes."""
    return (paths.runs * np.array(times)).sum(axis=(1, 2)) + paths.sends @ np.array(sends)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_paths_are_bounds_and_the_critical_one_is_the_makespan(schedule):
    rng, exact = random.Random(schedule), 0
    for _ in range(40):
        pp, m, v = legal_shape(rng, schedule, 2)
        stages = pp * v
        times = [[rng.randint(0, 20) for _ in range(stages)] for _ in range(3)]
        sends = [rng.randint(0, 5) for _ in range(stages - 1)]
        makespan = simulate(schedule, *times, sends, m, pp, v).makespan_ps
        between = [size * (rank_of(schedule, pp, k) != rank_of(schedule, pp, k + 1))
                   for k, size in enumerate(sends)]  # fmt: skip
        found, path = critical_path(schedule, *times, sends, m, pp, v)
        assert found == makespan == taken(path, times, between)[0]
        most = taken(rank_paths(schedule, pp, m, v), times, between).max()
        assert most <= makespan
        exact += most == makespan
    assert exact > 3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_is_refuted_that_exists(schedule):
    """No step at or below the best of all choices; and most of the way up to it is. What a tree
    tells that was left early is no more than that best."""
    shares, told, found = [], 0, 0
    for seed in range(12):
        p = tiny(seed, schedule)
        best = brute(p)[0] if applies(p) else None
        if best is None:
            continue
        known, low = Known.of(p), lower_bound_ps(p)
        ways = ((1, 200, 0.0), (9, 200, 0.0), (9, 1, 0.0), (1, 0, 1.0), (9, 0, 1.0))
        for part, nodes, seconds in ways:
            time = best + (best // part if part > 1 else 1)
            answer = refute(p, time, known, Effort(programs=50, nodes=nodes, whole_s=seconds))
            assert not answer.refuted and answer.least_ps <= best, seed
            told += answer.least_ps > 0.9 * best
            found += answer.held_ps < ENDLESS

        def none_below(time, p=p, known=known, seed=seed):
            one, other = (
                refute(p, time, known, effort).refuted
                for effort in (Effort(programs=50, nodes=200), Effort(programs=50, whole_s=1.0))
            )
            assert one == other, seed
            return one

        while low < best and none_below(low + best // 20):
            low += best // 20
        assert low <= best
        shares.append(low / best)
    assert len(shares) > 4 and np.mean(shares) > 0.9 and told > 2 and found > 10


def test_whole_layers_and_recomputation_are_in_the_bound():
    """126 equal layers on 16 ranks of 2 stages, some of which must recompute: the mean rank and
    half of the bubble are 15% below what is found, the linear programs 10% at most, each time."""
    p = large(schedule="interleaved", virtual_stages=2, microbatches=32)
    found, known = solve(p), Known.of(p)
    assert lower_bound_ps(p) < 0.85 * found.step_ps
    spent = []
    for shared in (known, Known.of(p)):
        effort = Effort(programs=40)
        assert refute(p, int(0.9 * found.step_ps), shared, effort).refuted
        spent.append(effort.programs)
    assert spent[0] == spent[1] > 0
    paths = len(known.runs)
    assert refute(p, int(0.9 * found.step_ps), known, Effort(programs=40)).refuted
    assert len(known.runs) <= paths + 2  # what is known already need not be found again
    other = replace(p, forward_ps=tuple(t + t // 50 for t in p.forward_ps))
    effort = Effort(programs=40)
    assert refute(other, int(0.9 * found.step_ps), known, effort).refuted
    assert effort.programs > spent[0]  # it begins with the paths that mattered


def test_what_is_pinned_is_left_to_others():
    p = large(schedule="interleaved", virtual_stages=2)
    assert applies(p)
    assert not applies(replace(p, fixed_stages=(4,) * 30 + (3,) * 2))
    assert not applies(replace(p, fixed_recompute="full"))
    assert not applies(replace(p, levels=("full",)))


def cut_short(p, layers):
    """The same problem with fewer layers."""
    def short(row):
        return tuple(map(short, row)) if isinstance(row[0], tuple) else row[:layers]

    names = ("forward_ps", "input_grad_ps", "weight_grad_ps", "recompute_ps", "activation_bytes",
             "working_bytes", "state_bytes", "gathered_bytes", "tail_comm_ps", "tail_hide_ps",
             "tail_own_ps")  # fmt: skip
    return replace(p, **{name: short(getattr(p, name)) for name in names})


def test_a_proof_raises_bounds_and_finds_what_they_point_at():
    """From a poor plan, the last step finds a better one and a bound that it keeps to."""
    p = large(schedule="interleaved", virtual_stages=2, pp=4, microbatches=16,
              capacity_bytes=60 * 2**30)  # fmt: skip
    p, d = cut_short(p, 18), Decisions(pp=4, schedule="interleaved", virtual_stages=2)
    low, seen = lower_bound_ps(p), []

    def found(one, better):
        fits = evaluate(p, better.stages, better.recompute)
        assert fits == (better.step_ps, better.peak_bytes, True)
        seen.append(better.step_ps)
        return better.step_ps * 51 // 50

    one = Unsettled(bound=low * 51 // 50, bound_ps=low, order=0, decisions=d,
                    assignments={}, problem=p)  # fmt: skip
    proof = Proof(best=2 * low, untried=1 << 62, left=[one], found=found, programs=2_000)
    left = proof.run()
    assert seen and proof.best == seen[-1] * 51 // 50
    assert seen == sorted(seen, reverse=True)
    bound = min([proof.best, *(u.bound for u in left)])
    assert 1.03 * low * 51 // 50 < bound <= proof.best < 1.03 * bound


def no_further(asked, asks):
    """Answers that raise no bound, of asks that are noted."""
    asked.extend(asks)
    return [Told(bound_ps=a.bound_ps, asked=7, high_ps=a.high_ps, took=1, stuck=True)
            for a in asks]  # fmt: skip


def test_what_layers_keep_is_asked_about_together():
    """Programs that differ in what recomputation in part takes and keeps: what is no harder than
    any is below the best of each, asked about once for all, and each is told of what it refutes."""
    rng, together = random.Random(5), 0
    for seed in range(18):
        p = tiny(seed, "interleaved")
        if "selective" not in p.levels or not applies(p):
            continue
        full, some = p.recompute_ps
        others = [replace(p, recompute_ps=(full, tuple(t + rng.randint(0, 9) for t in some)),
                          activation_bytes=(p.activation_bytes[0], tuple(
                              max(0, x - rng.randint(0, 9)) for x in p.activation_bytes[1]
                          ), p.activation_bytes[2])) for _ in range(3)]  # fmt: skip
        steps = [brute(q)[0] for q in others]
        if None in steps:
            continue
        easiest = easiest_of(others)
        assert brute(easiest)[0] <= min(steps) and easiest_of([p, replace(p, p2p_ps=99)]) is None
        d = Decisions(pp=p.pp, microbatches=p.microbatches, schedule="interleaved",
                      virtual_stages=2)  # fmt: skip
        left = [
            Unsettled(bound=lower_bound_ps(q), bound_ps=lower_bound_ps(q), order=n, assignments={},
                      decisions=replace(d, keep=(("u", (str(n),)),)), problem=q)
            for n, q in enumerate(others)
        ]  # fmt: skip
        (one,) = joined(left)
        assert one.members == tuple(left) and one.bound == min(u.bound for u in left)
        best = min(steps)
        proof = Proof(best=best, untried=1 << 62, left=left, gain_ppm=0, programs=1_700,
                      found=lambda *_, best=best: best)  # fmt: skip
        rest = proof.run()
        assert {u.order for u in rest} <= {0, 1, 2}
        assert all(u.bound_ps <= steps[u.order] for u in rest)
        together += not rest or min(u.bound for u in rest) > 0.95 * best
    assert together > 2
    # a member is asked about anew once all of them come no further together
    asked: list[Ask] = []
    replace(proof, left=left, answers=partial(no_further, asked), asked={}).run()
    assert asked[0].problem == one.problem and len(asked) > 1
    assert not any(a.asked or a.problem == one.problem for a in asked[1:])


def test_a_program_with_no_other_choice_worth_it_is_not_asked_about():
    """Activations on a tier so slow that no layer lies there: it is the program without the tier,
    of which alone is asked. One that is quicker by any number, or holds less, is asked about."""
    p = large(schedule="interleaved", virtual_stages=2, pp=4, microbatches=8)
    none, _, full = p.activation_bytes
    moved = {"activation_bytes": (none, (0,) * p.layers, full)}
    slow = replace(p, **moved, recompute_ps=(p.recompute_ps[0], (10**13,) * p.layers))
    quick = replace(p, **moved)
    low = lower_bound_ps(p)
    d = Decisions(pp=p.pp, microbatches=8, schedule="interleaved", virtual_stages=2)
    below = replace(d, offload=(("activations", "nvme:"),))

    def asked_of(*rows):
        asked: list[Ask] = []
        left = [Unsettled(bound=low, bound_ps=low, order=n, assignments={}, decisions=e, problem=q)
                for n, (e, q) in enumerate(rows)]  # fmt: skip
        Proof(best=2 * low, untried=1 << 62, left=left, gain_ppm=0,
              answers=partial(no_further, asked), found=lambda *_: 2 * low).run()  # fmt: skip
        return [a.problem.activation_bytes for a in asked]

    alone = [p.activation_bytes]
    assert asked_of((d, p), (below, slow)) == asked_of((below, slow), (d, p)) == alone
    for other in (quick, replace(slow, p2p_ps=p.p2p_ps - 1), replace(p, constant_bytes=-1)):
        assert len(asked_of((d, p), (below, other))) == 2
    tp = replace(below, tp=2)  # another axis has to earn its part: scores are not those of steps
    assert len(asked_of((d, p), (tp, slow))) == 2


@pytest.mark.parametrize("pin, patient", [(None, True), (("full", 1), False), (("full", 1), True)])
def test_behind_a_pin_that_is_raised_no_further_a_patient_search_looks_on(pin, patient):
    p = large(schedule="interleaved", virtual_stages=2, pp=4, microbatches=8,
              fixed_recompute=pin, capacity_bytes=10**15)  # fmt: skip
    d, low = Decisions(pp=4, schedule="interleaved", virtual_stages=2), lower_bound_ps(p)
    left = [
        Unsettled(bound=bound, bound_ps=bound, order=n, decisions=replace(d, microbatches=n),
                  assignments={}, problem=replace(p, p2p_ps=n))
        for n, bound in enumerate((low, 2 * low - 1), 1)  # what is nearer to the best comes later
    ]  # fmt: skip
    asked: list[Ask] = []
    Proof(best=2 * low, untried=1 << 62, left=left, gain_ppm=0, found=lambda *_: 2 * low,
          answers=partial(no_further, asked), kept=BEYOND + patient).run()  # fmt: skip
    assert [a.problem.p2p_ps for a in asked] == ([1, 2] if pin and patient else [1])


def test_what_was_found_is_bettered_though_a_search_is_interrupted():
    """The best plan by single moves, and no program more."""
    p = large(schedule="interleaved", virtual_stages=2, pp=4, microbatches=8,
              capacity_bytes=10**15)  # fmt: skip
    d = Decisions(pp=4, microbatches=8, schedule="interleaved", virtual_stages=2)
    even = (16, 16, 16, 16, 16, 16, 14, 16)
    low, step = lower_bound_ps(p), evaluate(p, even, ((0, 0),) * 8)[0]
    took = []

    def found(one, better):
        took.append(better.step_ps)
        return better.step_ps

    own = Unsettled(bound=low, bound_ps=low, order=0, assignments={}, decisions=d, problem=p,
                    stages=even)  # fmt: skip
    proof = Proof(best=step, untried=1 << 62, left=[own], gain_ppm=0, found=found,
                  stopped=lambda: True, answers=lambda asks: pytest.fail("asked"))  # fmt: skip
    assert proof.run() == [own] and took and proof.best == took[-1] < step


def test_an_interrupt_waits_for_a_solver_that_would_answer_it():
    """Ctrl-C while a program is solved is the search's, once it is solved."""
    with interruptible() as asked:
        with held():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            assert not asked()
        assert asked()


def test_an_interrupt_between_searches_of_one_answer_is_heard_by_the_next():
    with interruptible() as asked:
        with interruptible():
            pass
        signal.raise_signal(signal.SIGINT)  # no search runs, and nothing is lost
        with interruptible() as inner:
            assert asked() and inner()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    with interruptible() as asked:
        assert not asked()


def test_an_interrupt_that_a_solver_answered_is_passed_on(monkeypatch):
    """Where another thread takes the signal, a program that ends before its optimum is all there
    is to see of it."""
    p, effort = large(schedule="interleaved", virtual_stages=2, microbatches=32), Effort(programs=4)
    monkeypatch.setattr(pywraplp.Solver, "Solve", lambda solver, _: solver.FEASIBLE)
    with interruptible() as asked:
        assert not refute(p, 2 * lower_bound_ps(p), Known.of(p), effort).refuted
        assert asked() and effort.programs == 0


def test_layers_by_turns_and_whole_stages_are_refuted_to_the_optimum():
    """Light and heavy layers by turns: no stage has light ones alone, nor a part of a layer. A time
    just below the best of all cuts is refuted; one that exists is not. Fractions of layers do not
    tell it, and a layer moved at a time leads to that best."""
    undecided = 0
    for heavy, m, pp in ((50, 4, 2), (90, 8, 2), (70, 4, 4)):
        p = large(schedule="interleaved", virtual_stages=2, pp=pp, microbatches=m,
                  capacity_bytes=10**15, levels=("none",), last=Extra())  # fmt: skip
        p = cut_short(p, 11)
        p = replace(p, **{name: tuple(10**7 * (heavy if i % 2 else 20) for i in range(11))
                          for name in ("forward_ps", "input_grad_ps", "weight_grad_ps")})
        count = 2 * pp
        cuts = [tuple(b - a for a, b in itertools.pairwise((0, *at, 11)))
                for at in itertools.combinations(range(1, 11), count - 1)]  # fmt: skip
        best = min(evaluate(p, cut, ((0, 0),) * count)[0] for cut in cuts)
        known = Known.of(p)
        undecided += not refute(p, best * 999 // 1000, known, Effort(programs=200)).refuted
        for nodes, seconds in ((10_000, 0.0), (0, 10.0)):
            below, above = (
                refute(p, time, known, Effort(programs=200, nodes=nodes, whole_s=seconds))
                for time in (best * 999 // 1000, best + 1)
            )
            assert below.refuted and not above.refuted and above.held_ps < ENDLESS, (heavy, m, pp)
            assert evaluate(p, above.cuts[-1], ((0, 0),) * count)[0] <= (best + 1) * (1 + 1e-5)
        assert near(p, [cuts[0]], incumbent_ps=1 << 62).step_ps == best
        assert near(p, [cuts[0]], incumbent_ps=best).status == "CUTOFF"
    assert undecided


def test_whole_numbers_are_solved_or_said_to_be_open():
    """2x + 3y of whole numbers is not 1, and what is solved is solved the same again."""
    solver = pywraplp.Solver.CreateSolver("GLOP")
    x, y = solver.NumVar(0, 5, ""), solver.NumVar(0, 5, "")
    row = solver.Constraint(7, 7)
    row.SetCoefficient(x, 2)
    row.SetCoefficient(y, 3)
    solver.Objective().SetCoefficient(y, 1)
    first, again = (solve_tree(solver, [0, 1], 100, 9.0) for _ in range(2))
    assert first.complete and first.values.tolist() == again.values.tolist() == [2, 1]
    assert (first.nodes, first.iterations) == (again.nodes, again.iterations)
    one, two = (solve_whole(solver, (), 1.0) for _ in range(2))
    assert one.values.tolist() == two.values.tolist() == [2, 1] and one.took == two.took
    row.SetBounds(1, 1)
    none = solve_tree(solver, [0, 1], 100, 9.0)
    assert none.complete and none.values is None and first.least == 1
    assert solve_whole(solver, (), 1.0).none
    assert solve_tree(solver, [0], 100, 9.0).values.tolist() == [0, 1 / 3]
    part = solve_whole(solver, (1,), 1.0)
    assert part.values == pytest.approx([0, 1 / 3], abs=1e-6)
    small = pywraplp.Solver.CreateSolver("GLOP")
    row = small.Constraint(5e-9, 1)
    row.SetCoefficient(small.NumVar(0, 100, ""), 5e-10)
    assert not solve_whole(small, (), 1.0).none  # these are not the whole number zero


def test_no_whole_numbers_are_lost_to_rounding():
    """Rows of a third, a seventh and the like, of which CP-SAT is given a relaxation: where there
    is a choice it finds one, none of which breaks a row by more than some grains."""
    rng = random.Random(1)
    seen = set()
    for _ in range(60):
        solver = pywraplp.Solver.CreateSolver("GLOP")
        variables = [solver.NumVar(0, 3, "") for _ in range(3)]
        values = [[rng.randint(-9, 9) / rng.choice((1, 3, 7)) for _ in variables] for _ in range(2)]
        lows = [rng.randint(-9, 9) / 3 for _ in values]
        sides = [(low, low + rng.choice((0, 1, 5))) for low in lows]
        for row, side in zip(values, sides):
            made = solver.Constraint(*side)
            for x, value in zip(variables, row):
                made.SetCoefficient(x, value)

        def holds(point, slack, values=values, sides=sides):
            sums = [sum(map(operator.mul, row, point)) for row in values]
            return all(low - slack <= x <= high + slack for x, (low, high) in zip(sums, sides))

        exists = any(holds(point, 1e-12) for point in itertools.product(range(4), repeat=3))
        found = solve_whole(solver, (), 1.0)
        assert not (exists and found.none)
        assert found.none or holds(found.values, 1e-5)
        seen.add(exists)
    assert seen == {False, True}


def test_a_program_written_down_is_the_one_given_number_by_number():
    rng = random.Random(0)
    for _ in range(20):
        draft, solver = Draft(), pywraplp.Solver.CreateSolver("GLOP")
        count = rng.randint(1, 6)
        bounds = [(0, rng.randint(1, 9)) for _ in range(count)]
        places = [draft.variable(*one) for one in bounds]
        variables = [solver.NumVar(*one, "") for one in bounds]
        assert places == [*range(count)]
        for _ in range(rng.randint(1, 5)):
            some = rng.sample(places, rng.randint(1, count))
            values = [rng.choice((-1.5, 0.0, 1.0, 2.25)) for _ in some]
            most = rng.uniform(0, 9)
            row, half = solver.Constraint(-INF, most), len(some) // 2
            made = draft.row(-INF, most, some[:half], values[:half])
            for at, value in zip(some[half:], values[half:]):
                made.put(at, value)
            for at, value in zip(some, values):
                row.SetCoefficient(variables[at], value)
        protos = [linear_solver_pb2.MPModelProto() for _ in range(2)]
        for proto, one in zip(protos, (draft.load(), solver)):
            one.ExportModelToProto(proto)
        assert protos[0] == protos[1]
