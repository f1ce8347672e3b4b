"""`plan validate`: metrics by hand, runs end to end, what is skipped and why, the JSON contract."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cost_models.validation.metrics import kendall_tau, scores
from cost_models.validation.op_table import read_table
from ir.errors import PlanError
from planner import cli
from planner.validation import report as view
from planner.validation import run_checks, running
from planner.validation.rows import read_runs
from planner.validation.running import LeftOut, Row, predict_runs
from planner.validation.scoring import report_of
from planner.validation.shipped import ACCURACY, PUBLISHED, cross_validated

DATA = os.environ.get("MESHWRIGHT_DATA", "")


def raw_run(name="a", **changes):
    """A small run as a file has it. changes: by dotted name, None to leave a field out."""
    raw = {
        "id": name, "source": {"title": "ours", "table": "1", "path": "none"}, "group": "ours",
        "framework": "Megatron-Bridge / Megatron-Core",
        "model": {"name": "tiny", "layers": 2, "hidden": 256, "heads": 4, "kv_heads": 2,
                  "ffn_hidden": 512, "vocab": 1024, "seq_len": 512},
        "hardware": {"gpu": "h100-sxm", "num_gpus": 8, "gpus_per_node": 8},
        "config": {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "zero_or_fsdp": "zero1", "micro_batch": 2,
                   "global_batch_sequences": 32, "recompute": "none", "precision": "bf16"},
        "measured": {"step_time_s": 0.05},
    }  # fmt: skip
    for key, value in changes.items():
        *path, last = key.split("__")
        place = raw
        for part in path:
            place = place[part]
        place[last] = value
        if value is None:
            del place[last]
    return raw


def written(path, *rows):
    path.write_text("# runs\n" + "".join(f"- {json.dumps(row)}\n" for row in rows))
    return path


def row(name, predicted=1.0, measured=1.0, **changes):
    """A predicted run of made-up numbers."""
    plain = Row(
        id=name, words="a model", predicted_s=predicted, measured_s=measured, tokens=100,
        breakdown_s=(("compute", predicted),), predicted_bytes=50, measured_bytes=None,
        capacity_bytes=100, oom=False, classes=(("model", "dense"), ("framework", "megatron")),
        defaults=(), subject="s", workload="w", configuration=name,
    )  # fmt: skip
    return replace(plain, **changes)


# --- arithmetic -----------------------------------------------------------------------------------


def test_scores_by_hand():
    # errors +10%, -20%, 0, +30%: mean .15, median of .1 .2 0 .3 = .15, bias .05
    found = scores([(1.1, 1.0), (1.6, 2.0), (3.0, 3.0), (5.2, 4.0)])
    assert found.n == 4
    assert found.mape == pytest.approx(0.15)
    assert found.median == pytest.approx(0.15)
    assert found.bias == pytest.approx(0.05)
    assert found.p90 == pytest.approx(0.27)  # between .2 and .3, at 2.7 of 3 steps


def test_kendall_tau_by_hand():
    # measured 1 2 3: of three pairs two are ordered alike, one is not
    assert kendall_tau([[(1, 1), (3, 2), (2, 3)]]) == (pytest.approx(1 / 3), 3)
    # 1 and 1.02 are within 3%, a tie: left out
    assert kendall_tau([[(5, 1.0), (1, 1.02)]])[1] == 0


def test_classes_count_a_hybrid_twice_and_all_runs_once():
    hybrid = (("model", "moe"), ("model", "hybrid"), ("framework", "megatron"))
    report = report_of([row("a", 1.1), row("b", 0.8, classes=hybrid), row("c", 1, None)])
    found = {c.name: c.scores for c in report.classes}
    assert {name: s.n for name, s in found.items()} == {
        "all": 2, "dense": 1, "hybrid": 1, "moe": 1, "megatron": 2,
    }  # fmt: skip
    assert found["all"].bias == pytest.approx(-0.05)
    assert len(report.used) == 3 and len(report.timed) == 2


def test_memory_is_scored_by_framework_and_verdicts_by_capacity():
    torch = (("model", "dense"), ("framework", "torchtitan"))
    report = report_of([
        row("a", measured_bytes=40), row("b", measured_bytes=100, classes=torch),
        row("over", predicted_bytes=101), row("far", predicted_bytes=103),
        row("caught", measured=None, oom=True, predicted_bytes=120),
        row("near", measured=None, oom=True, predicted_bytes=96),
        row("missed", measured=None, oom=True, predicted_bytes=94),
    ])  # fmt: skip
    found = {c.name: c.scores for c in report.memory}
    assert found["megatron"].bias == pytest.approx(0.25)
    assert found["torchtitan"].bias == pytest.approx(-0.5)
    assert found["all"].mape == pytest.approx(0.375)
    v = report.verdicts
    assert (v.caught, v.near) == (("caught",), ("caught", "near"))
    assert (v.ran, v.refused, v.wrong) == (4, ("over", "far"), ("far",))


def test_ranking_compares_configurations_not_repetitions():
    rows = [
        row("a", 1.0, 1.0), row("b", 2.0, 2.0),
        row("a2", 1.0, 9.0, configuration="a"), row("a3", 1.0, 1.1, configuration="a"),
        row("other", 1.0, 5.0, subject="another model"),
    ]  # fmt: skip
    report = report_of(rows)
    assert (report.ranking.tau, report.ranking.pairs, report.ranking.groups) == (1, 1, 1)


def test_ranking_is_of_seconds_a_token():
    # twice the batch takes 1.5 times as long: it is the better configuration
    rows = [row("a", 1.0, 1.0), row("b", 1.6, 1.5, tokens=200, workload="other")]
    report = report_of(rows)
    assert report.ranking.tau == 1
    assert report.same_workload.tau is None


# --- reading --------------------------------------------------------------------------------------


def test_the_shipped_table_reads_and_cites(cache):
    runs = read_runs(PUBLISHED)
    assert 60 <= len(runs) <= 100
    assert len({run.id for run in runs}) == len(runs)
    raws = [json.loads(line[2:]) for line in PUBLISHED.read_text().splitlines() if line[:1] == "-"]
    assert len(raws) == len(runs)
    for raw in raws:
        assert all(raw["source"][key] for key in ("title", "table", "path")), raw["id"]
        assert len(raw.get("notes", "")) < 80  # our own few words, not the source's
    kinds = {(r.is_moe, bool(r.model.get("hybrid"))) for r in runs}
    assert kinds == {(False, False), (True, False), (True, True)}
    assert {r.config["precision"] for r in runs} == {"bf16", "fp16", "fp8", "nvfp4"}
    assert any(r.oom for r in runs) and any(r.peak_bytes for r in runs)


def test_every_shipped_run_can_be_laid_out():
    for run in read_runs(PUBLISHED):
        assert running._configured(run).run is run


def test_the_form_in_the_documentation_reads(tmp_path):
    text = (Path(cli.__file__).parents[1] / "docs/accuracy.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("- {")]
    path = tmp_path / "mine.yaml"
    path.write_text(line + "\n")
    (run,) = read_runs(path)
    assert running._configured(run).decisions.dp == 8


@pytest.mark.skipif(not DATA, reason="needs MESHWRIGHT_DATA")
def test_shipped_figures_are_those_of_the_data():
    theirs = {run.id: run for run in read_runs(Path(DATA) / "training_runs.yaml")}
    for ours in read_runs(PUBLISHED):
        other = theirs[ours.id]
        for name in ("step_time_s", "mfu", "flop_per_s", "peak_bytes", "oom", "framework"):
            assert getattr(ours, name) == getattr(other, name), (ours.id, name)


@pytest.mark.parametrize("line", ["- {", "- 5", "no run"])
def test_a_broken_line_is_named(plan, tmp_path, line):
    path = written(tmp_path / "runs.yaml", raw_run())
    path.write_text(path.read_text() + line + "\n")
    code, out, err = plan("validate", "--runs", path)
    assert (code, out) == (1, "")
    assert "line 3 is no run: " in err and "expected one JSON object a line" in err
    assert "Error" not in err  # words, not Python's


def test_a_file_that_is_not_there_or_is_no_text(plan, tmp_path):
    code, out, err = plan("validate", "--runs", "none.yaml")
    assert (code, out) == (1, "") and "cannot read none.yaml" in err
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    code, _, err = plan("validate", "--runs", "binary")
    assert code == 1 and "binary is no text" in err


def test_cross_validated_figures_are_read_where_there_are_any(tmp_path):
    assert cross_validated(tmp_path / "none.toml") is None
    path = tmp_path / "accuracy.toml"
    path.write_text(
        'note = "by group"\n[classes.all]\nn = 3\nmape = 0.1\nmedian = 0.1\nbias = 0\np90 = 0.2\n'
    )
    found = cross_validated(path)
    assert found and found.classes[0][1].p90 == 0.2
    path.write_text('note = "by group"\n[classes.all]\nn = 3\n')
    with pytest.raises(PlanError, match="no cross-validated figures"):
        cross_validated(path)


@pytest.mark.skipif(not ACCURACY.exists(), reason="no cross-validated figures are shipped")
def test_shipped_cross_validated_figures_read():
    found = cross_validated()
    assert found and dict(found.classes)["all"].n > 0


# --- skipping -------------------------------------------------------------------------------------


def test_every_run_that_is_left_out_says_why(monkeypatch, tmp_path, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    path = written(
        tmp_path / "runs.yaml",
        raw_run("fine"),
        raw_run("no layers", model__layers=None),
        {"id": "no model"},
        raw_run("layers 1", model__layers=1, config__pp=2),
        raw_run("tp 3", config__tp=3),
        raw_run("no such device", hardware__gpu="abacus"),
        raw_run("words", config__tp="eight"),
        raw_run("no count", hardware__num_gpus=None),
        raw_run("no time", measured__step_time_s=-1),
        raw_run("no such recompute", config__recompute="some"),
        raw_run("fine"),
    )
    found = predict_runs(read_runs(path))
    assert isinstance(found[0], Row) and len(found) == 11
    reasons = {o.id: o.reason for o in found if isinstance(o, LeftOut)}
    assert len(reasons) == 10
    for name, words in (
        ("no layers", "model.layers is not stated"), ("no model", "model is not stated"),
        ("layers 1", "2 x 1 stages for 1 layers"), ("tp 3", "does not divide 8 GPUs"),
        ("no such device", "abacus"), ("words", "a field is missing or of another form"),
        ("no count", "num_gpus"), ("no time", "is no time"),
        ("no such recompute", "'some' is not known"),
        ("fine", "id is that of an earlier row"),
    ):  # fmt: skip
        assert words in reasons[name], (name, reasons[name])


def test_a_fault_of_ours_ends_only_its_run(monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)

    def broken(case):
        raise AssertionError("cannot be")

    monkeypatch.setattr(running, "_predicted", broken)
    found = predict_runs(read_runs(PUBLISHED)[:2], processes=1)
    assert [o.reason for o in found] == ["internal: AssertionError: cannot be"] * 2


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    return written(
        tmp_path / "three.yaml",
        raw_run("timed", measured__peak_memory_gb=4.0),
        raw_run("fp8", config__precision="fp8", config__recompute=None,
                measured__step_time_s=0.01),
        raw_run("oom", measured=None, outcome="oom", config__micro_batch=4),
    )  # fmt: skip


def test_json_has_the_contract_and_the_same_bytes_each_time(plan, three):
    code, out, err = plan("validate", "--runs", three, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["rows"], found["used"], found["skipped"]) == (3, 3, [])
    assert set(found["classes"]) == {
        "all", "dense", "H100", "megatron", "bf16", "fp8", "recompute stated",
        "recompute unstated",
    }  # fmt: skip
    for values in found["classes"].values():
        assert list(values) == ["n", "mape", "median", "bias", "p90"]
    assert found["classes"]["all"]["n"] == 2
    assert [p["id"] for p in found["predictions"]] == ["timed", "fp8", "oom"]
    timed, fp8, oom = found["predictions"]
    assert timed["measured"] == 0.05 and oom["measured"] is None and oom["oom"]
    assert math.isclose(sum(timed["breakdown_s"].values()), timed["predicted"], rel_tol=1e-9)
    assert timed["measured_bytes"] == 4 * 2**30
    assert "recompute = the least that fits" in fp8["defaults"]
    errors = [p["predicted"] / p["measured"] - 1 for p in (timed, fp8)]
    mape = sum(map(abs, errors)) / 2
    assert found["classes"]["all"]["mape"] == pytest.approx(mape, abs=1e-5)
    assert found["memory"]["verdicts"]["oom"] == 1
    assert found["defaults"]["recompute = the least that fits"] == 1
    assert plan("validate", "--runs", three, "--json")[1] == out


def test_text_is_80_columns_and_says_what_is_in_sample(plan, three):
    code, out, _ = plan("validate", "--runs", three)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "3 runs of three.yaml: 3 predicted, 0 skipped" in out
    for words in ("MAPE", "in-sample", "Kendall tau", "out of memory", "worst", "assumed"):
        assert words in out, words


def test_verbose_has_a_line_a_run_on_stderr(plan, three):
    _, out, err = plan("validate", "--runs", three, "-v")
    assert [line.split()[0] for line in err.splitlines()] == ["timed", "fp8", "oom"]
    assert out == plan("validate", "--runs", three)[1]


def test_any_number_of_processes_finds_the_same(monkeypatch, tmp_path, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    rows = [
        raw_run(f"{i}", config__micro_batch=1 + i % 2, model__layers=1 + i % 3) for i in range(6)
    ]
    runs = read_runs(written(tmp_path / "runs.yaml", *rows))
    lines = []
    alone = predict_runs(runs, lines.append, processes=1)
    assert lines[-1] == "6 of 6 runs"
    assert alone == predict_runs(runs, processes=2)
    assert all(isinstance(o, Row) for o in alone)


def test_a_report_without_cross_validated_figures_says_so(three, monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    report = report_of(predict_runs(read_runs(three)))
    assert view.document(report, None)["cross_validated"] is None
    text = view.text(report, "three.yaml", None)
    assert "cross-validated figures: none are shipped" in text


# --- kernels --------------------------------------------------------------------------------------


@pytest.fixture
def kernels(tmp_path):
    """A GEMM of each dtype of two devices, and one of a device that nobody knows."""
    lines = ["device,op,kernel,dtype,M,N,K,latency_us"]
    for device in ("H100-SXM5-80GB", "A100-SXM4-80GB", "Abacus"):
        lines.append(f"{device},gemm,torch.nn.functional.linear,bfloat16,4096,4096,4096,300")
    path = tmp_path / "kernels.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_kernels_are_predicted_and_scored(plan, kernels):
    code, out, _ = plan("validate", "--ops", kernels, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["rows"], found["used"]) == (3, 2)
    assert found["skipped"][0]["id"] == "line 4" and "Abacus" in found["skipped"][0]["reason"]
    assert {"all", "h100", "a100"} <= set(found["classes"])
    for one in found["predictions"]:
        assert one["measured"] == pytest.approx(300e-6)
        assert 50e-6 < one["predicted"] < 2e-3
    assert plan("validate", "--ops", kernels, "--json")[1] == out
    text = plan("validate", "--ops", kernels)[1]
    assert max(map(len, text.splitlines())) <= 80
    assert "3 kernels of kernels.csv: 2 predicted, 1 skipped" in text


def test_runs_and_kernels_together(plan, kernels, three):
    code, out, _ = plan("validate", "--runs", three, "--ops", kernels, "--json")
    found = json.loads(out)
    assert code == 0 and (found["rows"], found["ops"]["rows"]) == (3, 3)
    _, text, _ = plan("validate", "--runs", three, "--ops", kernels)
    assert "3 runs of three.yaml" in text and "3 kernels of kernels.csv" in text


@pytest.mark.parametrize("content", [None, b"a,b\n1,2\n", b"\xff\xfe\x00"])
def test_a_table_of_kernels_that_is_none(plan, tmp_path, content):
    if content is not None:
        (tmp_path / "ops.csv").write_bytes(content)
    code, out, err = plan("validate", "--ops", "ops.csv")
    assert (code, out) == (1, "")
    assert "ops.csv" in err and "internal" not in err


def test_every_kernel_that_is_left_out_says_why(plan, tmp_path):
    head = "device,op,kernel,dtype,M,N,K,num_gpus,bytes,tokens,hidden,inter,topk,experts,latency_us"
    gemm = "H100-SXM5-80GB,gemm,torch.nn.functional.linear"
    rows = (
        (f"{gemm},int3,8,64,64,,,,,,,,9", "dtype 'int3' of gemm is not known"),
        (f"{gemm},bfloat16,-8,64,64,,,,,,,,9", "M is -8"),
        (f"{gemm},bfloat16,nan,64,64,,,,,,,,9", "M is nan"),
        (f"{gemm},bfloat16,1e30,64,64,,,,,,,,9", "M is 1e30"),
        (f"{gemm},bfloat16,many,64,64,,,,,,,,9", "M is 'many', no number"),
        (f"{gemm},bfloat16,,64,64,,,,,,,,9", "no M"),
        (f"{gemm},bfloat16,0,64,64,,,,,,,,9", "M is 0"),
        (f"{gemm},bfloat16,8,64,64,,,,,,,,-9", "latency_us is -9"),
        (f"{gemm},bfloat16,8,64,64,,,,,,,,inf", "latency_us is inf"),
        (f"{gemm},bfloat16,8,64,64", "more or fewer than the header's"),
        ("H100-SXM5-80GB,sort,x,bfloat16,8,64,64,,,,,,,,9", "unknown op 'sort'"),
        ("H100-SXM5-80GB,nccl_all_reduce,NCCL,int3,,,,8,64,,,,,,9", "dtype 'int3'"),
        ("H100-SXM5-80GB,nccl_all_reduce,NCCL,half,,,,12,64,,,,,,9", "h100x12 fills no whole"),
        ("H100-SXM5-80GB,moe_fused_mlp,x,bfloat16,,,,,,8,64,64,8,4,9", "topk 8 is more than"),
    )
    path = tmp_path / "ops.csv"
    text = ["# a comment", head, f"{gemm},fp16,4096,4096,4096,,,,,,,,300", *(r for r, _ in rows)]
    path.write_text("\n".join(text) + "\n")
    code, out, _ = plan("validate", "--ops", path, "--json")
    found = json.loads(out)
    assert (code, found["rows"], found["used"]) == (0, 15, 1)
    for (row_, words), skipped in zip(rows, found["skipped"], strict=True):
        assert words in skipped["reason"], (row_, skipped)
    assert [s["id"] for s in found["skipped"]] == [f"line {n}" for n in range(4, 18)]
    assert found["mapped"] == [{"said": "dtype fp16 of gemm", "costed_as": "bfloat16"}]
    keys = {"rows", "used", "skipped", "classes", "memory", "predictions"}
    assert keys <= set(found) and set(found["skipped"][0]) == {"id", "reason"}
    text = plan("validate", "--ops", path)[1]
    assert "dtype fp16 of gemm: bfloat16" in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "is empty"), ("device,op,kernel,dtype,latency_us\n", "has no kernels"),
     ("device,op,dtype,M\n1,2,3,4\n", "no kernel, latency_us"),
     ("device,op,op,kernel,dtype,latency_us\n1,2,2,3,4,5\n", "op twice")],
)  # fmt: skip
def test_what_a_table_of_kernels_lacks_is_said(plan, tmp_path, content, words):
    (tmp_path / "ops.csv").write_text(content)
    code, out, err = plan("validate", "--ops", "ops.csv")
    assert (code, out) == (1, "") and words in err


def test_no_file_is_silently_left_aside(plan, kernels, three, tmp_path):
    for words in (("--runs", three, "--runs", three), ("--ops", kernels, "--ops", kernels),
                  ("--runs", ""), ("--ops", "")):  # fmt: skip
        code, out, err = plan("validate", *words)
        assert (code, out) == (64, "") and words[0] in err, words
    code, out, err = plan("validate", "--runs", three, "--ops", tmp_path)
    assert (code, out) == (1, "") and "cannot read" in err  # before any run was predicted
    _, _, err = plan("validate", "--runs", three, "--ops", kernels, "-v")
    assert [line.split()[0] for line in err.splitlines()] == ["timed", "fp8", "oom", "line", "line"]


def test_runs_whose_numbers_cannot_be_are_left_out_in_order(plan, tmp_path):
    bad = (
        ("int3", {"config__precision": "int3"}, "config.precision 'int3' is not known"),
        ("width", {"model__hidden": -256}, "model.hidden is -256"),
        ("half", {"model__layers": 2.5}, "model.layers is 2.5"),
        ("long", {"model__seq_len": 10**12}, "model.seq_len is 1000000000000"),
        ("truth", {"config__tp": True}, "config.tp is true"),
        ("batch", {"config__global_batch_sequences": -4}, "global_batch_sequences is -4"),
        ("micro", {"config__micro_batch": -1}, "config.micro_batch is -1"),
        ("gpus", {"hardware__num_gpus": -8}, "hardware.num_gpus is -8"),
        ("peak", {"measured__peak_memory_gb": -3}, "measured.peak_memory_gb is -3, expected"),
        ("words", {"measured__peak_memory_gb": "much"}, "measured.peak_memory_gb is 'much'"),
        ("rate", {"measured": {"tokens_per_s_per_gpu": -5}}, "tokens_per_s_per_gpu is -5"),
    )
    rows = [raw_run(name, **changes) for name, changes, _ in bad]
    path = written(tmp_path / "runs.yaml", raw_run("first"), *rows, raw_run("last"))
    code, out, _ = plan("validate", "--runs", path, "--json")
    found = json.loads(out, parse_constant=pytest.fail)  # no NaN
    assert (code, found["rows"], found["used"]) == (0, 13, 2)
    assert [p["id"] for p in found["predictions"]] == ["first", "last"]
    for (name, _, words), skipped in zip(bad, found["skipped"], strict=True):
        assert skipped["id"] == name and words in skipped["reason"], skipped


def test_no_shipped_run_is_left_out_for_its_numbers():
    assert [run.id for run in read_runs(PUBLISHED) if run_checks.reason_of(run)] == []


@pytest.mark.skipif(not DATA, reason="needs MESHWRIGHT_DATA")
def test_nothing_of_the_data_is_left_out_for_its_numbers_or_dtypes():
    runs = read_runs(Path(DATA) / "training_runs.yaml")
    assert [run.id for run in runs if run_checks.reason_of(run)] == []
    assert read_table(Path(DATA) / "measured_ops.csv").skipped == ()
