"""What else there is, on the page: rows of `plan why`, inputs that would change the decision."""

from dataclasses import replace

import pytest
from reports import small, tree

from cost_models.decisions import Decisions
from cost_models.estimate import estimate
from planner.report import flips, whynot
from planner.report.sensitivity import FACTORS, Effect, Flip, sensitivity
from planner.report.training import page as page_of
from planner.score import score_of
from planner.why import ROW_EFFORT, Why

DATA = Decisions(dp=8, shard=8, zero=2, micro_batch=1, microbatches=4, stages=(2,))


@pytest.fixture(scope="module")
def asked():
    checked = small(decisions=DATA)
    why = Why(checked)
    return checked, why.rows(), why


@pytest.fixture(scope="module")
def found(asked):
    checked, rows, why = asked
    return sensitivity(checked, why, rows, ROW_EFFORT)


def costed(checked, decisions, **cluster):
    """A plan's step under another cluster, by the function that everything else uses."""
    hardware = replace(checked.hardware, **cluster)
    return estimate(checked.plan.graph, hardware, checked.plan.workload, decisions, {})


def nvlink(checked, times):
    link = checked.hardware.intra
    return replace(link, bytes_per_s=times * link.bytes_per_s)


def test_an_input_scaled_is_the_plan_costed_with_it(asked, found):
    checked = asked[0]
    effect = next(e for e in found.effects if e.name.startswith("NVLink"))
    base = checked.estimate.step_time_ps
    assert [factor for factor, _ in effect.changes] == [0.5, 2.0]
    for factor, change in effect.changes:
        made = costed(checked, checked.plan.decisions, intra=nvlink(checked, factor))
        assert change == made.step_time_ps / base - 1
    rate = next(e for e in found.effects if e.name == "arithmetic rate")
    assert rate.changes[0][1] > 0 > rate.changes[1][1]


def test_a_decision_flips_where_a_rival_comes_first(asked, found):
    """With tp 1 everywhere the step is exact without shardings; so rivals are taken from those."""
    checked, rows, _ = asked
    rivals = [r.decisions for r in rows if r.decisions and r.decisions.tp == 1]
    chosen = checked.plan.decisions

    def first(times):
        made = [costed(checked, d, intra=nvlink(checked, times)) for d in (chosen, *rivals)]
        scores = [score_of(e.step_time_ps, d) for e, d in zip(made, (chosen, *rivals))]
        return rivals[scores.index(min(scores)) - 1] if min(scores) < scores[0] else chosen

    behind = [d for d in rivals if first(1.0) != d]
    effect = next(e for e in found.effects if e.name.startswith("NVLink"))
    for flip in effect.flips:
        assert FACTORS[0] <= flip.times <= FACTORS[-1] and flip.decisions != chosen
        if flip.decisions in behind:
            assert first(flip.times) != chosen


def test_what_is_first_at_a_value_is_of_the_rivals_that_flip(found):
    """A value beyond a flip has another plan first, and the table says which; one before it has
    the same. Of memory it is said that a rival is not all there is."""
    for effect in found.effects:
        assert len(effect.firsts) == len(effect.changes)
        for (factor, _), first in zip(effect.changes, effect.firsts):
            beyond = [f for f in effect.flips if (f.times - 1) * (factor - 1) > 0
                      and abs(f.times - 1) <= abs(factor - 1)]  # fmt: skip
            assert (first is not None) == bool(beyond)
    other = replace(DATA, dp=4, cp=2, shard=8)
    flip = Flip(times=0.96, decisions=other, change=-0.001)
    there = replace(flip, times=0.5, change=-0.2)
    effect = Effect(
        name="host link bandwidth", changes=((0.5, 0.3), (2.0, -0.1)), flips=(flip,),
        firsts=(there, None),
    )  # fmt: skip
    room = replace(found.rooms[0], instead=other, instead_change=0.069)
    made = replace(found, effects=(effect,), rooms=(room,))
    page = tree(flips.section(made, DATA, "").body)
    words = page.words()
    assert "(-20.0% there)" in words and words.count("the same") == 1
    assert "of the rivals then" in words and "less memory may find one nearer" in words


def test_memory_at_which_it_no_longer_fits(asked, found):
    checked = asked[0]
    assert found.rooms[0].needs_bytes == checked.estimate.peak_memory_bytes
    assert found.rooms[0].capacity_bytes == checked.hardware.device.memory_bytes


def test_other_micro_batches(asked, found):
    checked = asked[0]
    assert [b.micro_batch for b in found.batches] == [2]  # half of 1 is none
    twice = replace(checked.plan.decisions, micro_batch=2, microbatches=2)
    made = costed(checked, twice)
    assert found.batches[0].change == made.step_time_ps / checked.estimate.step_time_ps - 1
    assert found.batches[0].over_bytes == 0


def test_the_sections_say_what_was_found(asked, found):
    checked, rows, _ = asked
    body = tree(whynot.section(checked, rows, ROW_EFFORT).body)
    assert len(body.all("tbody")[0].all("tr")) == len(rows) == len(body.all("p", class_="because"))
    words = tree(flips.section(found, checked.plan.decisions, "").body)
    drawn = words.all("div", class_="reasoned")
    assert len(drawn) == len(found.effects) + len(found.batches) + 1
    for figure in (*body.all("figure"), *words.all("figure")):
        assert figure.all("svg") and figure.all("table")


def test_what_differs_is_said_by_key():
    other = replace(DATA, dp=4, tp=2, shard=4, zero=3, reshard=True)
    assert flips.differing(DATA, other) == "dp 4, tp 2, ZeRO-3 resharding"
    piped = replace(DATA, pp=2, dp=4, shard=4, virtual_stages=2, schedule="interleaved")
    assert flips.differing(piped, replace(piped, schedule="1f1b", virtual_stages=1)) == "1f1b"
    assert flips.differing(replace(DATA, sequence_parallel=True), DATA) == "no sequence parallel"


def test_what_was_not_asked_is_said(asked):
    page = page_of([asked[0]], ask=False)
    assert "--no-why" in page and 'id="sensitivity"' not in page
