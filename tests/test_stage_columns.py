"""Stages by columns: patterns are every choice that a rank may have, and bounds hold."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from test_stage_many import fits_below, roomy
from test_stage_planes import cut_short
from test_stages import brute, choices, large, tiny

from cost_models.schedule import SCHEDULES
from cost_models.stage_problem import allowed_pairs, evaluate, starts_of
from planner import stage_master, stage_patterns
from planner.stage_columns import Tree
from planner.stage_paths import Shapes
from planner.stage_patterns import MOST_LOADS, Ranks, patterns_of
from planner.stage_patterns import applies as applies_pinned
from planner.stage_planes import Effort, applies, classes_of
from planner.stages import near, solve


def effort():
    return Effort(programs=100_000, nodes=100_000)


def of_two_classes(p, seed):
    """The same with two classes of layers in any order: a load may be several rows of layers."""
    kinds = random.Random(seed).choices((0, p.layers - 1), k=p.layers)

    def row(values):
        return tuple(values[i] for i in kinds)

    alike = ("forward_ps", "input_grad_ps", "weight_grad_ps", "state_bytes", "gathered_bytes",
             "tail_comm_ps", "tail_hide_ps", "tail_own_ps")  # fmt: skip
    by_level = ("recompute_ps", "activation_bytes", "working_bytes")
    return replace(
        p, **{name: row(getattr(p, name)) for name in alike},
        **{name: tuple(map(row, getattr(p, name))) for name in by_level},
    )  # fmt: skip


def tree(p, below, shapes):
    return Tree(p, below, patterns_of(p, below), shapes.of(p))


def asked(p, below, shapes, effort):
    return tree(p, below, shapes).answer(below, below, effort)


def added(p, rank, stages, recompute):
    """[kind, stage]: what the layers of a rank take, with what they recompute."""
    times, starts = np.zeros((3, p.count)), starts_of(stages)
    for k in p.stages_of(rank):
        full, some = recompute[k]
        for place in range(stages[k]):
            i = starts[k] + place
            times[:, k] += p.forward_ps[i], p.input_grad_ps[i], p.weight_grad_ps[i]
            if place < full + some:
                times[1, k] += p.recompute_ps[place >= full][i]
    return times


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_choice_that_fits_has_a_pattern_on_each_rank(schedule):
    """Of as many layers of each class, which takes no longer on any stage."""
    checked, rng = 0, random.Random(schedule)
    for seed in range(12):
        p = tiny(seed, schedule)
        if not applies(p):
            continue
        every = list(choices(p))
        best, _ = brute(p)
        kinds, kind_of = classes_of(p)
        if best is None:
            continue
        found = patterns_of(p, 2 * best)
        for stages, recompute in rng.sample(every, min(200, len(every))):
            step, _, fits = evaluate(p, stages, recompute)
            if not fits or step >= 2 * best:
                continue
            starts = starts_of(stages)
            for rank in range(p.pp):
                own = [kind_of[i] for k in p.stages_of(rank)
                       for i in range(starts[k], starts[k] + stages[k])]  # fmt: skip
                count = np.bincount(own, minlength=len(kinds))
                takes = added(p, rank, stages, recompute)[:, p.stages_of(rank)].reshape(-1)
                mine = slice(*found.begins[rank : rank + 2])
                same = (found.loads[mine].sum(axis=1) == count).all(axis=1)
                assert (found.times[mine][same] <= takes).all(axis=1).any(), (seed, stages)
                checked += 1
    assert checked > 100


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_choice_that_fits_recomputes_within_the_limits_of_its_loads(schedule, free):
    """Patterns of loads alone: in all, of a stage, and at each moment; and the least is of all ways
    to recompute a load the least, or below it where layers differ. free: what saves memory for no
    time."""
    checked, least, rng = 0, [], random.Random(schedule)
    for seed in range(20):
        p = tiny(seed, schedule)
        if free:
            p = replace(p, recompute_ps=(p.recompute_ps[0], (0,) * p.layers))
        best = brute(p)[0] if applies(p) else None
        if best is None:
            continue
        kinds, kind_of = classes_of(p)
        ranks = Ranks(p, 2 * best)
        loads = ranks.loads_of_all(MOST_LOADS)
        alone, every = ranks.of_loads(loads), ranks.patterns(loads)
        of_choices = [choice for choice in choices(p) if evaluate(p, *choice)[2]]
        for stages, recompute in rng.sample(of_choices, min(100, len(of_choices))):
            if evaluate(p, stages, recompute)[0] >= 2 * best:
                continue
            starts = starts_of(stages)
            for rank in range(p.pp):
                own = [
                    np.bincount(kind_of[starts[k] : starts[k] + stages[k]], minlength=len(kinds))
                    for k in p.stages_of(rank)
                ]
                takes = added(p, rank, stages, recompute)[1, p.stages_of(rank)]
                takes -= np.array(own) @ [kind[1] for kind in kinds]
                mine = slice(*alone.begins[rank : rank + 2])
                (at,) = np.flatnonzero((alone.loads[mine] == own).all(axis=(1, 2)))
                limits = alone.spread.counts[rank] @ takes
                assert (alone.spread.needs_ps[mine][at] <= limits + 1e-6 * limits.max()).all()
                same = (every.loads == own).all(axis=(1, 2))
                same &= np.repeat(np.arange(p.pp), np.diff(every.begins)) == rank
                again = every.own_ps[same] - alone.own_ps[mine][at]  # beyond the least, all m
                assert (again > -1).all()
                least.append(again.min() <= 1)
                checked += 1
    assert checked > 100 and np.mean(least) > 0.8, np.mean(least)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("rooms", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_choice_is_refuted_and_most_bounds_are_near(schedule, rooms, alone, monkeypatch):
    if alone:
        monkeypatch.setattr(stage_patterns, "LOADS", 0)
    shapes, near, seen = Shapes(), 0, 0
    for seed in range(40):
        p = of_two_classes(tiny(seed, schedule), seed) if seed % 4 == 3 else tiny(seed, schedule)
        p = roomy(p, seed) if rooms else p
        fits = [
            evaluate(p, *choice)[0] for choice in choices(p)
            if evaluate(p, *choice)[2] and fits_below(p, *choice)
        ] if applies(p) else []  # fmt: skip
        if not fits:
            continue
        seen, best = seen + 1, min(fits)
        above = asked(p, best + 1 + best // 1000, shapes, effort())
        assert not above.refuted and above.least_ps <= best, seed
        few = asked(p, best, shapes, Effort(programs=3, nodes=2))
        assert few.least_ps <= best
        near += asked(p, best - best // 50, shapes, effort()).refuted
    assert seen > 10 and 10 * near >= 6 * seen, (near, seen)


PINS = "none", "full", ("full", 1), ("selective", 2), ((1, 1),) * 9, ((None, 0),) * 9


@pytest.mark.parametrize(("two", "pins"), [(False, PINS), (True, (*PINS[2:4], ("selective", 1)))])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_pinned_is_all_that_patterns_have(schedule, two, pins):
    """Of programs with pins of recomputation: as of those without."""
    shapes, near, seen = Shapes(), 0, 0
    for seed in range(120 if two else 60):  # a load's order matters to few
        p = of_two_classes(tiny(seed, schedule), seed) if two else tiny(seed, schedule)
        p = replace(p, fixed_recompute=pins[seed % len(pins)])
        fits = [
            evaluate(p, *choice)[0] for choice in choices(p)
            if all(pair in allowed_pairs(p, k, n) for k, (n, pair) in enumerate(zip(*choice)))
            and evaluate(p, *choice)[2]
        ] if applies_pinned(p) else []  # fmt: skip
        if not fits:
            continue
        seen, best = seen + 1, min(fits)
        above = asked(p, best + 1 + best // 1000, shapes, effort())
        assert not above.refuted and above.least_ps <= best, seed
        near += asked(p, best - best // 50, shapes, effort()).refuted
    assert seen > 10 and 10 * near >= 6 * seen, (near, seen)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("v", "pp", "layers"), [(2, 4, 18), (3, 4, 25), (2, 8, 31)])
def test_what_is_whole_points_at_better_plans_until_none_is_left(
    v, pp, layers, alone, monkeypatch
):
    """Short of memory: what is 2% below the best is refuted, and the best is not."""
    if alone:
        monkeypatch.setattr(stage_patterns, "LOADS", 0)
    p = large(schedule="interleaved", virtual_stages=v, pp=pp, microbatches=2 * pp,
              capacity_bytes=(25 if pp == 8 else 35) * 2**30)  # fmt: skip
    p, known = cut_short(p, layers), Shapes()
    best = solve(p).step_ps
    for _ in range(3):
        answer = asked(p, best * 98 // 100, known, effort())
        if answer.refuted:
            break
        best = near(p, answer.cuts, incumbent_ps=best).step_ps
    assert answer.refuted
    above = asked(p, best + best // 1000, known, effort())
    assert not above.refuted and above.least_ps <= best


def test_layers_keep_the_order_of_the_chain(monkeypatch):
    """Of slow and quick layers in turn a stage has as many of each, whatever would be better."""
    layers, slow = 16, 9
    p = large(schedule="interleaved", virtual_stages=2, pp=4, microbatches=8,
              capacity_bytes=1 << 60)  # fmt: skip
    p = cut_short(p, layers)
    p = replace(p, **{
        name: tuple(slow * getattr(p, name)[0] if i % 2 else getattr(p, name)[0]
                    for i in range(layers))
        for name in ("forward_ps", "input_grad_ps", "weight_grad_ps")
    })  # fmt: skip
    best, shapes = solve(p).step_ps, Shapes()
    above, below = best + best // 1000, best - best // 1000
    assert asked(p, below, shapes, effort()).refuted
    assert not asked(p, above, shapes, effort()).refuted
    monkeypatch.setattr(stage_master, "hulls", lambda kind_of, k: [])
    assert not asked(p, below, shapes, effort()).refuted


def test_a_tree_goes_on_where_it_was_left():
    """Asked again and again its bound rises to what it comes to at once; what is too long to be
    asked about may fall, and then it is done the sooner."""
    p = large(schedule="interleaved", virtual_stages=3, pp=8, microbatches=16,
              capacity_bytes=25 * 2**30)  # fmt: skip
    p = cut_short(p, 31)
    below = solve(p).step_ps * 96 // 100
    at_once = effort()
    whole = tree(p, below, Shapes())
    assert whole.answer(below, below, at_once).refuted
    took = 100_000 - at_once.programs
    bounds, some, given = [0], tree(p, below, Shapes()), 0
    while bounds[-1] < below:
        given += 1
        bounds.append(some.answer(below, below, Effort(programs=20, nodes=100)).least_ps)
        assert given < 2 * took
    assert bounds == sorted(bounds) and given > 2
    some = tree(p, below, Shapes())
    some.answer(below, below, Effort(programs=took // 2, nodes=100))
    top = below * 99 // 100
    lower = effort()
    answer = some.answer(top, top, lower)
    assert answer.refuted and answer.least_ps == top
    assert took // 2 + 100_000 - lower.programs < took


@pytest.mark.parametrize(("fails", "failed"), [({3, 4}, False), (set(range(3, 100)), True)])
def test_a_solver_that_gives_up_begins_with_few_patterns_or_says_so(fails, failed, monkeypatch):
    from ortools.linear_solver import pywraplp

    p = cut_short(large(schedule="interleaved", virtual_stages=2, pp=8, microbatches=16,
                        capacity_bytes=25 * 2**30), 31)  # fmt: skip
    below = solve(p).step_ps * 985 // 1000
    first, times, solves = tree(p, below, Shapes()), itertools.count(1), pywraplp.Solver.Solve
    monkeypatch.setattr(
        pywraplp.Solver, "Solve",
        lambda self, *how: self.ABNORMAL if next(times) in fails else solves(self, *how),
    )  # fmt: skip
    answer = first.answer(below, below, effort())
    assert next(times) > 4
    assert (answer.refuted, first.failed) == (not failed, failed)
    assert answer.least_ps <= below


def test_order_of_the_chain_is_told_without_rounding_noise():
    """Of three classes in turn: of numbers of 1e-17 the solver turned in circles."""
    p = cut_short(large(schedule="interleaved", virtual_stages=3, pp=2, microbatches=4,
                        capacity_bytes=1 << 60), 11)  # fmt: skip
    p = replace(p, forward_ps=tuple((1 + i % 3) * ps for i, ps in enumerate(p.forward_ps)))
    master = tree(p, 2 * solve(p).step_ps, Shapes()).master
    values = [
        abs(master._upto(place, (side, stage)))
        for side in range(len(master.sides)) for stage in range(p.count)
        for place in range(0, len(master.rank), 7)
    ]  # fmt: skip
    assert any(values) and min(x for x in values if x) > 1e-3


def test_many_patterns_are_of_loads_alone_and_too_many_are_none(monkeypatch):
    p = cut_short(large(schedule="interleaved", virtual_stages=2, pp=4, microbatches=8), 18)
    best = solve(p).step_ps
    assert patterns_of(p, best).spread is None
    for name in ("MOST", "LOADS"):
        with monkeypatch.context() as some:
            some.setattr(stage_patterns, name, 5)
            assert patterns_of(p, best).spread is not None
    monkeypatch.setattr(stage_patterns, "MOST_LOADS", 5)
    assert patterns_of(p, best) is None
