"""`plan trace`, show, diff and check end to end, and what they say to bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import EXAMPLES

from planner import tracing
from planner.plan import load

LLAMA = str(EXAMPLES / "llama.py")
TINY = ("--arg", "size=tiny", "--global-batch", "16")
PLAN_KEYS = ["schema", "planner", "inputs", "workload", "decisions", "stages", "units"]


@pytest.fixture(scope="session")
def traced(tmp_path_factory, cache):
    """A folder where a shell ran `plan trace`; what it printed, as (code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("plan")
    done = shell(folder, cache, "trace", LLAMA, "--hardware", "h100x8", *TINY)
    return folder, done


def shell(folder, cache, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "planner.cli", *arguments], cwd=folder, env=environment(cache),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def environment(cache):
    return {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONPATH": str(EXAMPLES.parent)}


@pytest.fixture
def copy(traced, tmp_path):
    """A copy of the traced plan in the empty folder; returns its text."""
    for name in ("plan.json", "plan.graph"):
        (tmp_path / name).write_text((traced[0] / name).read_text())
    return (tmp_path / "plan.json").read_text()


# --- the main road -----------------------------------------------------------------------------


def test_trace_writes_a_plan_and_says_so(traced):
    folder, (code, out, err) = traced
    assert code == 0, err
    assert sorted(p.name for p in folder.iterdir()) == ["plan.graph", "plan.json"]
    assert "wrote plan.json" in err
    assert "--seq-len 8192 (default" in out
    assert "h100x8" in out
    text = (folder / "plan.json").read_text()
    raw = json.loads(text)
    assert list(raw)[: len(PLAN_KEYS)] == PLAN_KEYS
    assert raw["schema"] == "plan/1"
    assert re.fullmatch("sha256:[0-9a-f]{64}", raw["inputs"]["graph"])
    assert str(folder) not in text and str(EXAMPLES) not in text
    d = raw["decisions"]
    assert d["pp"] * d["dp"] * d["cp"] * d["tp"] == 8
    assert d["dp"] * d["micro_batch"] * d["microbatches"] == raw["workload"]["global_batch"] == 16


def test_tracing_again_gives_the_same_bytes(traced, plan, tmp_path):
    """From the cache, or traced anew."""
    for more in ((), ("--no-cache",)):
        assert plan("trace", LLAMA, "--hardware", "h100x8", *TINY, *more)[0] == 0
        for name in ("plan.json", "plan.graph"):
            assert (tmp_path / name).read_bytes() == (traced[0] / name).read_bytes()


ESTIMATE = {
    "step_time_s", "error", "tokens_per_s_per_gpu", "model_tflops_per_gpu",
    "hardware_tflops_per_gpu", "mfu", "usd_per_million_tokens", "breakdown_s",
    "peak_memory_bytes", "capacity_bytes", "memory_by_pp_rank",
}  # fmt: skip
BREAKDOWN = {
    "compute", "recompute", "tp_comm", "dp_comm", "ep_comm", "cp_comm", "pp_comm", "bubble",
    "optimizer", "offload", "host", "jitter",
}  # fmt: skip
MEMORY = {
    "parameters", "gradients", "optimizer", "activations", "gathered", "logits", "workspace",
    "comm_buffers", "context", "fragmentation",
}  # fmt: skip
DECISIONS = {
    "pp", "dp", "cp", "tp", "ep", "etp", "zero", "shard", "reshard", "micro_batch", "microbatches",
    "schedule", "virtual_stages", "recompute", "offload", "sequence_parallel", "compile",
}  # fmt: skip


def test_json_keeps_its_contract(plan, copy):
    shown = json.loads(plan("show", "--json")[1])
    traced = json.loads(plan("trace", LLAMA, "--hardware", "h100x8", *TINY, "--json")[1])
    for found in (shown, traced):
        assert found["schema"] == "plan/1"
        assert {"name", "parameters"} <= set(found["model"])
        assert found["hardware"] == "h100x8"
        assert {"task", "engine", "global_batch", "seq_len", "precision", "optimizer"} <= set(
            found["workload"]
        )
        assert set(found["decisions"]) >= DECISIONS
        e = found["estimate"]
        assert set(e) >= ESTIMATE
        assert set(e["breakdown_s"]) == BREAKDOWN
        assert sum(e["breakdown_s"].values()) == pytest.approx(e["step_time_s"], rel=1e-9)
        for rank in e["memory_by_pp_rank"]:
            assert set(rank) == MEMORY
        assert e["peak_memory_bytes"] == max(sum(r.values()) for r in e["memory_by_pp_rank"])
        assert {"status", "gap", "bound_s", "meshes", "meshes_solved"} <= set(found["solver"])
    assert set(traced["timing"]) == {"import_s", "trace_s", "cost_s", "solve_s", "total_s"}
    assert "timing" not in shown
    assert traced["estimate"] == shown["estimate"]
    names = [b["name"] for b in traced["baselines"]]
    assert {"ddp", "fsdp", "fsdp+tp", "3d"} <= set(names)
    best = traced["estimate"]["step_time_s"]
    assert all(b["step_time_s"] >= 0.999 * best for b in traced["baselines"] if b["fits"])


def test_show_diff_and_check(plan, copy, tmp_path):
    assert plan("show")[0] == 0
    assert plan("check") == (0, "plan.json: valid, fits h100x8, not stale\n", "")
    assert plan("check", "--model", LLAMA, "--arg", "size=tiny")[0] == 0
    assert plan("diff", "plan.json", "plan.json", "--detailed-exitcode")[0] == 0
    assert plan("trace", LLAMA, "--hardware", "h100x8", *TINY, "--fix", "tp=2",
                "-o", "other.json")[0] == 0  # fmt: skip
    assert plan("diff", "plan.json", "other.json")[0] == 0
    code, out, _ = plan("diff", "plan.json", "other.json", "--detailed-exitcode")
    assert code == 2
    assert "tp" in out
    assert plan("diff", "plan.json", "other.json", "--fail-on", "step-time=+0.001%")[0] == 4


def test_reading_commands_import_no_torch_and_no_solver(traced):
    """`show`, `diff` and `check` never run the model's file: safe on a fork, and quick."""
    heavy = ("torch", "ortools", "transformers", "networkx")
    commands = (["show"], ["diff", "plan.json"], ["check"], ["show", "--json"])
    code = (  # in one process: what one of them loads stays
        "import sys\nfrom planner import cli, console\n"
        f"for words in {commands!r}:\n"
        "    done = console.run(cli.app(), words)\n"
        f"    print(words, [m for m in {heavy!r} if m in sys.modules], done, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=traced[0], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("['")]
    assert said == [f"{words} [] 0" for words in commands], done.stderr


def test_a_whole_plan_pinned_is_an_estimate(plan, copy):
    """The plan's own decisions as pins give the plan's own step."""
    first = json.loads(plan("show", "--json")[1])
    d = first["decisions"]
    pins = [f"{k}={d[k]}" for k in ("pp", "dp", "cp", "tp", "zero", "shard", "micro_batch")]
    pins.append(f"recompute={d['recompute']}")
    words = [w for pin in pins for w in ("--fix", pin)]
    again = json.loads(plan("trace", LLAMA, "--hardware", "h100x8", *TINY, *words, "--json")[1])
    assert again["estimate"] == first["estimate"]


# --- bad input: a model ------------------------------------------------------------------------

FILES = {
    "empty.py": "x = 1\n",
    "raises.py": "def build():\n    raise ValueError('no such size')\n",
    "none.py": "def build():\n    return 3\n",
    "syntax.py": "def build(:\n",
    "branch.py": (
        "import torch\n\n\nclass Branch(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.embed = torch.nn.Embedding(32, 8)\n"
        "        self.head = torch.nn.Linear(8, 32)\n\n    def forward(self, input_ids):\n"
        "        x = self.embed(input_ids)\n        if x.sum() > 0:\n            x = x * 2\n"
        "        return self.head(x)\n\n\ndef build():\n    return Branch()\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("missing.py", ["missing.py"]),
        ("empty.py", ["empty.py", "build"]),
        ("raises.py", ["no such size", "raises.py"]),
        ("raises.py:other", ["other"]),
        ("none.py", ["nn.Module"]),
        ("syntax.py", ["syntax.py"]),
        ("branch.py", ["branch.py:12", "hint"]),
    ],
)
def test_bad_models_are_errors(plan, tmp_path, model, words):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    code, out, err = plan("trace", model, "--hardware", "h100x8", "--no-cache")
    assert (code, out) == (1, ""), err
    assert err.startswith("error: ") and "Traceback" not in err and "internal" not in err, err
    for word in words:
        assert word in err, err
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--hardware", "h10x8"], 64, ["unknown device", "h100"]),
        (["--hardware", "h100"], 64, ["h100x8"]),
        (["--hardware", "h100x12"], 64, ["fills no whole nodes", "h100x8", "h100x16"]),
        (["--hardware", "none.toml"], 64, ["none.toml"]),
        (["--hardware", "h100x8", "--fix", "tp=3"], 64, ["tp=3", "8 GPUs"]),
        (["--hardware", "h100x8", "--fix", "tp=4", "--fix", "dp=4"], 64, ["tp", "dp", "16"]),
        (["--hardware", "h100x8", "--fix", "tp=2", "--fix", "tp=4"], 64, ["contradict"]),
        (["--hardware", "h100x8", "--fix", "zero=0", "--fix", "shard=4"], 64, ["zero=0"]),
        (["--hardware", "h100x8", "--fix", "pp=2", "--fix", "reshard=on"], 64, ["reshard"]),
        (["--hardware", "h100x8", "--fix", "pp=4"], 64, ["pp=4", "2 layers"]),
        (["--hardware", "h100x8", "--fix", "ep=2"], 64, ["ep=2"]),
        (["--hardware", "h100x8", "--fix", "banana=2"], 64, ["banana"]),
        (["--hardware", "h100x8", "--fix", "place:nothing=R", "--fix", "tp=2"], 64, ["nothing"]),
        (["--hardware", "h100x8", "--global-batch", "7", "--fix", "micro_batch=2"], 64, ["6 or 8"]),
        (["--hardware", "h100x8", "--global-batch", "12", "--fix", "dp=8"], 64, ["12", "16"]),
        (["--hardware", "h100x8", "--global-batch", "0"], 64, ["0"]),
        (["--hardware", "h100x8", "--seq-len", "0"], 64, ["0"]),
        (["--hardware", "t4x8", "--precision", "bf16"], 64, ["bf16", "fp16"]),
        (["--hardware", "a100x8", "--precision", "fp8"], 64, ["fp8"]),
        (["--hardware", "h100x8", "--precision", "bf61"], 64, ["bf16"]),
        (["--hardware", "h100x8", "--optimizer", "adamv"], 64, ["adamw"]),
        (["--hardware", "h100x8", "--engine", "megatrom"], 64, ["megatron"]),
        (["--hardware", "h100x8", "--task", "serve"], 64, ["--global-batch is of training"]),
        (["--hardware", "h100x8", "--prompt", "8"], 64, ["--prompt is of serving"]),
        (["--hardware", "h100x8", "--task", "dance"], 64, ["dance"]),
        (["--hardware", "h100x8", "--arg", "sise=tiny"], 64, ["sise", "size"]),
        (["--hardware", "h100x8", "--slack", "9%"], 64, ["--slack 9% is of --objective memory"]),
    ],
)
def test_bad_flags(plan, tmp_path, arguments, code, words):
    defaults = [] if "--global-batch" in arguments else ["--global-batch", "16"]
    found, out, err = plan("trace", LLAMA, "--arg", "size=tiny", *arguments, *defaults)
    assert (found, out) == (code, ""), err
    assert err.startswith("error: ") and "internal" not in err, err
    for word in words:
        assert word in err, err
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_no_gpus_divide_is_planned_without_data_parallelism(plan, tmp_path):
    """Where the others have room for all GPUs; else it is said which batch does."""
    words = ["trace", LLAMA, "--arg", "size=tiny", "--global-batch", "7"]
    code, out, err = plan(*words, "--hardware", "h100x8", "-o", str(tmp_path / "p"))
    assert code == 0 and "lets dp be 1 at most, of 8; 6 lets it be 2, 8 lets it be 8" in out
    d = load(str(tmp_path / "p")).decisions
    assert (d.dp, d.pp * d.cp * d.tp) == (1, 8)
    code, out, err = plan(*words, "--hardware", "h100x64", "--seq-len", "512")
    assert code == 3 and "no mesh of h100x64 suits" in err and "hint: with --global-batch " in err


def test_infeasible_names_what_binds_and_solves_again(plan):
    code, out, err = plan(
        "trace", LLAMA, "--arg", "size=70b", "--hardware", "h100x8", "--global-batch", "64",
        "--fix", "recompute=none", "--fix", "offload=none",
    )  # fmt: skip
    assert (code, out) == (3, "")
    assert "no plan fits h100x8" in err
    assert re.search(r"nearest needs [0-9.]+ GB on pp rank \d: \w+ [0-9.]+", err)
    assert "binding: memory" in err and "offload=none (--fix)" in err
    assert "recompute=none (--fix)" not in err  # nothing fits either way: it does not bind
    hints = [line for line in err.splitlines() if line.startswith("hint:")]
    assert hints and all(re.search(r"[0-9.]+ GB", line) for line in hints), err


# --- bad input: a plan -------------------------------------------------------------------------


def edited(tmp_path, **changes):
    path = tmp_path / "plan.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, **changes}))
    return raw


READERS = [("show",), ("diff", "plan.json"), ("check",)]


@pytest.mark.parametrize("command", READERS)
def test_truncated_plan(plan, copy, tmp_path, command):
    (tmp_path / "plan.json").write_text(copy[: len(copy) // 2])
    code, out, err = plan(*command)
    assert (code, out) == (1, "")
    assert "plan.json" in err and "internal" not in err


@pytest.mark.parametrize("command", READERS)
def test_newer_schema(plan, copy, tmp_path, command):
    edited(tmp_path, schema="plan/2")
    code, out, err = plan(*command)
    assert (code, out) == (1, "")
    assert "plan/2" in err and "plan/1" in err


@pytest.mark.parametrize("command", READERS)
def test_missing_graph(plan, copy, tmp_path, command):
    (tmp_path / "plan.graph").unlink()
    code, out, err = plan(*command)
    assert (code, out) == (1, "")
    assert "plan.graph" in err


def test_parameter_of_no_rule_or_two(plan, tmp_path):
    assert plan("trace", LLAMA, "--hardware", "h100x8", *TINY, "--fix", "tp=2")[0] == 0
    raw = json.loads((tmp_path / "plan.json").read_text())
    rules = raw["parameters"]
    edited(tmp_path, parameters=rules[1:])
    code, _, err = plan("check")
    assert code == 1
    assert "no rule" in err or "matched by none" in err, err
    assert "weight" in err
    edited(tmp_path, parameters=[*rules, rules[0]])
    code, _, err = plan("check")
    assert code == 1
    assert "two" in err and "weight" in err, err


def test_plan_of_another_model(plan, copy):
    code, out, err = plan("check", "--model", LLAMA, "--arg", "size=tiny", "--arg", "n_layers=3")
    assert (code, out) == (4, "")
    assert "another model" in err and "layers.2" in err


def test_edited_decision_is_stale_then_updated(plan, copy, tmp_path):
    raw = json.loads(copy)
    micro = raw["decisions"]["micro_batch"]
    assert raw["decisions"]["microbatches"] % 2 == 0 or micro % 2 == 0
    change = (2, 0.5) if raw["decisions"]["microbatches"] % 2 == 0 else (0.5, 2)
    raw["decisions"]["micro_batch"] = int(micro * change[0])
    raw["decisions"]["microbatches"] = int(raw["decisions"]["microbatches"] * change[1])
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    code, _, err = plan("check")
    assert code == 4 and "stale" in err
    assert plan("check", "--update")[0] == 0
    assert plan("check")[0] == 0


# --- never half a file, and Ctrl-C --------------------------------------------------------------


def test_a_failing_write_leaves_the_old_plan(plan, copy, tmp_path, monkeypatch):
    """The disk fills while the new plan is written."""
    real = os.fsync

    def full(number):
        real(number)
        raise OSError(28, "No space left on device")

    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    code, _, err = plan("trace", LLAMA, "--hardware", "h100x16", *TINY)
    assert code == 1
    assert "cannot write" in err and "No space left" in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_interrupt_keeps_the_best_so_far(tmp_path, tmp_path_factory, heeds_interrupts):
    """Ctrl-C in a long solve: exit 130, and a plan that says FEASIBLE with its gap."""
    arguments = ["trace", LLAMA, "--arg", "size=405b", "--hardware", "h100x16384",
                 "--global-batch", "2048", "--effort", "1000000"]  # fmt: skip
    fresh = tmp_path_factory.mktemp("fresh")
    process = subprocess.Popen(
        [sys.executable, "-m", "planner.cli", *arguments], cwd=tmp_path,
        env=environment(str(fresh)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_interrupts,
    )  # fmt: skip
    for _ in range(600):  # until the graph is cached: then it solves
        if list(fresh.rglob("*.graph")) or process.poll() is not None:
            break
        time.sleep(0.1)
    time.sleep(3)
    if process.poll() is not None:
        pytest.skip("solved before it could be interrupted")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err and "FEASIBLE" in err, err
    found = load(str(Path(tmp_path) / "plan.json"))
    assert found.solver.status == "FEASIBLE"
    assert found.solver.bound_us <= found.step_time_us
    assert "405" in out or "h100x16384" in out


def test_an_interrupt_between_recipes_and_search_keeps_the_best_recipe(
    plan, monkeypatch, tmp_path
):
    best_of = tracing._best_of

    def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        return best_of(*given)

    monkeypatch.setattr(tracing, "_best_of", interrupted)
    code, _, err = plan("trace", LLAMA, "--hardware", "h100x16", *TINY)
    assert (code, "interrupted: the best plan so far is kept" in err) == (130, True), err
    assert load(str(tmp_path / "plan.json")).solver.status == "FEASIBLE"


def test_a_base_plan_is_planned_again_for_other_hardware(plan, copy):
    base = "plan.json"
    old = load(base)
    code, out, err = plan("trace", "--hardware", "h100x4", "--base", base,
                          "-o", "new.json")  # fmt: skip
    assert code == 0, err
    new = load("new.json")
    assert new.hardware == "h100x4" and new.decisions.gpus == 4
    assert new.workload == old.workload and new.graph_hash == old.graph_hash
    assert f"--global-batch 16 (of {base})" in out
    code, _, err = plan("trace", "--hardware", "h100x4", "--base", base,
                        "--precision", "fp32")  # fmt: skip
    assert code == 64 and "hint: name the model" in err
    assert plan("trace", "--hardware", "h100x4")[0] == 64
    assert plan("trace", LLAMA)[0] == 64
