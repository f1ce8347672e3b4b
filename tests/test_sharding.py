"""How units lie over tp: the program equals brute force, two solvers agree, textbooks come out."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from tiny_models import costs_of, graph_of
from torch import nn

from cost_models.layout import Assignment, options, produced
from cost_models.sharding import Edge, Sharding
from cost_models.traffic import tp_traffic
from cost_models.words import assignment_of, sharding_of
from cost_models.work import Axes
from ir.capture import capture_graph
from ir.capture.module import source_of
from planner.decisions import Pins
from planner.search import Searcher
from planner.sharding import best_assignment, solve
from planner.sharding_program import objective_ps, tabulate

EXAMPLES = ("llama", "gpt", "moe", "dit", "resnet")


def program_of(name, kind, *, tp=2, split=False, price=0.5, seed=None, free=8, **args):
    """The program of one unit; with a seed, cut down to a few options and given random costs."""
    graph = graph_of(name, **args)
    costs = costs_of(graph, "h100x8", seq_len=1024 if graph.seq_in_input else 1)
    unit, is_layer, _ = costs.kinds[kind % len(costs.kinds)]
    axes = Axes(tp=tp, sequence_parallel=split)
    whole = tabulate(costs, unit, is_layer, axes, 1, 1, price, {})
    if seed is None:
        return whole
    rng = random.Random(seed)
    many = [i for i, found in enumerate(whole.choices) if len(found) > 1]
    start = rng.randrange(max(1, len(many) - free + 1))
    choices = []
    for i, found in enumerate(whole.choices):
        count = min(len(found), rng.choice((2, 3))) if i in many[start : start + free] else 1
        choices.append((found[0], *rng.sample(found[1:], count - 1)))
    return replace(
        whole, choices=tuple(choices),
        cost_ps=tuple(tuple(rng.randint(0, 99) for _ in found) for found in choices),
        move_ps={key: rng.randint(0, 40) for key in whole.move_ps},
    )  # fmt: skip


def agrees(program, picks):
    """Whether every parameter is read in one placement."""
    seen = {}
    for node, found, pick in zip(program.unit.nodes, program.choices, picks):
        for ref, at in zip(node.inputs, found[pick].ins):
            if ref in program.unit.parameter_names and seen.setdefault(ref, at) != at:
                return False
    return True


def by_force(program):
    every = itertools.product(*(range(len(found)) for found in program.choices))
    return min(objective_ps(program, picks) for picks in every if agrees(program, picks))


@pytest.mark.parametrize("seed", range(24))
def test_solve_equals_brute_force(seed, monkeypatch):
    """On random costs, for parts of every example's units: eliminated, half and half, by HiGHS;
    with a table for each value, and with none."""
    name = EXAMPLES[seed % len(EXAMPLES)]
    for kind in range(3):
        p = program_of(name, kind, split=seed % 2 == 1, seed=seed, free=7)
        least = by_force(p)
        for cells in (20_000, 0) if kind else (20_000, 12, 0):
            picks = solve(p, cells=cells)
            assert agrees(p, picks)
            assert objective_ps(p, picks) == least
        with monkeypatch.context() as m:
            m.setattr("planner.sharding.CELLS", 0)
            picks = solve(p, cells=12 if kind == 1 else 20_000)
            assert agrees(p, picks)
            assert objective_ps(p, picks) == least


class Wide(nn.Module):
    """A value that many branches read."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(64, 64) for _ in range(branches))

    def forward(self, x):
        return x + sum(torch.tanh(branch(x)) for branch in self.branches)


@pytest.mark.parametrize("split", [False, True])
def test_a_value_with_many_readers(split):
    """A table over 30 readers has more cells than any memory; two solvers agree without it."""
    with torch.device("meta"):
        model = nn.Sequential(Wide(30), Wide(30), nn.Linear(64, 32))
    source = source_of(model, lambda b, s: (torch.zeros(b, s, 64),), None, None)
    costs = costs_of(capture_graph(source), "h100x8", seq_len=1024)
    unit, is_layer, _ = max(costs.kinds, key=lambda kind: len(kind[0].nodes))
    axes = Axes(tp=4, sequence_parallel=split)
    p = tabulate(costs, unit, is_layer, axes, 1, 1, 0.5, {})
    readers = [n for n in p.unit.nodes if unit.inputs[0][0] in n.inputs]
    assert len(readers) >= 30
    eliminated, searched = solve(p), solve(p, cells=0)
    assert agrees(p, eliminated)
    assert objective_ps(p, eliminated) == objective_ps(p, searched)
    whole = tuple(0 for _ in p.choices)
    assert objective_ps(p, eliminated) <= objective_ps(p, whole)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["llama", "moe", "gpt"])
