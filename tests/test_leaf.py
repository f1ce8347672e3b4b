"""What cannot be traced: declared leaves, recognised experts, and what is said otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ir.capture import capture_graph
from ir.capture.load import load
from ir.check import check_graph
from ir.count import model_flop
from ir.errors import PlanError
from ir.graph import Graph, Node
from ir.text import format_graph, parse_graph

BUILD = """
import torch
from torch import nn
import torch.nn.functional as F
import ir

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(16, 16))
    def forward(self, x):
        n = int(x.sum().item())
        return x @ self.weight * n
{leaf}
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = Odd()
        self.out = nn.Linear(16, 16)
    def forward(self, x):
        return x + self.out(self.odd(x))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(16, 32)
    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

def build():
    return Net()
"""

EXPERTS = """
import torch
from torch import nn
import torch.nn.functional as F

class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 48)
        self.down = nn.Linear(48, 16)
    def forward(self, x):
        return self.down(F.silu(self.up(x)))

class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        {top_k}
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(4))
    def forward(self, x):
        tokens = x.reshape(-1, 16)
        weights, chosen = self.gate(tokens).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(tokens)
        for i, count in enumerate(chosen.flatten().bincount(minlength=4).tolist()):
            if count:
                row, slot = (chosen == i).nonzero(as_tuple=True)
                out[row] += self.experts[i](tokens[row]) * weights[row, slot, None]
        return out.view_as(x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), MoE()) for _ in range(3))
        self.head = nn.Linear(16, 32)
    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer[1](layer[0](x))
        return self.head(x)

def build():
    return Net()
