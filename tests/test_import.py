"""`plan import`: what is exported comes back, what is not understood is told, nothing is run."""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EXAMPLES
from toy_plan import DECISIONS, WORKLOAD, toy_graph, toy_plan

from ir.errors import InfeasibleError, PlanError, UsageError
from planner.decisions import Pins, Recompute, parse_pins
from planner.export import export
from planner.export.as_run import as_written
from planner.export.pinned import pinned
from planner.importing import SOURCES, _asked, _pins, _trace_words, facts, read_file, torchtitan
from planner.importing.megatron import layout
from planner.importing.origins import ORIGINS, contradicted, of_the_file
from planner.options import TraceOptions
from planner.workload import Asked

ENGINES = {"megatron": "megatron", "deepspeed": "deepspeed", "torchtitan": "torchtitan",
           "torchtitan-toml": "torchtitan", "accelerate": "accelerate"}  # fmt: skip
SUFFIX = {"megatron": ".sh", "deepspeed": ".json", "torchtitan": ".py", "torchtitan-toml": ".toml",
          "accelerate": ".yaml"}  # fmt: skip


def read(engine, text, name="f", gpus=8, fix=(), asked=None):
    """(pins, settings) of a text, without costing it."""
    source = SOURCES[engine]
    found = source.parse(text, name)
    setup = source.decide(found, facts(toy_graph(), source.precision(found), gpus))
    known = pinned(source.pinned(name))
    against = partial(contradicted, engine=engine, settings=found, known=known)
    _asked(setup, asked or Asked(), against)
    pins, _ = _pins(setup, TraceOptions(model="", pins=parse_pins(fix)), name, against)
    return pins, found, setup


@st.composite
def legal(draw):
    """A legal training configuration of the toy on 8 GPUs, and its workload."""
    one = lambda *words: draw(st.sampled_from(words))  # noqa: E731
    pp, tp, cp = one(1, 2), one(1, 2), one(1, 2)
    dp, virtual = 8 // (pp * tp * cp), one(1, 2) if pp > 1 else 1
    stages = {1: (8,), 2: one((4, 4), (5, 3)), 4: one((2, 2, 2, 2), (3, 2, 2, 1))}[pp * virtual]
    zero = one(0, 1, 2, 3)
    shard = one(*{n for n in (cp, dp * cp, 1) if dp * cp % n == 0}) if zero else 1
    again = one("none", "all", "some", "counts")
    rows = {"none": ((0, 0),) * len(stages), "all": tuple((n, 0) for n in stages),
            "some": tuple((0, n) for n in stages),
            "counts": tuple((min(n, 2), 0) for n in stages)}[again]  # fmt: skip
    offload = one((), (("optimizer", "cpu"),), (("optimizer", "cpu"), ("params", "cpu")))
    made = replace(
        DECISIONS, pp=pp, dp=dp, cp=cp, tp=tp, zero=zero, shard=shard, stages=stages,
        reshard=one(True, False) if zero == 3 and pp == 1 else False, virtual_stages=virtual,
        schedule="interleaved" if virtual > 1 else "1f1b", recompute=rows,
        offload=offload if zero == 3 else offload[:1] if zero else (),
        sequence_parallel=one(True, False) if tp > 1 else False, compile=one(True, False),
        grad_dtype=one("bf16", "fp32"), cp_kind=one("ring", "allgather", "ulysses") if cp > 1
        else "ring", micro_batch=one(1, 2), microbatches=one(1, 4, 8),
    )  # fmt: skip
    if made.schedule == "1f1b" and made.microbatches < pp:  # as an engine's own 1F1B then runs
        made = replace(made, schedule="gpipe")
    batch = made.dp * made.micro_batch * made.microbatches
    return made, replace(WORKLOAD, engine=one("megatron", "torchtitan"), global_batch=batch)


