"""The commands as a shell sees them: stdout, stderr, exit codes."""

import io
import json
import os
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from toy_plan import DECISIONS, toy_estimate, toy_graph, toy_plan

from cost_models.hardware import load_hardware
from planner import cli, console, start
from planner.options import Baseline, TraceResult
from planner.plain import Plain
from planner.plan import load, make_plan
from planner.plan_text import to_text
from planner.report.markup import escape
from planner.search import DEFAULT_EFFORT

CLUSTER = load_hardware("h100x8")


def fresh_plan(hardware="h100x8", **changes):
    """The toy plan as it would be written today."""
    p = toy_plan(**changes)
    e = toy_estimate(p.graph, CLUSTER, p.workload, p.decisions, {})
    return make_plan(
        p.graph, hardware, CLUSTER, p.workload, p.decisions, p.sharding_by_unit, e, p.solver
    )


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path):
    """A function that runs a command in an empty folder: (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    fake = SimpleNamespace(estimate=toy_estimate)
    monkeypatch.setitem(sys.modules, "cost_models.estimate", fake)

    def run(*arguments):
        code = console.run(cli.app(), [str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def search(monkeypatch):
    """A stand-in for the search; keeps the options it was given."""
    seen = SimpleNamespace(options=None, interrupted=False, graph=toy_graph())

    def run(options, progress, ahead=None):
        seen.options = options
        found = fresh_plan()
        e = toy_estimate(found.graph, CLUSTER, found.workload, found.decisions, {})
        return TraceResult(
            plan=found, estimate=e, echo=("--seq-len 2048 (default)",),
            interrupted=seen.interrupted,
            baselines=(Baseline(name="fsdp", step_time_s=0.002, fits=True),),
        )  # fmt: skip

    monkeypatch.setitem(sys.modules, "planner.objectives", SimpleNamespace(run=run))
    monkeypatch.setattr("planner.capturing.capture", lambda *given: seen.graph)
    return seen


def test_trace_prints_a_summary_and_writes_the_plan(plan, search):
    code, out, err = plan("trace", "m.py", "--hardware", "h100x8", "--fix", "tp=2", "--arg", "n=3")
    assert code == 0
    assert out.startswith("--seq-len 2048 (default)\nToy")
    assert err == "wrote plan.json\n"
    assert to_text(load("plan.json")) == to_text(fresh_plan())
    assert search.options.pins.tp == 2
    assert search.options.args == (("n", "3"),)


def test_trace_json_is_one_document(plan, search):
    code, out, err = plan("trace", "m.py", "--hardware", "h100x8", "--json")
    assert code == 0
    assert json.loads(out)["baselines"][0]["name"] == "fsdp"
    assert "default" in err


def test_trace_to_stdout_is_the_plan_alone(plan, search, monkeypatch, tmp_path):
    code, out, _ = plan("trace", "m.py", "--hardware", "h100x8", "-o", "-")
    assert code == 0
    assert out == to_text(fresh_plan(), embed=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("sys.stdin", SimpleNamespace(read=lambda size: out[:size]))
    assert plan("show", "-")[0] == 0


def test_interrupted_keeps_the_plan(plan, search):
    search.interrupted = True
    code, _, err = plan("trace", "m.py", "--hardware", "h100x8")
    assert code == 130
    assert "FEASIBLE" in err
    assert load("plan.json")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["trace", "m.py", "--hardware", "h10x64"], 64, "unknown device 'h10'"),
        (["trace", "m.py", "--hardware", "h100x9"], 64, "fills no whole nodes"),
        (["trace", "m.py", "--hardware", "h100x8", "--fix", "tpp=2"], 64, "unknown pin"),
        (["trace", "m.py", "--hardware", "h100x8", "--arg", "x"], 64, "--arg x is no argument"),
        (["trace", "m.py", "--hardware", "h100x8", "--json", "-o", "-"], 64, "both want stdout"),
        (["trace", "m.py", "--hardware", "h100x8", "--seq-len", "x"], 64, "--seq-len"),
        (["trace", "m.py", "--hardware", "h100x8", "-o", "no/p.json"], 64, "no folder no"),
        (["trace", "m.py"], 64, "--hardware"),
        (["trace"], 64, "MODEL"),
        (["nothing"], 64, "no such command"),
        (["show", "--nothing"], 64, "no such option"),
        (["show", "none.json"], 1, "cannot read none.json"),
        (["diff", "-", "-"], 64, "both plans"),
        (["diff", "a", "b", "--format", "html"], 64, "--format html"),
        (["hardware", "show", "h1000"], 64, "unknown device"),
        (["trace", "m.py", "--hardware", "h100x" + "9" * 5000], 64, "not so many GPUs"),
        (["trace", "m.py", "--hardware", "h100x8", "--seq-len", "9" * 5000], 64, "999,999,999"),
        (["trace", "m.py", "--hardware", "h100x8", "--fix", "stages=" + "9" * 5000], 64,
         "layers per stage"),
        (["trace", "m.py", "--hardware", "h100x8", "--fix", "recompute=full:" + "9" * 5000], 64,
         "layers per stage"),
        (["trace", "m.py", "--hardware", "h100x8", "--max-memory", "9" * 5000 + "GB"], 64,
         "no number is so large"),
        (["show", "a" * 5000], 1, "File name too long"),
        (["diff", "x:" + "a" * 5000, "b"], 1, "File name too long"),
        (["trace", "m.py", "--hardware", "a" * 5000 + ".toml"], 1, "File name too long"),
        (["trace", "m.py", "--hardware", "h100x8", "-o", "a" * 5000], 1, "File name too long"),
    ],
)
def test_errors_are_said_once_with_their_code(plan, search, arguments, code, words):
    found, out, err = plan(*arguments)
    assert found == code
    assert out == ""
    assert words in err
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    assert "Traceback" not in err


def test_internal_errors_have_no_traceback_unless_asked(plan, monkeypatch):
    fresh_plan().save("plan.json")
    monkeypatch.setitem(sys.modules, "cost_models.estimate", SimpleNamespace(estimate=None))
    code, _, err = plan("show")
    assert code == 1
    assert err.startswith("error: internal: TypeError")
    assert "Traceback" in plan("show", "-vv")[2]


def test_interrupt_is_130(plan, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    fresh_plan().save("plan.json")
    monkeypatch.setitem(sys.modules, "cost_models.estimate", SimpleNamespace(estimate=stop))
    code, out, err = plan("show")
    assert (code, out, err) == (130, "", "interrupted\n")


def test_ctrl_c_before_there_is_a_command(monkeypatch, capsys):
    """As the command line is imported, and as it imports what the command needs."""

    def interrupt(*_):
        raise KeyboardInterrupt

    importer = SimpleNamespace(find_spec=interrupt)
    for place in ("import", "command"):
        with monkeypatch.context() as m, pytest.raises(SystemExit) as left:
            m.setattr("planner.cli.app", interrupt)
            m.setattr("sys.argv", ["plan", "show"])
            m.setattr("gc.set_threshold", lambda *_: None)
            m.setattr("planner.cli._leave", sys.exit)
            if place == "import":
                m.delitem(sys.modules, "planner.cli")
                m.delattr("planner.cli")
                m.setattr("sys.meta_path", [importer, *sys.meta_path])
            start.main()
        assert (left.value.code, capsys.readouterr().err) == (130, "interrupted\n"), place


def test_progress_is_a_line_of_a_terminal_wiped_at_the_end(monkeypatch):
    """Nothing where it is quick, or no terminal; what was said before the second is shown after."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(console, "QUIET_S", 0.05)
    with console.progress() as show:
        assert show is None
    for wait, said in ((0.0, ""), (0.3, "tracing")):
        monkeypatch.setattr("sys.stderr", Terminal())
        with console.progress() as show:
            show("tracing")
            time.sleep(wait)
        found = sys.stderr.getvalue()
        assert found.strip() == said and len(found.split("\r")) == (4 if wait else 1)
        assert not wait or found.endswith("\r" + " " * 39 + "\r")
    monkeypatch.setattr("sys.stderr", Terminal())
    with console.progress() as show:
        time.sleep(0.3)
        show("x" * 200)
    assert max(map(len, sys.stderr.getvalue().split("\r"))) == 39  # a wrapped line is not wiped