"""


def graph_of(folder: Path, text: str) -> Graph:
    (folder / "model.py").write_text(text)
    graph = capture_graph(load(str(folder / "model.py"), {}))
    check_graph(graph)
    assert format_graph(parse_graph(format_graph(graph))) == format_graph(graph)
    return graph


def only(graph: Graph, op: str) -> Node:
    return next(n for u in graph.units for n in u.nodes if n.op == op)


def test_undeclared_is_an_error_that_says_where_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        graph_of(tmp_path, BUILD.format(leaf=""))
    text = "\n".join(caught.value.lines())
    assert "model.py:12" in text and "ir.leaf" in text


def test_a_declared_leaf_is_one_operation_with_its_costs(tmp_path: Path) -> None:
    flop = "lambda x: 2 * x[0] * x[1] * 256"
    declared = f"ir.leaf(Odd, flop={flop}, saved=64, factors='b s !h;b s !h')"
    graph = graph_of(tmp_path, BUILD.format(leaf=declared))
    node = only(graph, "leaf")
    assert node.inputs[-1].endswith("weight") and str(node.outputs[0]) == "bf16[b, s, 16]"
    assert node.attr("flop") == "512*b*s"
    assert graph.parameter_count == 32 * 16 + 3 * (256 + 16 * 16 + 16) + 16 * 32 + 32
    layer = 2 * 256 + 2 * 256
    assert model_flop(graph, 5, 7) == 5 * 7 * (3 * layer + 2 * 16 * 32)
    unit = graph.unit_by_name["u1"]
    kept = [unit.values[r] for r in unit.saved if unit.values[r].dtype == "u8"]
    assert [t.nbytes(5, 7) for t in kept] == [5 * 7 * 64]


def test_a_leafs_cost_may_be_a_number_a_row_and_its_output_a_function(tmp_path: Path) -> None:
    declared = "ir.leaf(Odd, flop=512, output=lambda x: x.new_empty(x.shape))"
    graph = graph_of(tmp_path, BUILD.format(leaf=declared))
    assert only(graph, "leaf").attr("flop") == "512*b*s"
    assert model_flop(graph, 1, 8) == 8 * (3 * 1024 + 1024)


def test_a_cost_that_raises_is_the_users(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"flop= of leaf layers\.0\.odd raised"):
        graph_of(tmp_path, BUILD.format(leaf="ir.leaf(Odd, flop=lambda x: x[9])"))


def test_a_router_with_equal_experts_is_recognised(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, EXPERTS.format(top_k="self.top_k = 2"))
    ops = [n.op for u in graph.units for n in u.nodes]
    assert {"dispatch", "combine", "topk", "grouped_matmul", "expert_bias"} <= set(ops)
    assert str(only(graph, "dispatch").outputs[0]) == "bf16[2*b*s, 16]"
    expert = 2 * 16 * 48 + 48 + 16
    assert graph.parameter_count == 32 * 16 + 3 * (32 + 16 * 4 + 4 * expert) + 16 * 32 + 32
    tokens = 5 * 7
    layer = 2 * tokens * 16 * 4 + 2 * 2 * (2 * tokens) * 16 * 48
    assert model_flop(graph, 5, 7) == 3 * layer + 2 * tokens * 16 * 32


def test_a_router_is_what_scores_the_experts(tmp_path: Path) -> None:
    """One of several layers, beside a linear with as many outputs that nothing runs."""
    gate = "nn.Linear(16, 4, bias=False)"
    several = f"nn.Sequential(nn.Linear(16, 40), nn.GELU(), {gate.replace('16', '40')})"
    text = EXPERTS.format(top_k="self.top_k = 2; self.unused = nn.Linear(16, 4)")
    plain, deep = (graph_of(tmp_path, text.replace(gate, to)) for to in (gate, several))
    more = 3 * (2 * 5 * 7) * (16 * 40 + 40 * 4 - 16 * 4)
    assert model_flop(deep, 5, 7) == model_flop(plain, 5, 7) + more


def test_experts_that_differ_are_told_apart(tmp_path: Path) -> None:
    text = EXPERTS.format(top_k="self.top_k = 2; self.experts[2].up = nn.Linear(16, 64)")
    lines = text.splitlines(keepends=True)
    made = next(i for i, line in enumerate(lines) if "self.top_k" in line)
    lines.insert(made + 2, lines.pop(made))  # once the experts are there
    with pytest.raises(PlanError, match="experts that are not alike") as caught:
        graph_of(tmp_path, "".join(lines))
    assert "up.weight is [48, 16] in the first and [64, 16] in number 2" in caught.value.why


@pytest.mark.parametrize(
    ("ending", "why"),
    [
        ("return (out + tokens).view_as(x)", "not a sum of what its experts answer"),
        ("return out.view_as(x), chosen", "returns a tuple"),
        ("return out.view_as(x) + self.shared(x)", "runs shared"),
        ("return out.view_as(x) + 0 * self.shared(x)", "runs shared"),
        ("return (out + self.experts[0](tokens)).view_as(x)", "more than its top 2"),
    ],
)
def test_what_stands_beside_the_experts_is_not_lost(tmp_path: Path, ending: str, why: str) -> None:
    text = EXPERTS.format(top_k="self.top_k = 2; self.shared = nn.Linear(16, 16, device='meta')")
    with pytest.raises(PlanError, match="more than route") as caught:
        graph_of(tmp_path, text.replace("return out.view_as(x)", ending))
    assert why in "\n".join(caught.value.lines())


def test_experts_without_a_top_k_ask_for_a_declaration(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        graph_of(tmp_path, EXPERTS.format(top_k="pass"))
    assert "layers.0.1 routes" in caught.value.what and "ir.leaf(MoE" in caught.value.hints[0]


def test_importing_ir_imports_no_torch() -> None:
    program = "import sys, ir; assert 'torch' not in sys.modules; assert callable(ir.leaf)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_declared_bytes_take_time(tmp_path: Path) -> None:
    """Seconds by hand from the roofline's rates: counts alone, nothing overlaps."""
    from cost_models.compute import load_kernels
    from cost_models.decisions import Decisions, Workload
    from cost_models.estimate import estimate
    from cost_models.hardware import load_hardware

    workload = Workload(global_batch=8, seq_len=512)
    steps = []
    for extra in ("0", "lambda x: x[0] * x[1] * 100_000_000"):
        declared = f"ir.leaf(Odd, flop=512, bytes={extra}, factors='b s !h;b s !h')"
        graph = graph_of(tmp_path, BUILD.format(leaf=declared))
        d = Decisions(micro_batch=8, stages=(3,), recompute=((0, 0),))
        steps.append(estimate(graph, load_hardware("h100x1"), workload, d, {}))
    moved = 3 * (1 + 2) * 8 * 512 * 100_000_000  # three layers, forward and twice in backward
    rate = load_kernels(load_hardware("h100x1").device).bytes_per_s
    assert steps[1].step_time_s - steps[0].step_time_s == pytest.approx(moved / rate, rel=0.01)
