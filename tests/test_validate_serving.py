"""`plan validate --serving`: what a row is read as, what is set aside and why, the report."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cost_models.serving_decisions import Serving
from cost_models.serving_engines import load_serving_engine
from ir.errors import UsageError
from planner import cli
from planner.validation import serving as found
from planner.validation.serving_fit import Prior, fit_engine, fitted
from planner.validation.serving_recipes import Recipe, recipe_of
from planner.validation.serving_report import document, text
from planner.validation.serving_rows import plain_name, read_serving

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "vocab_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 16384,
}  # fmt: skip
ROW = {
    "backend": "vllm", "backend_version": "0.19.0", "model_path": "us/Tiny-1B",
    "system": "h100_sxm", "precision": "fp8", "isl": "1024", "osl": "1024", "concurrency": "16",
    "batch_size": "16", "tp_size": "2.0", "pp_size": "1.0", "attention_dp_size": "1.0",
    "moe_tp_size": "1", "moe_ep_size": "1.0", "moe_quant_mode": "fp8",
    "silicon_ttft_ms": "20", "silicon_tpot_ms": "1", "id": "a",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "us--Tiny-1B.json").write_text(json.dumps(CONFIG))
    drafting = {**CONFIG, "num_nextn_predict_layers": 1}
    (tmp_path / "configs" / "us--Drafter.json").write_text(json.dumps(drafting))
    return tmp_path


def table(folder, *changes):
    rows = [{**ROW, "id": f"r{i}", **change} for i, change in enumerate(changes)]
    path = folder / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(folder, *changes):
    return read_serving(table(folder, *changes), folder / "configs")


@pytest.mark.parametrize(("said", "meant"), [
    (("4", "1", "4", "1"), (4, 1, 1)),  # as it stands
    (("8", "1", "1", "8"), (8, 1, 8)),
    (("64", "1", "8", "8"), (8, 1, 8)),  # multiplied by the expert degree
    (("1", "64", "8", "8"), (1, 8, 8)),
    (("4", "1", "2", "2"), (2, 1, 2)),
    (("2", "2", "1", "4"), (1, 2, 2)),  # attention replicas stand in both
    (("1", "8", "1", "8"), (1, 8, 8)),
])  # fmt: skip
def test_degrees_are_read_as_they_ran(folder, said, meant):
    keys = ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    dp = int(said[1])
    change = dict(zip(keys, said)) | {"concurrency": "64", "batch_size": str(64 / dp)}
    (row,) = read(folder, change).rows
    s = row.serving
    assert (s.tp, s.attention_dp, s.ep) == meant and s.replicas == 1
    assert bool(row.notes) == ((int(said[0]), dp) != meant[:2])


@pytest.mark.parametrize(("change", "looked"), [
    ({}, 1),
    ({"backend": "sglang", "system": "b200_sxm"}, 30),
    ({"backend": "sglang", "system": "b200_sxm", "concurrency": "8", "batch_size": "8"}, 10),
    ({"backend": "sglang", "system": "h200_sxm"}, 1),
    ({"backend": "sglang", "system": "b200_sxm", "isl": "2048"}, 1),  # no recipe's load
    ({"backend": "trtllm"}, 1),
])  # fmt: skip
def test_recipes_say_how_often_arrivals_are_looked_for(folder, change, looked):
    (row,) = read(folder, change).rows
    assert row.recipe.looked_every == looked


def test_recipes_say_what_a_step_takes_and_what_it_waits_for():
    even, long = (1024.0, 1024.0), (8192.0, 1024.0)

    def made(version, model, load, precision="fp8", device="b200", **degrees):
        s = Serving(**{"batch": 64, **degrees})
        return recipe_of("trtllm", version, model, device, precision, load, s)

    for tp, load, steps in ((4, even, 20), (8, even, 0), (4, long, 0)):
        assert made("", "llama-3.1-70b", load, tp=tp).gathered_steps == steps
    assert made("", "deepseek-r1", even, tp=8).chunk_tokens == 1152  # 64 + 1024 + 64, at least
    assert made("1.2.0rc6", "deepseek-r1", even, tp=8).gathered_tokens == 0.8 * 8192
    apart = made("1.2.0rc6", "deepseek-r1", long, "fp4", attention_dp=8)
    assert (apart.gathered_ranks, apart.gathered_steps, apart.chunk_tokens) == (8, 60, 8320)
    assert made("1.2", "qwen3-32b", even) == made("1.2", "deepseek-r1", (2048.0, 128.0)) == Recipe()


def test_instances_are_counted_from_their_batch(folder):
    (row,) = read(folder, {"concurrency": "64", "batch_size": "16"}).rows
    assert row.serving.replicas == 4 and row.serving.batch == 64


@pytest.mark.parametrize(("change", "words"), [
    ({"backend": "ours"}, "engine ours has no constants"),
    ({"system": "z9"}, "not in the catalogue"),
    ({"model_path": "x/unheard-of"}, "no configuration of x/unheard-of"),
    ({"concurrency": ""}, "no concurrency"),
    ({"isl": "long"}, "isl is 'long'"), ({"osl": "-3"}, "osl is -3"),
    ({"silicon_tpot_ms": "nan"}, "silicon_tpot_ms is nan"),
    ({"tp_size": "16"}, "16 GPUs an instance"),
    ({"precision": "fp5"}, "precision 'fp5'"),
])  # fmt: skip
def test_rows_that_cannot_be_used_say_why(folder, change, words):
    got = read(folder, {}, change)
    assert len(got.rows) == 1
    ((name, reason),) = got.unfit
    assert name == "r1" and words in reason


def test_names_of_checkpoints_lead_to_their_shape(folder):
    assert plain_name("meta-llama/Meta-Llama-3.1-70B-Instruct-FP8") == "llama-3.1-70b"
    assert len(read(folder, {"model_path": "nvidia/Tiny-1B-NVFP4"}).rows) == 1


def test_formats_are_the_checkpoints_own(folder):
    dense, wide = read(folder, {}, {"precision": ""}).rows
    assert dense.serving.default == "fp8" and dense.serving.format_of("head") == "bf16"
    assert wide.serving.format_of("attention") == "bf16" and wide.serving.kv == "bf16"
    routed = {**CONFIG, "num_local_experts": 8, "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "configs" / "us--Tiny-1B.json").write_text(json.dumps(routed))
    (row,) = read(folder, {"precision": "fp8"}).rows
    assert row.serving.default == "fp4" and row.serving.format_of("attention") == "bf16"


def report(folder, *changes):
    return found.validate_serving(table(folder, *changes), folder / "configs")


def test_a_report_scores_ranks_and_lists(folder):
    slow = {"tp_size": "1", "silicon_tpot_ms": "1.4"}
    got = report(folder, {}, slow, {"backend": "ours"})
    assert got.rows == 3 and len(got.fit) == 2 and len(got.unfit) == 1
    whole = got.classes[0]
    errors = [abs(one.tpot_s / one.row.tpot_s - 1) for one in got.fit]
    assert whole.tpot.mape == pytest.approx(sum(errors) / 2)
    for one in got.fit:
        assert sum(seconds for _, seconds in one.breakdown_s) == pytest.approx(one.tpot_s)
    assert got.ranking[0].same_load[1] == 1
    body = document(got)
    assert body["used"] == 2 and body["unfit"] == [
        {"id": "r2", "reason": "engine ours has no constants"}
    ]
    assert "1  engine ours has no constants" in text(got, "runs.csv")


def test_a_token_quicker_than_its_kernels_is_drafted(folder):
    """Only of a model that can, only the series that shows it, and not its slower twin."""
    quick = {"silicon_tpot_ms": "0.01", "silicon_ttft_ms": "0.1"}
    slow = {"silicon_tpot_ms": "9"}
    plain = report(folder, quick)
    assert len(plain.fit) == 1 and not plain.unfit
    drafter = {"model_path": "us/Drafter"}
    other = {**drafter, "concurrency": "4", "batch_size": "4", "silicon_tpot_ms": "0.9"}
    got = report(folder, drafter | quick, drafter | slow, other, other | {"tp_size": "1"})
    assert {name for name, _ in got.unfit} == {"r0", "r2"}
    assert {one.row.id for one in got.set_aside} == {"r0", "r2"}


def test_a_series_at_its_kernels_drafts_where_another_of_its_release_does(folder):
    """No run pays so little beside its kernels; alone it proves nothing."""
    drafter = {"model_path": "us/Drafter"}
    (one,) = report(folder, drafter).fit
    near = drafter | {"silicon_tpot_ms": str(one.floor_s * 1.1e3)}
    far = drafter | {"silicon_tpot_ms": str(one.floor_s * 2e3), "tp_size": "1"}
    shown = drafter | {"silicon_tpot_ms": "0.001", "silicon_ttft_ms": "0.01", "tp_size": "4"}
    assert not report(folder, near).set_aside
    assert {o.row.id for o in report(folder, near, far, shown).set_aside} == {"r0", "r2"}
    other = shown | {"backend_version": "9.9"}  # of another release
    assert {o.row.id for o in report(folder, near, far, other).set_aside} == {"r2"}


def test_a_cap_on_requests_is_seen_by_littles_law(folder):
    got = report(folder, {"silicon_ttft_ms": "9000", "concurrency": "64", "batch_size": "64"})
    ((_, reason),) = got.unfit
    assert reason == found.CAPPED


def test_what_does_not_fit_is_listed(folder):
    big = {**CONFIG, "hidden_size": 16384, "num_hidden_layers": 40, "intermediate_size": 65536}
    (folder / "configs" / "us--Tiny-1B.json").write_text(json.dumps(big))
    ((_, reason),) = report(folder, {"tp_size": "1"}).unfit
    assert "do not fit 1 GPUs" in reason


def test_the_fit_finds_what_made_the_runs(folder):
    changes = [{"concurrency": str(b), "batch_size": str(b), "tp_size": str(tp)}
               for b in (1, 16, 64) for tp in (1, 2)]  # fmt: skip
    rows = read(folder, *changes).rows
    models, _ = found.models_of(rows)
    truth = replace(
        load_serving_engine("vllm"), start_share=0.7, step_host_s=4e-4, sequence_host_s=1e-5,
        request_host_s=0.05, wait_prompts=0.5, arrival_host_s=3e-3, routed_op_host_s=0.0,
    )  # fmt: skip
    made, _ = found.predict(rows, models, {"vllm": truth})
    rows = [replace(one.row, tpot_s=one.tpot_s, ttft_s=one.ttft_s) for one in made]
    got, of = fit_engine(rows, models, load_serving_engine("vllm"), prior=None)
    part = of(np.array([row.serving.tp == 1 for row in rows]))  # from those alone
    for engine in (got, part):
        again, _ = found.predict(rows, models, {"vllm": engine})
        assert max(abs(one.tpot_s / one.row.tpot_s - 1) for one in again) < 0.01
        assert max(abs(one.ttft_s / one.row.ttft_s - 1) for one in again) < 0.05


def test_a_constant_that_no_run_tells_is_what_engines_have_in_common():
    """Errors of a first constant alone: the second stays where it is held, however it starts."""
    errors = lambda at: np.log(np.array([1.0, 2.0, 3.0]) * at[0] / np.array([2.0, 4.0, 6.0]))  # noqa: E731
    free = (("a", 0.0, 10.0, 0.1), ("b", 0.0, 10.0, 0.1))
    prior = Prior(mean=(1.0, 3.0), spread=(100.0, 1.0))
    for start in (0.0, 9.0):
        values, _ = fitted(errors, np.array([1.0, start]), free, 0.3, prior)
        assert values == pytest.approx([2.0, 3.0], rel=1e-2)


def test_what_no_queue_explains_is_set_aside(folder):
    """Sixteen prompts in flight take some 20 ms; a first token after 1 s waited for no prompt."""
    got = report(folder, {}, {"silicon_ttft_ms": "1000"})
    assert [one.row.id for one in got.set_aside] == ["r1"]
    assert got.unfit == (("r1", found.STALLED),)


def validate(*flags):
    """The exit code of `plan validate`."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["validate", *map(str, flags)])
    return ended.value.code


