"""What a prompt waits for: the closed forms against a loop that is played request by request."""

import math
import random

import numpy as np
import pytest

from cost_models.serving_queue import (
    Arrivals,
    bunching,
    gathered,
    mixed_s,
    prior_s,
    read_before,
    shared,
)

SPREAD, WAVES = 0.2 / 0.9, 10
STEP_S = 0.01


def played_s(requests, output, prompt_s, group, mixes, looked=1, host_s=0.0):
    """Mean seconds to a first token of all waves but the first: answers of .8 to 1 of the longest,
    each followed by the next request, at no particular time."""
    draw = random.Random(7)

    def tokens():
        return draw.uniform(0.8, 1.0) * output / 0.9

    running = [tokens() for _ in range(requests)]
    coming, seen, waits = [], [], []
    now, since = 0.0, looked
    while len(waits) < (WAVES - 1) * requests:
        if since >= looked:  # it looks for arrivals
            seen += sorted(came for came in coming if came <= now)
            coming, since = [came for came in coming if came > now], 0
        batch, seen = seen[:group], seen[group:]
        now += prompt_s * len(batch) + host_s * bool(batch)
        if mixes or not batch:
            now, since = now + STEP_S, since + 1
            running = [left - 1 for left in running]
            coming += [now + 4 * draw.random() * (STEP_S + prompt_s) for n in running if n <= 0]
            running = [left for left in running if left > 0]
        else:
            since = looked  # after a read it looks again
        waits += [now - came for came in batch]
        running += [tokens() for _ in batch]
    return sum(waits) / len(waits)


def wait_s(requests, output, prompt_s, group, mixes, looked=1, host_s=0.0):
    arrivals = Arrivals(waves=WAVES, bunched=bunching(SPREAD, WAVES), looked_every=looked)
    others, one = np.array([requests - 1.0]), np.ones(1)
    if mixes:
        own_s = (STEP_S + prompt_s + host_s) * one
        return mixed_s(arrivals, others, output * one, STEP_S * one, own_s, one, group * one,
                       host_s=host_s)[0]  # fmt: skip
    own_s = (prompt_s + host_s) * one
    return prior_s(arrivals, others, output * one, STEP_S * one, own_s, one, group * one,
                   host_s=host_s)[0]  # fmt: skip


@pytest.mark.parametrize(("requests", "output", "prompt_s", "group", "looked"), [
    (4, 400, 0.03, 8, 1), (32, 400, 0.03, 8, 1), (64, 400, 0.02, 1, 1), (16, 800, 0.2, 1, 1),
    (32, 400, 0.03, 8, 30), (8, 400, 0.1, 2, 10),
])  # fmt: skip
@pytest.mark.parametrize("mixes", [True, False], ids=["mixes", "reads first"])
def test_the_wait_is_what_a_loop_sees(requests, output, prompt_s, group, looked, mixes):
    if mixes and looked > 1:
        pytest.skip("an engine that mixes looks at each step")
    got = wait_s(requests, output, prompt_s, group, mixes, looked)
    assert got == pytest.approx(played_s(requests, output, prompt_s, group, mixes, looked), rel=0.2)


@pytest.mark.parametrize(("requests", "output", "prompt_s", "group", "looked", "host_s"), [
    (4, 400, 0.01, 8, 1, 0.04), (32, 400, 0.01, 8, 1, 0.04), (64, 400, 0.01, 8, 1, 0.02),
    (32, 400, 0.01, 8, 30, 0.1), (8, 400, 0.05, 2, 10, 0.1),
])  # fmt: skip
@pytest.mark.parametrize("mixes", [True, False], ids=["mixes", "reads first"])
def test_prompts_that_are_read_together_wait_for_the_host_once(
    requests, output, prompt_s, group, looked, host_s, mixes
):
    if mixes and looked > 1:
        pytest.skip("an engine that mixes looks at each step")
    loop = (requests, output, prompt_s, group, mixes, looked, host_s)
    assert wait_s(*loop) == pytest.approx(played_s(*loop), rel=0.2)


def test_the_share_of_what_a_step_takes_is_that_of_poisson_arrivals():
    draw = np.random.default_rng(2).poisson(0.8, 200_000)
    (share,) = shared(Arrivals(), np.array([0.8]), np.array([64.0]))
    assert share == pytest.approx((draw > 0).sum() / draw.sum(), rel=0.01)
    assert shared(Arrivals(), np.array([50.0]), np.array([4.0]))[0] == 1 / 4  # no more fit a step
    assert shared(Arrivals(), np.array([0.0]), np.array([4.0]))[0] == pytest.approx(1.0)
    waits = Arrivals(gathered_prompts=3.0, gathered_steps=1e9)
    assert shared(waits, np.array([0.01]), np.array([4.0]))[0] == pytest.approx(1 / 3, rel=0.01)


def test_one_request_waits_for_its_own_steps_alone():
    own = {True: STEP_S + 0.05 + STEP_S / 2, False: 0.05 + STEP_S / 2}
    for mixes, seconds in own.items():
        assert wait_s(1, 100, 0.05, 4, mixes) == pytest.approx(seconds)


def test_ends_bunch_as_their_lengths_do():
    draw = np.random.default_rng(3)
    ends = draw.uniform(1 - SPREAD / 2, 1 + SPREAD / 2, (4, 200_000)).sum(axis=0)  # of 4 answers
    seen = np.histogram(ends, bins=200)
    share, width = seen[0] / seen[0].sum(), np.diff(seen[1])[0]
    density = (share**2).sum() / width
    four = bunching(SPREAD, 5) * 4 - bunching(SPREAD, 4) * 3
    assert four == pytest.approx(density, rel=0.03)
    assert bunching(4.0, 50) == pytest.approx(1.0, rel=0.05)  # lengths that fill the loop


def test_a_group_waits_for_its_last_and_no_longer_than_it_may():
    """Poisson arrivals: the first waits until enough have come, or its patience ends."""
    draw = np.random.default_rng(5)
    for rate, enough, patience in ((0.02, 9.0, 20.0), (0.5, 5.0, 40.0)):
        arrivals = Arrivals(gathered_prompts=enough, gathered_steps=patience)
        held, others = gathered(arrivals, np.array([rate]))
        gaps = draw.exponential(1 / rate, (20_000, int(enough) - 1)).cumsum(axis=1)
        end = np.minimum(gaps[:, -1], patience)
        came = gaps < end[:, None]
        waits = end + (np.where(came, end[:, None] - gaps, 0.0)).sum(axis=1)
        last = came.sum(axis=1) + (gaps[:, -1] <= patience)
        assert others[0] == pytest.approx(last.mean(), rel=0.15)
        assert held[0] == pytest.approx(waits.sum() / (1 + last).sum(), rel=0.15)
    assert gathered(Arrivals(), np.array([0.3]))[0][0] == 0.0


def test_prompts_that_fit_a_step_are_read_together():
    assert read_before(np.array([3.0]), np.array([8.0]))[0] == 3.0  # all end with the step
    assert read_before(np.array([9.0]), np.array([1.0]))[0] == 4.5  # half come first
    assert read_before(np.array([0.0]), np.array([0.5]))[0] == 0.0
    assert math.isinf(Arrivals().waves)
