"""What a refuted stage program says of others, against all choices of those."""

import random
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from test_stage_many import roomy
from test_stages import brute, choices, tiny

from cost_models.schedule import SCHEDULES
from cost_models.stage_problem import LEVELS, evaluate
from planner.expanding import Expander
from planner.refuted import UNLIMITED, Refuted, unlimited
from planner.stages import lower_bound_ps

TIMES = ("forward_ps", "input_grad_ps", "weight_grad_ps", "tail_own_ps")
SIZES = ("state_bytes", "gathered_bytes")


def changed(p, rng):
    """A program of the same shape: times by a factor, and some numbers a little more or less; in
    some a level is not allowed, whose numbers then say nothing."""
    factor = rng.choice((1, 1, 2))

    def some(row, least=0):
        low = -1 if rng.random() < 0.1 else 0
        return tuple(max(least, factor * x + rng.randint(low, 3)) for x in row)

    def ends(e):
        grown = {f.name: some((getattr(e, f.name),))[0] for f in fields(e)
                 if f.name not in ("tail_comm_ps", "tail_hide_ps")}  # fmt: skip
        return replace(e, **grown, tail_comm_ps=factor * e.tail_comm_ps + rng.randint(0, 2),
                       tail_hide_ps=factor * e.tail_hide_ps)  # fmt: skip

    made = {name: some(getattr(p, name)) for name in (*TIMES, *SIZES)}
    again, held = map(some, p.recompute_ps), map(some, p.activation_bytes)
    made |= {"recompute_ps": tuple(again), "activation_bytes": tuple(held)}
    if rng.random() < 0.3:
        held = tuple(row if name in ("none", "selective") else (0,) * p.layers
                     for name, row in zip(LEVELS, made["activation_bytes"]))  # fmt: skip
        few = tuple(name for name in p.levels if name != "full")
        made |= {"levels": few, "activation_bytes": held}
    return replace(
        p, **made, first=ends(p.first), last=ends(p.last),
        tail_comm_ps=tuple(factor * x for x in p.tail_comm_ps),
        tail_hide_ps=tuple(factor * x for x in p.tail_hide_ps), p2p_ps=factor * p.p2p_ps,
        rank_glue_forward_ps=factor * p.rank_glue_forward_ps,
        rank_glue_backward_ps=factor * p.rank_glue_backward_ps,
        capacity_bytes=p.capacity_bytes + rng.choice((-50, 0, 0, 50)),
    )  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_choice_is_below_what_is_known(schedule):
    """With and without a limit to memory; and much is known: of those no faster and no smaller,
    by a factor too."""
    rng, said = random.Random(schedule), {True: 0, False: 0}
    for seed in range(8):
        p = tiny(seed, schedule)
        free = unlimited(p)
        for one in (p, free):
            best = brute(one)[0]
            if best is None or "none" not in p.levels:
                continue
            known = Refuted()
            known.add(one, best)
            assert known.covers(one, best) and not known.covers(one, best + 1)
            assert known.covers(p, best)
            full = roomy(p, seed)  # a tier below leaves choices out, and so says nothing of others
            assert known.covers(full, best)
            silent = Refuted()
            silent.add(full, best)
            assert not silent.covers(p, 1)
            for _ in range(6):
                other = changed(p, rng)
                least = brute(other)[0]
                for below in (best, best + best // 10, 2 * best):
                    covered = known.covers(other, below)
                    assert not covered or least is None or least >= below, seed
                    said[covered] += 1
    assert said[True] > 10 and said[False] > 10


def least_of(p):
    """Of a program with slow boundaries."""
    found = (evaluate(p, *choice) for choice in choices(p))
    return min((step for step, _, fits in found if fits), default=None)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_slow_boundaries_are_compared_and_bounded(schedule):
    """Programs whose sends over some boundaries are slow: none has a choice below its bound, nor
    below what another says of it."""
    rng, said = random.Random(schedule), {True: 0, False: 0}
    for seed in range(16):
        p = tiny(seed, schedule)
        slow = tuple((rng.choice((0, 9, 40)), rng.choice((0, 30))) for _ in range(p.pp))
        p = unlimited(replace(p, slow_sends=slow))
        best = least_of(p)
        assert lower_bound_ps(p) <= best, seed
        known = Refuted()
        known.add(p, best)
        assert known.covers(p, best) and not known.covers(p, best + 1)
        for _ in range(4):
            more = tuple((a + rng.randint(-1, 9), b + rng.randint(0, 9)) for a, b in slow)
            other = unlimited(replace(changed(p, rng), slow_sends=more))
            covered = known.covers(other, best)
            assert not covered or least_of(other) >= best, seed
            said[covered] += 1
    assert said[True] > 10 and said[False] > 10


def test_what_was_asked_in_vain_is_not_asked_of_what_is_farther():
    p = unlimited(tiny(3, "1f1b"))
    slower = replace(p, forward_ps=tuple(2 * t for t in p.forward_ps))
    known = Refuted()
    assert known.promising(p, 1000)
    known.failed(p, 1000)
    assert not known.promising(p, 1000) and not known.promising(p, 1001)
    assert known.promising(slower, 1000) and known.promising(p, 999)


@pytest.mark.parametrize("others", ((), ("a set", "another")))
@pytest.mark.parametrize("free", (False, True))
@pytest.mark.parametrize("bars", (False, True))
def test_what_memory_bars_is_asked_about_without_a_limit_for_other_sets_alone(bars, free, others):
    """A program with several stages a rank, and what it stands for: none is solved where nothing is
    better without a limit to memory, which is asked where something is left that could be."""
    p = tiny(0, "interleaved")
    d = SimpleNamespace(tp=1, sequence_parallel=False)
    row = SimpleNamespace(step="of it", decisions=d, problem=p)
    asked = []
    expander = SimpleNamespace(
        keeps=lambda tp, split: "sets", _below=lambda best, d: 100, _eased=lambda row, out: others,
        _barred=lambda p, best: bars and p.capacity_bytes < UNLIMITED,
        _refuted=lambda p, best, out: asked.append(p) or free,
    )
    found = list(Expander._worth(expander, row, SimpleNamespace(best="known")))
    assert asked == ([] if bars and not others else [unlimited(p)])
    assert found == ([] if free else [*others] if bars else [row, *others])
