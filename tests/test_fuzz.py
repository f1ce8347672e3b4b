"""Some of `python tests/fuzz.py`: mutated files, never a traceback."""

import os

import fuzz
import pytest

from cost_models.checked_toml import MOST_BYTES
from planner.plan import MOST_CHARACTERS


def test_mutated_files_are_refused_or_read(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    texts = fuzz.originals(tmp_path)
    assert not fuzz.fuzz(80, 0, texts, tmp_path)


@pytest.mark.parametrize("name", ["/etc/hardware.toml", "../../hardware.toml", "a/../../b.toml"])
def test_a_plan_reads_no_file_elsewhere(tmp_path, monkeypatch, plan, name):
    """A plan of another person names the hardware file that is read when it is opened."""
    assert plan("trace", fuzz.ROOT / "examples/llama.py", "--arg", "size=tiny", "--hardware",
                "h100x1", "--seq-len", "64", "--global-batch", "8")[0] == 0  # fmt: skip
    text = (tmp_path / "plan.json").read_text().replace("h100x1 sha256", f"{name} sha256")
    (tmp_path / "plan.json").write_text(text)
    code, _, said = plan("show")
    assert code == 1 and "outside" in said


def test_files_too_large_are_not_read(tmp_path, plan):
    for name, size in (("plan.json", MOST_CHARACTERS + 9), ("big.toml", MOST_BYTES + 9)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    assert plan("show")[0] == 1
    code, _, said = plan("hardware", "show", "big.toml")
    assert code == 64 and "larger" in said, os.listdir(tmp_path)


def test_a_module_with_a_name_that_no_plan_can_tell(tmp_path, plan):
    (tmp_path / "odd.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    model = nn.Sequential(nn.Embedding(8, 8))\n"
        "    model.add_module('a\\nb', nn.Linear(8, 8))\n"
        "    return model\n"
    )
    code, _, said = plan("trace", "odd.py", "--hardware", "h100x1", "--seq-len", "64")
    assert code == 1 and "a module is named 'a\\nb'" in said
    (tmp_path / "odd.py").write_text((tmp_path / "odd.py").read_text().replace("a\\nb", "f(x)"))
    code, _, said = plan("trace", "odd.py", "--hardware", "h100x1", "--seq-len", "64")
    assert code == 1 and "a module is named 'f(x)'" in said


def test_a_report_writes_over_no_plan(tmp_path, plan):
    (tmp_path / "plan.json").write_text("{}")
    code, _, said = plan("report", "-o", "plan.json", "--no-why")
    assert code == 64 and "would be lost" in said
    assert (tmp_path / "plan.json").read_text() == "{}"