@given(drawn=legal(), target=st.sampled_from(sorted(ENGINES)))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_is_exact_comes_back(drawn, target):
    d, workload = drawn
    plan = toy_plan(decisions=d, workload=workload, shardings=())
    try:
        made = export(plan, target, "plan.json")
    except PlanError:
        return
    lost = {row.decision for row in made.lost}
    fix = [f"micro_batch={d.micro_batch}", f"microbatches={d.microbatches}"]
    ((_, text),) = made.files
    pins, found, setup = read(
        ENGINES[target], text, f"f{SUFFIX[target]}", fix=fix if target == "accelerate" else ()
    )
    if d.shard == 1 and d.zero:  # sharded over one rank: some engines call that no sharding
        lost |= {"zero", "shard", "reshard"}
    for key in ("pp", "dp", "cp", "tp", "ep", "etp", "zero", "shard", "reshard", "micro_batch",
                "microbatches", "schedule", "virtual_stages", "stages", "sequence_parallel",
                "compile", "cp_kind", "grad_dtype", "offload", "formats"):  # fmt: skip
        if key not in lost:
            assert getattr(pins, key) == getattr(d, key), (key, made.lost)
    if "recompute" not in lost:
        assert pins.recompute.counts(d.stages) == d.recompute
    assert setup.asked.get("global_batch", str(workload.global_batch)) == str(workload.global_batch)
    written, doubts = as_written(made, plan, target)  # what the export costs is what the file says
    assert list(doubts) == found.doubts
    same = {"recompute", "pp", "dp", "tp", "zero", "shard", "micro_batch", "microbatches",
            "stages", "compile", "offload", "grad_dtype"} - lost  # fmt: skip
    assert all(getattr(written.decisions, key) == getattr(d, key) for key in same)
    if "recompute" in setup.pins:  # else in code, and the plan's
        assert written.decisions.recompute == pins.recompute.counts(pins.stages)
    _, unknown = found.left(pinned(target))
    assert not [row for row in unknown if "costed as all but" not in row]


def test_layouts_of_megatron_are_read_as_it_reads_them():
    # its own documentation: Ettt|(tt|)*29,m|L has 32 stages
    assert layout("Ettt|(tt|)*3,tL") == (3, 2, 2, 2, 1)
    assert layout("Et*5|tttL") == (5, 3) and layout("E|t*2|L") == (0, 2, 0)
    for text in ("", "tttL", "Ettt|(tt|)*29,m|L", "E" + "(t|)*99999" * 2 + "L", "Et;rm|L"):
        assert layout(text) is None


SCRIPT = r"""#!/bin/bash
# a comment with --tensor-model-parallel-size 64
export CUDA_DEVICE_MAX_CONNECTIONS=1
TP=2
MBS=${MBS:-1}
MODEL_ARGS=(
    --num-layers 8   # as the model
    --seq-length 2048
    --swiglu --made-up-flag 7
)
PARALLEL="--tensor-model-parallel-size $TP --sequence-parallel"
if [ -n "$X" ]; then echo hello; fi
torchrun --nproc_per_node 8 --nnodes 1 pretrain_gpt.py \
    "${MODEL_ARGS[@]}" $PARALLEL --bf16 \
    --micro-batch-size $MBS --global-batch-size=16 --use-distributed-optimizer
"""


def test_a_script_is_read_without_running_it():
    pins, found, setup = read("megatron", SCRIPT)
    assert (pins.tp, pins.dp, pins.zero, pins.shard, pins.microbatches) == (2, 4, 1, 4, 4)
    assert pins.sequence_parallel and pins.stages == (8,) and setup.asked["seq_len"] == "2048"
    aside, unknown = found.left(pinned("megatron"))
    assert "--swiglu" in aside and "--made-up-flag 7 (line 9)" in unknown
    assert any(row.startswith("if (line 12)") for row in unknown)


