"""Exports of serving plans: flags that servers have, and what is lost of formats and tiers."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export_targets import keys_of
from tiny_models import graph_of
from toy_plan import toy_plan

from cost_models.serving_decisions import Held, Pool, Serving
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_reading import served_model
from cost_models.serving_tiers import block_bytes
from ir.errors import PlanError
from planner.export import TARGETS, export, llamacpp, sglang, vllm
from planner.export.header import plan_hash
from planner.export.pinned import pinned
from planner.serving.asked import ServeAsked, parse_serve_pins
from planner.serving.plan import ServingPlan

SERVERS = ("vllm", "sglang", "llamacpp")


def serving_plan(serving=None, hardware="h100x16", model="llama", **changes) -> ServingPlan:
    serving = replace(serving or Serving(batch=8), **changes)
    return ServingPlan(
        graph=graph_of(model), graph_hash="sha256:0", hardware=hardware, hardware_hash="sha256:1",
        constants_hash="sha256:2", asked=ServeAsked(prompt=100, output=28, batch=serving.batch),
        serving=serving,
    )  # fmt: skip


def flags_of(plan, target) -> dict[str, str]:
    ((_, text),) = export(plan, target, "plan.json").files
    return dict(re.findall(r"(?m)^ *(?:- \")?(--[a-z0-9-]+)[ =]?([^\"\s\\]*)", text))


@given(st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_decision_of_serving_is_answered_for(data):
    one = lambda *words: data.draw(st.sampled_from(words))  # noqa: E731
    held = one((), (Held(block="mlp", tier="cpu", place="stream"),),
               (Held(block="mlp", tier="nvme", place="stream", resident=1),))  # fmt: skip
    plan = serving_plan(
        tp=one(1, 2), pp=one(1, 2), replicas=one(1, 4), batch=8, prefill_chunk=one(0, 256),
        weights=one((), (("attention", "fp8"), ("mlp", "fp8")), (("mlp", "int4"),)),
        kv=one("bf16", "fp8", "int8"), tiers=held, kv_tier=(cache := one("gpu", "cpu")),
        kv_window=one(0, 64), attention_dp=one(1, 2),
        prefill=one(None, Pool(tp=2)) if not held and cache == "gpu" else None,
    )  # fmt: skip
    for target in (*SERVERS, "leaderworkerset"):
        try:
            made = export(plan, target, "plan.json")
        except PlanError as refusal:
            assert "cannot lay out" in refusal.what
            _has_a_layout_under_the_hint(plan, target)
            continue
        ((_, text),) = made.files
        assert plan_hash(plan) in text and all(str(row) in text for row in made.lost)
        known = pinned("sglang" if target == "leaderworkerset" else target).plan
        assert keys_of(target, text.replace('- "', " ")) <= set(known), target


def _has_a_layout_under_the_hint(plan, target):
    module = {"vllm": vllm, "llamacpp": llamacpp}.get(target, sglang)
    pins = parse_serve_pins(module.TAKES)
    named = ("tp", "pp", "ep", "etp", "attention_dp")
    held = {key: value for key in named if (value := getattr(pins, key)) is not None}
    export(replace(plan, serving=replace(plan.serving, prefill=None, **held)), target, "p")


def test_a_division_is_said_in_each_servers_words():
    plan = serving_plan(tp=4, pp=2, replicas=2, kv="fp8", prefill_chunk=512)
    found = flags_of(plan, "vllm")
    assert found["--tensor-parallel-size"] == "4" and found["--pipeline-parallel-size"] == "2"
    assert found["--max-num-seqs"] == "4" and found["--max-model-len"] == "128"
    assert found["--kv-cache-dtype"] == "fp8" and found["--max-num-batched-tokens"] == "512"
    assert "--data-parallel-size" not in found  # two nodes: two servers
    assert "start it 2 times" in export(plan, "vllm", "plan.json").notes[0]
    inside = serving_plan(tp=2, replicas=2)
    assert flags_of(inside, "vllm")["--data-parallel-size"] == "2"
    assert flags_of(inside, "sglang")["--dp-size"] == "2"
    across = flags_of(serving_plan(tp=8, pp=2), "sglang")
    assert across["--nnodes"] == "2" and across["--tp-size"] == "8"
    ((_, text),) = export(serving_plan(tp=8, replicas=2), "leaderworkerset", "plan.json").files
    assert "replicas: 2" in text and "size: 1" in text and "nvidia.com/gpu: 8" in text
    with pytest.raises(PlanError, match="cannot lay out"):
        export(plan, "llamacpp", "plan.json")


@pytest.mark.parametrize(("target", "flag"), [("vllm", "--max-num-batched-tokens"),
                                              ("sglang", "--chunked-prefill-size")])  # fmt: skip
def test_tokens_of_a_step_are_those_that_were_costed(target, flag):
    """Servers' own defaults are fewer on devices with less memory, and vLLM's on A100."""
    plan = serving_plan(tp=2, hardware="a100x2")
    assert flag not in flags_of(plan, target)  # a plan of another engine says none of this one's
    plan = replace(plan, asked=replace(plan.asked, engine=target))
    chunk = load_serving_engine(target).chunk_tokens
    assert flags_of(plan, target)[flag] == str(chunk)
    narrow = replace(plan, serving=replace(plan.serving, prefill_chunk=512))
    assert flags_of(narrow, target)[flag] == "512"


def test_experts_are_split_as_each_server_can():
    spread = serving_plan(tp=2, attention_dp=2, ep=4, etp=1, model="moe")
    assert "--enable-expert-parallel" in flags_of(spread, "vllm")
    assert flags_of(spread, "vllm")["--data-parallel-size"] == "2"
    found = flags_of(spread, "sglang")
    assert (found["--tp-size"], found["--attn-dp-size"], found["--ep-size"]) == ("4", "2", "4")
    half = replace(spread, serving=replace(spread.serving, ep=2, etp=2))
    assert flags_of(half, "sglang")["--ep-size"] == "2"
    with pytest.raises(PlanError, match="cannot lay out"):
        export(half, "vllm", "plan.json")


def test_formats_that_servers_make_and_those_of_a_checkpoint():
    plan = serving_plan(weights=(("attention", "fp8"), ("mlp", "fp8")))
    assert export(plan, "vllm", "p").fidelity == "exact"
    assert flags_of(plan, "sglang")["--quantization"] == "fp8"
    half = serving_plan(weights=(("mlp", "fp8"),))
    for target in SERVERS:
        made = export(half, target, "p")
        assert [row.decision for row in made.lost] == ["weights"] and "mlp fp8" in made.lost[0].note


def test_what_lies_on_the_host_is_a_number_of_bytes():
    plan = serving_plan(tiers=(Held(block="mlp", tier="cpu", place="stream"),))
    whole = block_bytes(served_model(plan.graph), plan.serving, "mlp")
    for target in ("vllm", "sglang"):
        said = float(flags_of(plan, target)["--cpu-offload-gb"]) * (1 << 30)
        assert whole <= said < whole + (1 << 30) / 99
        (lost,) = export(plan, target, "p").lost
        assert lost.decision == "tiers" and lost.fidelity == "approximate"
    experts = Held(block="routed_experts", tier="cpu", place="compute")
    made = export(serving_plan(tiers=(experts,), model="moe"), "llamacpp", "p")
    assert "--cpu-moe" in made.files[0][1] and made.fidelity == "exact"
    below = serving_plan(tiers=(Held(block="mlp", tier="cpu", place="compute", resident=1),))
    assert flags_of(below, "llamacpp")["--n-gpu-layers"] == "1"


def test_training_and_serving_are_told_apart():
    for target, row in TARGETS.items():
        if row.task != "both":
            plan = toy_plan() if row.task == "serve" else serving_plan()
            with pytest.raises(PlanError, match="and this is a plan of"):
                export(plan, target, "plan.json")
    ((_, text),) = export(toy_plan(hardware="h100x16"), "leaderworkerset", "p.json").files
    assert "torchrun" in text and "p.json" in text
