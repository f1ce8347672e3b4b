"""What commands may write over and read: nothing that is not theirs, nothing that never ends."""

import errno
import os
import threading
from pathlib import Path

import pytest
from reports import served
from tiny_models import EXAMPLES
from toy_plan import toy_graph, toy_plan

from cost_models import constants_table
from ir.errors import PlanError, UsageError
from ir.text import format_graph
from planner.hook import plans_of
from planner.names import gpus_hold
from planner.plan import load, load_cluster, write_whole
from planner.plan_text import to_text

CONFIG = '{"model_type": "llama", "note": "a plan/1 of ours"}'


@pytest.fixture
def inputs(tmp_path):
    """A user's files, by name; all their texts."""
    texts = {"model.py": "def build(): ...\n", "config.json": CONFIG, "mega.sh": "--lr 1\n",
             "ds.json": '{"zero_optimization": {"stage": 2}}', "notes.graph": "mine\n",
             "hw.toml": "[device]\n", "prices.toml": "[h100]\n"}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "link.json").symlink_to("config.json")
    (tmp_path / "sub").mkdir()
    return texts


@pytest.mark.parametrize("target", [
    "model.py", "config.json", "./sub/../config.json", "link.json", "ds.json", "hw.toml",
    "prices.toml", "notes.json", "new.graph", "a" * 300,
])  # fmt: skip
@pytest.mark.parametrize("task", ["train", "serve", "import"])
def test_a_plan_is_not_written_over_what_is_none(plan, tmp_path, inputs, monkeypatch, task, target):
    """Refused before the model is so much as read; every file stays as it was. A name that the
    system does not take is a fault of input."""
    for name in ("objectives.capture", "capturing.capture", "capturing.begun"):
        monkeypatch.setattr(f"planner.{name}", None)
    command = {"train": ("trace", "config.json"), "serve": ("trace", "model.py", "--task", "serve"),
               "import": ("import", "mega.sh", "--from", "megatron", "--model", "model.py")}
    code, out, err = plan(*command[task], "--hardware", "h100x8", "-o", target)
    assert code == (1 if len(target) > 255 else 64), err
    assert "-o" in err and not out
    for name, text in inputs.items():
        assert (tmp_path / name).read_text() == text
    assert (tmp_path / "link.json").is_symlink()


@pytest.mark.parametrize("earlier", ["plan", "indented", "empty", "merged"])
def test_a_plan_is_written_over_an_earlier_one(plan, tmp_path, earlier):
    """However it is laid out, and though a merge left marks. (The next fault is the model's.)"""
    toy_plan().save(str(tmp_path / "plan.json"))
    text, graph = (tmp_path / "plan.json").read_text(), format_graph(toy_graph())
    ours, theirs = "<<<<<<< ours\n", "=======\n>>>>>>> theirs\n"
    (tmp_path / "plan.json").write_text({
        "plan": text, "empty": "", "indented": text.replace('{\n"schema": ', '{ "schema":'),
        "merged": text.replace("{\n", "{\n" + ours, 1) + theirs}[earlier])  # fmt: skip
    (tmp_path / "plan.graph").write_text(ours + graph + theirs if earlier == "merged" else graph)
    code, _, err = plan("trace", "absent.py", "--hardware", "h100x8")
    assert (code, "no such model file" in err) == (1, True), err


def test_python_writes_over_its_own_alone(inputs, tmp_path):
    """As the command line does; `overwrite=True` is for what may go."""
    for made in (toy_plan(), served().plan):
        for name in ("model.py", "config.json", "notes.json", "link.json"):
            with pytest.raises(UsageError, match="is there, and is no") as found:
                made.save(str(tmp_path / name))
            assert found.value.hints[-1] == "overwrite=True if it may go"
            assert "-o " not in "".join(found.value.hints)
        for name, text in inputs.items():
            assert (tmp_path / name).read_text() == text
        for _ in range(2):
            made.save(str(tmp_path / "plan.json"))
        made.save(str(tmp_path / "notes.json"), embed=True)  # nothing is written beside
        (tmp_path / "notes.json").unlink()
    toy_plan().save(str(tmp_path / "notes.json"), overwrite=True)
    assert (tmp_path / "notes.graph").read_text() == format_graph(toy_graph())
    with pytest.raises(UsageError, match="there is no folder"):
        toy_plan().save(str(tmp_path / "nowhere" / "plan.json"))


def test_a_link_stays_one_and_leads_to_the_new_text(tmp_path):
    (tmp_path / "real").mkdir()
    for name, old in (("there.json", "old"), ("absent.json", None)):
        if old:
            (tmp_path / "real" / name).write_text(old)
        (tmp_path / name).symlink_to(f"real/{name}")
        write_whole(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "real" / name).read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 3 and len(list((tmp_path / "real").iterdir())) == 2


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    """With the graph inside: nothing is written beside it."""
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    toy_plan().save(str(pipe))
    reader.join(10)
    assert pipe.is_fifo() and [p.name for p in tmp_path.iterdir()] == ["pipe.json"]
    assert read == [to_text(toy_plan(), embed=True)]


