"""Capture: folding changes nothing, sizes are recovered, counts are exact, text reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir.capture import capture_graph, export, fold, hf
from ir.capture.index_probe import subscripts_by
from ir.capture.load import Source, load
from ir.capture.sizes import recover
from ir.check import check_graph, check_sizes
from ir.errors import PlanError
from ir.graph import Graph
from ir.text import format_graph, graph_hash, parse_graph

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CONFIGS = sorted((ROOT.parent / "shared" / "data" / "model_configs").glob("*.json"))
# model type: changes to its default configuration. Few layers, but of every kind it has.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 3},
    "bloom": {"n_layer": 3},
    "falcon": {"num_hidden_layers": 3},
    "opt": {"num_hidden_layers": 3},
    "phi3": {"num_hidden_layers": 3},
    "gemma2": {"num_hidden_layers": 4},
    "gemma3_text": {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention",
                                                            "sliding_attention"]},
    "cohere2": {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention",
                                                        "sliding_attention"]},
    "mixtral": {"num_hidden_layers": 3},
    "granitemoe": {"num_hidden_layers": 3},
    "deepseek_v3": {"num_hidden_layers": 3, "first_k_dense_replace": 1},
    "llama4_text": {"num_hidden_layers": 4},
    "mamba": {"num_hidden_layers": 3},
    "mamba2": {"num_hidden_layers": 3},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "qwen3_next": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention",
                                                           "linear_attention"]},
    "bert": {"num_hidden_layers": 3, "architectures": ["BertLMHeadModel"]},
    "t5": {"num_layers": 3, "architectures": ["T5ForConditionalGeneration"]},
    "vit": {"num_hidden_layers": 3, "architectures": ["ViTForImageClassification"]},
}


def layer_classes(graph: Graph) -> set[Any]:
    return {node.attr("unit") for node, path, _ in graph.calls() if path in graph.layers}


def family(kind: str) -> Source:
    return hf.source({"model_type": kind, **FAMILIES[kind]}, name=kind, args={}, key="", where=kind)


def parameters(source: Source) -> int:
    return sum(p.numel() for p in source.model.parameters())  # each tensor once


def folds(make: Any) -> Graph:
    """The folded graph, which must be the full trace's, legal, and readable from its text."""
    source = make()
    graph = capture_graph(source)
    text = format_graph(graph)
    assert graph_hash(text) == graph_hash(format_graph(capture_graph(make(), fold=False)))
    assert format_graph(parse_graph(text)) == text
    assert graph.parameter_count == parameters(source)
    check_graph(graph)
    return graph


# --- folding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt", "moe", "dit"])
def test_examples_fold_to_the_full_trace(name: str) -> None:
    graph = folds(lambda: load(str(EXAMPLES / f"{name}.py"), {"size": "tiny", "n_layers": "4"}))
    assert len(graph.layers) == 4
    # the first MoE layer is given a total that has no gradient yet, the last one divides it
    assert len(layer_classes(graph)) == (3 if name == "moe" else 1)


def test_nested_stages_fold() -> None:
    graph = folds(lambda: load(str(EXAMPLES / "resnet.py"), {"size": "50"}))
    found = [node.attr("unit") for node, path, _ in graph.calls() if path in graph.layers]
    # stages of 3, 4, 6, 3 blocks: the first of each changes width or stride; the last one pools
    assert [found.count(u) for u in dict.fromkeys(found)] == [1, 2, 1, 3, 1, 5, 1, 1, 1]


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_families_fold_to_the_full_trace(kind: str) -> None:
    folds(lambda: family(kind))


class Layer(nn.Module):
    """A layer told where it stands, and something else, as each case wants."""

    def __init__(self, index: int, forward: Any, scale: float = 1.0):
        super().__init__()
        self.index, self.scale, self.rule = index, scale, forward
        self.linear = nn.Linear(8, 8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, self.linear(x))


