"""Rows of users' files: each value that cannot be is named, each that is read otherwise listed."""

import pytest
from test_validate import raw_run, written

from cost_models.validation.op_table import read_table
from ir.errors import PlanError
from planner.validation import run_checks, running
from planner.validation.rows import read_runs

CANNOT_BE = (
    ({"config__tp": 0}, "config.tp is 0, expected a whole number, 1 to 1e9"),
    ({"model__layers": 0}, "model.layers is 0, expected"),
    ({"model__seq_len": 0}, "model.seq_len is 0, expected"),
    ({"model__kv_heads": 0}, "model.kv_heads is 0, expected"),
    ({"hardware__num_gpus": 0}, "hardware.num_gpus is 0, expected"),
    ({"model": "a llama"}, "model is 'a llama', expected an object"),
    ({"measured": [1]}, "measured is [1], expected an object"),
    ({"hardware__gpu": 100}, "hardware.gpu is 100, expected a name"),
    ({"config__dp": 4}, "dp 4 is not 8 GPUs / (tp 1 x pp 1 x cp 1)"),
    ({"config__ep": 8}, "config.ep is 8, and model.moe is not stated"),
    ({"config__schedule": "zigzag"}, "config.schedule 'zigzag' is not known: 1F1B, "),
    ({"config__recompute": "unstated"}, "config.recompute 'unstated' is not known"),
    ({"config__fsdp_strategy": "SOME"}, "config.fsdp_strategy 'SOME' is not known"),
    ({"config__zero_or_fsdp": [1]}, "config.zero_or_fsdp is [1], expected a word"),
    ({"config__sequence_parallel": "false"}, "'false', expected true or false"),
    ({"config__offload": "optimizer"}, "runs that offload are not predicted"),
    ({"config__micro_batch": 3, "config__global_batch_sequences": 8},
     "micro_batch 3 is more than the 1 of a data rank"),
    ({"config__micro_batch": 0.5}, "config.micro_batch is 0.5"),
    ({"config__global_batch_sequences": 7}, "global_batch_sequences 7 is no multiple of dp 8"),
    ({"model__hidden": 1024, "model__heads": 7, "model__kv_heads": 8},
     "model.heads 7 is no multiple of model.kv_heads 8"),
    ({"model__heads": 6}, "model.hidden 256 is no multiple of model.heads 6"),
    ({"model__attention": "none at all"}, "model.attention 'none at all' is not known"),
    ({"model__hybrid": "mamba2"}, "model.hybrid is predicted with model.moe only"),
    ({"model__moe": True}, "model.moe is true, expected an object"),
    ({"model__moe": {}}, "model.moe.experts is not stated"),
    ({"model__moe": {"experts": 4, "top_k": 8, "expert_ffn": 64}},
     "model.moe.top_k 8 is more than model.moe.experts 4"),
    ({"model__moe": {"experts": 4, "top_k": 2, "expert_ffn": 64}, "model__dense_layers": 3},
     "model.dense_layers is 3, more than model.layers"),
    ({"measured": {"mfu_pct": 140}}, "measured.mfu_pct is 140, over 100%"),
    ({"measured": {"mfu_pct": 0}}, "measured.mfu_pct is 0, expected a number above 0"),
    ({"measured": {"tflops_per_gpu": 1200}}, "tflops_per_gpu is 1200, over the 989.4 of the"),
    ({"measured": {"step_time_s": True}}, "measured.step_time_s is true"),
    ({"measured": {"step_time_s": 10**400}}, "measured.step_time_s is 1000"),
    ({"outcome": "oom"}, "outcome is oom, yet a step was measured"),
    ({"outcome": "lost"}, "outcome 'lost' is not known"),
)  # fmt: skip


def left_out_for(run):
    """Why a run is not predicted, "" where it is laid out."""
    made = running._guarded(run.id, running._configured, run)
    return run_checks.reason_of(run) or getattr(made, "reason", "")


@pytest.mark.parametrize(("changes", "words"), CANNOT_BE, ids=[words for _, words in CANNOT_BE])
def test_what_cannot_be_is_a_reason_that_names_it(tmp_path, changes, words):
    (run,) = read_runs(written(tmp_path / "runs.yaml", raw_run(**changes)))
    assert words in left_out_for(run)


