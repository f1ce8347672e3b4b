"""Recomputation operation by operation: the ladder against all subsets, its words, its pins."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import costs_of, graph_of, with_memory

from cost_models.decisions import Decisions
from cost_models.estimate import estimate, stage_problem
from cost_models.hardware import load_hardware
from cost_models.keeping import MOST_KEEPS, kept_in_part, vertices
from cost_models.stage_problem import evaluate
from cost_models.work import Axes
from ir.errors import PlanError, UsageError
from ir.keep import keepable, repeated, words
from planner.bound_ranks import freed_by
from planner.chain import layer_units
from planner.decisions import Pins, parse_pins
from planner.decisions_json import decisions_from_json, decisions_json
from planner.keep_checks import check_keep, pinned_keep
from planner.keep_words import keep_words
from planner.keeps import keep_sets
from planner.search import Searcher

LLAMA = ("attention.wq", "attention.wk", "attention.wv", "attention/attention", "attention.wo",
         "feed_forward.w1", "feed_forward.w3")  # fmt: skip


def laid(costs, tp=1, split=False):
    return Searcher(costs=costs).assign(tp, split)


def ways(costs, tp=1, split=False):
    """(unit, its assignment, its work, its cost, how many layers) of each class of layers."""
    found, d = laid(costs, tp, split), Decisions(tp=tp, sequence_parallel=split)
    for unit in layer_units(costs.graph):
        a = found[unit, True]
        count = sum(link.unit is unit for link in costs.chain.links)
        work = costs.work(Axes(tp=tp, sequence_parallel=split), True)
        yield unit, a, work, costs.unit(unit, True, a, d)[0], count


def test_what_can_be_kept_of_a_llama_layer():
    """Every matmul and attention but the last matmul, which backward does not need."""
    unit = layer_units(graph_of("llama"))[0]
    assert words(unit) == LLAMA
    again = [n.name for n in repeated(unit, LLAMA[3:])]
    assert again == [f"attention.{w}/linear" for w in ("wq", "wk", "wv")]


def test_layers_with_experts_keep_as_they_do():
    units = layer_units(graph_of("moe"))
    assert units and not any(keepable(u) for u in units)


@pytest.mark.parametrize("engine", ["native", "native-compiled"])
@pytest.mark.parametrize(("name", "args", "tp"), [
    ("llama", {}, 1), ("llama", {"size": "8b", "n_layers": 2}, 1), ("gpt", {}, 1),
    ("llama", {"size": "8b", "n_layers": 2}, 4), ("dit", {}, 1),
])  # fmt: skip
def test_the_ladder_is_the_front_of_all_subsets(engine, name, args, tp):
    """No subset of what can be kept lies below the hull of nothing, the whole set and the ladder,
    and each rung is the cheapest at some price of a byte."""
    costs = costs_of(graph_of(name, **args), "h100x4", engine=engine, seq_len=4096)
    ((unit, a, work, alone, _),) = ways(costs, tp, tp > 1)
    none = float(alone.kept_bytes[0][0])

    def point(kept):
        cost = kept_in_part(unit, a, work, alone, kept)
        return none - float(cost.kept_bytes[1][0]), float(cost.light_s[0])

    subsets = [
        tuple(w for w, keep in zip(words(unit), picks) if keep)
        for picks in itertools.product((True, False), repeat=len(words(unit)))
    ]  # the whole set first
    found = keep_sets(costs, tp, tp > 1, (), laid(costs, tp, tp > 1))
    rungs = [dict(keep)[unit.name] for keep in found]
    assert len(rungs) <= MOST_KEEPS and len(set(rungs)) == len(rungs)
    every = [(0.0, 0.0), *map(point, subsets)]
    front = [every[i] for i in vertices(every) if i > 1]
    mine = [point(r) for r in rungs]
    if len(front) <= MOST_KEEPS:
        assert np.allclose(mine, front)
    assert all(any(np.allclose(p, q) for q in front) for p in mine)
    if front:
        assert np.allclose(mine[-1], front[-1])


def test_vertices_are_those_of_every_price():
    """A point is a vertex where it alone is the best at some seconds a byte."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [(0.0, 0.0), *((float(x), float(y)) for x, y in rng.integers(1, 30, (8, 2)))]
        found = {points[i] for i in vertices(points)}
        for price in np.geomspace(0.01, 100, 400):
            best = min(p[1] - price * p[0] for p in points)
            at = {p for p in points if p[1] - price * p[0] <= best + 1e-12}
            assert at & ({(0.0, 0.0)} | found)
            if len(at) == 1:
                assert at <= {(0.0, 0.0)} | found


