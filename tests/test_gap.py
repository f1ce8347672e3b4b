"""The gap of GPipe and of 1F1B is 0 on the example models, where memory binds and where it does
not."""

from dataclasses import replace

import pytest
from tiny_models import graph_of, with_memory

from cost_models.hardware import load_hardware
from planner.capturing import Clock
from planner.decisions import Pins, parse_pins
from planner.options import TraceOptions
from planner.tracing import attempt
from planner.workload import Asked

# example: (its arguments, hardware, samples a step, GB of a GPU)
MODELS = {
    "llama": ({"size": "8b", "n_layers": 4}, "a100x8", 32, 40),
    "gpt": ({"size": "124m"}, "h100x16", 256, 6),
    "moe": ({"size": "8b-a1b", "n_layers": 2}, "h100x8", 128, 26),
    "dit": ({"size": "xl/2", "n_layers": 2}, "a100x8", 128, 2),
    "resnet": ({"size": "18"}, "h100x16", 1024, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_no_gap(name):
    """GPipe, which holds the activations of all micro-batches, is short of memory."""
    args, hardware, batch, gigabytes = MODELS[name]
    cluster = with_memory(load_hardware(hardware), gigabytes * 10**9)
    for schedule in ("gpipe", "1f1b"):
        options = TraceOptions(
            model="", hardware=hardware, pins=parse_pins([f"schedule={schedule}"]),
            asked=Asked(global_batch=batch),
        )  # fmt: skip
        _, _, out = attempt(graph_of(name, **args), options, cluster, Clock())
        assert out.best.decisions.schedule == schedule
        assert out.proved and out.gap == 0


@pytest.mark.parametrize("pin", ["recompute=full:1", "offload=activations:cpu:2"])
def test_interleaved_stages_with_a_pin_by_count_leave_no_gap(pin):
    options = TraceOptions(
        model="", hardware="h100x16", pins=parse_pins([pin, "pp=4"]), asked=Asked(global_batch=256)
    )
    graph = graph_of("llama", size="8b", n_layers=16)
    _, _, out = attempt(graph, options, load_hardware("h100x16"), Clock())
    assert out.proved and out.gap == 0


TWO_LEVELS = """
base = "h100"
count = 32
[[cluster.levels]]
name = "fabric"
kind = "tree"
ranks = 16
bytes_per_s = 5e10
efficiency = 0.95
latency_s = 5e-6
[[cluster.levels]]
name = "wan"
kind = "wan"
bytes_per_s = 7.8e8
efficiency = 0.8
latency_s = 6e-4
"""


@pytest.mark.parametrize("pins", [("1f1b", "pp=4", "cp=1", "tp=1"), ("gpipe", "pp=4", "cp=2")])
def test_no_gap_over_a_slow_network(pins, tmp_path):
    """Tails are long there, and programs with optimizers of some layers below far from solved."""
    path = tmp_path / "two.toml"
    path.write_text(TWO_LEVELS)
    options = TraceOptions(
        model="", hardware=str(path), pins=parse_pins([f"schedule={pins[0]}", *pins[1:]]),
        asked=Asked(global_batch=64), gain_ppm=0,
    )  # fmt: skip
    graph = graph_of("llama", size="8b", n_layers=16)
    _, _, out = attempt(graph, options, load_hardware(str(path)), Clock())
    assert out.proved and out.gap == 0


def test_tp_goes_over_the_network_where_each_gpu_is_a_domain_of_its_own():
    """Where memory is short it is what holds the model best; where not, it does not pay."""
    def tp_of(gigabytes):
        own = replace(load_hardware("h100x8"), node_size=1, domain_size=1)
        options = TraceOptions(
            model="", hardware="h100x8", pins=Pins(), asked=Asked(global_batch=64)
        )  # fmt: skip
        cluster = with_memory(own, gigabytes * 10**9)
        _, _, out = attempt(
            graph_of("llama", size="8b", n_layers=2), options, cluster, Clock()
        )
        return out.best and out.best.decisions.tp, out.proved

    assert tp_of(79) == (1, True)
    assert tp_of(8) == (4, True)
