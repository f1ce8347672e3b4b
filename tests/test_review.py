"""A plan in a pull request: what the action writes and returns, and the pre-commit hook."""

import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from planner.differ_text import tag
from planner.hook import plans_of

HERE = Path(__file__).parent.parent
GH = """#!{python}
import json, os, sys
store = os.environ["GH_STORE"]
rows = json.load(open(store))
words = sys.argv[1:]
if "--method" in words:
    body = json.load(sys.stdin)["body"]
    where = words[words.index("--method") + 2]
    if "PATCH" in words:
        next(row for row in rows if where.endswith(f"/{{row['id']}}"))["body"] = body
    else:
        rows.append({{"id": len(rows) + 1, "body": body}})
    json.dump(rows, open(store, "w"))
else:
    print("\\n".join(map(json.dumps, rows)))
"""


@pytest.fixture
def review(monkeypatch, plan, tmp_path):
    """The action's script with `plan` run in this process, in a repository of its own, with a
    `gh` that keeps comments in a file."""
    spec = importlib.util.spec_from_file_location("review", HERE / "action" / "review.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    outside = module.run

    def run(*command):
        if command[0] != "plan":
            return outside(*command)
        return subprocess.CompletedProcess(command, *plan(*command[1:]))

    monkeypatch.setattr(module, "run", run)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "gh").write_text(GH.format(python=sys.executable))
    (tools / "gh").chmod(stat.S_IRWXU)
    event = tmp_path / "event.json"
    event.write_text(json.dumps({"pull_request": {"number": 7}}))
    others = [{"id": 1, "body": "looks good"}, {"id": 2, "body": "<!-- another --> hello"}]
    (tmp_path / "comments.json").write_text(json.dumps(others))
    for name, value in {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "GITHUB_REPOSITORY": "team/models",
        "GITHUB_EVENT_PATH": str(event), "GH_STORE": str(tmp_path / "comments.json"),
        "PLAN": "plan.json", "BASE": "HEAD", "REPORT": "false", "FOLDER": str(tmp_path / "made"),
        "GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_STEP_SUMMARY": str(tmp_path / "sum"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    git("init", "-q", ".")
    git("commit", "-q", "--allow-empty", "-m", "before")
    trace(plan)
    return module


def git(*words):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)


def trace(plan, *pins):
    fixes = [word for pin in pins for word in ("--fix", pin)]
    assert plan("trace", HERE / "examples/llama.py", "--arg", "size=tiny", "--hardware", "h100x4",
                "--seq-len", "64", "--global-batch", "8", *fixes)[0] == 0  # fmt: skip


def comments(tmp_path):
    return json.loads((tmp_path / "comments.json").read_text())


def test_one_comment_a_plan_updated_in_place(review, plan, tmp_path, capsys):
    """A new plan is shown; once the base has one they are compared, in the same comment; a gate
    that fails fails the job and says so; others' comments are left alone."""
    assert review.main([]) == 0
    first = comments(tmp_path)
    assert len(first) == 3 and first[2]["body"].startswith(f"<!-- {tag('plan.json')} -->")
    assert "A new plan" in first[2]["body"]
    git("add", "-A")
    git("commit", "-qm", "a plan")
    trace(plan, "tp=4", "micro_batch=2")
    os.environ["FAIL_ON"] = "step-time=+0%"
    try:
        assert review.main([]) == 4
    finally:
        del os.environ["FAIL_ON"]
    second = comments(tmp_path)
    assert [row["body"] for row in second[:2]] == [row["body"] for row in first[:2]]
    assert len(second) == 3 and "| step time |" in second[2]["body"]
    assert "The gate failed" in second[2]["body"]
    assert "result=gate" in (tmp_path / "output").read_text()
    assert json.loads((tmp_path / "made/diff.json").read_text())["differs"]


def test_a_plan_that_fails_its_check_and_a_dry_run(review, tmp_path, capsys):
    path = Path("plan.json")
    path.write_text(path.read_text().replace('"dp": ', '"dp": 3'))
    assert review.main(["--dry-run"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("<!-- meshwright-plan-diff plan.json -->")
    assert "`plan check` failed" in out and len(comments(tmp_path)) == 2
    assert review.fenced("~~~~~").splitlines()[0] == "~~~~~~text"  # a block it cannot end


def test_no_right_to_comment_is_a_warning(review, monkeypatch, tmp_path, capsys):
    (tmp_path / "bin/gh").write_text("#!/bin/sh\necho 'HTTP 403: forks may not' >&2\nexit 1\n")
    assert review.main([]) == 0
    assert "::warning::comments cannot be read: HTTP 403" in capsys.readouterr().out
    assert "A new plan" in (tmp_path / "sum").read_text()


def test_a_code_block_shows_what_it_has_in_its_order():
    spec = importlib.util.spec_from_file_location("review", HERE / "action" / "review.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.fenced("a\x1b[2J \u202eb\u2066\x9b\tc\n~~~~~") == (
        "~~~~~~text\na\\u001b[2J \\u202eb\\u2066\\u009b\tc\n~~~~~\n~~~~~~"
    )


def test_the_hook_checks_plans_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text('{\n"schema": "plan/1", "planner": "0.1.0"')
    Path("other.json").write_text("{}")
    Path("bytes.json").write_bytes(b"\xff\xfe")
    files = ["plan.graph", "plan.json", "other.json", "bytes.json", "gone.json", "x.graph"]
    assert plans_of(files) == ["plan.json"]
    Path("bytes.graph").write_text('graph/1 "lost"')
    assert plans_of(["bytes.graph"]) == ["bytes.json"]  # a plan that is broken is one that fails


def test_a_first_push_is_compared_with_where_the_branch_began(review, plan, monkeypatch, capsys):
    """The event has zeros for the commit before. Here a clone of depth one, as jobs have it."""
    git("add", "-A")
    git("commit", "-qm", "a plan")
    git("branch", "-M", "main")
    began = review.commit("HEAD")
    monkeypatch.setenv("BASE", "0" * 40)
    monkeypatch.setenv("GITHUB_REF_NAME", "main")
    assert review.base_of("0" * 40, "main") == review.commit("HEAD^")
    git("checkout", "-qb", "topic")
    monkeypatch.setenv("GITHUB_REF_NAME", "topic")
    trace(plan, "tp=4", "micro_batch=2")
    git("commit", "-qam", "another plan")
    git("commit", "-q", "--allow-empty", "-m", "more")
    assert review.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "| step time |" in said and "| `tp` | `1` | `4` |" in said
    here = Path.cwd().as_uri()
    git("clone", "-q", "--depth", "1", "--branch", "topic", here, "clone")
    monkeypatch.chdir("clone")
    assert not review.commit(began)
    assert review.base_of("0" * 40, "main") == began
    assert f"compared with {began[:12]}" in capsys.readouterr().err
    assert review.base_of("abc", "main") == "abc"


def test_the_first_push_of_all_has_nothing_before(review, capsys):
    git("checkout", "-q", "--orphan", "alone")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert review.base_of("0" * 40, "nowhere") == ""


def test_a_base_that_is_not_there_passes_no_gate(review, monkeypatch, capsys):
    monkeypatch.setenv("BASE", "origin/nowhere")
    assert review.main([]) == 1
    assert "::error::the base origin/nowhere is not in this clone" in capsys.readouterr().out
