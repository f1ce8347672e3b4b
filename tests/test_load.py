"""MODEL on the command line: what loads, and what is said when it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ir.capture.load import Source, load, source_key
from ir.errors import PlanError, UsageError

LINEAR = """
import torch
from torch import nn
def build(width: int = 8, bias: bool = True, ratio: float = 0.5, name: str = "a"):
    model = nn.Sequential(nn.Linear(width, width, bias=bias))
    model.got = (width, bias, ratio, name)
    return model
def small():
    return nn.Linear(2, 2)
"""


def write(folder: Path, text: str, name: str = "model.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def fails(spec: str, **args: str) -> PlanError:
    with pytest.raises(PlanError) as caught:
        load(spec, args)
    return caught.value


def loads(folder: Path, text: str, factory: str = "", **args: str) -> Source:
    return load(write(folder, text) + factory, args)


def test_arguments_take_the_factory_s_types(tmp_path: Path) -> None:
    source = loads(tmp_path, LINEAR, width="16", bias="false", ratio="2", name="b")
    assert source.model.got == (16, False, 2.0, "b")
    assert [p.shape for p in source.model.parameters()] == [(16, 16)]
    assert loads(tmp_path, LINEAR, ":small").model.in_features == 2


def test_wrong_arguments_are_usage_errors_that_list_the_right_ones(tmp_path: Path) -> None:
    spec = write(tmp_path, LINEAR)
    unknown = fails(spec, widht="3")
    assert isinstance(unknown, UsageError) and "width, bias, ratio, name" in unknown.why
    assert isinstance(fails(spec, width="wide"), UsageError)
    needs = fails(write(tmp_path, "def build(n: int): return n"))
    assert isinstance(needs, UsageError) and "n" in needs.what and needs.hints


def test_everything_is_on_meta_and_training(tmp_path: Path) -> None:
    text = """
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        table = torch.arange(4.0)
        self.rates = [float(x) for x in table]      # values of real buffers can be read
        self.register_buffer("table", table)
        self.plain, self.nested = table + 1, {"a": [table]}
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        shared = nn.Parameter(torch.ones(4))
        self.c, self.d = nn.Module(), nn.Module()
        self.c.p, self.d.p = shared, shared
        self.huge = nn.Parameter(torch.zeros(2**40))
    def forward(self, x):
        return self.b(self.a(x)) + self.table + self.plain + self.nested["a"][0] + self.c.p
def build():
    return Model().eval()
def inputs(batch, seq_len):
    print("words")
    return torch.zeros(batch, seq_len, 4)
"""
    source = loads(tmp_path, text)
    model = source.model
    assert model.rates == [0.0, 1.0, 2.0, 3.0] and model.training
    tensors = [*model.parameters(), *model.buffers(), model.plain, model.nested["a"][0]]
    assert all(t.is_meta for t in tensors)
    assert model.a.weight is model.b.weight and model.c.p is model.d.p
    torch.export.export(model, source.inputs(2, 8), strict=False)


def test_users_prints_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loads(tmp_path, "print('loading')\n" + LINEAR)
    captured = capsys.readouterr()
    assert captured.out == "" and "loading" in captured.err


@pytest.mark.parametrize(
    ("forward", "names"),
    [("input_ids", ["input_ids"]), ("mask=None, input_ids=None", ["input_ids"]), ("ids", None)],
)
def test_default_inputs_are_token_ids(tmp_path: Path, forward: str, names: list[str]) -> None:
    text = f"""
from torch import nn
class Model(nn.Module):
    max_seq_len = 77
    def forward(self, {forward}): ...
build = Model
"""
    source = loads(tmp_path, text)
    inputs = source.inputs(3, 5)
    assert (list(inputs) if isinstance(inputs, dict) else None) == names
    (ids,) = inputs.values() if isinstance(inputs, dict) else inputs
    assert ids.shape == (3, 5) and ids.dtype == torch.int64 and ids.is_meta
    assert (source.task, source.seq_in_input, source.max_seq_len) == ("causal-lm", True, 77)


def test_inputs_loss_and_targets_of_the_file(tmp_path: Path) -> None:
    text = """
