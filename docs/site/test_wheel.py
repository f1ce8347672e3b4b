"""The wheel works outside the repository: everything that commands read is inside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import commands

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's content alone, beside the environment's libraries."""
    made, folder = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(made), str(ROOT)], check=True)
    wheel = next(made.glob("meshwright-*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), str(wheel)], check=True)
    return folder


def test_commands_in_an_empty_folder(installed, tmp_path):
    def plan(*words):
        run = f"import sys; sys.argv[0] = 'plan'; from planner.cli import main; import planner;" \
              f" assert planner.__file__.startswith({str(installed)!r}); main()"  # fmt: skip
        return subprocess.run(
            [sys.executable, "-c", run, *words], cwd=tmp_path, text=True, capture_output=True,
            env={**os.environ, "PYTHONPATH": str(installed)}, check=False,
        )  # fmt: skip

    rows = (row for kind, row in commands(ROOT / "docs/tutorial.md") if kind == "file")
    (tmp_path / "model.py").write_text(next(rows).partition("\n")[2])
    small = ("--arg", "width=64", "--arg", "heads=4", "--arg", "layers=4")
    ask = ("trace", "model.py", *small, "--seq-len", "64", "--global-batch", "64")
    for words in (
        (*ask, "--hardware", "h100x8"), ("show",), ("check",), ("diff", "plan.json", "plan.json"),
        ("report", "plan.json", "-o", "report.html"), ("hardware", "show", "h100x8"),
        ("export", "plan.json", "--to", "torchrun", "-o", "launch", "--lossy"),
        ("trace", "model.py", *small, "--task", "serve", "--hardware", "h100x1", "--batch", "1",
         "-o", "serve.json"),
        ("validate", "--help"),
    ):  # fmt: skip
        done = plan(*words)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    assert "LICENSE" in " ".join(p.name for p in installed.rglob("*"))
