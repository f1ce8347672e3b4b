"""A model traced in other processes: the same graph and faults, and no process left."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from cost_models.fleet import load_any
from ir.errors import PlanError, UsageError
from ir.text import format_graph
from planner import capturing
from planner.capturing import Clock, Fault, begun, capture
from planner.options import TraceOptions
from planner.twin import Later, forks

pytestmark = pytest.mark.skipif(not forks(), reason="a process is forked, and has a core")

MODEL = """\
import os
import torch
from torch import nn

print("read")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


build = Model


def inputs(batch, seq_len):
    return {"x": torch.zeros(batch, seq_len, 8)}
"""


def ended(pid: int) -> bool:
    """Whether a process is gone, soon."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_an_answer_comes_from_a_process_that_then_ends():
    later = Later(os.getpid)
    there = later.answer()
    assert there != os.getpid()
    later.end()
    with pytest.raises(ProcessLookupError):
        os.kill(there, 0)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted() -> None:
    """As at a terminal: what runs in the background of a script may ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("does", "ended"), [
    (partial(int, "no number"), None), (partial(sys.exit, 3), None), (killed, -signal.SIGKILL),
    (partial(os._exit, 3), 3), (interrupted, -signal.SIGINT),
])  # fmt: skip
def test_what_fails_there_has_no_answer(does, ended, capfd):
    later = Later(does)
    assert later.answer() is None
    assert later.ended == ended
    later.end()
    assert capfd.readouterr() == ("", "")


def test_what_it_registers_for_its_end_is_run_there_and_what_was_before_is_not(tmp_path):
    code = f"""if 1:
    import atexit, os
    from pathlib import Path
    from planner.twin import Later
    folder = Path({str(tmp_path)!r})
    note = lambda name: (folder / name).write_text(str(os.getpid()))
    atexit.register(note, "first")
    later = Later(lambda: atexit.register(note, "second") and os.getpid())
    there = later.answer()
    later.end()
    assert [p.name for p in folder.iterdir()] == ["second"]
    assert (folder / "second").read_text() == str(there)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_ends_with_the_first_process_however_that_ends():
    code = """if 1:
    import os, time
    from planner.twin import Later
    later = Later(lambda: time.sleep(60))
    print(later._pid, flush=True)
    os.kill(os.getpid(), 9)
    """
    first = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert first.returncode == -signal.SIGKILL
    assert ended(int(first.stdout))


def asked(tmp_path, text=MODEL) -> TraceOptions:
    path = tmp_path / "model.py"
    path.write_text(text)
    return TraceOptions(model=str(path), hardware="h100x8")


@pytest.fixture
def cold(tmp_path, monkeypatch):
    """As a command begins: nothing is cached, and torch, which these tests have, not asked about.
    A function that says whether this process traced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(capturing, "_alone", lambda: True)
    here, traced = [], capturing._traced

    def noted(options, precision):
        here.append(options)
        return traced(options, precision)

    monkeypatch.setattr(capturing, "_traced", noted)
    return lambda: bool(here)


def test_the_graph_is_that_traced_here(tmp_path, cold, capfd):
    options, hardware = asked(tmp_path), load_any("h100x8")
    with begun(options, hardware) as ahead:
        assert ahead is not None
        clock = ahead.clock
        graph = capture(options, hardware, clock, ahead=ahead)
    assert not cold()
    assert "".join(capfd.readouterr()).count("read") == 1
    assert set(clock.parts) == {"import_s", "trace_s"}
    assert sum(clock.parts.values()) <= clock.timing().total_s
    with begun(options, hardware) as ahead:
        assert ahead is None  # the cache has it
    assert format_graph(capture(options, hardware)) == format_graph(graph)
    assert not cold()
    anew = TraceOptions(model=options.model, hardware="h100x8", cache=False)
    assert format_graph(capture(anew, hardware)) == format_graph(graph)
    assert cold()


def test_each_of_the_two_sizes_is_traced_in_a_process(tmp_path, cold, monkeypatch):
    note = tmp_path / "pids"
    noted = f"open({str(note)!r}, 'a').write(f'{{os.getpid()}} {{x.shape[0]}}\\n')"
    options = asked(tmp_path, MODEL.replace("return x\n", f"{noted}\n        return x\n"))
    graph = capture(options, load_any("h100x8"))
    rows = [row.split() for row in note.read_text().splitlines()]
    assert {*(size for pid, size in rows if pid == str(os.getpid()))} == {"2"}
    there = {pid for pid, size in rows if size == "3"}
    assert len(there) == 1 and ended(int(*there))
    note.unlink()
    monkeypatch.setattr("planner.twin.forks", lambda: False)
    anew = TraceOptions(model=options.model, cache=False)
    assert format_graph(capture(anew, load_any("h100x8"))) == format_graph(graph)
    assert {row.split()[0] for row in note.read_text().splitlines()} == {str(os.getpid())}


def test_what_is_told_of_the_second_size_alone_is_a_fault(tmp_path, cold):
    large = "assert len(x) < 3, 'too many'\n        return x\n"
    options = asked(tmp_path, MODEL.replace("return x\n", large))
    with pytest.raises(PlanError, match="too many"):
        capture(options, load_any("h100x8"))


def test_a_fault_there_is_the_same_here(tmp_path, cold):
    options = asked(tmp_path, MODEL.replace("return x\n", "return y\n"))
    hardware = load_any("h100x8")
    with pytest.raises(PlanError) as own:
        capture(options, hardware)
    with begun(options, hardware) as ahead, pytest.raises(PlanError) as other:
        capture(options, hardware, ahead=ahead)
    assert other.value.lines() == own.value.lines()
    assert type(other.value) is PlanError
    assert "in forward" in other.value.there  # for -vv
    usage = UsageError("what", where="where", why="why", hints=("hint",))
    assert Fault.of(usage).meet().lines() == usage.lines()
    assert Fault.of(usage).meet().exit_code == 64


def test_what_was_killed_is_traced_here(tmp_path, cold, monkeypatch, capfd):
    options, hardware = asked(tmp_path), load_any("h100x8")
    with begun(options, hardware) as ahead:
        os.kill(ahead.later._pid, signal.SIGKILL)
        graph = capture(options, hardware, ahead=ahead)
    assert cold() and graph.parameters
    out, err = capfd.readouterr()
    assert out == "" and "model.py was killed (out of memory?): it is traced again" in err
    monkeypatch.setattr(capturing, "forks", lambda: False)
    with begun(TraceOptions(model=options.model, cache=False), hardware) as ahead:
        assert ahead is None


@pytest.mark.parametrize(("ends", "words"), [
    ("os._exit(3)", "with exit status 3"), ("os.kill(os.getpid(), 15)", "by SIGTERM"),
])  # fmt: skip
def test_a_model_that_ends_the_interpreter_does_not_end_the_command(tmp_path, cold, ends, words):
    options, hardware = asked(tmp_path, MODEL.replace('print("read")', ends)), load_any("h100x8")
    with (
        begun(options, hardware) as ahead,
        pytest.raises(PlanError, match=f"model.py ended the interpreter that traced it, {words}"),
    ):
        capture(options, hardware, ahead=ahead)
    assert not cold()


@pytest.mark.parametrize("cores", [None, {0}])
def test_what_a_model_prints_is_not_of_the_result(tmp_path, cores):
    """However it prints, at import or at its end, on one core too; -vv has its own line alone."""
    says = """print("said"); os.write(1, b"wrote\\n"); os.system("echo ran")
