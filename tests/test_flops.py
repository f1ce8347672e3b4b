"""FLOP counts: equal to torch's counter where that counts, and to hand formulas beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ir.capture import capture_graph, hf
from ir.capture.load import Source, load
from ir.count import executed_flop, model_flop, node_flop, nodes, unit_model_flop
from ir.graph import Dim, Graph, Node, Tensor, Unit

EXAMPLES = Path(__file__).parents[1] / "examples"
BATCH, SEQ = 2, 64
# model type: changes to its default configuration; a few layers, so that classes differ
HF: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "gpt2": {"n_layer": 2},
    "qwen3": {"num_hidden_layers": 2},
    "gemma2": {"num_hidden_layers": 2},
    "bloom": {"n_layer": 2},
    "deepseek_v3": {"num_hidden_layers": 4},
    "mixtral": {"num_hidden_layers": 2},
    "bert": {"num_hidden_layers": 2, "architectures": ["BertLMHeadModel"]},
}


def hf_source(kind: str) -> Source:
    return hf.source({"model_type": kind, **HF[kind]}, name=kind, args={}, key="", where=kind)


def counted(model: nn.Module, source: Source) -> int:
    """torch's count of a forward on the meta device, where attention is decomposed to matmuls."""
    with source.tracing(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**source.inputs(BATCH, SEQ))
    return counter.get_total_flops()


def grouped(graph: Graph) -> int:
    """FLOPs of grouped matmuls, which torch's counter leaves out."""
    found = [(u, n) for u, n in nodes(graph) if n.op == "grouped_matmul"]
    return sum(node_flop(u, n, BATCH, SEQ) for u, n in found)


@pytest.mark.parametrize("name", ["llama", "gpt", "moe", "dit", "resnet"])
def test_examples_equal_torchs_counter(name: str) -> None:
    source = load(str(EXAMPLES / f"{name}.py"), {"size": "tiny"})
    graph = capture_graph(source, precision="fp32")
    assert model_flop(graph, BATCH, SEQ) - grouped(graph) == counted(source.model, source)


@pytest.mark.parametrize("kind", list(HF))
def test_hugging_face_models_equal_torchs_counter(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hf_source(kind)
    graph = capture_graph(source)
    # eager attention is two matmuls, which torch counts; ours is one operator, which it does not
    for module in source.model.modules():
        if hasattr(module, "config"):
            monkeypatch.setattr(module.config, "_attn_implementation", "eager")
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert model_flop(graph, BATCH, SEQ) - grouped(graph) == counted(source.model, source)


def test_a_dense_layer_by_hand() -> None:
    """2 per parameter and token in matmuls, and 4*b*n_q*d*s^2 in attention, not halved."""
    graph = capture_graph(load(str(EXAMPLES / "llama.py"), {"size": "8b", "n_layers": "1"}))
    layer = graph.unit_by_name["u1"]
    matmul_parameters = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336
    for b, s in ((1, 128), (3, 4096)):
        attention = 4 * b * 32 * 128 * s * s
        assert unit_model_flop(layer, b, s) == 2 * matmul_parameters * b * s + attention


def test_a_grouped_matmul_costs_the_rows_it_has() -> None:
    """top-2 of 8: 2*T*k*d*f for each of the three matrices, whatever the routing."""
    graph = capture_graph(load(str(EXAMPLES / "moe.py"), {"size": "tiny"}))
    layers = 2 * (3 * 2 * (BATCH * SEQ * 2) * 64 * 128)
    assert grouped(graph) == layers
    unit, node = next((u, n) for u, n in nodes(graph) if n.op == "grouped_matmul")
    forward, backward = executed_flop(unit, node, BATCH, SEQ)
    assert (forward, backward) == (layers // 6, 2 * (layers // 6))


def attention(**attrs: Any) -> tuple[Unit, Node]:
    """One attention of 8 query and 2 key heads of size 16 (values 12) over s positions."""

    def tensor(heads: int, size: int) -> Tensor:
        dims = (Dim(numerator=1, batch=1), Dim(numerator=heads), Dim(numerator=1, seq=1))
        return Tensor(shape=(*dims, Dim(numerator=size)), dtype="bf16")

    q, k, v = tensor(8, 16), tensor(2, 16), tensor(2, 12)
    node = Node(
        name="attention", op="attention", inputs=("q", "k", "v"), outputs=(tensor(8, 12),),
        attrs=tuple(sorted(attrs.items())),
    )  # fmt: skip
    inputs = (("q", q), ("k", k), ("v", v))
    unit = Unit(name="u", inputs=inputs, parameters=(), nodes=(node,), outputs=("attention",))
    return unit, node


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7, 64, 1000])
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("seq", [1, 2, 33, 64])
def test_kernels_visit_the_pairs_that_the_mask_leaves(
    causal: bool, window: int | None, chunk: int | None, seq: int
) -> None:
    if chunk and (window or not causal):
        pytest.skip("chunks are causal and have no window")

    def seen(i: int, j: int) -> bool:
        near = window is None or (i - j < window if causal else abs(i - j) <= window)
        return (j <= i or not causal) and near and (chunk is None or i // chunk == j // chunk)

    pairs = sum(seen(i, j) for i in range(seq) for j in range(seq))
    given = {"causal": causal, "window": window, "chunk": chunk}
    unit, node = attention(**given)
    forward, backward = executed_flop(unit, node, 3, seq)
    assert forward == 2 * 3 * 8 * pairs * (16 + 12)
    # flash recomputes the scores: S, dP, dQ, dK of size d or dv ... five products against two
    assert backward == forward * 5 // 2
    assert node_flop(unit, node, 3, seq) == 2 * 3 * 8 * seq * seq * (16 + 12)