def test_show(plan):
    fresh_plan().save("plan.json")
    code, out, err = plan("show")
    assert (code, err) == (0, "")
    assert out.startswith("Toy")
    assert json.loads(plan("show", "--json")[1])["schema"] == "plan/1"
    assert "S(0)  layers.{0..7}.mlp.up_proj.weight" in plan("show", "--layers")[1]
    assert plan("show", "--stage", "1")[1].startswith("stage 1 on pp rank 1")
    assert plan("show", "--stage", "2")[0] == 64


def test_diff_codes(plan):
    fresh_plan().save("old.json")
    fresh_plan(decisions=replace(DECISIONS, stages=(4, 4))).save("plan.json")
    assert plan("diff", "old.json")[0] == 0
    assert plan("diff", "old.json", "--detailed-exitcode")[0] == 2
    assert plan("diff", "old.json", "old.json", "--detailed-exitcode")[0] == 0
    assert plan("diff", "old.json", "--fail-on", "step-time=+3%")[0] == 0
    assert json.loads(plan("diff", "old.json", "--json")[1])["differs"] is True


def test_check_of_a_fresh_plan(plan):
    fresh_plan().save("plan.json")
    assert plan("check") == (0, "plan.json: valid, fits h100x8, not stale\n", "")
    assert json.loads(plan("check", "--json")[1])["stale"] is False


