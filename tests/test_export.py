"""`plan export --to pytorch`: what is written, and that it computes what the model computes."""

import sys
from pathlib import Path

import pytest
from toy_plan import toy_plan

import planner
from ir.errors import PlanError, UsageError
from planner.cli import main
from planner.export import export
from planner.exporting import write_files

EXAMPLES = Path(__file__).parents[1] / "examples"
GOLDEN = Path(__file__).parent / "golden"
SAMPLES, LENGTH = 8, 32


@pytest.fixture
def gpt(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import gpt

    return gpt


def planned(gpt, folder, gpus, *fix):
    plan = planner.trace(
        gpt.build(size="tiny"), gpt.inputs, loss=gpt.loss, hardware=f"h100x{gpus}", seq_len=LENGTH,
        global_batch=SAMPLES, precision="fp32", engine="native", fix=("pp=1", "cp=1", *fix),
    )  # fmt: skip
    path = folder / "plan.json"
    plan.save(str(path))
    files = export(planner.load(path), "pytorch", str(path)).files
    return path, write_files(folder, files)[0]


def test_a_wrapper_is_the_golden_file(update_golden):
    ((name, text),) = export(toy_plan(), "pytorch", "plans/plan.json").files
    assert name == f"parallel_{toy_plan().graph.name}.py"
    update_golden(GOLDEN / "wrapper.txt", text)
    compile(text, name, "exec")


@pytest.mark.parametrize(
    "fix",
    [("zero=3",), ("zero=2", "recompute=full:1+selective:1"), ("zero=1",), ("zero=0",)],
    ids=" ".join,
)
def test_torch_alone_computes_what_the_model_does(world, gpt, tmp_path, fix):
    _, wrapper = planned(gpt, tmp_path, 2, "tp=1", "micro_batch=2", *fix)
    assert "planner" not in wrapper.read_text()  # public APIs suffice
    from runtime_cases_export import torch_alone

    for ours, theirs, error in world.run(2, torch_alone, wrapper, SAMPLES, LENGTH, 2):
        assert ours == pytest.approx(theirs, rel=1e-6) and error <= 1e-5


def test_the_runtime_is_called_where_torch_ends(world, gpt, tmp_path):
    plan, wrapper = planned(gpt, tmp_path, 2, "tp=2", "dp=1")
    assert "from planner.runtime" in wrapper.read_text()
    from runtime_cases_export import with_runtime

    for ours, theirs, error in world.run(2, with_runtime, wrapper, plan, SAMPLES, LENGTH):
        assert ours == pytest.approx(theirs, rel=1e-6) and error <= 1e-5


def test_what_the_user_wrote_is_left_alone(tmp_path):
    files = export(toy_plan(), "pytorch", "plan.json").files
    (path,) = write_files(tmp_path, files)
    write_files(tmp_path, files)  # ours is written over
    path.write_text("mine")
    with pytest.raises(PlanError, match="left as it is"):
        write_files(tmp_path, files)
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_an_unknown_target_names_those_there_are(tmp_path, capsys):
    with pytest.raises(UsageError, match="--to pytorh"):
        export(toy_plan(), "pytorh", "plan.json")
    toy_plan().save(str(tmp_path / "plan.json"))
    with pytest.raises(SystemExit) as caught:
        main(["export", str(tmp_path / "plan.json"), "--to", "pytorh"])
    assert caught.value.code == 64 and "hint: --to pytorch" in capsys.readouterr().err


def test_export_imports_no_torch():
    import subprocess

    code = "import sys, planner.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