@pytest.mark.parametrize("command", [
    ("check", "pipe.json"), ("show", "pipe.json"), ("check", "toy.json"),
    ("trace", str(EXAMPLES / "llama.py"), "--hardware", "pipe.toml"),
    ("import", "pipe.json", "--from", "deepspeed", "--model", "m.py", "--hardware", "h100x8"),
])  # fmt: skip
def test_a_pipe_without_a_writer_is_not_waited_for(plan, tmp_path, command):
    for name in ("pipe.json", "pipe.toml", "toy.graph"):
        os.mkfifo(tmp_path / name)
    toy_plan().save(str(tmp_path / "whole.json"))
    (tmp_path / "whole.json").rename(tmp_path / "toy.json")
    code, _, err = plan(*command)
    assert code in (1, 64) and "it is no file" in err
    assert plans_of(["pipe.json"]) == []


def test_a_plan_that_a_shell_opened_is_read(tmp_path):
    """As of `plan show <(git show HEAD:plan.json)`: its writer is there."""
    toy_plan().save(str(tmp_path / "plan.json"), embed=True)
    reads, writes = os.pipe()
    with os.fdopen(writes, "wb") as file:
        file.write((tmp_path / "plan.json").read_bytes())
    try:
        assert load(f"/dev/fd/{reads}") == load(str(tmp_path / "plan.json"))
    finally:
        os.close(reads)


def test_hardware_of_a_plan_is_confined_though_a_link_leads_out(tmp_path, monkeypatch):
    """Beside the plan or here, or below; where a link leads is what counts."""
    text = "secret = 1\n"
    for place in ("here", "plans/below"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "secret.toml").write_text(text)
    (tmp_path / "plans" / "out.toml").symlink_to("../secret.toml")
    (tmp_path / "here" / "out2.toml").symlink_to(tmp_path / "secret.toml")
    (tmp_path / "plans" / "below" / "own.toml").write_text(text)
    (tmp_path / "plans" / "in.toml").symlink_to("below/own.toml")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "plans" / "mix.toml").write_text('parts = ["h100x8", "../secret.toml"]')
    (tmp_path / "plans" / "own.toml").write_text('parts = ["h100x8", "in.toml"]')
    for name in ("out.toml", "out2.toml", "h100x8+out.toml", "mix.toml"):
        with pytest.raises(PlanError, match="outside of where the plan may read"):
            load_cluster(toy_plan(hardware=name), tmp_path / "plans")
    for name in ("in.toml", "below/own.toml", "own.toml"):  # read, and found to be no hardware
        with pytest.raises(PlanError, match="cannot be read"):
            load_cluster(toy_plan(hardware=name), tmp_path / "plans")


def test_constants_of_a_hardware_file_are_a_name_not_a_path(tmp_path):
    (tmp_path / "mine.toml").write_text("secret = 1\n")
    away = os.path.relpath(tmp_path / "mine", Path(constants_table.__file__).parent / "constants")
    for name in (away, str(tmp_path / "mine")):
        with pytest.raises(UsageError, match="no constants named"):
            constants_table.load_constants(name)


@pytest.mark.parametrize(("command", "words"), [
    (("trace", str(EXAMPLES / "llama.py"), "--hardware", "h100x1", "-o", "x.json/"),
     ("-o x.json/ names a folder", "hint: -o x.json")),
    (("trace", str(EXAMPLES / "llama.py"), "--hardware", "h100x1", "-o", ""),
     ("is no file's name", "hint: -o plan.json")),
    (("report", "toy.json", "-o", "page.html", "--trace", "notes.txt"),
     ("notes.txt is there", "hint: --trace step.json")),
])  # fmt: skip
def test_a_target_that_is_none_is_told_what_would_do(plan, tmp_path, command, words):
    (tmp_path / "notes.txt").write_text("mine\n")
    code, _, err = plan(*command)
    assert code == 64 and all(word in err for word in words)
    assert not (tmp_path / "x.json").exists() and (tmp_path / "notes.txt").read_text() == "mine\n"


def test_one_gpu_is_told_as_one():
    assert gpus_hold(1, 64) == "1 of 64 GPUs holds it" and gpus_hold(8, 64).endswith("GPUs hold it")


def test_a_folder_that_takes_nothing_is_told_by_the_name_that_was_asked_for(tmp_path, monkeypatch):
    def refused(*_args, **_words):
        raise OSError(errno.EROFS, "Read-only file system", ".plan.json.1.tmp")

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(PlanError, match=r"cannot write .*/plan\.json") as fault:
        write_whole(tmp_path / "plan.json", "text")
    assert fault.value.why == "Read-only file system"