class Subscripts(Layer):
    flags = (True, False, True, False)

    def forward(self, x: Tensor) -> Tensor:
        here = self.index
        return self.linear(x).relu() if self.flags[here] else self.linear(x)


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack(make: Any) -> Source:
    with torch.device("meta"):
        model = Stack([make(i) for i in range(4)])
    base = load(str(EXAMPLES / "llama.py"), {"size": "tiny"})
    from dataclasses import replace

    return replace(
        base, model=model, name="stack", loss=lambda out, _: out.float().sum(),
        inputs=lambda b, s: {"x": torch.zeros(b, s, 8, device="meta")}, max_seq_len=None,
    )  # fmt: skip


def two(i: int) -> Any:
    return (lambda self, x: x.relu()) if i % 2 else (lambda self, x: x.sigmoid())


def default(i: int) -> Any:
    return lambda self, x, n=i % 2: x.relu() if n else x


NEGATIVES = {
    "branches on its index": lambda i: Layer(i, lambda m, x: x.relu() if m.index % 2 else x),
    "compares its index": lambda i: Layer(i, lambda m, x: x.relu() if m.index == 2 else x),
    "subscripts by its index": lambda i: Subscripts(i, None),
    "another lambda": lambda i: Layer(i, two(i)),
    "another default": lambda i: Layer(i, default(i)),
    "another attribute": lambda i: Layer(0, lambda m, x: x.relu() if m.scale > 1 else x, i),
    "another activation": lambda i: _with(Layer(i, lambda m, x: m.act(x)), i),
}


def _with(layer: Layer, i: int) -> Layer:
    layer.act = nn.ReLU() if i % 2 else nn.SiLU()
    return layer


@pytest.mark.parametrize("case", list(NEGATIVES))
def test_layers_that_differ_are_not_merged(case: str) -> None:
    graph = folds(lambda: stack(NEGATIVES[case]))
    assert len(layer_classes(graph)) == 2


def test_layers_told_their_index_without_use_are_one_class() -> None:
    graph = folds(lambda: stack(lambda i: Layer(i, lambda m, x: x.relu())))
    assert len(layer_classes(graph)) == 1 and len(graph.layers) == 4


def test_a_scale_of_its_own_is_another_class_of_the_same_cost() -> None:
    layers = [Layer(0, None, scale) for scale in (0.5, 0.7)]
    assert len({fold.signature(layer, set()) for layer in layers}) == 2
    folds(lambda: stack(lambda i: Layer(i, lambda m, x: x * m.scale, 0.5 + i)))


def test_a_subscript_by_the_index_is_found_in_byte_code() -> None:
    assert subscripts_by(Subscripts(0, None), "index")
    assert not subscripts_by(Layer(0, None), "index")


