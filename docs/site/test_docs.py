"""Every command of the README and of docs/ is run, in the order of its page (`make docs`).

A page's commands run in one folder that has the files the pages speak of: a model, a config, a
hardware file, prices, a plan in a repository. Blocks with a file's name as title are written first.
Commands of `plan` run in this process; `--effort` is lowered, and nothing else is changed. What is
not run is in NOT_RUN, by its reason.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EFFORT = ("--effort", "20")  # a search as small as that finds a plan; it proves less

NOT_RUN = {
    r"make (demo|test)|git clone": "what CI runs itself before",
    r"python -m (cost_models|planner\.validation)\.(serving_)?fit": "fits, minutes",
    r"python -m planner\.validation\.tables": "a test of its own",
    r"torchrun .*-m planner\.cli calibrate": "eight GPUs",
    r"python benchmarks/": "measurements, minutes",
    r"plan calibrate": "measures for minutes; tests of its own",
    r"plan validate": "published and users' tables, minutes; tests of their own",
    r"torchrun \.\.\.": "no whole command",
    r"export PATH": "this environment",
    r"plan export .*\[": "a synopsis",
    r"plan import .*\[": "a synopsis",
    r"plan report .*\[": "a synopsis",
}
EXIT = {  # commands that are to fail, beside those that say so: "exit code 3"
    r"--arg size=70b .*--fix dp=64 --fix recompute=none": 3,
    r"--detailed-exitcode": 2,
}
PLACES = {  # words of a synopsis
    "NAMEx16": "h100x16", "MODEL": "model.py", "HW": "h100x8",
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 8192,
}  # fmt: skip
RUN = "torchrun pretrain_gpt.py --tensor-model-parallel-size 2 --micro-batch-size 1\n"
PRICES = "[h100]\nusd_per_gpu_hour = 2.5\n[b200]\nusd_per_gpu_hour = 4.0\n"


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """("file", name and text) and ("run", command) of a page, in order."""
    for head, body in re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), re.S | re.M):
        title = re.search(r'title="([^"]+)"', head)
        if title:
            yield "file", f"{title[1]}\n{body}"
        elif not head:
            for row in re.sub(r"\\\n\s*", "", body).splitlines():
                row = row.removeprefix("$ ").strip()
                if re.match(r"(plan|python3?|torchrun|make|git|export|[A-Z]+=\S+) ", row):
                    yield "run", row


def reason_not_run(command: str) -> str | None:
    return next((why for what, why in NOT_RUN.items() if re.match(what, command)), None)


@pytest.fixture(scope="session")
def here(tmp_path_factory):
    """A repository with what pages speak of, copied for each page."""
    folder = tmp_path_factory.mktemp("here")
    tutorial = dict(
        body.split("\n", 1) for kind, body in commands(ROOT / "docs/tutorial.md") if kind == "file"
    )
    (folder / "model.py").write_text(tutorial["model.py"])
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("my.toml", "host.toml", "mine.toml"):
        (folder / name).write_text('base = "h100"\ncount = 8\n')
    for name in ("run.sh", "pretrain.sh"):
        (folder / name).write_text(RUN)
    (folder / "prices.toml").write_text(PRICES)
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "action").symlink_to(ROOT / "action")
    return folder


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path_factory):
    """Run a command of `plan` in this process: (exit code, stdout, stderr)."""
    from planner import cli, console

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))

    def run(arguments: list[str]) -> tuple[int, str, str]:
        code = console.run(cli.app(), arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def prepared(here: Path, folder: Path, plan) -> None:
    """A copy of `here` with a plan committed on main, and one that differs beside it."""
    shutil.copytree(here, folder, dirs_exist_ok=True, symlinks=True)
    ask = ["trace", "examples/llama.py", "--hardware", "h100x64", *EFFORT]
    for name, pins in (("old.json", ["--fix", "tp=2"]), ("new.json", []), ("plan.json", [])):
        code, _, said = plan([*ask, *pins, "-o", name])
        assert code == 0, said
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty"]
    for words in (["init", "-q", "-b", "main"], ["add", "plan.json", "plan.graph"],
                  [*commit, "-m", "a plan"], [*commit, "-m", "another day"]):  # fmt: skip
        subprocess.run(["git", *words], check=True)
    for end in (".json", ".graph"):  # what the working tree has differs from main
        shutil.copy(f"old{end}", f"plan{end}")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands(page, here, plan, tmp_path, monkeypatch):
    rows = list(commands(page))
    if not [row for kind, row in rows if kind == "run" and not reason_not_run(row)]:
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    prepared(here, tmp_path, plan)
    for kind, row in rows:
        if kind == "file":
            name, text = row.split("\n", 1)
            Path(name).write_text(text)
        elif not reason_not_run(row):
            run_one(row, plan)


def run_one(row: str, plan) -> None:
    """Run a command; its exit code is 0, or what it is to be."""
    for word, meant in PLACES.items():
        row = re.sub(rf"(?<![\w-]){word}(?!\w)", meant, row)
    words = shlex.split(row, comments=True)
    found = re.search(r"exit code (\d)$", row)
    wanted = next((code for what, code in EXIT.items() if re.search(what, row)), None)
    wanted = wanted if wanted is not None else int(found[1]) if found else 0
    if "=" in words[0] or words[0] != "plan":
        done = subprocess.run(row, shell=True, capture_output=True, text=True, check=False)
        code, said = done.returncode, done.stdout + done.stderr
    else:
        if words[1] in ("trace", "size", "why") and "--task" not in words:
            words += EFFORT
        if "--model" in words and "plan.json" in words:  # the page speaks of its plan
            model = words[words.index("--model") + 1]
            assert plan(["trace", model, "--hardware", "h100x64", *EFFORT])[0] == 0
        code, out, err = plan(words[1:])
        said = out + err
    allowed = {0, 4} if "--fail-on" in row else {wanted}
    assert code in allowed, f"{row}\nexit code {code}, expected {wanted}\n{said}"
