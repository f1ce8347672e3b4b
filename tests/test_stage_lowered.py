"""Stages whose first layers may have their optimizer below: the best count, by trying all."""

import itertools
import random
from dataclasses import replace

import pytest
from test_stages import choices, numbers, tiny, weigh

from cost_models.decisions import Decisions
from cost_models.stage_problem import Lowered
from planner.outcome import Unsettled
from planner.proof import Proof
from planner.stage_bounds import bound_lowered_ps
from planner.stage_memory import freely_lowered
from planner.stage_planes import applies
from planner.stages import Effort, certify, lower_bound_ps, solve, surely_infeasible

SCHEDULES = ("1f1b", "gpipe", "zbh1")


def lowerable(seed, schedule):
    """A problem of two stages or more whose layers may be lowered: for fewer bytes, and mostly a
    longer tail and more that is gathered."""
    rng = random.Random(f"low{seed}")
    p = tiny(seed, schedule)
    state = numbers(rng, 0, 90, p.layers)
    p = replace(p, state_bytes=tuple(s + 30 for s in state))
    return replace(p, lowered=Lowered(
        state_bytes=tuple(rng.randint(0, s) for s in state),
        gathered_bytes=tuple(g + rng.choice((0, 0, 9)) for g in p.gathered_bytes),
        tail_own_ps=tuple(max(0, t + rng.randint(-2, 30)) for t in p.tail_own_ps),
    ))  # fmt: skip


def with_below(p, stages, counts):
    """The problem layer by layer, as it is where so many layers of each stage are lowered."""
    rows, at = [], 0
    for n, below in zip(stages, counts):
        for place in range(n):
            of = p.lowered if place < below else p
            rows.append((of.state_bytes[at], of.gathered_bytes[at], of.tail_own_ps[at]))
            at += 1
    state, gathered, own = zip(*rows)
    return replace(
        p, lowered=None, state_bytes=state, gathered_bytes=gathered, tail_own_ps=own
    )


def brute(p):
    """The least step that fits, of all choices and of those that lower a layer."""
    found, some = [], []
    for stages, recompute in choices(p):
        for counts in itertools.product(*(range(n + 1) for n in stages)):
            step, _, fits = weigh(with_below(p, stages, counts), stages, recompute)
            if fits:
                found.append(step)
                some += [step] * any(counts)
    return min(found, default=None), min(some, default=None)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_enumeration(schedule):
    statuses, paid, sharper = set(), 0, 0
    for seed in range(24):
        p = lowerable(seed, schedule)
        best, some = brute(p)
        found = solve(p, effort=Effort(nodes=10**6, operations=10**9))
        statuses.add(found.status)
        if best is None:
            assert found.status == "INFEASIBLE" and found.nearest.overflow_bytes > 0
            continue
        assert not surely_infeasible(p)
        assert (found.status, found.step_ps, found.bound_ps) == ("OPTIMAL", best, best), seed
        assert lower_bound_ps(p) <= best
        assert some is None or lower_bound_ps(p) <= bound_lowered_ps(p) <= some
        sharper += lower_bound_ps(p) < bound_lowered_ps(p)
        assert weigh(with_below(p, found.stages, found.below), found.stages, found.recompute) == (
            best, found.peak_bytes, True
        )  # fmt: skip
        assert solve(p, incumbent_ps=best).status == "CUTOFF"
        assert best - 1 <= solve(p, incumbent_ps=best + 1).step_ps <= best
        plain = solve(replace(p, lowered=None))
        assert plain.status == "INFEASIBLE" or plain.step_ps >= best
        paid += any(found.below) and plain.step_ps != best
    assert "INFEASIBLE" in statuses and paid >= 5 and sharper >= 5, (statuses, paid, sharper)


def test_bounds_hold_when_effort_runs_out():
    for seed, nodes in itertools.product(range(12), (1, 60, 200)):
        p = lowerable(seed, "1f1b")
        whole = solve(p, effort=Effort(nodes=10**6, operations=10**9))
        if whole.status == "OPTIMAL":
            found = solve(p, effort=Effort(nodes=nodes, operations=10**9))
            assert found.bound_ps <= whole.step_ps <= (found.step_ps or whole.step_ps)
            assert certify(p, incumbent_ps=whole.step_ps) <= whole.step_ps


def test_a_proof_raises_their_bounds_as_if_they_were_lowered_for_nothing():
    """Two programs that differ in what layers keep at once, and each alone; no plan of theirs."""
    raised = 0
    for seed in range(24):
        p = lowerable(seed, "1f1b")
        (best, _), low = brute(p), lower_bound_ps(p)
        if best is None or not applies(freely_lowered(p)):
            continue
        rows = [
            Unsettled(
                bound=low, bound_ps=low, order=n, assignments={}, problem=p,
                decisions=Decisions(pp=p.pp, keep=keep),
            )
            for n, keep in enumerate(((), (("u1", ()),)))
        ]  # fmt: skip
        left = Proof(
            best=best, untried=1 << 62, left=rows, gain_ppm=0, found=lambda *_: pytest.fail()
        ).run()
        assert all(u.problem is p and low <= u.bound_ps <= best for u in left), seed
        raised += not left or left[0].bound_ps > low
    assert raised >= 5, raised
