"""Formats of layers' matmuls: what they cost by hand, what is chosen, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from enumerated import difference, least_by_mesh, least_score
from random_problems import BIG_MOE as MOE_LIMITS
from random_problems import LLAMA, WIDE, make
from tiny_models import EXAMPLES, costs_of, graph_of

from cost_models.compute import load_kernels
from cost_models.decisions import Decisions, Workload
from cost_models.engines import load_engine
from cost_models.formats import decided, groups_in, groups_of
from cost_models.hardware import load_hardware
from cost_models.step import replicated
from ir.errors import PlanError, UsageError
from planner.decisions import Pins, parse_pins
from planner.decisions_json import decisions_from_json, decisions_json
from planner.formats import check_formats, fault, format_ways, settled
from planner.pin_checks import check_pins
from planner.plan import load
from planner.runtime.verify.scale import cut_decisions, lost
from planner.workload import Asked, allowed_formats, precision_of

FP8 = {"attention": "fp8", "mlp": "fp8", "experts": "fp8"}
BIG = {"size": "8b", "n_layers": 2}
BIG_MOE = {"size": "8b-a1b", "n_layers": 2}


def layer_of(graph):
    return next(u for u in graph.units if any(n.op == "attention" for n in u.nodes))


def test_groups_are_of_the_graph():
    llama = groups_of(layer_of(graph_of("llama")))
    parts = {name.partition("/")[0]: group for name, group in llama.items()}
    assert parts == {
        **{f"attention.{w}": "attention" for w in ("wq", "wk", "wv", "wo")},
        **{f"feed_forward.{w}": "mlp" for w in ("w1", "w2", "w3")},
    }
    moe = layer_of(graph_of("moe"))
    found = groups_of(moe)
    assert {n.op for n in moe.nodes if found.get(n.name) == "experts"} == {"grouped_matmul"}
    assert "experts.router/linear" not in found  # it leads to the choice of experts alone
    assert groups_in([moe]) == ("attention", "experts")


def unit_cost_at(costs, unit, **d):
    return costs.unit(unit, True, replicated(unit, 1), Decisions(**d))[0]


def test_one_group_costs_what_its_kernels_and_casts_do():
    """Each of w1, w2, w3 in fp8, its input cast (w1's for w3 as well, whose kernel is fused), its
    gradient too; nothing else changes, and neither do bytes."""
    costs = costs_of(graph_of("llama", **BIG), "h100x2", seq_len=8192, engine="torchtitan")
    unit, tokens, wide, inner = layer_of(costs.graph), 8192, 4096, 14336
    k = load_kernels(costs.cluster.device, attention=costs.engine.attention)
    shapes = [(wide, inner), (wide, inner), (inner, wide)]  # (in, out) of w1, w3, w2

    def forward(dtype):
        return sum(float(k.gemm_s(dtype, tokens, o, i)) for i, o in shapes)

    def backward(dtype):
        return sum(
            float(k.gemm_s(dtype, tokens, i, o)) + float(k.gemm_s(dtype, i, o, tokens))
            for i, o in shapes
        )

    inputs = [wide * tokens, 0, inner * tokens]
    cast_f = sum(float(k.memory_bound_s(3.0 * n)) for n in inputs)
    cast_b = sum(float(k.memory_bound_s(4.0 * tokens * o)) for _, o in shapes)
    base = unit_cost_at(costs, unit)
    narrow = unit_cost_at(costs, unit, formats=(("mlp", "fp8"),))
    assert narrow.forward_s[0] - base.forward_s[0] == pytest.approx(
        forward("fp8") - forward("bf16") + cast_f, rel=1e-9
    )
    assert narrow.backward_s[0] - base.backward_s[0] == pytest.approx(
        backward("fp8") - backward("bf16") + cast_b, rel=1e-9
    )
    assert [list(x) for x in narrow.kept_bytes] == [list(x) for x in base.kept_bytes]
    assert [list(x) for x in narrow.working_bytes] == [list(x) for x in base.working_bytes]


def test_our_runtime_casts_more():
    """Largest values are read first, weights are cast each micro-batch, and all but gradients
    again in backward: 2, 3, 3 bytes of an input and a gradient, 5 and 3 of a weight."""
    graph, formats = graph_of("llama", **BIG), (("mlp", "fp8"),)
    tokens, wide, inner = 8192, 4096, 14336
    found = {}
    for beyond in ((0.0,) * 5, load_engine("native-compiled").cast_beyond):
        engine = replace(load_engine("native-compiled"), cast_beyond=beyond)
        costs = replace(costs_of(graph, "h100x2", seq_len=8192), variant=engine)
        found[beyond] = unit_cost_at(costs, layer_of(graph), formats=formats), costs.kernels
    (less, k), (more, _) = found.values()

    def moved(size_bytes):
        return float(k.memory_bound_s(size_bytes)) - float(k.memory_bound_s(0))

    inputs, results = (wide + inner) * tokens, (2 * inner + wide) * tokens
    weights = 3 * wide * inner
    assert more.forward_s[0] - less.forward_s[0] == pytest.approx(moved(2 * inputs + 5 * weights))
    assert more.backward_s[0] - less.backward_s[0] == pytest.approx(
        moved(3 * inputs + 3 * results + 3 * weights)
    )


@pytest.mark.parametrize("engine", ["torchtitan", "megatron"])
def test_every_group_in_fp8_is_the_precision_fp8(engine):
    graph = graph_of("llama", **BIG)
    whole = costs_of(graph, "h100x2", seq_len=8192, engine=engine, precision="fp8")
    apart = costs_of(graph, "h100x2", seq_len=8192, engine=engine)
    every = tuple(FP8.items())
    one, other = unit_cost_at(whole, layer_of(graph)), unit_cost_at(
        apart, layer_of(graph), formats=every
    )
    for name in ("forward_s", "backward_s", "weight_s", "light_s", "host_forward_s"):
        assert list(getattr(one, name)) == list(getattr(other, name)), name
    back = unit_cost_at(whole, layer_of(graph), formats=tuple((g, "bf16") for g in FP8))
    assert list(back.forward_s) == list(unit_cost_at(apart, layer_of(graph)).forward_s)


def test_routed_layers_take_more_host_time_where_experts_are_narrow():
    costs = costs_of(graph_of("moe", **BIG_MOE), "h100x2", engine="megatron", seq_len=64)
    unit = layer_of(costs.graph)
    host = {
        formats: float(unit_cost_at(costs, unit, formats=formats).host_forward_s[0])
        for formats in ((), (("attention", "fp8"),), (("experts", "fp8"),))
    }
    assert host[(("experts", "fp8"),)] > host[()] * 1.2  # narrow_host_ratio: 1.252
    assert host[(("attention", "fp8"),)] == pytest.approx(host[()], rel=0.02)


def test_a_weight_whose_sides_no_kernel_takes_stays():
    unit = layer_of(graph_of("llama", **BIG))  # wk: [1024, 4096]
    every = tuple(FP8.items())
    assert len(decided(unit, every, 64, 1)) == 7  # 1024 / 64 = 16
    left = decided(unit, every, 128, 1)
    assert {n for n in groups_of(unit) if n not in left} == {
        "attention.wk/linear", "attention.wv/linear"
    }
    assert decided(unit, (("mlp", "bf16"),), 128, 1).keys() == {
        n for n, group in groups_of(unit).items() if group == "mlp"
    }


# --- the search --------------------------------------------------------------------------------

CASES = {  # small matmuls, large ones, few rows an expert
    "small": ("llama", {"n_layers": 2}, LLAMA, ()),
    "large": ("llama", BIG, WIDE, ("attention", "mlp")),
    "few rows": ("moe", BIG_MOE, MOE_LIMITS, ("attention",)),
}


@pytest.mark.parametrize("case", list(CASES))
def test_search_equals_enumeration_of_formats_and_all_else(case):
    example, args, limits, chosen = CASES[case]
    tiny = make(example, args, limits, load_hardware("h100x2"), engine="torchtitan",
                global_batch=2, allowed_formats=("fp8",))  # fmt: skip
    least = least_by_mesh(tiny)
    out = tiny.searcher.run()
    assert not difference(tiny, least, out)
    assert out.best.decisions.formats == tuple((group, "fp8") for group in chosen)
    for way in format_ways(tiny.costs.graph, tiny.costs.workload, None):
        alone = least_by_mesh(tiny, formats=way)
        bounds = replace(tiny.searcher, formats=way).bounds(list(alone)).lower_ps
        assert all(low <= alone[m] for low, m in zip(bounds, alone) if alone[m] is not None)
    pinned = tiny.searcher.under(Pins(formats=())).run()
    assert pinned.best.decisions.formats == ()
    assert pinned.best.score == least_score(least_by_mesh(tiny, formats=())) >= out.best.score


def test_formats_that_may_be_chosen():
    llama, moe = graph_of("llama", **BIG), graph_of("moe", **BIG_MOE)
    allowed = Workload(engine="torchtitan", allowed_formats=("fp8",))
    assert set(format_ways(llama, allowed, None)) == {
        (), (("attention", "fp8"),), (("mlp", "fp8"),), (("attention", "fp8"), ("mlp", "fp8")),
    }  # fmt: skip
    assert len(format_ways(moe, allowed, None)) == 4
    together = replace(allowed, engine="megatron")
    assert format_ways(moe, together, None) == ((("attention", "fp8"), ("experts", "fp8")), ())
    assert format_ways(llama, Workload(), None) == ((),)
    assert format_ways(llama, Workload(engine="torchtitan"), tuple(FP8.items())) == (
        (("attention", "fp8"), ("mlp", "fp8")),
    )


# --- words, refusals, files --------------------------------------------------------------------


def test_pins_say_groups_in_any_order():
    assert parse_pins(["formats=mlp:fp8,attention:bf16"]).formats == (
        ("attention", "bf16"), ("mlp", "fp8"),
    )  # fmt: skip
    assert parse_pins(["formats=layers:fp8"]).formats == tuple(FP8.items())
    but = tuple((FP8 | {"mlp": "bf16"}).items())
    assert parse_pins(["formats=layers:fp8,mlp:bf16"]).formats == but
    assert parse_pins(["formats=none"]).formats == ()
    for bad in ("head:fp8", "mlp", "mlp:fp7", "mlp:fp8,mlp:bf16", "none,mlp:fp8", ""):
        with pytest.raises(UsageError, match="no value"):
            parse_pins([f"formats={bad}"])


@pytest.mark.parametrize(
    ("formats", "workload", "words"),
    [
        ((("mlp", "fp8"),), {"engine": "megatron"}, "one format for all"),
        ((("mlp", "nvfp4"),), {"engine": "torchtitan"}, "does not run mlp in nvfp4"),
        ((("mlp", "fp16"),), {"engine": "torchtitan"}, "bytes and the speed of bf16"),
        ((("mlp", "fp8"),), {"engine": "torchtitan", "precision": "fp16"}, "given bf16 values"),
        ((("experts", "fp8"),), {"engine": "torchtitan"}, "no experts"),
        ((("mlp", "fp8"),), {"engine": "native"}, "--engine native does not run mlp in fp8"),
    ],
)
def test_what_cannot_be_run_is_refused_and_says_why(formats, workload, words):
    graph = graph_of("llama", **BIG)
    with pytest.raises(UsageError) as error:
        check_formats(formats, graph, load_hardware("h100x2"), Workload(**workload))
    assert words in "\n".join(error.value.lines())


def test_our_runtime_runs_linears_compiled():
    moe, native = graph_of("moe", **BIG_MOE), Workload(allowed_formats=("fp8",))
    assert format_ways(moe, native, None) == ((("attention", "fp8"),), ())
    pins = parse_pins(["formats=layers:fp8", "compile=off"])
    with pytest.raises(UsageError, match="contradict each other"):
        check_pins(pins, native, gpus=2)
    check_pins(replace(pins, formats=()), native, gpus=2)


def test_a_twin_is_verified_without_them():
    """It computes what the model does, and the model knows no fp8; `plan verify` says so."""
    d = Decisions(stages=(2,), recompute=((0, 0),), formats=(("mlp", "fp8"),))
    small, _ = cut_decisions(d, Workload(), d, 2, 32)
    assert small.formats == ()
    assert lost(d, small) == ("the twin's matmuls are in fp32, the plan's in fewer bits",)


def test_a_device_without_fp8_is_refused():
    graph, cluster = graph_of("llama", **BIG), load_hardware("a100x2")
    with pytest.raises(UsageError, match="does not compute in fp8"):
        check_formats((("mlp", "fp8"),), graph, cluster, Workload(engine="torchtitan"))
    with pytest.raises(UsageError, match="does not compute in fp8"):
        allowed_formats(Asked(precision="bf16,fp8"), cluster)
    with pytest.raises(UsageError, match="cannot be allowed"):
        allowed_formats(Asked(precision="bf16,fp16"), load_hardware("h100x2"))
    asked = Asked(precision="bf16,fp8")
    assert precision_of(asked, load_hardware("h100x2")) == ("bf16", ())


def test_what_is_the_precision_is_not_said():
    graph = graph_of("llama", **BIG)
    assert settled(tuple((g, "bf16") for g in FP8), graph, Workload()) == ()
    narrow = Workload(precision="fp8", engine="torchtitan")
    assert settled((("mlp", "bf16"), ("attention", "fp8")), graph, narrow) == (("mlp", "bf16"),)
    assert fault((("mlp", "bf16"),), graph, narrow) is None


def test_decisions_say_formats_where_there_are_some():
    d = Decisions(stages=(2,), formats=(("attention", "fp8"), ("mlp", "fp8")))
    raw = decisions_json(d)
    assert raw["formats"] == {"attention": "fp8", "mlp": "fp8"}
    assert decisions_from_json(raw, (2,), ()) == d
    assert "formats" not in decisions_json(Decisions())
    for bad in ({"layers": "fp8"}, {"mlp": "fp7"}, {"head": "fp8"}):
        with pytest.raises(PlanError, match=r"decisions\.formats"):
            decisions_from_json(raw | {"formats": bad}, (2,), ())


def test_commands_know_formats(plan, tmp_path):
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    base = ["trace", EXAMPLES / "llama.py", "--arg", "size=8b", "--arg", "n_layers=2",
            "--hardware", "h100x2", "--engine", "torchtitan", "--global-batch", "2"]  # fmt: skip
    assert plan(*base, "--precision", "bf16,fp8", "-o", path)[0] == 0
    found = load(str(path))
    assert found.workload.allowed_formats == ("fp8",)
    assert found.decisions.formats == (("attention", "fp8"), ("mlp", "fp8"))
    assert "attention in fp8, mlp in fp8" in plan("show", path)[1]
    assert plan("check", path)[0] == 0
    assert plan(*base, "--fix", "formats=mlp:fp8", "-o", other)[0] == 0
    changed = plan("diff", other, path)[1]
    assert "formats: mlp:fp8 -> attention:fp8,mlp:fp8" in changed
    assert "allowed_formats: none -> fp8" in changed
    why = json.loads(plan("why", path, "--not", "formats=layers:fp8", "--json")[1])
    assert why["alternatives"][0]["decisions"]["formats"] == {"mlp": "fp8"}
    path.write_text(path.read_text().replace('"attention": "fp8"', '"attention": "bf16"'))
    code, _, error = plan("check", path)
    assert code == 1 and "beside bf16, it is {'mlp': 'fp8'}" in error
    assert plan(*base, "--fix", "formats=mlp:fp7")[0] == 64
