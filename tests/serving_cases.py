"""Served models of any size without a trace, and the search over them."""

import functools

from cost_models.hardware import load_hardware
from cost_models.serving_shapes import Attend, Experts, LayerShape, Light, Matrix, ServedModel
from planner.serving.asked import ServeAsked, parse_serve_pins
from planner.serving.search import search


def matrix(block, k, n, split="column"):
    return Matrix(block=block, k=k, parts=((n, 0),), split=split)


@functools.cache
def model(layers=32, hidden=8192, inter=28672, experts=0, topk=2):
    """A decoder; with experts a mixture of them."""
    heads = hidden // 128
    mlp = () if experts else (matrix("mlp", hidden, 2 * inter), matrix("mlp", inter, hidden, "row"))
    layer = LayerShape(
        count=layers,
        matrices=(matrix("attention", hidden, hidden + 2 * 1024),
                  matrix("attention", hidden, hidden, "row"), *mlp),
        attention=(Attend(heads=heads, kv_heads=8, dim_qk=128, dim_v=128),),
        experts=(Experts(experts=experts, topk=topk, hidden=hidden, inter=inter),) if experts
        else (),
        recurrences=(), light=Light(kernels=4, whole_bytes=8.0 * hidden, split_bytes=0.0),
        reductions=("attention", "mlp"), norm_reductions=0,
    )  # fmt: skip
    return ServedModel(
        name="toy", hidden=hidden, vocab=32000, tied=False, layers=(layer,),
        head=(matrix("head", hidden, 32000),), embedding_elements=32000 * hidden,
        other_elements=hidden * 2 * layers,
    )  # fmt: skip


def found(served, hardware, pins=(), **asked):
    asked = ServeAsked(**{"prompt": 512, "output": 128, "batch": 1, **asked})
    return search(served, load_hardware(hardware), asked, parse_serve_pins(pins))
