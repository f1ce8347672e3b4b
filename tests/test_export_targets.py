"""Exports to other engines: what is exact, what is lost, and what their own parsers make of it."""

import ast
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_plan import DECISIONS, WORKLOAD, toy_plan

from ir.errors import PlanError
from planner.classic import classic, differs
from planner.cli import main
from planner.decisions import parse_pins
from planner.export import TARGETS, accelerate, deepspeed, export, megatron, torchtitan
from planner.export.header import plan_hash
from planner.export.pinned import pinned
from planner.export.target import EXACT
from planner.plan import Plan

DOCS = Path(__file__).parents[1] / "docs" / "export.md"
FSDP = replace(
    DECISIONS, pp=1, dp=4, cp=2, tp=1, shard=8, reshard=True, cp_kind="allgather",
    sequence_parallel=False, stages=(8,), recompute=((8, 0),), microbatches=4,
)  # fmt: skip
MEGATRON = replace(
    DECISIONS, pp=2, dp=4, tp=1, zero=1, shard=4, sequence_parallel=False, microbatches=4,
    recompute=((2, 0), (2, 0)),
)  # fmt: skip
TRAINING = [name for name, target in TARGETS.items() if target.task == "train"]


def plan_of(decisions, engine="native-compiled", **workload) -> Plan:
    return toy_plan(
        decisions=decisions, workload=replace(WORKLOAD, engine=engine, **workload), shardings=()
    )


def text_of(plan, target) -> str:
    ((_, text),) = export(plan, target, "plan.json").files
    return text


def test_the_table_in_the_documentation_is_the_registry():
    rows = re.findall(r"^\| `([a-z-]+)` \| ([^|]+) \| ([^|]+) \|", DOCS.read_text(), re.M)
    assert rows == [(n, t.made, t.checked) for n, t in TARGETS.items()]


@st.composite
def decisions(draw):
    """Decisions of every kind, legal or not: an export must answer for all of them."""
    one = lambda *words: draw(st.sampled_from(words))  # noqa: E731
    pp, tp, cp = one(1, 2), one(1, 2), one(1, 2)
    layers = {1: (8,), 2: one((4, 4), (5, 3))}[pp]
    zero = one(0, 1, 2, 3)
    return replace(
        DECISIONS, pp=pp, dp=8 // (pp * tp * cp) or 1, cp=cp, tp=tp, zero=zero,
        shard=one(1, 2) if zero else 1, reshard=one(True, False), schedule=one("1f1b", "zbv"),
        stages=layers, recompute=tuple(one((0, 0), (n, 0), (2, 1)) for n in layers),
        offload=one((), (("optimizer", "cpu"),), (("activations", "cpu"),)),
        sequence_parallel=one(True, False), compile=one(True, False), dp_outer=one(1, 2),
        grad_dtype=one("bf16", "fp32"), cp_kind=one("ring", "allgather", "ulysses"),
    )  # fmt: skip


@given(found=decisions())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_decision_is_answered_for_and_only_real_flags_are_written(found):
    plan = plan_of(found)
    for target in TRAINING:
        try:
            made = export(plan, target, "plan.json")
        except PlanError as refusal:  # a layout that it cannot have
            assert "cannot lay out" in refusal.what
            continue
        ((_, text),) = made.files
        assert plan_hash(plan) in text and text.isascii()
        assert (made.fidelity == EXACT) == (not made.lost)
        if target in ("pytorch", "trainjob"):
            continue
        known = pinned({"torchrun": "launchers"}.get(target, target))
        assert keys_of(target, text) <= set(known.plan) | known.other, target


def keys_of(target: str, text: str) -> set[str]:
    """The flags or keys that a file sets."""
    body = re.sub(r"(?m)^#(?!SBATCH).*$", "", text)
    if target == "deepspeed":
        return set(nested(json.loads(text))) - {"meshwright"}
    if target == "torchtitan-toml":
        return {k for k in nested(tomllib.loads(text)) if "." in k}
    if target == "torchtitan":
        found = re.split(r"(\w+)=(?:TrainingConfig|ParallelismConfig|CompileConfig)\(", body)[1:]
        return {f"{section}.{key}" for section, part in zip(found[::2], found[1::2])
                for key in re.findall(r"(?m)^ {12}(\w+)=|^(enable)=", part) for key in key if key}
    if target == "accelerate":
        return set(re.findall(r"(?m)^ *(\w+):", body))
    if target == "slurm":
        body = "\n".join(re.findall(r"(?m)^#SBATCH (.*)$", body))
    return set(re.findall(r"(?m)(?:^| )(--[a-z0-9-]+)", body)) - {"--plan"}


def nested(raw, prefix="") -> list[str]:
    found = []
    for key, value in raw.items():
        found.append(prefix + key)
        if isinstance(value, dict):
            found += nested(value, f"{prefix}{key}.")
    return found


def test_megatron_says_uneven_stages_and_layers_computed_again():
    made = export(plan_of(MEGATRON, engine="megatron"), "megatron", "plan.json")
    assert made.fidelity == EXACT
    ((_, text),) = made.files
    for flag in ("--pipeline-model-parallel-layout 'Et*5|tttL'", "--recompute-method block",
                 "--recompute-num-layers 2", "--use-distributed-optimizer"):  # fmt: skip
        assert flag in text
    even = replace(MEGATRON, stages=(4, 4), recompute=((0, 0), (0, 0)))
    text = text_of(plan_of(even, engine="megatron"), "megatron")
    assert "layout" not in text and "recompute" not in text


