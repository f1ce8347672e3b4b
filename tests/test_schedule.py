"""Schedules against an independent simulation, closed forms, and torch's own orders."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models import schedule as sched
from cost_models.stage_problem import in_flight
from ir.errors import PlanError, UsageError


def relaxed(name, forward, input_grad, weight_grad, p2p, m, p, v):
    """The dataflow's least start times, by relaxing every constraint until nothing moves.

    The rules, from the definition of a pipeline: a forward follows the previous stage's, a
    backward the next stage's and its own forward, a weight gradient its input gradient; a rank
    runs one operation at a time, in its order.
    """
    chunks = v if name in ("interleaved", "zbv", "dualpipev") else 1
    last = p * chunks - 1
    v_shaped = name in ("zbv", "dualpipev")

    def stage_of(rank, chunk):
        return 2 * p - 1 - rank if v_shaped and chunk == 1 else rank + chunk * p

    home = {stage_of(r, c): r for r in range(p) for c in range(chunks)}
    lines, length, end = [], {}, {}
    for rank in range(p):
        line = []
        for op, mb, chunk in sched.order(name, p, m, v, rank):
            stage = stage_of(rank, chunk)
            parts = ("B", "W") if op == "BW" else (op,)
            cost = {"F": forward, "B": input_grad, "W": weight_grad}
            key = (op[0], stage, mb)
            length[key] = sum(cost[part][stage] for part in parts)
            line.append(key)
        lines.append(line)
    inputs = {key: [] for key in length}
    for line in lines:
        for before, after in itertools.pairwise(line):
            inputs[after].append((before, 0))
    for key in length:
        kind, stage, mb = key
        if kind == "F" and stage > 0:
            near = home[stage - 1] == home[stage]
            inputs[key].append((("F", stage - 1, mb), 0 if near else p2p[stage - 1]))
        if kind == "B":
            inputs[key].append((("F", stage, mb), 0))
            if stage < last:
                near = home[stage + 1] == home[stage]
                inputs[key].append((("B", stage + 1, mb), 0 if near else p2p[stage]))
        if kind == "W":
            inputs[key].append((("B", stage, mb), 0))
    end = dict.fromkeys(length, 0)
    moved = True
    rounds = 0
    while moved:
        moved = False
        rounds += 1
        assert rounds < 10_000, "a cycle"
        for key, cost in length.items():
            start = max((end[other] + lag for other, lag in inputs[key]), default=0)
            if start + cost > end[key]:
                end[key] = start + cost
                moved = True
    return max(end.values())


@st.composite
def pipelines(draw):
    name = draw(st.sampled_from(sched.SCHEDULES))
    p = draw(st.integers(1 if name in ("gpipe", "1f1b") else 2, 5))
    v = draw(st.integers(2, 3)) if name == "interleaved" else 2 if name in sched.V_SHAPED else 1
    m = draw(st.integers(1, 12).filter(lambda n: sched.schedule_illegal(name, p, n, v) is None))
    stages = p * v
    times = st.lists(st.integers(0, 50), min_size=stages, max_size=stages)
    p2p = draw(st.lists(st.integers(0, 9), min_size=stages - 1, max_size=stages - 1))
    return name, draw(times), draw(times), draw(times), p2p, m, p, v


@settings(max_examples=300, deadline=None)
@given(pipelines())
def test_the_simulation_equals_relaxation_of_the_dataflow(case) -> None:
    name, forward, input_grad, weight_grad, p2p, m, p, v = case
    line = sched.simulate(name, forward, input_grad, weight_grad, p2p, m, p, v)
    assert line.makespan_ps == relaxed(*case)
    assert max(line.busy_ps) <= line.makespan_ps
    assert sum(line.busy_ps) == m * (sum(forward) + sum(input_grad) + sum(weight_grad))


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_each_rank_runs_each_part_once_and_in_time(case) -> None:
    name, forward, input_grad, weight_grad, p2p, m, p, v = case
    line = sched.simulate(name, forward, input_grad, weight_grad, p2p, m, p, v, events=True)
    done = set()
    for rank in range(p):
        mine = [event for event in line.events if event.rank == rank]
        spans = sorted((event.start_ps, event.end_ps) for event in mine)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        for event in mine:
            for part in ("B", "W") if event.op == "BW" else (event.op,):
                key = (part, sched.global_stage(name, p, rank, event.chunk), event.microbatch)
                assert key not in done
                done.add(key)
    assert done == set(itertools.product("FBW", range(p * v), range(m)))
    assert max(event.end_ps for event in line.events) == line.makespan_ps


def even(name, p, m, v, f, b, w):
    """Makespan less a rank's work, all stages alike; f, b, w of one chunk."""
    n = p * v
    line = sched.simulate(name, [f] * n, [b] * n, [w] * n, [0] * (n - 1), m, p, v)
    return line.makespan_ps - m * v * (f + b + w)


