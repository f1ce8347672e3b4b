"""Stages: the search equals exhaustive enumeration, and its bounds hold."""

import itertools
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cost_models.schedule import (
    SCHEDULES,
    chunks_of,
    peak_stash,
    rank_of,
    schedule_illegal,
    simulate,
)
from cost_models.stage_problem import Lowered, Steps, step_ps, tail_ps, timeline
from ir.errors import UsageError
from planner.by_layer import best_count
from planner.stage_bounds import filled_ps, least_tail_ps
from planner.stage_chunks import Chunks
from planner.stage_cuts import _candidates, _quickest, bound_all
from planner.stage_memory import forced_ps, surely_fits
from planner.stages import (
    Effort,
    Extra,
    StageProblem,
    certify,
    evaluate,
    lower_bound_ps,
    solve,
    surely_infeasible,
)


def numbers(rng, low, high, n):
    return tuple(rng.randint(low, high) for _ in range(n))


def legal_shape(rng, schedule, least_pp):
    """(pp, micro-batches, virtual stages) that the schedule runs with, of 5 ranks at most."""
    while True:
        pp, m = rng.randint(least_pp, 5), rng.randint(1, 12)
        v = 2 if schedule in ("zbv", "dualpipev") else rng.randint(2, 3)
        v = v if chunks_of(schedule, 2) > 1 else 1
        if schedule_illegal(schedule, pp, m, v) is None:
            return pp, m, v


def tiny(seed, schedule=None):
    """A random problem small enough to enumerate: 5 layers at most, 3 ranks, 2 chunks."""
    rng = random.Random(seed)
    schedule = schedule or rng.choice(SCHEDULES)
    v = 2 if schedule in ("interleaved", "zbv", "dualpipev") else 1
    while True:
        pp, m = rng.randint(1, 3 if v == 1 else 2), rng.randint(1, 9)
        n = rng.randint(pp * v, 5) if pp * v <= 5 else 0
        if n and schedule_illegal(schedule, pp, m, v) is None:
            break
    alike = rng.random() < 0.3
    row = (lambda a, b: (rng.randint(a, b),) * n) if alike else (lambda a, b: numbers(rng, a, b, n))
    none, selective = row(20, 60), row(5, 20)

    def extra():
        return Extra(
            forward_ps=rng.randint(0, 20), input_grad_ps=rng.randint(0, 20),
            weight_grad_ps=rng.randint(0, 20), activation_bytes=rng.randint(0, 30),
            working_bytes=rng.randint(0, 40), state_bytes=rng.randint(0, 100),
            gathered_bytes=rng.randint(0, 20), tail_comm_ps=rng.randint(0, 20),
            tail_hide_ps=rng.randint(0, 20), tail_own_ps=rng.randint(0, 9),
        )  # fmt: skip

    return StageProblem(
        schedule=schedule, pp=pp, virtual_stages=v, microbatches=m, forward_ps=row(5, 40),
        input_grad_ps=row(5, 40), weight_grad_ps=row(5, 40),
        recompute_ps=(row(5, 30), row(0, 10)), activation_bytes=(none, selective, row(0, 5)),
        working_bytes=(row(0, 20), row(0, 30), row(0, 40)), state_bytes=row(10, 50),
        gathered_bytes=row(0, 20), tail_comm_ps=row(0, 20), tail_hide_ps=row(0, 20),
        tail_own_ps=row(0, 5), first=extra(), last=extra(), constant_bytes=rng.randint(0, 50),
        rank_glue_forward_ps=rng.randint(0, 3), rank_glue_backward_ps=rng.randint(0, 3),
        p2p_ps=rng.choice((0, 2, 15)), capacity_bytes=rng.choice((250, 350, 450, 600, 900, 9999)),
        levels=rng.choice((("none",), ("none", "selective", "full"), ("none", "full"),
                           ("selective", "full"), ("none", "selective", "full"))),
    )  # fmt: skip


def cuts(layers, stages):
    for places in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *places, layers)))


