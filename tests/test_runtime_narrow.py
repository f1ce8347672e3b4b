"""Linears in fp8 on local ranks, against the same rounding done by hand in one process."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import runtime_cases_narrow as cases
import runtime_cases_tensor as tensor_cases
import torch
from test_runtime_tensor import SUM, gpt, llama_plan, named, plan_of, vocabulary

from cost_models.formats import groups_of
from cost_models.sharding import Sharding
from ir.errors import PlanError
from planner.runtime import narrow

BOTH = (("attention", "fp8"), ("mlp", "fp8"))
WHOLE = dict.fromkeys(("wq", "wk", "wv", "wo", "w1", "w2", "w3"), "")
SPLIT = {w: "rows" if w in ("wo", "w2") else "columns" for w in WHOLE}


GPT = {"c_attn": "fused", "c_fc": "columns", "c_proj": "rows"}


def gpt_plan(formats):
    embed, head = vocabulary(False)
    position = named({"weight": "S(0)"}, {"after/add_0[1]": SUM})
    units = (embed, position, gpt(False), Sharding(), head)
    return plan_of("gpt", units, 2, False, formats=formats)


def exact(found):
    """Nothing but the order of sums differs, and that only where tp has partial sums."""
    for result in found:
        assert result["loss"] == 0 and result["gradient"] == 0, result
        assert not result["replicated"]
    return found[0]


def near(found):
    """A sum in another order moves a value to the next 8-bit one now and then, and that one others
    on its way back: 4% of a gradient, of the tenth that the formats themselves move it."""
    for result in found:
        assert result["loss"] < 1e-5 and result["gradient"] < 5e-2, result
        assert not result["replicated"]
    return found[0]


def test_linears_compute_what_rounding_by_hand_does(world):
    """Of one group the others stay as they are; data ranks round what they have."""
    mlp = dict.fromkeys(("w1", "w2", "w3"), "")
    exact(world.run(1, cases.beside, "llama", llama_plan(1, False, formats=BOTH[1:]), mlp))
    split = llama_plan(1, False, formats=BOTH, dp=2, zero=3, shard=2, reshard=True, micro_batch=2)
    found = near(world.run(2, cases.beside, "llama", split, WHOLE))
    assert found["found"] != found["plain"]


def test_ranks_of_tp_round_what_they_have(world):
    """Columns, rows, three parts in one, whole: results and gradients, bias with them."""
    for found in world.run(2, cases.linears, 2):
        assert all(far < 1e-6 for each in found.values() for far in each), found


@pytest.mark.parametrize("sequence", [False, True])
def test_a_model_on_tp_has_the_collectives_of_16_bit_linears(world, sequence):
    found = near(world.run(
        2, cases.beside, "llama", llama_plan(2, sequence, formats=BOTH), SPLIT
    ))  # fmt: skip
    plan = llama_plan(2, sequence)
    plain = world.run(2, tensor_cases.run_example, "llama", {"size": "tiny"}, plan)
    assert found["collectives"] == plain[0]["collectives"]


def test_bias_and_a_fused_projection(world):
    plan = gpt_plan(BOTH)
    near(world.run(2, cases.beside, "gpt", plan, GPT))


def test_compiled_and_computed_again_in_part_as_eager(world):
    eager = llama_plan(2, True, formats=BOTH)
    stages = eager.decisions.stages
    once = replace(eager, decisions=replace(
        eager.decisions, compile=True, recompute=((0, stages[0]),)
    ))  # fmt: skip
    for loss, gradient, uncompiled in world.run(2, cases.compiled, "llama", once, eager):
        assert loss == 0 and gradient < 1e-5 and not uncompiled


def test_any_number_of_rows():
    """An 8-bit matmul sums 16 at once: rows are padded for the weight's gradient, with zeros."""
    torch.manual_seed(0)
    module = torch.nn.Linear(32, 48)
    for rows in (1, 5, 16):
        x = torch.randn(rows, 32, requires_grad=True)
        grads = []
        for run in (narrow.narrow, lambda m, x: cases.linear_by_hand(m, "", 1, x)):
            out = run(module, x)
            grads.append((out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))))
        for ours, theirs in zip(*grads):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_other_modules_are_refused():
    plan = llama_plan(1, False, formats=BOTH)
    site = SimpleNamespace(
        path="layers.0", unit=next(u for u in plan.graph.units if groups_of(u)),
        module=torch.nn.ModuleDict({"attention": torch.nn.ModuleDict({"wq": torch.nn.Identity()})}),
    )  # fmt: skip
    with pytest.raises(PlanError, match="Identity, not run in fp8"):
        narrow.apply([site], site.module, SimpleNamespace(plan=plan))