def test_a_layer_that_repeats_is_not_run_as_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node is all that there is of it: an operator costs milliseconds, a layer each."""
    run: list[str] = []
    monkeypatch.setattr(fold.call, "_abstract_fn", lambda *args: run.append(args[2]))
    graph = capture_graph(stack(lambda i: Layer(i, lambda m, x: x.relu())))
    assert len(graph.layers) == 4 and not run


def test_results_of_a_layer_that_repeats_are_written_over_as_the_first_ones_are() -> None:
    def make() -> Source:
        source = stack(lambda i: Layer(i, lambda m, x: x.relu()))
        m = source.model
        m.forward = lambda x: m.head(_over(m.layers, m.embed(x)))  # type: ignore[method-assign]
        return source

    assert len(layer_classes(folds(make))) == 1


def _over(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
        x += x.sum(dim=1, keepdim=True)
    return x


def test_alike_layers_are_told_apart_once_for_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    found = fold.signature

    def counted(*args: Any) -> str:
        asked.append(len(args))
        return found(*args)

    monkeypatch.setattr(fold, "signature", counted)
    capture_graph(stack(lambda i: Layer(i, lambda m, x: x.relu())))
    assert asked.count(2) == 6  # four layers and the ends; others are of modules below


def test_the_model_is_given_back_as_it_was() -> None:
    source = stack(NEGATIVES["branches on its index"])
    capture_graph(source)
    layer = source.model.get_submodule("layers.1")
    assert "forward" not in vars(layer) and type(layer.index) is int


# --- what is written down ---------------------------------------------------------------------


def test_sizes_are_monomials_of_batch_and_sequence() -> None:
    sizes = ((2, 128), (3, 256))

    def size(value: Any) -> str:
        return str(recover(value(*sizes[0]), value(*sizes[1]), sizes, ""))

    assert size(lambda b, s: b) == "b"
    assert size(lambda b, s: s) == "s"
    assert size(lambda b, s: 2 * b * s) == "2*b*s"
    assert size(lambda b, s: s + 3) == "s+3"
    assert size(lambda b, s: s * s) == "s*s"
    assert size(lambda b, s: b * s // 64) == "b*s/64"
    assert size(lambda b, s: 4096) == "4096"
    with pytest.raises(PlanError, match="a size is 29 at batch 2"):
        recover(29, 17, sizes, "model.py:3")


def test_moe_sizes() -> None:
    graph = capture_graph(load(str(EXAMPLES / "moe.py"), {"size": "tiny", "n_layers": "1"}))
    layer = next(unit for _, path, unit in graph.calls() if path == "layers.0")
    dispatch = next(node for node in layer.nodes if node.op == "dispatch")
    assert str(dispatch.outputs[0]) == "bf16[2*b*s, 64]"
    assert [node.op for node in layer.nodes].count("grouped_matmul") == 3
    assert any(node.op == "combine" for node in layer.nodes)


def test_a_causal_convolution_sees_padding() -> None:
    source = family("mamba")
    graph = capture_graph(source)
    ops = {node.op for unit in graph.units for node in unit.nodes}
    assert {"scan", "causal_conv1d"} <= ops


def test_sources_are_the_users_lines() -> None:
    graph = capture_graph(load(str(EXAMPLES / "gpt.py"), {"size": "tiny"}))
    lines = (EXAMPLES / "gpt.py").read_text().splitlines()
    head = next(node for node, path, _ in graph.calls() if path == "lm_head")
    file, _, line = head.source.partition(":")
    assert file == "gpt.py" and "self.lm_head(" in lines[int(line) - 1]
    for unit in (*graph.units, graph.root):
        assert {n.source.partition(":")[0] for n in unit.nodes} <= {"gpt.py", ""}


def test_the_lines_that_torch_notes_are_those_it_reads_itself() -> None:
    def noted() -> list[str | None]:
        given = (torch.zeros(2, 8, device="meta"),)
        program = torch.export.export(two_layers, given, strict=False)
        return [node.meta.get("stack_trace") for node in program.graph.nodes]

    with torch.device("meta"):
        two_layers = nn.Sequential(Layer(0, lambda m, x: x.relu()), nn.Linear(8, 8))
    theirs = noted()
    with export._lines_unread():
        assert noted() == theirs
    assert any("self.rule(self, self.linear(x))" in lines for lines in theirs if lines)


def test_the_source_of_a_graph_is_written_where_it_is_run() -> None:
    theirs = torch.fx.GraphModule.recompile
    with export._source_unwritten():
        graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        assert "_code" not in vars(graph)
        x = torch.ones(4, 2)
        assert torch.equal(graph(x), F.linear(x, graph.get_parameter("0.weight"),
                                              graph.get_parameter("0.bias")).relu())  # fmt: skip
        assert "_code" in vars(graph)
    assert torch.fx.GraphModule.recompile is theirs


def test_damaged_text_says_where() -> None:
    text = format_graph(capture_graph(load(str(EXAMPLES / "gpt.py"), {"size": "tiny"})))
    with pytest.raises(PlanError, match="damaged"):
        parse_graph(text.replace("  return", "  retrun", 1))
    with pytest.raises(PlanError, match="version"):
        parse_graph(text.replace("graph/1", "graph/9", 1))


TEXT = """graph/1 "m"
max_seq_len None seq_in_input True
unit u0
  input in0 f32[b, s, 64] diff
  parameter w f32[64, 64]
  f32[b, s, 64] = mm matmul(in0, w)
  f32[b, 64, s] = permute permute(mm) {dims=[0, 2, 1]}
  return permute
  saved
  saved_fused
  saved_selective
unit root
  input x f32[b, s, 64] diff
  f32[b, 64, s] = u0 call(x) {path="a", unit="u0"}
  return u0
  saved
  saved_fused
  saved_selective
