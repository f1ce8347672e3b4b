"""Runs become cases by stated rules, and constants are fitted to them without being told."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace

import numpy as np
import pytest

from cost_models.constants_table import Constant, load_constants
from cost_models.engines import load_engine
from cost_models.fit.tables import renumbered
from cost_models.hardware import load_hardware
from planner.validation import fit, fit_report
from planner.validation.configure import configure
from planner.validation.configure_layout import stages_of
from planner.validation.fit_parameters import PARAMETERS
from planner.validation.predict import predict, prepare, settled, step_s
from planner.validation.rows import Run, Skipped, read_runs
from planner.validation.running import row_of

RUN = {
    "id": "a", "group": "g", "source": {"title": "a paper", "table": "2"},
    "framework": "Megatron-LM", "notes": "",
    "model": {"name": "tiny", "params_b": None, "layers": 4, "hidden": 256, "heads": 4,
              "kv_heads": 2, "ffn_hidden": 512, "vocab": 1024, "seq_len": 512, "moe": None},
    "hardware": {"gpu": "h100-sxm", "num_gpus": 8, "gpus_per_node": 8, "interconnect": "NVLink"},
    "config": {"tp": 2, "pp": 2, "cp": 1, "ep": 1, "zero_or_fsdp": "zero1", "micro_batch": 1,
               "global_batch_sequences": 16, "virtual_pp": None, "recompute": "none",
               "sequence_parallel": True, "precision": "bf16", "schedule": "1F1B"},
    "measured": {"step_time_s": 0.1}, "flops_convention": "model",
}  # fmt: skip


def run_of(tmp_path, **changes) -> Run:
    raw = json.loads(json.dumps(RUN))
    for path, value in changes.items():
        table, _, key = path.partition("__")
        if key:
            raw[table][key] = value
        else:
            raw[table] = value
    file = tmp_path / "runs.yaml"
    file.write_text("# a comment\n- " + json.dumps(raw) + "\n")
    return read_runs(file)[0]


# --- rows ---------------------------------------------------------------------------------------


def test_degrees_multiply_to_the_gpus(tmp_path):
    d = configure(run_of(tmp_path)).decisions
    assert (d.pp, d.dp, d.tp, d.micro_batch, d.microbatches) == (2, 2, 2, 1, 8)
    assert d.stages == (2, 2) and d.zero == 1 and d.shard == 2
    with pytest.raises(Skipped, match="does not divide 8 GPUs"):
        configure(run_of(tmp_path, config__tp=3))


def test_tokens_a_second_are_a_time(tmp_path):
    found = run_of(tmp_path, measured={"tokens_per_s_per_gpu": 1000})
    assert found.step_time_s == 16 * 512 / (1000 * 8)


def test_hfu_over_mfu_is_what_runs_again(tmp_path):
    found = run_of(tmp_path, measured={"step_time_s": 1, "mfu_pct": 30, "hfu_pct": 35})
    assert found.again == pytest.approx(0.5)  # a forward is a third of the model's FLOPs


def test_printed_parameters_say_whether_it_is_gated(tmp_path):
    h, f, layers, vocab = 256, 512, 4, 1024
    attention = 2 * h * 64 * (4 + 2)
    for matmuls, word in ((2, "gelu"), (3, "swiglu")):
        total = layers * (attention + matmuls * h * f) + 2 * vocab * h
        args = dict(configure(run_of(tmp_path, model__params_b=total / 1e9)).args)
        assert args["activation"] == word


@pytest.mark.parametrize("layers", [7, 61, 94, 126])
@pytest.mark.parametrize("chunks", [1, 2, 4, 7])
@pytest.mark.parametrize("tail", [1, 3])
def test_stages_hold_every_layer_once(layers, chunks, tail):
    for filled in (False, True):
        found = stages_of(layers, chunks, filled, tail)
        assert len(found) == chunks and sum(found) == layers and min(found) >= 1
        assert max(found) - min(found) <= max(2, tail + 1) or filled


def test_networks_are_read_a_gpu(tmp_path):
    found = configure(run_of(tmp_path, hardware__num_gpus=16, hardware__interconnect=(
        "RoCE 1600 Gbps per node")))  # fmt: skip
    assert found.cluster.inter.bytes_per_s == 1600e9 / 8 / 8


def test_an_engine_says_whether_scores_are_kept_and_how_stages_fill(tmp_path):
    """9 layers in 4 stages: DeepSpeed fills 3 3 2 1; else embedding and head count as layers."""
    more = {"model__layers": 9, "config__pp": 4, "config__virtual_pp": 1}
    found = configure(run_of(tmp_path, framework="Megatron-DeepSpeed", **more))
    assert found.decisions.stages == (3, 3, 2, 1) and dict(found.args)["flash"] == "0"
    found = configure(run_of(tmp_path, framework="NVIDIA NeMo / Megatron-Core", **more))
    assert found.decisions.stages == (2, 3, 3, 1) and "flash" not in dict(found.args)
    old = {"framework": "Megatron-LM", "hardware__gpu": "a100"}
    assert dict(configure(run_of(tmp_path, **old)).args)["flash"] == "0"
    sharded = configure(run_of(tmp_path, config__zero_or_fsdp="zero3", **old))
    assert sharded.engine.name == "deepspeed-2021" and dict(sharded.args)["flash"] == "0"
    assert any(text.startswith("ZeRO-3 beside Megatron-LM") for text in sharded.defaults)
    assert sharded.cluster.inter == load_hardware("a100x8").inter  # its share is the engine's


def test_jax_runs_say_what_they_are_costed_as(tmp_path):
    found = configure(run_of(tmp_path, framework="PAX / JAX-Toolbox"))
    assert found.engine.name == "automodel"
    assert any(text.startswith("JAX: as NeMo AutoModel") for text in found.defaults)
    found = configure(run_of(tmp_path, framework="NeMo AutoModel"))
    assert found.engine.name == "automodel"
    assert not any(text.startswith("JAX") for text in found.defaults)


# --- fitting ------------------------------------------------------------------------------------


def test_every_parameter_names_a_constant_there_is():
    files = ("a100", "h100", "h200", "b200", "gb300")
    constants = {c.name for name in files for c in load_constants(name).items}
    switches = {k: dict(v) for k, v in load_engine("megatron").switches}
    for parameter in PARAMETERS:
        where, _, name = parameter.place.partition("/")
        if where.startswith("engine:"):
            assert all(hasattr(load_engine(e), name) for e in where[7:].split("+"))
        elif where.startswith("switch:"):
            assert name in switches[where[7:]]
        else:
            assert where == "link" or name in constants
        assert 0 < parameter.prior <= parameter.most and parameter.sd > 0 and parameter.what


def test_what_is_fitted_says_on_how_many_runs_and_how_far_off():
    """Beside each constant; a constant that moves no run says so."""
    for parameter in PARAMETERS:
        for path, table, key in fit_report._places(parameter):
            if path.parent.name == "hardware":
                continue
            tables = tomllib.loads(path.read_text())
            place = f"{table}.fits" if path.name == "engines.toml" and table[0] != "s" else table
            for part in place.split("."):
                tables = tables[part]
            words = tables[key] if place.endswith(".fits") else tables
            assert words["samples"] > 0 and words["p90_error"] >= words["median_error"], parameter
    before = fit.shipped(PARAMETERS[0])
    assert before == load_constants("a100").number("clock.derate")


def test_errors_beside_constants_change_no_plans_hash():
    table = load_constants("h100")
    noted = Constant(name="attention.samples", value=12345.0, source="s")
    others = tuple(c for c in table.items if c.name != noted.name)
    items = tuple(sorted((*others, noted), key=lambda c: c.name))
    assert replace(table, items=items).digest == table.digest


class Here:
    """A pool of this process."""

    def map(self, function, jobs, chunksize=1):
        return [function(job) for job in jobs]


def test_a_fit_finds_the_constant_that_made_the_times(tmp_path):
    clock = next(p for p in PARAMETERS if p.place == "hopper/clock.derate")
    clock = replace(clock, sd=10.0, most=math.inf)
    facts = []
    for batch in (1, 2, 4):
        case = configure(run_of(
            tmp_path, config__micro_batch=batch, group=f"g{batch}", model__hidden=4096,
            model__heads=32, model__kv_heads=8, model__ffn_hidden=16384, model__seq_len=2048,
        ))  # fmt: skip  (large enough to be bound by arithmetic)
        prepared = settled(prepare(case))
        slower = fit.changed(prepared, {"hopper/clock.derate": 0.7})
        row = row_of(prepared.case, predict(prepared))
        facts.append(fit.Fact(prepared=prepared, measured_s=step_s(slower), row=row))
    fit._FACTS[:] = facts
    problem = fit.Problem(facts=facts, parameters=(clock,), pool=Here())
    rows = [0, 1, 2]
    x = problem.solve(rows, 8)
    assert problem.values(x)["hopper/clock.derate"] == pytest.approx(0.7, rel=0.03)
    whole = fit.Whole(x=x, residuals=problem.residuals(x, rows), slopes=problem.slopes(x, rows))
    held = fit.held_out(problem, rows, whole, lambda f: f.prepared.case.run.group)
    assert np.allclose(held, [f.measured_s for f in facts], rtol=0.02)


def test_a_settled_step_is_the_estimates(tmp_path):
    prepared = settled(prepare(configure(run_of(tmp_path))))
    assert step_s(prepared) == pytest.approx(predict(prepared).step_time_s, rel=1e-9)


def test_numbers_are_set_in_place():
    text = "# kept\n[a]\nx = 1 # gone\ny = 2\n\n[b.c]\nz = 3\n"
    found = renumbered(text, {("a", "y"): 0.5, ("b.c", "w"): 7})
    assert found == "# kept\n[a]\nx = 1 # gone\ny = 0.5\n\n[b.c]\nw = 7\nz = 3\n"
    assert "y = 4_800_000_000\n" in renumbered(text, {("a", "y"): 4_800_000_000})  # bytes
    found = renumbered(text, {("a", "y"): {"samples": 3, "p90_error": 0.25}})
    assert tomllib.loads(found)["a"] == {"x": 1, "y": {"samples": 3, "p90_error": 0.25}}
    with pytest.raises(KeyError):
        renumbered(text, {("d", "x"): 1})


def test_a_network_of_a_fit_is_the_catalogues():
    assert load_hardware("h100x16").inter.efficiency == fit.LINK_EFFICIENCY
