"""What a verdict says of a plan whose decisions were pinned: only what its search proved."""

from dataclasses import replace

import pytest
from toy_plan import toy_graph, toy_plan

from ir.errors import PlanError, UsageError
from planner.decisions import parse_pins
from planner.plan_text import parse_text, to_text
from planner.proved import all_pinned, pins_said, status_words
from planner.refused import parse_refused, require_held

EVERY = ("pp=2", "tp=2", "cp=1", "zero=3", "micro_batch=1", "recompute=none", "schedule=1f1b",
         "place:layers.*=S(0)")  # fmt: skip


def pinned(*pins):
    return toy_plan(solver=replace(toy_plan().solver, pins=pins_said(parse_pins(pins))))


def test_a_verdict_is_of_what_the_pins_left():
    """One pin is named; where nothing is left, nothing was searched; without pins all was."""
    assert status_words(toy_plan()) == "OPTIMAL"
    assert status_words(pinned("tp=2")) == "OPTIMAL under its pins: tp=2"
    assert status_words(pinned(*EVERY)) == "pinned, not searched"
    assert not any(all_pinned(pinned(*EVERY[:i], *EVERY[i + 1 :])) for i in range(len(EVERY)))


def test_pins_are_in_the_file_where_there_are_any():
    graph, plan = toy_graph(), pinned(*EVERY)
    assert parse_text(to_text(plan), graph).solver.pins == plan.solver.pins != ()
    assert '"pins"' not in to_text(toy_plan())
    with pytest.raises(PlanError, match="not a list of words"):
        parse_text(to_text(plan).replace('"pp=2"', '"pp=2\\u001b"'), graph)


@pytest.mark.parametrize("text", ["tp=7", "zero=1", "recompute=full", "schedule=gpipe"])
def test_what_a_plan_has_not_is_not_refused(text):
    plan = toy_plan()
    given = (plan.decisions, plan.graph, plan.workload)
    with pytest.raises(UsageError, match=f"the plan has no {text}"):
        require_held(parse_refused([text]), *given)
    for held in ("tp=2", "zero=3", "recompute=selective", "recompute=none", "schedule=1f1b"):
        require_held(parse_refused([text, held]), *given)