def all_pairs(p, n):
    kinds = itertools.product(range(n + 1), repeat=2)
    return [
        (f, s) for f, s in kinds
        if f + s <= n and ("full" in p.levels or not f) and ("selective" in p.levels or not s)
        and ("none" in p.levels or f + s == n)
    ]  # fmt: skip


def weigh(p, stages, recompute):
    """The objective again, layer by layer."""
    f, b, w = [], [], []
    memory, tails = [p.constant_bytes] * p.pp, [[0, 0] for _ in range(p.pp)]
    acts = [[] for _ in range(p.pp)]
    work, gathered = [0] * p.pp, [0] * p.pp
    layer, last = 0, len(stages) - 1
    for k, (n, (full, selective)) in enumerate(zip(stages, recompute)):
        r = rank_of(p.schedule, p.pp, k)
        times, act = [p.rank_glue_forward_ps, p.rank_glue_backward_ps, 0], 0
        for place in range(n):
            level = 2 if place < full else 1 if place < full + selective else 0
            again = (0, p.recompute_ps[1][layer], p.recompute_ps[0][layer])[level]
            times[0] += p.forward_ps[layer]
            times[1] += p.input_grad_ps[layer] + again
            times[2] += p.weight_grad_ps[layer]
            act += p.activation_bytes[level][layer]
            memory[r] += p.state_bytes[layer]
            work[r] = max(work[r], p.working_bytes[level][layer])
            gathered[r] = max(gathered[r], p.gathered_bytes[layer])
            tails[r][0] += p.tail_comm_ps[layer] - p.tail_hide_ps[layer]
            tails[r][1] += p.tail_own_ps[layer]
            layer += 1
        for e in ([p.first] if k == 0 else []) + ([p.last] if k == last else []):
            times = [times[0] + e.forward_ps, times[1] + e.input_grad_ps,
                     times[2] + e.weight_grad_ps]  # fmt: skip
            act += e.activation_bytes
            memory[r] += e.state_bytes
            work[r] = max(work[r], e.working_bytes)
            gathered[r] = max(gathered[r], e.gathered_bytes)
            tails[r][0] += e.tail_comm_ps - e.tail_hide_ps
            tails[r][1] += e.tail_own_ps
        acts[r].append((k, act))
        for line, t in zip((f, b, w), times):
            line.append(t)
    for r in range(p.pp):
        held = [act for _, act in acts[r]]
        stash = peak_stash(p.schedule, p.pp, p.microbatches, p.virtual_stages, r, held)
        memory[r] += stash.peak_bytes + work[r] + 2 * gathered[r]
    line = simulate(p.schedule, f, b, w, [p.p2p_ps] * last, p.microbatches, p.pp, p.virtual_stages)
    step = line.makespan_ps + max(max(0, a) + b for a, b in tails)
    return step, tuple(memory), max(memory) <= p.capacity_bytes


def choices(p):
    for stages in cuts(p.layers, p.count):
        for recompute in itertools.product(*(all_pairs(p, n) for n in stages)):
            yield stages, recompute