def test_what_is_lost_is_told_and_written_on_request_alone(tmp_path, capsys):
    plan = plan_of(replace(MEGATRON, recompute=((2, 0), (1, 0))), engine="megatron")
    plan.save(str(tmp_path / "plan.json"))
    words = ["export", str(tmp_path / "plan.json"), "--to", "megatron", "-o", str(tmp_path)]
    for lossy, code in ((False, 64), (True, 0)):
        with pytest.raises(SystemExit) as caught:
            main([*words, *(["--lossy"] if lossy else [])])
        said = capsys.readouterr()
        assert caught.value.code == code and "recompute (approximate)" in said.err
        assert (tmp_path / "megatron_args.sh").exists() == lossy
    assert "hint: --lossy" not in said.err and "wrote" in said.out
    assert "# lost: recompute" in (tmp_path / "megatron_args.sh").read_text()


def test_a_layout_that_an_engine_has_not_is_never_written():
    for target in ("deepspeed", "accelerate"):
        with pytest.raises(PlanError, match="cannot lay out") as caught:
            export(plan_of(MEGATRON), target, "plan.json")
        assert "pp:" in caught.value.why
        assert "micro_batch" in caught.value.why or target == "deepspeed"  # what else is lost


HAVE = {"accelerate": accelerate, "deepspeed": deepspeed, "megatron": megatron,
        "torchtitan": torchtitan, "torchtitan-toml": torchtitan}  # fmt: skip


@given(found=decisions(), target=st.sampled_from(sorted(HAVE)))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_a_hint_pins_a_target_can_lay_out(found, target):
    """Any plan under the pins of the hint, whatever else it decides, has a file."""
    pins = dict(parse_pins(HAVE[target].TAKES).items())
    held = replace(found, **pins, stages=(8,) if "pp" in pins else found.stages, dp_outer=1,
                   recompute=((0, 0),) if "pp" in pins else found.recompute)  # fmt: skip
    shard = held.dp * held.cp if held.zero else 1
    export(plan_of(replace(held, shard=shard)), target, "plan.json")
    try:
        export(plan_of(found), target, "plan.json")
    except PlanError as refusal:
        said = " ".join(f"--fix {pin}" for pin in HAVE[target].TAKES)
        assert f"plan trace {said}: layouts that {target} has" in refusal.hints


def test_another_layout_over_tp_than_the_engines_is_told():
    graph = toy_plan().graph
    expected = classic(graph)["Layer"]
    from cost_models.sharding import Sharding

    same = Sharding(parameters=tuple(expected.items()), edges=())
    plan = toy_plan(shardings=(("Layer", same),))
    assert differs(plan) == ""
    other = dict(expected) | {"mlp.down_proj.weight": "R"}
    plan = toy_plan(shardings=(("Layer", replace(same, parameters=tuple(other.items()))),))
    assert "layers.{0..7}.mlp.down_proj.weight R, the engine" in differs(plan)


def test_names_of_a_plan_stay_in_their_comments():
    graph = replace(toy_plan().graph, name='x"""\n; rm -rf ~ #')
    for target in TRAINING[1:]:
        if target in ("deepspeed", "accelerate"):
            continue
        ((name, text),) = export(replace(plan_of(MEGATRON), graph=graph), target, "a;b.json").files
        assert "/" not in name and not re.search(r"(?m)^[^#\n]*rm -rf", text), target


def test_names_of_a_plan_are_no_code_in_the_file_for_torch():
    """Whatever a graph calls its modules, the file's calls are those of any other plan."""

    def calls(text):
        nodes = ast.walk(ast.parse(text))
        return sorted(ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call))

    for plan in (plan_of(FSDP), plan_of(MEGATRON)):
        for name in ('"+str(run())+"', "a\\", '"""\nrun()\n"""', "\U0001f600\u202e\r# x"):
            root = replace(plan.graph.root, nodes=tuple(
                replace(n, attrs=tuple((k, v + name if k == "path" else v) for k, v in n.attrs))
                for n in plan.graph.root.nodes
            ))  # fmt: skip
            layers = tuple(path + name for path in plan.graph.layers)
            graph = replace(plan.graph, name=name, root=root, layers=layers)
            text = text_of(replace(plan, graph=graph), "pytorch")
            assert calls(text) == calls(text_of(plan, "pytorch")), name


def test_accelerate_reads_what_is_written(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (dev extra)")
    from accelerate.commands.config.config_args import load_config_from_file

    (tmp_path / "accelerate.yaml").write_text(text_of(plan_of(FSDP), "accelerate"))
    found = load_config_from_file(str(tmp_path / "accelerate.yaml"))
    assert found.num_processes == 8 and found.fsdp_config["fsdp_version"] == 2
    assert found.parallelism_config["parallelism_config_dp_shard_size"] == 4
    assert found.parallelism_config["parallelism_config_cp_size"] == 2
    assert found.fsdp_config["fsdp_reshard_after_forward"] is True


def test_deepspeed_reads_what_is_written(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    from deepspeed.runtime.config import DeepSpeedConfig

    class Ranks:
        def get_data_parallel_world_size(self):
            return 4

    (tmp_path / "d.json").write_text(text_of(plan_of(replace(
        FSDP, cp_kind="ulysses", recompute=((0, 0),), offload=(("optimizer", "cpu"),)
    )), "deepspeed"))  # fmt: skip
    found = DeepSpeedConfig(str(tmp_path / "d.json"), mpu=Ranks())
    assert found.zero_config.stage == 3 and found.gradient_accumulation_steps == 4
    assert found.zero_config.offload_optimizer.device == "cpu" and found.bfloat16_config.enabled


def test_torchtitan_reads_what_is_written():
    trainer = pytest.importorskip("torchtitan.trainer", reason="torchtitan is not installed")
    space: dict = {}
    exec(text_of(toy_plan(), "torchtitan"), space)
    found = space["Toy_plan"]()
    assert isinstance(found, trainer.Trainer.Config)
    assert found.parallelism.pipeline_parallel_degree == 2