def test_pieces_bound_every_mix():
    """The pieces free so many bytes for no more seconds than any mix of two ways takes."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        none = np.array([100.0])
        drawn = rng.integers(0, 99, (5, 2)).astype(float)
        made = [(np.array([k]), np.array([s])) for k, s in drawn]
        pieces = freed_by(none, made)
        ends = [(0.0, 0.0), *((100 - float(k[0]), float(s[0])) for k, s in made)]
        for (a, s), (b, t) in itertools.combinations(ends, 2):
            for share in (0.0, 0.3, 1.0):
                over, spent = a + share * (b - a), s + share * (t - s)
                least = 0.0
                for size, rate in pieces[:, :, 0]:
                    used = min(over, size)
                    least, over = least + used * rate, over - used
                assert over <= 1e-9 and least <= spent + 1e-9


def test_what_is_kept_by_hand():
    """A tiny Llama's layer: input, and of each operation kept its result; attention's statistic
    is fp32, of each head. On tp with sequence parallelism beside them both gathered inputs whole,
    and the sum behind attention."""
    graph = graph_of("llama")
    costs = costs_of(graph, "h100x2", engine="native", seq_len=64)
    ((unit, a, work, alone, _),) = ways(costs)

    def held(*kept):
        return float(kept_in_part(unit, a, work, alone, kept).kept_bytes[1][0]) / 64

    assert held() == 2 * 64
    assert held("attention.wk", "feed_forward.w1") == 2 * (64 + 32 + 128)
    assert held("attention/attention") == 2 * 64 + 2 * 64 + 4 * 4
    whole = kept_in_part(unit, a, work, alone, LLAMA)
    assert whole.kept_bytes[1] == alone.kept_bytes[1] and whole.light_s == alone.light_s
    wide = costs_of(graph_of("llama", size="8b", n_layers=2), "h100x4", engine="native", seq_len=64)
    ((unit, a, work, alone, _),) = ways(wide, 4, True)
    kept = kept_in_part(unit, a, work, alone, ()).kept_bytes[1][0] / 64
    assert kept == 2 * 4096 * (1 / 4 + 2 + 1 / 4)


TIGHT = {"pp": 1, "tp": 1, "cp": 1, "micro_batch": 1, "offload": ()}


def tight(megabytes, **pins):
    graph = graph_of("llama", size="8b", n_layers=16)
    cluster = with_memory(load_hardware("h100x4"), megabytes * 10**6)
    costs = costs_of(graph, cluster, seq_len=8192, global_batch=8)
    return costs, Searcher(costs=costs, pins=Pins(**{**TIGHT, **pins})).run().best


def test_it_pays_where_memory_is_tight_and_says_what_it_keeps():
    costs, free = tight(44_000)
    _, default = tight(44_000, keep=())
    d = free.decisions
    assert d.keep and any(some for _, some in d.recompute)
    assert free.objective_ps < default.objective_ps and not default.decisions.keep
    problem = stage_problem(costs, costs.step(d, free.assignments))
    assert evaluate(problem, d.stages, d.recompute)[::2] == (free.objective_ps, True)
    made = estimate(costs.graph, costs.cluster, costs.workload, d, {})
    assert made.peak_memory_bytes <= costs.cluster.device.memory_bytes
    _, pinned = tight(44_000, keep=d.keep)
    assert (pinned.decisions, pinned.objective_ps) == (d, free.objective_ps)


def test_where_memory_is_no_limit_nothing_is_kept_otherwise():
    _, free = tight(80_000)
    assert not free.decisions.keep and not any(map(any, free.decisions.recompute))


def test_pins_and_words():
    graph = graph_of("llama")
    name = layer_units(graph)[0].name
    assert pinned_keep(parse_pins(["keep=default"]).keep, graph) == ()
    assert pinned_keep(parse_pins(["keep=none"]).keep, graph) == ((name, ()),)
    assert pinned_keep(parse_pins([f"keep={'+'.join(LLAMA)}"]).keep, graph) == ()
    pin = parse_pins([f"keep={name}:attention.wo+attention.wq"])
    assert pinned_keep(pin.keep, graph) == ((name, ("attention.wq", "attention.wo")),)
    for text in ("keep=none", "keep=default", f"keep={name}:attention.wq+attention.wo"):
        assert parse_pins([text]).said("keep") == text
    for text, word in (("keep=attention.wx", "'attention.wx'"), ("keep=u9:none", "u9")):
        with pytest.raises(UsageError, match=word):
            pinned_keep(parse_pins([text]).keep, graph)
    for text in ("keep=", "keep=a,b", "keep=u1:", "keep=a++b"):
        with pytest.raises(UsageError, match="is no value"):
            parse_pins([text])


def test_the_plan_file_says_it_only_where_it_is_not_the_default():
    graph = graph_of("llama")
    name = layer_units(graph)[0].name
    plain = Decisions(stages=(2,), recompute=((0, 2),))
    assert "keep" not in decisions_json(plain)
    made = replace(plain, keep=((name, LLAMA[:2]),))
    text = json.loads(json.dumps(decisions_json(made)))
    assert decisions_from_json(text, made.stages, made.recompute) == made
    assert keep_words(made.keep) == f"{name}:attention.wq+attention.wk"
    check_keep(made.keep, graph)
    for keep, said in (((("u9", ()),), "keep.u9"), (((name, ("x",)),), "'x'")):
        with pytest.raises(PlanError, match=said):
            check_keep(keep, graph)
    with pytest.raises(PlanError, match=r"keep\.u1"):
        decisions_from_json(text | {"keep": {"u1": "all"}}, made.stages, made.recompute)


@pytest.mark.parametrize(("fixed", "why"), [
    (["keep=none", "recompute=full"], "in part"),
    (["keep=none", "cp=2", "cp_kind=ulysses"], "ulysses"),
])  # fmt: skip
def test_what_may_not_go_with_it(plan, fixed, why):
    from tiny_models import EXAMPLES

    words = [w for one in fixed for w in ("--fix", one)]
    code, _, err = plan("trace", EXAMPLES / "llama.py", "--arg", "size=tiny", "--hardware",
                        "h100x2", "--global-batch", "4", *words)  # fmt: skip
    assert code == 64 and why in err


def test_the_commands_say_it(plan):
    """A pinned set, through trace, show, diff, why and the file."""
    from tiny_models import EXAMPLES

    common = ("trace", EXAMPLES / "llama.py", "--arg", "size=tiny", "--hardware", "h100x2",
              "--global-batch", "4", "--fix", "recompute=selective", "--fix", "tp=1")  # fmt: skip
    assert plan(*common, "--fix", "keep=attention/attention", "-o", "a.json")[0] == 0
    assert plan(*common, "-o", "b.json")[0] == 0
    assert "in part keeping attention/attention" in plan("show", "a.json")[1]
    assert "kept in part of u1: attention/attention" in plan("show", "a.json", "--layers")[1]
    assert "keep" not in plan("show", "b.json")[1]
    assert "keep: u1:attention/attention -> default" in plan("diff", "a.json", "b.json")[1]
    code, out, _ = plan("why", "a.json", "--not", "keep=attention/attention")
    assert code == 0 and "keep=" in out
    assert plan(*common, "--engine", "torchtitan", "--fix", "keep=none", "-o", "c.json")[0] == 64


def test_rows_that_are_remembered_are_those_of_the_decisions():
    """Whatever was asked before: of another state, of layers that keep or move more, by turns."""

    def fresh():
        return Searcher(costs=costs_of(graph_of("llama", n_layers=3), "h100x2", global_batch=4))

    asked = fresh()
    least = Decisions(dp=2, shard=2, microbatches=2, compile=True)
    laid, rungs = asked.assign(1, False), [(), asked.keeps(1, False)[0]]
    states = [{"zero": 1}, {"zero": 3}, {"zero": 3, "grad_dtype": "bf16"}]
    moved = [(), (("activations", "cpu"),), (("optimizer", "cpu"), ("activations", "cpu")),
             (("optimizer", "cpu:1"),)]  # fmt: skip
    every = [replace(least, keep=keep, offload=way, **state)
             for keep in rungs for state in states for way in moved]  # fmt: skip
    for d in every:
        steps = [each.costs.step(d, laid) for each in (asked, fresh())]
        assert (steps[0].rows, steps[0].glue) == (steps[1].rows, steps[1].glue), d