def brute(p):
    """(the least step that fits or None, the least bytes of the fullest rank)."""
    weighed = [weigh(p, *choice) for choice in choices(p)]
    fits = [step for step, _, feasible in weighed if feasible]
    return min(fits, default=None), min(max(memory) for _, memory, _ in weighed)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_enumeration(schedule):
    for seed in range(40):
        p = tiny(seed, schedule)
        best, least_bytes = brute(p)
        found = solve(p)
        if best is None:
            assert found.status == "INFEASIBLE", seed
            near = found.nearest
            assert max(near.peak_bytes) == least_bytes == near.peak_bytes[near.rank], seed
            assert near.overflow_bytes == least_bytes - p.capacity_bytes > 0
            assert weigh(p, near.stages, near.recompute)[1] == near.peak_bytes
            continue
        assert (found.status, found.step_ps, found.bound_ps) == ("OPTIMAL", best, best), seed
        assert weigh(p, found.stages, found.recompute) == (best, found.peak_bytes, True)
        assert evaluate(p, found.stages, found.recompute) == (best, found.peak_bytes, True)
        assert lower_bound_ps(p) <= best, seed
        assert not surely_infeasible(p), seed
        assert solve(p) == found
        assert solve(p, incumbent_ps=best + 1).step_ps == best
        cut = solve(p, incumbent_ps=best)
        assert cut.status == "CUTOFF" and cut.bound_ps >= best and not cut.stages


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pin_of_one_level_leaves_the_other_open(schedule):
    """As many layers of each stage are in full, or in part, as is pinned, or all it has."""
    settled = 0
    for seed in range(300, 316):
        p = replace(tiny(seed, schedule), levels=("none", "selective", "full"))
        for place, count in ((0, 1), (1, 1), (1, 2), (0, 0)):
            pin = (count, None) if place == 0 else (None, count)
            pinned = replace(p, fixed_recompute=(pin,) * p.count)
            assert not pinned.settled
            kept = [(stages, pairs) for stages, pairs in choices(p)
                    if all(pair[place] == min(count, n) for pair, n in zip(pairs, stages))]
            best = min((step for step, _, fits in (weigh(p, *one) for one in kept) if fits),
                       default=None)  # fmt: skip
            found = solve(pinned)
            if best is None:
                assert found.status == "INFEASIBLE", seed
                continue
            settled += 1
            assert (found.status, found.step_ps) == ("OPTIMAL", best), (seed, pin)
            assert (found.stages, found.recompute) in kept
            assert lower_bound_ps(pinned) <= best and not surely_infeasible(pinned)
            cut = solve(pinned, incumbent_ps=best)
            assert cut.status == "CUTOFF" and cut.bound_ps >= best
    assert settled > 12


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_certificate(schedule):
    proved = 0
    for seed in range(100, 112):
        p = tiny(seed, schedule)
        found = solve(p)
        if found.status == "OPTIMAL":
            bound = certify(p, incumbent_ps=found.step_ps)
            assert lower_bound_ps(p) <= bound <= found.step_ps, seed
            proved += bound == found.step_ps
    assert proved >= (3 if p.chunks == 1 else 0)


def test_the_same_twice():
    for p in (large(), large(schedule="interleaved", virtual_stages=2)):
        assert solve(p) == solve(p)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_monotone(schedule):
    """More memory is never slower; a pin is never faster than the free choice."""
    for seed in range(200, 225):
        p = tiny(seed, schedule)
        free, roomy = solve(p), solve(replace(p, capacity_bytes=p.capacity_bytes + 150))
        some = itertools.islice(cuts(p.layers, p.count), 3)
        pinned = [replace(p, fixed_stages=cut) for cut in some]
        if "none" in p.levels:
            pinned.append(replace(p, fixed_recompute="none"))
        if "full" in p.levels and "none" in p.levels:
            pinned += [replace(p, fixed_recompute=pin) for pin in ("full", ("full", 1))]
            pinned.append(replace(p, fixed_recompute=((1, 0),) * p.count))
        if free.status == "INFEASIBLE":
            assert all(solve(one).status == "INFEASIBLE" for one in pinned)
            continue
        assert roomy.step_ps <= free.step_ps
        for one in pinned:
            found = solve(one)
            assert found.status == "INFEASIBLE" or found.step_ps >= free.step_ps, seed
            if one.fixed_stages is not None and found.stages:
                assert found.stages == one.fixed_stages
            if one.fixed_recompute == ("full", 1) and found.stages:
                assert found.recompute == ((1, 0),) * p.count
            assert lower_bound_ps(one) <= found.bound_ps
        whole = replace(p, fixed_stages=free.stages, fixed_recompute=free.recompute)
        again = solve(whole)
        assert (again.step_ps, again.recompute, again.status) == (
            free.step_ps, free.recompute, "OPTIMAL"
        )  # fmt: skip


