"""A plan that fits by less than what predictions of memory err by is said to."""

from dataclasses import replace

from toy_plan import DECISIONS, WORKLOAD, toy_estimate, toy_graph

from cost_models.assumptions import statistic
from cost_models.hardware import load_hardware
from cost_models.validation.accuracy import memory_error
from planner.tightness import tight


def test_it_fits_by_less_than_its_error():
    """Room for the error and a byte is enough; a byte less than the error is tight; what does not
    fit is not tight but said not to fit."""
    e = toy_estimate(toy_graph(), load_hardware("h100x8"), WORKLOAD, DECISIONS, {})
    peak, more = e.peak_memory_bytes, round(e.peak_memory_bytes * memory_error())
    assert 0.01 < memory_error() < 0.2 and 0 < more < peak

    def made(capacity):
        return tight(replace(e, capacity_bytes=capacity))

    assert not made(peak + more + 2) and made(peak + more - 2) and made(peak)
    assert not made(peak - 1)


def test_figures_about_a_fit_are_no_assumptions():
    assert statistic("attention.p90_error") and statistic("clock.samples")
    assert not statistic("clock.power_exponent") and not statistic("step_error.dense")
