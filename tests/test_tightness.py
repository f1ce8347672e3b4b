"""A plan that fits by less than what predictions of memory err by is said to."""

from dataclasses import replace

from toy_plan import DECISIONS, WORKLOAD, toy_estimate, toy_graph

from cost_models.assumptions import statistic
from cost_models.hardware import load_hardware
from cost_models.validation.accuracy import memory_error
from planner.names import many
from planner.tightness import tight
from planner.wrapping import wrapped


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


def test_lines_are_of_a_terminals_width():
    """Nothing is lost but the spaces at breaks; a word with no place to break is cut."""
    parts = ",".join(f"projection_{i}" for i in range(20))
    long = "R     model.{" + parts + "}.weight " + "x" * 100
    rows = wrapped(long, 6).split("\n")
    assert max(map(len, rows)) <= 80 and all(row.startswith(" " * 6) for row in rows[1:])
    assert "".join(row.strip() for row in rows).replace(" ", "") == long.replace(" ", "")
    assert wrapped("x" * 80) == "x" * 80
    assert [many(n, "mesh") for n in (1, 2)] == ["1 mesh", "2 meshes"]