@pytest.mark.parametrize(
    ("engine", "text", "what", "where"),
    [
        ("megatron", SCRIPT.replace("TP=2", "TP=$(nproc)"), "--tensor-model-parallel-size", ":11"),
        ("megatron", SCRIPT.replace("TP=2", "TP=3"), "do not divide 8 GPUs", "f"),
        ("megatron", SCRIPT + "echo --micro-batch-size 4", "is '1' and '4'", ":15 and 16"),
        ("megatron", SCRIPT.replace("layers 8", "layers 9"), "the model has 8", ":7"),
        ("megatron", SCRIPT.replace("nnodes 1", "nnodes 4"), "not 8 GPUs", ":13"),
        ("megatron", "--bf16 'open", "is not closed", ":1"),
        ("deepspeed", '{"train_batch_size": 16, "train_batch_size": 8}', "given twice", "f"),
        ("deepspeed", '{"train_batch_size": 16, "train_micro_batch_size_per_gpu": 1,'
         ' "gradient_accumulation_steps": 3}', "is 16, and micro-batches make 24", "f"),
        ("deepspeed", '{"zero_optimization": {"stage": 4}}', "is 4", "f"),
        ("deepspeed", '{"train_batch_size": true}', "is 'True'", "f"),
        ("deepspeed", '{"train_batch_size": 1e18}', "is 1000000000000000000", "f"),
        ("megatron", "--bf16 --micro-batch-size \u00b2", "is '\u00b2'", "f"),
        ("deepspeed", "[" * 100_000, "is no JSON", "f"),
        ("deepspeed", '{"bf16": {"enabled": "auto"}}', "is auto", "f"),
        ("deepspeed", "{}", "does not say the micro-batch", ""),
        ("torchtitan", "[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_schedule"
         " = 'ZB9'", "is 'ZB9'", "f"),
        ("torchtitan", "a = = 2", "is no TOML", "f"),
        ("accelerate", "distributed_type: FSDP\n   num: 1", "is indented unlike", ":2"),
        ("accelerate", "a: &x 1\nb: *x", "line 1 is not read", ":1"),
        ("accelerate", "num_processes: 4", "is 4, not 8 GPUs", ":1"),
        ("accelerate", "distributed_type: DEEPSPEED", "is DEEPSPEED", ":1"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_says_what_and_where(engine, text, what, where):
    with pytest.raises(PlanError) as caught:
        read(engine, text)
    assert what in caught.value.what and where in caught.value.where


@pytest.mark.parametrize("count", ["1000000000", "9" * 30, "9" * 4000])
def test_a_number_beyond_all_is_told_the_bound(count):
    with pytest.raises(PlanError) as caught:
        read("megatron", f"--micro-batch-size {count}")
    assert caught.value.why == "expected 0 to 999,999,999"
    with pytest.raises(UsageError) as caught:
        parse_pins([f"tp={count}"])
    assert "1 to 999,999,999" in caught.value.why


def test_a_batch_beyond_all_is_answered(plan, tmp_path):
    """An accumulation of many steps is a sum, and one of more samples than a plan has is said."""
    file = tmp_path / "ds.json"
    moe, made = str(EXAMPLES / "moe.py"), str(tmp_path / "made.json")
    asked = ("--from", "deepspeed", "--model", moe, "--arg", "size=tiny", "--seq-len", "64",
             "--hardware", "h100x8", "-o", made)  # fmt: skip
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 10_000_000,
              "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}  # fmt: skip
    file.write_text(json.dumps(config))
    code, _, err = plan("import", str(file), *asked)
    assert code == 0, err
    assert json.loads((tmp_path / "made.json").read_text())["workload"]["global_batch"] == 8 * 10**7
    file.write_text(json.dumps(config | {"train_micro_batch_size_per_gpu": 999_999_999}))
    code, _, err = plan("import", str(file), *asked)
    assert code == 1 and "at most 999,999,999 samples or tokens" in err


def test_python_is_read_and_not_run(tmp_path):
    text = (
        "import os\nos.remove('/nothing')\nLAYERS = 3\n"
        "def f():\n    c = base()\n    c.parallelism.tensor_parallel_degree = 2\n"
        "    c.training = TrainingConfig(local_batch_size=2, steps=LAYERS)\n"
        "    c.activation_checkpoint = FullAC.Config()\n    return c\n"
    )
    pins, found, _ = read("torchtitan", text, "c.py")
    assert (pins.tp, pins.dp, pins.zero, pins.micro_batch) == (2, 4, 3, 2)
    assert pins.recompute == Recompute(full=(-1,))
    _, unknown = found.left(pinned("torchtitan"))
    assert unknown == ("training.steps (line 7): not a literal, and nothing is run",)
    with pytest.raises(PlanError, match="no Python"):
        read("torchtitan", "(" * 5000, "c.py")


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ("local_batch_size=N * 2", "training.local_batch_size is no literal"),
        ("local_batch_size=1, seq_len=N", "training.seq_len is no literal"),
        ("local_batch_size=1, **base", "training.** is no literal, and may say mixed_precision"),
    ],
)
def test_what_a_layout_needs_is_a_literal_or_refused(argument, what):
    """No default of the engine stands for what the file sets otherwise."""
    with pytest.raises(PlanError) as caught:
        read("torchtitan", f"N = 4\nTrainingConfig({argument})\n", "c.py")
    assert caught.value.what.startswith(what) and caught.value.where == "c.py:2"
    every = "".join(f", {name.partition('.')[2]}={value}" for name, value in (
        ("training.local_batch_size", 1), ("training.global_batch_size", 8),
        ("training.seq_len", 64), ("training.mixed_precision_param", "'bfloat16'"),
        ("training.mixed_precision_reduce", "'float32'"), ("training.disable_cuda_graphs", False),
        ("training.enable_cpu_offload", False)))  # fmt: skip
    pins, _, setup = read("torchtitan", f"TrainingConfig(**base{every})", "c.py")
    assert pins.micro_batch == 1 and setup.asked["seq_len"] == "64"


def test_fix_adds_what_a_file_leaves_open_and_contradicts_nothing():
    text = "distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\nmixed_precision: bf16\n"
    pins, _, _ = read("accelerate", text, fix=("micro_batch=2", "microbatches=4"))
    assert (pins.zero, pins.shard, pins.micro_batch, pins.microbatches) == (3, 8, 2, 4)
    assert pins.grad_dtype == "bf16" and pins.reshard
    with pytest.raises(UsageError, match="accelerate's default is tp=1"):
        read("accelerate", text, fix=("micro_batch=2", "tp=2"))


@pytest.mark.parametrize(
    ("engine", "text", "name", "fix", "asked", "what", "why"),
    [
        ("torchtitan", "[training]\nseq_len = 64\n", "f.toml", (), {"global_batch": 16},
         "--global-batch 16, but f.toml leaves it open, and torchtitan's default is 64",
         "training.global_batch_size or training.local_batch_size; defaults as read in torchtitan"
         " 0.2.2 (pypi.org/project/torchtitan 0.2.2"),
        ("torchtitan", "[training]\nlocal_batch_size = 4\n", "f.toml", (), {"global_batch": 16},
         "--global-batch 16, but f.toml says 32", "by training.local_batch_size"),
        ("torchtitan", "", "f.toml", ("sequence_parallel=on",), {},
         "--fix sequence_parallel=on, but f.toml leaves it open, and torchtitan's default is"
         " sequence_parallel=off", "does not set parallelism.tensor_parallel_degree; "),
        ("megatron", "--micro-batch-size 2\n--tensor-model-parallel-size 2\n", "f", ("tp=4",), {},
         "--fix tp=4, but f says tp=2", "by --tensor-model-parallel-size (line 2)"),
        ("megatron", "--micro-batch-size 2\n", "f", (), {"optimizer": "muon"},
         "but f leaves it open, and Megatron-LM's default is adamw", "--optimizer; defaults"),
        ("deepspeed", '{"train_micro_batch_size_per_gpu": 1}', "f", ("pp=2",), {},
         "--fix pp=2, but under DeepSpeed it is pp=1", "no setting of it"),
        ("deepspeed", '{"train_micro_batch_size_per_gpu": "auto"}', "f", ("zero=3",), {},
         "DeepSpeed's default is zero=0", "zero_optimization.stage;"),
    ],
)  # fmt: skip
def test_a_flag_against_what_a_file_comes_to_names_the_lines_or_whose_default_it_is(
    engine, text, name, fix, asked, what, why
):
    with pytest.raises(UsageError) as caught:
        read(engine, text, name, fix=fix, asked=Asked(**asked))
    assert what in caught.value.what
    assert why in caught.value.why


def test_every_decision_is_read_from_settings_that_there_are():
    """All that a reader decides has its settings named, but what its engine never changes."""
    fixed = {
        "torchtitan": {"formats"}, "megatron": {"compile", "formats"},
        "deepspeed": {"pp", "schedule", "virtual_stages", "stages", "formats",
                      "sequence_parallel"},
        "accelerate": {"pp", "ep", "etp", "schedule", "virtual_stages", "stages", "formats",
                       "sequence_parallel"},
    }  # fmt: skip
    texts = {"torchtitan": "", "megatron": "--micro-batch-size 1 --seq-length 8", "accelerate": "",
             "deepspeed": '{"train_micro_batch_size_per_gpu": 1}'}  # fmt: skip
    for engine, source in SOURCES.items():
        found = source.parse(texts[engine], "f")
        setup = source.decide(found, facts(toy_graph(), "bf16", 8))
        assert {*setup.pins, *setup.asked} == {*ORIGINS[engine]} | fixed[engine]
        lists = ("torchtitan", "torchtitan-toml") if engine == "torchtitan" else (engine,)
        plans = [pinned(name).plan for name in lists]
        for names in ORIGINS[engine].values():
            for name in names:
                assert any({name, name.rpartition(".")[2]} & set(plan) for plan in plans), name


def test_files_have_a_size_and_are_files(tmp_path):
    (tmp_path / "big").write_text("#" * (1 << 20) + "\n")
    for path, why in ((tmp_path / "big", "at most 1 MiB"), (tmp_path, "it is no file"),
                      (Path("/dev/zero"), "it is no file")):  # fmt: skip
        with pytest.raises(PlanError) as caught:
            read_file(str(path))
        assert why in caught.value.why


def test_mutated_files_are_read_or_refused_in_words():
    random.seed(7)
    originals = {"megatron": (SCRIPT, "f.sh")}
    plan = toy_plan(decisions=replace(DECISIONS, tp=1, dp=4, shard=4), shardings=())
    for target in ("torchtitan", "torchtitan-toml"):
        originals[target] = (export(plan, target, "p").files[0][1], f"f{SUFFIX[target]}")
    one = replace(DECISIONS, pp=1, tp=1, dp=8, shard=8, stages=(8,), microbatches=2)
    flat = toy_plan(decisions=replace(one, recompute=((0, 0),)), shardings=())
    for target in ("deepspeed", "accelerate"):
        originals[target] = (export(flat, target, "p").files[0][1], f"f{SUFFIX[target]}")
    for target, (text, name) in originals.items():
        for _ in range(60):
            at, size = random.randrange(len(text)), random.randrange(1, 30)
            inserted = random.choice(["", "(", "'", '"', "\\", "${", "}", "=", "--", ": ", "\n",
                                      "-1", "1e9", "null", "[[", "\0", "99999999999999999999"])
            mutated = text[:at] + inserted + text[at + random.choice((0, size)) :]
            try:
                read(ENGINES[target], mutated, name)
            except PlanError as refusal:
                assert refusal.what


def test_a_refusal_names_the_settings_of_the_file():
    _, found, _ = read("megatron", SCRIPT)
    pins = [("tp", "tp=2"), ("recompute", "recompute=none"), ("micro_batch", "micro_batch=1")]
    fault = InfeasibleError(
        "no plan fits", why="binding: memory; tp=2 (--fix); recompute=none (--fix); dp=4 (--fix)",
        hints=("with --fix tp=16, across domains, it fits",),
    )  # fmt: skip
    own = of_the_file(fault, pins, "megatron", found, pinned("megatron"))
    assert isinstance(own, InfeasibleError) and own.what == fault.what
    assert own.why == (
        "binding: memory; tp=2 by --tensor-model-parallel-size (line 11);"
        " recompute=none as Megatron-LM has it; dp=4 (--fix)"
    )
    assert own.hints == ("with tp=16, across domains, it fits",)
    said = of_the_file(UsageError("--fix tp=2 and --fix tp=24"), pins, "megatron", found,
                       pinned("megatron")).what  # fmt: skip
    assert said == "tp=2 by --tensor-model-parallel-size (line 11) and --fix tp=24"


def test_pins_are_whole():
    """Nothing is left to a search but operations over tp, which have the engines' layout."""
    pins, _, _ = read("megatron", SCRIPT)
    open_ = [k for k in Pins.__dataclass_fields__ if getattr(pins, k) is None]
    assert set(open_) == {"keep", "weights"}


@pytest.mark.parametrize(("line", "compiled"), [
    ("[training]\ncompile = true", "on"), ("[compile]\nenable = true", "on"), ("[training]", "off"),
])  # fmt: skip
def test_compile_of_the_older_layout_of_torchtitan_is_read(line, compiled):
    read = torchtitan.parse(line, "run.toml")
    made = torchtitan.decide(read, facts(toy_graph(), "bf16", 8))
    assert made.pins["compile"] == compiled
    assert not any("compile" in word for word in read.left(pinned("torchtitan-toml"))[1])


def test_what_fits_is_asked_of_the_same_work():
    asked = Asked(engine="deepspeed", global_batch=64, seq_len=4096, precision="bf16")
    words = _trace_words(TraceOptions(
        model="my model.py", hardware="a100x8", asked=asked, args=(("n_layers", "4"),),
    ))  # fmt: skip
    assert words == ("plan trace 'my model.py' --hardware a100x8 --engine deepspeed --global-batch"
                     " 64 --seq-len 4096 --precision bf16 --arg n_layers=4")  # fmt: skip
