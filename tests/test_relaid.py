"""The plan that is chosen lies on tp as engines have it where the whole step is quicker then."""

import pytest
from tiny_models import costs_of, graph_of

from cost_models.estimate import stage_problem
from cost_models.stage_problem import evaluate
from cost_models.words import sharding_of
from planner.classic import classic_places
from planner.decisions import Pins
from planner.mesh import meshes
from planner.search import Searcher

WO = "attention.wo.weight"
WIDE = {"size": "405b", "n_layers": 2}


def searched(name, args, place=(), **workload):
    pins = Pins(tp=8, place=place)
    given = {"seq_len": 8192, "global_batch": 8, **workload}
    costs = costs_of(graph_of(name, workload.get("precision", "bf16"), **args), "h100x8", **given)
    found = meshes(costs.chain, costs.cluster, costs.workload, pins)
    costs.points = tuple(dict.fromkeys([(1, 1), *((m.micro_batch, m.cp) for m in found)]))
    return Searcher(costs=costs, pins=pins)


def word_of(tried, name):
    """The placement of a layer's parameter."""
    unit, laid = next((unit, a) for (unit, is_layer), a in tried.assignments.items() if is_layer)
    return dict(sharding_of(unit, laid).parameters)[name]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_rows_where_the_whole_step_is_quicker(precision):
    """Of a wide model the placement program splits attention's output by columns, as its partial
    sum counts as held; by rows the step is shorter, and it is that of the layout pinned."""
    given = {"engine": "megatron", "precision": precision}
    searcher = searched("llama", WIDE, **given)
    out = searcher.run()
    assert word_of(out.searched, WO) == "S(0)" and word_of(out.best, WO) == "S(1)"
    assert out.best.objective_ps < out.searched.objective_ps
    assert out.bound <= out.best.score and out.proved
    place = classic_places(searcher.costs.graph)
    pinned = searched("llama", WIDE, place, **given).run()
    assert pinned.best == pinned.searched
    assert out.best.objective_ps == pinned.best.objective_ps
    d, laid = out.best.decisions, out.best.assignments
    problem = stage_problem(searcher.costs, searcher.costs.step(d, laid))
    assert evaluate(problem, d.stages, d.pairs)[::2] == (out.best.objective_ps, True)


def test_a_pinned_matrix_stays():
    place = ((f"layers.*.{WO}", "S(0)"),)
    out = searched("llama", WIDE, place, engine="megatron").run()
    assert word_of(out.best, WO) == "S(0)"


def test_the_programs_layout_stays_where_it_is_no_slower():
    """The two are one for Llama 8B; a model that is no transformer has no other."""
    out = searched("llama", {"size": "8b", "n_layers": 2}).run()
    assert out.best == out.searched
    searcher = searched("resnet", {}, seq_len=1)
    assert not searcher.assign_classic(2, False)
    assert searcher.assign(2, False)
