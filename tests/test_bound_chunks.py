"""What ranks hold of several chunks, and what of it they recompute: bounds of every choice."""

import itertools
import random

import numpy as np
import pytest

from cost_models.schedule import schedule_illegal
from cost_models.schedule_orders import chunks_of, order
from cost_models.stage_problem import in_flight
from planner.bound_chunks import Chunks, chunk_flight, filled_chunks
from planner.bound_ranks import freed_by


@pytest.mark.parametrize("v", [2, 3, 4])
def test_a_rank_holds_so_much_of_each_chunk_at_one_moment(v):
    for pp, m in itertools.product(range(2, 7), range(1, 17)):
        if schedule_illegal("interleaved", pp, m, v) is None:
            for rank, held in enumerate(chunk_flight(pp, np.array([m]), v)[0]):
                assert held[-1] >= 1 and list(held) == sorted(held, reverse=True)
                moments = in_flight("interleaved", pp, m, v, rank)
                assert any(np.all(held <= moment) for moment in moments)


@pytest.mark.parametrize("schedule, v", [("interleaved", 2), ("interleaved", 5), ("zbv", 2),
                                         ("dualpipev", 2)])  # fmt: skip
def test_however_many_micro_batches_the_moments_are_those_of_a_few_rounds(schedule, v):
    """Every moment of the schedule holds no more than one of them, and each of them is one; what
    they are of many micro-batches costs no more than of few."""
    for pp, rounds in itertools.product(range(1, 5), range(1, 9)):
        for m in {pp * rounds, pp * rounds + (schedule != "interleaved")}:
            if schedule_illegal(schedule, pp, m, v) is not None:
                continue
            for rank in range(pp):
                now, met = [0] * chunks_of(schedule, v), set()
                for op, _, chunk in order(schedule, pp, m, v, rank):
                    now[chunk] += (op == "F") - (op not in "FB")
                    met.add(tuple(now))
                moments = in_flight(schedule, pp, m, v, rank)
                assert met.issuperset(moments)
                assert all(any(map(all, [np.less_equal(one, x) for x in moments])) for one in met)
    many = 10**6 * 4  # as a list of operations they would not fit
    assert in_flight("interleaved", 4, many, 2, 0) == in_flight("interleaved", 4, 32, 2, 0)


def test_chunks_that_surely_have_a_layer_of_the_commonest_kind():
    """The fewest over every cut of the layers."""
    rng, some = random.Random(0), set()
    for _ in range(40):
        pp, v = rng.randint(2, 3), 2
        layers = rng.randint(pp * v, 9)
        others = sorted(rng.sample(range(layers), rng.randint(0, 3)))
        found = filled_chunks(pp, v, layers, others)
        fewest = [v] * pp
        for ends in itertools.combinations(range(1, layers), pp * v - 1):
            cuts = [0, *ends, layers]
            filled = [0] * pp
            for stage, (a, b) in enumerate(itertools.pairwise(cuts)):
                filled[stage % pp] += any(i not in others for i in range(a, b))
            fewest = [min(a, b) for a, b in zip(fewest, filled)]
        assert all(a <= b for a, b in zip(found, fewest))
        some |= {int(x) for x in found}
    assert len(some) > 1


def least_s(counts, sure, n, sizes, ways, room):
    """The least time of all ways to lay n layers in chunks and to recompute them."""
    state, kept = sizes
    best = np.inf
    for layers in itertools.product(range(n + 1), repeat=len(counts)):
        if sum(layers) != n or any(x == 0 for x, need in zip(layers, sure) if need):
            continue
        each = [c for c, x in zip(counts, layers) for _ in range(x)]
        for chosen in itertools.product([(kept, 0.0), *ways], repeat=n):
            held = n * state + sum(c * size for c, (size, _) in zip(each, chosen))
            if held <= room:
                best = min(best, sum(seconds for _, seconds in chosen))
    return best


def test_what_does_not_fit_takes_so_long_at_least():
    rng, fits = random.Random(1), set()
    for _ in range(80):
        counts = sorted((rng.randint(1, 9) for _ in range(rng.choice([2, 3]))), reverse=True)
        v, n = len(counts), rng.randint(2, 4)
        filled = rng.randint(0, min(v, n))
        kept, state = rng.randint(5, 9) * 1e6, rng.randint(1, 5) * 1e6
        ways = [(kept * rng.choice([0.1, 0.4, 0.7]), float(rng.randint(1, 9))) for _ in range(2)]
        room = rng.randint(10, 150) * 1e6
        pieces = freed_by(np.array([kept]), [(np.array([a]), np.array([b])) for a, b in ways])
        chunks = Chunks(count=v, filled=np.array([filled]))
        over = n * (state + counts[-1] * kept) - room
        found = chunks.again_s(
            pieces, np.array([kept]), np.array([[[over]]]), np.array([n]), np.array([[counts]])
        )[0, 0, 0]
        sure = [c >= v - filled for c in range(v)]
        best = least_s(counts, sure, n, (state, kept), ways, room)
        assert found <= best * (1 + 1e-9)
        fits.add((bool(np.isinf(best)), bool(found > 0)))
    assert len(fits) >= 3