@pytest.mark.parametrize(("f", "b", "w"), [(100, 100, 100), (100, 110, 70), (60, 90, 80)])
@pytest.mark.parametrize(("p", "m"), [(2, 8), (4, 16), (8, 32)])
def test_bubbles_of_equal_stages_are_the_closed_forms(p, m, f, b, w) -> None:
    assert even("gpipe", p, m, 1, f, b, w) == (p - 1) * (f + b + w)
    assert even("1f1b", p, m, 1, f, b, w) == (p - 1) * (f + b + w)
    # (p - 1)(F + B - W) as long as W is no longer than F and B
    assert even("zbh1", p, m, 1, f, b, w) == (p - 1) * max(f + b - w, f, b)
    for v in (2, 4):  # of a chunk's times: (p - 1)(F + B + W) / v of a full stage's
        assert even("interleaved", p, m, v, f, b, w) == (p - 1) * (f + b + w)


@pytest.mark.parametrize(("p", "m"), [(2, 8), (4, 16), (8, 32)])
def test_v_shaped_schedules_at_equal_times(p, m) -> None:
    """ZB-V keeps (p-1) tF / 2 without post-validation; DualPipeV (p-1)(F&B + B - 3W)."""
    assert even("zbv", p, m, 2, 100, 100, 100) == (p - 1) * (2 * 100) // 2
    assert even("dualpipev", p, m, 2, 100, 100, 100) == (p - 1) * (300 + 200 - 3 * 100) // 2


@pytest.mark.parametrize("p", [2, 4, 8])
def test_peaks_are_the_closed_forms(p) -> None:
    """In activations of a full stage (MF = 10 v); of them MW = 6 v wait for the weights."""
    m = 4 * p
    for rank in range(p):

        def peak(name, v, late=None, rank=rank):
            waiting = None if late is None else [late] * v
            return sched.peak_stash(name, p, m, v, rank, [10] * v, waiting).peak_bytes

        assert peak("gpipe", 1) == 10 * m
        assert peak("1f1b", 1) == 10 * min(m, p - rank)
        assert peak("zbh1", 1, 6) == 10 * (p - rank) + 6 * rank
        assert peak("interleaved", 2) == 10 * (p + 2 * (p - 1 - rank) + 1)
        assert peak("interleaved", 4) == 10 * (3 * p + 2 * (p - 1 - rank) + 1)
        assert peak("zbv", 2) == 10 * 2 * p
        assert peak("dualpipev", 2) == 10 * (2 * p + 1)


def test_the_peak_of_uneven_chunks_is_taken_jointly() -> None:
    """Rank 0 of ZB-V holds many of its first chunk, few of its second: sizes decide when."""
    first = sched.peak_stash("zbv", 4, 16, 2, 0, [100, 1])
    second = sched.peak_stash("zbv", 4, 16, 2, 0, [1, 100])
    assert first.forward[0] > second.forward[0]
    walk = 0
    best = 0
    for op, _, chunk in sched.order("zbv", 4, 16, 2, 0):
        size = (1, 100)[chunk]
        walk += size if op == "F" else -size if op in ("W", "BW") else 0
        best = max(best, walk)
    assert second.peak_bytes == best


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_uneven_1f1b_lies_between_its_bounds(data) -> None:
    """The upper bound where backward is in proportion to forward; the lower one always."""
    p = data.draw(st.integers(1, 6))
    m = data.draw(st.integers(p, 20))
    times = st.lists(st.integers(1, 50), min_size=p, max_size=p)
    forward, free = data.draw(times), data.draw(times)
    for backward in ([2 * f for f in forward], free):
        line = sched.simulate("1f1b", forward, backward, [0] * p, [0] * (p - 1), m, p)
        total = [f + b for f, b in zip(forward, backward)]
        assert line.makespan_ps >= max(m * total[s] + sum(total[:s]) for s in range(p))
        if backward is not free:
            assert line.makespan_ps <= sum(total) + (m - 1) * max(total)


def test_the_upper_bound_of_1f1b_needs_proportion() -> None:
    """F = (1, 4, 1), B = (4, 1, 1), three micro-batches: 23, above 12 + 2 * 5."""
    case = ([1, 4, 1], [4, 1, 1], [0, 0, 0], [0, 0], 3, 3)
    assert sched.simulate("1f1b", *case).makespan_ps == 23 == relaxed("1f1b", *case, 1)


def test_an_uneven_pipeline_by_hand() -> None:
    """F = (2, 1), B = (4, 2), two micro-batches: 13, where the bound says 15."""
    assert sched.simulate("1f1b", [2, 1], [4, 2], [0, 0], [0], 2, 2).makespan_ps == 13