"""


def test_that_text_is_a_graph() -> None:
    check_graph(parse_graph(TEXT))


@pytest.mark.parametrize(
    ("was", "put", "why"),
    [
        ("{dims", "{dimute {dims", "not the key"),
        ("{dims=[0, 2, 1]}", "{dims=" + "[" * 50_000 + "}", "brackets"),
        ("{dims=[0, 2, 1]}", '{dims=[0, "2"]}', "not an attribute"),
        ("{dims=[0, 2, 1]}", "{dims=[0, 9223372036854775808]}", "not an attribute"),
        ("64, 64]", "64, -64]", "a dimension of -64"),
        ("64, 64]", f"64, {'9' * 400}]", "not a size"),
        ("64, 64]", f"64, {2**48}]", "elements"),
        ("64, 64]", "64, b*b*b*s*s]", "a power"),
        ("64, 64]", "64, b/0]", "not a size"),
        ("64, 64]", "64, b]", "a parameter is as large"),
        ("64, 64]", "64, 064]", "not as a graph is written"),
        ("  saved_fused", "  saved_fused ", "not as a graph is written"),
        ('"m"', "1.5", "not a word"),
        ("input True", "input True\nnote {}", "at line 3"),
    ],
)
def test_a_line_that_no_graph_has_is_refused(was: str, put: str, why: str) -> None:
    """Each is read as a graph has it or refused with its line: nothing that a rule trips over."""
    assert was in TEXT
    with pytest.raises(PlanError, match="damaged") as found:
        parse_graph(TEXT.replace(was, put, 1))
    said = "\n".join(found.value.lines())
    assert why in said and "at line" in said


@pytest.mark.parametrize("size", ["s-8", "s/16", "b/2"])
def test_a_sequence_of_which_nothing_is_left_is_refused(size: str) -> None:
    graph = parse_graph(TEXT.replace("b, s,", f"b, {size},").replace("64, s]", f"64, {size}]"))
    check_graph(graph)
    check_sizes(graph, 32, 32)
    with pytest.raises(PlanError, match=f"and {size} is 0"):
        check_sizes(graph, 1, 8)


def test_sums_over_nothing_and_orders_that_are_none_are_not_legal() -> None:
    """A size of 0 is one that graphs have, where nothing is computed of it."""
    for was, put, why in (
        ("64, 64]", "64, 0]", "without elements"),
        ("{dims=[0, 2, 1]}", "{dims=[0, 2, 2]}", "no order"),
        (" {dims=[0, 2, 1]}", "", "no order"),
    ):
        with pytest.raises(PlanError, match="not legal") as found:
            check_graph(parse_graph(TEXT.replace(was, put)))
        assert why in found.value.why


# --- exact counts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "published"),
    [("8b", 8_030_261_248), ("70b", 70_553_706_496), ("405b", 405_853_388_800)],
)
def test_llama_has_its_published_parameters(size: str, published: int) -> None:
    graph = capture_graph(load(str(EXAMPLES / "llama.py"), {"size": size}))
    assert graph.parameter_count == published
    ends = sum(u.parameter_count for _, path, u in graph.calls() if path not in graph.layers)
    assert graph.unit_by_name["u1"].parameter_count * len(graph.layers) == published - ends


def llama_like(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **changes}


MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000,
}  # fmt: skip
LLAMA_8B = llama_like(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32,
    num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "published"), [(LLAMA_8B, 8_030_261_248), (MIXTRAL, 46_702_792_704)]
)
def test_configurations_have_their_published_parameters(
    config: dict[str, Any], published: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = load(str(tmp_path), {})
    graph = capture_graph(source)
    assert graph.parameter_count == published == parameters(source)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_published_configurations_plan_at_full_depth(config: Path) -> None:
    source = load(str(config), {})
    graph = capture_graph(source)
    assert graph.parameter_count == parameters(source)
    assert len(graph.layers) == source.model.config.get_text_config().num_hidden_layers
    assert len(layer_classes(graph)) <= 3
    check_graph(graph)


def test_tied_weights_count_once() -> None:
    source = load(str(EXAMPLES / "gpt.py"), {"size": "124m"})
    graph = capture_graph(source)
    assert graph.parameter_count == 124_439_808
    assert graph.tied == (("lm_head.weight", "wte.weight"),)
