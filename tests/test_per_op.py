"""What is decided op by op and shape by shape: each is chosen where it pays, and not elsewhere."""

from dataclasses import replace

import pytest
from test_sharding import laid
from tiny_models import costs_of, graph_of

from cost_models.hardware import load_hardware
from planner.capturing import Clock
from planner.decisions import Pins
from planner.mesh import meshes
from planner.options import TraceOptions
from planner.search import Searcher
from planner.tracing import plan_graph
from planner.workload import Asked

WIDE = {"size": "8b", "n_layers": 2}
MIXTURE = {"size": "8b-a1b", "n_layers": 2}
UNIFORM = ("ddp", "fsdp", "fsdp+tp", "3d")  # recipes that lay every layer over the same axes


def chosen(name, args, hardware, pins, **workload):
    """The best plan under pins: its decisions, and its objective."""
    costs = costs_of(graph_of(name, **args), hardware, **workload)
    found = meshes(costs.chain, costs.cluster, costs.workload, pins)
    costs.points = tuple(dict.fromkeys([(1, 1), *((m.micro_batch, m.cp) for m in found)]))
    best = Searcher(costs=costs, pins=pins).run().best
    return best.decisions, best.objective_ps


def traced(name, args, hardware, **more):
    asked = Asked(global_batch=more.pop("global_batch"), seq_len=more.pop("seq_len"))
    options = TraceOptions(model="", hardware=hardware, asked=asked, cache=False, **more)
    return plan_graph(graph_of(name, **args), options, load_hardware(hardware), Clock())


def test_layers_that_are_small_stay_whole_on_every_rank():
    """The vocabulary's two ends and the MLP are split of a wide model, and whole of a narrow one,
    where a collective takes longer than what it saves; attention is split by head in both."""
    wide, narrow = (laid("llama", 2, True, **args) for args in (WIDE, {}))
    ends = ("embed_tokens", "lm_head", *(f"layers.0.feed_forward.w{n}" for n in (1, 2, 3)))
    for name in ends:
        assert wide[f"{name}.weight"] != "R" == narrow[f"{name}.weight"], name
    assert wide["layers.0.attention.wq.weight"] == narrow["layers.0.attention.wq.weight"] == "S(0)"


def test_experts_over_ep_beside_attention_over_tp_beat_one_layout_for_all():
    """On tp 2 attention is split by head and experts lie over ep and norms are
    whole: quicker than with experts split as attention is, or whole as norms are."""
    given = {"seq_len": 1024, "global_batch": 8}
    pins = Pins(tp=2, pp=1, cp=1, micro_batch=1, zero=1)
    d, mixed = chosen("moe", MIXTURE, "h100x8", pins, **given)
    assert d.ep > 1 and d.etp == 1
    words = laid("moe", 2, d.sequence_parallel, **MIXTURE)
    assert words["layers.0.attention.wq.weight"] == "S(0)"
    assert {w for name, w in words.items() if "norm" in name} == {"R"}
    for uniform in ({"ep": 1, "etp": 2}, {"ep": 1, "etp": 1}):
        other = chosen("moe", MIXTURE, "h100x8", replace(pins, **uniform), **given)[1]
        assert mixed < other, uniform


@pytest.mark.parametrize(("seq_len", "split"), [(8192, True), (256, False)])
def test_the_stream_is_split_by_sequence_where_it_is_long(seq_len, split):
    """Short, norms on whole tokens cost less than two collectives in place of one."""
    pins = Pins(tp=8, pp=1, cp=1)
    given = {"seq_len": seq_len, "global_batch": 8}
    d, best_ps = chosen("llama", WIDE, "h100x8", pins, **given)
    _, other_ps = chosen(
        "llama", WIDE, "h100x8", replace(pins, sequence_parallel=not split), **given
    )
    assert d.sequence_parallel is split and best_ps < other_ps


@pytest.mark.parametrize(
    ("batch", "seq_len", "layout"), [(32, 1024, (8, 2)), (16, 8192, (1, 1))]
)
def test_experts_lie_over_two_axes_where_tokens_are_few(batch, seq_len, layout):
    """Eight experts on 16 GPUs: with few tokens a rank the gradients of whole experts take longer
    than the tokens' way to halves of them; with many the tokens stay, experts are held whole."""
    pins, given = Pins(pp=1, cp=1), {"seq_len": seq_len, "global_batch": batch}
    d, best_ps = chosen("moe", MIXTURE, "h100x16", pins, **given)
    assert (d.ep, d.etp, d.tp) == (*layout, 1)
    for ep, etp in ((1, 1), (8, 1), (8, 2)):
        _, ps = chosen("moe", MIXTURE, "h100x16", replace(pins, ep=ep, etp=etp), **given)
        assert best_ps <= ps * 1.02  # what the experts' axis must earn
        assert best_ps < ps or (ep, etp) == layout or layout == (1, 1)


def test_a_mixture_beats_every_uniform_recipe():
    found = traced("moe", MIXTURE, "h100x16", global_batch=32, seq_len=1024)
    assert found.plan.decisions.ep > 1
    times = {row.name: row.step_time_s for row in found.baselines if row.fits}
    assert set(times) & set(UNIFORM)
    best = min(time for name, time in times.items() if name in UNIFORM)
    assert found.estimate.step_time_s < best


@pytest.mark.parametrize("hardware", ["h100x8", "h100x16"])
def test_a_dense_model_equals_or_beats_every_recipe(hardware):
    """In predicted time, where an axis need earn nothing; else within what it must earn."""
    args = {"size": "8b", "n_layers": 4}
    for gain_ppm, more in ((0, 1.0), (20_000, 1.08)):
        found = traced(
            "llama", args, hardware, global_batch=64, seq_len=4096, gain_ppm=gain_ppm
        )
        for row in found.baselines:
            assert not row.fits or found.estimate.step_time_s <= row.step_time_s * more, row
