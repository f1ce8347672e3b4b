"""A measured load imbalance of experts, fed back: what it raises, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import graph_of
from toy_plan import toy_graph, toy_plan

from cost_models.decisions import Decisions, Workload
from cost_models.estimate import estimate
from cost_models.hardware import load_hardware
from ir.errors import PlanError, UsageError
from planner.decisions import Pins
from planner.plan_text import parse_text, to_text, workload_json
from planner.workload import Asked, resolve

CLUSTER = load_hardware("h100x8")
WORKLOAD = Workload(engine="native", global_batch=8, seq_len=4096)
EP = Decisions(dp=8, ep=8, zero=1, shard=8, compile=False, stages=(2,), recompute=((0, 0),))


def estimated(name: str, d: Decisions, skew: float):
    graph = graph_of(name, n_layers=2)
    return estimate(graph, CLUSTER, replace(WORKLOAD, expert_imbalance=skew), d, {})


def item(e, axis: str) -> float:
    """Bytes of an axis's collectives on rank 0, a step."""
    return sum(c.count * c.size_bytes for c in e.ranks[0].collectives if c.axis == axis)


def test_it_scales_grouped_matmuls_traffic_and_rows():
    even, skewed = (estimated("moe", EP, x) for x in (1.0, 1.5))
    assert skewed.step_time_ps > even.step_time_ps
    assert item(skewed, "ep") == pytest.approx(1.5 * item(even, "ep"))
    memory = [dict(e.ranks[0].memory_bytes) for e in (even, skewed)]
    more = memory[1]["activations"] - memory[0]["activations"]
    # two rows a token of width 64, and of 128 from gate, up, silu and their product, in bf16; half
    # as many again, in 2 layers; nothing is lost of them, the sizes being powers of two
    assert more == 0.5 * 2 * (2 * 4096) * (64 + 4 * 128) * 2
    assert memory[0]["parameters"] == memory[1]["parameters"]


@pytest.mark.parametrize("name, d", [("llama", replace(EP, ep=1)), ("moe", replace(EP, ep=1))])
def test_it_raises_nothing_where_experts_do_not_lie_over_ranks(name, d):
    assert estimated(name, d, 1.5).step_time_ps == estimated(name, d, 1.0).step_time_ps


def test_what_an_estimate_rests_on_says_the_load_that_it_was_given():
    def load(name, d, skew):
        return [x for x in estimated(name, d, skew).assumptions if x.startswith("expert load")]

    assert load("moe", EP, 1.0) == [
        "expert load: balanced, every expert gets the same number of rows"
    ]
    assert "busiest of 8 expert ranks gets 1.5 times the mean" in load("moe", EP, 1.5)[0]
    assert "every rank has all experts" in load("moe", replace(EP, ep=1), 1.5)[0]
    assert load("llama", replace(EP, ep=1), 1.5) == []


def test_a_plan_says_it_only_where_there_is_one():
    graph = toy_graph()
    plan = toy_plan(graph)
    assert "expert_imbalance" not in to_text(plan)
    skewed = replace(plan, workload=replace(plan.workload, expert_imbalance=1.25))
    text = to_text(skewed)
    assert parse_text(text, graph).workload == skewed.workload
    assert set(workload_json(skewed.workload)) - set(workload_json(plan.workload)) == {
        "expert_imbalance"
    }
    with pytest.raises(PlanError, match="expert_imbalance"):
        parse_text(text.replace("1.25", "0.25"), graph)


def test_less_than_even_is_no_imbalance():
    with pytest.raises(UsageError, match="imbalance"):
        resolve(toy_graph(), CLUSTER, Asked(expert_imbalance=0.9), Pins())
