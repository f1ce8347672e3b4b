"""What a verdict says of a plan whose decisions were pinned: only what its search proved."""

import re
from dataclasses import replace

import pytest
from reports import served, small
from toy_plan import toy_graph, toy_plan

from cost_models.serving_decisions import Held
from ir.errors import PlanError, UsageError
from planner.decisions import parse_pins
from planner.plan_text import parse_text, to_text
from planner.proved import all_pinned, gain_words, pins_said, status_words
from planner.refused import parse_refused, require_held
from planner.report.markup import escape
from planner.report.serving_page import page
from planner.report.verdict import searched, verdict
from planner.serving.asked import parse_serve_pins, serve_pins_said
from planner.serving.show import document, summary
from planner.serving.text import to_text as serving_text
from planner.show import summary as shown
from planner.why import Alternative, Binding, Why
from planner.why_text import alternative_text

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


def test_a_gap_says_what_it_is_beyond():
    """The text, the report's sentence and its tile, and the why of a plan say that an axis more may
    gain 2% beside the gap, which is of an order in which it must earn that."""
    said = "at most 0.27% can be gained, beyond 2% an axis"
    found = replace(toy_plan().solver, status="FEASIBLE", gap_ppm=2_700)
    assert gain_words(found) == said
    assert gain_words(replace(found, objective="cost")) == said.replace("27%", "27% of cost")

    def ended(solver):
        one = small()
        return replace(one, plan=replace(one.plan, solver=solver))

    early = ended(found)
    assert said in " ".join(shown(early.plan, early.estimate).split())
    assert searched(early) == ("feasible", said)
    assert str(verdict(early)).lower().count(said) == 2
    some = ended(replace(found, pins=("tp=2",)))
    assert f"({said}, by plans that have them)" in searched(some)[1]
    for status, words in (("FEASIBLE", said), ("OPTIMAL", "no other of the space is better by 2%")):
        row = Alternative(
            refused=(("pp", 2),), binding=Binding(kind="time", component="compute"),
            decisions=early.plan.decisions, estimate=early.estimate,
            solver=replace(found, status=status),
        )  # fmt: skip
        assert words in " ".join(alternative_text(early, row).split())


def test_what_an_axis_had_to_earn_is_the_plan_s_own():
    """A plan made with another --axis-gain says it, keeps it in its file where it is not 2%, and
    is held against others by it."""
    graph, half = toy_graph(), replace(toy_plan().solver, axis_gain_ppm=5_000)
    plan = toy_plan(solver=half)
    assert "axis_gain_ppm" not in to_text(toy_plan())
    assert parse_text(to_text(plan), graph).solver == half
    assert gain_words(replace(half, gap_ppm=2_700)).endswith("beyond 0.5% an axis")
    free = replace(half, gap_ppm=2_700, axis_gain_ppm=0)
    assert gain_words(free) == "at most 0.27% can be gained"
    for gap_ppm, said in ((2, "0.01%"), (2_701, "0.28%"), (0, "0.01%")):  # it is not proved
        assert gain_words(replace(free, gap_ppm=gap_ppm)) == f"at most {said} can be gained"
    one = small()
    said = shown(replace(one.plan, solver=half), one.estimate)
    assert "is better by 0.5% an axis" in " ".join(said.split())
    bad = to_text(plan).replace('"axis_gain_ppm": 5000', '"axis_gain_ppm": -1')
    with pytest.raises(PlanError, match=r"solver\.axis_gain_ppm is -1"):
        parse_text(bad, graph)
    checked = replace(one, plan=replace(one.plan, solver=replace(one.plan.solver, axis_gain_ppm=0)))
    assert Why(checked).asking.searcher.gain_ppm == 0


def test_pins_are_in_the_file_where_there_are_any():
    graph, plan = toy_graph(), pinned(*EVERY)
    assert parse_text(to_text(plan), graph).solver.pins == plan.solver.pins != ()
    assert '"pins"' not in to_text(toy_plan())
    with pytest.raises(PlanError, match="not a list of words"):
        parse_text(to_text(plan).replace('"pp=2"', '"pp=2\\u001b"'), graph)