def test_one_rank_has_no_bubble() -> None:
    """Nor a pipeline: a micro-batch goes forward and backward before the next, by any name."""
    for name in ("gpipe", "1f1b"):
        line = sched.simulate(name, [3], [4], [5], [], 7, 1)
        assert line.makespan_ps == line.busy_ps[0] == 7 * 12
        assert line.peak_in_flight == ((1,),) and in_flight(name, 1, 7, 1, 0) == ((1,),)
        assert sched.order(name, 1, 2, 1, 0) == tuple(
            (op, microbatch, 0) for microbatch in range(2) for op in ("F", "BW")
        )
        drawn = sched.simulate(name, [3], [4], [5], [], 7, 1, events=True)
        assert (drawn.makespan_ps, drawn.busy_ps) == (line.makespan_ps, line.busy_ps)
        assert len(drawn.events) == 14 and drawn.peak_in_flight == line.peak_in_flight


def test_one_rank_is_not_simulated_and_no_step_without_end_is_drawn() -> None:
    assert sched.simulate("1f1b", [3], [4], [5], [], 10**12, 1).makespan_ps == 12 * 10**12
    with pytest.raises(PlanError, match="100,001 micro-batches is not drawn"):
        sched.simulate("gpipe", [3], [4], [5], [], 100_001, 1, events=True)


def test_sends_delay_their_consumer_and_nobody_else() -> None:
    """One micro-batch: its path crosses the boundary twice."""
    assert sched.simulate("gpipe", [3, 3], [4, 4], [5, 5], [10], 1, 2).makespan_ps == 24 + 20


@settings(max_examples=60, deadline=None)
@given(pipelines(), st.data())
def test_no_operation_slower_makes_the_step_faster(case, data) -> None:
    name, forward, input_grad, weight_grad, p2p, m, p, v = case
    before = sched.simulate(name, forward, input_grad, weight_grad, p2p, m, p, v).makespan_ps
    slower = list(forward)
    slower[data.draw(st.integers(0, p * v - 1))] += 7
    assert sched.simulate(name, slower, input_grad, weight_grad, p2p, m, p, v).makespan_ps >= before


@pytest.mark.parametrize(
    ("name", "p", "m", "v", "why"),
    [
        ("1f1b", 4, 3, 1, "microbatches >= pp"),
        ("interleaved", 4, 10, 1, "virtual_stages"),
        ("interleaved", 4, 9, 2, "% 2 == 0"),
        ("dualpipev", 4, 7, 2, ">= 2"),
        ("zbv", 4, 8, 3, "virtual_stages=2"),
        ("zbh1", 1, 8, 1, "pp of 2"),
        ("gpipe", 4, 8, 2, "no virtual stages"),
        ("pipedream", 4, 8, 1, "unknown schedule"),
        ("1f1b", 4, 100_001, 1, "turns a rank"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(name, p, m, v, why) -> None:
    assert why in sched.schedule_illegal(name, p, m, v)
    with pytest.raises(UsageError):
        sched.simulate(name, [1] * p * v, [1] * p * v, [1] * p * v, [0] * (p * v - 1), m, p, v)
    assert sched.schedule_illegal("interleaved", 4, 10, 2) is None


def torch_orders(name, p, m, v, rank):
    """The order that torch's own schedule class computes for a rank."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    classes = {
        "interleaved": schedules.ScheduleInterleaved1F1B,
        "zbv": schedules.ScheduleZBVZeroBubble,
        "dualpipev": schedules.ScheduleDualPipeV,
    }
    fake = object.__new__(classes[name])
    fake.pp_group_size, fake.n_local_stages, fake._n_microbatches = p, v, m
    fake.number_of_rounds = max(1, m // p)
    fake.microbatches_per_round = m // fake.number_of_rounds
    fake.num_stages = fake._num_stages = p * v
    flat = []
    for action in fake._calculate_single_rank_operations(rank):
        flat += [] if action is None else action.sub_actions or [action]
    words = {"F": "F", "I": "B", "W": "W", "B": "BW"}
    return [(words[a.computation_type.value], a.microbatch_index, a.stage_index) for a in flat]


@pytest.mark.parametrize(
    ("name", "p", "m", "v"),
    [
        ("interleaved", 4, 8, 2), ("interleaved", 4, 10, 3), ("interleaved", 2, 1, 2),
        ("zbv", 4, 8, 2), ("zbv", 4, 3, 2), ("zbv", 3, 11, 2),
        ("dualpipev", 4, 8, 2), ("dualpipev", 3, 13, 2), ("dualpipev", 5, 10, 2),
    ],
)  # fmt: skip
def test_orders_are_those_of_torch(name, p, m, v) -> None:
    for rank in range(p):
        ours = [
            (op, mb, sched.global_stage(name, p, rank, chunk))
            for op, mb, chunk in sched.order(name, p, m, v, rank)
        ]
        assert ours == torch_orders(name, p, m, v, rank)
