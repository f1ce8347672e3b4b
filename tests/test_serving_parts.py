"""What a plan's numbers say of themselves: parts that sum, and a cache told where it lies."""

from dataclasses import replace

import pytest
from reports import served
from serving_cases import model

from cost_models.hardware import load_hardware
from cost_models.serving_decisions import Held, Pool, ServeLoad, Serving
from cost_models.serving_engines import load_serving_engine
from planner.report.serving import load_of
from planner.serving.predict import predict
from planner.serving.show import estimate_json, summary

LLAMA = model(layers=32, hidden=4096, inter=14336)
LOAD = ServeLoad(prompt=1024, output=1024)


def seen(hardware, engine="native", **decisions):
    return predict(LLAMA, load_hardware(hardware), load_serving_engine(engine),
                   Serving(batch=decisions.pop("batch", 1), **decisions), LOAD)  # fmt: skip


@pytest.mark.parametrize("hardware", ["t4x1", "rtx-4090x1"])
def test_the_first_token_of_a_request_alone_is_its_parts_and_nothing_waits(hardware):
    p = seen(hardware)
    parts = dict(p.prefill_parts)
    assert sum(parts.values()) == pytest.approx(p.ttft_s, rel=1e-12)
    assert parts["waiting"] == pytest.approx(0, abs=1e-9)
    assert parts["request"] > 0


@pytest.mark.parametrize("hardware, engine, decisions", [
    ("rtx-4090x1", "native", {"batch": 4}), ("h100x1", "vllm", {"batch": 16}),
    ("h100x8", "vllm", {"batch": 64, "tp": 4, "attention_dp": 2}),
    ("h100x1", "vllm", {"batch": 8, "prefill_chunk": 256}),
    ("h100x2", "vllm", {"batch": 16, "prefill": Pool()}),
])  # fmt: skip
def test_what_a_first_token_waits_for_is_a_part_of_it(hardware, engine, decisions):
    p = seen(hardware, engine, **decisions)
    parts = dict(p.prefill_parts)
    assert sum(parts.values()) == pytest.approx(p.ttft_s, rel=1e-12)
    assert all(v >= 0 for v in parts.values()) and parts["waiting"] > 0


def test_a_cache_below_the_gpu_is_told_whole():
    """As many bytes a token wherever it lies; beside them what is on the GPU at a time."""
    gpu, cpu = (seen("rtx-4090x1", kv_tier=tier) for tier in ("gpu", "cpu"))
    assert cpu.memory.kv_bytes_per_token == gpu.memory.kv_bytes_per_token == 131072
    assert cpu.memory.kv_bytes_per_sequence == 2 / 32 * gpu.memory.kv_bytes_per_sequence


def test_the_words_say_where_the_cache_is_and_that_embeddings_are_looked_up():
    one = served("h100x2")
    held = (Held(block="embeddings", tier="cpu", place="compute", resident=0),)
    s = replace(one.plan.serving, tiers=held, kv_tier="cpu")
    plan, load = replace(one.plan, serving=s, rows_on_host=4), load_of(one.plan)
    memory = replace(one.found.memory, kv_bytes_per_token=4000.0,
                     kv_bytes_per_sequence=100.0 * (load.prompt + load.output))
    p = replace(one.found, serving=s, memory=memory, parts=(("cpu", one.found.decode_s),))
    text = " ".join(summary(plan, p).split())
    assert f"4.0 kB a token and GPU in {s.kv}, on cpu, 100 B of it on the GPU" in text
    assert "looked up on cpu" in text and "multiplied" not in text
    said = estimate_json(p, plan.asked)
    assert said["kv_bytes_per_token"] == 4000
    assert said["kv_gpu_bytes_per_sequence"] == 100 * (load.prompt + load.output)
    assert sum(said["prefill_breakdown_s"].values()) == pytest.approx(said["ttft_s"])