import torch
from torch import nn
def build(): return nn.Conv2d(3, 4, 3)
def inputs(batch, seq_len): return [torch.zeros(batch, 3, 8, 8)]
def targets(batch, seq_len): return torch.zeros(batch, dtype=torch.long)
def loss(outputs, targets): return outputs.sum()
"""
    source = loads(tmp_path, text)
    (images,) = source.inputs(2, 128)
    assert images.shape == (2, 3, 8, 8) and images.is_meta
    assert source.targets is not None and source.targets(2, 128).is_meta
    assert source.loss is not None and source.task == "vision" and not source.seq_in_input


def test_a_file_that_cannot_be_loaded_says_where(tmp_path: Path) -> None:
    assert "no such model file" in fails(str(tmp_path / "gone.py")).what
    assert "config.json" in fails(str(tmp_path)).what
    assert "neither" in fails(write(tmp_path, "", "model.txt")).what
    syntax = fails(write(tmp_path, "x = 1\ndef build(:\n"))
    assert "model.py:2" in syntax.where and "SyntaxError" in syntax.why
    missing = fails(write(tmp_path, "import torch\nimport surely_not_there\n"))
    assert "model.py:2" in missing.where and "surely_not_there" in missing.why


def test_no_build_lists_what_there_is(tmp_path: Path) -> None:
    error = fails(write(tmp_path, "def make_model(): ...\ndef _hidden(): ..."))
    assert "no `build`" in error.what and "make_model" in error.why and "def build" in error.why
    assert error.hints == (f"plan trace {tmp_path / 'model.py'}:make_model",)


def test_a_factory_that_raises_shows_the_user_s_line(tmp_path: Path) -> None:
    text = "def helper(n):\n    return {}[n]\ndef build():\n    return helper('8b')\n"
    error = fails(write(tmp_path, text))
    assert error.where.endswith("model.py:2 in helper") and error.why == "KeyError: '8b'"
    assert "build() raised" in error.what
    assert "returned int" in fails(write(tmp_path, "def build(): return 3")).what
    inside = "import torch\ndef build():\n    return torch.nn.Linear('a', 2)\n"
    assert "model.py:3 in build" in fails(write(tmp_path, inside)).where
    later = LINEAR + "def inputs(batch, seq_len):\n    raise OSError('no disk')\n"
    assert "OSError: no disk" in fails(write(tmp_path, later)).why


def test_the_default_dtype_a_factory_sets_does_not_leak(tmp_path: Path) -> None:
    text = "import torch\ndef build():\n    torch.set_default_dtype(torch.bfloat16)\n"
    source = loads(tmp_path, text + "    return torch.nn.Linear(2, 2)\n")
    assert next(source.model.parameters()).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_configurations_that_cannot_be_read(tmp_path: Path) -> None:
    assert "not JSON" in fails(write(tmp_path, "{", "config.json")).what
    assert "not a Hugging Face" in fails(write(tmp_path, "[1]", "config.json")).what
    deep = '{"model_type": "llama", "a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert "not JSON" in fails(write(tmp_path, deep, "config.json")).what
    long = '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"
    assert "not JSON" in fails(write(tmp_path, long, "config.json")).what
    unknown = json.dumps({"model_type": "lama", "architectures": ["NoSuchModel"]})
    error = fails(write(tmp_path, unknown, "config.json"))
    assert "lama" in error.what and "llama" in error.why


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"text_config": {"n_layer": 10_001}}, "n_layer is 10001"),
        ({"depths": [2, 10**12]}, "depths is"),
        ({"num_local_experts": 10**4000}, "num_local_experts is too large"),
        ({"num_labels": 10**7}, "num_labels is"),
        ({"a": json.loads("[" * 40 + "]" * 40)}, "nested too deeply"),
        ({"vocab_size": 10**15, "num_hidden_layers": 1}, "8.2e+18 parameters"),
    ],
)
def test_a_configuration_of_no_model_is_refused_as_it_is_read(tmp_path, said, words) -> None:
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **said}
    assert words in fails(write(tmp_path, json.dumps(raw), "config.json")).what
    if "num_hidden_layers" in said:
        path = write(tmp_path, json.dumps({**raw, "num_hidden_layers": 2}), "config.json")
        with pytest.raises(PlanError, match="num_hidden_layers is 99999"):
            load(path, {"num_hidden_layers": "99999"})


def test_the_key_follows_what_the_graph_depends_on(tmp_path: Path) -> None:
    spec = write(tmp_path, "import part\nfrom sub.inner import x\n" + LINEAR)
    write(tmp_path, "n = 1", "part.py")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "from . import deep", "inner.py")
    write(tmp_path / "sub", "x = 1", "deep.py")
    keys = [source_key(spec, {}), source_key(spec, {"width": "3"}), source_key(spec + ":small", {})]
    assert source_key(spec, {}) == keys[0]
    for name, folder in (("part.py", tmp_path), ("deep.py", tmp_path / "sub")):
        write(folder, "changed = 2", name)
        keys.append(source_key(spec, {}))
    write(tmp_path, "# other\n" + Path(spec).read_text())
    keys.append(source_key(spec, {}))
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)


def test_the_key_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path, json.dumps({"model_type": "llama"}), "config.json")
    specs = [str(tmp_path), write(tmp_path, LINEAR)]
    code = (
        "import sys\nfrom ir.capture.load import source_key\n"
        f"print([source_key(spec, {{}}) for spec in {specs!r}])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)


def test_a_hugging_face_model_in_a_file_is_adapted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text = """
from transformers import LlamaConfig, LlamaForCausalLM
def build(layers: int = 2):
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=layers, vocab_size=128))
"""
    source = loads(tmp_path, text, layers="3")
    with source.tracing():
        program = torch.export.export(source.model, (), source.inputs(2, 64), strict=False)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("meshwright.attention.default") == 3
    assert source.max_seq_len == source.model.config.max_position_embeddings


def test_classes_and_exits(tmp_path: Path) -> None:
    text = "import sys\nfrom torch import nn\nclass Model(nn.Linear):\n    "
    text += "def __init__(self, n: int = 2, gain: 'float | None' = None):\n        "
    text += "super().__init__(n, n)\n        self.gain = gain\n"
    spec = write(tmp_path, text) + ":Model"
    assert (load(spec, {"gain": "2"}).model.gain, load(spec, {"gain": "none"}).model.gain) == (
        2.0,
        None,
    )
    assert "SystemExit" in fails(write(tmp_path, "import sys\nsys.exit(3)\n")).why


def test_a_file_of_a_package_is_imported_by_its_name(tmp_path, monkeypatch):
    """Relative imports work, from any folder; what they read is in the key; a changed file is read
    anew; a dotted name is answered by its file."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "some_pkg" / "sub"
    folder.mkdir(parents=True)
    (tmp_path / "some_pkg" / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("from .blocks import build\n")
    (folder / "conf.py").write_text("D = 8\n")
    (tmp_path / "some_pkg" / "top.py").write_text("WORDS = 100\n")
    (folder / "blocks.py").write_text(
        "from torch import nn\nfrom .conf import D\nfrom ..top import WORDS\n"
        "def build():\n    return nn.Sequential(nn.Embedding(WORDS, D), nn.Linear(D, WORDS))\n"
    )
    keys = set()
    for spec in ("some_pkg/sub/blocks.py", "some_pkg/sub/__init__.py:build"):
        made = load(spec, {})
        keys.add(made.key)
        assert [tuple(p.shape) for p in made.model.parameters()] == [(100, 8), (100, 8), (100,)]
    assert made.name == "sub"
    for file, text, shape in (("conf.py", "D = 16\n", (100, 16)), ("../top.py", "WORDS = 50\n",
                                                                 (50, 16))):  # fmt: skip
        (folder / file).write_text(text)
        made = load("some_pkg/sub/blocks.py", {})
        assert made.key not in keys and next(made.model.parameters()).shape == shape
        keys.add(made.key)
    with pytest.raises(PlanError) as fault:
        load("some_pkg.sub:build", {})
    assert "plan trace some_pkg/sub/__init__.py:build" in fault.value.hints