def test_of_serving_too_everywhere():
    """A few pins, one plan alone, and none: in the file and in all that shows it."""
    some = served(pins=["tp=2", "offload=mlp:cpu", "pools=none"])
    one = served(pins=["tp=2", "pp=1"])
    said = "tp=2, offload=mlp:cpu, pools=none"
    assert all_pinned(one.plan) and not all_pinned(some.plan)
    assert status_words(some.plan) == f"OPTIMAL under its pins: {said}"
    assert status_words(one.plan) == "pinned, not searched"
    assert status_words(served().plan) == "OPTIMAL" and '"pins"' not in serving_text(served().plan)
    text = serving_text(some.plan)
    read = parse_text(text, some.plan.graph)
    assert read.solver.pins == some.plan.solver.pins == tuple(said.split(", "))
    graph = some.plan.graph  # a file of before has no pins, and reads
    assert not parse_text(re.sub(r', "pins": \[.*?\]', "", text), graph).solver.pins
    assert document(some.plan, some.found)["solver"]["pins"] == [*some.plan.solver.pins]
    for found in (some, one):
        words = status_words(found.plan)
        html = escape(words)
        assert words in " ".join(summary(found.plan, found.found).split())
        assert words in repr(found.plan) and html in found.plan._repr_html_()
    assert f"under its pins: {said}; of " in page([some]) and ">pinned<" in page([one])
    assert all(len(line) <= 80 for line in summary(some.plan, some.found).splitlines())


def test_pins_of_serving_are_said_as_they_are_given():
    for text in (["offload=none"], ["pools=2+6"], ["pools=any"], ["kv_tier=cpu", "pools=none"],
                 ["tp=2", "prefill_chunk=512", "weights=int8", "offload=mlp:cpu,attention:nvme"]):
        found = serve_pins_said(parse_serve_pins(text))
        assert sorted(found) == sorted(text)
        assert parse_serve_pins(found) == parse_serve_pins(text)


@pytest.mark.parametrize("text", ["tp=7", "zero=1", "recompute=full", "schedule=gpipe"])
def test_what_a_plan_has_not_is_not_refused(text):
    plan = toy_plan()
    given = (plan.decisions, plan.graph, plan.workload)
    with pytest.raises(UsageError, match=f"the plan has no {text}"):
        require_held(parse_refused([text]), *given)
    for held in ("tp=2", "zero=3", "recompute=selective", "recompute=none", "schedule=1f1b"):
        require_held(parse_refused([text, held]), *given)


def test_rows_of_serving_are_whole():
    """What follows the words of a long division is not cut off."""
    found = served("h100x2")
    many = replace(found.found.serving, tp=64, pp=16, ep=128, etp=64, attention_dp=128, replicas=64)
    text = summary(found.plan, found.found, notes=("stale " * 30,),
                   others=[replace(found.found, serving=many, ttft_s=1.23, tpot_s=0.321)])
    assert "first token 1.23 s, then 321 ms" in " ".join(text.split())
    assert " ".join(text.split()).count("stale") == 30
    assert all(len(line) <= 80 for line in text.splitlines())


def test_what_the_cpu_multiplies_is_told_with_its_rows():
    """Up to how many rows it does, and whether the steps of this load have more."""
    found = served("h100x2")
    held = (Held(block="mlp", tier="cpu", place="compute", resident=1),)
    plan = replace(found.plan, serving=replace(found.plan.serving, tiers=held), rows_on_host=4)
    for part, way in (("cpu", "multiplied on cpu"), ("stream", "streamed from cpu")):
        p = replace(found.found, serving=plan.serving, parts=((part, found.found.decode_s),))
        text = " ".join(summary(plan, p).split())
        assert f"{way}, 1 layers on the GPU (multiplied there up to 4 rows a step" in text


def test_few_tokens_a_second_are_told():
    found = served("h100x2")
    few = replace(found.found, tokens_per_s=0.3107)
    assert "; 0.311 tokens/s" in summary(found.plan, few)


def test_a_part_of_what_lies_below_is_refused():
    """One of several things that lie on a tier, with its count of layers or without; and what the
    plan has in its place is told."""
    plan = toy_plan()
    below = (("optimizer", "cpu:6"), ("params", "cpu"), ("activations", "cpu:71"))
    given = (replace(plan.decisions, offload=below), plan.graph, plan.workload)
    for word in ("activations:cpu:71", "activations:cpu", "optimizer:cpu", "params:cpu",
                 "optimizer:cpu:6,params:cpu,activations:cpu:71"):  # fmt: skip
        require_held(parse_refused([f"offload={word}"]), *given)
    for word in ("none", "optimizer:nvme"):
        with pytest.raises(UsageError) as fault:
            require_held(parse_refused([f"offload={word}"]), *given)
        own = "--not offload=optimizer:cpu:6,params:cpu,activations:cpu:71"
        assert own in fault.value.hints
        found = parse_refused([own.removeprefix("--not ")])
        require_held(found, *given)
