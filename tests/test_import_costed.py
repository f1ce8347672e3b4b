"""What an import is costed at, and that an export tells the same before it is written."""

import json
from pathlib import Path

import pytest
from test_import import SCRIPT
from tiny_models import graph_of

from cost_models.units import format_bytes, format_seconds
from planner.export.deepspeed import OURS
from planner.importing import facts


def every_model_is_llama(monkeypatch):
    for module in ("objectives", "capturing"):  # the former imports the latter's
        monkeypatch.setattr(f"planner.{module}.capture", lambda *_: graph_of("llama"))


def test_a_configuration_is_costed_and_compared(plan, tmp_path, monkeypatch):
    every_model_is_llama(monkeypatch)
    tmp = tmp_path
    (tmp / "ds.json").write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "surprise": 1,
    }))  # fmt: skip
    words = ("--from", "deepspeed", "--model", "llama.py", "--hardware", "h100x8", "--seq-len",
             "128", "-o", str(tmp / "imported.json"))  # fmt: skip
    code, out, err = plan("import", str(tmp / "ds.json"), *words)
    assert code == 0, err
    assert "ZeRO-2" in out and "not understood: surprise 1" in out and "recompute" in out
    code, out, _ = plan("show", str(tmp / "imported.json"), "--json")
    found = json.loads(out)
    assert found["workload"]["engine"] == "deepspeed"
    assert found["decisions"]["microbatches"] == 2 and found["decisions"]["shard"] == 8
    code, out, err = plan("import", str(tmp / "ds.json"), *words, "--global-batch", "7")
    assert code == 64 and "--global-batch 7, but" in err


def test_an_imported_plan_is_exported_as_it_was(plan, tmp_path, monkeypatch):
    every_model_is_llama(monkeypatch)
    layers = facts(graph_of("llama"), "bf16", 8).layers
    text = SCRIPT.replace("--num-layers 8", f"--num-layers {layers}").replace("2048", "128")
    (tmp_path / "run.sh").write_text(text)
    words = ("--from", "megatron", "--model", "llama.py", "--hardware", "h100x8")
    code, _, err = plan("import", "run.sh", *words)
    assert code == 0, err
    for name in ("a", "b"):  # what Megatron-LM does over tp is in the plan: nothing is lost
        code, _, err = plan("export", "imported.json", "--to", "megatron", "-o", name)
        assert code == 0 and "megatron: exact" in err, err
        plan("import", f"{name}/megatron_args.sh", *words)
    first, second = ((tmp_path / n / "megatron_args.sh").read_text() for n in "ab")
    assert first == second


def test_what_an_engine_takes_otherwise_is_told_by_export_and_by_import(
    plan, tmp_path, monkeypatch
):
    """A plan of one engine for another: the export tells what its import is costed at, and whether
    it fits, before anything is written."""
    every_model_is_llama(monkeypatch)
    pins = ("tp=1", "zero=2", "micro_batch=4", "recompute=none", "compile=off")
    trace = ("trace", "llama.py", "--seq-len", "128", "--global-batch", "32",
             *(word for pin in pins for word in ("--fix", pin)))  # fmt: skip
    back = ("import", "deepspeed.json", "--from", "deepspeed", "--model", "llama.py", "--seq-len",
            "128")  # fmt: skip
    taken = []
    for path, words in (("plan.json", trace), ("imported.json", back)):
        assert plan(*words, "--hardware", "h100x8", "-o", path)[0] == 0
        estimate = json.loads(plan("show", path, "--json")[1])["estimate"]
        taken.append(estimate["peak_memory_bytes"])
        if path == "plan.json":
            code, _, said = plan("export", "--to", "deepspeed")
            assert code == 0 and "deepspeed: exact" in said
    mine, theirs = taken
    assert f"under DeepSpeed: {format_bytes(theirs)} of" in said
    assert f"(the plan: {format_bytes(mine)}," in said
    assert theirs - mine > 4e9  # blocks that its allocator keeps

    Path("small.toml").write_text(
        f'base = "h100"\ncount = 8\n[device]\nmemory_bytes = "{(mine + theirs) // 2}B"\n'
    )
    assert plan(*trace, "--hardware", "small.toml")[0] == 0
    code, _, err = plan("export", "--to", "deepspeed", "-o", "new")
    assert code == 64 and "memory (approximate): does not fit under DeepSpeed: " in err
    assert not Path("new").exists()
    code, _, err = plan("export", "--to", "deepspeed", "--lossy")
    assert code == 0 and "plan trace --engine deepspeed plans for it" in err
    assert "lost: memory" in json.loads(Path("deepspeed.json").read_text())[OURS][2]
    code, _, err = plan(*back, "--hardware", "small.toml", "-o", "no.json")
    assert code == 3 and f"needs {theirs / 1e9:.1f} GB" in err and not Path("no.json").exists()
    assert "--fix" not in err, err
    assert "plan trace llama.py --hardware small.toml --engine deepspeed --global-batch 32" in err


@pytest.mark.parametrize(
    ("target", "pins", "fix", "told"),
    [
        ("torchtitan-toml", "tp=1 pp=1 cp=1 zero=3 recompute=full:1", "", "(recompute=full)"),
        ("accelerate", "tp=2 pp=1 cp=1 zero=3 shard=4 sequence_parallel=on recompute=none"
         " grad_dtype=bf16 place:layers.*.feed_forward.w1.weight=R", "micro_batch=1 microbatches=8",
         "(sequence_parallel=off, its layout over tp)"),
    ],
)  # fmt: skip
def test_an_export_costs_the_configuration_that_it_writes(
    plan, tmp_path, monkeypatch, target, pins, fix, told
):
    """What is written for a decision that the engine does in part, and not the plan's: as its
    import costs it."""
    every_model_is_llama(monkeypatch)
    engine = "torchtitan" if target == "torchtitan-toml" else "native-compiled"
    code = plan("trace", "llama.py", "--hardware", "h100x8", "--seq-len", "128", "--global-batch",
                "32", "--engine", engine, *(w for p in (pins + " micro_batch=1 compile=on").split()
                        for w in ("--fix", p)))  # fmt: skip
    assert code[0] == 0, code
    _, wrote, said = plan("export", "--to", target, "--lossy")
    assert told in said, said
    back = plan("import", wrote.split()[1], "--from", target.partition("-")[0], "--model",
                "llama.py", "--hardware", "h100x8", "--seq-len", "128", "-o", "back.json",
                *(w for p in fix.split() for w in ("--fix", p)))  # fmt: skip
    assert back[0] == 0, back
    mine, theirs = (json.loads(plan("show", path, "--json")[1])["estimate"]
                    for path in ("plan.json", "back.json"))  # fmt: skip
    assert (
        f", as the file has it {told}: {format_bytes(theirs['peak_memory_bytes'])} of 85.0 GB a"
        f" GPU, {format_seconds(theirs['step_time_s'])} a step"
        f" (the plan: {format_bytes(mine['peak_memory_bytes'])},"
    ) in said
    assert mine["step_time_s"] != theirs["step_time_s"]