def test_elimination_equals_highs_on_whole_layers(name, split):
    for kind in range(3):
        p = program_of(name, kind, tp=2, split=split)
        assert objective_ps(p, solve(p, cells=0)) == objective_ps(p, solve(p))


def laid(name, tp, split=True, hardware="h100x8", pins=None, **args):
    """The parameters' words by class, and the edges of the layer."""
    graph = graph_of(name, **args)
    costs = costs_of(graph, hardware, seq_len=8192, global_batch=8)
    found = Searcher(costs=costs, pins=pins or Pins()).assign(tp, split)
    words = {}
    for (unit, is_layer), a in found.items():
        path = next(k.path for k in costs.chain.links if k.unit is unit)
        said = sharding_of(unit, a)
        words |= {f"{path}.{n}": w for n, w in said.parameters}
        if is_layer:
            words["edges"] = said.edges
    return words


@pytest.mark.parametrize("split", [False, True])
def test_megatron_comes_out_for_llama(split):
    """Columns into heads and hidden features, rows back, the vocabulary split at both ends."""
    found = laid("llama", 8, split, size="8b", n_layers=2)
    layer = "layers.0."
    for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1",
                 "feed_forward.w3"):  # fmt: skip
        assert found[f"{layer}{name}.weight"] == "S(0)", name
    for name in ("attention.wo", "feed_forward.w2"):
        assert found[f"{layer}{name}.weight"] == "S(1)", name
    for name in (f"{layer}attention_norm", f"{layer}ffn_norm", "norm"):
        assert found[f"{name}.weight"] == "R", name
    assert found["embed_tokens.weight"] == found["lm_head.weight"] == "S(0)"


def test_edges_of_a_megatron_layer():
    """Under sequence parallelism two gathers and two reduce-scatters each way, nothing else."""
    edges = laid("llama", 8, True, size="8b", n_layers=2)["edges"]
    for way in (
        [e.forward for e in edges if e.forward[0] != "R"],
        [e.backward for e in edges if e.backward[0] != "R"],
    ):
        assert sorted(way) == [("P", "S(1)"), ("P", "S(1)"), ("S(1)", "R"), ("S(1)", "R")]


def test_no_worse_than_megatron_without_sequence_parallelism():
    """Two all-reduces each way are one answer; the program's is no dearer, its ends whole."""
    graph = graph_of("llama", size="8b", n_layers=2)
    costs = costs_of(graph, "h100x8", seq_len=8192, global_batch=8)
    unit = next(u for u, is_layer, _ in costs.kinds if is_layer)
    rows = ("attention.wo", "feed_forward.w2")
    columns = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1",
               "feed_forward.w3")  # fmt: skip
    megatron = Sharding(
        parameters=(*((f"{n}.weight", "S(1)") for n in rows),
                    *((f"{n}.weight", "S(0)") for n in columns)),
        edges=tuple(Edge(at=f"{n}:out", forward=("P", "R"), backward=("R", "R")) for n in rows),
    )  # fmt: skip
    program = tabulate(costs, unit, True, Axes(tp=8), 1, 1, 0.0, {})
    chosen = assignment_of(unit, megatron, 8, False).chosen
    picks = tuple(found.index(o) for found, o in zip(program.choices, chosen))
    best = solve(program)
    assert objective_ps(program, best) <= objective_ps(program, picks)
    last = produced(unit, Assignment(
        ways=8, sequence_parallel=False,
        chosen=tuple(found[k] for found, k in zip(program.choices, best)),
    ))  # fmt: skip
    assert all(last[name] == -1 for name in unit.diff_inputs)


def test_more_ranks_than_key_heads():
    """16 ranks, 8 key heads: query heads are split still, each rank reads its own key head."""
    found = laid("llama", 16, hardware="gb200x72", size="8b", n_layers=2)
    assert found["layers.0.attention.wq.weight"] == "S(0)"
    assert found["layers.0.attention.wo.weight"] == "S(1)"
    assert found["layers.0.attention.wk.weight"] in ("S(0)", "R")
    graph = graph_of("llama", size="8b", n_layers=2)
    layer = next(u for u in graph.units if any(n.op == "attention" for n in u.nodes))
    attention = next(n for n in layer.nodes if n.op == "attention")
    by_head = [o for o in options(layer, 16)[attention.name] if o.ins[0] == 1]
    assert by_head and all(o.ins[1:3] == (-1, -1) for o in by_head)