import atexit
atexit.register(print, "left")
"""
    options = asked(tmp_path, MODEL.replace('print("read")', says))
    command = [sys.executable, "-m", "planner.cli", "trace", options.model, "--hardware", "h100x8"]
    found = subprocess.run(
        [*command, "-o", "-"], cwd=tmp_path, text=True, capture_output=True, check=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        preexec_fn=cores and partial(os.sched_setaffinity, 0, cores),
    )  # fmt: skip
    assert json.loads(found.stdout)["schema"] == "plan/1"
    assert {"said", "wrote", "ran", "left"} <= {*found.stderr.splitlines()}


def test_a_traceback_is_of_what_was_met_there(tmp_path, plan):
    options = asked(tmp_path, MODEL.replace("build = Model", "def build():\n    raise ValueError"))
    code, out, err = plan("trace", options.model, "--hardware", "h100x8", "-vv")
    assert (code, out) == (1, "") and "raise ValueError" in err
    assert err.rindex("Traceback") < err.rindex("PlanError: build() raised") and "_There" not in err


def test_a_file_that_is_not_there_is_told_by_the_capture(tmp_path, cold):
    options = TraceOptions(model=str(tmp_path / "no.py"), hardware="h100x8")
    with begun(options, load_any("h100x8")) as ahead:
        assert ahead is None
        with pytest.raises(PlanError, match=r"no\.py"):
            capture(options, ahead=ahead)


def test_another_trace_than_was_begun_is_made_here(tmp_path, cold):
    options, hardware = asked(tmp_path), load_any("h100x8")
    with begun(options, hardware) as ahead:
        other = TraceOptions(model=options.model, hardware="h100x8", fold=False)
        capture(other, hardware, Clock(), ahead=ahead)
    assert cold()


def test_ctrl_c_while_it_traces_leaves_no_process(tmp_path, heeds_interrupts):
    note = tmp_path / "pid"
    hangs = f"import time\nopen({str(note)!r}, 'w').write(f'{{os.getpid()}}.')\ntime.sleep(60)"
    options = asked(tmp_path, MODEL.replace('print("read")', hangs))
    command = [sys.executable, "-m", "planner.cli", "trace", options.model, "--hardware", "h100x8"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, preexec_fn=heeds_interrupts,
    ) as first:  # fmt: skip
        while not note.exists() or not note.read_text().endswith("."):
            time.sleep(0.01)
        there = int(note.read_text()[:-1])
        assert there != first.pid
        first.send_signal(signal.SIGINT)
        out, err = first.communicate(timeout=30)
    assert (first.returncode, out, err) == (130, "", "interrupted\n")
    assert ended(there)