def large(**changes):
    """126 equal layers, a heavy last stage."""
    n, ps, mb = 126, 10**9, 2**20
    head = Extra(forward_ps=ps, input_grad_ps=ps, weight_grad_ps=ps, state_bytes=3000 * mb)
    p = StageProblem(
        schedule="1f1b", pp=16, microbatches=64, forward_ps=(3 * ps,) * n,
        input_grad_ps=(3 * ps,) * n, weight_grad_ps=(3 * ps,) * n,
        recompute_ps=((3 * ps,) * n, (ps // 3,) * n),
        activation_bytes=((300 * mb,) * n, (200 * mb,) * n, (34 * mb,) * n),
        working_bytes=((500 * mb,) * n,) * 3, state_bytes=(3200 * mb,) * n,
        gathered_bytes=(0,) * n, tail_comm_ps=(20 * ps,) * n, tail_hide_ps=(10 * ps,) * n,
        tail_own_ps=(2 * ps,) * n, last=head, p2p_ps=ps // 10, capacity_bytes=50 * 2**30,
    )  # fmt: skip
    return replace(p, **changes)


@pytest.mark.parametrize("changes", [
    {}, {"microbatches": 16}, {"pp": 32, "microbatches": 256}, {"capacity_bytes": 80 * 2**30},
    {"schedule": "gpipe", "capacity_bytes": 90 * 2**30},
])  # fmt: skip
def test_no_gap_on_equal_layers(changes):
    p = large(**changes)
    found = solve(p)
    assert found.status == "OPTIMAL" and found.bound_ps == found.step_ps
    assert evaluate(p, found.stages, found.recompute) == (found.step_ps, found.peak_bytes, True)


def test_interleaved_balances_its_ranks():
    """112 stages for 126 layers: no rank has more than 8."""
    p = large(schedule="interleaved", virtual_stages=7, capacity_bytes=200 * 2**30)
    found = solve(p)
    loads = [sum(found.stages[rank::16]) for rank in range(16)]
    assert max(loads) == 8 and found.bound_ps <= found.step_ps
    assert found.step_ps <= 1.08 * found.bound_ps


def test_infeasible_names_what_is_nearest():
    p = large(capacity_bytes=20 * 2**30)
    found = solve(p)
    near = found.nearest
    assert found.status == "INFEASIBLE" and not found.stages
    assert evaluate(p, near.stages, near.recompute)[1] == near.peak_bytes
    assert near.overflow_bytes == max(near.peak_bytes) - p.capacity_bytes > 0
    assert p.rank_of(near.stage) == near.rank == near.peak_bytes.index(max(near.peak_bytes))


def test_illegal_is_a_usage_error():
    with pytest.raises(UsageError, match="microbatches >= pp"):
        solve(large(microbatches=8))
    with pytest.raises(UsageError, match="as many layers"):
        solve(large(schedule="interleaved", virtual_stages=8))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bounds_hold_when_effort_runs_out(schedule):
    for seed in range(300, 330):
        p = tiny(seed, schedule)
        best, _ = brute(p)
        if best is not None:
            found = solve(p, effort=Effort(nodes=1, operations=1))
            assert found.bound_ps <= best <= found.step_ps, seed
            assert weigh(p, found.stages, found.recompute)[0] == found.step_ps
            if p.chunks > 1:
                assert bound_all(p) <= best, seed


def test_interleaved_bound_holds_for_uneven_stages():
    """Stages of any times, in rounds of pp micro-batches: the bubble's share is not too much."""
    rng, felt = random.Random(5), 0
    for _ in range(200):
        pp, v = rng.randint(2, 5), rng.randint(2, 4)
        m, n = pp * rng.randint(1, 4), pp * v
        rows = [tuple(rng.choice((1, 100, rng.randint(1, 1000))) for _ in range(n)) for _ in "fb"]
        p = replace(
            tiny(0, "interleaved"), pp=pp, virtual_stages=v, microbatches=m, forward_ps=rows[0],
            input_grad_ps=rows[1], weight_grad_ps=(0,) * n, recompute_ps=((0,) * n,) * 2,
            activation_bytes=((0,) * n,) * 3, working_bytes=((0,) * n,) * 3,
            state_bytes=(0,) * n, gathered_bytes=(0,) * n, tail_comm_ps=(0,) * n,
            tail_hide_ps=(0,) * n, tail_own_ps=(0,) * n, levels=("none",), capacity_bytes=1 << 40,
        )  # fmt: skip
        step, _, _ = evaluate(p, (1,) * n, ((0, 0),) * n)
        assert lower_bound_ps(p) <= step
        even = replace(p, forward_ps=(100,) * n, input_grad_ps=(200,) * n)
        whole = 300 * n
        felt += filled_ps(even, whole) > m * whole // pp
    assert felt > 150


def test_memory_forces_recomputation():
    """The sum of ranks' memory: the bound feels it, and never beyond what enumeration finds."""
    forced = refused = 0
    for seed in range(400, 470):
        for schedule in ("gpipe", "1f1b", "interleaved"):
            p = replace(tiny(seed, schedule), levels=("none", "selective", "full"))
            best, _ = brute(p)
            again = forced_ps(p)
            forced, refused = forced + bool(again), refused + (again is None)
            assert (again is not None) or best is None, seed
            assert best is None or lower_bound_ps(p) <= best, seed
    assert forced > 5 and refused > 5


def test_what_surely_fits_does():
    """Whatever is chosen without recomputation; large memories are seen to be large."""
    sure = 0
    for seed, schedule in itertools.product(range(60), SCHEDULES):
        p = tiny(seed, schedule)
        if surely_fits(p):
            sure += 1
            for stages in cuts(p.layers, p.count):
                assert weigh(p, stages, ((0, 0),) * p.count)[2], seed
        assert not surely_fits(replace(p, fixed_recompute="full"))
        assert surely_fits(p) or p.capacity_bytes < 9999 or "none" not in p.levels
    assert sure > 20


def test_no_solver_is_imported_before_it_is_needed():
    code = "import sys, planner.stages; sys.exit('ortools' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_interrupt_is_not_taken_by_the_solver():
    """OR-tools would catch it, and leave the process to die of the next."""
    code = """if True:
        import signal
        from tests.test_stages import certify, tiny
        seen = []
        signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        p = tiny(0, "1f1b")
        certify(p, incumbent_ps=10**6)
        signal.raise_signal(signal.SIGINT)
        assert seen
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_a_stage_of_like_layers_costs_alike_wherever_it_begins():
    for seed in range(8):
        rng, p = random.Random(seed), tiny(seed, "interleaved")
        some = [rng.randrange(2) for _ in range(p.layers + 4)]  # two kinds of layers
        kind = lambda row, some=some: tuple(row[k % len(row)] for k in some)  # noqa: E731
        p = replace(p, **{
            name: kind(getattr(p, name)) for name in (
                "forward_ps", "input_grad_ps", "weight_grad_ps", "state_bytes", "gathered_bytes",
                "tail_comm_ps", "tail_hide_ps", "tail_own_ps",
            )
        }, **{
            name: tuple(map(kind, getattr(p, name)))
            for name in ("recompute_ps", "activation_bytes", "working_bytes")
        }, capacity_bytes=p.capacity_bytes * 2)  # fmt: skip
        known = Chunks(p)
        for cut in cuts(p.layers, p.count):
            fresh, ranks = Chunks(p), range(p.pp)
            assert known.least_bytes(cut) == [fresh.least(r, cut).bytes for r in ranks]
            assert known.choices(cut) == fresh.choices(cut)
            for rank in ranks:
                assert known.least(rank, cut) == Chunks(p).least(rank, cut)


def test_the_best_count_of_optimizers_below_equals_enumeration():
    found = 0
    for seed in range(40):
        rng = random.Random(seed)
        none = replace(tiny(seed, "1f1b"), pp=1)
        low = Lowered(
            state_bytes=tuple(n // 2 for n in none.state_bytes),
            gathered_bytes=numbers(rng, 0, 20, none.layers),
            tail_own_ps=tuple(n + rng.randint(0, 9) for n in none.tail_own_ps),
        )  # fmt: skip
        every = replace(none, **{f: getattr(low, f) for f in low.__slots__})
        steps = {}
        for n in range(1, none.layers + 1):
            one = replace(none, lowered=low).lowering((none.layers,), (n,))
            costs = (evaluate(one, (none.layers,), (pair,)) for pair in all_pairs(one, none.layers))
            steps[n] = min((step for step, _, fits in costs if fits), default=None)
        fit = {n: step for n, step in steps.items() if step is not None}
        best = best_count(none, every, none.layers, 1 << 60)
        assert best == min(fit, key=lambda n: (fit[n], n), default=None)
        found += best is not None
    assert found > 10


def test_no_cut_has_a_shorter_tail_than_the_least():
    """Nor has the mean of ranks one; layers that some rank has one more of say more than that."""
    more = 0
    for seed in range(600):
        p = tiny(seed)
        least = least_tail_ps(p)
        tails = [tail_ps(p, cut) for cut in cuts(p.layers, p.count)]
        assert min(tails) >= least, seed
        ends = (p.first, p.last)
        hidden = sum(p.tail_hide_ps) + sum(e.tail_hide_ps for e in ends)
        comm = sum(p.tail_comm_ps) + sum(e.tail_comm_ps for e in ends)
        own = sum(p.tail_own_ps) + sum(e.tail_own_ps for e in ends)
        mean = -(-(max(0, comm - hidden) + own) // p.pp)
        assert least >= mean
        more += least > mean
    assert more > 3
    p = large(pp=16, tail_own_ps=(10,) * 126, first=Extra(), last=Extra())
    assert least_tail_ps(replace(p, tail_comm_ps=(0,) * 126)) == 8 * 10  # 126 of 10 on 16 ranks


def test_the_tail_of_all_ranks_at_once_is_the_longest_of_theirs():
    for seed in range(40):
        p = tiny(seed, "interleaved")
        chunks, every = Chunks(p), [*cuts(p.layers, p.count)]
        assert chunks.tails_of(np.array(every)).tolist() == [tail_ps(p, one) for one in every], seed


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_of_one_problem_are_those_of_each_choice_alone(schedule):
    for seed in range(20):
        p = tiny(seed, schedule)
        steps = Steps(p)
        for stages, recompute in itertools.islice(choices(p), 0, None, 7):
            assert steps.step_ps(stages, recompute) == weigh(p, stages, recompute)[0], seed
        queued = replace(p, slow_sends=((3, 40),) * p.pp)
        for stages, recompute in itertools.islice(choices(p), 0, None, 31):
            line = timeline(queued, stages, recompute)
            found = Steps(queued).step_ps(stages, recompute)
            assert found == line.makespan_ps + tail_ps(p, stages), seed


@pytest.mark.parametrize("schedule", ("interleaved", "zbv", "dualpipev"))
def test_cuts_at_once_are_bounded_as_each_alone_and_none_below_is_left_out(schedule):
    for seed in range(40):
        p = tiny(seed, schedule)
        chunks, every = Chunks(p), [*cuts(p.layers, p.count)]
        pool = _candidates(p, chunks, every)
        for one in pool:
            own = [row.extra_ps for row in map(_quickest, chunks.choices(one.stages))]
            at = {k: t for r, row in enumerate(own) for k, t in zip(p.stages_of(r), row)}
            extra = [at[k] for k in range(p.count)]
            assert one.bound_ps == chunks.bound(one.stages, extra) <= step_ps(
                p, one.stages, one.pairs
            )
        fit = {one.stages for one in pool}
        assert fit == {stages for stages in every if all(chunks.choices(stages))}
        below = sorted(one.bound_ps for one in pool)[len(pool) // 2] if pool else 0
        assert _candidates(p, chunks, every, below) == [o for o in pool if o.bound_ps < below]