def test_experts_are_not_on_tp():
    """Expert weights lie over ep and etp: on tp the tokens are split, attention as ever."""
    found = laid("moe", 4, size="8b-a1b", n_layers=2)
    assert found["layers.0.attention.wq.weight"] == "S(0)"
    assert found["layers.0.attention.wo.weight"] == "S(1)"
    for name in ("w1", "w2", "w3"):
        assert found[f"layers.0.experts.{name}"] == "R"


def test_pinned_placements_hold():
    pins = Pins(place=(("layers.*.feed_forward.w1.weight", "R"), ("lm_head.weight", "S(1)")))
    found = laid("llama", 2, pins=pins, size="8b", n_layers=2)
    assert found["layers.0.feed_forward.w1.weight"] == "R"
    assert found["lm_head.weight"] == "S(1)"


def test_tied_weights_lie_one_way():
    found = laid("gpt", 2)
    graph = graph_of("gpt")
    assert graph.tied
    for alias, owner in graph.tied:
        assert found[alias] == found[owner]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("name", EXAMPLES)
def test_words_read_back(name, tp, split):
    """An assignment said in placements and edges is the same assignment when it is read."""
    graph = graph_of(name)
    if split and not graph.seq_in_input:
        pytest.skip("no sequence to split")
    seq_len = 1024 if graph.seq_in_input else 1
    costs = costs_of(graph, "h100x8", seq_len=seq_len, global_batch=8)
    for price in (None, 0.0, 1e3):  # what a byte is worth moves the optimum
        for unit, is_layer, _ in costs.kinds:
            axes = Axes(tp=tp, sequence_parallel=split)
            a = best_assignment(costs, unit, is_layer, axes, 1, 1, price)
            assert assignment_of(unit, sharding_of(unit, a), tp, split) == a


@pytest.mark.parametrize("seed", range(12))
def test_words_of_any_choice_read_back(seed):
    """Every legal combination of options, however poor, has words."""
    rng = random.Random(seed)
    for name in EXAMPLES:
        p = program_of(name, rng.randrange(4), tp=2, split=False)
        unit = p.unit
        while True:
            picks = tuple(rng.randrange(len(found)) if rng.random() < 0.3 else 0
                          for found in p.choices)  # fmt: skip
            if agrees(p, picks):
                break
        chosen = tuple(found[k] for found, k in zip(p.choices, picks))
        a = Assignment(ways=2, sequence_parallel=False, chosen=chosen)
        assert assignment_of(unit, sharding_of(unit, a), 2, False) == a


def test_objective_is_what_the_step_costs():
    """Nothing between: a unit whole on every rank pays no tp traffic."""
    costs = costs_of(graph_of("llama"), "h100x8", seq_len=1024, global_batch=8)
    searcher = Searcher(costs=costs)
    for unit, is_layer, _ in costs.kinds:
        a = searcher.assign(1, False)[unit, is_layer]
        assert not sharding_of(unit, a).edges
        assert all(w == "R" for _, w in sharding_of(unit, a).parameters)


@pytest.mark.parametrize("engine", ["native", "megatron"])
@pytest.mark.parametrize("split", [False, True])
def test_moves_are_priced_as_the_step_pays_them(engine, split):
    """Of any choice of options: what the engine gathers again in backward is paid again too."""
    costs = costs_of(graph_of("llama"), "h100x8", seq_len=1024, global_batch=8, engine=engine)
    unit, is_layer, _ = next(kind for kind in costs.kinds if kind[1])
    axes = Axes(tp=2, sequence_parallel=split)
    p = tabulate(costs, unit, is_layer, axes, 1, 1, 0.5, {})
    rng = random.Random(7)
    for _ in range(6):
        picks = tuple(rng.randrange(len(found)) if rng.random() < 0.3 else 0 for found in p.choices)
        if not agrees(p, picks):
            continue
        moved = objective_ps(p, picks) - sum(c[k] for c, k in zip(p.cost_ps, picks))
        a = Assignment(ways=2, sequence_parallel=split,
                       chosen=tuple(found[k] for found, k in zip(p.choices, picks)))  # fmt: skip
        rows = tp_traffic(unit, a, costs.work(axes, is_layer))
        paid = sum(float((row.seconds - row.hidden_s)[0]) for row in rows)
        assert moved == pytest.approx(paid * 1e12, rel=1e-6, abs=len(rows) + 1)