def test_what_is_read_as_something_near_is_listed(tmp_path):
    pipeline = {"hardware__num_gpus": 16, "config__pp": 2, "model__layers": 4}
    routed = {"experts": 8, "top_k": 2, "expert_ffn": 64, "sharing": 1}
    for changes, words in (
        ({"config__flux": 3}, "config.flux is not known here: ignored"),
        ({"model__depth": 3}, "model.depth is not known here: ignored"),
        ({"wall": 3}, "wall is not known here: ignored"),
        ({"model__moe": routed}, "model.moe.sharing is not known here: ignored"),
        ({"model__moe": routed, "config__ep": None}, "ep = 1"),
        ({"config__mixed_precision_mode": "PURE"}, "config.mixed_precision_mode is not read"),
        ({"config__micro_batch": 3}, "micro_batch = 2, as 3 does not divide 4"),
        ({"config__virtual_pp": 2}, "virtual_pp = 1, not 2: there is no pipeline"),
        ({**pipeline, "config__virtual_pp": 3}, "virtual_pp = 2, not 3: 4 layers, 2 micro-batches"),
        ({**pipeline, "config__schedule": "1F1B interleaved"},
         "virtual_pp = 1, though the schedule is interleaved"),
        ({**pipeline, "config__schedule": "1F1B", "config__virtual_pp": 2},
         "schedule = interleaved, as virtual_pp says"),
        ({"config__fsdp_shard_group": 4}, "fsdp_shard_group = 8, not 4"),
        ({"hardware__gpus_per_node": 3}, "gpus_per_node = 2, as 3 does not divide 8 GPUs"),
        ({"config__tp": None}, "tp = 1"),
    ):  # fmt: skip
        (run,) = read_runs(written(tmp_path / "runs.yaml", raw_run(**changes)))
        assert not left_out_for(run), (words, left_out_for(run))
        assert words in running._configured(run).defaults, words
    (plain,) = read_runs(written(tmp_path / "runs.yaml", raw_run()))
    assert plain.unread == ()


def test_a_source_may_be_words(tmp_path):
    (run,) = read_runs(written(tmp_path / "runs.yaml", raw_run(source="a paper")))
    assert run.source == "a paper" and not left_out_for(run)


@pytest.mark.parametrize(
    "line", ['- {"id": }', "- [1, 2]", "- " + "[" * 100_000, "- " + "9" * 9999],
    ids=["broken", "list", "deep", "long"],
)  # fmt: skip
def test_what_is_no_object_is_said_in_words(tmp_path, line):
    (tmp_path / "runs.yaml").write_text(line + "\n")
    with pytest.raises(PlanError) as fault:
        read_runs(tmp_path / "runs.yaml")
    assert "line 1 is no run: " in fault.value.what and "Error" not in fault.value.what
    if line[2] == "{":
        assert "no JSON from column 10 on: Expecting value" in fault.value.what


def test_attention_and_mixtures_whose_sizes_cannot_be_are_left_out(tmp_path):
    head = ("device,op,kernel,dtype,batch,q_len,kv_len,heads,kv_heads,head_dim,tokens,hidden,inter,"
            "topk,experts,moe_tp,moe_ep,latency_us")  # fmt: skip
    prefill = "H100-SXM5-80GB,attn_prefill,fa3,bfloat16,1,1024,,32"
    moe = "H100-SXM5-80GB,moe_fused_mlp,x,bfloat16,,,,,,,64,512,768,2,8"
    rows = (
        (f"{prefill},8,0,,,,,,,,50", "head_dim is 0"),
        (f"{prefill},3,128,,,,,,,,50", "heads 32 is no multiple of kv_heads 3"),
        (f"{prefill},0,128,,,,,,,,50", "kv_heads is 0"),
        (f"{moe},1,0,50", "moe_ep is 0"),
        (f"{moe},1,3,50", "experts 8 is no multiple of moe_ep 3"),
        (f"{moe},5,1,50", "inter 768 is no multiple of moe_tp 5"),
    )
    path = tmp_path / "ops.csv"
    fine = (f"{prefill},8,128,,,,,,,,50", f"{prefill},8,,,,,,,,,50", f"{moe},2,2,50")
    path.write_text("\n".join((head, *fine, *(row for row, _ in rows))) + "\n")
    table = read_table(path)
    assert len(table.rows) == 3
    assert [reason for _, reason in table.skipped] == [words for _, words in rows]
    assert ("head_dim unsaid of attn_prefill", "128") in table.mapped
