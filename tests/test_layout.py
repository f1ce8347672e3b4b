"""Placements of one op on tp: each option is right for real tensors, computed rank by rank."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_models import graph_of

from cost_models.layout import (
    PARTIAL,
    WHOLE,
    Assignment,
    collective,
    dual,
    moves,
    options,
    placement,
    word,
)
from cost_models.step import replicated

EXAMPLES = ("llama", "gpt", "moe", "dit", "resnet")


@pytest.mark.parametrize("at", [WHOLE, PARTIAL, 0, 1, 5])
def test_words_of_a_placement(at):
    assert placement(word(at)) == at


def test_collectives_between_placements():
    """What takes a value from one placement to another, as DTensor does it."""
    table = {
        ("R", "R"): "", ("R", "S(0)"): "", ("S(0)", "R"): "all_gather", ("P", "R"): "all_reduce",
        ("P", "S(1)"): "reduce_scatter", ("S(0)", "S(1)"): "all_to_all", ("S(1)", "S(1)"): "",
    }  # fmt: skip
    for (a, b), kind in table.items():
        assert collective(placement(a), placement(b)) == kind
    assert dual(PARTIAL) == WHOLE and dual(WHOLE) == WHOLE and dual(2) == 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_whole_is_always_an_option_and_costs_no_collective(name):
    for unit in graph_of(name).units:
        assert all(set(o[0].ins) <= {WHOLE} for o in options(unit, 1).values())
        a = replicated(unit, 1)
        assert isinstance(a, Assignment)
        assert not any(
            collective(m.source, m.target) for way in moves(unit, a) for m in way
        )


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_split_divides(name, tp):
    """A constant dimension that is split has tp equal parts; a pure batch is never split."""
    for unit in graph_of(name).units:
        for node in unit.nodes:
            ins = [unit.values[r] for r in node.inputs]
            for o in options(unit, tp)[node.name]:
                places = itertools.chain(zip(ins, o.ins), zip(node.outputs, o.outs))
                for tensor, at in places:
                    if at >= 0 and tensor.shape[at].is_constant:
                        assert tensor.shape[at].at(1, 1) % tp == 0, node.name
                    if at >= 0:
                        size = tensor.shape[at]
                        assert size.is_constant or size.seq, node.name


def shards(x, at, ways):
    return [x] * ways if at == WHOLE else x.chunk(ways, dim=at)


def joined(parts, at):
    if at == PARTIAL:
        return sum(parts)
    return parts[0] if at == WHOLE else torch.cat(parts, dim=at)


def run(op, inputs):
    if op == "linear":
        return F.linear(*inputs)
    if op == "attention":
        return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    return F.embedding(*inputs)


def sample(node, unit, ways):
    """Random operands of a node at two samples of four times tp tokens."""
    values = []
    for ref in node.inputs:
        tensor = unit.values[ref]
        shape = tuple(int(n) for n in tensor.sizes(2, 4 * ways))
        values.append(torch.randint(0, 256, shape) if tensor.dtype == "i64" else
                      torch.randn(shape, dtype=torch.float64))  # fmt: skip
    return values


@pytest.mark.parametrize("op", ["linear", "attention"])
@pytest.mark.parametrize("name", ["llama", "moe"])
def test_every_option_computes_the_op(name, op):
    """Each rank's op on its shards, put together as the result's placement says, and gradients."""
    torch.manual_seed(0)
    ways, tried = 2, 0
    for unit in graph_of(name).units:
        for node in unit.nodes:
            if node.op != op:
                continue
            full = [x.requires_grad_() for x in sample(node, unit, ways)]
            expected = run(op, full)
            seed = torch.randn_like(expected)
            gradients = torch.autograd.grad(expected, full, seed)
            for o in options(unit, ways)[node.name]:
                given = list(zip(*(shards(x.detach(), at, ways) for x, at in zip(full, o.ins))))
                mine = [[x.clone().requires_grad_() for x in rank] for rank in given]
                made = [run(op, rank) for rank in mine]
                torch.testing.assert_close(joined(made, o.outs[0]), expected)
                seeds = shards(seed, dual(o.outs[0]), ways)
                back = [torch.autograd.grad(y, x, g) for y, x, g in zip(made, mine, seeds)]
                for k, at in enumerate(o.grads):
                    total = joined([rank[k] for rank in back], at)
                    if o.outs[0] != WHOLE or any(x != WHOLE for x in o.ins):
                        torch.testing.assert_close(total, gradients[k])
                tried += 1
    assert tried >= 2  # whole, and split at least one way
