"""What shells complete: a word that is offered is taken by the command it is offered for."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from cost_models.fleet import load_any
from planner import cli, completing, console
from planner.decisions import VOCABULARY, parse_pins
from planner.serving.asked import parse_serve_pins

FILE = "def build():\n    pass\ndef inputs(batch, seq_len):\n    pass\ndef big(n):\n    pass\n"


@pytest.fixture
def bash(monkeypatch, capsys):
    """What bash is answered where these are its words, as it splits them; the last is typed on."""

    def ask(*words):
        monkeypatch.setenv("_PLAN_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(("plan", *words)))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        completing.in_bash(partial(console.run, cli.app()))
        return capsys.readouterr().out.splitlines()

    return ask


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], ["trace"]),
        (["trace", "m", "--glo"], ["--global-batch"]),
        (["trace", "m", "--hardware", "h100-"], ["h100-96gb", "h100-pcie"]),
        (["trace", "m", "--hardware", "h100x32+b300x"],
         [f"h100x32+b300x{n}" for n in completing.COUNTS]),
        (["trace", "m", "--fix", "re"], ["reshard=", "recompute="]),
        (["trace", "m", "--fix", "recompute", "=", "f"], ["full", "full:12"]),
        (["trace", "m", "--fix", "=", "recompute", "=", "f"], ["full", "full:12"]),
        (["trace", "m", "--fix", "zero", "="], ["0", "1", "2", "3"]),
        (["trace", "m", "--task", "serve", "--fix", "weights", "=", "in"],
         ["int8", "int4"]),
        (["trace", "m", "--task", "serve", "--engine", "vl"], ["vllm", "vllm-2025"]),
        (["trace", "m", "--fix", "tp", "=", "4", "--objective", "en"], ["energy"]),
        (["size", "m", "--hardware", "h100,b2"], ["h100,b200"]),
        (["trace", "model.py", ":"], ["build", "big"]),
        (["trace", "model.py", ":", "bi"], ["big"]),
        (["trace", "mod"], []),  # paths are the shell's
        (["trace", "none.py", ":"], []),
        (["export", "--to", "torch"], ["torchrun", "torchtitan", "torchtitan-toml"]),
        (["import", "--from", "de"], ["deepspeed"]),
        (["why", "--not", "schedule", "=", "zb"], ["zbh1", "zbv"]),
        (["diff", "a", "b", "--format", "m"], ["md"]),
        (["hardware", "show", "b20"], [f"b200x{n}" for n in completing.COUNTS]),
    ],
)  # fmt: skip
def test_words(bash, tmp_path, monkeypatch, words, offered):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(FILE)
    assert sorted(bash(*words)) == sorted(offered)


def test_a_model_is_parsed_and_not_run(bash, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(f"{FILE}\nopen('ran', 'w')\n")
    assert bash("trace", "model.py", ":")
    (tmp_path / "model.py").write_text("def (:")
    assert bash("trace", "model.py", ":") == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["why", "--not", "pla"], ["place:norm=", r"place:layers.\{0..3\}.w="]),
        (["why", "--not", "place", ":", "no"], [r"norm=S\(0\)", r"norm=S\(1\)", "norm=R"]),
        (["why", "--not", "place", ":", r"layers.\{0..3\}.w", "=", "R"], ["R"]),
        (["trace", "m", "--base", "none.json", "--fix", "place", ":"], []),
        (["trace", "m", "--task", "serve", "--fix", "place", ":"], []),
    ],
)
def test_places_are_of_the_plan_and_fit_for_a_shell(bash, tmp_path, monkeypatch, words, offered):
    monkeypatch.chdir(tmp_path)
    names = ("norm", "layers.{0..3}.w", "\\$(touch ran)", "a\nb", "")
    Path("plan.json").write_text(json.dumps({"parameters": [{"match": name} for name in names]}))
    assert bash(*words) == offered
    Path("plan.json").write_text('{"parameters": [[]]}')
    assert bash("why", "--not", "place", ":") == []


def test_to_complete_takes_no_heavy_module():
    words = [["export", "--to", ""], ["import", "--from", ""], ["why", "--not", "sch"],
             ["trace", "m", "--task", "serve", "--fix", "w"]]  # fmt: skip
    script = (
        "import os, sys; from functools import partial\n"
        "from planner import cli, completing, console\n"
        f"for words in {words!r}:\n"
        " os.environ.update(_PLAN_COMPLETE='complete_bash', COMP_CWORD=str(len(words)),\n"
        "                   COMP_WORDS='\\n'.join(['plan', *words]))\n"
        " completing.in_bash(partial(console.run, cli.app()))\n"
        "print([name for name in ('numpy', 'torch', 'ortools', 'networkx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    offered = {"pytorch", "megatron", "schedule=1f1b", "weights=bf16"}
    assert offered | {"[]"} <= set(done.stdout.split())


def test_what_is_offered_is_taken():
    for keys, parse in (
        (completing._training_keys(), parse_pins),
        (completing._serving_keys(), parse_serve_pins),
    ):
        for key, (_, values) in keys.items():
            for value in values:
                parse([f"{key}={value}"])
    offered = {key for key, (_, values) in completing._training_keys().items() if values}
    assert offered == {key.name for key in VOCABULARY} - {"kv"}  # that is serving's
    for word in completing.hardware("a100x1"):
        assert word.startswith("a100x")
    load_any("a100x8+" + completing.hardware("a100x8+h100x8")[3].partition("+")[2])


def test_the_script_that_is_shown_completes_in_bash(tmp_path):
    """As users have it: the script from the command itself, the command under its own name."""
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("no bash")
    command = tmp_path / "plan"
    command.write_text(f'#!{shell}\nexec {sys.executable} -m planner.cli "$@"\n')
    command.chmod(0o755)
    asked = (
        'eval "$(_PLAN_COMPLETE=source_bash plan)"\n'
        "COMP_WORDS=(plan trace m --fix cp_kind = r); COMP_CWORD=6; _plan_completion plan\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        [shell, "--norc", "-c", asked], text=True, capture_output=True, check=True,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stdout == "ring\n"
