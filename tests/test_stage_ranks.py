"""How many layers a rank can take in a time and memory: bounds, against every choice."""

import random
from dataclasses import replace

import pytest
from test_stages import brute, choices, large, tiny, weigh

from cost_models.schedule import SCHEDULES, SPLIT_BACKWARD
from cost_models.stage_problem import starts_of
from planner.stage_paths import Known
from planner.stage_planes import Effort, refute
from planner.stage_ranks import applies, bound_ps, tables, usable
from planner.stages import lower_bound_ps, solve

ROWS = (
    "forward_ps", "input_grad_ps", "weight_grad_ps", "state_bytes", "gathered_bytes",
    "tail_comm_ps", "tail_hide_ps", "tail_own_ps",
)  # fmt: skip
LEVELS = ("recompute_ps", "activation_bytes", "working_bytes")


def of_two_kinds(p, rng):
    """The same with layers like its first or its last one, in any order."""
    order = [rng.choice((0, -1, -1)) for _ in range(p.layers)]
    made = {name: tuple(getattr(p, name)[i] for i in order) for name in ROWS}
    made |= {name: tuple(tuple(row[i] for i in order) for row in getattr(p, name))
             for name in LEVELS}  # fmt: skip
    return replace(p, **made)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_choice_is_below_the_bound_nor_beyond_the_tables(schedule):
    """Of every choice that fits: its step, the layers of each rank and what they recompute."""
    rng, sharper = random.Random(schedule), 0
    for seed in range(200, 214):
        p = of_two_kinds(tiny(seed, schedule), rng)
        if not applies(p):
            continue
        best = brute(p)[0]
        if best is None:
            continue
        assert lower_bound_ps(p) <= bound_ps(p) <= best, seed
        sharper += bound_ps(p) > lower_bound_ps(p)
        for stages, recompute in choices(p):
            step, _, fits = weigh(p, stages, recompute)
            if fits:
                check(p, stages, recompute, step)
    assert sharper or schedule in ("gpipe", "1f1b")


def check(p, stages, recompute, step):
    """One choice against what the tables say of it."""
    starts = starts_of(stages)
    for table in tables(p):
        for rank, most in enumerate(table.most(step)):
            mine, again = 0, 0
            for k in p.stages_of(rank):
                full, some = recompute[k]
                own = range(starts[k], starts[k] + stages[k])
                mine += len(set(own) & set(table.layers))
                again += sum(p.recompute_ps[0][i] for i in own[:full])
                again += sum(p.recompute_ps[1][i] for i in own[full : full + some])
            assert mine <= most
            assert all(a + b * mine <= again + 1e-6 for a, b in table.recomputed(rank, most))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_choice_has_a_level_that_is_left_out(schedule):
    """Of every choice that fits, asked about its own step; and dear levels are left out."""
    rng, left_out = random.Random(schedule), 0
    for seed in range(300, 320):
        p = tiny(seed, schedule)
        p = of_two_kinds(p, rng) if seed % 2 else p
        factors = rng.choice(((1, 1), (400, 1), (1, 400), (400, 400)))
        p = replace(p, recompute_ps=tuple(
            tuple(n * x for x in row) for n, row in zip(factors, p.recompute_ps)
        ))  # fmt: skip
        if not applies(p):
            continue
        for stages, recompute in choices(p):
            step, _, fits = weigh(p, stages, recompute)
            if not fits:
                continue
            left = usable(p, step + 1).levels
            used = {name for name, count in zip(("full", "selective"), map(sum, zip(*recompute)))
                    if count}  # fmt: skip
            assert used <= set(left), seed
            left_out += len(p.levels) - len(left)
    assert left_out or schedule in SPLIT_BACKWARD


def test_whole_layers_on_ranks_short_of_memory():
    """126 layers on 16 ranks of 4 stages: some rank has 8, and each recomputes whole ones. What
    all ranks keep together says nothing of that; the bound alone refutes, without a program."""
    p = large(schedule="interleaved", virtual_stages=4, microbatches=32, capacity_bytes=35 * 2**30)
    found, effort = solve(p), Effort(programs=40)
    assert lower_bound_ps(p) < 0.76 * found.step_ps
    assert 0.93 * found.step_ps < bound_ps(p) <= found.step_ps
    assert refute(p, bound_ps(p), Known.of(p), effort).refuted
    assert effort.programs == 40


def test_a_rank_waits_for_the_first_layers():
    """A slow first layer is before every rank but its own, there and back, whatever lies where."""
    p = large(schedule="interleaved", virtual_stages=2, microbatches=32, levels=("none",),
              capacity_bytes=10**15)  # fmt: skip
    more = {name: getattr(p, name)[0] for name in ROWS[:3]}
    slow = replace(p, **{name: (10 * t, *getattr(p, name)[1:]) for name, t in more.items()})
    before, after = (tables(one)[0].least_ps for one in (p, slow))
    assert (after[1:] - before[1:] == 9 * sum(more.values())).all()
    assert bound_ps(slow) <= solve(slow).step_ps


def test_what_is_pinned_is_not_looked_at():
    p = large(schedule="interleaved", virtual_stages=2, microbatches=32)
    pinned = replace(p, fixed_recompute="full")
    assert not tables(pinned) and bound_ps(pinned) == lower_bound_ps(pinned)