def test_check_of_an_edited_plan_and_update(plan):
    edited = replace(DECISIONS, tp=1, dp=4, shard=4, microbatches=4, sequence_parallel=False)
    replace(fresh_plan(), decisions=edited, shardings=()).save("plan.json")
    code, out, err = plan("check")
    assert (code, out) == (4, "")
    assert "the plan is stale" in err
    assert "its decisions were edited" in err
    assert "stale" in plan("show")[1]
    assert plan("check", "--update")[0] == 0
    assert plan("check")[0] == 0
    assert load("plan.json").solver.status == "ESTIMATE"


def test_check_tells_which_inputs_moved(plan):
    replace(fresh_plan(), hardware_hash="sha256:old", constants_hash="sha256:older").save("p.json")
    code, _, err = plan("check", "p.json")
    assert code == 4
    assert "hardware h100x8: sha256:old ->" in err
    assert "cost constants: sha256:older ->" in err


def test_check_of_a_plan_that_does_not_fit(plan, monkeypatch):
    def small(*args):
        return replace(toy_estimate(*args), capacity_bytes=9_000)

    fresh_plan().save("plan.json")
    monkeypatch.setitem(sys.modules, "cost_models.estimate", SimpleNamespace(estimate=small))
    code, _, err = plan("check")
    assert code == 3
    assert "does not fit h100x8" in err


def test_check_against_a_model(plan, search):
    fresh_plan().save("plan.json")
    assert plan("check", "--model", "m.py")[0] == 0
    search.graph = toy_graph(9)
    code, _, err = plan("check", "--model", "m.py")
    assert code == 4
    assert "the plan is for another model than m.py" in err
    assert "new: layers.8." in err


def test_plan_of_other_hardware_size_is_refused(plan):
    fresh_plan(hardware="h100x16").save("plan.json")
    code, _, err = plan("show")
    assert code == 1
    assert "pp*dp*cp*tp is 8, the hardware has 16 GPUs" in err


def test_hardware(plan):
    assert "h100 " in plan("hardware", "list")[1]
    out = plan("hardware", "show", "h100x64")[1]
    assert out.startswith("h100x64")
    assert "sources" in out
    assert json.loads(plan("hardware", "show", "t4", "--json")[1])["name"] == "t4"


@pytest.mark.parametrize("command", ["trace", "why"])
def test_help_says_the_default_effort(plan, command):
    """It is typed there, as what says it is not loaded to print help."""
    assert f"(default: {DEFAULT_EFFORT})" in " ".join(plan(command, "--help")[1].split())


def test_examples_come_first_in_help(plan):
    for command in ("trace", "show", "diff", "check"):
        code, out, _ = plan(command, "--help")
        assert code == 0
        assert out.splitlines()[2].strip().startswith(f"plan {command}")


def test_of_one_command_the_flags_of_others_are_not_read():
    commands = typer.main.get_command(cli.app("diff")).commands
    assert sorted(commands) == ["diff", "hardware"]
    every = typer.main.get_command(cli.app("no command")).commands
    assert list(every) == [*(row[0] for row in cli.COMMANDS), "hardware"]
    assert [p.name for p in every["diff"].params] == [p.name for p in commands["diff"].params]


def test_reading_commands_import_nothing_heavy(tmp_path):
    script = (
        "import sys; from planner import check, cli, differ, show;"
        "from planner.plan import load; from planner.plan_text import to_text;"
        "heavy = ('torch', 'ortools', 'networkx', 'pydantic', 'rich', 'numpy');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_version_is_that_of_the_package(plan):
    root = Path(__file__).parents[1]
    said = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert plan("--version") == (0, f"meshwright {said}\n", "")
    assert f"version: {said}\n" in (root / "CITATION.cff").read_text()


@pytest.mark.parametrize("words", [("hardware", "list"), ("check", "--help")])
def test_broken_pipe_is_quiet(words):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "planner.cli", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


ODD = "\x1b[2J\r\x9b\u202eX\u2069\ud800"
SPELT = "\\x1b[2J\\x0d\\u009b\\u202eX\\u2069\\ud800"


def test_names_of_files_steer_no_terminal(plan):
    """Of a plan on stdout, of a fault on stderr; as JSON, and in a terminal of few letters."""
    found = fresh_plan()
    found = replace(found, solver=replace(found.solver, status=ODD))
    found.save("plan.json")
    code, out, _ = plan("show")
    assert code == 0 and SPELT in out and "\x1b" not in out
    assert json.loads(plan("show", "--json")[1])
    text = Path("plan.json").read_text()
    Path("plan.json").write_text(text.replace("h100x8 sha256", "\\u202eh\\u001b sha256"))
    code, out, err = plan("show")
    assert code == 1 and "'\\u202eh\\x1b'" in err and "\x1b" not in err
    kept = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("a\t\u65e5\x1b", file=Plain(kept), flush=True)
    assert kept.buffer.getvalue() == b"a\t\\u65e5\\x1b\n"
    assert escape(ODD) == "\ufffd[2J\ufffd\ufffd\ufffdX\ufffd\ufffd"
