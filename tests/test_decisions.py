"""Pins, what contradicts what, and the workload's defaults."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_plan import DECISIONS, WORKLOAD, toy_graph

from cost_models.decisions import Decisions, Workload
from cost_models.engines import engine_names, load_engine
from cost_models.fleet import load_any
from cost_models.hardware import load_hardware
from cost_models.schedule import SCHEDULES
from ir.errors import UsageError
from planner.decisions import (
    ALL_LAYERS,
    ANY,
    VOCABULARY,
    Pins,
    Recompute,
    parse_pins,
    pins_of,
    summarise_recompute,
)
from planner.decisions_json import decisions_from_json, decisions_json
from planner.legality import RULES, case_of, illegal, inconsistent
from planner.offloads import grad_dtypes
from planner.pin_checks import check_pins
from planner.workload import Asked, resolve

H100 = load_hardware("h100x64")


def said(error):
    return "\n".join(error.value.lines())


def test_pins_are_read():
    pins = parse_pins(["tp=8", "recompute=full:12", "stages=16,16,15", "offload=optimizer:cpu",
                       "place:layers.{0..3}.q.weight=S(0)", "sequence_parallel=on"])  # fmt: skip
    assert pins == Pins(
        tp=8, recompute=Recompute(full=(12,)), stages=(16, 16, 15),
        offload=(("optimizer", "cpu"),), place=(("layers.{0..3}.q.weight", "S(0)"),),
        sequence_parallel=True,
    )  # fmt: skip


def test_gradients_are_in_no_format_that_a_device_has_not():
    """`any` is what the devices have; bf16 where one has none is refused."""
    engine, v100 = load_engine("native"), load_hardware("v100x8")
    free = Pins(grad_dtype=ANY)
    assert grad_dtypes(free, engine, H100) == ("fp32", "bf16")
    assert grad_dtypes(free, engine, v100) == grad_dtypes(free, engine, H100, v100) == ("fp32",)
    asked = Asked(seq_len=2048, global_batch=16)
    pinned = Pins(grad_dtype="bf16")
    resolve(toy_graph(), H100, asked, pinned)
    for hardware in (v100, load_any("h100x8+v100x8")):
        with pytest.raises(UsageError) as caught:
            resolve(toy_graph(), hardware, asked, pinned)
        assert "grad_dtype=bf16: v100-16gb has no bf16" in said(caught)
        resolve(toy_graph(), hardware, asked, free)


def test_what_is_offloaded():
    """Whatever the order; parameters take the optimizer with them, as they are updated there."""
    cpu = (("optimizer", "cpu"), ("params", "cpu"), ("activations", "cpu"))
    assert parse_pins(["offload=activations:cpu,params:cpu,optimizer:cpu"]).offload == cpu
    assert parse_pins(["offload=params:cpu"]).offload == cpu[:2]
    assert parse_pins(["offload=activations:cpu"]).offload == cpu[2:]
    assert parse_pins(["offload=params:cpu,optimizer:nvme"]).offload == (
        ("optimizer", "nvme"), ("params", "cpu"),
    )  # fmt: skip
    assert parse_pins(["offload=none"]).offload == ()


@pytest.mark.parametrize(
    ("pin", "words"),
    [
        ("tp=0", "a whole number"), ("tp=x", "a whole number"), ("tp", "has no value"),
        ("tp=", "a whole number"), ("tpp=8", "did you mean tp?"), ("zero=4", "one of 0 1 2 3"),
        ("reshard=yes", "one of on off"), ("schedule=2f2b", "gpipe 1f1b interleaved"),
        ("recompute=some", "none, selective, full"), ("stages=1,,2", "layers per stage"),
        ("offload=gradients:cpu", "optimizer:TIER, params:TIER, activations:TIER"),
        ("offload=optimizer", "optimizer:TIER"), ("offload=optimizer:cpu,optimizer:nvme", "TIER"),
        ("kv=fp8", "serving pin"), ("place:a.b=S(x)", "place:PATTERN=S(0)"),
        ("weights=int3", "one of bf16 fp8"),
    ],
)  # fmt: skip
def test_bad_pins_are_usage_errors(pin, words):
    with pytest.raises(UsageError) as error:
        parse_pins([pin])
    assert words in said(error)
    assert error.value.exit_code == 64


def test_a_pin_given_twice():
    assert parse_pins(["tp=8", "tp=8"]).tp == 8
    with pytest.raises(UsageError, match="--fix tp=8 and --fix tp=4 contradict"):
        parse_pins(["tp=8", "tp=4"])


CONTRADICTIONS = [
    (["tp=3"], "tp=3 does not divide|tp = 3 does not divide the hardware's 64 GPUs"),
    (["tp=8", "pp=2", "cp=1", "dp=8"], "= 128 is not the hardware's 64 GPUs"),
    (["tp=8", "pp=2", "cp=1", "dp=8"], "--fix dp=4"),
    (["ep=3"], "ep*etp = 3 does not divide"),
    (["dp=4", "tp=4", "cp=1", "ep=8", "etp=4"], "ep*etp = 32 does not divide a stage's 16"),
    (["shard=3", "dp=8", "cp=1"], "shard does not divide the 8 data ranks"),
    (["dp=3", "micro_batch=1"], "dp=3"),
    (["dp=8", "micro_batch=3"], "--fix dp=8 and --fix micro_batch=3"),
    (["dp=8", "micro_batch=3"], "--global-batch 504 or 528"),
    (["zero=0", "shard=8"], "zero=0 and --fix shard=8 contradict"),
    (["zero=2", "reshard=on"], "under zero=3 alone"),
    (["pp=2", "reshard=on"], "pp=2 and --fix reshard=on contradict"),
    (["schedule=1f1b", "virtual_stages=2"], "schedule=1f1b and --fix virtual_stages=2"),
    (["schedule=zbv", "virtual_stages=3"], "zbv, dualpipev two"),
    (["pp=1", "virtual_stages=2"], "one pipeline rank"),
    (["pp=1", "schedule=zbv"], "nothing to interleave"),
    (["schedule=zbh1", "recompute=full"], "each half would recompute"),
    (["schedule=zbh1", "compile=on"], "cannot run compiled stages"),
    (["tp=1", "sequence_parallel=on"], "over tp ranks"),
    (["tp=1", "place:a=S(0)"], "tp=1 splits nothing"),
    (["stages=4,4", "pp=4"], "stages=4,4 and --fix pp=4"),
    (["stages=4,3"], "holds 7 layers, the model has 8"),
    (["recompute=full:999"], "computes 999 layers of a stage again, the model has 8"),
    (["recompute=full:5+selective:4"], "computes 9 layers of a stage again, the model has 8"),
    (["recompute=full:5/4", "stages=4,4", "pp=2"], "5 layers of a stage again, which has 4"),
    (["recompute=selective:5", "stages=4,4"], "5 layers of a stage again, which has 4"),
    (["stages=4,4", "pp=2", "virtual_stages=2"], "pp*virtual_stages stages = 4"),
    (["offload=params:cpu", "zero=1"], "under zero=3"),
    (["offload=optimizer:cpu", "zero=3", "pp=1"], "offload=optimizer:cpu,params:cpu"),
    (["offload=optimizer:cpu", "zero=2", "pp=1"], "FSDP2 keeps shards with their optimizer"),
    (["offload=activations:cpu", "recompute=selective"], "stays on the GPU"),
    (["offload=optimizer:cpu:9", "pp=1"], "lays 9 layers of a stage below, the model has 8"),
    (["offload=activations:cpu:5/4", "stages=4,4"], "lays 5 layers of a stage below, which has 4"),
    (["weights=fp8"], "weights in the workload's precision"),
    (["schedule=1f1b", "pp=64", "microbatches=8"], "microbatches >= pp"),
]


@pytest.mark.parametrize(("pins", "words"), CONTRADICTIONS)
def test_contradicting_pins_are_named(pins, words):
    workload = Workload(global_batch=512, seq_len=8192)
    with pytest.raises(UsageError) as error:
        check_pins(parse_pins(pins), workload, gpus=64, layers=8)
    assert any(word in said(error) for word in words.split("|"))


@pytest.mark.parametrize(("pins", "hints"), [
    (["offload=optimizer:nvme:2"], (
        "pp=1", "stages=4,4 and pp=2, by the layers of each",
        "offload=optimizer:nvme: of every layer",
    )),
    (["offload=optimizer:cpu:2/1/2", "dp=1"], ("offload=optimizer:cpu: of every layer",)),
    (["offload=optimizer:cpu:2", "zero=2", "pp=4"], (
        "stages=2,2,2,2 and pp=4, by the layers of each", "offload=optimizer:cpu: of every layer",
    )),
    (["offload=params:cpu", "zero=2", "pp=1"], ("zero=3",)),
    (["offload=params:cpu", "zero=2"], ("zero=3, or offload=optimizer:cpu",)),
])  # fmt: skip
def test_what_is_hinted_at_holds_beside_the_other_pins(pins, hints):
    """Eight layers on 64 GPUs, which three stages do not divide."""
    with pytest.raises(UsageError) as error:
        check_pins(parse_pins(pins), Workload(global_batch=64, seq_len=128), gpus=64, layers=8)
    assert error.value.hints == hints


def test_sequence_that_cp_does_not_divide():
    for pin, seq_len in (("cp=8", 1002), ("cp=4", 1004)):
        workload = Workload(global_batch=64, seq_len=seq_len)
        with pytest.raises(UsageError, match=f"--seq-len {seq_len} contradict"):
            check_pins(parse_pins([pin, "cp_kind=ring"]), workload, gpus=64)


@pytest.mark.parametrize("engine", engine_names())
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_the_engines(engine, schedule):
    most = {"interleaved": 2, "zbv": 2, "dualpipev": 2}.get(schedule, 1)
    workload = replace(WORKLOAD, engine=engine)
    decisions = replace(DECISIONS, schedule=schedule, virtual_stages=most, zero=1, recompute=())
    row = load_engine(engine)
    eager = illegal(replace(decisions, compile=False), workload)
    compiled = illegal(replace(decisions, compile=True), workload)
    assert (eager is None) == (schedule in row.schedules)
    assert (compiled is None) == (schedule in row.schedules and schedule in row.compiled_schedules)


def test_one_micro_batch_more_or_less_than_stages_is_the_engines():
    for engine in ("megatron", "deepspeed", "torchtitan-eager"):
        few, enough = (
            replace(DECISIONS, schedule="gpipe", pp=4, dp=1, tp=2, microbatches=n, zero=1, shard=1,
                    compile=False)
            for n in (3, 4)
        )  # fmt: skip
        workload = replace(WORKLOAD, engine=engine)
        assert illegal(few, workload) is None
        assert (illegal(enough, workload) is None) == ("gpipe" in load_engine(engine).schedules)
        assert "microbatches >= pp" in illegal(replace(few, schedule="1f1b"), workload)


@given(
    pp=st.sampled_from([1, 2]), cp=st.sampled_from([1, 2]), zero=st.integers(0, 3),
    shard=st.integers(2, 64), outer=st.integers(2, 64), engine=st.sampled_from(engine_names()),
)  # fmt: skip
def test_rules_ask_of_some_degrees_only_whether_they_are_more_than_one(
    pp, cp, zero, shard, outer, engine
):
    workload = Workload(engine=engine, global_batch=64, seq_len=128)
    d = Decisions(pp=pp, cp=cp, zero=zero, shard=shard, dp_outer=outer, microbatches=4)
    case = case_of(d, workload, True)
    whole = replace(case, shard=shard, dp_outer=outer)
    assert [r.refused(case) for r in RULES] == [r.refused(whole) for r in RULES]


def test_zero_under_a_pipeline_is_the_engines():
    workload = replace(WORKLOAD, engine="megatron")
    assert illegal(replace(DECISIONS, zero=1), workload) is None
    assert "ZeRO stage" in illegal(replace(DECISIONS, zero=3), workload)
    assert illegal(replace(DECISIONS, zero=3), WORKLOAD) is None


def test_whole_decisions_pin_themselves_without_contradiction():
    assert inconsistent(DECISIONS, WORKLOAD, gpus=8, layers=8) is None
    pins = pins_of(DECISIONS)
    check_pins(pins, WORKLOAD, gpus=8, layers=8)
    texts = [pins.said(key) for key, _ in pins.items()]
    assert parse_pins(texts) == pins
    names = {f.name for f in fields(Decisions)} - {"parts"}  # the stages' own words say it
    assert names <= {key.name for key in VOCABULARY}
    assert {key.name for key in VOCABULARY} - {"kv"} <= {f.name for f in fields(Pins)}


def test_decisions_json_round_trip():
    again = decisions_from_json(decisions_json(DECISIONS), DECISIONS.stages, DECISIONS.recompute)
    assert again == DECISIONS


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1)
)  # fmt: skip
def test_recompute_summary_stands_for_the_counts(rows):
    stages = tuple(full + selective + rest for full, selective, rest in rows)
    recompute = tuple((full, selective) for full, selective, _ in rows)
    summary = summarise_recompute(replace(DECISIONS, stages=stages, recompute=recompute))
    assert summary.counts(stages) == recompute
    assert parse_pins([f"recompute={summary}"]).recompute == summary


def test_recompute_words():
    assert str(Recompute(full=(ALL_LAYERS,))) == "full"
    assert Recompute(full=(12,)).counts((16, 8)) == ((12, 0), (8, 0))
    assert Recompute(full=(2,), selective=(ALL_LAYERS,)).counts((4,)) == ((2, 2),)


def test_defaults_are_4m_tokens_and_said():
    workload, echo = resolve(toy_graph(), H100, Asked(), Pins())
    assert workload == Workload(global_batch=2048, seq_len=2048)  # 2048 * 2048 = 4 Mi tokens
    assert [line.split()[0] for line in echo] == ["--seq-len", "--global-batch"]


@given(st.integers(1, 5000), st.sampled_from([512, 2048, 8192, 131072]))
def test_default_batch_is_a_multiple_of_the_largest_useful_dp(gpus, seq_len):
    cluster = replace(H100, count=gpus)
    batch = resolve(toy_graph(), cluster, Asked(seq_len=seq_len), Pins())[0].global_batch
    widest = max(n for n in range(1, gpus + 1) if gpus % n == 0 and n * seq_len <= 4 << 20)
    assert batch % widest == 0
    assert 2 / 3 <= batch * seq_len / (4 << 20) <= 4 / 3


def test_images_have_no_sequence():
    graph = replace(toy_graph(), seq_in_input=False, max_seq_len=None)
    workload, _ = resolve(graph, H100, Asked(), Pins())
    assert (workload.seq_len, workload.global_batch) == (1, 32 * 64)
    with pytest.raises(UsageError, match="no sequence"):
        resolve(graph, H100, Asked(seq_len=128), Pins())


@pytest.mark.parametrize(
    ("batch", "pins", "hint"),
    [(100, ["dp=64"], "--global-batch 64 or 128"),
     (100, ["dp=4", "micro_batch=8"], "--global-batch 96 or 128")],
)  # fmt: skip
def test_batch_that_does_not_divide(batch, pins, hint):
    with pytest.raises(UsageError, match="does not divide") as error:
        resolve(toy_graph(), H100, Asked(global_batch=batch), parse_pins(pins))
    assert hint in said(error)


def test_batch_that_divides_by_little_is_noted():
    echo = resolve(toy_graph(), H100, Asked(global_batch=100), Pins())[1]
    assert "--global-batch 100 lets dp be 4 at most, of 64" in echo
    assert resolve(toy_graph(), H100, Asked(global_batch=1), Pins())[0].global_batch == 1
    for batch, words, pins in [
        (511, "1 at most, of 64; 510 lets it be 2, 512 lets it be 64", []),
        (7, "1 at most, of 32; 6 lets it be 2, 8 lets it be 8", ["tp=2"]),
        (9, "1 at most, of 64; 6 lets it be 2, 12 lets it be 4", ["micro_batch=3"]),
    ]:  # fmt: skip
        echo = resolve(toy_graph(), H100, Asked(global_batch=batch), parse_pins(pins))[1]
        assert f"--global-batch {batch} lets dp be {words}" in echo


def test_precision():
    t4 = load_hardware("t4x8")
    assert resolve(toy_graph(), t4, Asked(), Pins())[0].precision == "fp16"
    with pytest.raises(UsageError, match="does not compute in bf16"):
        resolve(toy_graph(), t4, Asked(precision="bf16"), Pins())


@pytest.mark.parametrize(
    "asked", [Asked(precision="fp7"), Asked(engine="nativ"), Asked(optimizer="adam"),
              Asked(task="serve"), Asked(seq_len=0), Asked(global_batch=0)],
)  # fmt: skip
def test_bad_words_are_usage_errors(asked):
    with pytest.raises(UsageError):
        resolve(toy_graph(), H100, asked, Pins())