def test_the_command(folder, capsys):
    path = table(folder, {})
    assert validate("--serving", path, "--configs", folder / "configs", "--json") == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "validation-serving/1"
    assert validate("--serving", path) == 64
    assert validate("--serving", path, "--configs", path) == 1
    (folder / "no.csv").write_text("a,b\n1,2\n")
    assert validate("--serving", folder / "no.csv", "--configs", folder / "configs") == 1
    assert "no table of serving runs" in capsys.readouterr().err
    with pytest.raises(UsageError, match="cannot read"):
        read_serving(folder / "none.csv", folder / "configs")


@pytest.mark.skipif(not os.environ.get("MESHWRIGHT_DATA"), reason="needs the measured figures")
def test_dense_runs_of_real_engines_are_met():
    data = Path(os.environ["MESHWRIGHT_DATA"])
    got = read_serving(data / "serving_runs.csv", data / "model_configs")
    rows = [row for row in got.rows if row.model == "qwen3-32b" and row.engine == "vllm"]
    models, _ = found.models_of(rows)
    ones, _ = found.predict(rows, models, {"vllm": load_serving_engine("vllm")})
    errors = [abs(one.tpot_s / one.row.tpot_s - 1) for one in ones]
    assert len(errors) > 60 and sum(errors) / len(errors) < 0.1
