"""Many choices of a stage problem at once, and what annealing makes of one."""

import random
from dataclasses import replace

import numpy as np
import pytest
from test_stages import brute, choices, legal_shape, tiny

from cost_models.schedule import SCHEDULES, latencies_ps, simulate
from cost_models.schedule_many import Makespans
from cost_models.stage_many import NEVER_PS, Many
from cost_models.stage_problem import Found, Room, below_bytes, evaluate
from planner import stage_anneal
from planner.stages import near


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_makespans_are_those_of_the_simulation(schedule):
    rng = random.Random(schedule)
    for _ in range(20):
        pp, m, v = legal_shape(rng, schedule, 1)
        stages = pp * v
        sends = [rng.randint(0, 5) for _ in range(stages - 1)]
        busy = rng.choice(([], [rng.randint(0, 9) for _ in range(stages - 1)]))
        steps = [[[rng.randint(0, 20) for _ in range(stages)] for _ in range(3)] for _ in range(7)]
        alone = [simulate(schedule, *times, sends, m, pp, v, busy_ps=busy).makespan_ps
                 for times in steps]  # fmt: skip
        f, b, w = np.array(steps).transpose(1, 2, 0)
        durations = np.stack([f, b, w, b + w], axis=1).reshape(4 * stages, -1)
        latency = latencies_ps(schedule, pp, stages, sends)
        assert Makespans(schedule, pp, m, v, latency, busy).of(durations).tolist() == alone


def of(stages, recompute):
    """A choice as arrays have it."""
    return [(n - sum(pair), pair[1], pair[0]) for n, pair in zip(stages, recompute)]


def roomy(p, seed):
    """The problem with a tier below that is too small for some choices."""
    rng = random.Random(seed)
    few = [tuple(rng.randint(0, 20) for _ in range(p.layers)) for _ in range(4)]
    limits = tuple(rng.randint(20, 200) for _ in range(p.pp))
    return replace(p, rooms=(Room(
        tier="cpu", most_bytes=max(limits), mean_bytes=0, sure_bytes=0, state_bytes=few[0],
        aside_bytes=(few[1], few[2], few[3]), ends_bytes=(rng.randint(0, 9), rng.randint(0, 9)),
        limits_bytes=limits,
    ),))  # fmt: skip


def fits_below(p, stages, recompute):
    return all(used <= room.of_rank(rank) for room in p.rooms
               for rank, used in enumerate(below_bytes(p, room, stages, recompute)))  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_are_those_of_each_choice(schedule):
    fit = 0
    for seed in range(12):
        for p in (tiny(seed, schedule), roomy(tiny(seed, schedule), seed)):
            if p.ranks or p.lowered is not None:
                continue
            some = list(choices(p))
            alone = []
            for stages, recompute in some:
                step, _, fits = evaluate(p, stages, recompute)
                fits = fits and fits_below(p, stages, recompute)
                alone.append(step if fits else NEVER_PS)
                fit += fits
            found = Many(p).steps_ps(np.array([of(*choice) for choice in some]))
            assert found.tolist() == alone, seed
    assert fit > 100


@pytest.mark.parametrize("schedule", ["interleaved", "zbv", "dualpipev"])
def test_annealing_comes_to_the_best_of_all_choices(schedule, monkeypatch):
    monkeypatch.setattr(stage_anneal, "ROUNDS", 150)  # there are few choices
    seen = 0
    for seed in range(6):
        p = tiny(seed, schedule)
        best = brute(p)[0]
        if best is None:
            continue
        some = [(evaluate(p, *choice), choice) for choice in choices(p)]
        step, (stages, recompute) = max((e[0], choice) for e, choice in some if e[2])
        worst = Found(stages=stages, recompute=recompute, step_ps=step)
        found = stage_anneal.annealed(p, worst, step)
        assert found.step_ps == best, seed
        assert evaluate(p, found.stages, found.recompute)[::2] == (best, True)
        if not seen:
            assert stage_anneal.annealed(p, worst, step) == found
            assert stage_anneal.annealed(p, found, step) == found  # none is better: given again
            assert near(p, [stages], incumbent_ps=best, anneal=True).status == "CUTOFF"
        seen += step > best
    assert seen > 1
